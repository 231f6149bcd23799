"""The checks of a run. Each returns its faults, tensor by tensor; an empty list passes.

The judge of numbers is the tolerance policy of trmfast/testing.py.  It needs several draws of a small case, so a tensor
outside in the first draw is judged by the mean of five, then by the mean and the median of twenty others, and of sixty
others, before it is called a failure: in fifty thousand problems the mean of five is outside by chance too, and where a
norm's input comes close to zero (narrow widths, small eps, huge weights) one draw in twenty decides a mean.  Everything
else is equality of bits.

Limits of docs/cpu.md are part of the policy: products of bf16 in hardware take denormal numbers for 0, and a gradient
through norms over one element has their roundings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median

import torch
from torch import Tensor

from trmfast import recursion
from trmfast.cases import Inputs
from trmfast.testing import Comparison, MeaninglessComparisonError, Result, compare, pool

from .trial import Trial, references, tensors_of
from .variant import Variant, applied, run_engine

__all__ = ["CHECKS", "Run", "Tally"]

# Of bf16; what they lose of a denormal number reaches a result through sums and two norms, of eps >= 1e-8.
FLUSHING_TARGETS = ("amx", "avx512_bf16")
FLUSHED = 1e-30
# In sums of denormal numbers, before any norm.
DENORMAL = 1e-36
# Logarithm of what norms may make of them: up to 1e-6, so that a wrong result of ordinary size is still found.
MOST_GROWN = 69.0
# In bf16 smaller numbers have few bits (they are 9e-41 apart), on every target.
SMALLEST_NORMAL = 1.2e-38
# Of the largest element, for each norm of a network.
ONE_ELEMENT = 2**-22


@dataclass
class Tally:
    """What was judged.

    Attributes:
        tensors: compared with the truth.
        unjudged: of which eager PyTorch itself is too far off for a verdict.
    """

    tensors: int = 0
    unjudged: int = 0


class Run:
    """A trial under a variant, computed once for all checks."""

    def __init__(self, trial: Trial, variant: Variant) -> None:
        self.trial, self.variant, self.tally = trial, variant, Tally()

    @cached_property
    def inputs(self) -> Inputs:
        return tensors_of(self.trial)

    @cached_property
    def result(self) -> Result:
        return self.engine()

    def engine(
        self,
        inputs: Inputs | None = None,
        *,
        needs: Sequence[str] | None = None,
        plain: bool = False,
        **variant: object,
    ) -> Result:
        """The engine on these or other tensors, under this variant or one that differs in some fields."""
        changed = replace(self.variant, **variant)  # type: ignore[arg-type]
        return run_engine(self.trial, self.inputs if inputs is None else inputs, changed, needs=needs, plain=plain)


# ---------------------------------------------------------------- numbers


def policy(run: Run) -> list[str]:
    """Outputs and gradients are as close to float64 as the policy asks; finite where eager's and the truth's are."""
    eager, truth = references(run.trial)
    wrong, outside = [], []
    for name, fused in named(run.result):
        e, t = named_tensor(eager, name), named_tensor(truth, name)
        if fused.shape != t.shape:
            wrong.append(f"{name}: shape {list(fused.shape)} in place of {list(t.shape)}")
            continue
        if not fused.isfinite().all() and e.isfinite().all() and _fits(t, fused):
            count = int((~fused.isfinite()).sum())
            wrong.append(
                f"{name}: {count} of {fused.numel()} elements are not finite, all of eager's and the truth's are"
            )
            continue
        found = judged(name, fused, e, t)
        run.tally.tensors += 1
        run.tally.unjudged += found is None
        if found is not None and not found.passed and not _flushed(run, found) and not _of_one_element(run, found, t):
            outside.append(name)
    if outside:
        wrong += _still_outside(run, outside)
    return wrong


def _still_outside(run: Run, names: list[str]) -> list[str]:
    """The tensors that are outside in the mean of five draws, and in the mean and the median of others."""
    worst: list[str] = []
    for seeds in (range(5), range(5, 25), range(25, 85)):
        draws = []
        for seed in seeds:
            trial = replace(run.trial, seed=run.trial.seed + seed)
            eager, truth = references(trial)
            result = run_engine(trial, tensors_of(trial), run.variant)
            found = [
                (n, judged(n, named_tensor(result, n), *(named_tensor(r, n) for r in (eager, truth)))) for n in names
            ]
            draws.append({name: comparison for name, comparison in found if comparison is not None})
        names = [name for name in names if sum(name in draw for draw in draws) > len(draws) // 2]
        pooled = [pool([[draw[name]] for draw in draws if name in draw])[0] for name in names]
        if len(seeds) > 5:
            middle = {name: _median([draw[name] for draw in draws if name in draw]) for name in names}
            pooled = [c for c in pooled if not middle[c.name].passed]
        pooled = [c for c in pooled if not c.passed and not _flushed(run, c)]
        worst = [f"{c} (mean of {len(seeds)} draws)" for c in pooled]
        names = [c.name for c in pooled]
        if not names:
            return []
    return worst


def _flushed(run: Run, found: Comparison) -> bool:
    """Whether denormal numbers, rounded or taken for 0, explain an error.

    Each norm multiplies a small input by up to eps^-1/2.
    """
    trial = run.trial
    if trial.dtype != "bfloat16":
        return False
    if run.variant.target not in FLUSHING_TARGETS:
        return found.error < SMALLEST_NORMAL
    lost = FLUSHED
    if any(0 < factor < 1e-20 for _, factor in trial.scales):
        grown = -0.5 * math.log(trial.rms_norm_eps) * _norms(trial) * len(trial.case.problem.program.updates)
        lost = DENORMAL * math.exp(min(grown, MOST_GROWN))
    return found.error < lost


def _of_one_element(run: Run, found: Comparison, truth: Tensor) -> bool:
    """Whether roundings of norms over one element explain an error."""
    trial = run.trial
    one = trial.hidden_size == 1 or (trial.token_mixer == "mlp_t" and trial.length == 1)
    return one and trial.dtype == "float32" and found.error < _norms(trial) * ONE_ELEMENT * float(truth.abs().max())


def _norms(trial: Trial) -> int:
    """The norms of a network."""
    return trial.case.problem.nets[0].block.num_norms * trial.num_layers + trial.final_norm


def _median(draws: list[Comparison]) -> Comparison:
    parts = (median(getattr(c, part) for c in draws) for part in ("error", "eager", "rounding"))
    return Comparison(draws[0].name, *parts)


def judged(name: str, fused: Tensor, eager: Tensor, truth: Tensor) -> Comparison | None:
    """The verdict of the policy, or None where it has none."""
    if truth.isfinite().all() and not _fits(truth, fused):
        return None
    try:
        return compare(name, fused, eager.to(fused.dtype), truth, is_gradient=name.startswith("grad"))
    except MeaninglessComparisonError:
        return None


def _fits(truth: Tensor, fused: Tensor) -> bool:
    """Whether the truth is finite in the dtype of a result; a gradient may be too large for a weight in float16."""
    return bool(truth.to(fused.dtype).isfinite().all())


# ---------------------------------------------------------------- bits


def differences(one: Result, two: Result, what: str, rows: slice | None = None, index: int = 0) -> list[str]:
    """The tensors whose bits differ; of some ``rows`` only states and x, where ``two`` begins at sequence ``index``."""
    wrong = []
    for name, a in named(one):
        if name not in two.outputs and name not in two.gradients:
            continue
        b = named_tensor(two, name)
        if rows is not None:
            if not _of_sequences(name, one):
                continue
            a, b = a[rows], b[rows.start - index : rows.stop - index]
        if not same_bits(a, b):
            far = (a.double() - b.double()).abs().nan_to_num(nan=float("inf")).max().item()
            wrong.append(f"{name}: {what}, up to {far:.3g}")
    return wrong


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bits, or NaN in both."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    equal = a.contiguous().view(whole) == b.contiguous().view(whole)
    return bool((equal | (a.isnan() & b.isnan())).all())


def threads(run: Run) -> list[str]:
    """The number of threads changes nothing."""
    other = 1 if run.variant.threads > 1 else 3
    changed = run.engine(threads=other)
    return differences(run.result, changed, f"{run.variant.threads} and {other} threads differ")


def recompute(run: Run) -> list[str]:
    """Computing the window again gives the bits of keeping it, or a part of it."""
    other = run.variant.recompute is not True
    message = f"recompute={run.variant.recompute} and {other} differ"
    return differences(run.result, run.engine(recompute=other), message)


def alone(run: Run) -> list[str]:
    """A sequence alone gives what it gives in its batch."""
    wrong = []
    for i in {0, run.trial.batch - 1}:
        rows = slice(i, i + 1)
        part = run.engine(take(run.inputs, rows), plain=True)
        wrong += differences(run.result, part, f"sequence {i} of {run.trial.batch} alone differs", rows, i)
    return wrong


def layout(run: Run) -> list[str]:
    """The memory layout of tensors changes nothing."""
    return differences(run.result, run.engine(plain=True), "contiguous tensors differ")


def needs(run: Run) -> list[str]:
    """A gradient is the same whatever other gradients are asked for, and outputs are without any."""
    return [
        *differences(run.result, run.engine(needs=("all",)), "differs when all gradients are asked for"),
        *differences(run.engine(needs=()), run.result, "differs without gradients"),
    ]


def again(run: Run) -> list[str]:
    """A second call gives the same, even after a call on other numbers."""
    return differences(run.result, run.engine(dirty=True), "differs after a call on NaN")


def untouched(run: Run) -> list[str]:
    """The engine does not write the caller's tensors."""
    inputs = run.inputs
    given = {"x": inputs.x, "cos": inputs.cos, "sin": inputs.sin}
    for group, tensors in (("states", inputs.states), ("weights", inputs.weights), ("grads", inputs.grad_states)):
        given.update({f"{group}[{i}]": tensor for i, tensor in enumerate(tensors)})
    problem = inputs.problem
    states = [t.detach().requires_grad_() for t in inputs.states]
    weights = [t.detach().requires_grad_() for t in inputs.weights]
    before = {name: t.clone() for name, t in given.items() if t is not None}
    with applied(run.variant):
        arguments = (inputs.cos, inputs.sin, "cpu", run.variant.recompute)
        out = recursion(problem.program, problem.nets, states, inputs.x, weights, *arguments, segments=inputs.segments)
        pairs = [(z, g) for z, g in zip(out, inputs.grad_states, strict=True) if z.requires_grad]
        if pairs:
            roots, grads = zip(*pairs, strict=True)
            torch.autograd.grad(roots, (*states, *weights), grads, allow_unused=True)
    after = {name: t for name, t in given.items() if t is not None}
    return [f"{name}: written" for name, t in before.items() if not same_bits(t, after[name])]


