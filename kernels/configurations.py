"""The choices for one GPU: the time model (roofline.py) picks from the table of tiles (tiles.py).

A kernel has a few tiles.  Large ones load less; small ones keep every multiprocessor busy.  Which is better depends on
the GPU and the number of tokens.  So does the choice between one kernel and two for the channel mixer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from trmfast.kernels.architectures import GPUS, TYPICAL, Gpu
from trmfast.kernels.plan import Launch, Tile
from trmfast.kernels.roofline import plan_time
from trmfast.kernels.tiles import HALF_ROW, INTERPRETED, LENGTH, ROW, TILES, WIDEST_ROW
from trmfast.kernels.tuning import Tuner

__all__ = ["INTERPRETER", "Configuration", "Sizes"]

INTERPRETER = "interpreter"
"""Stands for Triton's interpreter: its tiles are large, so that few programs run."""

MARGIN = 1.15
"""Fuse unless the fused kernel is modelled more than 15 % slower."""

_WHOLE_ROWS = {
    "attention_projection",
    "projection",
    "swiglu",
    "swiglu_rows",
    "conv_projection",
    "projection_backward_norm",
}


@dataclass(frozen=True)
class Sizes:
    """What tiles depend on besides the GPU.

    Attributes:
        width: D.
        length: L.
        dtype: compute dtype.
        head_dim: of attention, 0 without.
    """

    width: int
    length: int
    dtype: torch.dtype
    head_dim: int = 0


@dataclass(frozen=True)
class Configuration:
    """The choices for one GPU.

    Attributes:
        architecture: a name in ``ARCHITECTURES``, or ``INTERPRETER``.
        multiprocessors: how many the GPU has; 0 for the product that is typical of the architecture.
        fusion: ``"most"`` or ``"least"``, one kernel or two wherever there is a choice; or ``"auto"``, as modelled.
        tuner: chooses tiles instead of the model, by timing them; None for the model.
    """

    architecture: str
    multiprocessors: int = 0
    fusion: str = "auto"
    tuner: Tuner | None = field(default=None, compare=False)

    @cached_property
    def gpu(self) -> Gpu:
        """The GPU by its numbers: those of the typical product, scaled to its number of multiprocessors."""
        typical = GPUS[TYPICAL[self.architecture]]
        units = self.multiprocessors or typical.multiprocessors
        share = units / typical.multiprocessors
        return replace(
            typical,
            multiprocessors=units,
            tensor_flops=typical.tensor_flops * share,
            cache_bandwidth=typical.cache_bandwidth * share,
        )

    @property
    def splits(self) -> int:
        """Parts in which the gradients of weights over the sequence are summed."""
        return 2 if self.architecture == INTERPRETER else 8

    def tiles(self, kernel: str, sizes: Sizes) -> tuple[Tile, ...]:
        """The tiles of a kernel."""
        if self.architecture == INTERPRETER:
            return (_fit(INTERPRETED[kernel], sizes),)
        table, size = TILES[kernel], "32-bit" if sizes.dtype == torch.float32 else "16-bit"
        special = (key for key in table if key.startswith(size) and self.architecture in key.split())
        return tuple(_fit(tile, sizes) for tile in table[next(special, size)])

    def offers(self, kernel: str, sizes: Sizes) -> bool:
        """Whether a kernel has tiles: fused ones have none in float32, products over whole rows none for wide rows."""
        if kernel in _WHOLE_ROWS and sizes.width > WIDEST_ROW:
            return False
        size = "32-bit" if sizes.dtype == torch.float32 else "16-bit"
        return self.architecture == INTERPRETER or any(key.startswith(size) for key in TILES[kernel])

    def keeps_sequences_whole(self, sizes: Sizes) -> bool:
        """Whether a program of a token mixer's backward holds a whole sequence; then fewer kernels are enough.

        Heads of more than 64 leave no room for it, nor does float32, whose products hold operands in registers.
        """
        has_room = self.architecture == INTERPRETER or (sizes.dtype != torch.float32 and sizes.head_dim <= 64)
        return sizes.length <= 128 and has_room

    def launch(self, kernel: str, sizes: Sizes, build: Callable[[Tile], Launch]) -> Launch:
        """The launch that ``build`` makes with the fastest tile."""
        launches = [build(tile) for tile in self.tiles(kernel, sizes)]
        if self.tuner is not None:
            return self.tuner.fastest(launches)
        return self.fastest([[launch] for launch in launches])[0]

    def choose(self, one: Sequence[Launch], two: Sequence[Launch]) -> Sequence[Launch]:
        """One kernel or two that do the same; or a product with its norm, or without, which its readers apply.

        The fused kernel also wins if the model puts it slightly behind, within the model's accuracy: it moves less
        memory and saves a launch.
        """
        if self.fusion != "auto" or self.architecture == INTERPRETER:
            return two if self.fusion == "least" else one
        return one if plan_time(self.gpu, one) <= MARGIN * plan_time(self.gpu, two) else two

    def fastest(self, choices: Sequence[Sequence[Launch]]) -> Sequence[Launch]:
        """The fastest of several equivalents; the first among equals."""
        if len(choices) == 1 or self.architecture == INTERPRETER:
            return choices[0]
        return min(choices, key=lambda launches: plan_time(self.gpu, launches))


def _fit(tile: Tile, sizes: Sizes) -> Tile:
    row = _power(sizes.width)
    whole = {ROW: row, LENGTH: _power(sizes.length), HALF_ROW: max(16, row // 2)}
    return replace(tile, blocks=tuple((name, whole.get(size, size)) for name, size in tile.blocks))


def _power(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())
