"""Tiny recursions as calls of ``trmfast.recursion`` and as arguments of its operator."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trmfast import recursion
from trmfast.cases import Case, Inputs, make_case, make_inputs

TINY: dict[str, Any] = {
    "batch": 2,
    "length": 3,
    "hidden_size": 4,
    "num_heads": 2,
    "num_layers": 1,
    "intermediate_size": 3,
}


def tiny(model: str, window: Any = "last_cycle", **options: Any) -> Case:
    return make_case(model, model, H_cycles=2, L_cycles=1, window=window, **{**TINY, **options})


def call(inputs: Inputs, backend: str = "reference", **changes: Any) -> tuple[Tensor, ...]:
    """recursion() on inputs, some arguments replaced."""
    arguments: dict[str, Any] = {
        "program": inputs.problem.program,
        "nets": inputs.problem.nets,
        "states": inputs.states,
        "x": inputs.x,
        "weights": inputs.weights,
        "cos": inputs.cos,
        "sin": inputs.sin,
        "backend": backend,
    }
    return recursion(**{**arguments, **changes})


def leaves(tensors: Any) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


def forward_sample(case: Case, backend: str, requires_grad: bool, save: bool, budget: int = 0) -> tuple[Any, ...]:
    """The arguments of ``torch.ops.trmfast.recursion`` for a case, up to the budget."""
    inputs = make_inputs(case)

    def take(tensors: Any) -> list[Tensor]:
        return [tensor.clone().requires_grad_(requires_grad) for tensor in tensors]

    assert inputs.x is not None
    program, nets = case.problem.program.key, [net.key for net in case.problem.nets]
    states, (x,), weights = take(inputs.states), take([inputs.x]), take(inputs.weights)
    return states, x, weights, inputs.cos, inputs.sin, program, nets, backend, save, budget
