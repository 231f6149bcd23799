"""Checks every address that interpreted kernels read or write: even a read of an unused value would fault."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor
from trmfast.kernels.dot import INTERPRETED
from trmfast.kernels.plan import Launch, run

from triton_access import watched

__all__ = ["checked_addresses", "checked_run"]


def checked_run(launches: Iterable[Launch], tensors: Mapping[str, Tensor]) -> None:
    """:func:`trmfast.kernels.plan.run` with every address checked, where Triton interprets."""
    with checked_addresses(tensors) if INTERPRETED else nullcontext():
        run(launches, tensors)


@contextmanager
def checked_addresses(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, each load and store of the interpreter must lie in one of the tensors, as far as it is not masked off.

    Raises:
        triton.runtime.errors.InterpreterError: with the text of an AssertionError that gives the addresses.
    """
    with watched(_Bounds([(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors.values()])):
        yield


class _Bounds:
    """Checks accesses against the spans of addresses that may be used."""

    def __init__(self, spans: list[tuple[int, int]]) -> None:
        self.spans = spans

    def program(self) -> None: ...

    def barrier(self) -> None: ...

    def access(self, kind: str, addresses: Any, size: int) -> None:
        if addresses.size:
            first, end = int(addresses.min()), int(addresses.max()) + size
            found = any(begin <= first and end <= limit for begin, limit in self.spans)
            assert found, f"{kind} {addresses.size} elements between {first:#x} and {end:#x}: outside of every buffer"
