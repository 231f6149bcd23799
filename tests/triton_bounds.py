"""Checks every address that interpreted kernels read or write: even a read of an unused value would fault."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from trmfast.kernels.dot import INTERPRETED
from trmfast.kernels.plan import Launch, run

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
    from triton.runtime.interpreter import interpreter_builder

    spans = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors.values()]

    def check(pointers: Any, mask: Any, what: str) -> None:
        addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data]
        if addresses.size:
            first, last = int(addresses.min()), int(addresses.max())
            end = last + max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            found = any(begin <= first and end <= limit for begin, limit in spans)
            assert found, f"{what} {addresses.size} elements between {first:#x} and {end:#x}: outside of every buffer"

    load, store = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store

    def checked_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask, "reads")
        return load(pointers, mask, *rest)

    def checked_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask, "writes")
        return store(pointers, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter_builder, "create_masked_load", checked_load)
        patch.setattr(interpreter_builder, "create_masked_store", checked_store)
        yield
