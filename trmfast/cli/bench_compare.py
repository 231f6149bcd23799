"""``trmfast bench --compare``: the changes between two runs, and what counts as a regression."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from trmfast.benchmark.compare import Change, compare_rows
from trmfast.benchmark.measure import Row
from trmfast.benchmark.report import CHANGE_COLUMNS, Report, change_cells
from trmfast.cli.console import UsageError, print_table

__all__ = ["Again", "compare_runs"]

Again = Callable[[Sequence[Change]], list[Row]]
"""Measures the problems of some changes once more, against eager PyTorch and the peak."""


def compare_runs(old: Report, new: Report, again: Again | None = None) -> bool:
    """Prints the changes; returns whether one is a regression.

    Rows of this process that look worse are measured again: noise does not repeat, a slowdown does.

    Args:
        old, new: two runs of models, or two of suites.
        again: measures suspects once more, see :data:`Again`.

    Raises:
        UsageError: the runs have nothing in common.
    """
    if (old.suite is None) != (new.suite is None):
        raise UsageError("--compare: one run is of models, the other of a suite")
    changes = compare_rows(old.rows, new.rows)
    if not changes:
        raise UsageError("--compare: the two runs have no problem in common")
    suspects = [change for change in changes if change.slower]
    if suspects and again is not None:
        second = {change.key: change for change in compare_rows(old.rows, again(suspects))}
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
