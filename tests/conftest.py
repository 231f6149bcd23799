"""Fixtures of every test: poisoned allocations, the backends of this machine, Triton's interpreter without a GPU."""

from __future__ import annotations

import inspect
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

# Triton reads the variable when it decorates its first function, its own library included: before any import of it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fuzz.poison import poisoned_allocations
from trmfast.backends import BACKENDS
from trmfast.backends import cpu as engine
from trmfast.cases import Case
from trmfast.targets import TARGETS

if TYPE_CHECKING:
    from ptx_plans import Executor

# The files whose kernels run on the GPU if there is one.
ON_A_GPU = {
    f"test_triton_{name}.py"
    for name in ("accuracy", "backend", "backward", "block", "forward", "guard", "mixer_backward", "offsets", "rows")
}
LEFT_TO_CI = ("sanitizer", "grid", "compile", "breadth")  # markers that the default run deselects
_left: Counter[str] = Counter()


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Adds the markers that depend on a test's parameters or on the machine.

    A case that is not ``representative`` is marked ``breadth``, or with the names in ``rest``. With ``pytest -n`` the
    tests of a file share a process, and with it what the file builds, unless they are ``spread`` or have an
    ``xdist_group``.  Without a GPU, tests marked ``gpu`` are skipped; with one, the tests of Triton kernels run there
    and are marked.
    """
    found = torch.cuda.is_available()
    for item in items:
        for mark in item.iter_markers("representative"):
            parameters = item.callspec.params  # type: ignore[attr-defined]
            when: Callable[..., bool] = mark.kwargs["when"]
            if not when(**{name: parameters[name] for name in inspect.signature(when).parameters}):
                for name in mark.kwargs.get("rest", "breadth").split():
                    item.add_marker(name)
        file = Path(str(item.fspath))
        if not item.get_closest_marker("xdist_group"):
            spread = item.get_closest_marker("spread")
            names = spread.args if spread else ()
            values = (str(item.callspec.params[name]) for name in names)  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.xdist_group("-".join((file.stem, *values))))
        # What compiles without a GPU, takes hours or needs none is not for the machine that has one.
        if found and file.name in ON_A_GPU and not item.get_closest_marker("compile"):
            item.add_marker(pytest.mark.gpu)
        if not found and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU: torch.cuda.is_available() is False"))


def pytest_deselected(items: list[pytest.Item]) -> None:
    _left.update(next((m for m in LEFT_TO_CI if item.get_closest_marker(m)), "") for item in items)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says in one line what ``.ci/run`` runs and this run did not."""
    counts = [f"{_left[marker]} {marker}" for marker in LEFT_TO_CI if _left[marker]]
    if counts and "not breadth" in terminalreporter.config.option.markexpr:
        terminalreporter.write_line(f"left to .ci/run, or to pytest -m MARKER: {', '.join(counts)}")


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


@pytest.fixture(params=[target for target in TARGETS if not target.endswith("vnni")])  # those are int8 alone
def target(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU engine on every instruction set; one that is not built or does not run here is a skip with its reason."""
    reason = BACKENDS["cpu"].available() or engine.targets().get(request.param, f"{request.param} is not in this build")
    if reason is not None:
        pytest.skip(reason)
    with engine.force_target(request.param):
        yield request.param


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


@pytest.fixture(scope="module")
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    """Runs plans as PTX, one for the tests of a file: it keeps what it compiled.  Says in the end what it executed."""
    from ptx_plans import Executor

    with Executor() as made:
        yield made
    request.config.get_terminal_writer().line(f"\n{made}")
