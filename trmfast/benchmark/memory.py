"""Memory of one step: what autograd keeps, and how far resident memory rises."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from trmfast.backends.cpu import release_memory

__all__ = ["peak_bytes", "resident_bytes", "saved_bytes", "trim"]


def saved_bytes(run: Callable[[], object], parameters: Iterable[Tensor], buffers: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for backward: every storage once, without parameters and their casts.

    Args:
        run: the forward half of a training step; what it returns is dropped.
        parameters: already allocated; a tensor of the shape of one, or of its transpose, counts as its cast.
        buffers: other tensors that are already allocated.
    """
    parameters = list(parameters)
    known = {t.untyped_storage().data_ptr() for t in (*parameters, *buffers)}
    shapes = {tuple(p.shape) for p in parameters}
    shapes |= {shape[::-1] for shape in shapes}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()  # a graph that holds its own output would never be freed
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and tuple(tensor.shape) not in shapes:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # a storage that was freed could come back at the same address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(sizes.values())


def trim() -> None:
    """Gives memory back to the system: Python's cycles, the engine's workspace and packs, free pages of the heap."""
    gc.collect()
    release_memory()
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)


def resident_bytes() -> int | None:
    """Resident memory of this process, None if the system does not report it."""
    return _status("VmRSS")


def peak_bytes(run: Callable[[], object]) -> int | None:
    """How far resident memory rises above what it was before, during one run; None if the system does not report it.

    Packed weights and workspace of the engine count: they are released before.
    """
    trim()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except OSError:
        return None
    before = resident_bytes()
    run()
    peak = _status("VmHWM")
    return None if before is None or peak is None else max(peak - before, 0)


def _status(name: str) -> int | None:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
