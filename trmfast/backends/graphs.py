"""CUDA graphs of launch plans: when one pays, its memory, capture and replay."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trmfast.kernels.architectures import Gpu
    from trmfast.kernels.plan import Buffer, Plan

__all__ = ["Graph", "Graphs", "allocate", "fill", "new_input", "outside_of_pools", "pays"]

# Seconds of one launch on the host, an estimate of no GPU: 7e-6 in Python and Triton, about 3e-6 in the driver.  The
# step "model" of `python -m trmfast.benchmark.first_gpu` measures it on a device and reports it beside this number.
HOST_LAUNCH = 10e-6
# A graph costs only the copies in and out of its buffers, and neither number is known better.
MARGIN = 2
MOST_PLANS = 16

T = TypeVar("T")


def pays(plan: Plan, gpu: Gpu) -> bool:
    """Whether launching a plan may take the host longer than running it takes the GPU, by the model of time.

    The environment variable ``TRMFAST_GRAPHS`` set to ``0`` or ``1`` overrides the model.
    """
    from trmfast.kernels.roofline import plan_time

    asked = os.environ.get("TRMFAST_GRAPHS", "")
    return asked == "1" if asked in ("0", "1") else plan_time(gpu, plan) < MARGIN * HOST_LAUNCH * len(plan)


# ---------------------------------------------------------------- buffers


def allocate(plan: Plan, device: torch.device, skip: Iterable[str]) -> dict[str, Tensor]:
    """A tensor for every buffer except those to skip; zeroed where the plan says so."""
    left_out = set(skip)
    tensors = {
        name: torch.empty(size, dtype=dtype, device=device)
        for name, (size, dtype) in plan.sizes().items()
        if name not in left_out
    }
    for buffer in plan.zeros:
        if buffer.name in tensors:
            tensors[buffer.name].zero_()
    return tensors


def new_input(buffer: Buffer, device: torch.device) -> Tensor:
    """A zeroed tensor for an input: rows of the weights over the sequence end in zeros."""
    return torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)


def fill(target: Tensor, given: Tensor) -> None:
    """Copies and casts; what is wider than the given tensor keeps its zeros."""
    target[..., : given.shape[-1]].copy_(given)


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies and casts many tensors in few launches."""
    groups: dict[tuple[torch.dtype, torch.dtype], list[int]] = defaultdict(list)
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if target.shape == source.shape and source.is_contiguous():
            groups[target.dtype, source.dtype].append(i)
        else:
            fill(target, source)
    for group in groups.values():
        torch._foreach_copy_([targets[i] for i in group], [sources[i] for i in group])


def outside_of_pools(device: torch.device, make: Callable[[], T]) -> T:
    """What ``make`` returns, called in a thread of its own, outside of inference mode.

    For tensors that outlive the call.  ``torch.compile(mode="reduce-overhead")`` warms up inside a memory pool, by
    thread or by stream, that must not keep anything else; and a tensor made in inference mode cannot be written outside
    of it.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with torch.cuda.device(device), torch.no_grad():
                results.append(make())
        except BaseException as error:  # raised again by the caller's thread
            errors.append(error)

    thread = threading.Thread(target=work, name="trmfast-graph")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


# ---------------------------------------------------------------- graphs


class _Device:
    """What the graphs of a device share: the stream of captures and the right to run.

    ``torch.cuda.graph`` has one stream of its own in a process, on the device of its first use.  The graphs share their
    scratch memory, so one runs at a time.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.lock = threading.Lock()
        self.done = torch.cuda.Event()  # the end of the latest replay, with its copies


