"""Fills uninitialised memory with NaN, so that an unwritten output cannot look right by chance."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._device import _device_constructors

__all__ = ["poisoned_allocations"]

ALLOCATIONS = (
    (torch, ("empty", "empty_like", "empty_strided")),
    (torch.Tensor, ("new_empty", "new_empty_strided")),
)


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(allocate)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return wrapper


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Inside, what PyTorch allocates from Python without a value is NaN."""
    _device_constructors()  # so that torch.device as a context knows the functions themselves, not their wrappers
    with ExitStack() as stack:
        for owner, names in ALLOCATIONS:
            for name in names:
                stack.enter_context(patch.object(owner, name, _poisoned(getattr(owner, name))))
        yield
