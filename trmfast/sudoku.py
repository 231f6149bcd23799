"""Sudoku: boards as text and as token ids, and the rules.  Imports no PyTorch."""

from __future__ import annotations

import numpy as np

__all__ = [
    "BLANK",
    "BOARD",
    "CELLS",
    "PEERS",
    "UNITS",
    "Grid",
    "conflict",
    "grid_of",
    "is_solved",
    "parse",
    "tokens",
]

CELLS = 81
BLANK = 1
"""Token id of an empty cell; a digit's is the digit and 1, 0 is padding."""

Grid = list[int]
"""81 digits row by row, 0 for an empty cell."""

BOARD = range(CELLS)
UNITS = tuple(
    [[9 * r + c for c in range(9)] for r in range(9)]
    + [[9 * r + c for r in range(9)] for c in range(9)]
    + [
        [9 * (3 * band + r) + 3 * stack + c for r in range(3) for c in range(3)]
        for band in range(3)
        for stack in range(3)
    ]
)
"""The cells of the rows, the columns and the boxes."""
PEERS = tuple(sorted({other for unit in UNITS if cell in unit for other in unit} - {cell}) for cell in BOARD)
"""For each cell, those that share a unit with it."""


def parse(line: str, check: bool = True) -> Grid:
    """The board that a line of 81 characters shows: digits, with 0 or . for an empty cell.

    Args:
        line: the line.
        check: whether two equal digits in a row, column or box are an error.

    Raises:
        ValueError: another length, other characters, or a board that the rules forbid.
    """
    wrong = next((c for c in line if c not in "0123456789."), None)
    if wrong is not None:
        at = line.index(wrong)
        raise ValueError(f"got {wrong!r} at character {at + 1}, accepted are the digits, and 0 or . for an empty cell")
    if len(line) != CELLS:
        raise ValueError(f"got {len(line)} characters, accepted are {CELLS}")
    grid = [0 if c == "." else int(c) for c in line]
    found = conflict(grid) if check else None
    if found is not None:
        raise ValueError(f"got two clues {found}, so there is no solution")
    return grid


def conflict(grid: Grid) -> str | None:
    """Two equal digits that the rules forbid, in words: ``"7 in row 3"``; None if there are none."""
    for cell in BOARD:
        for peer in PEERS[cell]:
            if cell < peer and grid[cell] and grid[cell] == grid[peer]:
                r, c = divmod(cell, 9)
                where = (
                    f"row {r + 1}"
                    if peer // 9 == r
                    else f"column {c + 1}"
                    if peer % 9 == c
                    else f"the box of row {r + 1}, column {c + 1}"
                )
                return f"{grid[cell]} in {where}"
    return None


def is_solved(puzzle: Grid, answer: Grid) -> bool:
    """Whether an answer has a digit in every cell, keeps the clues and breaks no rule."""
    complete = len(answer) == CELLS and all(1 <= digit <= 9 for digit in answer)
    kept = all(clue in (0, digit) for clue, digit in zip(puzzle, answer, strict=True))
    return complete and kept and conflict(answer) is None


def tokens(grid: Grid) -> np.ndarray:
    """The token ids of a board, int32 [81]."""
    return np.array(grid, dtype=np.int32) + BLANK


def grid_of(ids: np.ndarray) -> Grid:
    """The board of token ids [81]; 0 for what is no digit."""
    return [int(i) - BLANK if BLANK < i <= BLANK + 9 else 0 for i in ids]
