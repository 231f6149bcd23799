"""The carry from one supervision step to the next; the field names are upstream's."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from typing import Any

import torch.export
from torch import Tensor
from torch.fx import _pytree as fx_pytree

__all__ = ["Carry", "Hier6InnerCarry", "InnerCarry", "SingleZInnerCarry", "register_carry"]


@dataclass
class InnerCarry:
    """States of TRM and HRM, each [B, L, D] in the forward dtype, without gradient."""

    z_H: Tensor
    z_L: Tensor


@dataclass
class SingleZInnerCarry:
    """State of the TRM with one state, [B, L, D] in the forward dtype, without gradient."""

    z_L: Tensor


@dataclass
class Hier6InnerCarry:
    """States of the TRM with six low states, each [B, L, D] in the forward dtype, without gradient."""

    z_H: Tensor
    z_L1: Tensor
    z_L2: Tensor
    z_L3: Tensor
    z_L4: Tensor
    z_L5: Tensor
    z_L6: Tensor


@dataclass
class Carry:
    """Everything that passes from one supervision step to the next.

    Attributes:
        inner_carry: the states, a dataclass of tensors [B, L, D].
        steps: supervision steps each row has taken on its puzzle, int32 [B].
        halted: rows that take a new puzzle at the next step, bool [B].
        current_data: the current puzzles: ``inputs`` [B, S], ``labels`` [B, S], ``puzzle_identifiers`` [B].
    """

    inner_carry: Any
    steps: Tensor
    halted: Tensor
    current_data: dict[str, Tensor]


def register_carry(carry: type) -> None:
    """Tells torch.export about a dataclass of inputs and outputs."""
    with warnings.catch_warnings():
        # PyTorch 2.6 warns of a function of its own that this calls.
        warnings.filterwarnings("ignore", "`torch.utils._pytree._register_pytree_node` is deprecated", FutureWarning)
        torch.export.register_dataclass(carry)
    # PyTorch 2.6 leaves out what the module of an exported program needs to take one.
    if carry not in fx_pytree.SUPPORTED_NODES:
        fx_pytree.register_pytree_flatten_spec(
            carry, lambda value, _: [getattr(value, field.name) for field in fields(value)]
        )


for _carry in (InnerCarry, SingleZInnerCarry, Hier6InnerCarry, Carry):
    register_carry(_carry)
