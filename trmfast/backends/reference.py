"""The reference as a backend: every device, every float dtype, the recompute structure of the fast backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trmfast.backends.call import BackwardCall, ForwardCall
from trmfast.program import Update
from trmfast.reference import enter, inject, run_net, wide_dtype
from trmfast.spec import NetSpec

__all__ = ["ReferenceBackend"]


class ReferenceBackend:
    """Runs the interpreter of :mod:`trmfast.reference`; saves the input of each grad update and recomputes the rest."""

    name = "reference"
    device_types: tuple[str, ...] = ()
    slow_device_types: tuple[str, ...] = ()
    keeps_updates_whole = False

    def available(self) -> str | None:
        return None

    def supports(self, *_: Any) -> str | None:
        return None

    def declines(self, *_: Any) -> bool:
        return False

    def pair_bytes(self, *_: Any) -> int:
        return 0

    def output_bytes(self, *_: Any) -> int:
        return 0

    def forward(self, call: ForwardCall) -> tuple[list[Tensor], Tensor, Tensor]:
        problem, first = call.problem, call.states[0]
        saved = first.new_empty((problem.num_grad_updates if call.save else 0, *first.shape))
        cast = list(call.weights) if call.int8 else [w.to(first.dtype) for w in call.weights]
        current = list(call.states)
        slot = 0
        with _plain(first):
            for update in problem.program.updates:
                net = problem.nets[update.net]
                weights = problem.net_weights(cast, update.net)
                total, h = enter(net, update, current, call.x, weights, call.int8)
                if call.save and update.grad:
                    saved[slot] = 0 if total is None else total
                    slot += 1
                current[update.dst] = run_net(net, h, weights, call.cos, call.sin, call.int8, call.segments)
        # A state that no update writes is still the caller's tensor.
        out = [z.clone() if z is state else z for z, state in zip(current, call.states, strict=True)]
        return out, saved, saved.new_empty(0, dtype=torch.uint8)

    def backward(self, call: BackwardCall) -> tuple[list[Tensor | None], Tensor | None, list[Tensor | None]]:
        problem, saved = call.problem, call.saved
        dtype, wide = saved.dtype, wide_dtype(saved.dtype)
        needs_input, _ = problem.live_updates(call.needs_states, call.needs_x, call.needs_weights)
        cast = [w.to(dtype) for w in call.weights]
        gs: list[Tensor | None] = [g.to(wide, copy=True) for g in call.grad_states]  # added to in place
        gx: Tensor | None = None
        gw: list[Tensor | None] = [None] * len(call.weights)
        slot, updates = problem.num_grad_updates, tuple(problem.program.updates)
        with _plain(saved):
            for position in reversed(range(len(needs_input))):
                update = updates[position]
                g, gs[update.dst] = gs[update.dst], None
                if not update.grad:
                    continue
                slot -= 1
                part = problem.weight_slices[update.net]
                if g is None:
                    continue
                net = problem.nets[update.net]
                if net.injection == "add":
                    needs = needs_input[position], False
                else:
                    needs = bool(update.sources), call.needs_x and update.inject_x
                dh, dx, dw = _vjp(
                    net,
                    update,
                    saved[slot],
                    call.x,
                    cast[part],
                    call.cos,
                    call.sin,
                    g.to(dtype),
                    *needs,
                    call.needs_weights[part],
                    call.segments,
                )
                for i, d in zip(range(part.start, part.stop), dw, strict=True):
                    gw[i] = _add(gw[i], d, wide)
                for s in update.sources:
                    gs[s] = _add(gs[s], dh, wide)
                if update.inject_x:
                    gx = _add(gx, dh if net.injection == "add" else dx, wide)
        return gs, gx, gw


def _vjp(
    net: NetSpec,
    update: Update,
    total: Tensor,
    x: Tensor | None,
    weights: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    g: Tensor,
    needs_total: bool,
    needs_x: bool,
    needs_weights: Sequence[bool],
    segments: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Gradients of <net(h), g> by the saved sum, x and weights as needed, by autograd over a recomputed application."""
    total = total.detach().requires_grad_(needs_total)
    x = None if x is None else x.detach().requires_grad_(needs_x)
    used = [w.detach().requires_grad_(need) for w, need in zip(weights, needs_weights, strict=True)]
    leaves = [leaf for leaf in (total, x, *used) if leaf is not None and leaf.requires_grad]
    if not leaves:
        return None, None, [None] * len(used)
    # The dispatcher skips autograd inside an operator; this re-enables it, for these tensors only.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False), torch.enable_grad():
        h = total
        if net.injection != "add":
            h = inject(net, total if update.sources else None, x if update.inject_x else None, used[-1])
        out = run_net(net, h, used, cos, sin, segments=segments)
        # An update without sources uses no weight of an injection.
        grads = torch.autograd.grad(out, leaves, g, allow_unused=True) if out.requires_grad else [None] * len(leaves)
        found = iter(grads)
    dtotal, dx = next(found) if needs_total else None, next(found) if needs_x else None
    return dtotal, dx, [next(found) if need else None for need in needs_weights]


def _add(total: Tensor | None, term: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """total + term in the wide dtype, in place from the second term on; None stands for zero."""
    if term is None:
        return total
    if total is None:
        return term.to(dtype, copy=True)
    return total.add_(term)


def _plain(tensor: Tensor) -> Any:
    """Autocast off: the dtypes were settled before the operator was called."""
    return torch.autocast(tensor.device.type, enabled=False)
