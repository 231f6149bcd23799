"""How cost grows with batch, length and depth, and which part of it is fixed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trmfast.benchmark.recursions import WEIGHT_SCALE
from trmfast.benchmark.rivals import RIVALS, Runner
from trmfast.benchmark.turns import take_turns
from trmfast.cases import Case, make_case, make_inputs

__all__ = ["Fit", "Sweep", "fit_powers", "measure_sweeps"]

BATCHES: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
LENGTHS: tuple[int, ...] = (16, 32, 64, 97, 192, 384, 916)
DEPTHS: tuple[int, ...] = (7, 21, 70, 210, 700, 2100)
# Eager PyTorch, here for comparison, skips larger points to save time.
MOST_EAGER = {("depth", "forward"): 210, ("batch", "training"): 16}
MOST_TRAINED = 32


@dataclass(frozen=True)
class Fit:
    """Seconds as a sum of ``coefficients[i] * x ** powers[i]``, none negative.

    Attributes:
        powers, coefficients: the terms; power 0 is the fixed cost.
        fixed_share: the fixed cost's part of the fitted cost at each x.
        worst: largest relative distance of a measured point from the fit.
    """

    powers: tuple[int, ...]
    coefficients: tuple[float, ...]
    fixed_share: tuple[float, ...]
    worst: float


@dataclass(frozen=True)
class Sweep:
    """Cost of one implementation against one size.

    Attributes:
        name: what was varied: ``"batch"``, ``"length"`` or ``"depth"``.
        step, implementation, hidden_size, batch, length, updates: what ran; the varied one holds its first value.
        x: the sizes.
        seconds: median time of a whole run at each; low, high: fastest and slowest.
        per: what the fit is of: seconds of ``"one update"``, or of ``"a run"``.
        fit: that against x; for batch, of the points >= 2, where every thread has a sequence of its own.
    """

    name: str
    step: str
    implementation: str
    hidden_size: int
    batch: int
    length: int
    updates: int
    x: tuple[int, ...]
    seconds: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    per: str
    fit: Fit

    @property
    def fitted(self) -> tuple[int, ...]:
        """The sizes that the fit is of."""
        return self.x[1:] if self.name == "batch" else self.x

    @property
    def seconds_per_update(self) -> list[float]:
        """Median time of one update at each size."""
        counts = self.x if self.name == "depth" else [self.updates] * len(self.x)
        return [seconds / count for seconds, count in zip(self.seconds, counts, strict=True)]


def fit_powers(x: Sequence[float], seconds: Sequence[float], powers: Sequence[int]) -> Fit:
    """Least squares of the relative error; a term that would be negative is left out."""
    sizes, times = np.asarray(x, dtype=float), np.asarray(seconds, dtype=float)
    terms = list(powers)
    while True:
        columns = np.stack([sizes**power for power in terms], axis=1) / times[:, None]
        # Columns of like length keep the system well conditioned: L^2 is 10^5 times L^0.
        norms = np.linalg.norm(columns, axis=0)
        found = np.linalg.lstsq(columns / norms, np.ones(len(times)), rcond=None)[0] / norms
        if found.min() >= 0 or len(terms) == 1:
            break
        del terms[int((found * norms).argmin())]
    values = dict(zip(terms, found.tolist(), strict=True))
    coefficients = tuple(values.get(power, 0.0) for power in powers)
    fitted = sum(c * sizes**power for c, power in zip(coefficients, powers, strict=True))
    fixed = coefficients[list(powers).index(0)]
    return Fit(
        tuple(powers),
        coefficients,
        tuple((fixed / fitted).tolist()),
        float(np.abs(times / fitted - 1).max()),
    )


def measure_sweeps(say: Callable[[str], None], tiny: bool = False) -> list[Sweep]:
    """All sweeps, in bfloat16 on TRM's attention network; points of one sweep take turns.

    Args:
        say: called with what is being done.
        tiny: width 64 and few points, for tests.
    """
    width, heads, layers = (64, 2, 1) if tiny else (512, 8, 2)

    def case(hidden_size: int, num_heads: int, batch: int, length: int, updates: int) -> Case:
        cycle = 7 if updates % 7 == 0 else updates
        return make_case(
            "trm",
            H_cycles=updates // cycle,
            L_cycles=cycle - 1,
            batch=batch,
            length=length,
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_layers=layers,
        )

    batches, lengths, depths = BATCHES, LENGTHS, DEPTHS
    if tiny:
        batches, lengths, depths = BATCHES[:4], LENGTHS[:4], DEPTHS[:3]
    both = ("eager", "trmfast")
    sweeps: list[Sweep] = []
    cases = [case(width, heads, batch, 97, 7) for batch in batches]
    sweeps += _sweep("batch", "forward", batches, cases, both, say)
    # The gradient window of these training steps covers all updates.
    trained = [batch for batch in batches if batch <= MOST_TRAINED]
    sweeps += _sweep("batch", "training", trained, cases[: len(trained)], both, say)
    cases = [case(width, heads, 2, length, 7) for length in lengths]
    sweeps += _sweep("length", "forward", lengths, cases, both, say)
    for hidden_size, num_heads in ((width, heads),) if tiny else ((width, heads), (128, 4)):
        cases = [case(hidden_size, num_heads, 2, 97, depth) for depth in depths]
        sweeps += _sweep("depth", "forward", depths, cases, both, say)
    return sweeps


def _sweep(
    name: str, step: str, x: Sequence[int], cases: Sequence[Case], names: Sequence[str], say: Callable[[str], None]
) -> list[Sweep]:
    block = cases[0].problem.nets[0].block
    say(f"cost against {name}, {step}, D={block.hidden_size}")
    runners: dict[str, Runner] = {}
    for size, case in zip(x, cases, strict=True):
        inputs = make_inputs(case, torch.bfloat16, weight_scale=WEIGHT_SCALE)
        for implementation in names:
            if implementation == "eager" and size > MOST_EAGER.get((name, step), size):
                continue
            runners[f"{implementation} {size}"] = RIVALS[implementation](inputs, torch.get_num_threads())
    runs = {key: getattr(runner, step) for key, runner in runners.items()}
    timing = take_turns(runs, torch.bfloat16, 3)
    sweeps = []
    for implementation in names:
        sizes = [size for size in x if f"{implementation} {size}" in runs]
        times = [sorted(timing.times[f"{implementation} {size}"]) for size in sizes]
        seconds = [statistics.median(t) for t in times]
        updates = len(cases[0].problem.program.updates)
        if name == "depth":
            fit = fit_powers(sizes, seconds, (0, 1))
        else:
            per_update = [s / updates for s in seconds]
            first = 1 if name == "batch" else 0
            fit = fit_powers(sizes[first:], per_update[first:], (0, 1) if name == "batch" else (0, 1, 2))
        sweeps.append(
            Sweep(
                *(name, step, implementation, block.hidden_size, cases[0].batch, cases[0].length, updates),
                x=tuple(sizes),
                seconds=tuple(seconds),
                low=tuple(t[0] for t in times),
                high=tuple(t[-1] for t in times),
                per="a run" if name == "depth" else "one update",
                fit=fit,
            )
        )
    return sweeps
