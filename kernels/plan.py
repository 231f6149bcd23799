"""The launch plan: a recursion as data, a list of kernel launches over named buffers.

A plan is made from a problem and sizes alone, without a device.  The same plan is launched kernel by kernel, captured
into a CUDA graph, compiled offline for an architecture, counted and printed.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

__all__ = ["Buffer", "Launch", "Plan", "Tile", "resolve", "run"]


@dataclass(frozen=True)
class Buffer:
    """A contiguous tensor that launches read and write, or a contiguous piece of one.

    Attributes:
        name: unique in a plan; pieces share it.
        shape: of this piece.
        dtype: element type.
        offset: where the piece starts in the whole, in elements.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int = 0

    def __getitem__(self, index: int) -> Buffer:
        """The piece at an index of the first axis."""
        if not 0 <= index < self.shape[0]:
            raise IndexError(f"index: got {index}, accepted are 0 to {self.shape[0] - 1} of {self.name}")
        rest = self.shape[1:]
        return Buffer(self.name, rest, self.dtype, self.offset + index * prod(rest))

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def of(self, whole: Tensor) -> Tensor:
        """This piece of the tensor that holds the whole buffer."""
        return whole.view(-1)[self.offset : self.offset + self.numel].view(self.shape)


@dataclass(frozen=True)
class Tile:
    """A kernel's tile sizes (its ``BLOCK_*`` constants by name) and launch options."""

    blocks: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 2

    @classmethod
    def of(cls, num_warps: int = 4, num_stages: int = 2, **blocks: int) -> Tile:
        return cls(tuple(blocks.items()), num_warps, num_stages)

    def __getitem__(self, name: str) -> int:
        return dict(self.blocks)[name]


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: ``"stem.function"``: a ``triton.jit`` function of ``kernels/stem.py``.
        arguments: run-time arguments by parameter name: buffers, integers, floats, or None for an absent buffer.
        reads, writes: names of the arguments that are read and written; in both if updated in place.
        constants: ``tl.constexpr`` parameters by name, tile sizes among them.
        grid: programs along each axis.
        num_warps, num_stages: launch options.
        flops: multiplications and additions of its matrix products, at true sizes (no padding).
    """

    kernel: str
    arguments: tuple[tuple[str, Buffer | int | float | None], ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    grid: tuple[int, ...]
    num_warps: int = 4
    num_stages: int = 2
    flops: int = 0

    @classmethod
    def of(
        cls,
        kernel: str,
        grid: tuple[int, ...],
        arguments: Mapping[str, Buffer | int | float | None],
        *,
        reads: Iterable[str],
        writes: Iterable[str],
        constants: Mapping[str, Any],
        tile: Tile,
        flops: int = 0,
    ) -> Launch:
        """A launch whose constants are ``constants`` and the tile's sizes."""
        return cls(
            kernel,
            tuple(arguments.items()),
            tuple(name for name in reads if dict(arguments)[name] is not None),
            tuple(name for name in writes if dict(arguments)[name] is not None),
            (*constants.items(), *tile.blocks),
            grid,
            tile.num_warps,
            tile.num_stages,
            flops,
        )

    def buffers(self, names: Iterable[str]) -> list[Buffer]:
        """The buffers of some arguments."""
        arguments = dict(self.arguments)
        return [buffer for name in names if isinstance(buffer := arguments[name], Buffer)]

    @property
    def nbytes(self) -> int:
        """Bytes that the launch moves if each operand is read once and each result written once."""
        return sum(buffer.nbytes for buffer in self.buffers((*self.reads, *self.writes)))


@dataclass(frozen=True)
class Plan:
    """Launches in order, over buffers that they share.

    Attributes:
        launches: the launches.
        inputs: buffers that the caller fills before.
        outputs: buffers that the caller reads after; they may be inputs too.
    """

    launches: tuple[Launch, ...]
    inputs: tuple[Buffer, ...] = ()
    outputs: tuple[Buffer, ...] = ()

    def __iter__(self) -> Iterator[Launch]:
        return iter(self.launches)

    def __len__(self) -> int:
        return len(self.launches)


def resolve(kernel: str) -> Any:
    """The ``triton.jit`` function that ``"stem.function"`` names."""
    stem, function = kernel.split(".")
    return getattr(importlib.import_module(f"trmfast.kernels.{stem}"), function)


def run(launches: Iterable[Launch], tensors: Mapping[str, Tensor]) -> None:
    """Launches kernels one after the other on the current stream.

    Args:
        launches: what to launch.
        tensors: the tensor of every buffer, by name; contiguous, at least as large as the buffer.
    """
    for launch in launches:
        arguments = {
            name: value.of(tensors[value.name]) if isinstance(value, Buffer) else value
            for name, value in launch.arguments
        }
        resolve(launch.kernel)[launch.grid](
            **arguments, **dict(launch.constants), num_warps=launch.num_warps, num_stages=launch.num_stages
        )
