"""Time, floating-point rate and memory of one configuration, all implementations interleaved in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch

from trmfast.benchmark.accuracy import Accuracy, measure_accuracy
from trmfast.benchmark.configs import BenchConfig
from trmfast.benchmark.memory import saved_bytes
from trmfast.benchmark.recursions import dtype_peak, quartiles
from trmfast.flops import forward_flops, window_flops
from trmfast.models import ACTLossHead, ACTModel
from trmfast.nn import Net
from trmfast.problem import Problem

__all__ = ["IMPLEMENTATIONS", "OURS", "Measurement", "Settings", "matrix_peak", "measure_config"]

IMPLEMENTATIONS = {
    "eager": "PyTorch eager",
    "compile": "torch.compile",
    "trmfast": "trmfast",
    "kept": "trmfast, recompute=False",  # training only; forward is the same
}
OURS = ("trmfast", "kept")
STEPS = ("forward", "training")
MOST_REPEATS = 15


@dataclass(frozen=True)
class Measurement:
    """One implementation on one step of one configuration.

    Attributes:
        config, step, implementation: what ran; step is ``"forward"``, one supervision step without gradients, or
            ``"training"``, the same with loss and backward pass.
        batch, length: sequences, and tokens of each with the puzzle's.
        seconds: median time.
        low, high: first and third quartile of the times.
        repeats: how many times there are.
        gflop: counted floating-point operations in billions.
        gflops: billions of them a second.
        peak: the machine's matrix peak, measured beside it, in GFLOP/s.
        share: gflops / peak.
        ratio: the time of the fastest rival over this time; above 1 is faster than every rival.
        saved: bytes of activations a token that autograd keeps (training only).
        error: of the logits, or for training of the gradients, see :class:`Accuracy`.
        verdict: of the accuracy check.
    """

    config: str
    step: str
    implementation: str
    batch: int
    length: int
    seconds: float
    low: float
    high: float
    repeats: int
    gflop: float
    gflops: float
    peak: float
    share: float
    ratio: float
    saved: float | None
    error: float
    verdict: str


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        compile_scope: ``"network"``, ``"recursion"`` or None for no torch.compile.
        repeats: fewest timed rounds, unless they would take several times as long as they may.
        seconds: time to spend on the rounds of one step.
        overrides: configuration keys to change, for tests.
        batch: sequences, or None for the configuration's own number.
        check: (H_cycles, L_cycles) of the accuracy check, None for the configuration's own.
        keep: whether training is measured with ``recompute=False`` too.
    """

    compile_scope: str | None
    repeats: int
    seconds: float
    overrides: dict[str, Any]
    batch: int | None = None
    check: tuple[int, int] | None = None
    keep: bool = False


def matrix_peak(seconds: float = 0.1) -> tuple[float, str]:
    """This machine's fastest multiply-add rate in GFLOP/s with PyTorch's number of threads, and how it was found.

    With the CPU engine: multiply-adds on registers alone, of the best target for each element.  Without it: the best
    rate of torch.mm, which is lower than the true peak.
    """
    from trmfast.backends.cpu import ELEMENTS, CpuBackend, target_for

    built = CpuBackend().available() is None
    rates = {}
    for dtype, element in ELEMENTS.items():
        name = f"{target_for(dtype)} {element} registers" if built else f"torch.mm {element}"
        rates[name] = dtype_peak(dtype, seconds)
    best = max(rates, key=lambda name: rates[name])
    return rates[best], best


class Bench:
    """One configuration with a model for every implementation, all of the same weights."""

    def __init__(self, config: BenchConfig, settings: Settings) -> None:
        self.config = config
        rows = settings.batch or config.batch
        self.batch = config.inputs(rows)
        torch.manual_seed(0)
        fused = config.model(rows, True, settings.overrides)
        self.models: dict[str, ACTModel] = {}
        for name in ("eager", "compile"):
            if name == "compile" and settings.compile_scope is None:
                continue
            model = config.model(rows, False, settings.overrides)
            model.load_state_dict(fused.state_dict())
            self.models[name] = model
        if settings.compile_scope is not None:
            cast(Any, self.models["compile"].inner).compile(settings.compile_scope)
        self.models["trmfast"] = fused
        if settings.keep:
            self.models["kept"] = config.model(rows, True, {**settings.overrides, "recompute": False})
            self.models["kept"].load_state_dict(fused.state_dict())
        self.heads = {name: ACTLossHead(model, "stablemax_cross_entropy") for name, model in self.models.items()}
        self.carry = fused.initial_carry(self.batch)
        self.length = fused.config.total_len
        nets = [cast(Net, getattr(fused.inner, name)) for name, _ in fused.inner.family.nets]
        problem = Problem(fused.inner.program, tuple(net.spec for net in nets))
        forward = forward_flops(problem, rows, self.length)
        # HRM's training runs the recursion a second time, for the target of its q head.
        passes = 1 if fused.config.no_ACT_continue else 2
        training = passes * forward + 2 * window_flops(problem, rows, self.length)
        self.gflop = {"forward": forward * 1e-9, "training": training * 1e-9}

    def forward(self, name: str) -> None:
        """One supervision step without gradients."""
        with torch.no_grad():
            self.models[name].eval()(carry=self.carry, batch=self.batch)

    def training(self, name: str) -> None:
        """One supervision step, its loss and the gradients of all parameters."""
        head = self.heads[name].train()
        head.zero_grad(set_to_none=True)
        head([], carry=self.carry, batch=self.batch)[1].backward()

    def change_weights(self, name: str) -> None:
        """A small step of gradient descent, so that no training step finds weights that it has seen before."""
        with torch.no_grad():
            for parameter in self.models[name].parameters():
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-1e-6)

    def saved_bytes(self, name: str) -> float:
        """Bytes a token that autograd keeps for backward: every storage once, without parameters and their casts."""
        head = self.heads[name].train()
        model = self.models[name]
        kept = saved_bytes(lambda: head([], carry=self.carry, batch=self.batch)[1], model.parameters(), model.buffers())
        return kept / (self.batch["inputs"].shape[0] * self.length)

    def drop(self, name: str) -> None:
        """Leaves out an implementation."""
        del self.models[name], self.heads[name]


