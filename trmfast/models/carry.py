"""The carry from one supervision step to the next; the field names are upstream's."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch.export
from torch import Tensor

__all__ = ["Carry", "Hier6InnerCarry", "InnerCarry", "SingleZInnerCarry"]


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


# torch.export needs the containers of inputs and outputs to be registered.
with warnings.catch_warnings():
    # PyTorch 2.6 warns of a function of its own that this calls.
    warnings.filterwarnings("ignore", "`torch.utils._pytree._register_pytree_node` is deprecated", FutureWarning)
    for _carry in (InnerCarry, SingleZInnerCarry, Hier6InnerCarry, Carry):
        torch.export.register_dataclass(_carry)
