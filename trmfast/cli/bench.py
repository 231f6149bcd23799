"""Times one supervision step and one training step of the published configurations on real ARC-AGI tasks and Sudoku
puzzles: eager PyTorch, torch.compile and trmfast, interleaved in one process, in bfloat16 with random weights.  Results
are checked against the float64 reference before anything is timed; the exit status is 1 if trmfast fails that check."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from trmfast.benchmark.configs import CONFIGS
from trmfast.benchmark.measure import IMPLEMENTATIONS, OURS, Settings, matrix_peak, measure_config
from trmfast.benchmark.report import COLUMNS, Report, cells, markdown, write_csv, write_json
from trmfast.benchmark.suites import SUITES
from trmfast.cli.bench_suite import run_suite
from trmfast.cli.console import UsageError, print_json, print_table, progress
from trmfast.cli.machine import commit, cores_of_process, describe_machine, machine, versions

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
examples:
  trmfast bench                         all configurations; CSV, JSON and a chart in ./trmfast-bench
  trmfast bench --quick                 without torch.compile and with few repeats, under a minute
  trmfast bench --config sudoku --batch 32
  trmfast bench --compile recursion     one graph for the whole recursion: minutes of compilation for each configuration
  trmfast bench --markdown              print the README's table
  trmfast bench --config sudoku sudoku-mlp --no-recompute
                                        training that keeps the activations of the gradient window, too
  trmfast bench --suite quick           recursions alone, of every model, size and dtype; under three minutes
  trmfast bench --suite full            with every rival that is installed, and scaling; under fifteen minutes
  trmfast bench --suite quick --compare old/suite.json
                                        exit status 1 if trmfast has become slower against its rivals and the peak
  trmfast bench --compare old/suite.json new/suite.json

columns:
  GFLOP/s        matrix products and attention, 2 for a multiply-add; training counts forward and twice the gradient
                 window, and nothing for what is computed again
  of peak        of the multiply-adds that this machine does on registers alone, measured in the same minute
  ratio          time of the faster rival over this time
  kept B/token   what autograd keeps for backward: every storage once, without parameters and their casts
  error          against the float64 reference: of the logits, or of the gradients relative to the largest element

columns of suites besides:
  steps/s        supervision steps a second, of the whole batch; samples/s: sequences
  kept MB        as kept B/token, of the whole step
  peak MB        by how much resident memory rises during a step
"""

