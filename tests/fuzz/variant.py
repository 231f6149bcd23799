"""How the engine runs a trial, and one run of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from torch import Tensor

from trmfast import recursion
from trmfast.backends import cpu
from trmfast.budget import Recompute
from trmfast.cases import Inputs
from trmfast.testing import Result

from .layouts import lay_out
from .trial import Trial, _Plain

__all__ = ["Variant", "run_engine", "targets_for"]

NAN = float("nan")


@dataclass(frozen=True, repr=False)
class Variant(_Plain):
    """A way to run a trial; none may change a result beyond rounding, and most not at all.

    Attributes:
        target: instruction set.
        threads: as in ``torch.set_num_threads``.
        recompute: as in ``trmfast.recursion``.
        store: bytes of the store of backward, 0 for the engine's own size; small ones are filled many times.
        dirty: whether a call on NaN goes first, which leaves NaN in all memory that the engine uses again.
    """

    target: str = "portable"
    threads: int = 1
    recompute: Recompute = True
    store: int = 0
    dirty: bool = False


def targets_for(dtype: torch.dtype) -> list[str]:
    """The targets that run here and compute in a dtype themselves."""
    compiled = set() if cpu._cpu is None else set(cpu._cpu.compiled_pairs())
    return [t for t, reason in cpu.targets().items() if reason is None and (t, cpu.ELEMENTS[dtype]) in compiled]


@contextmanager
def applied(variant: Variant) -> Iterator[None]:
    threads, own = torch.get_num_threads(), cpu.store_bytes
    torch.set_num_threads(variant.threads)
    try:
        with (
            cpu.force_target(variant.target),
            patch.object(cpu, "store_bytes", lambda problem: variant.store or own(problem)),
        ):
            yield
    finally:
        torch.set_num_threads(threads)


def run_engine(
    trial: Trial, inputs: Inputs, variant: Variant, *, needs: Sequence[str] | None = None, plain: bool = False
) -> Result:
    """Final states and the gradients that are needed.

    Args:
        trial: which gradients are needed, and how tensors lie.
        inputs: the tensors, of which copies are used.
        variant: how the engine runs.
        needs: other needs than the trial's.
        plain: contiguous tensors instead of the trial's layouts.
    """
    if needs is not None:
        trial = replace(trial, needs=tuple(needs))
    if plain:
        trial = replace(trial, layouts=())
    with applied(variant):
        if variant.dirty:
            _run(trial, _spoilt(inputs), variant)
        return _run(trial, inputs, variant)


def _spoilt(inputs: Inputs) -> Inputs:
    """NaN in place of all numbers."""

    def nan(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(torch.full_like(tensor, NAN) for tensor in tensors)

    x = None if inputs.x is None else torch.full_like(inputs.x, NAN)
    return replace(
        inputs, states=nan(inputs.states), x=x, weights=nan(inputs.weights), grad_states=nan(inputs.grad_states)
    )


def _run(trial: Trial, inputs: Inputs, variant: Variant) -> Result:
    def leaf(tensor: Tensor, group: str) -> Tensor:
        return lay_out(tensor, trial.layout(group)).detach().requires_grad_(trial.needed(group))

    problem = inputs.problem
    states = [leaf(state, "states") for state in inputs.states]
    x = None if inputs.x is None else leaf(inputs.x, "x")
    weights = [leaf(weight, "weights") for weight in inputs.weights]
    cos, sin = (None if t is None else lay_out(t, trial.layout("tables")) for t in (inputs.cos, inputs.sin))
    arguments = (states, x, weights, cos, sin, "cpu", variant.recompute)
    out = recursion(problem.program, problem.nets, *arguments, segments=inputs.segments)
    names = problem.program.states
    leaves = {f"grad {name}": state for name, state in zip(names, states, strict=True)}
    if x is not None:
        leaves["grad x"] = x
    leaves.update({f"grad {name}": weight for name, weight in zip(problem.weight_names, weights, strict=True)})
    leaves = {name: tensor for name, tensor in leaves.items() if tensor.requires_grad}
    pairs = [
        (z, lay_out(g, trial.layout("grads"))) for z, g in zip(out, inputs.grad_states, strict=True) if z.requires_grad
    ]
    gradients: dict[str, Tensor] = {}
    if leaves:
        roots, grads = zip(*pairs, strict=True) if pairs else ((), ())
        found = torch.autograd.grad(roots, list(leaves.values()), grads, allow_unused=True, materialize_grads=True)
        gradients = dict(zip(leaves, found, strict=True))
    return Result(dict(zip(names, (z.detach() for z in out), strict=True)), gradients)
