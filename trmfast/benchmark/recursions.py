"""Time, rate, memory and error of recursions: trmfast and its rivals take turns in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from trmfast.benchmark.errors import Check, check_forward, check_training
from trmfast.benchmark.memory import peak_bytes, resident_bytes, saved_bytes, trim
from trmfast.benchmark.rivals import RIVALS, Runner, Trained, missing
from trmfast.benchmark.suites import Work
from trmfast.cases import Inputs, make_inputs
from trmfast.flops import forward_flops, window_flops

__all__ = [
    "Prepared",
    "Row",
    "Timing",
    "Turns",
    "dtype_peak",
    "measure_work",
    "measure_works",
    "prepare_work",
    "quartiles",
    "read_bandwidth",
    "take_turns",
]

# Rounding errors grow from update to update by a factor that grows with the weights; at this scale eager PyTorch stays
# close enough to float64 over a published program in bfloat16 for a verdict.  Times do not depend on it.
WEIGHT_SCALE = 0.3
clock = time.perf_counter
SAMPLE_SECONDS = 0.02
# Idle OpenMP threads of the implementation before spin for some milliseconds on cores that the next one needs.
SETTLE_SECONDS = 0.01
FEWEST_ROUNDS, MOST_ROUNDS = 3, 31
VISIT_SECONDS = 1.0
# What another problem has pushed out of the caches, and packing weights that have changed, is nothing beside this.
COLD_SECONDS = 0.5


@dataclass(frozen=True)
class Row:
    """One implementation on one step of one problem.

    Attributes:
        case, dtype, step, batch, length, updates: what ran; training is forward and backward with given gradients.
        implementation: a name in :data:`trmfast.benchmark.rivals.RIVALS`.
        note: how it was run.
        seconds: median over the rounds; low, high: quartiles.
        times: seconds of every round; implementations of one problem share rounds.
        peaks: the machine's matrix peak for the dtype in GFLOP/s, measured in every round.
        gflop: counted floating-point operations in billions; gflops: billions of them a second.
        share: gflops over the peak, median over the rounds.
        ratio: the time of the fastest rival over this time; above 1 is faster than every rival.
        steps_per_second: supervision steps (whole batches) a second; samples_per_second: sequences.
        saved: bytes of activations that autograd keeps (training).
        peak: bytes by which resident memory rises during a step.
        build_seconds: time to compile and for the first call.
        error: largest absolute error of a final state against float64, in the first sequence; for training, largest
            error of a gradient relative to its largest element.
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


def dtype_peak(dtype: torch.dtype, seconds: float = 0.02) -> float:
    """This machine's multiply-add rate in GFLOP/s for operands of a dtype, with PyTorch's number of threads.

    With the CPU engine: on registers alone.  Without it: the best rate of torch.mm, which is lower.
    """
    from trmfast.backends.cpu import ELEMENTS, CpuBackend, target_for

    if CpuBackend().available() is None:
        from trmfast import _cpu

        return float(_cpu.peak_gflops(target_for(dtype), ELEMENTS[dtype], torch.get_num_threads(), seconds))
    a = torch.randn(1024, 1024).to(dtype)
    best, stop = 0.0, time.perf_counter() + seconds
    while best == 0 or time.perf_counter() < stop:
        start = time.perf_counter()
        a @ a
        best = max(best, 2e-9 * 1024**3 / (time.perf_counter() - start))
    return best


