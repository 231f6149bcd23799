"""Hierarchical Reasoning Model (arXiv 2506.21734)."""

from __future__ import annotations

from trmfast.models.act import ACTModel
from trmfast.models.carry import InnerCarry
from trmfast.models.config import HRMConfig
from trmfast.models.inner import Family
from trmfast.program import RecursionProgram

__all__ = ["HRM"]

NETS = (("H_level", "H_layers"), ("L_level", "L_layers"))


class HRM(ACTModel):
    """HRM: two networks, one a state; gradients through the last update of each; Q-learning decides when to halt.

    Drop-in for ``HierarchicalReasoningModel_ACTV1``: same constructor, initialisation, state_dict, carry and outputs.
    """

    config_type = HRMConfig
    family = Family(RecursionProgram.hrm, "one_step", NETS, ("H_init", "L_init"), InnerCarry)
