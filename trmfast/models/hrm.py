"""Hierarchical Reasoning Model (arXiv 2506.21734)."""

from __future__ import annotations

from trmfast.architectures import ARCHITECTURES
from trmfast.config import HRMConfig
from trmfast.models.act import ACTModel
from trmfast.models.carry import InnerCarry
from trmfast.models.inner import Family

__all__ = ["HRM"]


class HRM(ACTModel):
    """HRM: two networks, one per state; gradients through the last update of each; Q-learning decides when to halt.

    Drop-in for ``HierarchicalReasoningModel_ACTV1``: same constructor, initialisation, state_dict, carry and outputs.
    """

    config_type = HRMConfig
    family = Family.of(ARCHITECTURES["HRM"], InnerCarry)
