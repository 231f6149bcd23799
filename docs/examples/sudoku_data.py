"""Puzzles for train_sudoku.py, made in parallel, with whole solution classes on one side of the split."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from multiprocessing import Pool

import numpy as np

from trmfast.sudoku_puzzles import random_solution, solution_class, sudoku_puzzle

TEST_SHARE = 16  # one solution class in 16 is for tests


def make(count: int, seed: int, test: bool, clues: tuple[int, int], done: Callable[[], None]) -> np.ndarray:
    """Puzzles and solutions, digits with 0 for an empty cell, uint8 [count, 2, 81].

    Args:
        count: how many.
        seed: of the puzzles; the same seed gives the same puzzles.
        test: which side of the split.
        clues: fewest and most; each puzzle draws from between.  Where that few cannot be reached, it has a few more.
        done: called after each puzzle.
    """
    made = []
    with Pool() as pool:
        work = partial(_one, test=test, clues=clues)
        for pair in pool.imap(work, ((seed, i) for i in range(count)), chunksize=16):
            made.append(pair)
            done()
    return np.array(made, dtype=np.uint8)


def _one(key: tuple[int, int], test: bool, clues: tuple[int, int]) -> tuple[list[int], list[int]]:
    generator = random.Random(f"{key[0]}-{key[1]}-{test}")
    solution = random_solution(generator)
    while (solution_class(solution) % TEST_SHARE == 0) != test:
        solution = random_solution(generator)
    return sudoku_puzzle(generator, generator.randint(*clues), solution)