def packs(run: Run) -> list[str]:
    """Weights written since the last call are used with their new values."""
    inputs = run.inputs
    problem = inputs.problem
    weights = [weight.clone() for weight in inputs.weights]
    arguments = (inputs.cos, inputs.sin, "cpu", run.variant.recompute)
    with applied(run.variant), torch.no_grad():
        recursion(problem.program, problem.nets, inputs.states, inputs.x, weights, *arguments, segments=inputs.segments)
        for weight in weights:
            weight.data.view(-1)[-1] += 0.5
        written = recursion(
            problem.program, problem.nets, inputs.states, inputs.x, weights, *arguments, segments=inputs.segments
        )
        fresh = [weight.clone() for weight in weights]
        right = recursion(
            problem.program, problem.nets, inputs.states, inputs.x, fresh, *arguments, segments=inputs.segments
        )
    one, two = (Result(dict(zip(problem.program.states, out, strict=True)), {}) for out in (written, right))
    return differences(one, two, "stale weights were used")


# ---------------------------------------------------------------- NaN and Inf


def nan(run: Run) -> list[str]:
    """A NaN in one sequence does not reach another's outputs or gradients."""
    return _isolated(run, float("nan"))


def inf(run: Run) -> list[str]:
    """Nor does an Inf, which a norm turns into NaN."""
    return _isolated(run, float("inf"))


