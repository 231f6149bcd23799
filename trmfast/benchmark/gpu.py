"""A GPU as the device of a benchmark: events of its stream instead of the host's clock, its peak, its memory.

Calls are enqueued one after the other, so that a sample holds the time that the host takes to launch wherever the GPU
waits for it, and no time in which the host waits for the GPU.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from trmfast.backends import BACKENDS

__all__ = [
    "PEAK_SOURCE",
    "bandwidth",
    "cache_bytes",
    "current",
    "describe",
    "missing_gpu",
    "peak",
    "peak_bytes",
    "seconds_of",
]

PEAK_SIZE = 8192
PEAK_SOURCE = f"torch.mm of {PEAK_SIZE} x {PEAK_SIZE}, bfloat16"
PEAK_REPEATS = 5


def missing_gpu() -> str | None:
    """None, or in one line why nothing can be timed on a GPU here."""
    if not torch.cuda.is_available():
        return "no GPU: torch.cuda.is_available() is False"
    reason = BACKENDS["triton"].available()
    return None if reason is None else f"the triton backend does not run: {reason}"


def current() -> torch.device:
    """The current GPU, with its number."""
    return torch.device("cuda", torch.cuda.current_device())


def describe() -> str:
    """The current GPU in one line, for captions."""
    found = torch.cuda.get_device_properties(current())
    driver = f"CUDA {torch.version.cuda}" if torch.version.hip is None else f"ROCm {torch.version.hip}"
    return f"{torch.cuda.get_device_name()}, {found.multi_processor_count} multiprocessors, {driver}"


def seconds_of(run: Callable[[], object], repeats: int, between: Callable[[], object] | None = None) -> float:
    """Mean seconds of a call on the current stream.

    Args:
        run: enqueues the work.
        repeats: how many calls, enqueued without a wait.
        between: called before each, untimed.
    """
    events = []
    for _ in range(repeats):
        if between is not None:
            between()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        events.append((begin, end))
    events[-1][1].synchronize()
    return sum(begin.elapsed_time(end) for begin, end in events) / repeats * 1e-3


def peak(dtype: torch.dtype) -> float:
    """GFLOP/s of a large square product of the dtype by torch.mm, the best of a few."""
    a = torch.randn(PEAK_SIZE, PEAK_SIZE, device=current()).to(dtype)
    a @ a
    best = min(seconds_of(lambda: a @ a, 1) for _ in range(PEAK_REPEATS))
    return 2e-9 * PEAK_SIZE**3 / best


def bandwidth(nbytes: int) -> float:
    """Bytes a second at which the GPU reads an array of ``nbytes``, the best of many passes."""
    array = torch.ones(nbytes // 4, device=current())
    array.sum()
    return nbytes / min(seconds_of(array.sum, 1) for _ in range(20))


def cache_bytes() -> int:
    """Of the cache that all multiprocessors share."""
    return int(torch.cuda.get_device_properties(current()).L2_cache_size)


def peak_bytes(run: Callable[[], object]) -> int:
    """How far PyTorch's allocated memory rises above what it was, during two runs.

    The second run captures trmfast's graphs, whose buffers count.  What graphs of ``torch.compile`` hold was allocated
    before and does not.
    """
    from trmfast.backends.triton import release_memory

    run()  # what it lets go of the run before is not this one's
    gc.collect()
    release_memory()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    run()
    torch.cuda.synchronize()
    return max(torch.cuda.max_memory_allocated() - before, 0)
