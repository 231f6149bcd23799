"""Fixtures of every test: poisoned allocations, the backends of this machine, Triton's interpreter without a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# Triton reads the variable when it decorates its first function, its own library included: before any import of it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fuzz.poison import poisoned_allocations
from trmfast.backends import BACKENDS
from trmfast.cases import Case


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped without one; with one, the tests of Triton kernels run there and are marked."""
    found = torch.cuda.is_available()
    for item in items:
        if found and Path(str(item.fspath)).name.startswith("test_triton_"):
            item.add_marker(pytest.mark.gpu)
        if not found and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU: torch.cuda.is_available() is False"))


@pytest.fixture(scope="session", autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Uninitialised memory holds NaN, so that an output which nobody wrote cannot look right by chance."""
    with poisoned_allocations():
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of tiny tensors: waking threads would take longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


CPU_BACKENDS = [name for name, backend in BACKENDS.items() if not backend.device_types or "cpu" in backend.device_types]


@pytest.fixture(params=CPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that is made for CPU tensors; one that does not work on this machine is a skip with its reason."""
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
