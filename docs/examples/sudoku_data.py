"""Sudoku puzzles for training: random solutions, a stated number of clues, a split without symmetric copies.

A puzzle is a random solution of which digits are taken in random order, each if the solution stays the only one, until
the wanted number of clues is left.  Every puzzle has one solution.

The split is by solution class.  A Sudoku keeps its structure under exchanged digits, bands, rows, stacks and columns
and under transposition, so a test puzzle could be a training puzzle in disguise.  `class_of` is a number that none of
these changes; whole classes go to one side of the split.  Symmetric puzzles have equal classes, so no test puzzle is
symmetric to a training puzzle.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from functools import partial
from multiprocessing import Pool

import numpy as np

CELLS = range(81)
UNITS = [[9 * r + c for c in range(9)] for r in range(9)]
UNITS += [[9 * r + c for r in range(9)] for c in range(9)]
UNITS += [[9 * (3 * b + r) + 3 * s + c for r in range(3) for c in range(3)] for b in range(3) for s in range(3)]
PEERS = [sorted({other for unit in UNITS if cell in unit for other in unit} - {cell}) for cell in CELLS]
UNITS_OF = [[unit for unit in UNITS if cell in unit] for cell in CELLS]
TEST_SHARE = 16  # one solution class in 16 is for tests


def candidates(grid: list[int]) -> list[int]:
    """One bit for each digit that an empty cell may hold, 0 for a cell that is given."""
    free = [0] * 81
    for cell in CELLS:
        if not grid[cell]:
            bits = 0x3FE
            for peer in PEERS[cell]:
                bits &= ~(1 << grid[peer])
            free[cell] = bits
    return free


def search(grid: list[int], free: list[int], order: Callable[[list[int]], None] | None = None) -> bool:
    """Fills ``grid`` in place with a solution, if there is one; ``order`` may shuffle the digits that are tried."""
    best, fewest = -1, 10
    for cell in CELLS:
        if not grid[cell]:
            count = free[cell].bit_count()
            if count < fewest:
                best, fewest = cell, count
                if count <= 1:
                    break
    if best < 0:
        return True
    digits = [d for d in range(1, 10) if free[best] >> d & 1]
    if order:
        order(digits)
    for digit in digits:
        bit = 1 << digit
        changed = [peer for peer in PEERS[best] if not grid[peer] and free[peer] & bit]
        grid[best] = digit
        for peer in changed:
            free[peer] ^= bit
        if search(grid, free, order):
            return True
        for peer in changed:
            free[peer] |= bit
        grid[best] = 0
    return False


def solution(generator: random.Random) -> list[int]:
    """A random solution: three random boxes on the diagonal, the rest by search with random digits."""
    grid = [0] * 81
    for box in (0, 4, 8):
        for cell, digit in zip(UNITS[18 + box], generator.sample(range(1, 10), 9), strict=True):
            grid[cell] = digit
    search(grid, candidates(grid), generator.shuffle)
    return grid


def is_forced(free: list[int], cell: int, digit: int) -> bool:
    """Whether ``digit`` is the only one for ``cell``, or ``cell`` the only place for it in a row, column or box."""
    bit = 1 << digit
    if free[cell] == bit:
        return True
    return any(all(other == cell or not free[other] & bit for other in unit) for unit in UNITS_OF[cell])


def puzzle(solved: list[int], clues: int, generator: random.Random) -> list[int]:
    """A puzzle with that solution and at least ``clues`` clues: fewer cannot be reached in every order."""
    grid, left = list(solved), 81
    for cell in generator.sample(CELLS, 81):
        if left == clues:
            break
        digit, grid[cell] = grid[cell], 0
        free = candidates(grid)
        # A forced digit settles it without a search.
        if not is_forced(free, cell, digit) and has_other(grid, free, cell, digit):
            grid[cell] = digit
        else:
            left -= 1
    return grid


def has_other(grid: list[int], free: list[int], cell: int, digit: int) -> bool:
    """Whether a solution has another digit than ``digit`` in ``cell``."""
    for other in range(1, 10):
        if other != digit and free[cell] >> other & 1:
            trial = list(grid)
            trial[cell] = other
            if search(trial, candidates(trial)):
                return True
    return False


def class_of(solved: np.ndarray) -> int:
    """A number that is the same for all symmetric forms of a solution [81]."""
    grid = solved.reshape(9, 9) - 1

    def cycles(a: np.ndarray, b: np.ndarray) -> tuple[int, ...]:
        """Cycle lengths of the permutation that takes the digits of line a to those of line b."""
        to = np.empty(9, dtype=int)
        to[a] = b
        lengths, seen = [], set()
        for start in range(9):
            length, digit = 0, start
            while digit not in seen:
                seen.add(digit)
                digit, length = to[digit], length + 1
            if length:
                lengths.append(length)
        return tuple(sorted(lengths))

    def lines(rows: np.ndarray) -> tuple[object, ...]:
        near = sorted(cycles(rows[i], rows[j]) for i in range(9) for j in range(i) if i // 3 == j // 3)
        far = sorted(cycles(rows[i], rows[j]) for i in range(9) for j in range(i) if i // 3 != j // 3)
        return tuple(near), tuple(far)

    both = sorted([repr(lines(grid)), repr(lines(grid.T))])
    return int.from_bytes(hashlib.sha256("".join(both).encode()).digest()[:8], "big")


def is_test(solved: np.ndarray) -> bool:
    return class_of(solved) % TEST_SHARE == 0


def _one(key: tuple[int, int], test: bool, fewest: int, most: int) -> tuple[list[int], list[int]]:
    generator = random.Random(f"{key[0]}-{key[1]}-{test}")
    solved = solution(generator)
    while is_test(np.array(solved)) != test:
        solved = solution(generator)
    return puzzle(solved, generator.randint(fewest, most), generator), solved


def make(count: int, seed: int, test: bool, clues: tuple[int, int], done: Callable[[], None]) -> np.ndarray:
    """Puzzles and their solutions, digits with 0 for an empty cell: uint8 [count, 2, 81]."""
    made = []
    with Pool() as pool:
        work = partial(_one, test=test, fewest=clues[0], most=clues[1])
        for pair in pool.imap(work, ((seed, i) for i in range(count)), chunksize=16):
            made.append(pair)
            done()
    return np.array(made, dtype=np.uint8)


def symmetric(pairs: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The pairs [N, 2, 81] after random exchanges of digits, bands, rows, stacks, columns, and of rows with columns."""
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
