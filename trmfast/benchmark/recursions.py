"""Time, rate, memory and error of recursions: trmfast and its rivals take turns in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trmfast.benchmark.memory import peak_bytes, resident_bytes, saved_bytes, trim
from trmfast.benchmark.rivals import RIVALS, Runner, Trained, missing
from trmfast.benchmark.suites import Work
from trmfast.cases import Inputs, make_inputs
from trmfast.flops import forward_flops, window_flops
from trmfast.program import RecursionProgram
from trmfast.testing import MeaninglessComparisonError, compare, run_truth

__all__ = ["Row", "Timing", "dtype_peak", "measure_work", "quartiles", "read_bandwidth", "take_turns"]

# Rounding errors grow from update to update by a factor that grows with the weights; at this scale eager PyTorch stays
# close enough to float64 over a published program in bfloat16 for a verdict.  Times do not depend on it.
WEIGHT_SCALE = 0.3
# The float64 truth of a forward pass is run over the end of the program if the whole is more work than this.
TRUTH_FLOPS = 60e9
clock = time.perf_counter
SAMPLE_SECONDS = 0.02
# Idle OpenMP threads of the implementation before spin for some milliseconds on cores that the next one needs.
SETTLE_SECONDS = 0.01
FEWEST_ROUNDS, MOST_ROUNDS = 3, 31


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


def take_turns(
    runs: dict[str, Callable[[], object]],
    dtype: torch.dtype,
    seconds: float,
    between: dict[str, Callable[[], object]] | None = None,
    rounds: tuple[int, int] = (FEWEST_ROUNDS, MOST_ROUNDS),
) -> Timing:
    """Times functions in turns: every round runs each, so that they share clock speeds and neighbours.

    A sample of a short function is a loop of at least 20 ms, after 10 ms of untimed calls; a long one follows a pause.

    Args:
        runs: by name; each has been called before.
        dtype: whose matrix peak is measured in every round.
        seconds: time to spend.
        between: called before each call of a function of the same name, untimed.
        rounds: fewest and most rounds; the fewest count even where they take longer than ``seconds``.
    """
    names = list(runs)
    repeats = {name: max(1, round(SAMPLE_SECONDS / _once(runs[name]))) for name in names}
    timing = Timing({name: [] for name in names}, [])
    begin = time.perf_counter()
    count = 0
    while count < rounds[0] or (count < rounds[1] and time.perf_counter() - begin < seconds):
        timing.peaks.append(dtype_peak(dtype))
        # Nobody is always the one who follows the same other.
        for name in names[count % len(names) :] + names[: count % len(names)]:
            _settle(runs[name], repeats[name])
            total = 0.0
            for _ in range(repeats[name]):
                if between and name in between:
                    between[name]()
                total += _once(runs[name])
            timing.times[name].append(total / repeats[name])
        count += 1
    return timing


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
    inputs = make_inputs(work.case, work.dtype, weight_scale=WEIGHT_SCALE)
    built, remarks = _build(work, inputs, say, without)
    say(f"{work}: error")
    rows: list[Row] = []
    for step in work.steps:
        names = [name for name, b in built.items() if step == "forward" or b.runner.trains]
        checks = _check_forward(built, inputs) if step == "forward" else _check_training(built, inputs)
        say(f"{work}: {step}")
        runs = {name: getattr(built[name].runner, step) for name in names}
        between: dict[str, Callable[[], object]] = {}
        for name in names:
            runner = built[name].runner
            if step == "training" and isinstance(runner, Trained):
                between[name] = runner.change_weights
        timing = take_turns(runs, work.dtype, seconds, between)
        rows += _rows(work, step, built, timing, checks)
    return rows, remarks


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


def _rows(work: Work, step: str, built: dict[str, _Built], timing: Timing, checks: dict[str, _Check]) -> list[Row]:
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


# ---------------------------------------------------------------- error


@dataclass(frozen=True)
class _Check:
    error: float
    updates: int
    verdict: str


def _check_forward(built: dict[str, _Built], inputs: Inputs) -> dict[str, _Check]:
    """The final states of the first sequence against float64; sequences do not see each other."""
    program = inputs.problem.program
    flops = forward_flops(inputs.problem, 1, inputs.states[0].shape[1])
    count = len(program.updates)
    if flops > TRUTH_FLOPS and all(b.runner.runs(_end(program, 1)) for b in built.values()):
        count = max(1, min(2, count), int(count * TRUTH_FLOPS / flops))
    checks = _check_end(built, inputs, count)
    # Where rounding has carried eager PyTorch itself too far off for a verdict, less of the program can be judged.
    for fewer in (2, 1):
        unjudged = {
            name: b
            for name, b in built.items()
            if checks[name].verdict.startswith("no verdict") and b.runner.runs(_end(program, 1))
        }
        if "eager" not in unjudged or fewer >= count:
            break
        checks |= _check_end(unjudged, inputs, fewer)
    return checks


def _check_end(built: dict[str, _Built], inputs: Inputs, count: int) -> dict[str, _Check]:
    checked = _end(inputs.problem.program, count)
    true = run_truth(_with_program(_first_sequence(inputs), checked), backward=False).outputs
    dtype = inputs.states[0].dtype
    found = {
        name: {key: z[:1].to(dtype) for key, z in zip(true, b.runner.forward(checked), strict=True)}
        for name, b in built.items()
    }
    return _judge(found, true, count, gradients=False)


def _check_training(built: dict[str, _Built], inputs: Inputs) -> dict[str, _Check]:
    """The gradients of x and the weights through the last two updates, as entered in the first sequence alone."""
    program = inputs.problem.program
    count = min(2, len(program.updates))
    checked = _end(program, count).with_window("all")
    first = _first_sequence(inputs)
    truth = run_truth(_with_program(first, checked))
    true = {name: g for name, g in truth.gradients.items() if not name.startswith("grad z")}
    only_first = tuple(torch.cat((g[:1], torch.zeros_like(g[1:]))) for g in inputs.grad_states)
    found = {}
    for name, b in built.items():
        runner = b.runner
        if isinstance(runner, Trained):
            runner.inputs = replace(inputs, grad_states=only_first)
            runner.training(checked)
            runner.inputs = inputs
            found[name] = {key: g[:1] if key == "grad x" else g for key, g in runner.gradients().items() if key in true}
    return _judge(found, {key: g for key, g in true.items() if key in found["trmfast"]}, count, gradients=True)


def _judge(
    found: dict[str, dict[str, Tensor]], true: dict[str, Tensor], updates: int, gradients: bool
) -> dict[str, _Check]:
    """Each implementation by the tolerance policy, eager PyTorch being the measure."""
    checks = {}
    for name, tensors in found.items():
        errors, verdict = [], "pass"
        for key, t in true.items():
            scale = max(t.abs().max().item(), 1e-30) if gradients else 1.0
            errors.append((tensors[key].double() - t).abs().max().item() / scale)
            if "eager" not in found:
                verdict = "no verdict: eager did not run"
                continue
            try:
                comparison = compare(key, tensors[key], found["eager"][key], t, is_gradient=gradients)
            except MeaninglessComparisonError as error:
                verdict = f"no verdict: {error}" if verdict == "pass" else verdict
                continue
            if not comparison.passed and not verdict.startswith("fail"):
                verdict = f"fail: {comparison}"
        worst = float("nan") if any(e != e for e in errors) else max(errors)
        checks[name] = _Check(worst, updates, verdict)
    return checks


def _end(program: RecursionProgram, count: int) -> RecursionProgram:
    """The last updates of a program; itself if that is all of them."""
    if count == len(program.updates):
        return program
    return RecursionProgram(program.states, program.nets, program.updates[-count:], count)


def _with_program(inputs: Inputs, program: RecursionProgram) -> Inputs:
    return replace(inputs, problem=replace(inputs.problem, program=program))


def _first_sequence(inputs: Inputs) -> Inputs:
    def cut(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(tensor[:1] for tensor in tensors)

    x = None if inputs.x is None else inputs.x[:1]
    return replace(inputs, states=cut(inputs.states), x=x, grad_states=cut(inputs.grad_states))
