"""Two runs against each other: has trmfast become slower?

Clock speed and neighbours change the times of two runs, so only ratios measured in the same rounds are compared:
trmfast's rate to the machine's matrix peak, and each rival's time to trmfast's.  The first decides, with an interval
from drawing the rounds of both runs again (bootstrap): the peak is the steadier reference, while PyTorch's time varies
with the memory traffic of neighbours.  The rivals have a veto: if trmfast has not lost against them too, the loss
against the peak is the machine's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trmfast.benchmark.measure import Row
from trmfast.benchmark.rivals import is_ours

__all__ = ["LIMIT", "Change", "compare_rows"]

# A row is slower if its change is below 1 - LIMIT and its whole interval below 1 - LIMIT / 2.
LIMIT = 0.10
DRAWS = 1000
CONFIDENCE = 0.95
# Bytes that autograd keeps do not vary from run to run.
MEMORY_LIMIT = 0.01


@dataclass(frozen=True)
class Ratio:
    """trmfast against one reference: medians over the rounds of the old and the new run, each with its quartiles."""

    reference: str
    old: tuple[float, float, float]
    new: tuple[float, float, float]

    @property
    def change(self) -> float:
        """New median over old median."""
        return self.new[1] / self.old[1]


@dataclass(frozen=True)
class Change:
    """One problem and step in two runs.

    Attributes:
        key: case, dtype, step, batch, length.
        ratios: against the peak and every rival that both runs have.
        change: of trmfast's share of the peak, new over old; below 1 it has become slower.
        low, high: interval of that.
        rivals: median of the changes against rivals; equal to ``change`` where the runs share none.
        saved: new over old bytes that autograd keeps; 1 for forward.
    """

    key: tuple[str, str, str, int, int]
    ratios: tuple[Ratio, ...]
    change: float
    low: float
    high: float
    rivals: float
    saved: float

    @property
    def slower(self) -> bool:
        """Whether this is a regression of speed."""
        return self.change < 1 - LIMIT and self.high < 1 - LIMIT / 2 and self.rivals < 1

    @property
    def faster(self) -> bool:
        """Whether this is an improvement, by the same rule."""
        return self.change > 1 / (1 - LIMIT) and self.low > 1 / (1 - LIMIT / 2) and self.rivals > 1

    @property
    def regressed(self) -> bool:
        """Whether speed or memory is worse."""
        return self.slower or self.saved > 1 + MEMORY_LIMIT

    @property
    def verdict(self) -> str:
        """One word for tables."""
        if self.saved > 1 + MEMORY_LIMIT:
            return "keeps more"
        return "slower" if self.slower else "faster" if self.faster else "same"


def compare_rows(old: Sequence[Row], new: Sequence[Row], seed: int = 0) -> list[Change]:
    """The change of every problem and step that both runs have, in the order of the new one."""
    generator = np.random.default_rng(seed)
    before, after = _references(old), _references(new)
    saved = {row.key: row.saved for row in old if row.implementation == "trmfast"}
    changes = []
    for row in new:
        if row.implementation != "trmfast" or row.key not in before:
            continue
        a, b = before[row.key], after[row.key]
        ratios = tuple(Ratio(name, _quartiles(a[name]), _quartiles(b[name])) for name in b if name in a)
        draws = [np.median(generator.choice(v["peak"], (DRAWS, len(v["peak"]))), axis=1) for v in (a, b)]
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(draws[1] / draws[0], (tail, 1 - tail))
        changes_of = {ratio.reference: ratio.change for ratio in ratios}
        change = changes_of.pop("peak")
        kept = saved[row.key]
        changes.append(
            Change(
                row.key,
                ratios,
                change,
                float(low),
                float(high),
                float(np.median(list(changes_of.values()))) if changes_of else change,
                row.saved / kept if row.saved is not None and kept else 1.0,
            )
        )
    return changes


def _references(rows: Sequence[Row]) -> dict[tuple[str, str, str, int, int], dict[str, np.ndarray]]:
    """For each problem and step, trmfast's ratio to every reference in every round."""
    groups: dict[tuple[str, str, str, int, int], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(row.key, {})[row.implementation] = row
    found = {}
    for key, group in groups.items():
        if "trmfast" not in group:
            continue
        fused = group["trmfast"]
        times = np.asarray(fused.times)
        ratios = {name: np.asarray(row.times) / times for name, row in group.items() if not is_ours(name)}
        ratios["peak"] = fused.gflop / times / np.asarray(fused.peaks)
        found[key] = ratios
    return found


def _quartiles(values: np.ndarray) -> tuple[float, float, float]:
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return float(low), float(median), float(high)
