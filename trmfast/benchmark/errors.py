"""Errors against float64: recursions and models are judged before they are timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from trmfast.benchmark.eager import EagerInner
from trmfast.benchmark.rivals import Runner, Trained
from trmfast.cases import Inputs
from trmfast.flops import forward_flops
from trmfast.models import ACTModel
from trmfast.nn import Net
from trmfast.problem import Problem
from trmfast.program import RecursionProgram
from trmfast.testing import MeaninglessComparisonError, Result, compare, run_fused, run_truth

__all__ = ["Check", "check_forward", "check_model", "check_training"]

# Above this much work, the float64 truth of a forward pass covers the end of the program only.
TRUTH_FLOPS = 60e9
GRADIENT_SEED = 0


@dataclass(frozen=True)
class Check:
    """Attributes:
    error: largest absolute error of a final state or a logit; for gradients, relative to the largest element.
    updates: over how many updates, counted from the end of the program.
    verdict: ``"pass"``, the first tensor outside the tolerance policy, or why there is no verdict.
    """

    error: float
    updates: int
    verdict: str

    @property
    def judged(self) -> bool:
        """Whether there is a verdict."""
        return not self.verdict.startswith("no verdict")


# ---------------------------------------------------------------- recursions


def check_forward(runners: dict[str, Runner], inputs: Inputs) -> dict[str, Check]:
    """The final states of the first sequence against float64; sequences do not see each other."""
    program = inputs.problem.program
    flops = forward_flops(inputs.problem, 1, inputs.states[0].shape[1])
    count = len(program.updates)
    if flops > TRUTH_FLOPS and all(r.runs(program.last(1)) for r in runners.values()):
        count = max(1, min(2, count), int(count * TRUTH_FLOPS / flops))
    checks = _check_end(runners, inputs, count)
    # If eager PyTorch itself is too far off for a verdict, judge fewer updates.
    for fewer in (2, 1):
        unjudged = {
            name: runner for name, runner in runners.items() if not checks[name].judged and runner.runs(program.last(1))
        }
        if "eager" not in unjudged or fewer >= count:
            break
        checks |= _check_end(unjudged, inputs, fewer)
    return checks


def _check_end(runners: dict[str, Runner], inputs: Inputs, count: int) -> dict[str, Check]:
    checked = inputs.problem.program.last(count)
    true = run_truth(_with_program(_first_sequence(inputs), checked), backward=False).outputs
    dtype = inputs.states[0].dtype
    found = {
        name: {key: z[:1].to(dtype) for key, z in zip(true, runner.forward(checked), strict=True)}
        for name, runner in runners.items()
    }
    return _judge(found, true, count, gradients=False)


def check_training(runners: dict[str, Runner], inputs: Inputs) -> dict[str, Check]:
    """The gradients of x and the weights through the last two updates, seeded in the first sequence alone."""
    program = inputs.problem.program
    count = min(2, len(program.updates))
    checked = program.last(count).with_window("all")
    true = _gradients(run_truth(_with_program(_first_sequence(inputs), checked)))
    only_first = tuple(torch.cat((g[:1], torch.zeros_like(g[1:]))) for g in inputs.grad_states)
    found = {}
    for name, runner in runners.items():
        if isinstance(runner, Trained):
            runner.inputs = replace(inputs, grad_states=only_first)
            runner.training(checked)
            runner.inputs = inputs
            found[name] = {key: g[:1] if key == "grad x" else g for key, g in runner.gradients().items() if key in true}
    return _judge(found, {key: g for key, g in true.items() if key in found["trmfast"]}, count, gradients=True)


def _with_program(inputs: Inputs, program: RecursionProgram) -> Inputs:
    return replace(inputs, problem=replace(inputs.problem, program=program))


# ---------------------------------------------------------------- models


def check_model(
    models: Mapping[str, ACTModel], batch: dict[str, Tensor], cycles: tuple[int, int] | None = None
) -> dict[str, dict[str, Check]]:
    """The logits and gradients of models of equal weights, by step and name.

    All models see the whole batch, as in the timing; sequences are independent, so the truth of the first one is
    enough, and gradients enter in the first one alone.

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
    truth = run_truth(_first_sequence(inputs))
    results = {
        name: _run_eager_model(model, inputs)
        if isinstance(model.inner, EagerInner)
        else run_fused(inputs, model.backend, recompute=model.config.recompute)
        for name, model in models.items()
    }
    for name, model in models.items():
        model.H_cycles, model.L_cycles = published[name]
    count = len(inputs.problem.program.updates)
    weight, skipped = fused.inner.lm_head.weight.detach(), fused.inner.puzzle_emb_len

    def logits(result: Result) -> dict[str, Tensor]:
        state = next(iter(result.outputs.values()))[:1]  # the heads read the first state
        return {"logits": (state @ weight.to(state.dtype).T)[:, skipped:]}

    found = {name: logits(result) for name, result in results.items()}
    gradients = {
        name: {key: g[:1] if key == "grad x" else g for key, g in _gradients(result).items()}
        for name, result in results.items()
    }
    return {
        "forward": _judge(found, logits(truth), count, gradients=False),
        "training": _judge(gradients, _gradients(truth), count, gradients=True),
    }


