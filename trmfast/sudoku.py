"""Sudoku: boards as text and as token ids, the rules, puzzles with one solution.  Imports no PyTorch."""

from __future__ import annotations

import random

import numpy as np

__all__ = [
    "BLANK",
    "CELLS",
    "Grid",
    "conflict",
    "count_solutions",
    "grid_of",
    "is_solved",
    "parse",
    "sudoku_puzzle",
    "symmetric",
    "tokens",
]

CELLS = 81
BLANK = 1
"""Token id of an empty cell; a digit's is the digit and 1, 0 is padding."""

Grid = list[int]
"""81 digits row by row, 0 for an empty cell."""

_CELLS = range(81)
_PEERS = tuple(
    tuple(
        other
        for other in _CELLS
        if other != cell
        and (
            other // 9 == cell // 9
            or other % 9 == cell % 9
            or (other // 27 == cell // 27 and other % 9 // 3 == cell % 9 // 3)
        )
    )
    for cell in _CELLS
)


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
    for cell in _CELLS:
        for peer in _PEERS[cell]:
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


def sudoku_puzzle(generator: random.Random, givens: int = 26) -> tuple[Grid, Grid]:
    """A puzzle and its only solution.

    Digits are taken from a random solution, each if the solution stays the only one, until ``givens`` are left or no
    more can be taken.
    """
    solution = symmetric(
        ([0] * 81, [(3 * (r % 3) + r // 3 + c) % 9 + 1 for r in range(9) for c in range(9)]), generator
    )[1]
    puzzle = list(solution)
    left = 81
    for cell in generator.sample(_CELLS, 81):
        if left == givens:
            break
        digit, puzzle[cell] = puzzle[cell], 0
        if count_solutions(puzzle) == 1:
            left -= 1
        else:
            puzzle[cell] = digit
    return puzzle, solution


def count_solutions(puzzle: Grid, most: int = 2) -> int:
    """The number of solutions, counted up to ``most``."""
    # One bit for each digit that a cell may still hold.
    free = [0] * 81
    for cell in _CELLS:
        if not puzzle[cell]:
            free[cell] = 0x3FE
            for peer in _PEERS[cell]:
                free[cell] &= ~(1 << puzzle[peer])
    grid = list(puzzle)

    def search() -> int:
        empty = [cell for cell in _CELLS if not grid[cell]]
        if not empty:
            return 1
        cell = min(empty, key=lambda c: free[c].bit_count())
        found = 0
        for digit in range(1, 10):
            if not free[cell] >> digit & 1:
                continue
            bit = 1 << digit
            changed = [peer for peer in _PEERS[cell] if not grid[peer] and free[peer] & bit]
            grid[cell] = digit
            for peer in changed:
                free[peer] &= ~bit
            found += search()
            for peer in changed:
                free[peer] |= bit
            grid[cell] = 0
            if found >= most:
                break
        return found

    return search()


def symmetric(pair: tuple[Grid, Grid], generator: random.Random) -> tuple[Grid, Grid]:
    """The pair after a random exchange of digits, bands, rows, stacks and columns, and perhaps a transposition."""

    def line() -> list[int]:
        return [3 * group + i for group in generator.sample(range(3), 3) for i in generator.sample(range(3), 3)]

    digits = [0, *generator.sample(range(1, 10), 9)]
    rows, columns, transpose = line(), line(), generator.random() < 0.5
    cells = [9 * c + r if transpose else 9 * r + c for r in rows for c in columns]
    puzzle, solution = ([digits[grid[cell]] for cell in cells] for grid in pair)
    return puzzle, solution