# Compilation may take so much of the time; after that the remaining configurations go without.
COMPILE_SHARE = 0.7
TINY = {"hidden_size": 64, "num_heads": 2, "puzzle_emb_ndim": 64, "H_cycles": 2, "L_cycles": 2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("--quick", action="store_true", help="no torch.compile, fewest repeats, accuracy over one H cycle")
    add("--config", nargs="+", metavar="NAME", help=f"only these, of {', '.join(CONFIGS)}")
    add("--batch", type=int, metavar="N", help="sequences (default: 1 for arc, 8 for the others)")
    add("--threads", type=int, metavar="N", help="threads (default: PyTorch's)")
    add(
        "--compile",
        choices=("network", "recursion"),
        default="network",
        help="what torch.compile gets (default: network)",
    )
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--no-recompute", action="store_true", help="time training with recompute=False besides")
    add("--seconds", type=float, default=240, metavar="S", help="time to aim at (default: 240)")
    add(
        "--output",
        type=Path,
        default=Path("trmfast-bench"),
        metavar="DIR",
        help="where results go (default: trmfast-bench)",
    )
    add(
        "--suite", choices=tuple(SUITES), help="recursions without embeddings, heads and losses, see docs/benchmarks.md"
    )
    add(
        "--compare",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="compare with the suite.json of another run; with two, compare those",
    )
    add("--json", action="store_true", help="print one JSON object")
    add("--markdown", action="store_true", help="print the README's table")
    add("--tiny", action="store_true", help=argparse.SUPPRESS)  # for tests: width 64


def run(arguments: argparse.Namespace) -> int:
    """Runs the benchmark; 1 if trmfast is outside the tolerance policy."""
    start = time.monotonic()
    _check_suite_options(arguments)
    names = arguments.config or list(CONFIGS)
    for name in names:
        if name not in CONFIGS:
            raise UsageError(f"--config: got {name!r}, accepted are {', '.join(CONFIGS)}")
    if arguments.batch is not None and arguments.batch < 1:
        raise UsageError(f"--batch: got {arguments.batch}, accepted are integers from 1 up")
    cores = cores_of_process()
    if arguments.threads is not None and not 1 <= arguments.threads <= cores:
        raise UsageError(f"--threads: got {arguments.threads}, accepted are 1 to {cores}, the cores of this process")
    if not arguments.seconds > 0:
        raise UsageError(f"--seconds: got {arguments.seconds:g}, accepted are positive numbers")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--output: got {str(arguments.output)!r}, not a folder one can write to: {error.strerror}"
        ) from error

    if arguments.suite is not None or arguments.compare is not None:
        return run_suite(arguments)
    scope = None if arguments.no_compile or arguments.quick else arguments.compile
    facts: dict[str, Any] = {
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "settings": {
            "threads": torch.get_num_threads(),
            "compile": scope,
            "quick": arguments.quick,
            "tiny": arguments.tiny,
            "no_recompute": arguments.no_recompute,
            "dtype": "bfloat16",
        },
    }
    peak_source = matrix_peak()[1]
    measurements, remarks = [], []
    with progress(4 * len(names)) as bar:
        for i, name in enumerate(names):
            spent = time.monotonic() - start
            late = scope is not None and spent > COMPILE_SHARE * arguments.seconds
            if late:
                remarks.append(f"{CONFIGS[name].title}: no torch.compile, {spent:.0f} s had passed (--seconds)")
            settings = Settings(
                compile_scope=None if late else scope,
                repeats=2 if arguments.quick else 3,
                # Each of two steps takes a quarter of an equal share; models, compilation and accuracy take the rest.
                seconds=1 if arguments.quick else max(1.0, (arguments.seconds - spent) / (len(names) - i) / 4),
                overrides=TINY if arguments.tiny else {},
                batch=arguments.batch,
                check=(1, 2) if arguments.quick else None,
                keep=arguments.no_recompute,
            )
            try:
                found, said = measure_config(CONFIGS[name], settings, bar.step)
            except ModuleNotFoundError as error:
                raise UsageError(str(error)) from error
            measurements += found
            remarks += said
    report = Report(
        describe_machine(facts["machine"]),
        facts,
        peak_source,
        tuple(measurements),
        tuple(remarks),
        time.monotonic() - start,
    )
    written = _write(arguments.output, report)
    if arguments.json:
        print_json(report.record())
    elif arguments.markdown:
        print(markdown(report))
    else:
        _print(report, written)
    for m in measurements:
        # One verdict is that of both steps.
        if m.implementation in OURS and m.step == "training" and m.verdict.startswith("fail"):
            print(
                f"trmfast bench: {CONFIGS[m.config].title}, {IMPLEMENTATIONS[m.implementation]}: {m.verdict}",
                file=sys.stderr,
            )
    return 0 if report.passed else 1


def _check_suite_options(arguments: argparse.Namespace) -> None:
    if arguments.compare is not None:
        if len(arguments.compare) > 2:
            raise UsageError(f"--compare: got {len(arguments.compare)} files, accepted are one or two")
        if (arguments.suite is None) == (len(arguments.compare) == 1):
            raise UsageError("--compare: one file is compared with a run of --suite, two with each other")
        if arguments.json:
            raise UsageError("--json: not an option of --compare, which prints a table")
    elif arguments.suite is None:
        return
    for option in ("quick", "config", "batch", "no_compile", "no_recompute"):
        if getattr(arguments, option):
            raise UsageError(f"--{option.replace('_', '-')}: not an option of --suite, whose problems are fixed")


def _write(folder: Path, report: Report) -> list[str]:
    """Writes the results; returns what and where, for people."""
    write_csv(folder / "bench.csv", report.measurements)
    write_json(folder / "bench.json", report)
    (folder / "bench.md").write_text(markdown(report) + "\n")
    try:
        from trmfast.benchmark.chart import write_chart

        write_chart(folder / "bench.png", report)
    except ModuleNotFoundError:
        return [
            f"{folder}/bench.csv, .json, .md; "
            "no chart: `pip install -c constraints.txt -e '.[bench]'` brings matplotlib"
        ]
    return [f"{folder}/bench.csv, .json, .md, .png"]


def _print(report: Report, written: list[str]) -> None:
    threads = report.facts["settings"]["threads"]
    print(f"{report.machine}; {threads} threads, bf16, PyTorch {report.facts['versions']['torch']}")
    for config, step, group in report.groups():
        fused = group["trmfast"]
        print_table(
            f"{CONFIGS[config].title}, {step}: B={fused.batch}, L={fused.length}, {fused.gflop:.0f} GFLOP, "
            f"{fused.repeats} rounds, peak {fused.peak:.0f} GFLOP/s",
            COLUMNS,
            [cells(m) for m in group.values()],
            [i for i, m in enumerate(group.values()) if m.verdict.startswith("fail")],
        )
    print("", *report.remarks, f"peak: {report.peak_source}", *written, f"{report.seconds:.0f} s", sep="\n")