def _real_inputs(model: ACTModel, batch: dict[str, Tensor]) -> Inputs:
    """What a supervision step of ``model`` gives to its recursion; random gradients of the first sequence's states."""
    inner = model.inner
    rows = batch["inputs"].shape[0]
    training = model.training
    model.eval()
    with torch.no_grad():
        x = inner._input_embeddings(batch["inputs"], batch["puzzle_identifiers"])
        carry = inner.reset_carry(
            torch.ones(rows, dtype=torch.bool, device=x.device), inner.empty_carry(rows, x.device)
        )
        states = tuple(state.contiguous() for state in inner._states(carry))
    model.train(training)
    nets = [cast(Net, getattr(inner, name)) for name in inner.net_names]
    problem = Problem(inner.program, tuple(net.spec for net in nets))
    cos, sin = inner.rotary_emb() if model.config.uses_rope else (None, None)
    generator = torch.Generator().manual_seed(GRADIENT_SEED)
    gradients = []
    for _ in states:
        gradient = torch.zeros_like(x)
        gradient[0] = torch.randn(x.shape[1:], generator=generator).to(x.device, x.dtype)
        gradients.append(gradient)
    weights = tuple(weight.detach() for net in nets for weight in net.weights())
    return Inputs(problem, states, x, weights, cos, sin, tuple(gradients))


def _run_eager_model(model: ACTModel, inputs: Inputs) -> Result:
    """As :func:`trmfast.testing.run_eager`, with the networks of an eager model, compiled or not."""
    inner, problem = cast(EagerInner, model.inner), inputs.problem
    x = cast(Tensor, inputs.x).detach().clone().requires_grad_()
    out = inner.recur(inputs.states, x)
    weights = [p for net in inner.stacks.nets for p in net.parameters()]
    pairs = [(z, g) for z, g in zip(out, inputs.grad_states, strict=True) if z.requires_grad]
    roots, gradients = zip(*pairs, strict=True)
    found = torch.autograd.grad(roots, [x, *weights], gradients, allow_unused=True, materialize_grads=True)
    names = ["grad x", *(f"grad {name}" for name in problem.weight_names)]
    outputs = dict(zip(problem.program.states, (z.detach() for z in out), strict=True))
    return Result(outputs, dict(zip(names, found, strict=True)))


# ---------------------------------------------------------------- both


def _judge(
    found: dict[str, dict[str, Tensor]], true: dict[str, Tensor], updates: int, gradients: bool
) -> dict[str, Check]:
    """Judges each implementation by the tolerance policy, with eager PyTorch as the yardstick."""
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
        checks[name] = Check(worst, updates, verdict)
    return checks


def _gradients(result: Result) -> dict[str, Tensor]:
    """Those of x and the weights."""
    return {name: g for name, g in result.gradients.items() if not name.startswith("grad z_")}


def _first_sequence(inputs: Inputs) -> Inputs:
    def cut(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(tensor[:1] for tensor in tensors)

    x = None if inputs.x is None else inputs.x[:1]
    return replace(inputs, states=cut(inputs.states), x=x, grad_states=cut(inputs.grad_states))