class Graph:
    """A plan as a CUDA graph, with inputs and outputs of its own.

    Inputs are copied in and outputs copied out, so that no caller holds a buffer that the next replay overwrites.  A
    call waits until the previous call of any graph of the device has copied its outputs, on whichever stream that was.

    Args:
        plan: what to capture.
        device: the current device.
        shared: the device's.
        pool: memory that other graphs of the device live in; None if there are none.
    """

    def __init__(self, plan: Plan, device: torch.device, shared: _Device, pool: Any) -> None:
        from trmfast.kernels.plan import run

        self.plan, self.shared = plan, shared
        self.graph: torch.cuda.CUDAGraph | None = torch.cuda.CUDAGraph()
        with shared.lock, torch.cuda.stream(shared.stream):
            inputs = {buffer.name: new_input(buffer, device) for buffer in plan.inputs}
            outside = {buffer.name for buffer in (*plan.outputs, *plan.zeros)}
            scratch = [name for name in plan.sizes() if name not in outside]
            self.tensors = {**allocate(plan, device, skip=[*inputs, *scratch]), **inputs}
            # A call over other tensors may have compiled other kernels: of addresses that are no multiples of 16.
            run(plan, {**allocate(plan, device, skip=self.tensors), **self.tensors})
            with torch.cuda.graph(self.graph, pool=pool, stream=shared.stream, capture_error_mode="thread_local"):
                # Allocated here, scratch lies in the pool, where the next graph's takes the same place.
                tensors = {**allocate(plan, device, skip=self.tensors), **self.tensors}
                for buffer in plan.zeros:
                    tensors[buffer.name].zero_()
                run(plan, tensors)
            shared.stream.synchronize()
        self.targets = [self.tensors[buffer.name].view(buffer.shape) for buffer in plan.inputs]
        self.sources = [buffer.of(self.tensors[buffer.name]) for buffer in plan.outputs]

    def __call__(self, inputs: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The plan's outputs by name, in those of ``into`` or new tensors; None if the graph was dropped meanwhile."""
        with self.shared.lock:
            if self.graph is None:
                return None
            torch.cuda.current_stream().wait_event(self.shared.done)
            try:
                _copy(self.targets, [inputs[buffer.name] for buffer in self.plan.inputs])
                self.graph.replay()
                outputs = zip(self.plan.outputs, self.sources, strict=True)
                results = [into[b.name] if b.name in into else torch.empty_like(source) for b, source in outputs]
                _copy(results, self.sources)
            finally:  # also when there is no memory for the results
                self.shared.done.record()
        return {buffer.name: result for buffer, result in zip(self.plan.outputs, results, strict=True)}

    def drop(self) -> None:
        """Frees the memory, once no replay uses it."""
        with self.shared.lock:
            # It goes back to the stream that allocated it, and may still be in use on another.
            self.shared.done.synchronize()
            self.graph = None
            self.tensors, self.targets, self.sources = {}, [], []


class Graphs:
    """The graphs of the most recent plans.  The first call of a plan gets none: it compiles the kernels."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # A graph; None before there is one; False if there will be none: it does not pay, or there was no memory.
        self._entries: OrderedDict[tuple[Hashable, torch.device], Graph | Literal[False] | None] = OrderedDict()
        self._devices: dict[torch.device, _Device] = {}

    def get(self, key: Hashable, plan: Plan, device: torch.device, gpu: Gpu) -> Graph | None:
        """The graph of a plan on the current device, captured at the second call."""
        with self._lock:
            place = key, device
            if place not in self._entries:
                self._entries[place] = None if pays(plan, gpu) else False
                while len(self._entries) > MOST_PLANS:
                    self._drop()
                return None
            self._entries.move_to_end(place)
            found = self._entries[place]
            if found is None:
                found = self._entries[place] = outside_of_pools(device, lambda: self._capture(plan, device))
            return found or None

    def _capture(self, plan: Plan, device: torch.device) -> Graph | Literal[False]:
        shared = self._devices.get(device)
        if shared is None:
            shared = self._devices[device] = _Device()
        live = (found.graph for (_, other), found in self._entries.items() if found and other == device)
        pool = next((graph.pool() for graph in live if graph is not None), None)
        try:
            return Graph(plan, device, shared, pool)
        except RuntimeError as error:
            if _out_of_memory(error):
                return False
            raise

    def clear(self) -> None:
        """Frees all graphs, and forgets which plans get none."""
        with self._lock:
            while self._entries:
                self._drop()

    def _drop(self) -> None:
        _, found = self._entries.popitem(last=False)
        if found:
            found.drop()


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether this is what an error began with: the end of a failed capture raises another one."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__context__
    return error is not None
