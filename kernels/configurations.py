"""Which tiles a kernel uses on which GPU: one table, and the model of time (roofline.py) that picks from it.

Of each kernel there are a few tiles.  Large ones load less, small ones give every multiprocessor something to do: which
is better depends on the GPU and on the number of tokens, and so does whether the channel mixer is one kernel or two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from trmfast.kernels.architectures import GPUS, TYPICAL, Gpu
from trmfast.kernels.plan import Launch, Tile
from trmfast.kernels.roofline import plan_time

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
    """The choices for one GPU.

    Attributes:
        architecture: a name in ``ARCHITECTURES``, or ``INTERPRETER``.
        multiprocessors: how many the GPU has; 0 for the product that is typical of the architecture.
        channel_mixer: ``"one"`` or ``"two"`` kernels, or ``"auto"``, whatever the model says takes less time.
    """

    architecture: str
    multiprocessors: int = 0
    channel_mixer: str = "auto"

    @cached_property
    def gpu(self) -> Gpu:
        """The GPU by its numbers; those of an unknown product are the typical one's, in proportion."""
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
        table = TILES[kernel]
        size = "32-bit" if sizes.dtype == torch.float32 else "16-bit"
        for key in (f"{self.architecture} {size}", size):
            if key in table:
                return tuple(_fit(tile, sizes) for tile in table[key])
        raise KeyError(f"{kernel}: no tiles for {self.architecture} and {size}")

    def launch(self, kernel: str, sizes: Sizes, build: Callable[[Tile], Launch]) -> Launch:
        """The launch that ``build`` makes of the tile that takes least time."""
        launches = [build(tile) for tile in self.tiles(kernel, sizes)]
        return self.fastest([[launch] for launch in launches])[0]

    def mixer(self, one: Sequence[Launch], two: Sequence[Launch]) -> Sequence[Launch]:
        """The launches of the channel mixer, as one kernel or as two."""
        forced = {"one": one, "two": two}.get(self.channel_mixer)
        return self.fastest([one, two]) if forced is None else forced

    def fastest(self, choices: Sequence[Sequence[Launch]]) -> Sequence[Launch]:
        """Of some ways to do the same, the one that takes least time, and among equals the first."""
        if len(choices) == 1 or self.architecture == INTERPRETER:
            return choices[0]
        return min(choices, key=lambda launches: plan_time(self.gpu, launches))


def _fit(tile: Tile, sizes: Sizes) -> Tile:
    whole = {ROW: _power(sizes.width), LENGTH: _power(sizes.length)}
    return replace(tile, blocks=tuple((name, whole.get(size, size)) for name, size in tile.blocks))


def _power(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


INTERPRETED: dict[str, Tile] = {
    "qkv": Tile.of(BLOCK_M=128, BLOCK_N=256, BLOCK_K=128),
    "attention": Tile.of(BLOCK_M=128, BLOCK_N=128),
    "projection": Tile.of(BLOCK_M=128, BLOCK_K=128),
    "swiglu": Tile.of(BLOCK_M=128, BLOCK_I=128, BLOCK_K=128),
    "gate_up": Tile.of(BLOCK_M=128, BLOCK_I=128, BLOCK_K=128),
    "conv_projection": Tile.of(BLOCK_M=128, BLOCK_K=128),
    "mlp_t": Tile.of(BLOCK_C=64, BLOCK_I=128),
    "gate_up_t": Tile.of(BLOCK_I=128, BLOCK_C=64, BLOCK_K=128),
    "down_t": Tile.of(BLOCK_L=128, BLOCK_C=64, BLOCK_K=128),
    "norm_backward": Tile.of(BLOCK_M=128, BLOCK_N=ROW),
    "swiglu_backward": Tile.of(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128),
    "swiglu_backward_t": Tile.of(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128),
    "projection_backward": Tile.of(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128),
    "projection_backward_norm": Tile.of(BLOCK_M=128, BLOCK_N=ROW, BLOCK_K=128),
    "projection_backward_t": Tile.of(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128),
    "attention_backward": Tile.of(BLOCK_M=128, BLOCK_N=LENGTH),
    "attention_backward_keys": Tile.of(BLOCK_M=128, BLOCK_N=128),
    "attention_backward_queries": Tile.of(BLOCK_M=128, BLOCK_N=128),
    "weight_gradient": Tile.of(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128),
    "weight_gradient_t": Tile.of(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128),
    "sum_splits": Tile.of(BLOCK_N=1024),
    "conv_swiglu_backward": Tile.of(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128),
    "gate_up_backward": Tile.of(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128),
    "conv_gradient": Tile.of(BLOCK_M=16, BLOCK_N=256),
    "mlp_t_backward": Tile.of(BLOCK_N=64, BLOCK_I=128),
    "mlp_t_weight_gradient": Tile.of(BLOCK_N=64, BLOCK_I=128),
    "mlp_t_norm_backward": Tile.of(BLOCK_M=128, BLOCK_N=64),
}
TILES: dict[str, dict[str, tuple[Tile, ...]]] = {
    name: {"16-bit": (tile,), "32-bit": (tile,)} for name, tile in INTERPRETED.items()
}
