"""What ``trmfast bench`` leaves behind: JSON and CSV for programs, tables for people."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trmfast.benchmark import rivals
from trmfast.benchmark.compare import Change
from trmfast.benchmark.configs import CONFIGS
from trmfast.benchmark.measure import Row
from trmfast.benchmark.scaling import Fit, Sweep
from trmfast.benchmark.suites import title

__all__ = [
    "CHANGE_COLUMNS",
    "Report",
    "cells",
    "change_cells",
    "columns",
    "fit_table",
    "group_title",
    "load",
    "markdown",
    "title_of",
]

# Columns of the terminal's tables, and which of them models and suites have.
_CELLS: dict[str, Callable[[Row], str]] = {
    "implementation": lambda row: rivals.title_of(row.implementation),
    "time ms": lambda row: milliseconds(row.seconds),
    "quartiles ms": lambda row: f"{milliseconds(row.low)} to {milliseconds(row.high)}",
    "GFLOP/s": lambda row: f"{row.gflops:.0f}",
    "of peak": lambda row: f"{row.share:.0%}",
    "ratio": lambda row: f"{row.ratio:.2f}",
    "steps/s": lambda row: f"{row.steps_per_second:.3g}",
    "samples/s": lambda row: f"{row.samples_per_second:.3g}",
    "kept MB": lambda row: _megabytes(row.saved),
    "kept B/token": lambda row: "" if row.saved is None else f"{_saved_a_token(row):,.0f}",
    "peak MB": lambda row: _megabytes(row.peak),
    "error": lambda row: f"{row.error:.1e}",
    "policy": lambda row: row.verdict.split(":")[0],
}
_OF_SUITES = ("steps/s", "samples/s", "kept MB", "peak MB")
CHANGE_COLUMNS = ("problem", "step", "of peak", "interval", "rivals", "verdict", "ratios, old -> new")


@dataclass(frozen=True)
class Report:
    """A finished run, of models or of a suite of recursions.

    Attributes:
        machine: the machine in one line.
        facts: machine, versions, commit, settings; of models, how the matrix peak was measured (``"peak_source"``).
        bandwidth: bytes a second that all threads read, by ``"memory"`` and ``"cache"``; of suites.
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
    def suite(self) -> str | None:
        """Name of the suite, None of models."""
        return self.facts["settings"].get("suite")

    @property
    def failures(self) -> list[Row]:
        """Rows of trmfast outside the tolerance policy."""
        return [row for row in self.rows if rivals.is_ours(row.implementation) and row.verdict.startswith("fail")]

    def groups(self) -> list[list[Row]]:
        """Rows of one problem and step together, in the order of the run."""
        found: dict[tuple[str, str, str, int, int], list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.key, []).append(row)
        return list(found.values())

    def record(self) -> dict[str, Any]:
        """The report as JSON-serialisable data; :func:`load` reads it back."""
        record = {
            "description": self.machine,
            **self.facts,
            "passed": not self.failures,
            "bandwidth": self.bandwidth,
            "seconds": round(self.seconds, 1),
            "remarks": list(self.remarks),
            "rows": [asdict(row) for row in self.rows],
            "sweeps": [asdict(sweep) for sweep in self.sweeps],
        }
        return record if self.suite else {**record, "results": [_result(row) for row in self.rows]}

    def write(self, folder: Path) -> None:
        """Writes .json, .csv (without the times of single rounds) and .md, named suite or bench, and scaling.csv."""
        stem = "suite" if self.suite else "bench"
        (folder / f"{stem}.json").write_text(json.dumps(self.record(), indent=1) + "\n")
        (folder / f"{stem}.md").write_text(markdown(self) + "\n")
        omitted = ("times", "peaks")
        rows = [asdict(row) if self.suite else _result(row) for row in self.rows]
        if rows:
            with (folder / f"{stem}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, [name for name in rows[0] if name not in omitted], extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)
        if self.sweeps:
            with (folder / "scaling.csv").open("w", newline="") as file:
                lines = csv.writer(file)
                lines.writerow(
                    ("varied", "step", "implementation", "hidden_size", "x", "seconds", "seconds_per_update")
                )
                for s in self.sweeps:
                    for x, seconds, update in zip(s.x, s.seconds, s.seconds_per_update, strict=True):
                        lines.writerow((s.name, s.step, s.implementation, s.hidden_size, x, seconds, update))


def _result(row: Row) -> dict[str, Any]:
    """A row of a model in the columns of bench.csv: bytes kept for each token, rates beside the highest peak."""
    return {
        "config": row.case,
        "step": row.step,
        "implementation": row.implementation,
        "batch": row.batch,
        "length": row.length,
        "seconds": row.seconds,
        "low": row.low,
        "high": row.high,
        "repeats": len(row.times),
        "gflop": row.gflop,
        "gflops": row.gflops,
        "peak": max(row.peaks),
        "share": row.share,
        "ratio": row.ratio,
        "saved": None if row.saved is None else _saved_a_token(row),
        "error": row.error,
        "verdict": row.verdict,
    }


def _saved_a_token(row: Row) -> float:
    return (row.saved or 0) / (row.batch * row.length)


def load(path: Path) -> Report:
    """Reads the .json that :meth:`Report.write` wrote.

    Raises:
        ValueError: the file is not such a record.
    """
    try:
        record = json.loads(path.read_text())
        rows = tuple(Row(**_tuples(row)) for row in record["rows"])
        sweeps = tuple(Sweep(**{**_tuples(sweep), "fit": Fit(**_tuples(sweep["fit"]))}) for sweep in record["sweeps"])
        facts = {key: record[key] for key in ("machine", "versions", "commit", "settings")}
        facts |= {key: record[key] for key in ("peak_source",) if key in record}
        return Report(
            *(record["description"], facts, record["bandwidth"], rows, sweeps),
            *(tuple(record["remarks"]), record["seconds"]),
        )
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: not a suite.json or bench.json that can be read: {reason}") from error


def _tuples(record: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}


def group_title(row: Row) -> str:
    """The line above a table."""
    return (
        f"{title_of(row.case)}, {row.step}: B={row.batch}, L={row.length}, {row.updates} updates, {row.dtype}, "
        f"{row.gflop:.3g} GFLOP, {len(row.times)} rounds, peak {statistics.median(row.peaks):.0f} GFLOP/s"
    )


def title_of(case: str) -> str:
    """What tables call a model's configuration or a suite's case."""
    return CONFIGS[case].title if case in CONFIGS else title(case)


def columns(report: Report) -> list[str]:
    """The columns of the terminal's tables."""
    omitted = ("kept B/token",) if report.suite else _OF_SUITES
    return [name for name in _CELLS if name not in omitted]


def cells(report: Report, row: Row) -> list[str]:
    """One line of the terminal's table, under :func:`columns`."""
    return [_CELLS[name](row) for name in columns(report)]


def markdown(report: Report) -> str:
    """The README's table of a run of models; of a suite, the tables of docs/benchmarks.md."""
    lines = _suite_tables(report) if report.suite else _model_table(report)
    facts = report.facts
    if report.suite:
        dtype, what = "", f", suite {report.suite}. Times in ms, medians."
    else:
        dtype, what = " bf16,", f". Medians; peak: {facts['peak_source']}."
    lines += [
        "",
        f"{report.machine}; {facts['settings']['threads']} threads,{dtype} PyTorch {facts['versions']['torch']}, "
        f"commit {str(facts['commit'])[:12]}{what}",
    ]
    return "\n".join(lines)


def _model_table(report: Report) -> list[str]:
    lines = [
        "| configuration | step | eager ms | torch.compile ms | trmfast ms | faster than the best rival "
        "| GFLOP/s | of peak | kept for backward, B a token | error (eager's) |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for group in report.groups():
        rows = {row.implementation: row for row in group}
        eager = rows["eager"]
        compiled = milliseconds(rows["compile"].seconds) if "compile" in rows else "-"
        for row in (row for name, row in rows.items() if rivals.is_ours(name)):
            label = row.step if row.implementation == "trmfast" else f"{row.step}, {row.implementation}"
            kept = "-" if row.saved is None else f"{_saved_a_token(row):,.0f} (eager {_saved_a_token(eager):,.0f})"
            lines.append(
                f"| {title_of(row.case)}, B={row.batch}, L={row.length} | {label} | {milliseconds(eager.seconds)} "
                f"| {compiled} | {milliseconds(row.seconds)} | {row.ratio:.2f}x | {row.gflops:.0f} | {row.share:.0%} "
                f"| {kept} | {row.error:.1e} ({eager.error:.1e}) |"
            )
    return lines


def _suite_tables(report: Report) -> list[str]:
    """Times of all, trmfast's other numbers, and the fits."""
    names = rivals.in_order(dict.fromkeys(row.implementation for row in report.rows))
    lines: list[str] = []
    if report.rows:
        heads = " | ".join(rivals.title_of(name) for name in names)
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
        label = f"{title_of(fused.case)}, B={fused.batch}, L={fused.length}, {fused.dtype}"
        times = " | ".join(milliseconds(rows[name].seconds) if name in rows else "-" for name in names)
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
        lines += ["", *fit_table(report.sweeps)]
    return lines


def fit_table(sweeps: Sequence[Sweep]) -> list[str]:
    """The fits of sweeps."""
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
            f"| {rivals.title_of(sweep.implementation)} | {terms} µs for {sweep.per} "
            f"| {fit.fixed_share[0]:.1%}, {fit.fixed_share[-1]:.1%} | {fit.worst:.1%} |"
        )
    return lines


def change_cells(change: Change) -> list[str]:
    """One line of the table of changes, under :data:`CHANGE_COLUMNS`."""
    case, dtype, step, batch, length = change.key
    ratios = "; ".join(f"{r.reference} {_spread(r.old)} -> {_spread(r.new)}" for r in change.ratios)
    return [
        f"{title_of(case)}, B={batch}, L={length}, {dtype}",
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


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def _megabytes(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e6:,.0f}" if count >= 1e7 else f"{count / 1e6:.2g}"
