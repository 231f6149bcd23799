"""Micro-benchmarks of the CPU engine: ``pytest benchmarks --benchmark-only``.

Every benchmark records GFLOP/s and its share of the matrix peak of its threads, measured right after it,
under ``extra_info`` of ``--benchmark-json``; the share is also in the terminal, at the end of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from trmfast.backends.cpu import CpuBackend
from trmfast.benchmark.turns import dtype_peak

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_lines: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips without the engine: there is nothing to time."""
    reason = CpuBackend().available()
    if reason is not None:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=f"backend cpu: {reason}"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Rates under the table of times."""
    if _lines:
        terminalreporter.section("share of the matrix peak")
        terminalreporter.write_line("\n".join(_lines))


@pytest.fixture(params=list(DTYPES))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """bfloat16, then float32."""
    return DTYPES[request.param]


@pytest.fixture(params=sorted({1, torch.get_num_threads()}), ids=lambda count: f"threads{count}")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """One thread, then all."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Times a function whose floating-point operations are counted.

    Args of what it returns: the function; operations of one call; the dtype whose peak counts.
    """

    def run(function: Callable[[], object], flops: float, dtype: torch.dtype) -> None:
        function()
        benchmark(function)
        if benchmark.stats is None:  # --benchmark-disable
            return
        gflops = 1e-9 * flops / benchmark.stats.stats.median
        peak = dtype_peak(dtype, 0.05)
        benchmark.extra_info.update(gflops=gflops, peak=peak, share=gflops / peak)
        _lines.append(f"{request.node.name:60s} {gflops:7.0f} GFLOP/s {gflops / peak:5.0%}")

    return run
