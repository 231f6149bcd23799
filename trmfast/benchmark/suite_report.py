"""What ``trmfast bench --suite`` leaves behind: JSON and CSV for programs, tables for people."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from trmfast.benchmark.compare import Change
from trmfast.benchmark.recursions import Row
from trmfast.benchmark.rivals import RIVALS
from trmfast.benchmark.scaling import Fit, Sweep
from trmfast.benchmark.suites import title

__all__ = ["CHANGE_COLUMNS", "COLUMNS", "SuiteReport", "cells", "change_cells", "group_title", "load", "markdown"]

COLUMNS = (
    "implementation",
    "time ms",
    "quartiles ms",
    "GFLOP/s",
    "of peak",
    "ratio",
    "steps/s",
    "samples/s",
    "kept MB",
    "peak MB",
    "error",
    "policy",
)
CHANGE_COLUMNS = ("problem", "step", "of peak", "interval", "rivals", "verdict", "ratios, old -> new")


@dataclass(frozen=True)
class SuiteReport:
    """A finished run of a suite.

    Attributes:
        machine: the machine in one line.
        facts: machine, versions, commit, settings.
        bandwidth: bytes a second that all threads read, by ``"memory"`` and ``"cache"``.
        rows: one for each implementation, step and problem.
        sweeps: cost against batch, length and depth.
        remarks: lines for the reader; every rival that did not run is named here.
        seconds: how long the run took.
    """

    machine: str
    facts: dict[str, Any]
    bandwidth: dict[str, float]
    rows: tuple[Row, ...]
    sweeps: tuple[Sweep, ...]
    remarks: tuple[str, ...]
    seconds: float

    @property
    def failures(self) -> list[Row]:
        """Rows of trmfast outside the tolerance policy."""
        return [row for row in self.rows if row.implementation == "trmfast" and row.verdict.startswith("fail")]

    def groups(self) -> list[list[Row]]:
        """Rows of one problem and step together, in the order of the run."""
        found: dict[tuple[str, str, str, int, int], list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.key, []).append(row)
        return list(found.values())

    def record(self) -> dict[str, Any]:
        """Everything as JSON takes it; :func:`load` reads it back."""
        return {
            "description": self.machine,
            **self.facts,
            "bandwidth": self.bandwidth,
            "seconds": round(self.seconds, 1),
            "remarks": list(self.remarks),
            "rows": [asdict(row) for row in self.rows],
            "sweeps": [asdict(sweep) for sweep in self.sweeps],
        }

    def write(self, folder: Path) -> None:
        """Writes suite.json, suite.csv (without the times of single rounds), scaling.csv and suite.md."""
        (folder / "suite.json").write_text(json.dumps(self.record(), indent=1) + "\n")
        (folder / "suite.md").write_text(markdown(self) + "\n")
        names = [field.name for field in fields(Row) if field.name not in ("times", "peaks")]
        with (folder / "suite.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, names, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)
        if self.sweeps:
            with (folder / "scaling.csv").open("w", newline="") as file:
                lines = csv.writer(file)
                lines.writerow(
                    ("varied", "step", "implementation", "hidden_size", "x", "seconds", "seconds_per_update")
                )
                for s in self.sweeps:
                    for x, seconds, update in zip(s.x, s.seconds, s.seconds_per_update, strict=True):
                        lines.writerow((s.name, s.step, s.implementation, s.hidden_size, x, seconds, update))


def load(path: Path) -> SuiteReport:
    """Reads what :meth:`SuiteReport.write` wrote.

    Raises:
        ValueError: the file is not such a record.
    """
    try:
        record = json.loads(path.read_text())
        rows = tuple(Row(**_tuples(row)) for row in record["rows"])
        sweeps = tuple(Sweep(**{**_tuples(sweep), "fit": Fit(**_tuples(sweep["fit"]))}) for sweep in record["sweeps"])
        facts = {key: record[key] for key in ("machine", "versions", "commit", "settings")}
        return SuiteReport(
            *(record["description"], facts, record["bandwidth"], rows, sweeps),
            *(tuple(record["remarks"]), record["seconds"]),
        )
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a suite.json that can be read: {type(error).__name__}: {error}") from error


def _tuples(record: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}


def group_title(row: Row) -> str:
    """The line above a table."""
    return (
        f"{title(row.case)}, {row.step}: B={row.batch}, L={row.length}, {row.updates} updates, {row.dtype}, "
        f"{row.gflop:.3g} GFLOP, {len(row.times)} rounds"
    )


def cells(row: Row) -> list[str]:
    """One line of the terminal's table, under :data:`COLUMNS`."""
    return [
        RIVALS[row.implementation].title,
        _milliseconds(row.seconds),
        f"{_milliseconds(row.low)} to {_milliseconds(row.high)}",
        f"{row.gflops:.0f}",
        f"{row.share:.0%}",
        f"{row.ratio:.2f}",
        f"{row.steps_per_second:.3g}",
        f"{row.samples_per_second:.3g}",
        _megabytes(row.saved),
        _megabytes(row.peak),
        f"{row.error:.1e}",
        row.verdict.split(":")[0],
    ]


