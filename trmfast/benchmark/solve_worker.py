"""One way to solve puzzles, in a process of its own, for ``trmfast bench --suite solve``.

Reads one object of JSON a line from standard input, first what to set up, and answers each with one on standard output.
PyTorch is imported only by those that need it, so that resident memory is that of the rival.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trmfast.solving import Confident, Halting, Never, Solver
from trmfast.solving.schedule import Row

__all__ = ["Answers", "main"]

Answers = dict[str, list[Any]]
"""For each puzzle its ``"predictions"``, the ``"steps"`` computed for it, and its ``"latencies"``, the seconds from its
entry into the batch to its answer."""


# ---------------------------------------------------------------- PyTorch without trmfast's recursion


def _published(setup: dict[str, Any]) -> Callable[[np.ndarray], Answers]:
    """The published evaluation: every batch takes all its supervision steps."""
    import torch

    import trmfast
    from trmfast.benchmark.eager import EagerHRM, EagerTRM

    torch.set_num_threads(setup["threads"])
    found: Any = trmfast.load(setup["model"])
    model = getattr(found, "model", found)
    kinds = {"TRM": EagerTRM, "HRM": EagerHRM}
    kind = type(model).__name__
    if kind not in kinds:
        raise ValueError(f"{kind} is written in eager PyTorch nowhere, accepted are {', '.join(kinds)}")
    eager: Any = kinds[kind]({**vars(model.config), "batch_size": setup["batch"]}).eval()
    eager.load_state_dict(model.state_dict())
    if setup["kind"] == "compile":
        eager.inner.stacks.compile("network")

    @torch.inference_mode()
    def solve(tokens: np.ndarray) -> Answers:
        predictions: list[Any] = []
        latencies: list[float] = []
        batch = setup["batch"]
        for at in range(0, len(tokens), batch):
            start = time.perf_counter()
            rows = tokens[at : at + batch]
            # The last batch is filled up, as a compiler wants one shape.
            inputs = torch.from_numpy(np.resize(rows, (batch, rows.shape[1])))
            data = {"inputs": inputs, "puzzle_identifiers": torch.zeros(batch, dtype=torch.int32)}
            carry, ended = eager.initial_carry(data), False
            while not ended:
                carry, outputs = eager(carry=carry, batch=data)
                ended = bool(carry.halted.all())
            predictions += outputs["logits"].argmax(-1)[: len(rows)].tolist()
            latencies += [time.perf_counter() - start] * len(rows)
        return {
            "predictions": predictions,
            "steps": [eager.config.halt_max_steps] * len(tokens),
            "latencies": latencies,
        }

    return solve


# ---------------------------------------------------------------- trmfast without PyTorch


def _solver(setup: dict[str, Any]) -> Callable[[np.ndarray], Answers]:
    from trmfast import runtime

    model = runtime.load(setup["model"], setup.get("dtype"), setup["threads"])
    kind, batch = setup["kind"], setup["batch"]
    if kind == "waiting":
        parts = partial(_waiting, model, setup["threshold"])
        return lambda tokens: _together(parts(tokens[at : at + batch]) for at in range(0, len(tokens), batch))
    halt: Halting = Never() if kind == "fixed" else Confident(setup["threshold"])
    solver = Solver(
        model, halt=halt, batch_size=batch, trajectories=setup.get("trajectories", 1), noise=setup.get("noise", 0.0)
    )
    if kind == "leaving":
        return lambda tokens: _together(_solved(solver, tokens[at : at + batch]) for at in range(0, len(tokens), batch))
    return lambda tokens: _solved(solver, tokens)


def _solved(solver: Solver, tokens: np.ndarray) -> Answers:
    began: dict[int, float] = {}
    ended: dict[int, float] = {}

    def entering() -> Iterator[np.ndarray]:
        for index, row in enumerate(tokens):
            began[index] = time.perf_counter()
            yield row

    def stepped(row: Row) -> None:
        ended[row.index] = time.perf_counter()

    results = list(solver.solve(entering(), on_step=stepped))
    return {
        "predictions": [result.prediction.tolist() for result in results],
        "steps": [result.total_steps for result in results],
        "latencies": [ended[index] - began[index] for index in range(len(results))],
    }


def _waiting(model: Any, threshold: float, tokens: np.ndarray) -> Answers:
    """A batch that runs until its last row has halted; each row keeps the answer that it halted with."""
    start = time.perf_counter()
    batch = model.new_batch()
    batch.update([], tokens, np.zeros(len(tokens), dtype=np.int32))
    answer, halted = np.empty_like(tokens), np.zeros(len(tokens), dtype=bool)
    steps = 0
    while steps < model.halt_max_steps and not halted.all():
        step = batch.step(None)
        steps += 1
        answer[~halted] = step.predictions[~halted]
        halted |= step.margin > threshold
    seconds = time.perf_counter() - start
    count = len(tokens)
    return {"predictions": answer.tolist(), "steps": [steps] * count, "latencies": [seconds] * count}


def _together(parts: Iterator[Answers]) -> Answers:
    whole: Answers = {"predictions": [], "steps": [], "latencies": []}
    for part in parts:
        for name, values in whole.items():
            values += part[name]
    return whole


# ---------------------------------------------------------------- steps alone, and trajectories


def _stepper(setup: dict[str, Any]) -> Callable[[np.ndarray], Answers]:
    """Supervision steps of one batch, however good they are."""
    from trmfast import runtime

    model = runtime.load(setup["model"], setup.get("dtype"), setup["threads"])
    inputs = np.random.default_rng(0).integers(1, 11, (setup["batch"], model.seq_len)).astype(np.int32)
    batch = model.new_batch()
    batch.update([], inputs, np.zeros(len(inputs), dtype=np.int32))

    def step(_: np.ndarray) -> Answers:
        batch.step(None)
        return {}

    return step


def _searcher(setup: dict[str, Any]) -> Callable[[np.ndarray], Answers]:
    """All trajectories of each puzzle until they halt: ``"rows"`` holds, for each puzzle, the prediction, the Q head's
    logit, the steps and whether it halted, of every trajectory."""
    from trmfast import runtime

    model = runtime.load(setup["model"], setup.get("dtype"), setup["threads"])

    def search(tokens: np.ndarray) -> Answers:
        many = {"trajectories": setup["trajectories"], "noise": setup["noise"]} if setup["noise"] else {}
        solver = Solver(model, halt=Confident(setup["threshold"]), batch_size=setup["batch"], choose="q", **many)
        rows: list[list[Any]] = [[None] * setup["trajectories"] for _ in tokens]

        def stepped(row: Row) -> None:
            rows[row.index][row.trajectory] = (row.prediction.tolist(), row.q_halt, row.steps, row.halted)

        for _ in solver.solve(tokens, on_step=stepped):
            pass
        return {"rows": rows}

    return search


# ---------------------------------------------------------------- the process


def _peak() -> int:
    """The most resident memory so far, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    """Serves one rival until standard input ends."""
    # Compilers print; the answers keep the old standard output for themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(record: dict[str, Any]) -> None:
        print(json.dumps(record), file=answers, flush=True)

    setup = json.loads(sys.stdin.readline())
    kinds = {"eager": _published, "compile": _published, "steps": _stepper, "search": _searcher}
    start = time.perf_counter()
    try:
        solve = kinds.get(setup["kind"], _solver)(setup)
    except (RuntimeError, ValueError) as error:
        answer({"absent": " ".join(str(error).split())})
        return
    answer({"seconds": time.perf_counter() - start})
    for line in sys.stdin:
        tokens = np.array(json.loads(line), dtype=np.int32)
        answer({**solve(tokens), "peak": _peak()})


if __name__ == "__main__":
    main()
