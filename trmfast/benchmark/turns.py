"""Timing in turns, and the rates of this machine that times are compared with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from trmfast.benchmark import gpu

__all__ = [
    "FEWEST_ROUNDS",
    "MOST_ROUNDS",
    "VISIT_SECONDS",
    "Timing",
    "Turns",
    "dtype_peak",
    "fastest_dtype",
    "quartiles",
    "read_bandwidth",
    "take_turns",
]

clock = time.perf_counter
SAMPLE_SECONDS = 0.02
# Idle OpenMP threads of the previous implementation spin for some milliseconds on cores that the next one needs.
SETTLE_SECONDS = 0.01
FEWEST_ROUNDS, MOST_ROUNDS = 3, 31
VISIT_SECONDS = 1.0
# Refilling the caches after another problem and repacking changed weights take far less than this.
COLD_SECONDS = 0.5


def dtype_peak(dtype: torch.dtype, seconds: float = 0.02) -> float:
    """This machine's multiply-add rate in GFLOP/s for operands of a dtype, with PyTorch's number of threads.

    With the CPU engine: on registers alone.  Without it: the best rate of torch.mm, which is lower.
    """
    from trmfast.backends.cpu import FORWARD_ELEMENTS, CpuBackend, target_for

    if CpuBackend().available() is None:
        from trmfast import _cpu

        return float(_cpu.peak_gflops(target_for(dtype), FORWARD_ELEMENTS[dtype], torch.get_num_threads(), seconds))
    a = torch.randn(1024, 1024).to(dtype)
    best, stop = 0.0, time.perf_counter() + seconds
    while best == 0 or time.perf_counter() < stop:
        start = time.perf_counter()
        a @ a
        best = max(best, 2e-9 * 1024**3 / (time.perf_counter() - start))
    return best


def fastest_dtype() -> tuple[torch.dtype, str]:
    """The dtype of this machine's highest matrix peak, and how that is measured."""
    from trmfast.backends.cpu import ELEMENTS, CpuBackend, target_for

    best = max(ELEMENTS, key=lambda dtype: dtype_peak(dtype, 0.1))
    built = CpuBackend().available() is None
    return best, f"{target_for(best)} {ELEMENTS[best]} registers" if built else f"torch.mm {ELEMENTS[best]}"


def read_bandwidth(nbytes: int, seconds: float = 0.2) -> float:
    """Bytes a second at which all threads read an array of ``nbytes``, the best of many passes."""
    array = torch.ones(nbytes // 4)
    best, stop = 0.0, time.perf_counter() + seconds
    while best == 0 or time.perf_counter() < stop:
        start = time.perf_counter()
        array.sum()
        best = max(best, nbytes / (time.perf_counter() - start))
    return best


@dataclass(frozen=True)
class Timing:
    """Seconds of every round by name, and the matrix peak of every round."""

    times: dict[str, list[float]]
    peaks: list[float]


class Turns:
    """Functions that are timed in turns: a round runs each of them, so that they share clock speeds and neighbours.

    A sample of a short function is a loop of at least 20 ms, after 10 ms of untimed calls; a long one follows a pause.
    On a GPU, a sample is the time between events of its stream, and the peak is that of a product (gpu.py).

    Attributes:
        timing: of the rounds so far.
    """

    def __init__(
        self,
        runs: dict[str, Callable[[], object]],
        dtype: torch.dtype,
        between: Mapping[str, Callable[[], object]] | None = None,
        device: str = "cpu",
    ) -> None:
        """Calls every function once.

        Args:
            runs: by name; each has been called before.
            dtype: whose matrix peak is measured in every round.
            between: called before each call of a function of the same name, untimed.
            device: ``"cpu"`` or ``"cuda"``.
        """
        self.runs, self.dtype, self.between, self.device = runs, dtype, between or {}, device
        self.once = {name: self._sample(run, 1) for name, run in runs.items()}
        self.repeats = {name: max(1, round(SAMPLE_SECONDS / seconds)) for name, seconds in self.once.items()}
        self.timing = Timing({name: [] for name in runs}, [])

    def round(self) -> None:
        """Times every function once more."""
        names, count = list(self.runs), len(self.timing.peaks)
        self.timing.peaks.append(dtype_peak(self.dtype) if self.device == "cpu" else gpu.peak(self.dtype))
        # The order rotates, so that none always follows the same other.
        for name in names[count % len(names) :] + names[: count % len(names)]:
            _settle(self.runs[name], self.repeats[name])
            self.timing.times[name].append(self._sample(self.runs[name], self.repeats[name], self.between.get(name)))

    def _sample(self, run: Callable[[], object], repeats: int, between: Callable[[], object] | None = None) -> float:
        """Mean seconds of a call."""
        if self.device != "cpu":
            return gpu.seconds_of(run, repeats, between)
        total = 0.0
        for _ in range(repeats):
            if between is not None:
                between()
            total += _once(run)
        return total / repeats

    def visit(self, seconds: float = VISIT_SECONDS) -> None:
        """At least one round, and as many as fit into the seconds, after other problems have run."""
        for name, run in self.runs.items():
            if self.timing.peaks and self.once[name] < COLD_SECONDS:
                run()
        stop = time.monotonic() + seconds
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


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and third quartiles."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
