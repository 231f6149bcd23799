"""``trmfast bench --suite solve``: Sudoku puzzles solved by a trained model, each way in a process of its own."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from trmfast.benchmark.configs import CONFIGS
from trmfast.benchmark.turns import MOST_ROUNDS, Turns, quartiles
from trmfast.checkpoint import save
from trmfast.solving.schedule import Row, choice
from trmfast.sudoku_puzzles import sudoku_puzzle

__all__ = [
    "SearchRow",
    "SolveRow",
    "Task",
    "Width",
    "measure_search",
    "measure_solving",
    "measure_widths",
    "puzzles_of",
]

FEWEST = 2  # rounds; all puzzles have been solved once before
CHUNK = 2  # puzzles whose trajectories run before the next sigma has its turn
TRAJECTORIES = (1, 4, 16, 64)
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}


@dataclass(frozen=True)
class Task:
    """What is measured.

    Attributes:
        model: file or name of the model.
        batch: rows that step together; threads: of every rival.
        threshold: above which a row's logit halts it.
        sigmas: noise of the trajectories; the first is that of the row among the others.
        seconds: time to aim at.
        compiled: whether torch.compile runs, which takes a minute to compile.
        tiny: width 32 in place of 512, for tests.
    """

    model: str
    batch: int
    threads: int
    threshold: float
    sigmas: tuple[float, ...]
    seconds: float
    compiled: bool = True
    tiny: bool = False

    def setup(self, kind: str, **more: Any) -> dict[str, Any]:
        """What a worker gets."""
        common = {"model": self.model, "batch": self.batch, "threads": self.threads, "threshold": self.threshold}
        return {"kind": kind, **common, **more}


@dataclass(frozen=True)
class SolveRow:
    """One way to solve the puzzles.

    Attributes:
        name: its key; title: what tables call it.
        seconds: median over the rounds, for all puzzles; low, high: quartiles; times: of every round.
        puzzles: how many; puzzles_per_second.
        p50, p99: seconds from the entry of a puzzle into the batch to its answer, over all puzzles.
        exact: share of the puzzles solved.
        steps: supervision steps computed for a puzzle, mean.
        peak: resident memory of its process at most, bytes.
        ratio: puzzles/s over those of eager PyTorch.
    """

    name: str
    title: str
    seconds: float
    low: float
    high: float
    times: tuple[float, ...]
    puzzles: int
    puzzles_per_second: float
    p50: float
    p99: float
    exact: float
    steps: float
    peak: int
    ratio: float


@dataclass(frozen=True)
class Width:
    """A supervision step of a published model with random weights in one dtype: seconds, quartiles, times, and how many
    times as fast as bfloat16."""

    model: str
    dtype: str
    batch: int
    seconds: float
    low: float
    high: float
    times: tuple[float, ...]
    ratio: float


@dataclass(frozen=True)
class SearchRow:
    """K noisy trajectories.

    Attributes:
        sigma: of the noise; 0 for one trajectory without noise.
        trajectories: K.
        puzzles: how many.
        exact: share solved by the trajectory that halts first; exact_q: by the one of the highest logit after all have
            halted; exact_majority: by the most frequent answer; exact_any: by any of them.
        steps: supervision steps of all trajectories of a puzzle where the first to halt answers, mean.
        puzzles_per_second: the steps a second of the run over these.
    """

    sigma: float
    trajectories: int
    puzzles: int
    exact: float
    exact_q: float
    exact_majority: float
    exact_any: float
    steps: float
    puzzles_per_second: float


def puzzles_of(count: int, clues: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Token ids of puzzles and of their only solutions, int32 [count, 2, 81], with clues drawn from a range."""
    generator = random.Random(f"bench-{seed}")
    return np.array([sudoku_puzzle(generator, generator.randint(*clues)) for _ in range(count)], dtype=np.int32) + 1


# ---------------------------------------------------------------- processes


class Worker:
    """A process of :mod:`trmfast.benchmark.solve_worker`.

    Attributes:
        absent: why it does not run here, None if it does.
        answers: of its last run.
    """

    def __init__(self, setup: dict[str, Any]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(setup["threads"])}
        command = [sys.executable, "-m", "trmfast.benchmark.solve_worker"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, **pipes, text=True, env=environment)
        self.absent: str | None = self._ask(setup).get("absent")
        self.answers: dict[str, Any] = {}
        self.peak = 0

    def solve(self, tokens: np.ndarray) -> None:
        """Solves puzzles, token ids [N, S]."""
        self.answers = self._ask(tokens.tolist())
        self.peak = self.answers.pop("peak")

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self.process.wait()

    def _ask(self, record: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(record) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"trmfast.benchmark.solve_worker ended with status {self.process.wait()}")
        return json.loads(line)


