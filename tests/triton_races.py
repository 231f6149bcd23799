"""Finds programs of one launch that touch the same memory, and stores that are read back without a barrier.

On a GPU the programs of a launch run in any order and at the same time, and so do the threads of a program between two
barriers; Triton's interpreter runs them one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from trmfast.kernels.plan import Buffer, Launch, Plan, map_buffers, run

from triton_access import line_in, reordered, watched

__all__ = ["Race", "check_plan", "races_of"]

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Race:
    """Two accesses that nothing orders.

    Attributes:
        kernel: that was launched.
        what: which accesses.
        lines: of the kernels' source, of the accesses.
        buffer: where.
    """

    kernel: str
    what: str
    lines: tuple[str, ...]
    buffer: str

    def __str__(self) -> str:
        return f"{self.kernel}: {self.what} {self.buffer}, {' and '.join(self.lines)}"


@dataclass
class _Access:
    program: int
    kind: str
    units: Any  # sorted, distinct
    line: str


class _Recorder:
    """The accesses of a launch, in units of the smallest element."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, -1
        self.accesses: list[_Access] = []
        self.read_back: list[tuple[_Access, _Access, int]] = []
        self._since_barrier: list[_Access] = []

    def program(self) -> None:
        self.number += 1
        self._since_barrier = []

    def barrier(self) -> None:
        self._since_barrier = []

    def access(self, kind: str, addresses: Any, size: int) -> None:
        units: Any = np.unique(np.asarray(addresses, dtype=np.uint64))
        if size > 2:
            units = (units[:, None] + np.arange(0, size, 2, dtype=np.uint64)).reshape(-1)
        if not units.size:
            return
        found = _Access(self.number, kind, units, line_in(self.folder))
        self.accesses.append(found)
        if kind == "reads":
            for store in self._since_barrier:
                common = np.intersect1d(units, store.units, assume_unique=True)
                if common.size:
                    self.read_back.append((store, found, int(common[0])))
        else:
            self._since_barrier.append(found)


def races_of(launch: Launch, tensors: Mapping[str, Tensor], folder: Path = KERNELS) -> list[Race]:
    """The races of a launch over tensors, one for each pair of lines and buffer; runs it.

    Also what it reads or writes without declaring it: the plan's memory is shared by lifetimes of what is declared.
    """
    recorder = _Recorder(folder)
    with watched(recorder):
        run([launch], tensors)

    def name_of(unit: int) -> str:
        for name, tensor in tensors.items():
            if 0 <= unit - tensor.data_ptr() < tensor.numel() * tensor.element_size():
                return name
        return f"{unit:#x}"

    found: dict[Race, None] = {}

    def add(what: str, a: _Access, b: _Access, unit: int) -> None:
        found[Race(launch.kernel, what, tuple(dict.fromkeys((a.line, b.line))), name_of(unit))] = None

    for store, load, unit in recorder.read_back:
        add("a store is read back without a barrier in", store, load, unit)
    for kind, others in (("writes", ("writes", "reads", "adds")), ("adds", ("reads",))):
        for a, b, unit in _overlaps(recorder.accesses, kind, others):
            add(f"one program {kind}, another one {b.kind}", a, b, unit)
    for access in recorder.accesses:
        declared = launch.buffers(launch.reads if access.kind == "reads" else launch.writes)
        outside = _outside(access.units, declared, tensors)
        if access.kind == "reads" and outside.size:  # it may read what it wrote itself, after a barrier
            own = [a.units for a in recorder.accesses if a.program == access.program and a.kind == "writes"]
            outside = outside[~np.isin(outside, np.concatenate(own))] if own else outside
        if outside.size:
            add(f"{access.kind} without declaring it", access, access, int(outside[0]))
    return list(found)


def _overlaps(accesses: list[_Access], kind: str, others: tuple[str, ...]) -> list[tuple[_Access, _Access, int]]:
    """Pairs of an access of a kind and one of other kinds, of different programs, with a unit that both touch."""
    ones = [i for i, access in enumerate(accesses) if access.kind == kind]
    if not ones:
        return []
    units = np.concatenate([accesses[i].units for i in ones])
    index = np.concatenate([np.full(accesses[i].units.size, i) for i in ones])
    order = np.argsort(units, kind="stable")
    units, index = units[order], index[order]
    distinct, first = np.unique(units, return_index=True)
    last = np.append(first[1:], units.size) - 1
    programs = np.array([access.program for access in accesses])
    found: dict[tuple[str, str], tuple[_Access, _Access, int]] = {}
    for other in accesses:
        if other.kind not in others:
            continue
        place = np.searchsorted(distinct, other.units)
        place = place[place < distinct.size]
        place = place[np.isin(distinct[place], other.units)]
        for owner in (first, last):  # of all that touch a unit: if any is of another program, one of these is
            hits = place[programs[index[owner[place]]] != other.program]
            if hits.size:
                a = accesses[index[owner[hits[0]]]]
                found.setdefault((a.line, other.line), (a, other, int(distinct[hits[0]])))
    return list(found.values())


def _outside(units: Any, declared: Iterable[Buffer], tensors: Mapping[str, Tensor]) -> Any:
    for piece in declared:
        begin = tensors[piece.name].data_ptr() + piece.offset * piece.dtype.itemsize
        units = units[(units < begin) | (units >= begin + piece.nbytes)]
    return units


def check_plan(plan: Plan, seed: int = 0) -> tuple[list[Race], int]:
    """The races of every distinct launch of a plan, and how many programs ran.

    Raises:
        AssertionError: another order of programs gives other bits; names kernel and buffer.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, (size, dtype) in plan.sizes().items():
        tensors[name] = (torch.randn(size, generator=generator) * 0.1).to(dtype)
    found: list[Race] = []
    programs = 0
    for number, launch in enumerate(_distinct(plan)):
        count = int(np.prod(launch.grid))
        before = {b.name: tensors[b.name].clone() for b in launch.buffers(launch.writes)} if count > 1 else {}
        found += races_of(launch, tensors)
        programs += count
        if count > 1:
            _check_order(launch, tensors, before, reverse=number % 2 == 0)
    return found, programs


def _distinct(plan: Plan) -> list[Launch]:
    """One launch for each kernel, constants, grid and aliasing of its arguments."""
    found: dict[Any, Launch] = {}
    for launch in plan:
        places: dict[tuple[str, int], int] = {}

        def place(buffer: Buffer, places: dict[tuple[str, int], int] = places) -> Any:
            return replace(buffer, name=str(places.setdefault((buffer.name, buffer.offset), len(places))), offset=0)

        arguments = tuple((name, map_buffers(place, value)) for name, value in launch.arguments)
        found.setdefault((launch.kernel, launch.constants, launch.grid, arguments), launch)
    return list(found.values())


def _check_order(launch: Launch, tensors: Mapping[str, Tensor], before: Mapping[str, Tensor], reverse: bool) -> None:
    expected = {name: tensors[name].clone() for name in before}
    for name, value in before.items():
        tensors[name].copy_(value)

    def order(count: int) -> list[int]:
        return list(range(count))[::-1] if reverse else np.random.default_rng(count).permutation(count).tolist()

    with reordered(order):
        run([launch], tensors)
    for name, value in expected.items():
        bits = _BITS[value.element_size()]
        same = torch.equal(tensors[name].view(bits), value.view(bits))
        assert same, f"{launch.kernel}: programs in another order give other bits of {name}"
