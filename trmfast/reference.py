"""The specification: a recursion in plain PyTorch, for any float dtype, differentiable by autograd.

Every other backend is compared with this file.  It rounds where the published models in eager PyTorch round:
matrix products and sums in the compute dtype; norms, rotation and softmax in float32 (or the compute dtype if wider).
With ``int8`` the products by weights are those of trmfast/int8.py, and everything else stays.
Sources: TRM arXiv 2510.04871, HRM arXiv 2506.21734, RoPE arXiv 2104.09864, SwiGLU arXiv 2002.05202.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from trmfast.int8 import int8_linear
from trmfast.problem import Problem
from trmfast.program import Update
from trmfast.spec import BlockSpec, NetSpec

__all__ = [
    "attention",
    "conv_swiglu",
    "rms_norm",
    "rotate",
    "run_block",
    "run_net",
    "run_program",
    "summed_input",
    "swiglu",
    "wide_dtype",
]


Linear = Callable[[Tensor, Tensor], Tensor]


def cast_linear(h: Tensor, weight: Tensor) -> Tensor:
    """``h @ weight.T`` in the dtype of h."""
    return F.linear(h, weight.to(h.dtype))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, rotation and gradient sums: float32, or float64 where the compute dtype is."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(h: Tensor, eps: float) -> Tensor:
    """``h / sqrt(mean(h^2) + eps)`` over the last axis, without a weight."""
    wide = h.to(wide_dtype(h.dtype))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(h.dtype)


def rotate(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the rotate-half convention; q: [B, L, heads, head_dim], cos and sin: [>= L, head_dim]."""
    wide = q.to(wide_dtype(q.dtype))
    cos, sin = (table[: q.shape[1], None, :].to(wide.dtype) for table in (cos, sin))
    low, high = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-high, low), dim=-1) * sin).to(q.dtype)


def attention(
    block: BlockSpec,
    h: Tensor,
    qkv_proj: Tensor,
    o_proj: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    linear: Linear = cast_linear,
) -> Tensor:
    """Self-attention of h [B, L, D]; the rows of qkv_proj are query heads, then key heads, then value heads."""
    batch, length, _ = h.shape
    heads, kv_heads = block.num_heads, block.num_kv_heads
    qkv = linear(h, qkv_proj).view(batch, length, heads + 2 * kv_heads, block.head_dim)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=2)
    if cos is not None and sin is not None:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if kv_heads != heads:
        k, v = (t.repeat_interleave(heads // kv_heads, dim=2) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=block.causal)
    return linear(mixed.transpose(1, 2).flatten(2), o_proj)


def swiglu(h: Tensor, gate_up_proj: Tensor, down_proj: Tensor, *, linear: Linear = cast_linear) -> Tensor:
    """``down(silu(gate) * up)`` over the last axis; the rows of gate_up_proj are the gate, then the up projection."""
    gate, up = linear(h, gate_up_proj).chunk(2, dim=-1)
    return linear(F.silu(gate) * up, down_proj)


def conv_swiglu(
    h: Tensor, gate_up_proj: Tensor, conv: Tensor, bias: Tensor, down_proj: Tensor, *, linear: Linear = cast_linear
) -> Tensor:
    """URM's SwiGLU of h [B, L, D]: after the gate a depthwise convolution over the sequence, its bias and a SiLU.

    The k taps end at position ``l + (k - 1) // 2``, so two taps see the position before and the position itself.  They
    are summed in the wide dtype and rounded once, as a convolution does.
    """
    gate, up = linear(h, gate_up_proj).chunk(2, dim=-1)
    wide, length, taps = wide_dtype(h.dtype), h.shape[1], conv.shape[-1]
    padded = F.pad((F.silu(gate) * up).to(wide), (0, 0, taps // 2, taps // 2))
    kernel = conv.to(h.dtype).to(wide)
    mixed = bias.to(h.dtype).to(wide)
    for tap in range(taps):
        mixed = mixed + padded[:, tap : tap + length] * kernel[:, 0, tap]
    return linear(F.silu(mixed.to(h.dtype)), down_proj)


def run_block(
    block: BlockSpec,
    h: Tensor,
    weights: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    int8: bool = False,
) -> Tensor:
    """One block of h [B, L, D]; the weights are those of ``block.weight_shapes``, in its order."""
    eps = block.rms_norm_eps
    linear = int8_linear if int8 else cast_linear
    if block.token_mixer == "attention":
        h = rms_norm(h + attention(block, h, weights[0], weights[1], cos, sin, linear=linear), eps)
    else:
        t = h.transpose(1, 2)  # [B, D, L]: mixer and norm both run over the sequence
        h = rms_norm(t + swiglu(t, weights[0], weights[1], linear=linear), eps).transpose(1, 2)
    mix = swiglu if block.channel_mixer == "swiglu" else conv_swiglu
    return rms_norm(h + mix(h, *weights[2:], linear=linear), eps)


def run_net(
    net: NetSpec,
    h: Tensor,
    weights: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    int8: bool = False,
) -> Tensor:
    """All blocks of a network, one after the other; h: [B, L, D], the weights in the order of ``net.weight_shapes``."""
    count = len(weights) // net.num_layers
    for layer in range(net.num_layers):
        h = run_block(net.block, h, weights[layer * count : (layer + 1) * count], cos, sin, int8)
    return h


def summed_input(update: Update, states: Sequence[Tensor], x: Tensor | None) -> Tensor:
    """The input of an update, added from the right: ``z_L + (z_H + x)``, the rounding order of the published models."""
    terms = [states[s] for s in update.sources]
    if update.inject_x and x is not None:
        terms.append(x)
    h = terms[-1]
    for term in reversed(terms[:-1]):
        h = term + h
    return h


def run_program(
    problem: Problem,
    states: Sequence[Tensor],
    x: Tensor | None,
    weights: Sequence[Tensor],
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    int8: bool = False,
) -> tuple[Tensor, ...]:
    """The whole recursion.

    Args:
        problem: program and networks.
        states: S tensors [B, L, D] of one float dtype, the compute dtype.
        x: [B, L, D] of the same dtype, or None when no update injects x.
        weights: the weights of all networks, in the order of ``problem.weight_names``; cast to the compute dtype where
            they are used.
        cos, sin: RoPE tables [>= L, head_dim], or None for no rotation.
        int8: whether the products by weights are those of :func:`trmfast.int8.int8_linear`; for inference.

    Returns:
        The final value of every state.  Gradients flow through the updates with ``grad`` only.
    """
    problem.validate(states, x, weights, cos, sin)
    current = list(states)
    for update in problem.program.updates:
        with torch.set_grad_enabled(update.grad and torch.is_grad_enabled()):
            h = summed_input(update, current, x)
            used = problem.net_weights(weights, update.net)
            z = run_net(problem.nets[update.net], h, used, cos, sin, int8)
        # torch.no_grad cuts gradients alone; tangents are cut by detach().
        current[update.dst] = z if update.grad else z.detach()
    return tuple(current)