@contextmanager
def _workers(setups: dict[str, dict[str, Any]], say: Callable[[str], None]) -> Iterator[dict[str, Worker]]:
    with ExitStack() as stack:
        workers = {}
        for name, setup in setups.items():
            say(f"{name}: start")
            workers[name] = Worker(setup)
            stack.callback(workers[name].close)
        yield workers


def _rounds(turns: Turns, seconds: float, say: Callable[[str], None]) -> None:
    """At least two rounds, and as many as fit into the seconds."""
    stop, longest = time.monotonic() + seconds, 0.0
    for number in range(MOST_ROUNDS):
        start = time.monotonic()
        if number >= FEWEST and start + longest > stop:
            break
        say(f"round {number + 1}")
        turns.round()
        longest = max(longest, time.monotonic() - start)


# ---------------------------------------------------------------- ways to solve


def measure_solving(
    task: Task, pairs: np.ndarray, steps: int, seconds: float, say: Callable[[str], None]
) -> tuple[list[SolveRow], list[str]]:
    """Every way in turns, and a remark for each that does not run here.

    Args:
        task: what is measured.
        pairs: token ids of puzzles and solutions [N, 2, 81].
        steps: of the published evaluation.
        seconds: for the rounds; there are at least two.
        say: is called with what is being done.
    """
    search = {"trajectories": 4, "noise": task.sigmas[0]}
    titles: dict[str, tuple[str, dict[str, Any]]] = {
        "eager": (f"PyTorch eager, {steps} steps", task.setup("eager")),
        "compile": (f"torch.compile, {steps} steps", task.setup("compile")),
        "fixed": (f"trmfast, {steps} steps", task.setup("fixed")),
        "waiting": ("trmfast, halting; the batch waits for its last row", task.setup("waiting")),
        "leaving": ("trmfast, halting; rows leave, none enter", task.setup("leaving")),
        "continuous": ("trmfast, halting, continuous batching", task.setup("continuous")),
        "int8": ("the same in int8", task.setup("continuous", dtype="int8")),
        "trajectories": (f"the same, 4 trajectories, sigma {task.sigmas[0]:g}", task.setup("continuous", **search)),
    }
    if not task.compiled:
        del titles["compile"]
    inputs = pairs[:, 0]
    with _workers({name: setup for name, (_, setup) in titles.items()}, say) as workers:
        remarks = [f"{titles[n][0]}: not available, {w.absent}" for n, w in workers.items() if w.absent is not None]
        present = {name: worker for name, worker in workers.items() if worker.absent is None}
        say("first batches")
        for worker in present.values():
            worker.solve(inputs[: task.batch])
        start = time.monotonic()
        turns = Turns({name: partial(worker.solve, inputs) for name, worker in present.items()}, torch.float32)
        _rounds(turns, seconds - (time.monotonic() - start), say)
        rows = []
        for name, worker in present.items():
            times = turns.timing.times[name]
            latencies = worker.answers["latencies"]
            right = (np.array(worker.answers["predictions"]) == pairs[:, 1]).all(-1)
            rows.append(
                SolveRow(
                    name=name,
                    title=titles[name][0],
                    seconds=median(times),
                    low=quartiles(times)[0],
                    high=quartiles(times)[1],
                    times=tuple(times),
                    puzzles=len(pairs),
                    puzzles_per_second=len(pairs) / median(times),
                    p50=float(np.quantile(latencies, 0.5)),
                    p99=float(np.quantile(latencies, 0.99)),
                    exact=float(right.mean()),
                    steps=float(np.mean(worker.answers["steps"])),
                    peak=worker.peak,
                    ratio=median(a / b for a, b in zip(turns.timing.times["eager"], times, strict=True)),
                )
            )
    return rows, remarks


