"""Streams and events, with a vector clock for each: what is known to be over when work on a stream begins."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from standin.memory import HazardError

if TYPE_CHECKING:
    from standin.graphs import Graph
    from standin.runtime import Runtime

__all__ = ["Clock", "Event", "Stream", "merge"]

Clock = dict["Stream", int]


def merge(clock: Clock, other: Clock) -> None:
    """Makes a clock know what another one knows."""
    for stream, tick in other.items():
        clock[stream] = max(clock.get(stream, 0), tick)


class Stream:
    """In the place of ``torch.cuda.Stream``."""

    runtime: Runtime

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        index = self.runtime.index(device)
        self._open(index, self.runtime.next_stream())

    @classmethod
    def default(cls, index: int, number: int) -> Stream:
        """The default stream of a device."""
        stream = cls.__new__(cls)
        stream._open(index, number)
        return stream

    def _open(self, index: int, number: int) -> None:
        self.device_index, self.stream_id, self.device_type = index, number, 1
        self.cuda_stream = number % 2**64  # as a pointer
        self.device = torch.device("cuda", index)
        self.now = 0
        self.clock: Clock = {}
        self.capture: Graph | None = None
        self.runtime.streams[self.cuda_stream] = self

    def __repr__(self) -> str:
        return f"stream {self.stream_id} of cuda:{self.device_index}"

    def advance(self) -> None:
        """Enqueues something: it comes after what the stream did before, and after what the host has waited for."""
        self.now += 1
        self.clock[self] = self.now
        merge(self.clock, self.runtime.host)

    def synchronize(self) -> None:
        self.runtime.refuse_in_capture("a stream is synchronised")
        merge(self.runtime.host, self.clock)

    def query(self) -> bool:
        self.runtime.refuse_in_capture("a stream is queried")
        return False

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event


class Event:
    """In the place of ``torch.cuda.Event``."""

    runtime: Runtime

    def __init__(self, **_: Any) -> None:
        self._clock: Clock = {}
        self._graph: Graph | None = None
        self._time: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self.runtime.current_stream()
        stream.advance()
        self._clock, self._graph = dict(stream.clock), stream.capture
        self._time = perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        stream = stream or self.runtime.current_stream()
        if stream.capture is not self._graph and self._clock:
            raise HazardError(f"{stream} waits for an event of another capture, or of none")
        merge(stream.clock, self._clock)

    def synchronize(self) -> None:
        self.runtime.refuse_in_capture("an event is waited for")
        if self._graph is not None:
            raise HazardError("the host waits for an event that was recorded during a capture")
        merge(self.runtime.host, self._clock)

    def query(self) -> bool:
        self.runtime.refuse_in_capture("an event is queried")
        return False

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds of the host between the two, which is when the work between them ran."""
        if self._time is None or end._time is None:
            raise HazardError("the time of an event that was not recorded")
        if any(self.runtime.host.get(stream, 0) < tick for stream, tick in end._clock.items()):
            raise HazardError("the time of an event that the host has not waited for")
        return (end._time - self._time) * 1e3
