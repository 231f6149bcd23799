"""Fixtures of every test: poisoned allocations, and the backends of this machine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from trmfast.backends import BACKENDS
from trmfast.cases import Case


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(allocate)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return wrapper


@pytest.fixture(scope="session", autouse=True)
def poisoned_allocations() -> Iterator[None]:
    """Uninitialised memory holds NaN, so that an output which nobody wrote cannot look right by chance."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided"):
            patch.setattr(torch, name, _poisoned(getattr(torch, name)))
        for name in ("new_empty", "new_empty_strided"):
            patch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of tiny tensors: waking threads would take longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> str:
    """The name of every backend; one that does not work on this machine is a skip with its reason."""
    name: str = request.param
    reason = BACKENDS[name].available()
    if reason is not None:
        pytest.skip(f"backend {name}: {reason}")
    return name


@pytest.fixture
def need_support(backend: str) -> Callable[[Case, torch.dtype], None]:
    """Skips a test, with the reason, where the backend refuses a case."""

    def check(case: Case, dtype: torch.dtype) -> None:
        reason = BACKENDS[backend].supports(case.problem, torch.device("cpu"), dtype, case.batch, case.length)
        if reason is not None:
            pytest.skip(f"backend {backend}, {case}, {dtype}: {reason}")

    return check
