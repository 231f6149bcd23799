"""Makes one small file of a training of train_sudoku.py, for `trmfast.load` and `trmfast solve`.

    python docs/examples/export_sudoku.py runs/mlp sudoku.safetensors

The file holds the averaged weights rounded to bfloat16, and in its metadata the configuration, the recipe, the clues of
the puzzles, how many held-out puzzles these rounded weights solve, and the threshold of the Q head's logit at which
halting loses none of others that were made for this choice.  The model that comes with trmfast was made so:

    python docs/examples/export_sudoku.py runs/mlp trmfast/data/sudoku-mlp.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import sudoku_data
import torch
from torch import nn
from train_sudoku import Training, options_of, parse, puzzles_of

import trmfast
from trmfast.solving import Never
from trmfast.solving.schedule import Row

BATCH = 64
CALIBRATION = 1024  # puzzles on which the threshold is chosen
THRESHOLDS = np.arange(0, 10.5, 0.5)
OF_THE_RUN = ("folder", "stop_after")  # options that are no part of the recipe


Outcomes = np.ndarray
"""[N, steps, 2]: whether a puzzle is solved after a step, and the Q head's logit."""


def outcomes(model: nn.Module, pairs: np.ndarray) -> Outcomes:
    """What the model says after every supervision step of the published evaluation.

    Args:
        model: the model.
        pairs: puzzles and solutions, digits, [N, 2, 81].
    """
    tokens = pairs.astype(np.int32) + 1
    steps: list[list[tuple[bool, float]]] = [[] for _ in tokens]

    def record(row: Row) -> None:
        assert row.q_halt is not None
        steps[row.index].append((np.array_equal(row.prediction, tokens[row.index, 1]), row.q_halt))

    for _ in trmfast.Solver(model, halt=Never(), batch_size=BATCH).solve(tokens[:, 0], on_step=record):
        pass
    return np.array(steps, dtype=np.float64)


def halting(found: Outcomes, threshold: float) -> tuple[float, float]:
    """Share of puzzles solved, and mean of the steps, where a row halts as its logit exceeds the threshold."""
    over = found[:, :, 1] > threshold
    last = np.where(over.any(1), over.argmax(1), found.shape[1] - 1)
    return float(found[np.arange(len(found)), last, 0].mean()), float(last.mean() + 1)


def calibrated(found: Outcomes) -> float:
    """The lowest threshold that solves as many puzzles as all supervision steps do, or else the most."""
    goal = halting(found, np.inf)[0]
    return float(max(THRESHOLDS, key=lambda threshold: (min(goal, halting(found, threshold)[0]), -threshold)))


def recipe(options: dict[str, Any]) -> str:
    """The command of the training, with every option: defaults may change."""
    words = ["python docs/examples/train_sudoku.py runs/sudoku"]
    for name in vars(parse([""])):
        value, option = options[name], f"--{name.replace('_', '-')}"
        if name not in OF_THE_RUN and value is not False:
            words.append(option if value is True else f"{option} {value}")
    return " ".join(words)


def export(folder: Path, file: Path, count: int | None = None, remark: str | None = None) -> dict[str, Any]:
    """Writes the file; returns its notes.

    Args:
        folder: of the training.
        file: what is written.
        count: how many held-out puzzles to solve, by default all.
        remark: what the notes should say besides.
    """
    checkpoint = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=False)
    options = {**options_of(checkpoint), "folder": folder}
    training = Training(argparse.Namespace(**options), puzzles_of(argparse.Namespace(**options)))
    training.resume(folder)
    model, test = training.averaged(), training.test[:count]
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(tensor.bfloat16())
    clues = (options["fewest_clues"], options["most_clues"])
    # Of the same classes as the test puzzles, and other puzzles.
    apart = sudoku_data.make(CALIBRATION if count is None else count, options["seed"] + 1, True, clues, lambda: None)
    threshold = calibrated(outcomes(model, apart))
    rounded, unrounded = outcomes(model, test), outcomes(training.averaged(), test)
    exact, steps = halting(rounded, threshold)
    notes = {
        "puzzles": "Sudoku 9x9 with one solution, of random solutions; train and test share no solution class",
        "fewest_clues": options["fewest_clues"],
        "most_clues": options["most_clues"],
        "clues": "uniform",
        "training_puzzles": len(training.train),
        "recipe": recipe(options),
        "optimizer_steps": training.step,
        "training_seconds": round(training.seconds),
        "held_out_puzzles": len(test),
        "held_out_exact": round(halting(rounded, np.inf)[0], 4),  # after all supervision steps
        "held_out_exact_before_rounding": round(halting(unrounded, np.inf)[0], 4),
        "threshold": threshold,
        "calibration_puzzles": len(apart),
        "held_out_exact_halting": round(exact, 4),
        "supervision_steps_halting": round(steps, 2),
    }
    if remark is not None:
        notes["remark"] = remark
    trmfast.save(model, file, dtype=torch.bfloat16, notes=notes)
    return notes


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the training")
    parser.add_argument("file", type=Path, help="what is written, ending in .safetensors")
    parser.add_argument("--count", type=int, metavar="N", help="held-out puzzles to solve (default: all)")
    parser.add_argument("--remark", metavar="TEXT", help="what the notes should say besides")
    options = parser.parse_args(arguments)
    notes = export(options.folder, options.file, options.count, options.remark)
    width = max(map(len, notes))
    for name, value in notes.items():
        print(f"{name:{width}}  {value}")
    print(f"{options.file}: {options.file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
