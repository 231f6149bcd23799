"""Times one supervision step and one training step of the published configurations on real ARC-AGI tasks and Sudoku
puzzles: eager PyTorch, torch.compile and trmfast, interleaved in one process, in bfloat16 with random weights.  Results
are checked against the float64 reference before anything is timed; the exit status is 1 if trmfast fails that check."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from trmfast.benchmark import gpu, rivals
from trmfast.benchmark.configs import CONFIGS
from trmfast.benchmark.measure import Row
from trmfast.benchmark.report import Report, cells, columns, fit_table, group_title, load, markdown, title_of
from trmfast.benchmark.suites import SUITES
from trmfast.budget import recompute_of
from trmfast.cli import bench_solve
from trmfast.cli.bench_compare import compare_runs
from trmfast.cli.bench_models import measure_models
from trmfast.cli.bench_suite import measure_suite
from trmfast.cli.console import UsageError, print_json, print_table
from trmfast.cli.machine import cores_of_process

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
examples:
  trmfast bench                         all configurations; CSV, JSON and a chart in ./trmfast-bench
  trmfast bench --quick                 without torch.compile and with few repeats, under a minute
  trmfast bench --config sudoku --batch 32
  trmfast bench --compile recursion     one graph for the whole recursion: minutes of compilation for each configuration
  trmfast bench --markdown              print the README's table
  trmfast bench --config sudoku sudoku-mlp --recompute True 256MB False
                                        training with other budgets for activations, too
  trmfast bench --suite quick           recursions alone, of every model, size and dtype; under three minutes
  trmfast bench --suite full            with every rival that is installed, and scaling; under fifteen minutes
  trmfast bench --suite int8            recursions forward, int8 beside bf16
  trmfast bench --suite solve           Sudoku puzzles a second of a trained model; under six minutes
  trmfast bench --device cuda           on a GPU: events of its stream, torch.compile as CUDA graphs
  trmfast bench --device cuda --suite gpu
                                        recursions of every published model on a GPU, three batches each
  trmfast bench --suite quick --compare old/suite.json
                                        exit status 1 if trmfast has become slower against its rivals and the peak
  trmfast bench --compare old/bench.json
                                        the same for the configurations
  trmfast bench --compare old/suite.json new/suite.json

columns:
  GFLOP/s        matrix products and attention, 2 for a multiply-add; training counts forward and twice the gradient
                 window, and nothing for what is computed again
  of peak        of the multiply-adds that this machine does on registers alone, measured in the same minute; on a GPU,
                 of a product of 8192 x 8192 matrices by torch.mm
  ratio          time of the faster rival over this time
  kept B/token   what autograd keeps for backward: every storage once, without parameters and their casts
  error          against the float64 reference: of the logits, or of the gradients relative to the largest element

columns of suites besides:
  steps/s        supervision steps a second, of the whole batch; samples/s: sequences
  kept MB        as kept B/token, of the whole step
  peak MB        by how much resident memory, on a GPU allocated memory, rises during a step
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("--quick", action="store_true", help="no torch.compile, fewest repeats, accuracy over one H cycle")
    add("--config", nargs="+", metavar="NAME", help=f"only these, of {', '.join(CONFIGS)}")
    add("--batch", type=int, metavar="N", help="sequences (default: 1 for arc, 8 for the others)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where it runs (default: cpu)")
    add("--threads", type=int, metavar="N", help="threads (default: PyTorch's)")
    add(
        "--compile",
        choices=("network", "recursion"),
        default="network",
        help="what torch.compile gets (default: network)",
    )
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add(
        "--recompute",
        nargs="+",
        metavar="SETTING",
        help="also time training with these: True, False, or a size that forward may keep, such as 256MB",
    )
    add("--seconds", type=float, default=240, metavar="S", help="time to aim at (default: 240)")
    add(
        "--output",
        type=Path,
        default=Path("trmfast-bench"),
        metavar="DIR",
        help="where results go (default: trmfast-bench)",
    )
    add(
        "--suite",
        choices=(*SUITES, "solve"),
        help="recursions without embeddings, heads and losses, see docs/benchmarks.md; solve: puzzles, docs/solver.md",
    )
    add(
        "--compare",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="compare with the suite.json or bench.json of another run; with two, compare those",
    )
    add("--json", action="store_true", help="print one JSON object")
    add("--markdown", action="store_true", help="print the README's table")
    add("--tiny", action="store_true", help=argparse.SUPPRESS)  # for tests: width 64
    bench_solve.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the benchmark; 1 if trmfast is outside the tolerance policy or, with --compare, has become slower."""
    _check_options(arguments)
    if arguments.suite == "solve":
        return bench_solve.run(arguments)
    try:
        earlier = [load(path) for path in arguments.compare or ()]
    except ValueError as error:
        raise UsageError(f"--compare: {error}") from error
    if len(earlier) == 2:
        return int(compare_runs(earlier[0], earlier[1]))
    report, again = measure_models(arguments) if arguments.suite is None else measure_suite(arguments)
    written = _write(arguments.output, report)
    if arguments.json:
        print_json(report.record())
    elif arguments.markdown:
        print(markdown(report))
    else:
        _print(report, written)
    for row in report.failures:
        print(f"trmfast bench: {title_of(row.case)}, {_what(report, row)}: {row.verdict}", file=sys.stderr)
    regressed = any(compare_runs(old, report, again) for old in earlier)
    return 1 if report.failures or regressed else 0


