"""The solving loop: rows of many puzzles step together, leave, and are replaced."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from trmfast.solving.evaluator import Evaluator, Step
from trmfast.solving.halting import Confident, Halting, Unchanged
from trmfast.solving.noise import gaussian
from trmfast.solving.puzzle import Puzzle, Result

__all__ = ["Row", "Search", "choice", "run"]


@dataclass(frozen=True)
class Search:
    """The settings of a :class:`trmfast.solving.Solver` that the loop reads."""

    evaluator: Evaluator
    halt: Halting
    batch_size: int
    trajectories: int
    noise: float
    choose: str
    seed: int
    history: bool
    on_step: Callable[[Row], None] | None


@dataclass
class Row:
    """An active trajectory.

    Attributes:
        index: position of its puzzle in the stream.
        trajectory: its number.
        steps: supervision steps taken.
        prediction: token ids after the last of them, int32 [S].
        q_halt: the Q head's logit after it; None without a Q head.
        halted: whether the halting rule has ended it.
        history: the predictions of all steps, if they are kept.
    """

    index: int
    trajectory: int
    steps: int = 0
    prediction: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    q_halt: float | None = None
    halted: bool = False
    history: list[np.ndarray] = field(default_factory=list)
    unchanged: int = 0

    @property
    def confidence(self) -> float | None:
        """The sigmoid of ``q_halt``."""
        return None if self.q_halt is None else _sigmoid(self.q_halt)


@dataclass
class _Job:
    """An active puzzle."""

    index: int
    puzzle: Puzzle
    waiting: int  # of trajectories not yet started
    first: int | None = None  # fewest steps after which a trajectory has halted, where the first to halt answers
    running: int = 0
    finished: list[Row] = field(default_factory=list)


def run(search: Search, puzzles: Iterator[Puzzle], in_order: bool) -> Iterator[Result]:
    """The results of a stream of checked puzzles.

    Raises:
        ValueError: the stream is empty.  What the stream raises is raised after the results of all puzzles before it.
    """
    batch, source = search.evaluator.new_batch(), _Source(search, puzzles)
    rows: list[tuple[_Job, Row]] = []
    keep: list[int] = []  # where the rows lie in the batch, which has `width` of them
    width = 0
    held: dict[int, Result] = {}
    following = 0
    while True:
        new = source.take(search.batch_size - len(rows))
        if new or len(keep) < width:
            inputs = np.array([job.puzzle.inputs for job, _ in new], dtype=np.int32)
            identifiers = np.array([job.puzzle.identifier for job, _ in new], dtype=np.int32)
            batch.update(keep, inputs.reshape(len(new), search.evaluator.seq_len), identifiers)
            rows += new
        width = len(rows)
        if not rows:
            break
        _record(search, rows, batch.step(_noise(search, rows)))
        keep = [i for i, (job, row) in enumerate(rows) if not _leaves(job, row)]
        for i in sorted({*range(width)}.difference(keep)):
            job, row = rows[i]
            job.running -= 1
            job.finished.append(row)
            if job.running or job.waiting:
                continue
            result = _result(search, job)
            if not in_order:
                yield result
                continue
            held[job.index] = result
            while following in held:
                yield held.pop(following)
                following += 1
        rows = [rows[i] for i in keep]
    if source.failure is not None:
        raise source.failure
    if not source.count:
        raise ValueError("puzzles: got an empty stream, accepted are streams of at least one puzzle")


class _Source:
    """Hands out trajectories, puzzle by puzzle; reads the stream when it needs one."""

    def __init__(self, search: Search, puzzles: Iterator[Puzzle]) -> None:
        self.search, self.puzzles = search, puzzles
        self.job: _Job | None = None
        self.count = 0
        self.ended = False
        self.failure: Exception | None = None

    def take(self, count: int) -> list[tuple[_Job, Row]]:
        new: list[tuple[_Job, Row]] = []
        while len(new) < count:
            if self.job is None or not self.job.waiting:
                self.job = self._next()
                if self.job is None:
                    break
            job = self.job
            new.append((job, Row(job.index, self.search.trajectories - job.waiting)))
            job.waiting -= 1
            job.running += 1
        return new

    def _next(self) -> _Job | None:
        if self.ended:
            return None
        try:
            puzzle = next(self.puzzles, None)
        except Exception as error:  # run() raises it after the puzzles before it are solved
            self.failure, puzzle = error, None
        if puzzle is None:
            self.ended = True
            return None
        self.count += 1
        return _Job(self.count - 1, puzzle, self.search.trajectories)


def _noise(search: Search, rows: list[tuple[_Job, Row]]) -> np.ndarray | None:
    if not search.noise:
        return None
    noise = np.empty((len(rows), *search.evaluator.noise_shape), dtype=np.float32)
    for i, (_, row) in enumerate(rows):
        noise[i] = gaussian(search.seed, row.index, row.trajectory, row.steps, noise.shape[1:], search.noise)
    return noise


def _record(search: Search, rows: list[tuple[_Job, Row]], step: Step) -> None:
    """Records a step in its rows, and which of them the halting rule ends."""
    for i, (job, row) in enumerate(rows):
        prediction = step.predictions[i]
        same = row.steps > 0 and np.array_equal(prediction, row.prediction)
        row.unchanged = row.unchanged + 1 if same else 0
        row.prediction = prediction
        row.steps += 1
        if step.q_halt is not None:
            row.q_halt = float(step.q_halt[i])
        if search.history:
            row.history.append(prediction)
        assert job.puzzle.min_steps is not None
        if row.steps >= job.puzzle.min_steps:
            if isinstance(search.halt, Confident):
                assert step.margin is not None
                row.halted = bool(step.margin[i] > search.halt.threshold)
            elif isinstance(search.halt, Unchanged):
                row.halted = row.unchanged >= search.halt.steps
        if row.halted and search.choose == "first":
            job.first = min(row.steps, job.first or row.steps)
        if search.on_step is not None:
            search.on_step(row)


def _leaves(job: _Job, row: Row) -> bool:
    """Whether a row has halted, has taken the most steps, or can no longer be the first of its puzzle to halt.

    The last depends on steps alone, not on when a row got its place, so that the batch size changes no result.
    """
    assert job.puzzle.max_steps is not None
    return row.halted or row.steps >= min(job.puzzle.max_steps, job.first or job.puzzle.max_steps)


def choice(choose: str, rows: list[Row], first: int | None) -> Row:
    """The trajectory that answers.

    Args:
        choose: as in :class:`trmfast.solving.Solver`.
        rows: all trajectories of a puzzle, finished, in order.
        first: for ``"first"`` the fewest steps after which one has halted; None if none has, and for the other rules.
    """
    if first is not None:
        rows = [row for row in rows if row.halted and row.steps == first]
    elif choose == "majority":
        votes = Counter(row.prediction.tobytes() for row in rows)
        most = max(votes.values())
        rows = [row for row in rows if votes[row.prediction.tobytes()] == most]
    return max(rows, key=lambda row: -math.inf if row.q_halt is None or math.isnan(row.q_halt) else row.q_halt)


def _result(search: Search, job: _Job) -> Result:
    rows = sorted(job.finished, key=lambda row: row.trajectory)
    total = sum(min(row.steps, job.first or row.steps) for row in rows)
    best = choice(search.choose, rows, job.first)
    history = np.stack(best.history) if search.history else None
    return Result(
        index=job.index,
        prediction=best.prediction,
        steps=best.steps,
        confidence=best.confidence,
        q_halt=best.q_halt,
        halted=best.halted,
        trajectory=best.trajectory,
        total_steps=total,
        history=history,
    )


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))
