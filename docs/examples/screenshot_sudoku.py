"""Draws the screenshot of the README: a puzzle as `trmfast solve` shows it, a frame for every supervision step.

    python docs/examples/screenshot_sudoku.py docs/images/solve.svg

A terminal shows the frames one after the other in the same place; here they stand side by side.
"""

from __future__ import annotations

import argparse
import io
import random
import re
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.text import Text

from trmfast import runtime
from trmfast.cli.board import Board
from trmfast.cli.solve import threshold_of
from trmfast.solving.schedule import Row
from trmfast.sudoku import grid_of, is_solved, tokens
from trmfast.sudoku_puzzles import sudoku_puzzle


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file", type=Path, help="what is written, ending in .svg")
    add("--clues", type=int, default=27, metavar="N", help="of the puzzle (default: 27)")
    add("--seed", type=int, default=2, metavar="N", help="of the puzzle (default: 2)")
    add("--threshold", type=float, metavar="T", help="halt when the Q head's logit is above T (default: the model's)")
    options = parser.parse_args(arguments)
    puzzle, _ = sudoku_puzzle(random.Random(options.seed), options.clues)
    frames: list[Any] = []
    board = Board(puzzle, Console(file=io.StringIO()))
    model = runtime.load("sudoku-mlp")
    solver = runtime.Solver(model, halt=runtime.Confident(threshold_of(options.threshold, model.notes)), batch_size=1)

    def step(row: Row) -> None:
        board.step(row)
        frames.append(board.live.renderable)

    (result,) = solver.solve([tokens(puzzle)], on_step=step)
    solved = is_solved(puzzle, grid_of(result.prediction))
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(Text("$ trmfast solve " + "".join(str(digit or ".") for digit in puzzle)))
    console.print()
    console.print(Columns(frames, padding=(0, 3)))
    # Readers shall load no font from another site.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="trmfast solve"), flags=re.DOTALL)
    options.file.write_text(svg)
    print(f"{options.file}: {result.steps} steps, {'solved' if solved else 'not solved'}")


if __name__ == "__main__":
    main()
