"""Draws trainings of train_sudoku.py in one chart, and says when each reached the accuracy of the first.

    python docs/examples/train_sudoku.py runs/trmfast --steps 2000
    python docs/examples/train_sudoku.py runs/eager --steps 2000 --eager
    python docs/examples/compare_sudoku.py runs/eager runs/trmfast --chart comparison.png

Same options and the same seed give the same puzzles, initial weights and exploration.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

COLOURS = ("#8a929c", "#1f4e79", "#e0a458", "#5f7c99")

Log = list[dict[str, float]]
# Of held-out puzzles: those solved, and the share of right cells, which moves earlier in a short training.
MEASURES = {"exact": "held-out puzzles solved", "cells": "cells of held-out puzzles right"}


def read(folder: Path) -> Log:
    """The lines of log.csv; those without a test have no ``test_exact``."""
    with (folder / "log.csv").open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def tests(log: Log) -> Log:
    return [row for row in log if "test_exact" in row]


def reached(log: Log, measure: str, share: float) -> dict[str, float] | None:
    """The first test with at least this share."""
    return next((row for row in tests(log) if row[f"test_{measure}"] >= share), None)


def draw(path: Path, logs: dict[str, Log], measure: str) -> None:
    """Loss and held-out accuracy, against the optimizer step and against the time in training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), sharex="col", sharey="row", layout="constrained")
    for (name, log), colour in zip(logs.items(), COLOURS, strict=False):
        tested = tests(log)
        for column, x, unit in ((0, "step", 1), (1, "seconds", 60)):
            style = {"color": colour, "label": name}
            axes[0][column].plot([row[x] / unit for row in log], [row["loss"] for row in log], **style)
            marks = [row[x] / unit for row in tested], [row[f"test_{measure}"] for row in tested]
            axes[1][column].plot(*marks, marker="o", markersize=4, **style)
    axes[0][0].set(ylabel="cross entropy of a cell", yscale="log")
    axes[1][0].set(ylabel=MEASURES[measure], xlabel="optimizer step", ylim=(0, 1))
    axes[1][1].set(xlabel="minutes in training")
    axes[0][0].legend(frameon=False)
    for axis in axes.flat:
        axis.grid(color="#e3e5e8", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="of the trainings, the one to be reached first")
    parser.add_argument("--measure", choices=MEASURES, default="exact", help="puzzles solved, or cells right")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="where the chart goes")
    options = parser.parse_args(arguments)
    logs = {folder.name: read(folder) for folder in options.folders}
    measure = options.measure
    goal = max((row[f"test_{measure}"] for row in tests(next(iter(logs.values())))), default=None)
    for name, log in logs.items():
        last = log[-1]
        speed = last["seconds"] / last["step"]
        print(f"{name}: {last['step']:.0f} steps, {1000 * speed:.0f} ms each, loss {last['loss']:.4f}")
        found = None if goal is None else reached(log, measure, goal)
        if found is not None:
            print(f"{name}: {goal:.1%} {MEASURES[measure]} after {found['step']:.0f} steps, {found['seconds']:.0f} s")
    if options.chart is not None:
        draw(options.chart, logs, measure)


if __name__ == "__main__":
    main()