def measure_config(
    config: BenchConfig, settings: Settings, say: Callable[[str], None]
) -> tuple[list[Measurement], list[str]]:
    """Checks and times one configuration.

    Args:
        config, settings: what and how.
        say: called with what is being done.

    Returns:
        The measurements, and remarks for the reader.
    """
    remarks: list[str] = []
    torch.compiler.reset()
    say(f"{config.title}: models")
    bench = Bench(config, settings)
    if "compile" in bench.models:
        say(f"{config.title}: torch.compile")
        start = time.perf_counter()
        try:
            for _ in range(2):
                bench.forward("compile")
                bench.training("compile")
        except Exception as error:  # whatever stops the compiler, the other two can still be compared
            remarks.append(
                f"{config.title}: no torch.compile: {type(error).__name__}: {str(error).splitlines()[0][:160]}"
            )
            bench.drop("compile")
        else:
            remarks.append(f"{config.title}: torch.compile took {time.perf_counter() - start:.0f} s to compile")
    say(f"{config.title}: accuracy")
    for cycles in (config.check or settings.check, (1, 2), (1, 1)):
        accuracy = measure_accuracy(bench.models, bench.batch, cycles)
        # Where rounding has carried eager PyTorch itself far off, less of the program can still be judged.
        if accuracy["trmfast"].judged:
            break
    if cycles is not None:
        remarks.append(f"{config.title}: errors are those of H_cycles {cycles[0]}, L_cycles {cycles[1]}")
    results: list[Measurement] = []
    for step in STEPS:
        say(f"{config.title}: {step}")
        results += _measure_step(bench, step, settings, accuracy)
    torch.compiler.reset()
    return results, remarks


def _measure_step(bench: Bench, step: str, settings: Settings, accuracy: dict[str, Accuracy]) -> list[Measurement]:
    run = bench.forward if step == "forward" else bench.training
    names = [name for name in bench.models if step == "training" or name != "kept"]
    for name in names:
        run(name)
    times: dict[str, list[float]] = {name: [] for name in names}
    peaks = [matrix_peak()[0]]
    begin = time.perf_counter()
    rounds, spent = 0, 0.0
    while (rounds < settings.repeats and spent < 3 * settings.seconds) or (
        rounds < MOST_REPEATS and spent < settings.seconds
    ):
        # Nobody is always the one who follows the fused engine, or eager PyTorch.
        for name in names[rounds % len(names) :] + names[: rounds % len(names)]:
            if step == "training":
                bench.change_weights(name)
            start = time.perf_counter()
            run(name)
            times[name].append(time.perf_counter() - start)
        rounds, spent = rounds + 1, time.perf_counter() - begin
    peaks.append(matrix_peak()[0])
    peak = max(peaks)
    medians = {name: statistics.median(values) for name, values in times.items()}
    rival = min(seconds for name, seconds in medians.items() if name not in OURS)
    results = []
    for name in names:
        low, high = quartiles(times[name])
        rate = bench.gflop[step] / medians[name]
        found = accuracy[name]
        results.append(
            Measurement(
                config=bench.config.name,
                step=step,
                implementation=name,
                batch=bench.batch["inputs"].shape[0],
                length=bench.length,
                seconds=medians[name],
                low=low,
                high=high,
                repeats=rounds,
                gflop=bench.gflop[step],
                gflops=rate,
                peak=peak,
                share=rate / peak,
                ratio=rival / medians[name],
                saved=bench.saved_bytes(name) if step == "training" else None,
                error=found.logits if step == "forward" else found.gradients,
                verdict=found.verdict,
            )
        )
    return results
