"""Tiny Recursive Model (arXiv 2510.04871) and its two variants."""

from __future__ import annotations

from trmfast.models.act import ACTModel
from trmfast.models.carry import Hier6InnerCarry, InnerCarry, SingleZInnerCarry
from trmfast.models.config import TRMConfig
from trmfast.models.inner import Family
from trmfast.program import RecursionProgram

__all__ = ["TRM", "TRMHier6", "TRMSingleZ"]

NETS = (("L_level", "L_layers"),)


class TRM(ACTModel):
    """TRM: one network updates two states, z_L with the input and z_H without; gradients through the last cycle.

    Drop-in for ``TinyRecursiveReasoningModel_ACTV1``: same constructor, initialisation, state_dict, carry and outputs.
    """

    config_type = TRMConfig
    family = Family(RecursionProgram.trm, "last_cycle", NETS, ("H_init", "L_init"), InnerCarry)


class TRMSingleZ(ACTModel):
    """TRM with one state (upstream's ``trm_singlez``)."""

    config_type = TRMConfig
    family = Family(RecursionProgram.single_z, "last_cycle", NETS, ("L_init",), SingleZInnerCarry)


class TRMHier6(ACTModel):
    """TRM with six low-level states, one for each of a cycle's at most six updates (upstream's ``trm_hier6``)."""

    config_type = TRMConfig
    family = Family(
        RecursionProgram.hier6, "last_cycle", NETS, ("H_init", *(f"L{k}_init" for k in range(1, 7))), Hier6InnerCarry
    )
