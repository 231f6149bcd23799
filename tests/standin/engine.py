"""The extension of the CUDA engine: takes addresses as the driver does, and checks them as no driver would.

``pack`` and ``forward`` are work of the stream they are given.  What they compute is the reference's, from the memory
at the addresses: a wrong order of arguments, or memory that is gone, shows in the results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from standin.memory import Block, HazardError
from standin.runtime import Runtime
from standin.streams import Stream
from trmfast.backends.call import ForwardCall, Kept
from trmfast.backends.reference import ReferenceBackend
from trmfast.engine import block_fields, update_rows
from trmfast.problem import Problem

__all__ = ["Engine", "Prepared"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
POISON = -12345


@dataclass
class Packed:
    """The block's shape, of which the backend reads how large its packed weights are."""

    packed_elements: int


@dataclass
class Prepared:
    """What a launch is made of; the numbers are any that fit together."""

    problem: Problem
    batch: int
    length: int
    steps: list[int]
    sources: list[int]
    runs: list[int]
    groups: int = 4
    group_blocks: int = 2
    exchange_elements: int = 64
    rows: int = 16
    channels: int = 16
    packed: int = 1024
    token_packed: int = 0
    head_width: int = 16

    def resident_blocks(self, element: str) -> int:
        """On one multiprocessor."""
        assert element in DTYPES
        return 1


class Engine:
    """In the place of ``trmfast._cuda``, for one problem.

    Attributes:
        reason: what ``prepare`` returns instead of a launch, or None.
        launches: so far.
    """

    arrival_stride = 32

    def __init__(self, runtime: Runtime, problem: Problem) -> None:
        self.runtime, self.problem = runtime, problem
        self.reason: str | None = None
        self.launches = 0

    def missing_driver(self) -> str | None:
        return None

    def limits(self, index: int) -> tuple[int, int, int, int]:
        return (*self.runtime.capability, 227 << 10, self.runtime.multiprocessors)

    def Device(self, **limits: Any) -> dict[str, Any]:
        return limits

    def BlockShape(self, **fields: Any) -> Packed:
        shapes = self.problem.nets[0].block.weight_shapes.values()
        assert fields == block_fields(self.problem.nets[0].block)
        return Packed(sum(map(prod, shapes)))

    def prepare(self, *, program: Any, layers: Any, batch: int, length: int, **_: Any) -> Prepared | str:
        if self.reason is not None:
            return self.reason
        assert program == update_rows(self.problem.program)
        assert layers == [net.num_layers for net in self.problem.nets]
        return Prepared(self.problem, batch, length, [1, 2, 3, 4], [5], [6, 7, 8, 9])

    # ---------------------------------------------------------------- memory

    def _stream(self, handle: int) -> Stream:
        stream = self.runtime.streams.get(handle)
        if stream is None:
            raise HazardError(f"{handle} is no stream")
        if stream.device_index != self.runtime.current_device():
            raise HazardError(f"the engine launches on {stream}, cuda:{self.runtime.current_device()} is current")
        return stream

    def _at(self, address: int, shape: Sequence[int], dtype: torch.dtype) -> tuple[Block, Tensor]:
        block = self.runtime.memory.at(address)
        if block.device != self.runtime.current_device():
            raise HazardError(f"the engine uses {block}, cuda:{self.runtime.current_device()} is current")
        offset, size = address - block.begin, prod(shape) * dtype.itemsize
        if offset + size > block.size:
            raise HazardError(f"the engine uses {size} bytes at {address:#x}, beyond the end of {block}")
        whole = torch.empty(0, dtype=torch.uint8).set_(block.storage)
        return block, whole[offset : offset + size].view(dtype).view(*shape)

    def _enqueue(self, stream: Stream, work: Any, reads: Sequence[Block], writes: Sequence[Block]) -> None:
        stream.advance()
        accesses = [(block, True, False) for block in reads] + [(block, False, True) for block in writes]
        if stream.capture is not None:
            stream.capture.add(work, accesses)
            return
        for block, read, write in accesses:
            block.touch(stream, read=read, write=write)
        with torch.inference_mode(False), torch.no_grad():
            work()

    # ---------------------------------------------------------------- launches

    def pack(self, element: str, block: Packed, weights: Sequence[int], packed: int, stream: int) -> None:
        shapes = self.problem.nets[0].block.weight_shapes.values()
        sources = [self._at(at, shape, torch.float32) for at, shape in zip(weights, shapes, strict=True)]
        target, out = self._at(packed, (block.packed_elements,), DTYPES[element])
        self._enqueue(
            self._stream(stream),
            lambda: out.copy_(torch.cat([w.reshape(-1) for _, w in sources])),
            [source for source, _ in sources],
            [target],
        )

    def forward(
        self,
        *,
        element: str,
        prepared: Prepared,
        steps: int,
        sources: int,
        runs: int,
        weights: Sequence[int],
        states_in: Sequence[int],
        states_out: Sequence[int],
        x: int,
        saved: int,
        cos: int,
        sin: int,
        exchange: int,
        arrivals: int,
        failed: int,
        timeout_ns: int,
        stream: int,
    ) -> None:
        problem, dtype = self.problem, DTYPES[element]
        shape = (prepared.batch, prepared.length, problem.hidden_size)
        tables = (prepared.length, problem.rope_dim or 0)
        words = [
            (self._at(address, (len(expected),), torch.int32), expected)
            for address, expected in ((steps, prepared.steps), (sources, prepared.sources), (runs, prepared.runs))
        ]
        layer = sum(prod(s) for s in problem.nets[0].block.weight_shapes.values())
        packed = [self._at(at, (net.num_layers, layer), dtype) for at, net in zip(weights, problem.nets, strict=True)]
        states = [self._at(at, shape, dtype) for at in states_in]
        given = [self._at(x, shape, dtype)] if x else []
        rope = [self._at(at, tables, torch.float32) for at in (cos, sin) if at]
        out = [self._at(at, shape, dtype) for at in states_out]
        window = [self._at(saved, (problem.num_grad_updates, *shape), dtype)] if saved else []
        scratch = self._at(exchange, (prepared.exchange_elements,), dtype)
        counters = self._at(arrivals, (prepared.groups * self.arrival_stride,), torch.int32)
        if failed not in self.runtime.pinned:
            raise HazardError("the word for failures is not in pinned memory")
        if not timeout_ns:
            raise HazardError("a group of blocks gives up at once")
        self.launches += 1

        def work() -> None:
            for (_, found), expected in words:
                if found.tolist() != expected:
                    raise HazardError("the words of the program are not those that were prepared")
            if bool(counters[1].any()):
                raise HazardError("the counters of the barriers do not begin at zero")
            counters[1].fill_(POISON)
            scratch[1].fill_(float("nan"))
            call = ForwardCall(
                problem,
                [state for _, state in states],
                given[0][1] if given else None,
                [w for _, net in packed for row in net for w in self._unpack(row)],
                rope[0][1] if rope else None,
                rope[1][1] if rope else None,
                bool(window),
                Kept(),
            )
            results, kept, _ = ReferenceBackend().forward(call)
            for (_, target), result in zip(out, results, strict=True):
                target.copy_(result)
            for _, target in window:
                target.copy_(kept)

        reads = [block for block, _ in (*(w for w, _ in words), *packed, *states, *given, *rope)]
        self._enqueue(self._stream(stream), work, reads, [b for b, _ in (*out, *window, scratch, counters)])

    def _unpack(self, row: Tensor) -> list[Tensor]:
        shapes = list(self.problem.nets[0].block.weight_shapes.values())
        parts = row.split([prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
