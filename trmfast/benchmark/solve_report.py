"""What ``trmfast bench --suite solve`` leaves behind: tables, JSON and charts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trmfast.benchmark.report import milliseconds
from trmfast.benchmark.solve import SearchRow, SolveRow, Width
from trmfast.benchmark.solve_start import Start

__all__ = ["SolveReport", "Table"]

Table = tuple[str, list[str], list[list[str]]]
"""A title, headings and cells."""

COLOURS = {
    "eager": "#b8bcc2",
    "compile": "#8fa3b8",
    "fixed": "#5b8fc0",
    "waiting": "#a3b18a",
    "leaving": "#6b8e5a",
    "continuous": "#1f4e79",
    "int8": "#e0a458",
    "trajectories": "#b5651d",
}
SIGMAS = ("#1f4e79", "#e0a458", "#6b8e5a", "#8a929c", "#b5651d")


@dataclass(frozen=True)
class SolveReport:
    """A finished run.

    Attributes:
        machine: the machine in one line.
        facts: machine, versions, commit, settings; of the puzzles and of the model.
        rows, starts, widths, searches: what was measured; each may be empty.
        remarks: lines for the reader; what did not run is named here.
        seconds: how long the run took.
    """

    machine: str
    facts: dict[str, Any]
    rows: tuple[SolveRow, ...]
    starts: tuple[Start, ...]
    widths: tuple[Width, ...]
    searches: tuple[SearchRow, ...]
    remarks: tuple[str, ...]
    seconds: float

    def record(self) -> dict[str, Any]:
        """The report as JSON-serialisable data."""
        return {
            "description": self.machine,
            **self.facts,
            "seconds": round(self.seconds, 1),
            "remarks": list(self.remarks),
            "rows": [asdict(row) for row in self.rows],
            "starts": [asdict(row) for row in self.starts],
            "widths": [asdict(row) for row in self.widths],
            "searches": [asdict(row) for row in self.searches],
        }

    def tables(self) -> list[Table]:
        """Tables for people."""
        settings = self.facts["settings"]
        puzzles = f"{_clues(settings)}, batches of {settings['batch']}"
        found: list[Table] = []
        if self.rows:
            heads = ["", "puzzles/s", "quartiles", "times eager", "p50 ms", "p99 ms", "solved", "steps", "peak MB"]
            title = f"{self.rows[0].puzzles} puzzles of {puzzles}, {len(self.rows[0].times)} rounds"
            found.append((title, heads, [_solve_cells(row) for row in self.rows]))
        if self.starts:
            heads = ["", "s", "quartiles", "processor s", "peak MB"]
            title = f"one puzzle, from the start of the process to the answer, {len(self.starts[0].times)} rounds"
            found.append((title, heads, [*map(_start, self.starts)]))
        if self.widths:
            heads = ["random weights", "dtype", "ms a supervision step", "quartiles", "times bf16"]
            found.append((f"a supervision step of {self.widths[0].batch} puzzles", heads, [*map(_width, self.widths)]))
        if self.searches:
            heads = ["sigma", "K", "solved, first to halt", "Q head", "majority", "any", "steps a puzzle", "puzzles/s"]
            title = f"trajectories: {self.searches[0].puzzles} puzzles of {puzzles}"
            found.append((title, heads, [*map(_search, self.searches)]))
        return found

    def markdown(self) -> str:
        """The tables of docs/solver.md."""
        lines = []
        for title, heads, cells in self.tables():
            lines += [f"{title[0].upper()}{title[1:]}:", "", f"| {' | '.join(heads)} |"]
            lines += [f"| --- |{' ---: |' * (len(heads) - 1)}", *(f"| {' | '.join(row)} |" for row in cells), ""]
        threads, torch = self.facts["settings"]["threads"], self.facts["versions"]["torch"]
        commit = str(self.facts["commit"])[:12]
        return "\n".join([*lines, f"{self.machine}; {threads} threads, PyTorch {torch}, commit {commit}."])

    def write(self, folder: Path) -> list[str]:
        """Writes solve.json, solve.md and, if matplotlib is there, the charts; returns the names of the files."""
        stem = "solve-trajectories" if self.searches else "solve"
        (folder / f"{stem}.json").write_text(json.dumps(self.record(), indent=1) + "\n")
        (folder / f"{stem}.md").write_text(self.markdown() + "\n")
        written = [f"{stem}.json", f"{stem}.md"]
        try:
            import matplotlib
        except ModuleNotFoundError:
            return [*written, "no chart: `pip install -c constraints.txt -e '.[bench]'` brings matplotlib"]
        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure = _search_chart(pyplot, self) if self.searches else _solve_chart(pyplot, self)
        figure.savefig(folder / f"{stem}.png", dpi=150)
        pyplot.close(figure)
        return [*written, f"{stem}.png"]


def _solve_cells(row: SolveRow) -> list[str]:
    speeds = f"{row.puzzles / row.high:.3g} to {row.puzzles / row.low:.3g}"
    return [
        *(row.title, f"{row.puzzles_per_second:.3g}", speeds, f"{row.ratio:.2f}"),
        *(f"{1e3 * row.p50:.0f}", f"{1e3 * row.p99:.0f}", f"{row.exact:.1%}"),
        *(f"{row.steps:.2f}", f"{row.peak / 1e6:.0f}"),
    ]


def _start(row: Start) -> list[str]:
    spread = f"{row.low:.2f} to {row.high:.2f}"
    return [row.title, f"{row.seconds:.2f}", spread, f"{row.processor:.2f}", f"{row.peak / 1e6:.0f}"]


def _width(row: Width) -> list[str]:
    spread = f"{milliseconds(row.low)} to {milliseconds(row.high)}"
    return [row.model, row.dtype, milliseconds(row.seconds), spread, f"{row.ratio:.2f}"]


def _search(row: SearchRow) -> list[str]:
    shares = (row.exact, row.exact_q, row.exact_majority, row.exact_any)
    costs = f"{row.steps:.1f}", f"{row.puzzles_per_second:.3g}"
    return [f"{row.sigma:g}", str(row.trajectories), *(f"{share:.1%}" for share in shares), *costs]


# ---------------------------------------------------------------- charts


def _solve_chart(pyplot: Any, report: SolveReport) -> Any:
    """Accuracy against puzzles a second."""
    figure, axis = pyplot.subplots(figsize=(9, 5.4), layout="constrained")
    for row in report.rows:
        speeds = [row.puzzles / row.high, row.puzzles / row.low]
        axis.plot(speeds, [100 * row.exact] * 2, color=COLOURS[row.name], linewidth=1.2)
        axis.plot(
            row.puzzles_per_second,
            100 * row.exact,
            "o",
            markersize=9,
            color=COLOURS[row.name],
            label=f"{row.title}: {row.puzzles_per_second:.3g}/s",
        )
    axis.set_xscale("log")
    lowest = min(100 * row.exact for row in report.rows)
    axis.set_ylim(max(0.0, lowest - max(2.0, 0.2 * (100 - lowest))), 100.5)
    _ticks(axis)
    axis.set(xlabel="puzzles a second (log scale)", ylabel="puzzles solved, %")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
    _clean(axis, report)
    return figure


def _search_chart(pyplot: Any, report: SolveReport) -> Any:
    """Accuracy against the number of trajectories, and against puzzles a second."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
    plain = next(row for row in report.searches if row.sigma == 0)
    sigmas = dict.fromkeys(row.sigma for row in report.searches if row.sigma)
    for number, (sigma, colour) in enumerate(zip(sigmas, SIGMAS, strict=False)):
        rows = [row for row in report.searches if row.sigma == sigma]
        solved = [100 * row.exact for row in rows]
        left.plot([row.trajectories for row in rows], solved, "o-", color=colour, label=f"sigma {sigma:g}")
        right.plot([row.puzzles_per_second for row in rows], solved, "o-", color=colour)
        for row in rows:
            where = (row.puzzles_per_second, 100 * row.exact)
            offset = {"xytext": (-10, -11) if number % 2 else (4, 4), "textcoords": "offset points"}
            right.annotate(f"{row.trajectories}", where, color=colour, fontsize=8, **offset)
    for axis, x in ((left, plain.trajectories), (right, plain.puzzles_per_second)):
        axis.plot(x, 100 * plain.exact, "k*", markersize=11, label="no noise")
        axis.set_xscale("log")
        _ticks(axis)
        _clean(axis, report)
    left.set_xticks([row.trajectories for row in rows], [str(row.trajectories) for row in rows])
    left.set(xlabel="trajectories K", ylabel="puzzles solved, %")
    right.set(xlabel="puzzles a second (numbers: K)")
    left.legend(frameon=False, fontsize=9)
    return figure


def _ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _clean(axis: Any, report: SolveReport) -> None:
    settings = report.facts["settings"]
    about = f"{_clues(settings)}; {report.machine}, {settings['threads']} threads"
    axis.set_title(about if len(axis.figure.axes) == 1 else "", fontsize=9)
    axis.grid(color="#e3e5e8", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _clues(settings: dict[str, Any]) -> str:
    fewest, most = settings["clues"]
    return f"{fewest} clues" if fewest == most else f"{fewest} to {most} clues"