def measure_widths(task: Task, seconds: float, say: Callable[[str], None]) -> tuple[list[Width], list[str]]:
    """Supervision steps of the published Sudoku models with random weights, in every dtype."""
    rows, remarks = [], []
    overrides = {"hidden_size": 32, "num_heads": 2, "puzzle_emb_ndim": 32} if task.tiny else {}
    for name in ("sudoku-mlp",) if task.tiny else ("sudoku", "sudoku-mlp"):
        config = CONFIGS[name]
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            file = Path(folder) / "model.safetensors"
            save(config.model(config.batch, True, overrides), file)
            setup = replace(task, model=str(file), batch=config.batch)
            setups = {name: setup.setup("steps", dtype=dtype) for name, dtype in DTYPES.items()}
            with _workers(setups, say) as workers:
                absent = {name: worker.absent for name, worker in workers.items() if worker.absent is not None}
                remarks += [f"{config.title}, {name}: not available, {reason}" for name, reason in absent.items()]
                none = np.empty((0, 0), dtype=np.int32)
                runs: dict[str, Callable[[], object]] = {
                    name: partial(worker.solve, none) for name, worker in workers.items() if name not in absent
                }
                for run in runs.values():
                    run()
                turns = Turns(runs, torch.float32)
                _rounds(turns, seconds / 2, say)
            times = turns.timing.times
            rows += [
                Width(
                    f"{config.title}, D={overrides.get('hidden_size', 512)}",
                    name,
                    config.batch,
                    median(times[name]),
                    *quartiles(times[name]),
                    tuple(times[name]),
                    median(a / b for a, b in zip(times["bf16"], times[name], strict=True)),
                )
                for name in runs
            ]
    return rows, remarks


# ---------------------------------------------------------------- trajectories


def measure_search(task: Task, pairs: np.ndarray, say: Callable[[str], None]) -> list[SearchRow]:
    """What 1, 4, 16 and 64 trajectories solve, and cost, for every sigma.

    Noise depends on puzzle, trajectory and step alone, so the first of 64 trajectories are those of a smaller K: one
    run, in which all take their steps until they halt, tells all of them.  The sigmas take turns, a few puzzles each,
    until the time is over.
    """
    most = TRAJECTORIES[-1]
    setups = {"one": task.setup("search", trajectories=1, noise=0.0)}
    setups |= {f"{sigma:g}": task.setup("search", trajectories=most, noise=sigma) for sigma in task.sigmas}
    found: dict[str, list[list[Row]]] = {name: [] for name in setups}
    spent = dict.fromkeys(setups, 0.0)
    stop = time.monotonic() + task.seconds
    with _workers(setups, say) as workers:
        for at in range(0, len(pairs), CHUNK):
            for name, worker in workers.items():
                say(f"puzzles from {at}, sigma {name}")
                start = time.monotonic()
                worker.solve(pairs[at : at + CHUNK, 0])
                spent[name] += time.monotonic() - start
                found[name] += [_rows(at + i, rows) for i, rows in enumerate(worker.answers["rows"])]
            if time.monotonic() > stop:
                break
    rows = []
    for name, puzzles in found.items():
        speed = sum(row.steps for group in puzzles for row in group) / spent[name]
        sigma = 0.0 if name == "one" else float(name)
        for count in TRAJECTORIES if sigma else (1,):
            rows.append(search_row(sigma, [group[:count] for group in puzzles], pairs[:, 1], speed))
    return rows


def _rows(index: int, records: list[Any]) -> list[Row]:
    return [
        Row(index, i, steps, np.array(prediction, dtype=np.int32), q_halt, halted)
        for i, (prediction, q_halt, steps, halted) in enumerate(records)
    ]


def search_row(sigma: float, puzzles: list[list[Row]], solutions: np.ndarray, speed: float) -> SearchRow:
    """One line: the trajectories of each puzzle, its solution, and how many steps a second there were."""
    right: dict[str, list[bool]] = {"first": [], "q": [], "majority": [], "any": []}
    steps = []
    for rows, solution in zip(puzzles, solutions, strict=False):
        first = min((row.steps for row in rows if row.halted), default=None)
        steps.append(sum(min(row.steps, first or row.steps) for row in rows))
        for choose in ("first", "q", "majority"):
            answer = choice(choose, rows, first if choose == "first" else None)
            right[choose].append(np.array_equal(answer.prediction, solution))
        right["any"].append(any(np.array_equal(row.prediction, solution) for row in rows))
    share = {name: float(np.mean(values)) for name, values in right.items()}
    return SearchRow(
        sigma=sigma,
        trajectories=len(puzzles[0]),
        puzzles=len(puzzles),
        exact=share["first"],
        exact_q=share["q"],
        exact_majority=share["majority"],
        exact_any=share["any"],
        steps=float(np.mean(steps)),
        puzzles_per_second=speed / float(np.mean(steps)),
    )
