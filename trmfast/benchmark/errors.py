"""The errors of recursions against float64: trmfast and its rivals before they are timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trmfast.benchmark.rivals import Runner, Trained
from trmfast.cases import Inputs
from trmfast.flops import forward_flops
from trmfast.program import RecursionProgram
from trmfast.testing import MeaninglessComparisonError, compare, run_truth

__all__ = ["Check", "check_forward", "check_training"]

# Above this much work, the float64 truth of a forward pass covers the end of the program only.
TRUTH_FLOPS = 60e9


@dataclass(frozen=True)
class Check:
    """Attributes:
    error: largest absolute error of a final state; for gradients, relative to the largest element.
    updates: over how many updates, counted from the end of the program.
    verdict: ``"pass"``, the first tensor outside the tolerance policy, or why there is no verdict.
    """

    error: float
    updates: int
    verdict: str


def check_forward(runners: dict[str, Runner], inputs: Inputs) -> dict[str, Check]:
    """The final states of the first sequence against float64; sequences do not see each other."""
    program = inputs.problem.program
    flops = forward_flops(inputs.problem, 1, inputs.states[0].shape[1])
    count = len(program.updates)
    if flops > TRUTH_FLOPS and all(r.runs(_end(program, 1)) for r in runners.values()):
        count = max(1, min(2, count), int(count * TRUTH_FLOPS / flops))
    checks = _check_end(runners, inputs, count)
    # If eager PyTorch itself is too far off for a verdict, judge fewer updates.
    for fewer in (2, 1):
        unjudged = {
            name: runner
            for name, runner in runners.items()
            if checks[name].verdict.startswith("no verdict") and runner.runs(_end(program, 1))
        }
        if "eager" not in unjudged or fewer >= count:
            break
        checks |= _check_end(unjudged, inputs, fewer)
    return checks


def _check_end(runners: dict[str, Runner], inputs: Inputs, count: int) -> dict[str, Check]:
    checked = _end(inputs.problem.program, count)
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
    checked = _end(program, count).with_window("all")
    first = _first_sequence(inputs)
    truth = run_truth(_with_program(first, checked))
    true = {name: g for name, g in truth.gradients.items() if not name.startswith("grad z")}
    only_first = tuple(torch.cat((g[:1], torch.zeros_like(g[1:]))) for g in inputs.grad_states)
    found = {}
    for name, runner in runners.items():
        if isinstance(runner, Trained):
            runner.inputs = replace(inputs, grad_states=only_first)
            runner.training(checked)
            runner.inputs = inputs
            found[name] = {key: g[:1] if key == "grad x" else g for key, g in runner.gradients().items() if key in true}
    return _judge(found, {key: g for key, g in true.items() if key in found["trmfast"]}, count, gradients=True)


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
