"""The tolerance policy: how much a fused result may differ from the truth.

* truth: the reference in float64, from the same states and x (rounded to the compute dtype) and the same weights;
* eager: the reference in the compute dtype, what plain PyTorch gives;
* fused: the operator, with some backend.

A fused tensor passes if ``max|fused - truth| <= 2 * max|eager - truth| + rounding``, where ``rounding`` is what the
best possible result loses by being stored in its dtype, ``max|truth.to(dtype) - truth|``: at most half a unit in the
last place of the largest element.  This is the rule of flash-attention's tests with a smaller rounding term.

A small case is drawn several times, and the means over the draws are compared: the largest error of a single draw is
a matter of luck on both sides.  (Measured in float32 over 1,520 tensors, five draws each, with a backend whose errors
are eager's in the median: single draws are outside in 1 of 90 cases, the largest of five in 1 of 76, the mean of five
in none.)  A result that is ten times as far off as eager in one of five draws is not averaged away.

The rule proves nothing where eager itself is far off, so such a comparison is refused: eager's error must be below 0.1
for states, which the last norm keeps of order 1, and below a tenth of the largest element for gradients, whose scale is
that of the loss.  One cycle, or a smaller ``weight_scale``, makes a comparison in bfloat16 meaningful.  A smaller scale
also tames chaos in float32: a small recursion with full weights amplifies rounding errors by a factor that differs from
draw to draw, so that the errors of two equally good results do too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor, nn

from trmfast.budget import Recompute
from trmfast.cases import CHOICES, PUBLISHED, SMALL, Case, Inputs, make_case, make_inputs
from trmfast.models.inner import Inner
from trmfast.ops import recursion
from trmfast.reference import run_program

__all__ = [
    "CHOICES",
    "PUBLISHED",
    "SMALL",
    "Case",
    "Comparison",
    "Draw",
    "Inputs",
    "MeaninglessComparisonError",
    "Result",
    "carry_fidelity",
    "check_case",
    "check_draws",
    "compare",
    "compare_results",
    "default_weight_scale",
    "draw_case",
    "make_case",
    "make_inputs",
    "pool",
    "require",
    "run_eager",
    "run_fused",
    "run_truth",
]

FACTOR = 2.0
LARGEST_EAGER_ERROR = 0.1


class MeaninglessComparisonError(Exception):
    """Eager's own error is so large that a pass would prove nothing."""


@dataclass(frozen=True)
class Comparison:
    """One tensor against the truth; errors are largest absolute differences.

    Attributes:
        name: which tensor, for example ``z_H`` or ``grad f.layers.0.mlp.down_proj.weight``.
        error: of the fused result; NaN if it holds one.
        eager: of eager PyTorch in the same dtype.
        rounding: of the truth itself, stored in the dtype of the fused result.
    """

    name: str
    error: float
    eager: float
    rounding: float

    @property
    def bound(self) -> float:
        """The largest error that passes."""
        return FACTOR * self.eager + self.rounding

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # False for NaN

    def __str__(self) -> str:
        sign = "<=" if self.passed else "exceeds"
        return f"{self.name}: error {self.error:.3g} {sign} {self.bound:.3g} (eager {self.eager:.3g})"


def compare(name: str, fused: Tensor, eager: Tensor, truth: Tensor, is_gradient: bool = False) -> Comparison:
    """Compares one tensor.

    Args:
        name: what to call it.
        fused, eager: the results in the compute dtype.
        truth: the result in float64.
        is_gradient: whether eager's error is judged relative to the largest element of the truth.

    Raises:
        MeaninglessComparisonError: eager's error is 0.1 or more, is NaN, or the compute dtype is float64.
        ValueError: the shapes differ, or the dtypes of fused and eager.
    """
    if fused.shape != truth.shape or eager.shape != truth.shape or fused.dtype != eager.dtype:
        got = f"{list(fused.shape)} {fused.dtype} and {list(eager.shape)} {eager.dtype}"
        raise ValueError(f"{name}: got {got}, accepted are two tensors of shape {list(truth.shape)} and one dtype")
    if eager.dtype == torch.float64:
        raise MeaninglessComparisonError(f"{name}: float64 is the truth itself, check it with gradcheck")
    eager_error = _largest(eager.double() - truth)
    scale = _largest(truth) if is_gradient else 1.0
    # A gradient of zeros has no scale; eager must agree that it is zero.
    if not (eager_error < LARGEST_EAGER_ERROR * scale or eager_error == scale == 0):
        raise MeaninglessComparisonError(
            f"{name}: eager is off by {eager_error:.3g} at scale {scale:.3g}, accepted is less than a tenth; "
            "run fewer cycles or scale the weights down"
        )
    rounding = _largest(truth.to(fused.dtype).double() - truth)
    return Comparison(name, _largest(fused.double() - truth), eager_error, rounding)


