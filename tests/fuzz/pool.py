"""Worker processes: if one dies or hangs, its current job has failed, and another continues after it."""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from .worker import Counts, Failure, Job, work

__all__ = ["Outcome", "run_jobs"]

# A trial takes milliseconds, its minimisation the time given; a worker that is silent for longer hangs.
SILENT_SECONDS = 90.0
MOST_DEATHS = 20


@dataclass
class Outcome:
    """Of all workers.

    Attributes:
        counts: what they did.
        failures: the first of each kind.
        seen: the number of failures of each kind.
    """

    counts: Counts = field(default_factory=Counts)
    failures: dict[str, Failure] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)


@dataclass
class _Worker:
    job: Job
    process: Any
    pipe: Connection
    heard: float
    number: int = -1
    at: str = ""


def _serve(job: Job, pipe: Connection) -> None:
    work(job, lambda kind, content: pipe.send((kind, content)))
    pipe.send(("end", None))


def run_jobs(
    jobs: list[Job], tell: Callable[[Failure], None], serve: Callable[[Job, Connection], None] = _serve
) -> Outcome:
    """Runs each job in a process of its own.

    Args:
        jobs: one for each process.
        tell: gets the first failure of each kind as it comes.
        serve: what a process does with its job and its end of a pipe.
    """
    outcome = Outcome()
    workers = [_start(job, serve) for job in jobs]
    deaths = 0
    while workers:
        ready = wait([worker.pipe for worker in workers], timeout=1.0)
        for worker in list(workers):
            silent = time.monotonic() - worker.heard > SILENT_SECONDS
            if worker.pipe in ready:
                worker.heard = time.monotonic()
                for kind, content in _messages(worker):
                    _take(kind, content, worker, outcome, tell)
            if worker.pipe.closed or silent:
                workers.remove(worker)
                how = _end(worker, silent)
                if how is not None:
                    deaths += 1
                    _note(Failure(how, worker.number, how, worker.at), outcome, tell)
                    if deaths < MOST_DEATHS and worker.job.most is None:
                        workers.append(_start(replace(worker.job, start=worker.number + worker.job.step), serve))
    return outcome


def _start(job: Job, serve: Callable[[Job, Connection], None]) -> _Worker:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=serve, args=(job, theirs), daemon=True)
    process.start()
    theirs.close()
    return _Worker(job, process, mine, time.monotonic() + 60, job.start)  # importing torch takes a while


def _messages(worker: _Worker) -> Iterator[tuple[str, Any]]:
    """What has arrived; closes the pipe at the end of the job or of the process."""
    try:
        while worker.pipe.poll():
            message = worker.pipe.recv()
            yield message
            if message[0] == "end":
                worker.number = -1
                worker.pipe.close()
                return
    except (EOFError, OSError):
        worker.pipe.close()


def _take(kind: str, content: Any, worker: _Worker, outcome: Outcome, tell: Callable[[Failure], None]) -> None:
    if kind == "at":
        worker.number, worker.at = content
    elif kind == "counts":
        outcome.counts.add(content)
    elif kind == "failure":
        _note(content, outcome, tell)


def _note(failure: Failure, outcome: Outcome, tell: Callable[[Failure], None]) -> None:
    outcome.seen[failure.kind] += 1
    if failure.kind not in outcome.failures:
        outcome.failures[failure.kind] = failure
        tell(failure)


def _end(worker: _Worker, silent: bool) -> str | None:
    """Waits for the process, or ends it; how it died, or None if it ended normally."""
    if silent:
        worker.process.kill()
    worker.process.join(10)
    if silent:
        return f"the process said nothing for {SILENT_SECONDS:g} s"
    if worker.number == -1 and worker.process.exitcode == 0:
        return None
    return f"the process died with {worker.process.exitcode}"
