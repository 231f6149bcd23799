"""Time, rate and memory of recursions and models: trmfast and its rivals take turns in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from trmfast.benchmark import gpu
from trmfast.benchmark.errors import Check
from trmfast.benchmark.memory import peak_bytes, resident_bytes, trim
from trmfast.benchmark.rivals import is_ours
from trmfast.benchmark.suites import Work
from trmfast.benchmark.turns import FEWEST_ROUNDS, MOST_ROUNDS, VISIT_SECONDS, Timing, Turns, quartiles
from trmfast.flops import forward_flops, window_flops
from trmfast.problem import Problem

__all__ = ["Built", "Prepared", "Row", "Runs", "build", "count_flops", "measure_works"]


@dataclass(frozen=True)
class Row:
    """One implementation on one step of one problem.

    Attributes:
        case, dtype, step, batch, length, updates: what ran; training of a recursion is forward and backward with given
            gradients, of a model a supervision step with its loss.
        implementation: as in :func:`trmfast.benchmark.rivals.title_of`.
        note: how it was run.
        seconds: median over the rounds; low, high: quartiles.
        times: seconds of every round; implementations of one problem share rounds.
        peaks: the machine's matrix peak in GFLOP/s, measured in every round.
        gflop: counted floating-point operations in billions; gflops: billions of them a second.
        share: gflops over the peak, median over the rounds.
        ratio: the time of the fastest rival over this time; above 1 is faster than every rival.
        steps_per_second: supervision steps (whole batches) a second; samples_per_second: sequences.
        saved: bytes of activations that autograd keeps (training).
        peak: bytes by which resident memory, on a GPU allocated memory, rises during a step.
        build_seconds: time to compile and for the first call.
        error: largest absolute error of a final state (of a model, of a logit) against float64, in the first sequence;
            for training, largest error of a gradient relative to its largest element.
        checked_updates: over how many updates, counted from the end of the program.
        verdict: ``"pass"``, the first tensor outside the tolerance policy, or why there is no verdict.
    """

    case: str
    dtype: str
    step: str
    batch: int
    length: int
    updates: int
    implementation: str
    note: str
    seconds: float
    low: float
    high: float
    times: tuple[float, ...]
    peaks: tuple[float, ...]
    gflop: float
    gflops: float
    share: float
    ratio: float
    steps_per_second: float
    samples_per_second: float
    saved: int | None
    peak: int | None
    build_seconds: float
    error: float
    checked_updates: int
    verdict: str

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        """What tells problems apart: case, dtype, step, batch, length."""
        return self.case, self.dtype, self.step, self.batch, self.length


class Runs(Protocol):
    """One implementation of one problem: a recursion's (rivals.py) or a model's (models.py)."""

    title: str
    steps: tuple[str, ...]
    note: str
    keeps_memory: bool

    def forward(self) -> object: ...
    def training(self) -> object: ...
    def change_weights(self) -> None: ...
    def saved_bytes(self) -> int | None: ...


@dataclass
class Built:
    """An implementation that has run once.

    Attributes:
        runner: the implementation.
        seconds: time to build it and for the first call.
        held: resident memory that it took to build and keeps, for those that keep weights and buffers of their own.
    """

    runner: Runs
    seconds: float
    held: int = 0


@dataclass
class Prepared:
    """A problem whose implementations are built and checked.

    Attributes:
        work: the problem.
        built: its implementations.
        checks: the error of each, by step.
        flops: of one call, by step.
        remarks: for the reader.
        peak_dtype: whose matrix peak rates are compared with; by default the compute dtype.
    """

    work: Work
    built: dict[str, Built]
    checks: dict[str, dict[str, Check]]
    flops: dict[str, int]
    remarks: list[str]
    peak_dtype: torch.dtype | None = None


def count_flops(problem: Problem, batch: int, length: int, forwards: int = 1) -> dict[str, int]:
    """Of one call, by step; ``forwards``: how often training runs the recursion forward."""
    forward = forward_flops(problem, batch, length)
    return {"forward": forward, "training": forwards * forward + 2 * window_flops(problem, batch, length)}


def build(
    title: str,
    makers: Mapping[str, tuple[str, Callable[[], Runs]]],
    steps: Sequence[str],
    say: Callable[[str], None],
    required: Collection[str],
    device: str = "cpu",
) -> tuple[dict[str, Built], list[str]]:
    """Builds implementations and runs every step of each, which compiles it.

    Args:
        title: of the problem, for the reader.
        makers: by name, the title of an implementation and what builds it.
        steps: that will be timed.
        say: called with what is being done.
        required: names whose failures are raised; other failures become remarks.
        device: where it runs, ``"cpu"`` or ``"cuda"``.

    Returns:
        What was built, and remarks for the reader.
    """
    built: dict[str, Built] = {}
    remarks: list[str] = []
    for name, (implementation, make) in makers.items():
        say(f"{title}: {implementation}")
        trim()
        before = resident_bytes()
        start = time.perf_counter()
        try:
            runner = make()
            runner.forward()
            if "training" in runner.steps and "training" in steps:
                runner.training()
                runner.forward()  # compilers recompile for weights that have gradients
            if device != "cpu":
                torch.cuda.synchronize()  # what fails on the device fails here
        except Exception as error:  # any failure of a compiler or exporter; the others can still be compared
            if name in required:
                raise
            text = (str(error).splitlines() or [""])[0]
            remarks.append(f"{title}: no {implementation}: {type(error).__name__}: {text[:160]}")
            continue
        elapsed = time.perf_counter() - start
        trim()
        after = resident_bytes()
        held = max(after - before, 0) if runner.keeps_memory and before is not None and after is not None else 0
        built[name] = Built(runner, elapsed, held)
    return built, remarks


def measure_works(
    prepared: Sequence[Prepared],
    seconds: float,
    say: Callable[[str], None],
    *,
    fewest: int = FEWEST_ROUNDS,
    visit_seconds: float = VISIT_SECONDS,
) -> list[Row]:
    """Times all implementations of some problems.

    Problems take turns in many visits, so that a neighbour who takes memory or a core for a minute disturbs one round
    of each, not all rounds of one.

    Args:
        prepared: the problems.
        seconds: time to spend on all rounds.
        say: called with what is being done.
        fewest: visits of each problem, however long they take.
        visit_seconds: time of one visit of a problem whose rounds are shorter.
    """
    begin = time.monotonic()
    turns: list[tuple[Prepared, str, Turns]] = []
    for one in prepared:
        for step in one.work.steps:
            runners = {name: b.runner for name, b in one.built.items() if step in b.runner.steps}
            runs = {name: getattr(runner, step) for name, runner in runners.items()}
            between = {name: runner.change_weights for name, runner in runners.items() if step == "training"}
            turns.append((one, step, Turns(runs, one.peak_dtype or one.work.dtype, between, one.work.device)))
    visits = 0
    while visits < fewest or (time.monotonic() - begin < seconds and visits < MOST_ROUNDS):
        for one, step, turn in turns:
            if visits == 0:
                say(f"{one.work}: {step}")
            if len(turn.timing.peaks) < MOST_ROUNDS:
                turn.visit(visit_seconds)
        visits += 1
    return [row for one, step, turn in turns for row in _rows(one, step, turn.timing)]


def _rows(prepared: Prepared, step: str, timing: Timing) -> list[Row]:
    work, flops = prepared.work, prepared.flops[step]
    medians = {name: statistics.median(times) for name, times in timing.times.items()}
    rivals = [seconds for name, seconds in medians.items() if not is_ours(name)]
    rows = []
    for name, times in timing.times.items():
        built, check = prepared.built[name], prepared.checks[step][name]
        low, high = quartiles(times)
        rises = (peak_bytes if work.device == "cpu" else gpu.peak_bytes)(getattr(built.runner, step))
        rows.append(
            Row(
                *(work.case.name, work.dtype_name, step, work.case.batch, work.case.length),
                updates=len(work.case.problem.program.updates),
                implementation=name,
                note=built.runner.note,
                seconds=medians[name],
                low=low,
                high=high,
                times=tuple(times),
                peaks=tuple(timing.peaks),
                gflop=flops * 1e-9,
                gflops=flops * 1e-9 / medians[name],
                share=statistics.median(flops * 1e-9 / t / p for t, p in zip(times, timing.peaks, strict=True)),
                ratio=(min(rivals) if rivals else medians[name]) / medians[name],
                steps_per_second=1 / medians[name],
                samples_per_second=work.case.batch / medians[name],
                saved=built.runner.saved_bytes() if step == "training" else None,
                peak=None if rises is None else rises + built.held,
                build_seconds=built.seconds,
                error=check.error,
                checked_updates=check.updates,
                verdict=check.verdict,
            )
        )
    return rows
