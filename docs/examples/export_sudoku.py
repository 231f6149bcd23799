"""Makes one small file of a training of train_sudoku.py, for `trmfast.load` and `trmfast solve`.

    python docs/examples/export_sudoku.py runs/mlp sudoku.safetensors

The file holds the averaged weights rounded to bfloat16, and in its metadata the configuration, the recipe, the clues of
the puzzles and how many held-out puzzles these rounded weights solve.  The model that comes with trmfast was made so:

    python docs/examples/export_sudoku.py runs/mlp trmfast/data/sudoku-mlp.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from train_sudoku import Training, options_of, parse, puzzles_of

import trmfast
from trmfast.solving import Confident, Halting, Never

BATCH = 64
OF_THE_RUN = ("folder", "stop_after")  # options that are no part of the recipe


def solved(model: nn.Module, pairs: np.ndarray, halt: Halting) -> tuple[float, float]:
    """The share of puzzles solved, and the mean of their supervision steps.

    Args:
        model: the model.
        pairs: puzzles and solutions, digits, [N, 2, 81].
        halt: the halting rule.
    """
    solver = trmfast.Solver(model, halt=halt, batch_size=BATCH)
    results = list(solver.solve(pairs[:, 0].astype(np.int32) + 1))
    right = [np.array_equal(r.prediction, pair[1].astype(np.int32) + 1) for r, pair in zip(results, pairs, strict=True)]
    return float(np.mean(right)), float(np.mean([result.steps for result in results]))


def recipe(options: dict[str, Any]) -> str:
    """The command of the training, with every option: defaults may change."""
    words = ["python docs/examples/train_sudoku.py runs/sudoku"]
    for name in vars(parse([""])):
        value, option = options[name], f"--{name.replace('_', '-')}"
        if name not in OF_THE_RUN and value is not False:
            words.append(option if value is True else f"{option} {value}")
    return " ".join(words)


def export(folder: Path, file: Path, count: int | None = None) -> dict[str, Any]:
    """Writes the file; returns its notes.

    Args:
        folder: of the training.
        file: what is written.
        count: how many held-out puzzles to solve, by default all.
    """
    checkpoint = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=False)
    options = {**options_of(checkpoint), "folder": folder}
    training = Training(argparse.Namespace(**options), puzzles_of(argparse.Namespace(**options)))
    training.resume(folder)
    model, test = training.averaged(), training.test[:count]
    unrounded, _ = solved(model, test, Confident())
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(tensor.bfloat16())
    exact, _ = solved(model, test, Never())
    halting, steps = solved(model, test, Confident())
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
        "held_out_exact": round(exact, 4),  # after all supervision steps
        "held_out_exact_halting": round(halting, 4),
        "held_out_exact_halting_before_rounding": round(unrounded, 4),
        "supervision_steps_halting": round(steps, 2),
    }
    trmfast.save(model, file, dtype=torch.bfloat16, notes=notes)
    return notes


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the training")
    parser.add_argument("file", type=Path, help="what is written, ending in .safetensors")
    parser.add_argument("--count", type=int, metavar="N", help="held-out puzzles to solve (default: all)")
    options = parser.parse_args(arguments)
    notes = export(options.folder, options.file, options.count)
    width = max(map(len, notes))
    for name, value in notes.items():
        print(f"{name:{width}}  {value}")
    print(f"{options.file}: {options.file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
