"""The launch plan: a recursion as data, a list of kernel launches over named buffers.

A plan is made from a problem and sizes alone, without a device.  The same plan is launched kernel by kernel, captured
into a CUDA graph, compiled offline for an architecture, counted and printed.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from trmfast.kernels.assumptions import check_launch

__all__ = [
    "ALIGNMENT",
    "KEPT",
    "Argument",
    "Buffer",
    "Call",
    "Launch",
    "Plan",
    "Tile",
    "map_buffers",
    "resolve",
    "run",
    "start",
]


CHECK_LAUNCHES = os.environ.get("TRMFAST_CHECK_LAUNCHES") == "1"
"""Whether each launch is compared with what its compiled kernel assumes (assumptions.py)."""


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

    def view(self, *shape: int) -> Buffer:
        """The same elements in another shape."""
        if prod(shape) != self.numel:
            raise ValueError(f"shape: got {shape}, accepted are shapes of {self.numel} elements, as {self.name} has")
        return replace(self, shape=shape)

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def of(self, whole: Tensor) -> Tensor:
        """This piece of the tensor that holds the whole buffer."""
        return whole.view(-1)[self.offset : self.offset + self.numel].view(self.shape)


Argument = Buffer | int | float | None | tuple[Buffer, ...]
"""What a kernel is launched with: None stands for an absent buffer."""


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
        arguments: run-time arguments by parameter name.
        reads, writes: names of the arguments that are read and written; in both if updated in place.
        constants: ``tl.constexpr`` parameters by name, tile sizes among them.
        grid: programs along each axis.
        num_warps, num_stages: launch options.
        flops: multiplications and additions of its matrix products, at true sizes (no padding).
        loads: elements of the compute dtype that one program loads and stores; 0 if no operand is loaded twice.
        special: exponentials and reciprocals, at true sizes; those of rows do not count.
    """

    kernel: str
    arguments: tuple[tuple[str, Argument], ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    grid: tuple[int, ...]
    num_warps: int = 4
    num_stages: int = 2
    flops: int = 0
    loads: int = 0
    special: int = 0

    @classmethod
    def of(
        cls,
        kernel: str,
        grid: tuple[int, ...],
        arguments: Mapping[str, Argument],
        *,
        reads: Iterable[str],
        writes: Iterable[str],
        constants: Mapping[str, Any],
        tile: Tile,
        flops: int = 0,
        loads: int = 0,
        special: int = 0,
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
            loads,
            special,
        )

    def buffers(self, names: Iterable[str]) -> list[Buffer]:
        """The buffers of some arguments, those of tuples among them."""
        arguments = dict(self.arguments)
        found: list[Buffer] = []
        for name in names:
            value = arguments[name]
            found += value if isinstance(value, tuple) else [value] if isinstance(value, Buffer) else []
        return found

    def moved(self, function: Callable[[Buffer], Buffer]) -> Launch:
        """The same launch over other buffers."""
        return replace(self, arguments=tuple((name, map_buffers(function, value)) for name, value in self.arguments))

    @property
    def nbytes(self) -> int:
        """Bytes that the launch moves if each operand is read once and each result written once."""
        return sum(buffer.nbytes for buffer in self.buffers((*self.reads, *self.writes)))


class Call(NamedTuple):
    """A launch, prepared so that little is left to do for each run.

    Attributes:
        launch: what is launched.
        buffers: places in :attr:`Plan.pieces` by the name of an argument, one or a tuple of them.
        options: the other arguments, constants and launch options.
    """

    launch: Launch
    buffers: tuple[tuple[str, int | tuple[int, ...]], ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Launches in order, over buffers that they share.

    Attributes:
        launches: the launches.
        inputs: buffers that the caller fills before.
        outputs: buffers that the caller reads after; they may be inputs too.
        zeros: buffers that must be zero before the first launch.
        kept: the outputs of a forward plan that are inputs of the backward plan, in an order that both have.
    """

    launches: tuple[Launch, ...]
    inputs: tuple[Buffer, ...] = ()
    outputs: tuple[Buffer, ...] = ()
    zeros: tuple[Buffer, ...] = ()
    kept: tuple[Buffer, ...] = ()

    def __iter__(self) -> Iterator[Launch]:
        return iter(self.launches)

    def __len__(self) -> int:
        return len(self.launches)

    @property
    def nbytes(self) -> int:
        """Bytes that the launches move, see :attr:`Launch.nbytes`."""
        return sum(launch.nbytes for launch in self.launches)

    @property
    def flops(self) -> int:
        """Multiplications and additions of all matrix products."""
        return sum(launch.flops for launch in self.launches)

    def sizes(self) -> dict[str, tuple[int, torch.dtype]]:
        """Elements and dtype of every buffer by name, inputs and outputs too."""
        found: dict[str, tuple[int, torch.dtype]] = {}
        used = (buffer for launch in self.launches for buffer in launch.buffers((*launch.reads, *launch.writes)))
        for buffer in (*self.inputs, *self.outputs, *self.zeros, *used):
            size = max(buffer.offset + buffer.numel, found.get(buffer.name, (0, buffer.dtype))[0])
            found[buffer.name] = (size, buffer.dtype)
        return found

    @cached_property
    def pieces(self) -> tuple[Buffer, ...]:
        """Every piece that is an argument, once."""
        used = (launch.buffers(name for name, _ in launch.arguments) for launch in self.launches)
        return tuple(dict.fromkeys(buffer for buffers in used for buffer in buffers))

    @cached_property
    def calls(self) -> tuple[Call, ...]:
        """The launches, prepared."""
        places = {piece: i for i, piece in enumerate(self.pieces)}
        found = []
        for launch in self.launches:
            options: dict[str, Any] = {**dict(launch.constants), "num_warps": launch.num_warps}
            options["num_stages"] = launch.num_stages
            buffers: list[tuple[str, int | tuple[int, ...]]] = []
            for name, value in launch.arguments:
                if isinstance(value, Buffer | tuple):
                    buffers.append((name, map_buffers(places.__getitem__, value)))
                else:
                    options[name] = value
            found.append(Call(launch, tuple(buffers), options))
        return tuple(found)

    @property
    def scratch_bytes(self) -> int:
        """Bytes of the buffers that are neither inputs nor outputs."""
        outside = {buffer.name for buffer in (*self.inputs, *self.outputs)}
        return sum(size * dtype.itemsize for name, (size, dtype) in self.sizes().items() if name not in outside)

    def packed(self) -> Plan:
        """The same plan with its scratch buffers in one allocation a dtype; buffers with disjoint lifetimes overlap.

        So are those of ``kept``, one behind the other, in buffers named :data:`KEPT` and their dtype.
        """
        outside = {buffer.name for buffer in (*self.inputs, *self.outputs, *self.zeros)}
        lives: dict[str, tuple[int, int]] = {}
        for i, launch in enumerate(self.launches):
            for buffer in launch.buffers((*launch.reads, *launch.writes)):
                if buffer.name not in outside:
                    lives[buffer.name] = (lives.get(buffer.name, (i, i))[0], i)
        sizes = self.sizes()
        places: dict[str, tuple[str, int]] = {}
        for dtype in {sizes[name][1] for name in lives}:
            arena = f"scratch.{dtype}".replace("torch.", "")
            names = [name for name in lives if sizes[name][1] == dtype]
            spans = [(_aligned(sizes[name][0], dtype), *lives[name]) for name in names]
            places.update((name, (arena, at)) for name, at in zip(names, _place(spans), strict=True))
        arenas: dict[torch.dtype, Buffer] = {}
        for buffer in self.kept:
            name, dtype = f"{KEPT}{buffer.dtype}".replace("torch.", ""), buffer.dtype
            at = arenas[dtype].numel if dtype in arenas else 0
            places[buffer.name] = name, at
            arenas[dtype] = Buffer(name, (at + _aligned(buffer.numel, dtype),), dtype)

        def move(buffer: Buffer) -> Buffer:
            if buffer.name not in places:
                return buffer
            arena, at = places[buffer.name]
            return replace(buffer, name=arena, offset=at + buffer.offset)

        def gathered(buffers: tuple[Buffer, ...]) -> tuple[Buffer, ...]:
            rest = tuple(buffer for buffer in buffers if buffer not in kept)
            return rest if len(rest) == len(buffers) else (*rest, *arenas.values())

        kept = set(self.kept)
        launches = tuple(launch.moved(move) for launch in self.launches)
        return replace(self, launches=launches, inputs=gathered(self.inputs), outputs=gathered(self.outputs), kept=())


KEPT = "kept."
ALIGNMENT = 256


def _aligned(elements: int, dtype: torch.dtype) -> int:
    """Elements up to the next multiple of the alignment of buffers."""
    step = ALIGNMENT // dtype.itemsize
    return -(-elements // step) * step


def map_buffers(function: Callable[[Buffer], Any], value: Argument) -> Any:
    """An argument with a function applied to each of its buffers."""
    if isinstance(value, tuple):
        return tuple(function(buffer) for buffer in value)
    return function(value) if isinstance(value, Buffer) else value


def _place(spans: list[tuple[int, int, int]]) -> list[int]:
    """Offsets for (size, first, last use), large ones first, each at the lowest offset free for its lifetime."""
    offsets = [0] * len(spans)
    placed: list[int] = []
    for i in sorted(range(len(spans)), key=lambda i: -spans[i][0]):
        size, first, last = spans[i]
        at = 0
        for other in sorted(placed, key=lambda j: offsets[j]):
            other_size, other_first, other_last = spans[other]
            if other_first <= last and first <= other_last and offsets[other] < at + size:
                at = max(at, offsets[other] + other_size)
        offsets[i] = at
        placed.append(i)
    return offsets


@lru_cache(maxsize=256)
def resolve(kernel: str) -> Any:
    """The ``triton.jit`` function that ``"stem.function"`` names."""
    stem, function = kernel.split(".")
    return getattr(importlib.import_module(f"trmfast.kernels.{stem}"), function)


def run(launches: Iterable[Launch], tensors: Mapping[str, Tensor]) -> None:
    """Launches kernels one after the other on the current stream.

    Args:
        launches: what to launch; a plan is prepared once, other iterables anew.
        tensors: the tensor of every buffer, by name; contiguous, at least as large as the buffer.
    """
    plan = launches if isinstance(launches, Plan) else Plan(tuple(launches))
    # A view takes PyTorch 2 us, and launches share most of them.
    views = [piece.of(tensors[piece.name]) for piece in plan.pieces]
    for launch, buffers, options in plan.calls:
        arguments = {name: views[at] if isinstance(at, int) else tuple(views[i] for i in at) for name, at in buffers}
        start(launch, arguments, options)


def start(launch: Launch, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Launches one kernel over tensors."""
    function = resolve(launch.kernel)
    if CHECK_LAUNCHES:
        check_launch(function, launch.grid, arguments, options)
    function[launch.grid](**arguments, **options)
