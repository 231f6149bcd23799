"""Pictures of a run: speed; of suites also roofline, scaling and memory."""

from __future__ import annotations

import statistics
from itertools import product
from math import cos, dist, pi, prod, sin
from pathlib import Path
from typing import Any

from trmfast.benchmark.measure import Row
from trmfast.benchmark.report import Report, title_of
from trmfast.benchmark.rivals import in_order, is_ours
from trmfast.benchmark.rivals import title_of as implementation_title
from trmfast.benchmark.scaling import Sweep
from trmfast.cases import find_case
from trmfast.problem import Problem

__all__ = ["minimal_bytes", "write_charts"]

COLOURS = {
    "eager": "#b8bcc2",
    "compile": "#8fa3b8",
    "max-autotune": "#5f7c99",
    "openvino": "#e0a458",
    "onnxruntime": "#a3b18a",
    "trmfast-bf16": "#7aa6cf",
    "trmfast": "#1f4e79",
}
OTHER_SETTING = "#5b8fc0"
GREY = "#60656c"
STEP_TITLES = {"forward": "forward", "training": "training step"}


def write_charts(folder: Path, report: Report) -> list[str]:
    """Draws what the report has numbers for; returns the names of the files.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    caption = f"{report.machine}; {report.facts['settings']['threads']} threads"
    written = []
    of_suite = report.suite is not None
    for file, draw, present in (
        ("suite-speed.png" if of_suite else "bench.png", _speed, bool(report.rows)),
        ("suite-roofline.png", _roofline, of_suite and bool(report.rows)),
        ("suite-memory.png", _memory, of_suite and any(row.step == "training" for row in report.rows)),
        ("suite-scaling.png", _scaling, bool(report.sweeps)),
    ):
        if present:
            figure = draw(pyplot, report)
            margin = 0.22 / figure.get_figheight()
            figure.get_layout_engine().set(rect=(0, margin, 1, 1 - margin))
            figure.text(0.005, 0.2 * margin, caption, ha="left", va="bottom", fontsize=7.5, color=GREY)
            figure.savefig(folder / file, dpi=150)
            pyplot.close(figure)
            written.append(file)
    return written


def _label(row: Row) -> str:
    return f"{title_of(row.case)}\nB={row.batch}, L={row.length}, {row.dtype}"


def _clean(axis: Any, grid: str) -> None:
    axis.grid(axis=grid, color="#e3e5e8", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _speed(pyplot: Any, report: Report) -> Any:
    """One bar for each implementation, its speed relative to eager PyTorch."""
    groups = {step: [g for g in report.groups() if g[0].step == step] for step in STEP_TITLES}
    groups = {step: found for step, found in groups.items() if found}
    bars = {step: sum(len(g) + 1.0 for g in found) for step, found in groups.items()}
    height = max(3.0, 0.17 * max(bars.values()) + 1.4)
    figure, axes = pyplot.subplots(
        1, len(groups), figsize=(4.9 * len(groups), height), squeeze=False, layout="constrained"
    )
    handles: dict[str, Any] = {}
    for axis, (step, found) in zip(axes[0], groups.items(), strict=True):
        position, ticks, labels = 0.0, [], []
        longest = 0.0
        everywhere = {row.implementation for group in found for row in group}
        for group in found:
            rows = {row.implementation: row for row in group}
            if "eager" not in rows:
                continue
            begin = position
            for name in in_order(rows):
                speed = rows["eager"].seconds / rows[name].seconds
                longest = max(longest, speed)
                bar = axis.barh(position, speed, 0.9, color=COLOURS.get(name, OTHER_SETTING))
                handles.setdefault(name, bar)
                weight = "bold" if is_ours(name) else "normal"
                axis.annotate(
                    f"{speed:.2f}",
                    (speed, position),
                    xytext=(3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7.5,
                    fontweight=weight,
                )
                position += 1
            ticks.append((begin + position - 1) / 2)
            labels.append(_label(group[0]))
            missing = in_order(everywhere - rows.keys())
            if missing:
                text = f"not run: {', '.join(missing)}"
                axis.annotate(
                    text, (0, position), xytext=(3, 0), textcoords="offset points", va="center", fontsize=6, color=GREY
                )
            position += 1
        axis.set_yticks(ticks, labels, fontsize=8)
        axis.set_ylim(position - 0.4, -0.9)
        axis.set_xlim(0, longest * 1.12)
        axis.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
        axis.set_xlabel("speed (eager PyTorch: 1)")
        axis.set_title(STEP_TITLES[step], fontsize=11)
        _clean(axis, "x")
    figure.legend(
        [handles[name] for name in in_order(handles)],
        [implementation_title(name) for name in in_order(handles)],
        loc="outside upper center",
        ncols=min(len(handles), 6),
        frameon=False,
        fontsize=9,
    )
    return figure


def minimal_bytes(problem: Problem, batch: int, length: int, element: int) -> int:
    """Bytes that a forward pass moves if only sums and states pass through memory.

    Every update reads the weights of its network, its sources and x, and writes its state, once each.

    Args:
        problem: program and networks.
        batch, length: B and L.
        element: bytes of an element of the compute dtype.
    """
    state = batch * length * problem.hidden_size
    count = 0
    for update in problem.program.updates:
        weights = sum(prod(shape) for shape in problem.weight_shapes[problem.weight_slices[update.net]])
        count += weights + state * (len(update.sources) + update.inject_x + 1)
    return count * element


def _roofline(pyplot: Any, report: Report) -> Any:
    """Forward passes under the machine's matrix peaks and bandwidths."""
    figure, axis = pyplot.subplots(figsize=(9.5, 6.2), layout="constrained")
    rows = [row for row in report.rows if row.step == "forward" and row.implementation in ("eager", "trmfast")]
    points = []
    for row in rows:
        case = find_case(row.case)
        element = {"int8": 1, "bf16": 2, "fp32": 4}[row.dtype]
        if report.facts["settings"]["tiny"]:
            continue
        points.append((row, row.gflop * 1e9 / minimal_bytes(case.problem, row.batch, row.length, element)))
    left, right = 2.0, 2 * max([100.0, *(x for _, x in points)])
    peaks = {
        dtype: statistics.median(p for row in rows if row.dtype == dtype for p in row.peaks)
        for dtype in dict.fromkeys(row.dtype for row in rows)
    }
    top = max(peaks.values())
    bottom = min([top / 10, *(0.7 * row.gflops for row in rows)])
    for name, bandwidth, style in (
        ("memory", report.bandwidth["memory"], "-"),
        ("last-level cache", report.bandwidth["cache"], "--"),
    ):
        ridge = top * 1e9 / bandwidth
        axis.plot(
            [bottom * 1e9 / bandwidth, ridge],
            [bottom, top],
            style,
            color=GREY,
            linewidth=1.2,
            label=f"{name}, {bandwidth * 1e-9:.0f} GB/s",
        )
    for dtype, peak in peaks.items():
        axis.plot([left, right], [peak, peak], color=GREY, linewidth=1.2)
        axis.annotate(
            f"{dtype} matrix peak, {peak:.0f} GFLOP/s",
            (16, peak),
            xytext=(0, 4),
            textcoords="offset points",
            fontsize=8,
            color=GREY,
        )
    markers = {"bf16": "o", "fp32": "s", "int8": "D"}
    numbers: dict[str, tuple[float, float]] = {}
    for row, x in points:
        fused = row.implementation == "trmfast"
        axis.plot(
            x,
            row.gflops,
            markers[row.dtype],
            markersize=7 if fused else 5,
            color=COLOURS[row.implementation],
            markeredgecolor="white",
            markeredgewidth=0.6,
            linestyle="none",
        )
        if fused:
            label = f"{title_of(row.case)}, B={row.batch}, L={row.length}, {row.dtype}"
            numbers[label] = (x, row.gflops)
    for name, dtype in product(("trmfast", "eager"), ("int8", "bf16", "fp32")):
        if any((row.implementation, row.dtype) == (name, dtype) for row in rows):
            axis.plot(
                [],
                [],
                markers[dtype],
                color=COLOURS[name],
                label=f"{implementation_title(name)}, {dtype}",
                linestyle="none",
            )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(left, right)
    axis.set_ylim(bottom, top * 1.4)
    for which, ticks in ((axis.xaxis, (1, 10, 100, 1000)), (axis.yaxis, (20, 50, 100, 200, 500, 1000, 2000, 5000))):
        low, high = (left, right) if which is axis.xaxis else (bottom, top * 1.4)
        shown = [tick for tick in ticks if low <= tick <= high]
        which.set_ticks(shown, [f"{tick:,}" for tick in shown])
    axis.minorticks_off()
    axis.set_xlabel("FLOP for each byte that must move (weights, sums and states once an update)")
    axis.set_ylabel("GFLOP/s")
    axis.set_title("Forward passes under this machine's roofs", fontsize=11)
    axis.grid(which="major", color="#e3e5e8", linewidth=0.8)
    axis.set_axisbelow(True)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right lower", fontsize=7.5, frameon=False, labelspacing=0.7)
    figure.legend(
        [pyplot.Line2D([], [], linestyle="none") for _ in numbers],
        [f"{number}  {label}" for number, label in enumerate(numbers, 1)],
        loc="outside right upper",
        fontsize=7.5,
        frameon=False,
        handlelength=0,
        handletextpad=0,
    )
    _number(figure, axis, list(numbers.values()), [(x, row.gflops) for row, x in points])
    return figure


