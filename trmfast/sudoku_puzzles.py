"""Sudoku puzzles with one solution, symmetric copies, and classes that no symmetry changes.  Imports no PyTorch."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

from trmfast.sudoku import BOARD, PEERS, UNITS, Grid

__all__ = ["count_solutions", "random_solution", "solution_class", "sudoku_puzzle", "symmetric", "symmetric_copies"]

_UNITS_OF = tuple(tuple(unit for unit in UNITS if cell in unit) for cell in BOARD)


def sudoku_puzzle(generator: random.Random, givens: int = 26, solution: Grid | None = None) -> tuple[Grid, Grid]:
    """A puzzle and its only solution.

    Digits are taken from a solution in random order, each if the solution stays the only one, until ``givens`` are left
    or no more can be taken.

    Args:
        generator: decides everything.
        givens: the clues that are wanted.
        solution: by default a random one.
    """
    solution = random_solution(generator) if solution is None else solution
    puzzle, left = list(solution), len(BOARD)
    for cell in generator.sample(BOARD, len(BOARD)):
        if left == givens:
            break
        digit, puzzle[cell] = puzzle[cell], 0
        free = _candidates(puzzle)
        # Most digits are forced by their units; the others take a search.
        if not _is_forced(free, cell, digit) and _has_other(puzzle, free, cell, digit):
            puzzle[cell] = digit
        else:
            left -= 1
    return puzzle, solution


def random_solution(generator: random.Random) -> Grid:
    """A full board: random digits in the boxes of the diagonal, the rest by a search in random order."""
    grid = [0] * len(BOARD)
    for box in (0, 4, 8):
        for cell, digit in zip(UNITS[18 + box], generator.sample(range(1, 10), 9), strict=True):
            grid[cell] = digit
    _search(grid, _candidates(grid), 1, generator.shuffle)
    return grid


def count_solutions(puzzle: Grid, most: int = 2) -> int:
    """The number of solutions, counted up to ``most``."""
    grid = list(puzzle)
    return _search(grid, _candidates(grid), most)


def _candidates(grid: Grid) -> list[int]:
    """One bit for each digit that an empty cell may hold; 0 for a cell that is filled."""
    free = [0] * len(BOARD)
    for cell in BOARD:
        if not grid[cell]:
            bits = 0x3FE
            for peer in PEERS[cell]:
                bits &= ~(1 << grid[peer])
            free[cell] = bits
    return free


def _search(grid: Grid, free: list[int], most: int, order: Callable[[list[int]], None] | None = None) -> int:
    """Counts solutions up to ``most``; leaves the last one in ``grid`` where ``most`` are found."""
    best, fewest = -1, 10
    for cell in BOARD:
        if not grid[cell]:
            count = free[cell].bit_count()
            if count < fewest:
                best, fewest = cell, count
                if count <= 1:
                    break
    if best < 0:
        return 1
    digits = [digit for digit in range(1, 10) if free[best] >> digit & 1]
    if order is not None:
        order(digits)
    found = 0
    for digit in digits:
        bit = 1 << digit
        changed = [peer for peer in PEERS[best] if not grid[peer] and free[peer] & bit]
        grid[best] = digit
        for peer in changed:
            free[peer] ^= bit
        found += _search(grid, free, most - found, order)
        if found >= most:
            return found
        for peer in changed:
            free[peer] |= bit
        grid[best] = 0
    return found


def _is_forced(free: list[int], cell: int, digit: int) -> bool:
    """Whether ``digit`` is the only one for ``cell``, or ``cell`` the only place for it in a unit."""
    bit = 1 << digit
    return free[cell] == bit or any(
        all(other == cell or not free[other] & bit for other in unit) for unit in _UNITS_OF[cell]
    )


def _has_other(grid: Grid, free: list[int], cell: int, digit: int) -> bool:
    """Whether a solution has another digit than ``digit`` in ``cell``."""
    for other in range(1, 10):
        if other != digit and free[cell] >> other & 1:
            trial = list(grid)
            trial[cell] = other
            if _search(trial, _candidates(trial), 1):
                return True
    return False


# ---------------------------------------------------------------- symmetry


def symmetric(pair: tuple[Grid, Grid], generator: random.Random) -> tuple[Grid, Grid]:
    """The pair after a random exchange of digits, bands, rows, stacks and columns, and perhaps a transposition."""

    def line() -> list[int]:
        return [3 * group + i for group in generator.sample(range(3), 3) for i in generator.sample(range(3), 3)]

    digits = [0, *generator.sample(range(1, 10), 9)]
    rows, columns, transpose = line(), line(), generator.random() < 0.5
    cells = [9 * c + r if transpose else 9 * r + c for r in rows for c in columns]
    puzzle, solution = ([digits[grid[cell]] for cell in cells] for grid in pair)
    return puzzle, solution


def symmetric_copies(pairs: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Puzzles and solutions [N, 2, 81], each pair after random exchanges as in :func:`symmetric`; of the same dtype."""
    count = len(pairs)

    def lines() -> np.ndarray:
        groups = generator.random((count, 3)).argsort(1)[:, :, None]
        return (3 * groups + generator.random((count, 3, 3)).argsort(2)).reshape(count, 9)

    rows, columns = lines(), lines()
    cells = 9 * rows[:, :, None] + columns[:, None, :]
    turned = generator.random(count) < 0.5
    cells[turned] = cells[turned].transpose(0, 2, 1)
    digits = np.zeros((count, 1, 10), dtype=pairs.dtype)
    digits[:, 0, 1:] = generator.random((count, 9)).argsort(1) + 1
    moved = np.take_along_axis(pairs, cells.reshape(count, 1, 81).repeat(2, axis=1), axis=2)
    return np.take_along_axis(digits.repeat(2, axis=1), moved.astype(np.int64), axis=2)


def solution_class(solution: np.ndarray | Grid) -> int:
    """A number that all symmetric forms of a solution share.

    Two puzzles that are symmetric have solutions of one class, so a split by class leaves no test puzzle that is a
    training puzzle in disguise.
    """
    import hashlib  # loads OpenSSL, 5 ms that `trmfast solve` does not need

    grid = np.asarray(solution, dtype=np.int64).reshape(9, 9) - 1

    def cycles(a: np.ndarray, b: np.ndarray) -> tuple[int, ...]:
        """Cycle lengths of the permutation that takes the digits of line a to those of line b."""
        to = np.empty(9, dtype=np.int64)
        to[a] = b
        lengths: list[int] = []
        seen: set[int] = set()
        for start in range(9):
            length, digit = 0, start
            while digit not in seen:
                seen.add(digit)
                digit, length = int(to[digit]), length + 1
            if length:
                lengths.append(length)
        return tuple(sorted(lengths))

    def lines(rows: np.ndarray) -> str:
        near = sorted(cycles(rows[i], rows[j]) for i in range(9) for j in range(i) if i // 3 == j // 3)
        far = sorted(cycles(rows[i], rows[j]) for i in range(9) for j in range(i) if i // 3 != j // 3)
        return repr((near, far))

    both = "".join(sorted([lines(grid), lines(grid.T)]))
    return int.from_bytes(hashlib.sha256(both.encode()).digest()[:8], "big")
