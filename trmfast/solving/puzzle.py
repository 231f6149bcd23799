"""The input and output of a solver."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from trmfast.solving.checks import integer
from trmfast.solving.evaluator import Evaluator

__all__ = ["MOST_STEPS", "Puzzle", "Result", "checked", "puzzles_in"]

MOST_STEPS = 1024


@dataclass(frozen=True)
class Puzzle:
    """One puzzle.

    Attributes:
        inputs: token ids, integers [S]: an array, a tensor or a list.
        identifier: row of the puzzle embedding, if the model has one.
        min_steps, max_steps: supervision steps of this puzzle, 1 to 1,024; by default those of the solver.
    """

    inputs: Any
    identifier: int = 0
    min_steps: int | None = None
    max_steps: int | None = None


@dataclass(frozen=True)
class Result:
    """The answer to one puzzle.

    Attributes:
        index: position of the puzzle in the stream, from 0.
        prediction: token ids, int32 [S].
        steps: supervision steps of the trajectory that gave the prediction.
        confidence: the sigmoid of ``q_halt``; None without a Q head.
        q_halt: the Q head's logit; None without a Q head.
        halted: whether the halting rule ended that trajectory, rather than ``max_steps``.
        trajectory: which of the trajectories it is.
        total_steps: supervision steps of all trajectories together; where the first to halt answers, up to its last.
        history: that trajectory's prediction after every step, int32 [steps, S]; None unless asked for.
    """

    index: int
    prediction: np.ndarray
    steps: int
    confidence: float | None
    q_halt: float | None
    halted: bool
    trajectory: int
    total_steps: int
    history: np.ndarray | None


def puzzles_in(puzzles: Any) -> Iterator[Puzzle]:
    """The puzzles of an array, a batch of a data loader or an iterable.

    Raises:
        TypeError: something else.
        ValueError: an array that is not [N, S], or a batch without inputs.
    """
    if isinstance(puzzles, Mapping):
        if "inputs" not in puzzles:
            raise ValueError(f"puzzles: got no inputs among {', '.join(map(str, puzzles))}, required is inputs")
        rows = _array(puzzles["inputs"])
        given = puzzles.get("puzzle_identifiers")
        identifiers = np.zeros(len(rows), dtype=np.int64) if given is None else _array(given)
        if rows.ndim != 2 or identifiers.shape != rows.shape[:1]:
            got = f"{list(rows.shape)} and {list(identifiers.shape)}"
            raise ValueError(f"puzzles: got inputs and puzzle_identifiers of shapes {got}, accepted are [N, S] and [N]")
        return (Puzzle(row, int(identifier)) for row, identifier in zip(rows, identifiers, strict=True))
    if hasattr(puzzles, "shape"):
        rows = _array(puzzles)
        if rows.ndim != 2:
            raise ValueError(f"puzzles: got shape {list(rows.shape)}, accepted are [N, S], N puzzles of S tokens")
        return (Puzzle(row) for row in rows)
    if isinstance(puzzles, (str, bytes, Puzzle)) or not isinstance(puzzles, Iterable):
        accepted = "arrays [N, S], batches with inputs, and iterables of puzzles"
        raise TypeError(f"puzzles: got {type(puzzles).__name__}, accepted are {accepted}")
    return (item if isinstance(item, Puzzle) else Puzzle(item) for item in puzzles)


def checked(index: int, puzzle: Puzzle, evaluator: Evaluator, min_steps: int, max_steps: int) -> Puzzle:
    """The puzzle with int32 inputs and all its fields filled in.

    Raises:
        TypeError, ValueError: one line that names the puzzle and its fault.
    """
    name = f"puzzles[{index}]"
    inputs = _array(puzzle.inputs)
    if inputs.dtype.kind not in "iu":
        raise ValueError(f"{name}: got {inputs.dtype} tokens, accepted are integers")
    if inputs.shape != (evaluator.seq_len,):
        raise ValueError(f"{name}: got shape {list(inputs.shape)}, accepted is [{evaluator.seq_len}]")
    wrong = (inputs < 0) | (inputs >= evaluator.vocab_size)
    if wrong.any():
        accepted = f"0 to {evaluator.vocab_size - 1}"
        raise ValueError(f"{name}: got token {inputs[wrong.argmax()]} at {wrong.argmax()}, accepted are {accepted}")
    rows = evaluator.num_identifiers
    if rows:
        integer(f"{name}.identifier", puzzle.identifier, 0, rows - 1)
    most = max_steps if puzzle.max_steps is None else integer(f"{name}.max_steps", puzzle.max_steps, 1, MOST_STEPS)
    least = (
        min(min_steps, most) if puzzle.min_steps is None else integer(f"{name}.min_steps", puzzle.min_steps, 1, most)
    )
    return Puzzle(inputs.astype(np.int32), int(puzzle.identifier), least, most)


def _array(value: Any) -> np.ndarray:
    # A tensor on a device must be copied to the host first.
    return np.asarray(value.cpu() if hasattr(value, "cpu") else value)