def _isolated(run: Run, value: float) -> list[str]:
    batch = run.trial.batch
    if batch < 2 or not run.inputs.states[0].numel():
        return []
    wrong = []
    sick = run.trial.seed % batch
    clean = run.engine(plain=True)
    for group in ("x", "states", "grads"):
        poisoned = poison(run.inputs, group, sick, value, run.trial.seed)
        if poisoned is None:
            continue
        found = run.engine(poisoned, plain=True)
        for rows in (slice(0, sick), slice(sick + 1, batch)):
            if rows.start < rows.stop:
                wrong += differences(clean, found, f"{value} in {group}[{sick}] reaches sequences {rows}", rows)
    return wrong


def poison(inputs: Inputs, group: str, sequence: int, value: float, seed: int) -> Inputs | None:
    """The inputs with one element of one sequence replaced, or None if there is no such tensor."""
    if group == "x":
        return None if inputs.x is None else replace(inputs, x=_poisoned(inputs.x, sequence, value, seed))
    tensors = list(inputs.states if group == "states" else inputs.grad_states)
    chosen = seed % len(tensors)
    tensors[chosen] = _poisoned(tensors[chosen], sequence, value, seed)
    return replace(inputs, states=tuple(tensors)) if group == "states" else replace(inputs, grad_states=tuple(tensors))


def _poisoned(tensor: Tensor, sequence: int, value: float, seed: int) -> Tensor:
    tensor = tensor.clone()
    flat = tensor[sequence].view(-1)
    flat[seed % len(flat)] = value
    return tensor


# ---------------------------------------------------------------- helpers


def take(inputs: Inputs, rows: slice) -> Inputs:
    """Some sequences of a batch."""
    x = None if inputs.x is None else inputs.x[rows]
    segments = None if inputs.segments is None else inputs.segments[rows]
    states, grads = (tuple(t[rows] for t in group) for group in (inputs.states, inputs.grad_states))
    return replace(inputs, states=states, x=x, grad_states=grads, segments=segments)


def named(result: Result) -> list[tuple[str, Tensor]]:
    """Outputs and gradients with their names."""
    return [*result.outputs.items(), *result.gradients.items()]


def named_tensor(result: Result, name: str) -> Tensor:
    return result.outputs[name] if name in result.outputs else result.gradients[name]


def _of_sequences(name: str, result: Result) -> bool:
    """Whether a tensor has an axis of sequences: states, x and their gradients."""
    return name in result.outputs or name == "grad x" or name.removeprefix("grad ") in result.outputs


# policy goes with every run, the others take turns.
CHECKS: dict[str, Callable[[Run], list[str]]] = {
    check.__name__: check
    for check in (policy, threads, recompute, alone, layout, needs, again, untouched, packs, nan, inf)
}
