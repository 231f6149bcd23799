"""What int8 and bfloat16 operands change in the trained models: puzzles solved, and states step by step.

    python benchmarks/int8_quality.py                     # the models that come with trmfast, 512 puzzles
    python benchmarks/int8_quality.py sudoku.safetensors --puzzles 64

Puzzles have the clues that the model was trained with.  The first table has the share solved after all supervision
steps and by halting at the threshold.  The second has the cosine of every state with that of a float32 run, after
each supervision step, averaged over 32 puzzles; each run goes on with its own carry.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

import trmfast
from trmfast import runtime
from trmfast.benchmark.solve import DTYPES, puzzles_of
from trmfast.cli.console import print_table
from trmfast.data import model_names
from trmfast.solving import Confident, Never
from trmfast.testing import carry_fidelity


def solved(file: str, dtype: str, pairs: np.ndarray) -> list[str]:
    """Shares of puzzles and solutions [N, 2, S] that are solved by all steps and by halting, and its mean of steps."""
    model = runtime.load(file, dtype=dtype)
    fixed, halting = (
        list(runtime.Solver(model, halt=rule).solve(pairs[:, 0]))
        for rule in (Never(), Confident(float(model.notes["threshold"])))
    )
    exact = (
        np.mean([np.array_equal(row.prediction, pair[1]) for row, pair in zip(rows, pairs, strict=True)])
        for rows in (fixed, halting)
    )
    return [*(f"{share:.1%}" for share in exact), f"{np.mean([row.steps for row in halting]):.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=model_names(), help="files or names, as of trmfast solve")
    parser.add_argument("--puzzles", type=int, default=512, metavar="N")
    options = parser.parse_args()
    for file in options.models:
        notes = runtime.load(file).notes
        pairs = puzzles_of(options.puzzles, (int(notes["fewest_clues"]), int(notes["most_clues"])))
        rows = [[name, *solved(file, dtype, pairs)] for name, dtype in DTYPES.items()]
        title = f"{file}, {options.puzzles} puzzles of {notes['fewest_clues']} to {notes['most_clues']} clues"
        print_table(title, ["dtype", "all steps", "halting", "steps"], rows)
        batch = {"inputs": torch.from_numpy(pairs[:32, 0])}
        batch["puzzle_identifiers"] = torch.zeros(len(batch["inputs"]), dtype=torch.int32)
        model = trmfast.load(file)
        paths = [carry_fidelity(model, batch, dtype) for dtype in ("bfloat16", "int8")]
        names = list(paths[0][0])
        heads = ["step", *(f"{dtype} {name}" for dtype in ("bf16", "int8") for name in names)]
        cosines = [[f"{step[name]:.5f}" for step in both for name in names] for both in zip(*paths, strict=True)]
        print_table("cosine with float32", heads, [[str(n), *row] for n, row in enumerate(cosines, 1)])


if __name__ == "__main__":
    main()
