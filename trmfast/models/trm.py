"""Tiny Recursive Model (arXiv 2510.04871) and its two variants."""

from __future__ import annotations

from trmfast.architectures import ARCHITECTURES
from trmfast.config import TRMConfig
from trmfast.models.act import ACTModel
from trmfast.models.carry import Hier6InnerCarry, InnerCarry, SingleZInnerCarry
from trmfast.models.inner import Family

__all__ = ["TRM", "TRMHier6", "TRMSingleZ"]


class TRM(ACTModel):
    """TRM: one network updates two states, z_L with the input and z_H without; gradients through the last cycle.

    Drop-in for ``TinyRecursiveReasoningModel_ACTV1``: same constructor, initialisation, state_dict, carry and outputs.
    """

    config_type = TRMConfig
    family = Family.of(ARCHITECTURES["TRM"], InnerCarry)


class TRMSingleZ(ACTModel):
    """TRM with one state (upstream's ``trm_singlez``)."""

    config_type = TRMConfig
    family = Family.of(ARCHITECTURES["TRMSingleZ"], SingleZInnerCarry)


class TRMHier6(ACTModel):
    """TRM with six low-level states, one for each of a cycle's at most six updates (upstream's ``trm_hier6``)."""

    config_type = TRMConfig
    family = Family.of(ARCHITECTURES["TRMHier6"], Hier6InnerCarry)
