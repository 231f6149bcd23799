"""What ``trmfast bench`` leaves behind: tables for people, CSV and JSON for programs."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from trmfast.benchmark.configs import CONFIGS
from trmfast.benchmark.measure import IMPLEMENTATIONS, OURS, Measurement

__all__ = ["COLUMNS", "Report", "cells", "markdown", "write_csv", "write_json"]

COLUMNS = (
    "implementation",
    "time ms",
    "quartiles ms",
    "GFLOP/s",
    "of peak",
    "ratio",
    "kept B/token",
    "error",
    "policy",
)


@dataclass(frozen=True)
class Report:
    """A finished run.

    Attributes:
        machine: the machine in one line.
        facts: machine, versions, commit and settings of the run.
        peak_source: how the matrix peak was measured.
        measurements: everything that was measured.
        remarks: lines for the reader.
        seconds: how long the run took.
    """

    machine: str
    facts: dict[str, Any]
    peak_source: str
    measurements: tuple[Measurement, ...]
    remarks: tuple[str, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every result of trmfast kept the tolerance policy."""
        return not any(m.verdict.startswith("fail") for m in self.measurements if m.implementation in OURS)

    def groups(self) -> list[tuple[str, str, dict[str, Measurement]]]:
        """(configuration, step, measurements by implementation), in the order of the run."""
        found: dict[tuple[str, str], dict[str, Measurement]] = {}
        for m in self.measurements:
            found.setdefault((m.config, m.step), {})[m.implementation] = m
        return [(config, step, group) for (config, step), group in found.items()]

    def record(self) -> dict[str, Any]:
        """Everything as JSON takes it."""
        return {
            **self.facts,
            "peak_source": self.peak_source,
            "passed": self.passed,
            "seconds": round(self.seconds, 1),
            "remarks": list(self.remarks),
            "results": [asdict(m) for m in self.measurements],
        }


def cells(m: Measurement) -> list[str]:
    """One line of the terminal's table, under :data:`COLUMNS`."""
    return [
        IMPLEMENTATIONS[m.implementation],
        f"{m.seconds * 1e3:.1f}",
        f"{m.low * 1e3:.1f} to {m.high * 1e3:.1f}",
        f"{m.gflops:.0f}",
        f"{m.share:.0%}",
        f"{m.ratio:.2f}",
        "" if m.saved is None else f"{m.saved:,.0f}",
        f"{m.error:.1e}",
        m.verdict.split(":")[0],
    ]


def markdown(report: Report) -> str:
    """The table of the README."""
    lines = [
        "| configuration | step | eager ms | torch.compile ms | trmfast ms | faster than the best rival "
        "| GFLOP/s | of peak | kept for backward, B a token | error (eager's) |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for config, step, group in report.groups():
        eager = group["eager"]
        compiled = f"{group['compile'].seconds * 1e3:.0f}" if "compile" in group else "-"
        for m in (group[name] for name in OURS if name in group):
            label = f"{step}, recompute=False" if m.implementation == "kept" else step
            kept = "-" if m.saved is None else f"{m.saved:,.0f} (eager {eager.saved:,.0f})"
            lines.append(
                f"| {CONFIGS[config].title}, B={m.batch}, L={m.length} | {label} | {eager.seconds * 1e3:.0f} "
                f"| {compiled} | {m.seconds * 1e3:.0f} | {m.ratio:.2f}x | {m.gflops:.0f} | {m.share:.0%} "
                f"| {kept} | {m.error:.1e} ({eager.error:.1e}) |"
            )
    facts = report.facts
    lines += [
        "",
        f"{report.machine}; {facts['settings']['threads']} threads, bf16, PyTorch {facts['versions']['torch']}, "
        f"commit {str(facts['commit'])[:12]}. Medians; peak: {report.peak_source}.",
    ]
    return "\n".join(lines)


def write_csv(path: Path, measurements: Sequence[Measurement]) -> None:
    """One line for each measurement; times in seconds, rates in GFLOP/s."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Measurement)])
        writer.writeheader()
        writer.writerows(asdict(m) for m in measurements)


def write_json(path: Path, report: Report) -> None:
    """The whole record."""
    path.write_text(json.dumps(report.record(), indent=1) + "\n")
