"""``trmfast bench --suite`` and ``--compare``: recursions alone, against everything else that could run them."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trmfast.benchmark.compare import Change, compare_rows
from trmfast.benchmark.recursions import (
    FEWEST_ROUNDS,
    Row,
    measure_work,
    measure_works,
    prepare_work,
    read_bandwidth,
)
from trmfast.benchmark.scaling import Sweep, measure_sweeps
from trmfast.benchmark.suite_report import (
    CHANGE_COLUMNS,
    COLUMNS,
    SuiteReport,
    cells,
    change_cells,
    group_title,
    load,
    markdown,
)
from trmfast.benchmark.suites import SUITES, Suite, Work
from trmfast.cli.console import Progress, UsageError, print_json, print_table, progress
from trmfast.cli.machine import commit, describe_machine, machine, versions

__all__ = ["run_suite"]

SCALING_SECONDS = 110
# Problems that are built at the same time, to be timed in turns; what remains of their time after the rounds goes to
# memory.
GROUP, ROUNDS = 7, 0.75
# A rival that takes long to build is left out if less than this share of the time is left.
SLOW_BUILDS, LATE = ("max-autotune", "openvino", "compile"), 0.1
NOT_MEASURED = (
    "no CUDA graphs: a suite measures the processor",
    "no int8: no implementation here computes in it",
)


def run_suite(arguments: argparse.Namespace) -> int:
    """Runs a suite, or compares two records; 1 if trmfast is outside the tolerance policy or has become slower."""
    old = new = None
    try:
        if arguments.compare:
            old = load(arguments.compare[0])
        if arguments.compare and len(arguments.compare) > 1:
            new = load(arguments.compare[1])
    except ValueError as error:
        raise UsageError(f"--compare: {error}") from error
    if new is None:
        suite = SUITES[arguments.suite].tiny() if arguments.tiny else SUITES[arguments.suite]
        new = _measure(suite, arguments)
        written = _write(arguments.output, new)
        if arguments.json:
            print_json(new.record())
        elif arguments.markdown:
            print(markdown(new))
        else:
            _print(new, written)
        for row in new.failures:
            print(f"trmfast bench: {row.case}, {row.step}: {row.verdict}", file=sys.stderr)
        status = 1 if new.failures else 0
        again = suite
    else:
        status, again = 0, None
    if old is not None:
        regressed = _compare(old, new, again)
        status = 1 if regressed else status
    return status


# ---------------------------------------------------------------- measuring


def _measure(suite: Suite, arguments: argparse.Namespace) -> SuiteReport:
    start = time.monotonic()
    facts: dict[str, Any] = {
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "settings": {"suite": arguments.suite, "threads": torch.get_num_threads(), "tiny": arguments.tiny},
    }
    cache = max([cache["size"] for cache in facts["machine"]["caches"]] or [32 << 20])
    bandwidth = {"memory": read_bandwidth(1 << 29), "cache": read_bandwidth(cache // 4)}
    reserved = SCALING_SECONDS if suite.scaling and suite.works else 0
    rows: list[Row] = []
    remarks: list[str] = []
    sweeps: list[Sweep] = []
    with progress(sum(2 + len(work.rivals) + len(work.steps) for work in suite.works) + 5 * suite.scaling) as bar:
        for at in range(0, len(suite.works), GROUP):
            group, rest = suite.works[at : at + GROUP], suite.works[at:]
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
        if suite.scaling:
            sweeps = measure_sweeps(bar.step, arguments.tiny)
    return SuiteReport(
        describe_machine(facts["machine"]),
        facts,
        bandwidth,
        tuple(rows),
        tuple(sweeps),
        (*remarks, *NOT_MEASURED),
        time.monotonic() - start,
    )


def _steps(works: Sequence[Work]) -> int:
    return sum(len(work.steps) for work in works)


def _write(folder: Path, report: SuiteReport) -> str:
    report.write(folder)
    try:
        from trmfast.benchmark.suite_charts import write_charts

        names = ", ".join(write_charts(folder, report))
    except ModuleNotFoundError:
        return (
            f"{folder}: suite.json, .csv, .md; "
            "no charts: `pip install -c constraints.txt -e '.[bench]'` brings matplotlib"
        )
    return f"{folder}: suite.json, .csv, .md, {names}"


def _print(report: SuiteReport, written: str) -> None:
    threads = report.facts["settings"]["threads"]
    print(f"{report.machine}; {threads} threads, PyTorch {report.facts['versions']['torch']}")
    for group in report.groups():
        print_table(
            group_title(group[0]),
            COLUMNS,
            [cells(row) for row in group],
            [i for i, row in enumerate(group) if row.verdict.startswith("fail")],
        )
    if report.sweeps:
        print("", *markdown(replace(report, rows=())).splitlines()[1:-2], sep="\n")
    print("", *dict.fromkeys(report.remarks), written, f"{report.seconds:.0f} s", sep="\n")


# ---------------------------------------------------------------- comparing


def _compare(old: SuiteReport, new: SuiteReport, suite: Suite | None) -> bool:
    """Prints the changes; whether one is a regression.

    A row that looks worse in a run of this process is measured once more: noise does not come back, a slowdown does.
    """
    changes = compare_rows(old.rows, new.rows)
    if not changes:
        raise UsageError("--compare: the two runs have no problem in common")
    suspects = [change for change in changes if change.slower]
    if suspects and suite is not None:
        second = {change.key: change for change in compare_rows(old.rows, _again(suite, suspects))}
        changes = [
            max((change, second[change.key]), key=lambda c: c.change) if change.key in second else change
            for change in changes
        ]
    for name in ("threads", "tiny"):
        if old.facts["settings"][name] != new.facts["settings"][name]:
            print(f"\nthe runs differ in {name}: {old.facts['settings'][name]}, {new.facts['settings'][name]}")
    if old.machine != new.machine:
        print(f"\nthe runs are of two machines: {old.machine}; {new.machine}")
    print_table(
        f"Commit {str(old.facts['commit'])[:12]} -> {str(new.facts['commit'])[:12]}; below 1: slower",
        CHANGE_COLUMNS,
        [change_cells(change) for change in changes],
        [i for i, change in enumerate(changes) if change.regressed],
    )
    ratios = [(abs(ratio.change - 1), change, ratio) for change in changes for ratio in change.ratios]
    largest, change, ratio = max(ratios, key=lambda item: item[0])
    print(
        f"\n{len(ratios)} ratios, {sum(item[0] <= 0.1 for item in ratios)} within 10 %; "
        f"the largest change is {largest:.1%} ({change.key[0]}, {change.key[2]}, against {ratio.reference})"
    )
    regressed = [change for change in changes if change.regressed]
    for change in regressed:
        print(f"trmfast bench: {' '.join(map(str, change.key))}: {change.verdict}", file=sys.stderr)
    return bool(regressed)


def _again(suite: Suite, suspects: Sequence[Change]) -> list[Row]:
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
