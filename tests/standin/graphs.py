"""Captures: what is enqueued on a capturing stream is kept, not run, and runs at every replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet, ref

from standin.memory import Access, Block, HazardError

if TYPE_CHECKING:
    from standin.runtime import Runtime

__all__ = ["Graph", "Pool"]


class Pool:
    """Memory that graphs share: they must not run at the same time.

    Attributes:
        graphs: that live in it; PyTorch refuses a pool whose graphs are all gone.
        access: the last replay.
    """

    def __init__(self, owner: Any) -> None:
        self.access = Access(owner)
        self.graphs: WeakSet[Graph] = WeakSet()


class Graph:
    """In the place of ``torch.cuda.CUDAGraph``."""

    runtime: Runtime

    def __init__(self, keep_graph: bool = False) -> None:
        self._work: list[tuple[Callable[[], object], list[tuple[ref[Block], bool, bool]]]] = []
        self._pool: Pool | None = None
        self._kept: list[Block] = []  # the pool's memory stays the graph's, whatever becomes of its tensors
        self._device: int | None = None

    def pool(self) -> Pool | None:
        return self._pool

    def capture_begin(self, pool: Pool | None = None, capture_error_mode: str = "global", **_: Any) -> None:
        stream = self.runtime.current_stream()
        if stream.stream_id == 0 or stream is self.runtime.default_stream(stream.device_index):
            raise HazardError("a capture begins on the default stream")
        if stream.capture is not None:
            raise HazardError(f"{stream} is capturing already")
        if pool is not None and not pool.graphs:
            raise HazardError("a capture shares the memory of graphs that are gone")
        self._pool = pool or Pool(stream)
        self._pool.graphs.add(self)
        self._device = stream.device_index
        stream.capture = self
        self.runtime.capturing.graph = self

    def capture_end(self) -> None:
        stream = self.runtime.current_stream()
        if stream.capture is not self:
            raise HazardError(f"the capture ends on {stream}, where it did not begin")
        stream.capture = None
        self.runtime.capturing.graph = None
        if self.runtime.fail_captures:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture (stand-in)")
        self.runtime.captures += 1

    def add(self, work: Callable[[], object], accesses: Sequence[tuple[Block, bool, bool]]) -> None:
        """Keeps work, and which blocks it reads and writes."""
        self._kept += [block for block, *_ in accesses if block.pool is self._pool]
        self._work.append((work, [(ref(block), read, write) for block, read, write in accesses]))

    def replay(self) -> None:
        stream = self.runtime.current_stream()
        if stream.capture is not None:
            raise HazardError("a graph is replayed while another is captured")
        if self._device is None:
            raise HazardError("a graph is replayed that was not captured")
        if stream.device_index != self._device:
            raise HazardError(f"a graph of cuda:{self._device} is replayed on {stream}")
        stream.advance()
        assert self._pool is not None
        if self._kept:
            for other in self._pool.access.late(stream.clock, for_write=True):
                raise HazardError(
                    f"a graph runs on {stream}, nothing orders it after one on {other} that shares its memory"
                )
            self._pool.access.write = (stream, stream.now)
        for work, accesses in self._work:
            for weak, read, write in accesses:
                block = weak()
                if block is None:
                    raise HazardError("a graph replays over memory that was freed")
                if block.pool is not self._pool:
                    block.touch(stream, read=read, write=write)
            work()
        self.runtime.replays += 1

    def reset(self) -> None:
        self._work, self._kept, self._device = [], [], None
