"""The operators under autograd: the gradient of a recursion, gradients in batches, and no second derivative.

Uses the operators that :mod:`trmfast.ops` defines, and is registered there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from trmfast.problem import Problem
from trmfast.transforms import refuse_tangents

__all__ = [
    "LAYOUT",
    "TrmfastRecursion",
    "batched_backward",
    "batched_backward_of_autograd",
    "recursion_with_autograd",
    "refuse_double_backward",
    "run_below_autograd",
]


LAYOUT = 2
"""The number of the form of what the operator returns.  It is among the arguments of every traced call, so that what
compilers keep on disk for another form is not found, and an exported program of another form is refused."""


class TrmfastRecursion(torch.autograd.Function):
    """The operator and its gradient; the name is what profilers show."""

    @staticmethod
    def forward(
        ctx: Any,
        keys: Any,
        settings: tuple[Any, ...],
        num_states: int,
        x: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        segments: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        states, weights = list(tensors[:num_states]), list(tensors[num_states:])
        *called, layout = settings
        out, saved, kept = _below_autograd(keys, states, x, weights, cos, sin, *called, segments, layout)
        program, nets, backend, save = settings[:4]
        problem = Problem.from_keys(program, tuple(nets))
        _, live = problem.live_updates(
            [s.requires_grad for s in states],
            x is not None and x.requires_grad,
            [w.requires_grad for w in weights],
        )
        dead = [state for state, alive in zip(out, live, strict=True) if not alive]
        ctx.mark_non_differentiable(saved, kept, *dead)
        # Undefined gradients stay None: zeros for `saved` alone would cost as much memory as the whole window.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(saved, kept, cos, sin, segments, x if problem.backward_reads_x else None, *weights)
        ctx.call = (program, nets, backend, save, num_states)
        return (*out, saved, kept)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        program, nets, backend, save, count = ctx.call
        saved, kept, cos, sin, segments, x, *weights = ctx.saved_tensors
        if not save and Problem.from_keys(program, tuple(nets)).num_grad_updates:
            raise RuntimeError("trmfast::recursion was called with save=False: it kept nothing to differentiate")
        needs = ctx.needs_input_grad
        needs_x, needs_tensors = needs[3], needs[7:]
        grads = [saved.new_zeros(saved.shape[1:]) if g is None else g for g in outputs[:count]]
        results = torch.ops.trmfast.recursion_backward.default(
            *(grads, saved, kept, weights, cos, sin, program, nets, backend),
            *(list(needs_tensors[:count]), needs_x, list(needs_tensors[count:]), segments, x),
        )
        gx = results.pop(count) if needs_x else None
        if not needs_x:
            results.pop(count)
        found = [g if need else None for g, need in zip(results, needs_tensors, strict=True)]
        return None, None, None, gx, None, None, None, *found


def recursion_with_autograd(
    keys: Any,
    states: list[Tensor],
    x: Tensor | None,
    weights: list[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    *rest: Any,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The operator at the autograd key: recorded if anything requires a gradient, else passed on."""
    # The dispatcher leaves out arguments that have their defaults.
    settings, segments = (*rest[:5], rest[5] if len(rest) > 5 else False), rest[6] if len(rest) > 6 else None
    layout = rest[7] if len(rest) > 7 else LAYOUT
    tensors = (*states, *weights) if x is None else (*states, x, *weights)
    refuse_tangents(tensors)
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        return _below_autograd(keys, states, x, weights, cos, sin, *settings, segments, layout)
    *out, saved, kept = TrmfastRecursion.apply(
        keys, (*settings, layout), len(states), x, cos, sin, segments, *states, *weights
    )
    return out, saved, kept


def run_below_autograd(*arguments: Any) -> Any:
    """The operator for a caller who knows that there is nothing to record and no dual number.

    Tracers and modes of PyTorch see it as ever.  Only the function at the autograd key is left out: 13 us of the 89 of
    a small call under torch.no_grad().
    """
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.trmfast.recursion.default(*arguments)


def _below_autograd(keys: Any, *arguments: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.trmfast.recursion.default.redispatch(keys & torch._C._after_autograd_keyset, *arguments)


def batched_backward(info: Any, in_dims: tuple[Any, ...], grad_states: list[Tensor], *rest: Any) -> tuple[Any, Any]:
    """Several gradients of one call, under torch.func.vmap: computed one after the other."""
    batched, *others = in_dims
    if any(dim is not None for dim in tree_leaves(others)):
        raise RuntimeError("trmfast::recursion_backward: got a batch of calls, accepted are gradients of one call")
    results = _one_by_one(
        [g.unsqueeze(0) if dim is None else g.movedim(dim, 0) for g, dim in zip(grad_states, batched, strict=True)],
        info.batch_size,
        rest,
    )
    return results, [0] * len(results)


def batched_backward_of_autograd(grad_states: list[Tensor], *rest: Any) -> list[Tensor]:
    """The same for ``is_grads_batched``, which uses its own vmap."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    grads = [torch._remove_batch_dim(g, level, 1, 0) for g in grad_states]
    results = _one_by_one(grads, max(len(g) for g in grads), rest)
    return [torch._add_batch_dim(result, 0, level) for result in results]


def _one_by_one(grad_states: list[Tensor], count: int, rest: tuple[Any, ...]) -> list[Tensor]:
    """grad_states: [count or 1, B, L, D] each."""
    slices = [
        torch.ops.trmfast.recursion_backward.default([g[i if len(g) > 1 else 0] for g in grad_states], *rest)
        for i in range(count)
    ]
    return [torch.stack(parts) for parts in zip(*slices, strict=True)]


def refuse_double_backward(*_: Any) -> Any:
    """The gradient of the backward operator."""
    raise RuntimeError("trmfast::recursion: double backward is not supported, the backward pass is differentiable once")
