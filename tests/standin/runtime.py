"""The stand-in in the place of ``torch.cuda``: devices, current streams, captures, and the dispatch of operators."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from standin.graphs import Graph
from standin.kernels import formula, launch_on
from standin.memory import Block, HazardError, Memory
from standin.streams import Clock, Event, Stream, merge
from standin.tensors import ALLOCATIONS, MADE_BESIDE, READ_BY_HOST, DeviceMode, DeviceTensor, Operation

__all__ = ["Runtime", "standin"]


class Runtime:
    """The state of the stand-in.

    Attributes:
        streams: by handle.
        host: what the host has waited for.
        faults: found where nothing can be raised, in the end of a block's life.
        captures, replays: counts of graphs.
        capacity: bytes of a device's memory; more raises OutOfMemoryError.
        fail_captures: whether allocations during a capture raise it, and the end of the capture then another error.
        gcn_arch: what an AMD GPU calls itself.
        counts: operators that ran, by name.
        pinned: addresses of tensors in pinned memory.
        compiled: the kernels that Triton would have compiled so far.
        kernel: what a launch does, to tensors of the CPU.
    """

    def __init__(self, devices: int, capability: tuple[int, int], multiprocessors: int) -> None:
        self.devices, self.capability, self.multiprocessors = devices, capability, multiprocessors
        self.streams: dict[int, Stream] = {}
        self.host: Clock = {}
        self.faults: list[str] = []
        self.memory = Memory(self.host, self.faults)
        self.captures = self.replays = 0
        self.capacity = 1 << 60
        self.fail_captures = False
        self.gcn_arch = ""
        self.pinned: set[int] = set()
        self.counts: Counter[str] = Counter()
        self.compiled: set[Any] = set()
        self.kernel: Callable[..., object] = formula
        self.pool: object | None = None
        self.capturing = threading.local()
        self._local = threading.local()
        for kind in (Stream, Event, Graph, DeviceTensor):
            kind.runtime = self
        self._defaults = [Stream.default(i, -1 - i) for i in range(devices)]

    # ---------------------------------------------------------------- devices and streams

    def index(self, device: Any = None) -> int:
        """The number of a device, of the current one without."""
        if isinstance(device, str):
            device = torch.device(device)
        found = device.index if isinstance(device, torch.device) else device
        found = self.current_device() if found is None else int(found)
        if not 0 <= found < self.devices:
            raise RuntimeError(f"CUDA error: invalid device ordinal: {found}")
        return found

    def next_stream(self) -> int:
        return 1 + len(self.streams)

    def current_device(self) -> int:
        return getattr(self._local, "device", 0)

    def exchange_device(self, index: int) -> int:
        before = self.current_device()
        if index >= 0:
            self._local.device = self.index(index)
        return before

    def default_stream(self, device: Any = None) -> Stream:
        return self._defaults[self.index(device)]

    def current_stream(self, device: Any = None) -> Stream:
        index = self.index(device)
        return getattr(self._local, "streams", {}).get(index, self._defaults[index])

    def set_stream(self, stream: Stream | None) -> None:
        if stream is not None:
            self._local.streams = {**getattr(self._local, "streams", {}), stream.device_index: stream}
            self._local.device = stream.device_index

    def synchronize(self, device: Any = None) -> None:
        self.refuse_in_capture("a device is synchronised")
        index = self.index(device)
        for stream in self.streams.values():
            if stream.device_index == index:
                merge(self.host, stream.clock)

    def reset_peak(self, index: int) -> None:
        self.memory.peak = self.memory.used.get(index, 0)

    def refuse_in_capture(self, what: str) -> None:
        """Raises if this thread captures a graph."""
        if getattr(self.capturing, "graph", None) is not None:
            raise HazardError(f"{what} during a capture")

    def run_thread(self, run: Any, thread: threading.Thread) -> None:
        """Runs a thread with the mode that catches factories."""
        with DeviceMode(self):
            run(thread)

    @contextmanager
    def private_pool(self, stream: Stream) -> Iterator[WeakSet[Block]]:
        """As Inductor's warm-up of ``reduce-overhead``: what this thread allocates comes from a pool of its own.

        Yields its blocks that live; at the end Inductor takes them for a leak, unless they are outputs.
        """
        self.pool = object()
        blocks: WeakSet[Block] = WeakSet()
        self._local.taken = blocks
        before = self.current_stream()
        try:
            self.set_stream(stream)
            yield blocks
        finally:
            self.set_stream(before)
            self.pool, self._local.taken = None, None

    # ---------------------------------------------------------------- operators

    def dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Runs an operator whose tensors lie on a device of the stand-in, or anywhere."""
        if func.namespace == "trmfast":
            from trmfast import ops

            kernels: dict[str, Any] = {"recursion": ops._forward, "recursion_backward": ops._backward}
            kernel = kernels[func._opname]
            with DeviceMode(self):
                return kernel(*args, **kwargs)
        if kwargs.get("pin_memory"):
            pinned = func(*args, **{**kwargs, "pin_memory": None})
            self.pinned.add(pinned.data_ptr())
            return pinned
        if func in MADE_BESIDE and kwargs.get("device") == torch.device("meta"):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        operation = Operation(self, func, args, kwargs)
        if operation.index is None:
            return func(*args, **kwargs)
        stream = self.current_stream(operation.index)
        returns = func._schema.returns
        if returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns):
            return self._wrap(operation.run(), operation.index)  # a view
        if func._opname in ALLOCATIONS:
            return self._wrap(operation.run(), operation.index)
        if func in READ_BY_HOST or operation.to_host:
            self.refuse_in_capture(f"{func}: the host waits for a value")
        stream.advance()
        self.counts[func._opname] += 1
        if stream.capture is not None:
            return self._capture(stream.capture, operation, args, kwargs)
        for block, read, write in operation.accesses:
            block.touch(stream, read=read, write=write)
        result = operation.run()
        if operation.from_host:
            merge(self.host, stream.clock)  # from pageable memory: the host waits
        if func in READ_BY_HOST or operation.to_host:
            merge(self.host, stream.clock)
            return args[0] if operation.writes else result
        if operation.writes:
            return args[0] if returns else None
        wrapped = self._wrap(result, operation.index)
        tree_map(lambda t: t.block.touch(stream, read=False, write=True) if isinstance(t, DeviceTensor) else t, wrapped)
        return wrapped

    def _capture(self, graph: Graph, operation: Operation, args: Any, kwargs: dict[str, Any]) -> Any:
        if operation.from_host:
            raise HazardError(f"{operation.func}: a copy from pageable memory during a capture")
        if operation.writes:
            graph.add(operation.run, operation.accesses)
            return args[0] if operation.func._schema.returns else None
        result = operation.run()
        assert isinstance(result, Tensor), operation.func
        wrapped = self._wrap(result, operation.index)
        graph.add(lambda: result.copy_(operation.run()), [*operation.accesses, (wrapped.block, False, True)])
        if result.is_floating_point():
            result.fill_(float("nan"))  # nothing was computed yet
        return wrapped

    def _wrap(self, result: Any, index: int | None) -> Any:
        assert index is not None

        def wrap(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            stream = self.current_stream(index)
            pool: object | None = stream.capture.pool() if stream.capture is not None else None
            taken = getattr(self._local, "taken", None)
            if pool is None and taken is not None:
                pool = self.pool
            block = self.memory.block_of(value, index, stream, pool)
            if taken is not None and block.pool is self.pool:
                taken.add(block)
            if self.memory.used.get(index, 0) > self.capacity or (self.fail_captures and stream.capture is not None):
                raise torch.OutOfMemoryError("CUDA out of memory (stand-in)")
            return DeviceTensor(value, block)

        return tree_map(wrap, result)


def _functions(runtime: Runtime) -> dict[str, Any]:
    """What takes the place of the names of ``torch.cuda``."""
    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: runtime.devices,
        "current_device": runtime.current_device,
        "set_device": lambda device: runtime.exchange_device(runtime.index(device)) and None,
        "_exchange_device": runtime.exchange_device,
        "_maybe_exchange_device": runtime.exchange_device,
        "current_stream": runtime.current_stream,
        "default_stream": runtime.default_stream,
        "set_stream": runtime.set_stream,
        "synchronize": runtime.synchronize,
        "empty_cache": lambda: runtime.refuse_in_capture("the cache is emptied"),
        "is_current_stream_capturing": lambda: runtime.current_stream().capture is not None,
        "get_device_capability": lambda _=None: runtime.capability,
        "get_device_properties": lambda _=None: SimpleNamespace(
            multi_processor_count=runtime.multiprocessors, gcnArchName=runtime.gcn_arch, L2_cache_size=50 << 20
        ),
        "mem_get_info": lambda _=None: (runtime.capacity, runtime.capacity),
        "memory_allocated": lambda device=None: runtime.memory.used.get(runtime.index(device), 0),
        "max_memory_allocated": lambda _=None: runtime.memory.peak,
        "reset_peak_memory_stats": lambda device=None: runtime.reset_peak(runtime.index(device)),
        "get_device_name": lambda _=None: "stand-in",
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
    }


