"""How far implementations are from the float64 reference on the first row of a real batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from trmfast.benchmark.eager import EagerInner
from trmfast.cases import Inputs
from trmfast.models import ACTModel
from trmfast.nn import Net
from trmfast.problem import Problem
from trmfast.testing import MeaninglessComparisonError, Result, compare, run_fused, run_truth

__all__ = ["Accuracy", "measure_accuracy"]

GRADIENT_SEED = 0


@dataclass(frozen=True)
class Accuracy:
    """Errors of one implementation.

    Attributes:
        logits: largest absolute error of a logit.
        gradients: largest error of a gradient of x or of a weight, relative to that gradient's largest element.
        verdict: ``"pass"``, the first tensor outside the tolerance policy, or why there is no verdict.
    """

    logits: float
    gradients: float
    verdict: str

    @property
    def judged(self) -> bool:
        """Whether there is a verdict."""
        return not self.verdict.startswith("no verdict")


def measure_accuracy(
    models: dict[str, ACTModel], batch: dict[str, Tensor], cycles: tuple[int, int] | None = None
) -> dict[str, Accuracy]:
    """Compares models of equal weights with the float64 reference, logits and gradients.

    All models see the whole batch, as in the timing; rows are independent, so the truth of the first row is enough, and
    gradients enter in the first row alone.

    Args:
        models: by name; ``"eager"`` is what the policy measures others by, and ``"trmfast"`` gives the weights.
        batch: their input.
        cycles: (H_cycles, L_cycles) to run, None for the models' own.
    """
    published = {name: (model.H_cycles, model.L_cycles) for name, model in models.items()}
    for model in models.values():
        model.H_cycles, model.L_cycles = cycles or published["eager"]
    fused = models["trmfast"]
    inputs = _real_inputs(fused, batch)
    first = replace(
        inputs,
        states=_first_row(inputs.states),
        x=_first_row((cast(Tensor, inputs.x),))[0],
        grad_states=_first_row(inputs.grad_states),
    )
    truth = run_truth(first)
    results = {
        name: _run_eager_model(model, inputs)
        if isinstance(model.inner, EagerInner)
        else run_fused(inputs, model.backend, recompute=model.config.recompute)
        for name, model in models.items()
    }
    for name, model in models.items():
        model.H_cycles, model.L_cycles = published[name]
    head = fused.inner.lm_head.weight.detach()
    true = _tensors(truth, lambda z: z @ head.double().T, fused)
    found = {name: _tensors(result, fused.inner.lm_head, fused) for name, result in results.items()}
    return {name: _judge(tensors, found["eager"], true) for name, tensors in found.items()}


def _judge(tensors: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor]) -> Accuracy:
    verdict = "pass"
    relative = []
    for name, true in truth.items():
        if name != "logits":
            relative.append(_largest(tensors[name] - true) / max(_largest(true), 1e-30))
        try:
            comparison = compare(name, tensors[name], eager[name], true, is_gradient=name != "logits")
        except MeaninglessComparisonError as error:
            if verdict == "pass":
                verdict = f"no verdict: {error}"
            continue
        if not comparison.passed:
            verdict = f"fail: {comparison}"
    return Accuracy(_largest(tensors["logits"] - truth["logits"]), _worst(relative), verdict)


def _tensors(result: Result, head: Callable[[Tensor], Tensor], model: ACTModel) -> dict[str, Tensor]:
    """The first row's logits, and the gradients of x and the weights."""
    state = next(iter(result.outputs.values()))  # the heads read the first state
    with torch.no_grad():
        logits = head(state[:1])[:, model.inner.puzzle_emb_len :]
    gradients = {
        name: gradient[:1] if name == "grad x" else gradient
        for name, gradient in result.gradients.items()
        if not name.startswith("grad z_")
    }
    return {"logits": logits, **gradients}


def _real_inputs(model: ACTModel, batch: dict[str, Tensor]) -> Inputs:
    """What a supervision step of ``model`` gives to its recursion; random gradients of the first row's states."""
    inner = model.inner
    rows = batch["inputs"].shape[0]
    training = model.training
    model.eval()
    with torch.no_grad():
        x = inner._input_embeddings(batch["inputs"], batch["puzzle_identifiers"])
        carry = inner.reset_carry(torch.ones(rows, dtype=torch.bool), inner.empty_carry(rows))
        states = tuple(state.contiguous() for state in inner._states(carry))
    model.train(training)
    nets = [cast(Net, getattr(inner, name)) for name, _ in inner.family.nets]
    problem = Problem(inner.program, tuple(net.spec for net in nets))
    cos, sin = inner.rotary_emb() if model.config.uses_rope else (None, None)
    generator = torch.Generator().manual_seed(GRADIENT_SEED)
    gradients = []
    for _ in states:
        gradient = torch.zeros_like(x)
        gradient[0] = torch.randn(x.shape[1:], generator=generator).to(x.dtype)
        gradients.append(gradient)
    weights = tuple(weight.detach() for net in nets for weight in net.weights())
    return Inputs(problem, states, x, weights, cos, sin, tuple(gradients))


def _run_eager_model(model: ACTModel, inputs: Inputs) -> Result:
    """As :func:`trmfast.testing.run_eager`, with the networks of an eager model, compiled or not."""
    inner, problem = cast(EagerInner, model.inner), inputs.problem
    x = cast(Tensor, inputs.x).detach().clone().requires_grad_()
    weights = [p for name, _ in inner.family.nets for p in cast(Net, getattr(inner, name)).parameters()]
    out = inner.recur(inputs.states, x)
    pairs = [(z, g) for z, g in zip(out, inputs.grad_states, strict=True) if z.requires_grad]
    roots, gradients = zip(*pairs, strict=True)
    found = torch.autograd.grad(roots, [x, *weights], gradients, allow_unused=True, materialize_grads=True)
    names = ["grad x", *(f"grad {name}" for name in problem.weight_names)]
    outputs = dict(zip(problem.program.states, (z.detach() for z in out), strict=True))
    return Result(outputs, dict(zip(names, found, strict=True)))


def _first_row(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor[:1] for tensor in tensors)


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


def _worst(values: Sequence[float]) -> float:
    """The largest; NaN if one is."""
    return float("nan") if any(v != v for v in values) else max(values)
