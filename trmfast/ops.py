"""The operators: one for a whole recursion forward, one for its backward, and the function that users call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from trmfast.autograd import (
    LAYOUT,
    batched_backward,
    batched_backward_of_autograd,
    recursion_with_autograd,
    refuse_double_backward,
    run_below_autograd,
)
from trmfast.backends import BackwardCall, ForwardCall, Kept, select, what_fits
from trmfast.budget import DEFAULT, Recompute, budget_of
from trmfast.flops import backward_flops, forward_flops
from trmfast.problem import Problem, check_segments
from trmfast.program import RecursionProgram
from trmfast.reference import wide_dtype
from trmfast.spec import NetSpec
from trmfast.transforms import inside_transform, refuse_onnx, run_plainly

__all__ = ["recursion"]

_library = torch.library.Library("trmfast", "DEF")
_library.define(
    "recursion(Tensor[] states, Tensor? x, Tensor[] weights, Tensor? cos, Tensor? sin, "
    "str program, str[] nets, str backend, bool save, int budget, bool int8=False, Tensor? segments=None, "
    "int layout=0) "
    "-> (Tensor[] states, Tensor saved, Tensor kept)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "recursion_backward(Tensor[] grad_states, Tensor saved, Tensor kept, Tensor[] weights, Tensor? cos, Tensor? sin, "
    "str program, str[] nets, str backend, bool[] needs_states, bool needs_x, bool[] needs_weights, "
    "Tensor? segments=None, Tensor? x=None) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def recursion(
    program: RecursionProgram,
    nets: Sequence[NetSpec],
    states: Sequence[Tensor],
    x: Tensor | None,
    weights: Sequence[Tensor],
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    backend: str = "auto",
    recompute: Recompute = DEFAULT,
    dtype: str | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Runs a whole recursion as one operation.

    Works under torch.compile, torch.export, autocast and inference mode.  For the backward pass it keeps, of the last
    updates in the gradient window, what fits into a budget, and of those not wholly kept their summed inputs, to
    compute the rest again; that pass cannot be differentiated again.

    Args:
        program: the recursion; it may change from call to call.
        nets: one spec for each network of the program.
        states: S tensors [B, L, D] of one compute dtype: float32, bfloat16, float16 or float64.  Under autocast, states
            and x other than float64 are cast to the autocast dtype here.
        x: [B, L, D] of the same dtype, or None when no update injects x.  It is kept for backward where an injection
            has a weight.
        weights: network by network, each in the order of ``NetSpec.weight_shapes``; of any float dtype.  They are cast
            to the compute dtype inside; gradients are summed in float32 over all applications and returned in the
            weight's dtype.
        cos, sin: RoPE tables [>= L, head_dim], or None for no rotation; column c belongs to channel c of a head.  Row l
            is the angle of token l: for packed sequences, tables gathered by position.
        backend: the name of a backend, or ``"auto"``.
        recompute: True: backward computes the whole gradient window again; False: forward keeps all its activations,
            which is faster and takes about thirty times the memory of the summed inputs; or the bytes of activations
            that this call may keep, a number or a size such as ``"256MB"``.  On the CPU engine they buy the outputs of
            blocks first, which spare the most time a byte, then all activations of the last updates; Triton keeps whole
            updates; the CUDA engine, the reference and exported programs keep nothing.  No bit of a result depends on
            it.
        dtype: ``"int8"`` for int8 operands in the products by weights (trmfast/int8.py); states and x are cast to
            bfloat16 here, and gradients are refused.
        segments: for networks with ``BlockSpec.segments``: integers [B, L, 2], for each token the first position of its
            sequence and the end of its prefix, both positions in the row.  Token i sees ``start <= j < max(end, i +
            1)``; an end equal to the start is plain causal attention, and what ``"simple_gla"`` takes.  Values are
            checked on CPUs only.

    Returns:
        The final value of every state, [B, L, D] in the compute dtype; never a view of an input.

    Raises:
        TypeError: an argument is of the wrong Python type.
        ValueError: a tensor does not fit the program, or the backend refuses; one line with the argument's name.
    """
    if not isinstance(program, RecursionProgram):
        raise TypeError(f"program: got {type(program).__name__}, accepted are RecursionProgram")
    if not isinstance(backend, str):
        raise TypeError(f"backend: got {type(backend).__name__}, accepted are str")
    if dtype not in (None, "int8"):
        raise ValueError(f"dtype: got {dtype!r}, accepted are 'int8' and None, for the dtype of the states")
    int8 = dtype is not None
    for name, items, kind in (("nets", nets, NetSpec), ("states", states, Tensor), ("weights", weights, Tensor)):
        if not isinstance(items, (list, tuple)):
            raise TypeError(f"{name}: got {type(items).__name__}, accepted are lists and tuples of {kind.__name__}")
        usual = _USUAL[kind]
        for item in items:
            if type(item) not in usual:
                _require_kind(item, kind, name, items)
    for name, table in (("x", x), ("cos", cos), ("sin", sin), ("segments", segments)):
        if table is not None and not isinstance(table, Tensor):
            raise TypeError(f"{name}: got {type(table).__name__}, accepted are Tensor and None")
    if states:
        device = states[0].device.type
        # For a device type without autocast, such as meta, the second query is an error; the first takes 0.9 us.
        if (device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)) and torch.is_autocast_enabled(device):
            wanted = torch.get_autocast_dtype(device)
            states = [_autocast(state, wanted) for state in states]
            x = None if x is None else _autocast(x, wanted)
    if int8:
        states = [state.to(torch.bfloat16) for state in states]
        x = None if x is None else x.to(torch.bfloat16)
    # Dynamo, which sees only what follows, has checks of its own.
    if not torch.compiler.is_dynamo_compiling() and inside_transform():
        if int8:
            raise ValueError("dtype: got 'int8' in a transform of torch.func or with dual numbers, accepted is None")
        return run_plainly(program, nets, states, x, weights, cos, sin, backend, segments)
    save = torch.is_grad_enabled() and (
        any(tensor.requires_grad for tensor in (*weights, *states)) or (x is not None and x.requires_grad)
    )
    budget = budget_of(recompute)
    if _is_exporting():
        budget = 0  # the exporter cannot prove bounds of sizes that depend on a budget and a symbolic batch
    # Compilers and exporters trace the operator itself.
    run = torch.ops.trmfast.recursion.default if save or torch.compiler.is_compiling() else run_below_autograd
    keys = [net.key for net in nets]
    out, _, _ = run(list(states), x, list(weights), cos, sin, program.key, keys, backend, save, budget, int8, segments)
    return tuple(out)


