"""Inputs for benchmarks: ARC-AGI grids on the canvas, and Sudoku puzzles."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from trmfast.models import IGNORE_LABEL_ID
from trmfast.puzzles import arc_batch, arc_tokens, count_solutions, sudoku_batch, sudoku_puzzle
from trmfast.sudoku import is_solved
from trmfast.sudoku_puzzles import solution_class, symmetric_copies


def test_arc_grid_has_end_marks_below_and_to_the_right() -> None:
    canvas = arc_tokens(np.array([[0, 1, 2], [9, 8, 7]])).reshape(30, 30)
    expected = np.zeros((30, 30), dtype=np.int32)
    expected[0, :4] = [2, 3, 4, 1]
    expected[1, :4] = [11, 10, 9, 1]
    expected[2, :3] = 1  # the corner under the column of marks stays padding
    np.testing.assert_array_equal(canvas, expected)


def test_arc_grid_that_fills_the_canvas_has_no_end_marks() -> None:
    assert (arc_tokens(np.full((30, 30), 5)) == 7).all()
    wide = arc_tokens(np.full((2, 30), 5)).reshape(30, 30)
    assert (wide[2] == 1).all()
    assert (wide[3:] == 0).all()


@pytest.mark.parametrize(
    "grid", [np.zeros((31, 2)), np.zeros((0, 3)), np.zeros(4), np.full((2, 2), 10), np.full((2, 2), -1)]
)
def test_bad_grids(grid: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"^grid: got .*, accepted are"):
        arc_tokens(grid.astype(np.int64))


def test_arc_batch() -> None:
    batch, names = arc_batch(3)
    assert len(set(names)) == 3
    assert batch["inputs"].shape == batch["labels"].shape == (3, 900)
    assert batch["inputs"].dtype == torch.int32
    assert batch["inputs"].max() <= 11
    assert batch["inputs"].min() == 0
    assert not (batch["labels"] == 0).any()
    assert (batch["labels"] == IGNORE_LABEL_ID).any()
    assert batch["puzzle_identifiers"].tolist() == [1, 2, 3]


@pytest.mark.parametrize("make", [arc_batch, sudoku_batch])
@pytest.mark.parametrize("rows", [0, -1])
def test_batches_of_none(make: Callable[[int], Any], rows: int) -> None:
    with pytest.raises(ValueError, match=f"^rows: got {rows}, accepted are integers >= 1$"):
        make(rows)


def test_sudoku_has_one_solution() -> None:
    puzzle, solution = sudoku_puzzle(random.Random(3))
    assert all(p in (0, s) for p, s in zip(puzzle, solution, strict=True))
    assert sum(p > 0 for p in puzzle) <= 30
    assert count_solutions(puzzle) == 1
    assert count_solutions([0] * 81) == 2  # counted no further


def test_sudoku_batch() -> None:
    batch = sudoku_batch(10)
    assert batch["inputs"].shape == (10, 81)
    digits = torch.arange(2, 11)
    for given, solved in zip(batch["inputs"], batch["labels"], strict=True):
        grid = solved.view(9, 9)
        boxes = grid.view(3, 3, 3, 3).transpose(1, 2).reshape(9, 9)
        for lines in (grid, grid.T, boxes):
            assert torch.equal(lines.sort(dim=1).values.long(), digits.expand(9, 9))
        assert ((given == 1) | (given == solved)).all()
    assert torch.equal(sudoku_batch(10)["inputs"], batch["inputs"])
    assert not torch.equal(sudoku_batch(10, seed=1)["inputs"], batch["inputs"])
    assert len({tuple(row.tolist()) for row in batch["inputs"]}) == 10


def test_random_puzzles_have_one_solution() -> None:
    generator = random.Random(0)
    for givens in (30, 45, 60):
        puzzle, solution = sudoku_puzzle(generator, givens)
        assert is_solved(puzzle, solution)
        assert sum(digit > 0 for digit in puzzle) == givens
        assert count_solutions(puzzle) == 1


def test_symmetric_copies_are_puzzles_of_the_same_class() -> None:
    generator = random.Random(1)
    pairs = np.array([sudoku_puzzle(generator, 50) for _ in range(8)], dtype=np.uint8)
    copies = symmetric_copies(pairs, np.random.default_rng(0))
    assert copies.dtype == np.uint8
    assert not (copies == pairs).all(axis=(1, 2)).any()
    classes = [solution_class(solution) for solution in pairs[:, 1]]
    assert len(set(classes)) == 8
    assert [solution_class(solution) for solution in copies[:, 1]] == classes
    for puzzle, solution in copies.tolist():
        assert is_solved(puzzle, solution)
        assert sum(digit > 0 for digit in puzzle) == 50
