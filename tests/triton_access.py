"""What interpreted kernels do to memory, access by access; and the programs of a launch in another order."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

__all__ = ["Watcher", "line_in", "reordered", "watched"]


class Watcher(Protocol):
    """Is told what the interpreter does."""

    def program(self) -> None:
        """The next program begins."""

    def barrier(self) -> None:
        """All threads of the program have reached this point."""

    def access(self, kind: str, addresses: Any, size: int) -> None:
        """``kind`` is ``"reads"``, ``"writes"`` or ``"adds"``; addresses of elements of ``size`` bytes, masked."""


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Within, the watcher is told of every program, barrier, load, store and atomic operation."""
    from triton.runtime.interpreter import interpreter_builder as builder

    def hook(kind: str, name: str, mask_at: int | None) -> None:
        method: Callable[..., Any] = getattr(builder, name)

        def hooked(*args: Any) -> Any:
            pointers = args[1] if name == "create_atomic_rmw" else args[0]
            addresses = pointers.data
            if mask_at is not None:
                addresses, mask = np.broadcast_arrays(addresses, args[mask_at].data)
                addresses = addresses[mask.astype(bool)]  # the interpreter keeps masks as integers too
            watcher.access(kind, addresses, max(1, pointers.get_element_ty().primitive_bitwidth // 8))
            return method(*args)

        patch.setattr(builder, name, hooked)

    place = builder.set_grid_idx

    def begin(*at: int) -> None:
        place(*at)
        watcher.program()

    with pytest.MonkeyPatch.context() as patch:
        hook("reads", "create_masked_load", 1)
        hook("writes", "create_masked_store", 2)
        hook("adds", "create_atomic_rmw", 3)
        hook("adds", "create_atomic_cas", None)
        patch.setattr(builder, "create_barrier", watcher.barrier, raising=False)
        patch.setattr(builder, "set_grid_idx", begin)
        yield


@contextmanager
def reordered(order: Callable[[int], Sequence[int]]) -> Iterator[None]:
    """Within, the programs of every launch run in another order: a permutation of their numbers by their count."""
    from triton.runtime.interpreter import interpreter_builder as builder

    place = builder.set_grid_idx

    def move(*at: int) -> None:
        shape = builder.grid_dim
        index = int(np.ravel_multi_index(at, shape))
        place(*(int(i) for i in np.unravel_index(order(int(np.prod(shape)))[index], shape)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "set_grid_idx", move)
        yield


def line_in(folder: Path) -> str:
    """``file:line`` of the innermost line of a kernel, in a file in a folder, that the interpreter is running."""
    frame = sys._getframe(1)
    inside = False  # of Triton, which called the watcher
    while frame.f_back is not None:
        file = Path(frame.f_code.co_filename)
        inside = inside or "triton" in file.parts
        if inside and file.parent == folder:
            return f"{file.name}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown line"
