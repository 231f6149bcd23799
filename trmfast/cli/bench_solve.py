"""``trmfast bench --suite solve``: puzzles a second of a trained model, against the published evaluation."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from trmfast import runtime
from trmfast.benchmark.solve import (
    SearchRow,
    SolveRow,
    Task,
    Width,
    measure_search,
    measure_solving,
    measure_widths,
    puzzles_of,
)
from trmfast.benchmark.solve_report import SolveReport
from trmfast.benchmark.solve_start import ROUNDS, Start, measure_start
from trmfast.cli.console import UsageError, print_json, print_table, progress
from trmfast.cli.machine import describe_machine, facts
from trmfast.cli.solve import MODEL, clues_of, naming_options, sudoku_model, threshold_of
from trmfast.solving import Confident

__all__ = ["OPTIONS", "add_arguments", "run"]

OPTIONS = ("model", "puzzles", "clues", "threshold", "sigma", "trajectories")
"""Those of this suite alone."""

# Shares of the time; the rest goes to starting, compiling and the first calls.
WIDTHS = 0.1
WAYS = 0.7


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this suite alone."""
    group = parser.add_argument_group(
        "options of --suite solve, besides --batch, --threads, --seconds and --no-compile"
    )
    add = group.add_argument
    add("--model", metavar="FILE", help=f"a file or name, as of trmfast solve (default: {MODEL})")
    add("--puzzles", type=int, metavar="N", help="how many (default: 128, of trajectories 64)")
    add("--clues", type=int, metavar="N", help="of a puzzle (default: as the model was trained)")
    add("--threshold", type=float, metavar="T", help="a row halts when its logit is above T (default: the model's)")
    add("--sigma", type=float, nargs="+", metavar="S", help="noise of trajectories (default: 0.1 0.3 1)")
    add("--trajectories", action="store_true", help="only these: 1, 4, 16 and 64 of them, what they solve and cost")


def run(arguments: argparse.Namespace) -> int:
    """Measures; 0."""
    start = time.monotonic()
    count = (64 if arguments.trajectories else 128) if arguments.puzzles is None else arguments.puzzles
    if count < 1:
        raise UsageError(f"--puzzles: got {count}, accepted are integers >= 1")
    sigmas = tuple(arguments.sigma or (0.1, 0.3, 1.0))
    if not all(0 < sigma < float("inf") for sigma in sigmas):
        raise UsageError(f"--sigma: got {' '.join(f'{s:g}' for s in sigmas)}, accepted are numbers above 0")
    if arguments.threshold is not None:
        with naming_options():
            Confident(arguments.threshold)
    name = MODEL if arguments.model is None else arguments.model
    threads = arguments.threads or runtime.cores()
    model = sudoku_model(name, None, threads)
    task = Task(
        model=name,
        batch=arguments.batch or 32,
        threads=threads,
        threshold=threshold_of(arguments.threshold, model.notes),
        sigmas=sigmas,
        seconds=arguments.seconds,
        compiled=not arguments.no_compile,
        tiny=arguments.tiny,
    )
    clues = clues_of(arguments.clues, model.notes)
    settings = {"suite": "solve", "threads": threads, "batch": task.batch, "clues": clues, "model": name}
    settings |= {"threshold": task.threshold, "dtype": model.dtype, "sigmas": sigmas, "tiny": task.tiny}
    about_model = {"notes": model.notes, "config": vars(model.config)}
    circumstances: dict[str, Any] = {**facts(settings), "model": about_model}
    pairs = puzzles_of(count, clues)
    rows: list[SolveRow] = []
    starts: list[Start] = []
    widths: list[Width] = []
    searches: list[SearchRow] = []
    remarks: list[str] = []
    with progress(20) as bar:
        if arguments.trajectories:
            searches = measure_search(task, pairs, bar.step)
            if searches[0].puzzles < count:
                remarks.append(f"{searches[0].puzzles} of {count} puzzles fit into the time (--seconds)")
        else:
            widths, remarks = measure_widths(task, WIDTHS * task.seconds, bar.step)
            starts = measure_start(task.setup("eager"), bar.step, 1 if task.tiny else ROUNDS)
            rows, more = measure_solving(task, pairs, model.halt_max_steps, WAYS * task.seconds, bar.step)
            remarks += more
    about = (
        f"model {name}, {model.dtype}, threshold {task.threshold:g}; eager PyTorch and torch.compile in its dtype; "
        f"latencies from the entry into the batch to the answer"
    )
    seconds = time.monotonic() - start
    machine_line = describe_machine(circumstances["machine"])
    measured = tuple(rows), tuple(starts), tuple(widths), tuple(searches)
    report = SolveReport(machine_line, circumstances, *measured, (*remarks, about), seconds)
    written = report.write(arguments.output)
    if arguments.json:
        print_json(report.record())
    elif arguments.markdown:
        print(report.markdown())
    else:
        print(f"{machine_line}; {threads} threads, PyTorch {torch.__version__}")
        for table in report.tables():
            print_table(*table)
        print("", *report.remarks, f"{arguments.output}: {', '.join(written)}", f"{seconds:.0f} s", sep="\n")
    return 0