def markdown(report: SuiteReport) -> str:
    """The tables of docs/benchmarks.md: times of all, trmfast's other numbers, and the fits."""
    names = [name for name in RIVALS if any(row.implementation == name for row in report.rows)]
    lines: list[str] = []
    if report.rows:
        heads = " | ".join(RIVALS[name].title for name in names)
        lines += [
            f"| problem | step | {heads} | faster than the best rival | GFLOP/s | of peak | error (eager's) |",
            "| --- | --- |" + " ---: |" * (len(names) + 4),
        ]
    memory = [
        "| problem | kept for backward, MB: eager | trmfast | peak of a step, MB: eager | trmfast |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for group in report.groups():
        rows = {row.implementation: row for row in group}
        fused = rows["trmfast"]
        label = f"{title(fused.case)}, B={fused.batch}, L={fused.length}, {fused.dtype}"
        times = " | ".join(_milliseconds(rows[name].seconds) if name in rows else "-" for name in names)
        eager = rows.get("eager")
        lines.append(
            f"| {label} | {fused.step} | {times} | {fused.ratio:.2f}x | {fused.gflops:.0f} | {fused.share:.0%} "
            f"| {fused.error:.1e} ({'-' if eager is None else f'{eager.error:.1e}'}) |"
        )
        if fused.step == "training" and eager is not None:
            memory.append(
                f"| {label} | {_megabytes(eager.saved)} | {_megabytes(fused.saved)} "
                f"| {_megabytes(eager.peak)} | {_megabytes(fused.peak)} |"
            )
    if len(memory) > 2:
        lines += ["", *memory]
    if report.sweeps:
        lines += ["", *_fit_table(report.sweeps)]
    facts = report.facts
    lines += [
        "",
        f"{report.machine}; {facts['settings']['threads']} threads, PyTorch {facts['versions']['torch']}, "
        f"commit {str(facts['commit'])[:12]}, suite {facts['settings']['suite']}. Times in ms, medians.",
    ]
    return "\n".join(lines)


def _fit_table(sweeps: Sequence[Sweep]) -> list[str]:
    lines = [
        "| cost against | step | implementation | fit | fixed part at the smallest and largest | worst point |",
        "| --- | --- | --- | --- | ---: | ---: |",
    ]
    symbol = {"batch": "B", "length": "L", "depth": "n"}
    for sweep in sweeps:
        fit, x = sweep.fit, symbol[sweep.name]
        terms = " + ".join(
            f"{c * 1e6:.3g}{'' if p == 0 else f' {x}' if p == 1 else f' {x}²'}"
            for c, p in zip(fit.coefficients, fit.powers, strict=True)
        )
        lines.append(
            f"| {sweep.name} {sweep.fitted[0]} to {sweep.fitted[-1]}, D={sweep.hidden_size} | {sweep.step} "
            f"| {RIVALS[sweep.implementation].title} | {terms} µs for {sweep.per} "
            f"| {fit.fixed_share[0]:.1%}, {fit.fixed_share[-1]:.1%} | {fit.worst:.1%} |"
        )
    return lines


def change_cells(change: Change) -> list[str]:
    """One line of the table of changes, under :data:`CHANGE_COLUMNS`."""
    case, dtype, step, batch, length = change.key
    ratios = "; ".join(f"{r.reference} {_spread(r.old)} -> {_spread(r.new)}" for r in change.ratios)
    return [
        f"{title(case)}, B={batch}, L={length}, {dtype}",
        step,
        f"{change.change:.3f}",
        f"{change.low:.3f} to {change.high:.3f}",
        f"{change.rivals:.3f}",
        change.verdict,
        ratios,
    ]


def _spread(quartiles: tuple[float, float, float]) -> str:
    low, median, high = quartiles
    return f"{median:.2f} ({low:.2f}..{high:.2f})"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def _megabytes(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e6:,.0f}" if count >= 1e7 else f"{count / 1e6:.2g}"
