"""What train_sudoku.py writes down of a training: log.csv, and loss.png that is drawn from it."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass
class Row:
    """A line of log.csv: means over the steps since the line before.

    Attributes:
        step: optimizer steps so far.
        seconds: spent in training so far, over all starts.
        loss: cross entropy of a cell.
        q_loss: binary cross entropy of the halting head.
        exact: share of the puzzles that halted solved, in training.
        halted_after: supervision steps that a puzzle took, in training.
        test_cells, test_exact: share of the empty cells, and of the puzzles, that the averaged weights get right after
            all supervision steps (while training is shallow, after its one), on held-out puzzles.
    """

    step: int
    seconds: float
    loss: float
    q_loss: float
    exact: float
    halted_after: float
    test_cells: float | None = None
    test_exact: float | None = None


def write_log(folder: Path, history: list[Row]) -> None:
    """Writes log.csv and loss.png."""
    with (folder / "log.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in history)
    draw(folder / "loss.png", history)


def draw(path: Path, history: list[Row]) -> None:
    """Loss and accuracy against the optimizer step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    steps = [row.step for row in history]
    left.plot(steps, [row.loss for row in history], color="#1f4e79")
    left.set(xlabel="optimizer step", ylabel="cross entropy of a cell", yscale="log")
    tested = [row for row in history if row.test_exact is not None]
    right.plot([row.step for row in tested], [row.test_cells for row in tested], color="#8a929c", label="empty cells")
    right.plot([row.step for row in tested], [row.test_exact for row in tested], color="#1f4e79", label="whole puzzles")
    right.set(xlabel="optimizer step", ylabel="right on held-out puzzles", ylim=(0, 1))
    right.legend(frameon=False)
    for axis in (left, right):
        axis.grid(color="#e3e5e8", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
