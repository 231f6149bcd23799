"""``trmfast bench --suite``: recursions alone, against everything else that could run them."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from trmfast.benchmark import gpu
from trmfast.benchmark.compare import Change
from trmfast.benchmark.measure import Row, measure_works
from trmfast.benchmark.recursions import measure_work, prepare_work
from trmfast.benchmark.report import Report
from trmfast.benchmark.scaling import Sweep, measure_sweeps
from trmfast.benchmark.suites import SUITES, Suite, Work
from trmfast.benchmark.turns import FEWEST_ROUNDS, read_bandwidth
from trmfast.cli.bench_compare import Again
from trmfast.cli.console import Progress, progress
from trmfast.cli.machine import describe_machine, facts

__all__ = ["measure_suite"]

SCALING_SECONDS = 110
# Problems that are built together and timed in turns, and the share of their time for rounds; memory takes the rest.
# On a GPU, one at a time: the graphs of rivals keep their memory.
GROUP, ROUNDS = 7, 0.75
# Rivals that build slowly are left out if less than this share of the time is left.
SLOW_BUILDS, LATE = ("max-autotune", "openvino", "compile"), 0.1
NOT_MEASURED = ("no CUDA graphs: a suite measures the processor",)


def measure_suite(arguments: argparse.Namespace) -> tuple[Report, Again]:
    """Runs a suite; also returns what measures some of its problems again."""
    start = time.monotonic()
    suite = SUITES[arguments.suite].on(arguments.device)
    suite = suite.tiny() if arguments.tiny else suite
    settings = {"suite": arguments.suite, "threads": torch.get_num_threads(), "tiny": arguments.tiny}
    known = facts({**settings, "device": arguments.device})
    cache = max([cache["size"] for cache in known["machine"]["caches"]] or [32 << 20])
    if arguments.device == "cpu":
        bandwidth = {"memory": read_bandwidth(1 << 29), "cache": read_bandwidth(cache // 4)}
    else:
        bandwidth = {"memory": gpu.bandwidth(1 << 30), "cache": gpu.bandwidth(gpu.cache_bytes() // 4)}
    reserved = SCALING_SECONDS if suite.scaling and suite.works else 0
    rows: list[Row] = []
    remarks: list[str] = []
    sweeps: list[Sweep] = []
    with progress(sum(2 + len(work.rivals) + len(work.steps) for work in suite.works) + 5 * suite.scaling) as bar:
        size = GROUP if suite.device == "cpu" else 1
        for at in range(0, len(suite.works), size):
            group, rest = suite.works[at : at + size], suite.works[at:]
            left = suite.seconds - reserved - (time.monotonic() - start)
            end = time.monotonic() + left * _steps(group) / _steps(rest)
            prepared = []
            for work in group:
                late = suite.seconds - reserved - (time.monotonic() - start) < LATE * suite.seconds
                prepared.append(prepare_work(work, bar.step, SLOW_BUILDS if late else ()))
            rows += measure_works(prepared, ROUNDS * (end - time.monotonic()), bar.step)
            said = [remark for one in prepared for remark in one.remarks]
            remarks += [f"{remark}: too late" if remark.endswith("left out") else remark for remark in said]
            del prepared  # what their rivals hold, before the next are built
            torch.compiler.reset()
            gc.collect()
            if suite.device != "cpu":
                torch.cuda.empty_cache()
        if suite.scaling:
            sweeps = measure_sweeps(bar.step, arguments.tiny)
    description, seconds = describe_machine(known["machine"]), time.monotonic() - start
    if arguments.device == "cpu":
        remarks += NOT_MEASURED
    else:
        description = f"{gpu.describe()}; {description}"
    report = Report(description, known, bandwidth, tuple(rows), tuple(sweeps), tuple(remarks), seconds)
    return report, partial(_measure_again, suite)


def _steps(works: Sequence[Work]) -> int:
    return sum(len(work.steps) for work in works)


def _measure_again(suite: Suite, suspects: Sequence[Change]) -> list[Row]:
    """The suspects' rows, measured again against eager PyTorch and the peak."""
    steps: dict[Work, list[str]] = {}
    for change in suspects:
        for work in suite.works:
            if (work.case.name, work.dtype_name, work.case.batch) == (change.key[0], change.key[1], change.key[3]):
                steps.setdefault(work, []).append(change.key[2])
    rows: list[Row] = []
    silent = Progress(None, 0)
    for work, which in steps.items():
        rows += measure_work(replace(work, steps=tuple(which), rivals=("eager",)), 10 * FEWEST_ROUNDS, silent.step)[0]
    return rows
