"""Which tiles a kernel uses on which GPU: one table, and the rule that picks from it.

Of each kernel there are a few tiles, the most efficient one first.  The first one whose grid has a program for every
multiprocessor is taken, or else the last: few tokens want small tiles, so that a GPU has work everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import torch
from trmfast.kernels.plan import Launch, Tile

__all__ = ["INTERPRETER", "Configuration", "Sizes"]

INTERPRETER = "interpreter"
"""The architecture whose tiles are large, so that the interpreter runs few programs."""

ROW = -1
"""Stands for a tile size that holds a whole row of D elements: a power of two, at least 16."""
LENGTH = -2
"""Stands for a tile size that holds a whole sequence."""


@dataclass(frozen=True)
class Sizes:
    """What tiles depend on besides the GPU.

    Attributes:
        width: D.
        length: L.
        dtype: compute dtype.
    """

    width: int
    length: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Configuration:
    """The choice of tiles for one GPU.

    Attributes:
        architecture: a name in ``ARCHITECTURES``, or ``INTERPRETER``.
        multiprocessors: how many the GPU has.
    """

    architecture: str
    multiprocessors: int

    @property
    def splits(self) -> int:
        """Parts in which the gradients of weights over the sequence are summed."""
        return 2 if self.architecture == INTERPRETER else 8

    def fuses_mlp(self, tokens: int, width: int, inner: int, dtype: torch.dtype) -> bool:
        """Whether the channel mixer is one kernel instead of two."""
        return self.architecture == INTERPRETER and width <= 64

    def tiles(self, kernel: str, sizes: Sizes) -> tuple[Tile, ...]:
        """The tiles of a kernel, most efficient first."""
        found = INTERPRETED[kernel] if self.architecture == INTERPRETER else TILES[kernel]
        return tuple(_fit(tile, sizes) for tile in found)

    def launch(self, kernel: str, sizes: Sizes, build: Callable[[Tile], Launch]) -> Launch:
        """The launch that ``build`` makes of the tile that is chosen."""
        launches = [build(tile) for tile in self.tiles(kernel, sizes)]
        for launch in launches:
            if prod(launch.grid) >= self.multiprocessors:
                return launch
        return launches[-1]


def _fit(tile: Tile, sizes: Sizes) -> Tile:
    whole = {ROW: _power(sizes.width), LENGTH: _power(sizes.length)}
    return replace(tile, blocks=tuple((name, whole.get(size, size)) for name, size in tile.blocks))


def _power(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


INTERPRETED: dict[str, tuple[Tile, ...]] = {
    "qkv": (Tile.of(BLOCK_M=128, BLOCK_N=256, BLOCK_K=128),),
    "attention": (Tile.of(BLOCK_M=128, BLOCK_N=128),),
    "projection": (Tile.of(BLOCK_M=128, BLOCK_K=128),),
    "swiglu": (Tile.of(BLOCK_M=128, BLOCK_I=128, BLOCK_K=128),),
    "gate_up": (Tile.of(BLOCK_M=128, BLOCK_I=128, BLOCK_K=128),),
    "conv_projection": (Tile.of(BLOCK_M=128, BLOCK_K=128),),
    "mlp_t": (Tile.of(BLOCK_C=64, BLOCK_I=128),),
    "gate_up_t": (Tile.of(BLOCK_I=128, BLOCK_C=64, BLOCK_K=128),),
    "down_t": (Tile.of(BLOCK_L=128, BLOCK_C=64, BLOCK_K=128),),
    "norm_backward": (Tile.of(BLOCK_M=128, BLOCK_N=ROW),),
    "swiglu_backward": (Tile.of(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128),),
    "swiglu_backward_t": (Tile.of(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128),),
    "projection_backward": (Tile.of(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128),),
    "projection_backward_norm": (Tile.of(BLOCK_M=128, BLOCK_N=ROW, BLOCK_K=128),),
    "projection_backward_t": (Tile.of(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128),),
    "attention_backward": (Tile.of(BLOCK_M=128, BLOCK_N=LENGTH),),
    "attention_backward_keys": (Tile.of(BLOCK_M=128, BLOCK_N=128),),
    "attention_backward_queries": (Tile.of(BLOCK_M=128, BLOCK_N=128),),
    "weight_gradient": (Tile.of(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128),),
    "weight_gradient_t": (Tile.of(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128),),
    "sum_splits": (Tile.of(BLOCK_N=1024),),
    "conv_swiglu_backward": (Tile.of(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128),),
    "gate_up_backward": (Tile.of(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128),),
    "conv_gradient": (Tile.of(BLOCK_M=16, BLOCK_N=256),),
    "mlp_t_backward": (Tile.of(BLOCK_N=64, BLOCK_I=128),),
    "mlp_t_weight_gradient": (Tile.of(BLOCK_N=64, BLOCK_I=128),),
    "mlp_t_norm_backward": (Tile.of(BLOCK_M=128, BLOCK_N=64),),
}
TILES: dict[str, tuple[Tile, ...]] = INTERPRETED
