"""Blocks of device memory: who owns one, who accessed it last, and whether the next access is ordered after that."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary, finalize

import torch
from torch import Tensor

if TYPE_CHECKING:
    from standin.streams import Clock, Stream

__all__ = ["Access", "Block", "HazardError", "Memory"]


class HazardError(AssertionError):
    """What would go wrong on a GPU."""


@dataclass
class Access:
    """The accesses to a block that later ones must come after.

    Attributes:
        owner: the stream that allocated the block and gets it back.
        write: stream and tick of the last write.
        reads: ticks of the last reads since, by stream.
    """

    owner: Stream
    write: tuple[Stream, int] | None = None
    reads: dict[Stream, int] = field(default_factory=dict)

    def late(self, clock: Clock, *, for_write: bool) -> list[Stream]:
        """The streams whose access is not known to be over at a time."""
        found = [self.write] if self.write is not None else []
        found += self.reads.items() if for_write else ()
        return [stream for stream, tick in found if clock.get(stream, 0) < tick]


@dataclass(eq=False)
class Block:
    """One allocation.

    Attributes:
        device: index of its device.
        begin, size: address and bytes.
        access: its last accesses.
        storage: its bytes.
        pool: of the graphs during whose capture it was allocated, or a pool that a caller chose; or None.
        inference: whether it was allocated in inference mode, and may be written only there.
    """

    device: int
    begin: int
    size: int
    access: Access
    storage: torch.UntypedStorage = field(repr=False)
    pool: object | None = None
    inference: bool = False

    def __str__(self) -> str:
        return f"the {self.size} bytes at {self.begin:#x} of cuda:{self.device}"

    def touch(self, stream: Stream, *, read: bool, write: bool) -> None:
        """An access by work that is enqueued on a stream.

        Raises:
            HazardError: an earlier access of another stream may still be running.
        """
        for other in self.access.late(stream.clock, for_write=write):
            raise HazardError(f"{stream} {'writes' if write else 'reads'} {self}, nothing orders it after {other}")
        if write:
            self.access.write, self.access.reads = (stream, stream.now), {}
        elif read:
            self.access.reads[stream] = stream.now


class Memory:
    """The live blocks, by address."""

    def __init__(self, host: Clock, faults: list[str]) -> None:
        self._blocks: WeakValueDictionary[int, Block] = WeakValueDictionary()
        self._host, self._faults = host, faults
        self.used: dict[int, int] = {}
        self.peak = 0

    def block_of(self, inner: Tensor, device: int, owner: Stream, pool: object | None) -> Block:
        """The block that holds a tensor of the CPU, new if it is not known."""
        storage = inner.untyped_storage()
        begin, size = storage.data_ptr(), storage.nbytes()
        found = self._blocks.get(begin) if size else None
        if found is not None:
            return found
        inference = torch.is_inference_mode_enabled()
        block = Block(device, begin, size, Access(owner), storage, pool, inference)
        if size:
            self._blocks[begin] = block
            self.used[device] = self.used.get(device, 0) + size
            self.peak = max(self.peak, self.used[device])
        finalize(block, self._freed, str(block), device, block.access, storage, pool).atexit = False
        return block

    def at(self, address: int) -> Block:
        """The block that an address lies in.

        Raises:
            HazardError: there is none.
        """
        begins = sorted(self._blocks.keys())
        place = bisect_right(begins, address) - 1
        block = self._blocks.get(begins[place]) if place >= 0 else None
        if block is None or address >= block.begin + block.size:
            raise HazardError(f"{address:#x} lies in no block of device memory")
        return block

    def _freed(
        self, name: str, device: int, access: Access, storage: torch.UntypedStorage, pool: object | None
    ) -> None:
        self.used[device] = self.used.get(device, 0) - storage.nbytes()
        # The allocator gives it to the next user of its stream, who is ordered after that stream and the host only.
        known: Any = {**self._host}
        for stream, tick in access.owner.clock.items():
            known[stream] = max(known.get(stream, 0), tick)
        late = access.late(known, for_write=True)
        if late and pool is None:
            self._faults.append(f"{name} were freed while {late[0]} may still use them")
        if storage.nbytes():
            torch.empty(0, dtype=torch.uint8).set_(storage).fill_(255)  # NaN in every float