def read_bandwidth(nbytes: int, seconds: float = 0.2) -> float:
    """Bytes a second at which all threads read an array of ``nbytes``, the best of many passes."""
    array = torch.ones(nbytes // 4)
    best, stop = 0.0, time.perf_counter() + seconds
    while best == 0 or time.perf_counter() < stop:
        start = time.perf_counter()
        array.sum()
        best = max(best, nbytes / (time.perf_counter() - start))
    return best


# ---------------------------------------------------------------- time


@dataclass(frozen=True)
class Timing:
    """Seconds of every round by name, and the matrix peak of every round."""

    times: dict[str, list[float]]
    peaks: list[float]


class Turns:
    """Functions that are timed in turns: a round runs each of them, so that they share clock speeds and neighbours.

    A sample of a short function is a loop of at least 20 ms, after 10 ms of untimed calls; a long one follows a pause.

    Attributes:
        timing: of the rounds so far.
    """

    def __init__(
        self,
        runs: dict[str, Callable[[], object]],
        dtype: torch.dtype,
        between: dict[str, Callable[[], object]] | None = None,
    ) -> None:
        """Calls every function once.

        Args:
            runs: by name; each has been called before.
            dtype: whose matrix peak is measured in every round.
            between: called before each call of a function of the same name, untimed.
        """
        self.runs, self.dtype, self.between = runs, dtype, between or {}
        self.once = {name: _once(run) for name, run in runs.items()}
        self.repeats = {name: max(1, round(SAMPLE_SECONDS / seconds)) for name, seconds in self.once.items()}
        self.timing = Timing({name: [] for name in runs}, [])

    def round(self) -> None:
        """Times every function once more."""
        names, count = list(self.runs), len(self.timing.peaks)
        self.timing.peaks.append(dtype_peak(self.dtype))
        # Nobody is always the one who follows the same other.
        for name in names[count % len(names) :] + names[: count % len(names)]:
            _settle(self.runs[name], self.repeats[name])
            total = 0.0
            for _ in range(self.repeats[name]):
                if name in self.between:
                    self.between[name]()
                total += _once(self.runs[name])
            self.timing.times[name].append(total / self.repeats[name])

    def visit(self) -> None:
        """A round, or as many as fit into a second, on a machine that has run something else in the meantime."""
        for name, run in self.runs.items():
            if self.timing.peaks and self.once[name] < COLD_SECONDS:
                run()
        stop = time.monotonic() + VISIT_SECONDS
        self.round()
        while time.monotonic() < stop and len(self.timing.peaks) < MOST_ROUNDS:
            self.round()


def take_turns(runs: dict[str, Callable[[], object]], dtype: torch.dtype, rounds: int) -> Timing:
    """Times functions in turns, see :class:`Turns`."""
    turns = Turns(runs, dtype)
    for _ in range(rounds):
        turns.round()
    return turns.timing


def _settle(run: Callable[[], object], repeats: int) -> None:
    if repeats == 1:
        time.sleep(SETTLE_SECONDS)
        return
    stop = time.perf_counter() + SETTLE_SECONDS
    while time.perf_counter() < stop:
        run()


def _once(run: Callable[[], object]) -> float:
    start = clock()
    run()
    return clock() - start


# ---------------------------------------------------------------- one problem


@dataclass
class _Built:
    runner: Runner
    seconds: float
    held: int
    """Resident memory that it took to build and keeps, for those who keep weights and buffers of their own."""


@dataclass
class Prepared:
    """A problem whose implementations are built and checked.

    Attributes:
        work: the problem.
        built: its implementations.
        checks: the error of each, by step.
        remarks: for the reader.
    """

    work: Work
    built: dict[str, _Built]
    checks: dict[str, dict[str, Check]]
    remarks: list[str]


def prepare_work(work: Work, say: Callable[[str], None], without: Sequence[str] = ()) -> Prepared:
    """Builds and checks all implementations of one problem.

    Args:
        work: the problem.
        say: called with what is being done.
        without: rivals to leave out.
    """
    inputs = make_inputs(work.case, work.dtype, weight_scale=WEIGHT_SCALE)
    built, remarks = _build(work, inputs, say, without)
    say(f"{work}: error")
    runners = {name: b.runner for name, b in built.items()}
    check = {"forward": check_forward, "training": check_training}
    return Prepared(work, built, {step: check[step](runners, inputs) for step in work.steps}, remarks)


def measure_works(prepared: Sequence[Prepared], seconds: float, say: Callable[[str], None]) -> list[Row]:
    """Times all implementations of some problems.

    The problems are visited again and again: a neighbour who takes memory or a core for a minute then disturbs a round
    of each, rather than all rounds of one.

    Args:
        prepared: the problems.
        seconds: time to spend on all rounds.
        say: called with what is being done.
    """
    begin = time.monotonic()
    turns: list[tuple[Prepared, str, Turns]] = []
    for one in prepared:
        for step in one.work.steps:
            names = [name for name, b in one.built.items() if step == "forward" or b.runner.trains]
            runs = {name: getattr(one.built[name].runner, step) for name in names}
            between: dict[str, Callable[[], object]] = {}
            for name in names:
                runner = one.built[name].runner
                if step == "training" and isinstance(runner, Trained):
                    between[name] = runner.change_weights
            turns.append((one, step, Turns(runs, one.work.dtype, between)))
    visits = 0
    while visits < FEWEST_ROUNDS or (time.monotonic() - begin < seconds and visits < MOST_ROUNDS):
        for one, step, turn in turns:
            if visits == 0:
                say(f"{one.work}: {step}")
            if len(turn.timing.peaks) < MOST_ROUNDS:
                turn.visit()
        visits += 1
    return [row for one, step, turn in turns for row in _rows(one.work, step, one.built, turn.timing, one.checks[step])]


def measure_work(
    work: Work, seconds: float, say: Callable[[str], None], without: Sequence[str] = ()
) -> tuple[list[Row], list[str]]:
    """Builds, checks and times all implementations of one problem.

    Args:
        work: the problem.
        seconds: time to spend on the rounds of one step.
        say: called with what is being done.
        without: rivals to leave out.

    Returns:
        The rows, and remarks for the reader.
    """
    prepared = prepare_work(work, say, without)
    return measure_works([prepared], seconds * len(work.steps), say), prepared.remarks


def _build(
    work: Work, inputs: Inputs, say: Callable[[str], None], without: Sequence[str]
) -> tuple[dict[str, _Built], list[str]]:
    built: dict[str, _Built] = {}
    remarks: list[str] = []
    for name in (*work.rivals, "trmfast"):
        kind = RIVALS[name]
        reason = missing(name, work.dtype)
        if name in without:
            reason = "left out"
        if reason is not None:
            remarks.append(f"{work}: no {kind.title}: {reason}")
            continue
        say(f"{work}: {kind.title}")
        trim()
        before = resident_bytes()
        start = time.perf_counter()
        try:
            runner = kind(inputs, torch.get_num_threads())
            runner.forward()
            if runner.trains and "training" in work.steps:
                runner.training()
                runner.forward()  # compilers look again at weights that have gradients
        except Exception as error:  # whatever stops a compiler or an exporter, the others can still be compared
            if name == "trmfast":
                raise
            text = (str(error).splitlines() or [""])[0]
            remarks.append(f"{work}: no {kind.title}: {type(error).__name__}: {text[:160]}")
            continue
        elapsed = time.perf_counter() - start
        trim()
        after = resident_bytes()
        held = max(after - before, 0) if runner.keeps_memory and before is not None and after is not None else 0
        built[name] = _Built(runner, elapsed, held)
    return built, remarks


def _rows(work: Work, step: str, built: dict[str, _Built], timing: Timing, checks: dict[str, Check]) -> list[Row]:
    problem, batch, length = work.case.problem, work.case.batch, work.case.length
    flops = forward_flops(problem, batch, length)
    if step == "training":
        flops += 2 * window_flops(problem, batch, length)
    medians = {name: statistics.median(times) for name, times in timing.times.items()}
    rivals = [seconds for name, seconds in medians.items() if name != "trmfast"]
    rows = []
    for name, times in timing.times.items():
        runner = built[name].runner
        low, high = quartiles(times)
        rises = peak_bytes(getattr(runner, step))
        saved = (
            saved_bytes(runner.outputs, runner.weights) if step == "training" and isinstance(runner, Trained) else None
        )
        rows.append(
            Row(
                *(work.case.name, work.dtype_name, step, batch, length, len(problem.program.updates)),
                implementation=name,
                note=runner.note,
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
                samples_per_second=batch / medians[name],
                saved=saved,
                peak=None if rises is None else rises + built[name].held,
                build_seconds=built[name].seconds,
                error=checks[name].error,
                checked_updates=checks[name].updates,
                verdict=checks[name].verdict,
            )
        )
    return rows


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