def _what(report: Report, row: Row) -> str:
    return row.step if report.suite is not None else f"{row.step}, {rivals.title_of(row.implementation)}"


def _check_options(arguments: argparse.Namespace) -> None:
    _check_device(arguments)
    for name in arguments.config or ():
        if name not in CONFIGS:
            raise UsageError(f"--config: got {name!r}, accepted are {', '.join(CONFIGS)}")
    if arguments.batch is not None and arguments.batch < 1:
        raise UsageError(f"--batch: got {arguments.batch}, accepted are integers >= 1")
    for text in arguments.recompute or ():
        try:
            recompute_of(text)
        except ValueError as error:
            raise UsageError(f"--{error}") from error
    cores = cores_of_process()
    if arguments.threads is not None and not 1 <= arguments.threads <= cores:
        raise UsageError(f"--threads: got {arguments.threads}, accepted are 1 to {cores}, the cores of this process")
    if not arguments.seconds > 0:
        raise UsageError(f"--seconds: got {arguments.seconds:g}, accepted are positive numbers")
    if arguments.compare is not None:
        if len(arguments.compare) > 2:
            raise UsageError(f"--compare: got {len(arguments.compare)} files, accepted are one or two")
        if arguments.suite is not None and len(arguments.compare) == 2:
            raise UsageError("--compare: got two files with --suite, which are compared with each other alone")
        if arguments.json:
            raise UsageError("--json: not an option of --compare, which prints a table")
    if arguments.suite == "solve":
        _refuse(arguments, ("quick", "config", "recompute", "compare"), "not an option of --suite solve")
    else:
        _refuse(arguments, bench_solve.OPTIONS, "an option of --suite solve alone")
        if arguments.suite is not None:
            fixed = ("quick", "config", "batch", "no_compile", "recompute")
            _refuse(arguments, fixed, "not an option of --suite, whose problems are fixed")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--output: got {str(arguments.output)!r}, accepted are folders that can be written: {error.strerror}"
        ) from error


def _check_device(arguments: argparse.Namespace) -> None:
    suite = arguments.suite
    if arguments.device == "cpu":
        if suite in SUITES and SUITES[suite].device != "cpu":
            raise UsageError(f"--suite: got {suite!r}, which needs --device {SUITES[suite].device}")
        return
    accepted = [name for name, one in SUITES.items() if name != "int8" and not one.scaling]
    if suite is not None and suite not in accepted:
        raise UsageError(f"--suite: got {suite!r}, accepted with --device cuda are {', '.join(accepted)}")
    reason = gpu.missing_gpu()
    if reason is not None:
        raise UsageError(f"--device: got 'cuda', accepted here is cpu: {reason}")


def _refuse(arguments: argparse.Namespace, options: Sequence[str], reason: str) -> None:
    for option in options:
        value = getattr(arguments, option)
        if value is not None and value is not False:
            raise UsageError(f"--{option.replace('_', '-')}: {reason}")


def _write(folder: Path, report: Report) -> str:
    """Writes the results; returns what and where, for people."""
    report.write(folder)
    stem = "suite" if report.suite else "bench"
    try:
        from trmfast.benchmark.charts import write_charts

        charts = ", ".join(write_charts(folder, report))
    except ModuleNotFoundError:
        charts = "no chart: `pip install -c constraints.txt -e '.[bench]'` installs matplotlib"
    return f"{folder}: {stem}.json, .csv, .md, {charts}"


def _print(report: Report, written: str) -> None:
    threads = report.facts["settings"]["threads"]
    dtype = "" if report.suite else "bf16, "
    print(f"{report.machine}; {threads} threads, {dtype}PyTorch {report.facts['versions']['torch']}")
    for group in report.groups():
        print_table(
            group_title(group[0]),
            columns(report),
            [cells(report, row) for row in group],
            [i for i, row in enumerate(group) if row.verdict.startswith("fail")],
        )
    if report.sweeps:
        print("", *fit_table(report.sweeps), sep="\n")
    peak = [] if report.suite else [f"peak: {report.facts['peak_source']}"]
    print("", *dict.fromkeys(report.remarks), *peak, written, f"{report.seconds:.0f} s", sep="\n")