@contextmanager
def standin(
    devices: int = 1, capability: tuple[int, int] = (9, 0), multiprocessors: int = 132, interpreted: bool = False
) -> Iterator[Runtime]:
    """Puts the stand-in in the place of ``torch.cuda``, and its kernels in that of kernels/.

    Args:
        devices: how many.
        capability, multiprocessors: of each.
        interpreted: whether launches compute in Triton's interpreter, instead of a formula of what they read.

    Raises:
        HazardError: at the end, with what was found where nothing could be raised.
    """
    from trmfast.kernels import plan

    from trmfast.backends import triton

    runtime = Runtime(devices, capability, multiprocessors)
    if interpreted:
        runtime.kernel = plan.start
    caches = (triton._architecture, triton._configuration)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "start", partial(launch_on, runtime))
        for name, value in _functions(runtime).items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.cuda.graph, "default_capture_stream", None)
        patch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
        patch.setattr(torch.version, "cuda", "13.0")
        patch.setattr(triton, "interprets", lambda: False)
        run = threading.Thread.run
        patch.setattr(threading.Thread, "run", lambda thread: runtime.run_thread(run, thread))
        triton.release_memory()
        for cache in caches:
            cache.cache_clear()
        with DeviceMode(runtime):
            yield runtime
            triton.release_memory()
        for cache in caches:
            cache.cache_clear()
    if runtime.faults:
        raise HazardError("; ".join(runtime.faults))
