"""One puzzle, from the start of a process to its answer: what a person waits for on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from trmfast.benchmark.turns import quartiles
from trmfast.sudoku import tokens

__all__ = ["ROUNDS", "Start", "measure_start"]

BOARD = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
ROUNDS = 5
# A child's maximal resident size in rusage may be that of the process that started it; the status file has its own.
COMMAND = """
import sys
from trmfast.cli import main
main(sys.argv[1:])
print(open("/proc/self/status").read(), file=sys.stderr)
"""


@dataclass(frozen=True)
class Start:
    """One way to get one answer.

    Attributes:
        title: what tables call it.
        seconds: from the start of the process to its answer, median over the rounds; low, high: quartiles; times: all.
        processor: seconds of processor time of the whole process, median.
        peak: resident memory at most, bytes.
    """

    title: str
    seconds: float
    low: float
    high: float
    times: tuple[float, ...]
    processor: float
    peak: int


def measure_start(setup: dict[str, Any], say: Callable[[str], None], rounds: int = ROUNDS) -> list[Start]:
    """``trmfast solve`` and the published evaluation, one puzzle, in turns.

    Args:
        setup: of a worker that runs the published evaluation.
        say: is called with what is being done.
        rounds: how often.
    """
    threads, threshold = str(setup["threads"]), str(setup["threshold"])
    words = ["solve", "--model", setup["model"], "--threads", threads, "--threshold", threshold, BOARD]
    worker = [json.dumps({**setup, "batch": 1}), json.dumps([tokens([*map(int, BOARD.replace(".", "0"))]).tolist()])]
    ways = {
        "PyTorch eager, all steps": (
            [sys.executable, "-m", "trmfast.benchmark.solve_worker"],
            "\n".join(worker) + "\n",
        ),
        "trmfast solve": ([sys.executable, "-c", COMMAND, *words], ""),
    }
    found: dict[str, list[tuple[float, float, int]]] = {title: [] for title in ways}
    for number in range(rounds):
        for title, (command, text) in ways.items():
            say(f"one puzzle, round {number + 1}: {title}")
            found[title].append(_once(command, text))
    return [
        Start(
            title=title,
            seconds=median(seconds),
            low=quartiles(seconds)[0],
            high=quartiles(seconds)[1],
            times=seconds,
            processor=median(processor),
            peak=max(peaks),
        )
        for title, runs in found.items()
        for seconds, processor, peaks in [tuple(zip(*runs, strict=True))]
    ]


def _once(command: list[str], text: str) -> tuple[float, float, int]:
    """Seconds until the last line of the answer, seconds of processor time, and peak memory in bytes."""
    start = time.perf_counter()
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **pipes, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(text)
        process.stdin.close()
        answer = process.stdout.readline() if not text else [process.stdout.readline() for _ in range(2)][1]
        seconds = time.perf_counter() - start
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if not answer:
        raise RuntimeError(f"{command[2]}: {errors}")
    peak = json.loads(answer).get("peak")
    if peak is None:
        peak = next(int(line.split()[1]) * 1024 for line in errors.splitlines() if line.startswith("VmHWM:"))
    return seconds, usage.ru_utime + usage.ru_stime, peak
