"""The solver: puzzles in, answers out, each with as many supervision steps as it needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from trmfast.solving.checks import integer, number
from trmfast.solving.evaluator import Evaluator
from trmfast.solving.halting import Confident, Halting, Never, Unchanged
from trmfast.solving.puzzle import MOST_STEPS, Result, checked, puzzles_in
from trmfast.solving.schedule import Row, Search, run

__all__ = ["CHOICES", "Solver"]

CHOICES = ("first", "q", "majority")


class Solver:
    """Solves puzzles with a trained model.

    Puzzles share a batch.  A row that has halted leaves, and the next puzzle takes its place before the next
    supervision step, so that no row waits for a slower one.  The result of a puzzle depends on the puzzle
    alone, never on the batch around it.

    With ``trajectories`` above 1 each puzzle is a group of rows, and each row gets its own noise added to its latent
    before each supervision step (PTRM, arXiv 2605.19943): ``z + noise * e`` with standard normal ``e``, where z is
    every state that the heads do not read (z_L), or the only state.  States have a root mean square of 1, so ``noise``
    is relative to them.

    Args:
        model: a model of ``trmfast.models``, one after :func:`trmfast.accelerate`, one of :mod:`trmfast.runtime`, or
            another :class:`Evaluator`.
        halt: when a row halts: :class:`Confident`, :class:`Unchanged` or :class:`Never`.
        min_steps, max_steps: fewest and most supervision steps of a puzzle, 1 to 1,024; by default at most the model's
            ``halt_max_steps``.
        batch_size: rows that step together.
        trajectories: rows K of one puzzle.
        noise: standard deviation sigma of the noise; must be above 0 if there are several trajectories.
        choose: which trajectory answers.  ``"first"``: the one that halts after the fewest steps, whereupon the others
            leave; among equals, and if none halts, the one with the highest ``q_halt``.  ``"q"``: all run until they
            halt, the highest ``q_halt`` answers.  ``"majority"``: the most frequent prediction of all.
        seed: of the noise.
        history: whether results include the prediction of every step.
        dtype: ``"int8"`` for int8 operands and bfloat16 states in the recursion of a PyTorch model; by default the
            model's own.  A model of :mod:`trmfast.runtime` was loaded in its dtype.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, or a Q head is needed and the model has none.
    """

    def __init__(
        self,
        model: Any,
        *,
        halt: Halting = Confident(),  # noqa: B008 (frozen)
        min_steps: int = 1,
        max_steps: int | None = None,
        batch_size: int = 32,
        trajectories: int = 1,
        noise: float = 0.0,
        choose: str = "first",
        seed: int = 0,
        history: bool = False,
        dtype: str | None = None,
    ) -> None:
        self.evaluator = _evaluator(model, dtype)
        if not isinstance(halt, (Confident, Unchanged, Never)):
            raise TypeError(f"halt: got {halt!r}, accepted are Confident, Unchanged and Never")
        most = self.evaluator.halt_max_steps if max_steps is None else max_steps
        self.max_steps = integer("max_steps", most, 1, MOST_STEPS)
        self.min_steps = integer("min_steps", min_steps, 1, self.max_steps)
        self.batch_size = integer("batch_size", batch_size, 1)
        self.trajectories = integer("trajectories", trajectories, 1)
        self.noise = _noise(noise, self.trajectories)
        if choose not in CHOICES:
            raise ValueError(f"choose: got {choose!r}, accepted are {', '.join(CHOICES)}")
        self.halt, self.choose, self.history = halt, choose, history
        self.seed = integer("seed", seed, 0, (1 << 63) - 1)
        if not self.evaluator.has_q_head:
            if isinstance(halt, Confident):
                raise ValueError(f"halt: got {halt}, the model has no Q head; accepted are Unchanged and Never")
            if self.trajectories > 1 and choose != "majority":
                raise ValueError(f"choose: got {choose!r}, the model has no Q head; accepted is majority")

    def solve(
        self, puzzles: Any, *, in_order: bool = True, on_step: Callable[[Row], None] | None = None
    ) -> Iterator[Result]:
        """Solves a stream of puzzles.

        Args:
            puzzles: token ids [N, S], an array or a tensor; a batch with ``inputs`` [N, S] and perhaps
                ``puzzle_identifiers`` [N]; or an iterable of [S] arrays and :class:`Puzzle`, which may be endless: it
                is read as rows become free.
            in_order: whether results come in the order of the puzzles; otherwise as they finish.
            on_step: is called after every supervision step of every row with that row.

        Yields:
            One :class:`Result` per puzzle.

        Raises:
            TypeError, ValueError: a puzzle that the model rejects, or an empty stream.  An error in the stream is
                raised after the results of all puzzles before it.
        """
        stream = puzzles_in(puzzles)
        search = Search(
            self.evaluator,
            self.halt,
            self.batch_size,
            self.trajectories,
            self.noise,
            self.choose,
            self.seed,
            self.history,
            on_step,
        )
        complete = (
            checked(index, puzzle, self.evaluator, self.min_steps, self.max_steps)
            for index, puzzle in enumerate(stream)
        )
        return run(search, complete, in_order)


def _evaluator(model: Any, dtype: str | None) -> Evaluator:
    if isinstance(model, Evaluator):
        own = getattr(model, "dtype", None)
        if dtype not in (None, own):
            raise ValueError(f"dtype: got {dtype!r}, accepted is None: the model has its own, {own}")
        return model
    from trmfast.solving.torch_model import TorchEvaluator

    return TorchEvaluator(model, dtype)


def _noise(noise: Any, trajectories: int) -> float:
    accepted = "numbers >= 0"
    noise = number("noise", noise, accepted)
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise: got {noise:g}, accepted are {accepted}")
    if trajectories > 1 and noise == 0:
        raise ValueError(f"noise: got 0 with {trajectories} trajectories, which would be equal; accepted are above 0")
    return noise
