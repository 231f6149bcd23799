"""Universal Reasoning Model (arXiv 2512.14693)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trmfast.architectures import ARCHITECTURES
from trmfast.config import URMConfig
from trmfast.layers import ConvSwiGLU
from trmfast.models.act import ACTModel, check_carry
from trmfast.models.carry import Carry, register_carry
from trmfast.models.inner import Family
from trmfast.networks import Block
from trmfast.spec import NetSpec

__all__ = ["URM", "URMCarry"]


@dataclass
class HiddenCarry:
    """The state of URM, [B, L, D] in the forward dtype, without gradient."""

    current_hidden: Tensor


@dataclass
class URMCarry:
    """Everything that passes from one supervision step to the next; the fields of ``Carry`` with the state in one."""

    current_hidden: Tensor
    steps: Tensor
    halted: Tensor
    current_data: dict[str, Tensor]


register_carry(HiddenCarry)
register_carry(URMCarry)


class Blocks(nn.ModuleList):
    """A network that is a bare list of blocks; their convolutions have parameters in the compute dtype, as upstream's.

    Args:
        spec: the network.
        dtype: the compute dtype.
    """

    def __init__(self, spec: NetSpec, dtype: torch.dtype) -> None:
        super().__init__(Block(spec.block) for _ in range(spec.num_layers))
        self.spec = spec
        for block in self:
            assert isinstance(block, Block)
            assert isinstance(block.mlp, ConvSwiGLU)
            block.mlp.dwconv.to(dtype)

    def weights(self) -> tuple[Tensor, ...]:
        """The parameters in the order of ``spec.weight_shapes``."""
        return tuple(weight for block in self if isinstance(block, Block) for weight in block.weights())


class URM(ACTModel):
    """URM: one network updates one state, always with the input; gradients through the last cycle.

    Drop-in for ``URM``: same constructor, initialisation, state_dict, carry and outputs.  In a forward dtype other than
    bfloat16 the convolution computes in that dtype; upstream's stays in bfloat16.
    """

    config_type = URMConfig
    family = Family.of(ARCHITECTURES["URM"], HiddenCarry, Blocks)

    def initial_carry(self, batch: Mapping[str, Tensor]) -> URMCarry:  # type: ignore[override]
        """As :meth:`ACTModel.initial_carry`."""
        return _flat(super().initial_carry(batch))

    def forward(  # type: ignore[override]
        self, carry: URMCarry, batch: Mapping[str, Tensor], compute_target_q: bool = True
    ) -> tuple[URMCarry, dict[str, Tensor]]:
        """As :meth:`ACTModel.forward`; ``compute_target_q`` changes nothing, URM has no target."""
        check_carry("carry", carry, URMCarry, ("current_hidden", "steps", "halted", "current_data"))
        nested = Carry(HiddenCarry(carry.current_hidden), carry.steps, carry.halted, carry.current_data)
        new, outputs = super().forward(nested, batch, compute_target_q)
        return _flat(new), outputs


def _flat(carry: Carry) -> URMCarry:
    return URMCarry(carry.inner_carry.current_hidden, carry.steps, carry.halted, carry.current_data)