def require(comparisons: Sequence[Comparison]) -> None:
    """Raises an AssertionError that lists every comparison that did not pass, or that there is none."""
    if not comparisons:
        raise AssertionError("nothing was compared")
    failed = [str(comparison) for comparison in comparisons if not comparison.passed]
    if failed:
        raise AssertionError(f"{len(failed)} of {len(comparisons)} outside the policy: " + "; ".join(failed))


@dataclass(frozen=True)
class Result:
    """The final states of a run by name, and the gradients of states, x and weights by name (``grad x``)."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


def run_truth(inputs: Inputs, backward: bool = True) -> Result:
    """The reference in float64."""
    return _run(_reference(inputs), inputs, torch.float64, backward)


def run_eager(inputs: Inputs, backward: bool = True) -> Result:
    """The reference in the compute dtype, differentiated by autograd."""
    return _run(_reference(inputs), inputs, inputs.states[0].dtype, backward)


def run_fused(inputs: Inputs, backend: str, backward: bool = True, recompute: Recompute = True) -> Result:
    """The operator, with one backend; recompute as in :func:`trmfast.recursion`."""
    problem = inputs.problem

    def forward(states: Sequence[Tensor], x: Tensor | None, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        cos, sin = inputs.cos, inputs.sin
        segments = inputs.segments
        return recursion(
            problem.program, problem.nets, states, x, weights, cos, sin, backend, recompute, segments=segments
        )

    return _run(forward, inputs, inputs.states[0].dtype, backward)


def compare_results(fused: Result, eager: Result, truth: Result) -> list[Comparison]:
    """Compares every output and every gradient; raises as :func:`compare` does."""
    comparisons = [compare(name, fused.outputs[name], eager.outputs[name], t) for name, t in truth.outputs.items()]
    for name, t in truth.gradients.items():
        comparisons.append(compare(name, fused.gradients[name], eager.gradients[name], t, is_gradient=True))
    return comparisons


def pool(draws: Sequence[Sequence[Comparison]]) -> list[Comparison]:
    """The comparisons of several draws of one case as one: the mean of each error, tensor by tensor."""
    return [
        Comparison(
            tensors[0].name,
            fmean(c.error for c in tensors),
            fmean(c.eager for c in tensors),
            fmean(c.rounding for c in tensors),
        )
        for tensors in zip(*draws, strict=True)
    ]


def default_weight_scale(dtype: torch.dtype) -> float:
    """The ``weight_scale`` at which whole programs of small cases are comparable in a compute dtype."""
    return 0.5 if dtype.itemsize == 2 else 0.7


@dataclass(frozen=True)
class Draw:
    """The inputs of one draw of a case, with the results of eager PyTorch and the truth."""

    inputs: Inputs
    eager: Result
    truth: Result


def draw_case(
    case: Case,
    dtype: torch.dtype,
    *,
    backward: bool = True,
    seeds: Sequence[int] = range(5),
    device: torch.device | str = "cpu",
    weight_scale: float | None = None,
) -> list[Draw]:
    """What :func:`check_draws` compares a backend with; the arguments are those of :func:`check_case`."""
    if weight_scale is None:
        weight_scale = default_weight_scale(dtype)
    drawn = [make_inputs(case, dtype, seed, device, weight_scale) for seed in seeds]
    return [Draw(inputs, run_eager(inputs, backward), run_truth(inputs, backward)) for inputs in drawn]


def check_draws(draws: Sequence[Draw], backend: str, *, backward: bool = True) -> list[Comparison]:
    """Runs a backend on draws of one case; compares and raises as :func:`check_case` does."""
    return pool([compare_results(run_fused(d.inputs, backend, backward), d.eager, d.truth) for d in draws])


def check_case(
    case: Case,
    dtype: torch.dtype,
    backend: str,
    *,
    backward: bool = True,
    seeds: Sequence[int] = range(5),
    device: torch.device | str = "cpu",
    weight_scale: float | None = None,
) -> list[Comparison]:
    """Runs a case three ways and compares every output and, if ``backward``, every gradient.

    Args:
        case, dtype, backend: the case, its compute dtype and the backend.
        backward: whether gradients are compared too.
        seeds: one for each draw.
        device: as in :func:`make_inputs`.
        weight_scale: as in :func:`make_inputs`; by default :func:`default_weight_scale`.

    Raises:
        MeaninglessComparisonError: eager's own error is too large for a verdict.
        ValueError: the backend refuses the case.
    """
    draws = draw_case(case, dtype, backward=backward, seeds=seeds, device=device, weight_scale=weight_scale)
    return check_draws(draws, backend, backward=backward)


@torch.inference_mode()
def carry_fidelity(
    model: nn.Module, batch: Mapping[str, Tensor], dtype: str, steps: int | None = None
) -> list[dict[str, float]]:
    """How close a compute dtype stays to float32 over the supervision steps of a trained model.

    Both paths start from the initial states and each goes on with its own carry, so errors add up as in use.

    Args:
        model: a model of ``trmfast.models``, in any dtype and wrapper; it is not changed.
        batch: ``inputs`` [B, S] and perhaps ``puzzle_identifiers`` [B].
        dtype: a ``forward_dtype``, such as ``"int8"``.
        steps: supervision steps, by default the model's ``halt_max_steps``.

    Returns:
        For each step the cosine of every state, by name, with its float32 twin: over the L * D values of a sequence,
        averaged over the batch.
    """
    (found,) = (m for m in model.modules() if isinstance(m, Inner))
    count = found.config.halt_max_steps if steps is None else steps
    paths = []
    for name in ("float32", dtype):
        inner = Inner(cast(Any, type(found.config)(**{**asdict(found.config), "forward_dtype": name})), found.family)
        inner.load_state_dict(found.state_dict())
        inner.eval()
        rows = len(batch["inputs"])
        carry = inner.reset_carry(torch.ones(rows, dtype=torch.bool), inner.empty_carry(rows))
        trajectory = []
        for _ in range(count):
            carry, _, _ = inner(carry, dict(batch))
            trajectory.append([z.float().flatten(1) for z in inner._states(carry)])
        paths.append(trajectory)
    return [
        {
            name: nn.functional.cosine_similarity(z, other, dim=1).mean().item()
            for name, z, other in zip(found.state_names, exact, narrow, strict=True)
        }
        for exact, narrow in zip(*paths, strict=True)
    ]


Forward = Callable[[Sequence[Tensor], "Tensor | None", Sequence[Tensor]], tuple[Tensor, ...]]


def _reference(inputs: Inputs) -> Forward:
    return lambda states, x, weights: run_program(
        inputs.problem, states, x, weights, inputs.cos, inputs.sin, segments=inputs.segments
    )


def _run(forward: Forward, inputs: Inputs, dtype: torch.dtype, backward: bool) -> Result:
    """Runs forward on fresh leaves; the truth gets float64 weights, everything else the float32 weights."""
    states = [state.to(dtype, copy=True).requires_grad_(backward) for state in inputs.states]
    x = None if inputs.x is None else inputs.x.to(dtype, copy=True).requires_grad_(backward)
    held = torch.promote_types(dtype, torch.float32)
    weights = [weight.to(held, copy=True).requires_grad_(backward) for weight in inputs.weights]
    with torch.set_grad_enabled(backward):
        outputs = forward(states, x, weights)
    names = inputs.problem.program.states
    gradients: dict[str, Tensor] = {}
    if backward:
        leaves = dict(zip((f"grad {name}" for name in names), states, strict=True))
        if x is not None:
            leaves["grad x"] = x
        leaves.update(zip((f"grad {name}" for name in inputs.problem.weight_names), weights, strict=True))
        # A state without gradient is not part of the graph.
        pairs = [(out, g.to(dtype)) for out, g in zip(outputs, inputs.grad_states, strict=True) if out.requires_grad]
        roots, grads = zip(*pairs, strict=True) if pairs else ((), ())
        found = torch.autograd.grad(roots, list(leaves.values()), grads, allow_unused=True, materialize_grads=True)
        gradients = dict(zip(leaves, found, strict=True))
    return Result(dict(zip(names, (out.detach() for out in outputs), strict=True)), gradients)


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0
