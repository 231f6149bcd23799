"""A private double of a model's inner module: the model's code and settings over tensors of its own.

The double shares no tensor with the model, however large its tables are.  Its weights are random, since zero weights
would hide differences, and drawn from a generator of its own.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from trmfast.dropin.families import FAMILIES
from trmfast.dropin.structure import Found, blocks_of

__all__ = ["BLOCKS", "CYCLES", "SHORT", "Double", "device_of"]

CYCLES, BLOCKS = 2, 2  # H and L cycles, and blocks of a network, in a step
SHORT = 12  # positions after the puzzle tokens, where no weight fixes the length
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def device_of(inner: nn.Module) -> torch.device:
    """Where a double is made: on the model's device, for a model on meta on the CPU."""
    device = next(inner.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


class Double:
    """The inner module over random weights, with :data:`CYCLES` H and L cycles, in one dtype and without hooks.

    Args:
        found: what to copy.
        dtype: dtype of every parameter and float buffer, and of what the model calls its forward dtype.

    Attributes:
        inner: the copy.
        rows: sequences of a batch; one where weights fix a long sequence, which takes seconds each.
    """

    def __init__(self, found: Found, dtype: torch.dtype) -> None:
        self.found, self.dtype, self.device = found, dtype, device_of(found.inner)
        self.family = FAMILIES[found.family]
        self.generator = torch.Generator().manual_seed(0)
        self.rows = 2 if max(spec.block.seq_len for spec in found.nets) <= 256 else 1
        self.inner = self._copy()

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers of the double's dtype and device."""
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu") * scale
        return drawn.to(device=self.device, dtype=self.dtype)

    def tables(self) -> tuple[Tensor, ...] | None:
        """The model's RoPE tables, or None if it has none."""
        rope = getattr(self.inner, self.family.rope, None)
        tables = None if rope is None else tuple(rope())
        return None if tables is None or any(table is None for table in tables) else tables

    def shorten(self) -> None:
        """Leaves the first blocks of every network and, where the nets attend, a few positions."""
        for net in self.family.nets:
            owner = self.inner if net == "layers" else getattr(self.inner, net)
            owner.layers = nn.ModuleList(blocks_of(self.inner, net)[:BLOCKS])
        length = self.length
        if any(spec.block.token_mixer != "attention" for spec in self.found.nets):
            return
        self.length = min(length, self.inner.puzzle_emb_len + SHORT)
        for name in (self.family.rope, "embed_pos"):
            positions = getattr(self.inner, name, None)
            if positions is not None:
                for own in (positions._buffers, positions._parameters):
                    for key, tensor in own.items():
                        if tensor is not None and tensor.dim() == 2 and tensor.shape[0] == length:
                            own[key] = copy.copy(tensor).detach()[: self.length].requires_grad_(tensor.requires_grad)

    def example(self) -> tuple[Any, dict[str, Tensor]]:
        """A carry of random states, and a batch."""
        carry = self._empty_carry()
        for name in self.family.states:
            setattr(carry, name, self.random(self.rows, self.length, self.found.nets[0].block.hidden_size))
        vocabulary = self.inner.lm_head.weight.shape[0]
        shape = (self.rows, self.length - self.inner.puzzle_emb_len)
        tokens = torch.randint(vocabulary, shape, generator=self.generator, dtype=torch.int32, device="cpu")
        ids = torch.zeros(self.rows, dtype=torch.int32, device=self.device)
        return carry, {self.family.inputs: tokens.to(self.device), "puzzle_identifiers": ids}

    def _empty_carry(self) -> Any:
        # nano-trm's takes the device, the others take PyTorch's default.
        arguments = (self.rows, self.device) if self.found.family == "nano-trm" else (self.rows,)
        return self.inner.empty_carry(*arguments)

    @cached_property
    def length(self) -> int:
        """Positions L of a sequence; :meth:`shorten` sets it."""
        found: int = getattr(self._empty_carry(), self.family.states[0]).shape[1]
        return found

    # ---------------------------------------------------------------- the copy

    def _copy(self) -> Any:
        source = self.found.inner
        memo: dict[int, Any] = {}  # what deepcopy substitutes for each tensor
        for module in source.modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    scale = math.prod(parameter.shape[1:]) ** -0.5 if parameter.dim() > 1 else 0.5
                    memo[id(parameter)] = nn.Parameter(self.random(*parameter.shape, scale=scale))
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    memo[id(buffer)] = self._buffer(name, buffer)
        double = object.__new__(type(source))
        double.__dict__.update(source.__dict__)  # not copied: a Lightning module refers to its whole trainer
        for tree in ("_parameters", "_buffers", "_modules"):
            double.__dict__[tree] = copy.deepcopy(source.__dict__[tree], memo)
        settings = copy.copy(getattr(source, self.family.settings))
        for name in self.family.cycles:
            setattr(settings, name, CYCLES)
        # A property, such as Lightning's hparams, reads the attribute with an underscore.
        key = self.family.settings
        double.__dict__[key if key in source.__dict__ else f"_{key}"] = settings
        for module in double.modules():
            for hooks in HOOKS:
                module.__dict__[hooks] = OrderedDict()
            for name, value in module.__dict__.items():
                if value is self.found.dtype:  # forward_dtype, and cast_to of the embeddings
                    module.__dict__[name] = self.dtype
        return double

    def _buffer(self, name: str, buffer: Tensor) -> Tensor:
        """A copy; of the rows of a puzzle embedding, which may be millions, only one."""
        if name == "weights" and buffer.dim() == 2:
            return self.random(1, buffer.shape[1]).expand(buffer.shape)
        if name in ("local_weights", "local_ids") and buffer.dim():
            made = torch.zeros(self.rows, *buffer.shape[1:], dtype=buffer.dtype, device=self.device)
            return made.to(self.dtype).requires_grad_() if buffer.requires_grad else made
        if buffer.is_meta:
            return self.random(*buffer.shape) if buffer.is_floating_point() else torch.zeros_like(buffer, device="cpu")
        copied = buffer.detach().clone()
        return copied.to(self.dtype) if buffer.is_floating_point() else copied