def _number(figure: Any, axis: Any, places: list[tuple[float, float]], points: list[tuple[float, float]]) -> None:
    """Numbers the places in turn: each number as near as it stands clear of points and other numbers."""
    if not places:
        return
    figure.canvas.draw()  # the layout decides how far apart the points are
    per_point = figure.dpi / 72
    taken = [tuple(at) for at in axis.transData.transform(points) / per_point]
    around = [(r, 2 * pi * i / 16) for r in (9, 14, 20, 27, 35, 44) for i in range(16)]
    for number, place in enumerate(places, 1):
        x, y = axis.transData.transform(place) / per_point
        free = [(r, a) for r, a in around if all(dist((x + r * cos(a), y + r * sin(a)), at) > 8.5 for at in taken)]
        r, a = (free or around[-1:])[0]
        taken.append((x + r * cos(a), y + r * sin(a)))
        axis.annotate(
            str(number),
            place,
            xytext=(r * cos(a), r * sin(a)),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=7,
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkA": 3, "shrinkB": 3},
        )


def _memory(pyplot: Any, report: Report) -> Any:
    """What a training step keeps, and how far resident memory rises, for eager PyTorch and trmfast."""
    groups = [{row.implementation: row for row in group} for group in report.groups() if group[0].step == "training"]
    groups = [rows for rows in groups if {"eager", "trmfast"} <= rows.keys()]
    figure, axes = pyplot.subplots(
        1, 2, figsize=(12, 0.42 * len(groups) + 1.9), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (field, text) in zip(
        axes[0],
        (("saved", "kept for backward, MB"), ("peak", "resident memory rises by, MB")),
        strict=True,
    ):
        for position, rows in enumerate(groups):
            values = {name: getattr(rows[name], field) for name in ("eager", "trmfast")}
            for offset, name in ((-0.2, "eager"), (0.2, "trmfast")):
                if values[name]:
                    axis.barh(
                        position + offset,
                        values[name] / 1e6,
                        0.38,
                        color=COLOURS[name],
                        label=implementation_title(name) if position == 0 else None,
                    )
                    axis.annotate(
                        f"{values[name] / 1e6:,.3g}" if values[name] < 1e9 else f"{values[name] / 1e6:,.0f}",
                        (values[name] / 1e6, position + offset),
                        xytext=(3, 0),
                        textcoords="offset points",
                        va="center",
                        fontsize=7.5,
                    )
        axis.margins(x=0.1)
        axis.set_xlabel(text)
        _clean(axis, "x")
    axes[0][0].set_yticks(range(len(groups)), [_label(rows["trmfast"]) for rows in groups], fontsize=8)
    axes[0][0].set_ylim(len(groups) - 0.4, -0.6)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure


def _scaling(pyplot: Any, report: Report) -> Any:
    """Time of one update against batch, length and depth, with the fits."""
    panels: list[tuple[str, list[Sweep]]] = []
    for name, step, text in (
        ("batch", "forward", "batch, forward: sequences"),
        ("batch", "training", "batch, training step: sequences"),
        ("length", "forward", "length, forward: tokens"),
        ("depth", "forward", "depth, forward: updates in a run"),
    ):
        found = [s for s in report.sweeps if s.name == name and s.step == step]
        if found:
            panels.append((text, found))
    rows = (len(panels) + 1) // 2
    figure, axes = pyplot.subplots(rows, 2, figsize=(11, 4.0 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    import numpy as np
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for axis, (text, sweeps) in zip(axes.flat, panels, strict=False):
        for sweep in sweeps:
            times = [1e3 * t for t in sweep.seconds_per_update]
            dashed = "--" if sweep.hidden_size != sweeps[0].hidden_size else "-"
            name = f"{implementation_title(sweep.implementation)}, D={sweep.hidden_size}"
            counts = sweep.x if sweep.name == "depth" else [sweep.updates] * len(sweep.x)
            low = [t - 1e3 * s / c for t, s, c in zip(times, sweep.low, counts, strict=True)]
            high = [1e3 * s / c - t for t, s, c in zip(times, sweep.high, counts, strict=True)]
            colour = COLOURS[sweep.implementation]
            axis.errorbar(sweep.x, times, [low, high], fmt="o", markersize=4.5, color=colour, capsize=2, linewidth=0.9)
            x = np.geomspace(sweep.fitted[0], sweep.fitted[-1], 200)
            y = sum(c * x**p for c, p in zip(sweep.fit.coefficients, sweep.fit.powers, strict=True))
            if sweep.per == "a run":
                y = y / x
            axis.plot(x, 1e3 * y, dashed, color=colour, linewidth=1.2, label=name)
        axis.set_xscale("log")
        axis.set_yscale("log")
        sizes = max((sweep.x for sweep in sweeps), key=len)
        axis.set_xticks(sizes, [f"{x:,}" for x in sizes])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_xlabel(text.split(": ")[1])
        axis.set_ylabel("ms an update (log scale)")
        axis.set_title(f"cost against {text.split(':')[0]}", fontsize=10.5)
        axis.legend(fontsize=8, frameon=False)
        _clean(axis, "both")
    return figure