# PyTorch 2.6 does not tell export from compilation.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)

# The types that most items have, which takes no longer to see than that they are tensors.
_USUAL = {NetSpec: (NetSpec,), Tensor: (Tensor, torch.nn.Parameter)}


def _require_kind(item: object, kind: type, name: str, items: Sequence[object]) -> None:
    """Raises TypeError if an item is of the wrong type, or a tensor of which this process has a part."""
    got = type(item).__name__
    if isinstance(item, kind) and got != "DTensor":
        return
    accepted = "Tensor, and DTensor only by fully_shard of a module" if got == "DTensor" else kind.__name__
    i = next(i for i, other in enumerate(items) if other is item)
    raise TypeError(f"{name}[{i}]: got {got}, accepted are {accepted}")


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    eligible = tensor.dtype.is_floating_point and tensor.dtype != torch.float64
    return tensor.to(dtype) if eligible else tensor


# ---------------------------------------------------------------- forward


def _forward(
    states: list[Tensor],
    x: Tensor | None,
    weights: list[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    program: str,
    nets: list[str],
    backend: str,
    save: bool,
    budget: int,
    int8: bool = False,
    segments: Tensor | None = None,
    layout: int = 0,
) -> tuple[list[Tensor], Tensor, Tensor]:
    _check_layout(layout)
    problem = Problem.from_keys(program, tuple(nets))
    problem.validate(states, x, weights, cos, sin, segments)
    first = states[0]
    if int8:
        _check_int8(first.dtype, save)
    batch, length, _ = first.shape
    chosen = select(backend, problem, first.device, torch.int8 if int8 else first.dtype, batch, length)
    if first.numel() == 0:
        return _forward_fake(states, x, weights, cos, sin, program, nets, backend, save, budget, int8, segments)
    segments = _boundaries(problem, segments)
    cos, sin = _tables(problem, cos, sin, length, first.dtype)
    states = [state.contiguous() for state in states]
    x = x.contiguous() if x is not None and problem.uses_x else None
    keep = what_fits(chosen, problem, first.dtype, batch, length, budget if save else 0)
    call = ForwardCall(problem, states, x, weights, cos, sin, save, keep, int8, segments)
    out, saved, kept = chosen.forward(call)
    return [t.contiguous() for t in out], saved, kept


def _forward_fake(
    states: list[Tensor],
    x: Tensor | None,
    weights: list[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    program: str,
    nets: list[str],
    backend: str,
    save: bool,
    budget: int,
    int8: bool = False,
    segments: Tensor | None = None,
    layout: int = 0,
) -> tuple[list[Tensor], Tensor, Tensor]:
    refuse_onnx()
    _check_layout(layout)
    problem = Problem.from_keys(program, tuple(nets))
    problem.validate(states, x, weights, cos, sin, segments)
    first = states[0]
    if int8:
        _check_int8(first.dtype, save)
    keep, updates = Kept(), problem.num_grad_updates if save else 0
    if updates and budget and first.numel():
        # The batch may stay symbolic, as the backend does not depend on it here; the length becomes a constant.
        batch, length = first.shape[0], int(first.shape[1])
        chosen = select(backend, problem, first.device, first.dtype, 1, length)
        keep = what_fits(chosen, problem, first.dtype, batch, length, budget)
        updates -= keep.pairs // batch
    saved = first.new_empty((updates, *first.shape))
    return [first.new_empty(first.shape) for _ in states], saved, first.new_empty(keep.nbytes, dtype=torch.uint8)


def _check_layout(layout: int) -> None:
    if layout not in (0, LAYOUT):  # 0: not said
        raise ValueError(
            f"layout: got {layout}, accepted is {LAYOUT}; the graph was made by another version of trmfast"
        )


def _check_int8(dtype: torch.dtype, save: bool) -> None:
    if dtype != torch.bfloat16:
        got = str(dtype).removeprefix("torch.")
        raise ValueError(f"states[0].dtype: got {got}, accepted is bfloat16 with dtype 'int8'")
    if save:
        raise ValueError("dtype: got 'int8' where gradients are wanted, accepted in inference, under torch.no_grad()")


def _tables(
    problem: Problem, cos: Tensor | None, sin: Tensor | None, length: int, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """RoPE tables as backends take them: [L, head_dim], contiguous, float32 or wider; None where nothing attends."""
    if cos is None or sin is None or problem.rope_dim is None:
        return None, None
    wide = wide_dtype(dtype)
    return _table(cos, length, wide), _table(sin, length, wide)


def _boundaries(problem: Problem, segments: Tensor | None) -> Tensor | None:
    """Boundaries as backends take them: int32, contiguous."""
    if segments is None:
        return None
    if segments.device.type == "cpu":
        check_segments(segments, problem.uses_prefixes)
    return segments.to(torch.int32).contiguous()


def _table(table: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    rows = table if table.shape[0] == length else table[:length]
    return (rows if rows.dtype == dtype else rows.to(dtype)).contiguous()


# ---------------------------------------------------------------- backward


def _backward(
    grad_states: list[Tensor],
    saved: Tensor,
    kept: Tensor,
    weights: list[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    program: str,
    nets: list[str],
    backend: str,
    needs_states: list[bool],
    needs_x: bool,
    needs_weights: list[bool],
    segments: Tensor | None = None,
    x: Tensor | None = None,
) -> list[Tensor]:
    problem = Problem.from_keys(program, tuple(nets))
    if problem.backward_reads_x and x is None:
        raise ValueError("x: got None, accepted is that of the forward pass, from which backward computes inputs again")
    problem.validate(grad_states, grad_states[0] if x is None else x, weights, cos, sin, segments)
    shape, dtype = grad_states[0].shape, grad_states[0].dtype
    batch, length, _ = shape
    _check_forms(saved, kept, shape, dtype)
    gs: Sequence[Tensor | None] = [None] * len(grad_states)
    gx: Tensor | None = None
    gw: Sequence[Tensor | None] = [None] * len(weights)
    if grad_states[0].numel():
        chosen = select(backend, problem, saved.device, dtype, batch, length)
        keep = what_fits(chosen, problem, dtype, batch, length, kept.numel())
        _check_kept(problem, saved, kept, keep)
        cos, sin = _tables(problem, cos, sin, length, dtype)
        grads, saved, kept = [g.contiguous() for g in grad_states], saved.contiguous(), kept.contiguous()
        needs = needs_states, needs_x and problem.uses_x, needs_weights
        segments = None if segments is None else segments.to(torch.int32).contiguous()
        injected = x.contiguous() if x is not None and problem.backward_reads_x else None
        call = BackwardCall(problem, grads, saved, kept, keep, weights, cos, sin, *needs, segments, injected)
        gs, gx, gw = chosen.backward(call)
    results = [_result(g, need, saved, shape, dtype) for g, need in zip(gs, needs_states, strict=True)]
    results.append(_result(gx, needs_x, saved, shape, dtype))
    results += [
        _result(g, need, saved, w.shape, w.dtype) for g, need, w in zip(gw, needs_weights, weights, strict=True)
    ]
    return results


def _check_forms(saved: Tensor, kept: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    """Raises ValueError unless what forward left has the dtypes, and ``saved`` inputs of this shape."""
    if saved.shape[1:] != shape or saved.dtype != dtype:
        raise ValueError(
            f"saved: got {list(saved.shape)} of {saved.dtype}, accepted are inputs of {list(shape)} of {dtype}"
        )
    if kept.dtype != torch.uint8 or kept.device != saved.device:
        raise ValueError(f"kept: got {kept.dtype} on {kept.device}, accepted is torch.uint8 on {saved.device}")


def _check_kept(problem: Problem, saved: Tensor, kept: Tensor, keep: Kept) -> None:
    """Raises ValueError unless the sizes are those of what a forward pass returns."""
    if kept.numel() != keep.nbytes:
        raise ValueError(f"kept: got {kept.numel()} bytes, accepted is what forward kept, such as {keep.nbytes} bytes")
    updates = problem.num_grad_updates - keep.pairs // saved.shape[1]
    if saved.shape[0] != updates:
        raise ValueError(
            f"saved: got {saved.shape[0]} inputs, accepted are {updates}, one for each grad update not wholly kept"
        )


def _result(grad: Tensor | None, need: bool, like: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A gradient as the operator returns it: empty if not needed, zeros if no gradient arrived."""
    if not need:
        return like.new_empty(0)
    if grad is None:
        return like.new_zeros(shape, dtype=dtype)
    return grad.to(dtype).view(shape).contiguous()


def _backward_fake(
    grad_states: list[Tensor],
    saved: Tensor,
    _kept: Tensor,
    weights: list[Tensor],
    _cos: Tensor | None,
    _sin: Tensor | None,
    _program: str,
    _nets: list[str],
    _backend: str,
    needs_states: list[bool],
    needs_x: bool,
    needs_weights: list[bool],
    _segments: Tensor | None = None,
    _x: Tensor | None = None,
) -> list[Tensor]:
    shape = grad_states[0].shape
    results = [saved.new_empty(shape if need else 0) for need in (*needs_states, needs_x)]
    for need, weight in zip(needs_weights, weights, strict=True):
        results.append(saved.new_empty(weight.shape, dtype=weight.dtype) if need else saved.new_empty(0))
    return results


# ---------------------------------------------------------------- counts and registration


def _forward_flops(states: list[Sequence[int]], *rest: Any, **_ignored: Any) -> int:
    """For torch.utils.flop_counter, which passes the shape of every tensor."""
    _, _, _, _, program, nets = rest[:6]
    batch, length = states[0][:2]
    return forward_flops(Problem.from_keys(program, tuple(nets)), batch, length)


def _backward_flops(grad_states: list[Sequence[int]], *rest: Any, **_ignored: Any) -> int:
    program, nets, needs_weights = rest[5], rest[6], rest[10]
    batch, length = grad_states[0][:2]
    return backward_flops(Problem.from_keys(program, tuple(nets)), batch, length, needs_weights)


_library.impl("recursion", _forward, "CompositeExplicitAutograd")
_library.impl("recursion_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("trmfast::recursion", _forward_fake, lib=_library)
torch.library.register_fake("trmfast::recursion_backward", _backward_fake, lib=_library)
_library.impl("recursion", recursion_with_autograd, "Autograd", with_keyset=True)
torch.library.register_vmap("trmfast::recursion_backward", batched_backward, lib=_library)
_library.impl("recursion_backward", batched_backward_of_autograd, "Batched")
torch.library.register_autograd("trmfast::recursion_backward", refuse_double_backward, lib=_library)
register_flop_formula(torch.ops.trmfast.recursion)(_forward_flops)
register_flop_formula(torch.ops.trmfast.recursion_backward)(_backward_flops)
