"""The specification: a recursion in plain PyTorch, for any float dtype, differentiable by autograd.

Every other backend is compared with this file.  It rounds where the published models in eager PyTorch round:
matrix products and sums in the compute dtype; norms, rotation and softmax in float32 (or the compute dtype if wider).
With ``int8`` the products by weights are those of trmfast/int8.py, and everything else stays.
Sources: TRM arXiv 2510.04871, HRM arXiv 2506.21734, RoPE arXiv 2104.09864, SwiGLU arXiv 2002.05202, ReLU^2
arXiv 2109.08668; the sandwiches are those of Ouro arXiv 2510.25741 and of Huginn arXiv 2502.05171; GLA arXiv
2312.06635, with one decay a head as in the simple GLA of flash-linear-attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from trmfast.int8 import int8_linear
from trmfast.problem import Problem
from trmfast.program import Update
from trmfast.spec import DECAY_NORMALIZER, BlockSpec, NetSpec

__all__ = [
    "attention",
    "conv_swiglu",
    "enter",
    "gelu",
    "inject",
    "relu2",
    "residual",
    "rms_norm",
    "rotate",
    "run_block",
    "run_net",
    "run_program",
    "simple_gla",
    "summed_input",
    "summed_sources",
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


def rms_norm(h: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """``h / sqrt(mean(h^2) + eps)`` over the last axis, rounded, then times the weight if there is one."""
    wide = h.to(wide_dtype(h.dtype))
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(h.dtype)
    return normed if weight is None else normed * weight.to(h.dtype)


def rotate(q: Tensor, cos: Tensor, sin: Tensor, rotation: str = "half") -> Tensor:
    """RoPE: every channel times its cosine, plus or minus its partner times its sine.

    Args:
        q: [B, L, heads, head_dim].
        cos, sin: [>= L, head_dim]; a column belongs to a channel.
        rotation: which channels are partners, see :class:`BlockSpec`.
    """
    wide = q.to(wide_dtype(q.dtype))
    cos, sin = (table[: q.shape[1], None, :].to(wide.dtype) for table in (cos, sin))
    if rotation == "half":
        low, high = wide.chunk(2, dim=-1)
        turned = torch.cat((-high, low), dim=-1)
    else:
        even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    return (wide * cos + turned * sin).to(q.dtype)


def attention(
    block: BlockSpec,
    h: Tensor,
    qkv_proj: Tensor,
    o_proj: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    *extras: Tensor,
    segments: Tensor | None = None,
    linear: Linear = cast_linear,
) -> Tensor:
    """Self-attention of h [B, L, D], or simple GLA, which differs in :func:`simple_gla` alone.

    Args:
        block: its sizes and options.
        h: [B, L, D].
        qkv_proj: rows of the gate, if there is one, of the decays, if there are any, then of query heads, key heads and
            value heads.
        o_proj: [D, heads * head_dim].
        cos, sin: RoPE tables [>= L, head_dim], or None for no rotation.
        extras: ``decay_bias``, ``qk_bias``, ``q_norm.weight`` and ``k_norm.weight``, those that the block has.
        segments: integers [B, L, 2], as in :func:`trmfast.recursion`; None where the block does not read them.
        linear: the product by a weight.
    """
    batch, length, _ = h.shape
    heads, kv_heads, width = block.num_heads, block.num_kv_heads, block.head_dim
    rows = (block.gate_rows, block.decay_rows, (heads + 2 * kv_heads) * width)
    gate, decay, qkv = linear(h, qkv_proj).split(rows, dim=-1)
    q, k, v = qkv.view(batch, length, heads + 2 * kv_heads, width).split((heads, kv_heads, kv_heads), dim=2)
    rest = list(extras)
    if block.decay_rows:
        decay = decay + rest.pop(0).to(h.dtype)
    if block.qk_bias:
        q_bias, k_bias = rest.pop(0).to(h.dtype).view(heads + kv_heads, width).split((heads, kv_heads))
        q, k = q + q_bias, k + k_bias
    if block.qk_norm != "none":
        q_weight, k_weight = rest if block.qk_norm == "learned" else (None, None)
        q, k = rms_norm(q, block.rms_norm_eps, q_weight), rms_norm(k, block.rms_norm_eps, k_weight)
    if cos is not None and sin is not None:
        q, k = rotate(q, cos, sin, block.rotation), rotate(k, cos, sin, block.rotation)
    if kv_heads != heads:
        k, v = (t.repeat_interleave(heads // kv_heads, dim=2) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if block.decay_rows:
        log_decay = F.logsigmoid(decay.to(wide_dtype(h.dtype))) / DECAY_NORMALIZER
        starts = segments[..., 0] if block.segments and segments is not None else None
        mixed = simple_gla(q, k, v, log_decay.transpose(1, 2), starts)
    elif block.segments and segments is not None:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=_seen_in_segments(segments)[:, None])
    elif block.attention_window:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=_seen(block, length, h.device))
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=block.causal)
    mixed = mixed.transpose(1, 2)
    if block.gate != "none":
        gates = heads if block.gate == "head" else heads * width
        mixed = mixed * torch.sigmoid(gate).view(batch, length, heads, gates // heads)
    return linear(mixed.flatten(2), o_proj)


def simple_gla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, starts: Tensor | None = None) -> Tensor:
    """Simple GLA in its parallel form: causal attention with a decay in place of the softmax.

    The recurrence of a head is ``S_t = a_t S_(t-1) + k_t^T v_t``, ``o_t = q_t S_t / sqrt(head_dim)``, with one decay
    ``a_t = exp(log_decay_t)``.  Written out, value j reaches output i with the factor
    ``q_i . k_j / sqrt(head_dim) * a_(j+1) ... a_i``, an exponential of a difference of sums that is at most 1.

    Args:
        q, k, v: [B, heads, L, head_dim].
        log_decay: [B, heads, L] in the wide dtype, at most 0.
        starts: [B, L], for each token the position where its sequence and the state begin; None: 0.

    Returns:
        [B, heads, L, head_dim].
    """
    position = torch.arange(q.shape[2], device=q.device)
    seen = position[:, None] >= position
    if starts is not None:
        seen = seen & (position >= starts[:, None, :, None])
    total = log_decay.cumsum(-1)
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~seen, -torch.inf).exp()
    weights = (q @ k.transpose(-1, -2)).to(decay.dtype) * (q.shape[-1] ** -0.5 * decay)
    return weights.to(q.dtype) @ v


def _seen(block: BlockSpec, length: int, device: torch.device) -> Tensor:
    """Which positions (columns) each position sees, [L, L]."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    seen = distance.abs() < block.attention_window
    return seen & (distance >= 0) if block.causal else seen


def _seen_in_segments(segments: Tensor) -> Tensor:
    """Which positions (last axis) each position of each row sees, [B, L, L]."""
    start, prefix_end = segments[..., :1], segments[..., 1:]
    position = torch.arange(segments.shape[1], device=segments.device)
    return (position >= start) & (position < torch.maximum(prefix_end, position[:, None] + 1))


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
    convolution = bias.to(h.dtype).to(wide)
    for tap in range(taps):
        convolution = convolution + padded[:, tap : tap + length] * kernel[:, 0, tap]
    return linear(F.silu(convolution.to(h.dtype)), down_proj)


def relu2(h: Tensor, up_proj: Tensor, down_proj: Tensor, *, linear: Linear = cast_linear) -> Tensor:
    """``down(relu(up)^2)`` over the last axis."""
    return linear(F.relu(linear(h, up_proj)).square(), down_proj)


def gelu(h: Tensor, up_proj: Tensor, down_proj: Tensor, *, linear: Linear = cast_linear) -> Tensor:
    """``down(gelu(up))`` over the last axis, with the exact GELU."""
    return linear(F.gelu(linear(h, up_proj)), down_proj)


# Each channel mixer, and how many weights it has.
CHANNEL_MIXERS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "swiglu": (swiglu, 2),
    "conv_swiglu": (conv_swiglu, 4),
    "relu2": (relu2, 2),
    "gelu": (gelu, 2),
}


def run_block(
    block: BlockSpec,
    h: Tensor,
    weights: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    int8: bool = False,
    segments: Tensor | None = None,
) -> Tensor:
    """One block of h [B, L, D]; the weights are those of ``block.weight_shapes``, in its order."""
    linear = int8_linear if int8 else cast_linear
    mix, count = CHANNEL_MIXERS[block.channel_mixer]
    extra_count = bool(block.decay_rows) + block.qk_bias + 2 * (block.qk_norm == "learned")
    in_proj, out_proj, *rest = weights
    mlp, extras, weighted = rest[:count], rest[count : count + extra_count], rest[count + extra_count :]
    norms = weighted if block.norm_weight else [None] * block.num_norms
    half = block.num_norms // 2

    def mix_tokens(h: Tensor) -> Tensor:
        if block.token_mixer == "mlp_t":
            return swiglu(h, in_proj, out_proj, linear=linear)
        return attention(block, h, in_proj, out_proj, cos, sin, *extras, segments=segments, linear=linear)

    def mix_channels(h: Tensor) -> Tensor:
        return mix(h, *mlp, linear=linear)

    if block.token_mixer == "mlp_t":  # [B, D, L]: mixer and norm both run over the sequence
        h = residual(block, h.transpose(1, 2), mix_tokens, norms[:half]).transpose(1, 2)
    else:
        h = residual(block, h, mix_tokens, norms[:half])
    return residual(block, h, mix_channels, norms[half:])


def residual(
    block: BlockSpec, h: Tensor, mix: Callable[[Tensor], Tensor], norm_weights: Sequence[Tensor | None]
) -> Tensor:
    """A mixer with its residual and its norms, one or two; a norm without a weight has None."""
    eps, first, last = block.rms_norm_eps, norm_weights[0], norm_weights[-1]
    if block.norm_placement == "post":
        return rms_norm(h + mix(h), eps, first)
    branch = mix(rms_norm(h, eps, first))
    if block.norm_placement == "pre":
        return h + branch
    if block.norm_placement == "sandwich":
        return h + rms_norm(branch, eps, last)
    return rms_norm(h + branch, eps, last)


def run_net(
    net: NetSpec,
    h: Tensor,
    weights: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    int8: bool = False,
    segments: Tensor | None = None,
) -> Tensor:
    """All blocks of a network, one after the other, and its final norm if it has one.

    h: [B, L, D], behind the injection; the weights are in the order of ``net.weight_shapes``.
    """
    if net.injection != "add":
        weights = weights[:-1]
    final = weights[-1] if net.final_norm and net.block.norm_weight else None
    count = (len(weights) - (final is not None)) // net.num_layers
    for layer in range(net.num_layers):
        h = run_block(net.block, h, weights[layer * count : (layer + 1) * count], cos, sin, int8, segments)
    return rms_norm(h, net.block.rms_norm_eps, final) if net.final_norm else h


def summed_input(update: Update, states: Sequence[Tensor], x: Tensor | None) -> Tensor:
    """The input of an update, added from the right: ``z_L + (z_H + x)``, the rounding order of the published models."""
    terms = [states[s] for s in update.sources]
    if update.inject_x and x is not None:
        terms.append(x)
    return _summed(terms)


def summed_sources(update: Update, states: Sequence[Tensor]) -> Tensor | None:
    """The sum that an injection weighs, None without sources."""
    return _summed([states[s] for s in update.sources]) if update.sources else None


def _summed(terms: Sequence[Tensor]) -> Tensor:
    h = terms[-1]
    for term in reversed(terms[:-1]):
        h = term + h
    return h


def inject(
    net: NetSpec, total: Tensor | None, x: Tensor | None, weight: Tensor, *, linear: Linear = cast_linear
) -> Tensor:
    """The input of a network whose injection has a weight (Huginn arXiv 2502.05171, Parcae arXiv 2604.12946).

    Args:
        net: the network.
        total: the sum of an update's sources, [B, L, D], or None without sources.
        x: [B, L, D], or None for an update that does not inject it.
        weight: [D] for ``"diagonal"``, [D, D] for ``"linear"``.
        linear: the product by a weight.
    """
    if total is None:
        assert x is not None
        return x
    h = total * weight.to(total.dtype) if net.injection == "diagonal" else linear(total, weight)
    return h if x is None else h + x


def enter(
    net: NetSpec,
    update: Update,
    states: Sequence[Tensor],
    x: Tensor | None,
    weights: Sequence[Tensor],
    int8: bool = False,
) -> tuple[Tensor | None, Tensor]:
    """What an update adds up, None for nothing, and the input of its network; ``weights`` are those of the network."""
    if net.injection == "add":
        h = summed_input(update, states, x)
        return h, h
    total = summed_sources(update, states)
    linear = int8_linear if int8 else cast_linear
    return total, inject(net, total, x if update.inject_x else None, weights[-1], linear=linear)


def run_program(
    problem: Problem,
    states: Sequence[Tensor],
    x: Tensor | None,
    weights: Sequence[Tensor],
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    int8: bool = False,
    segments: Tensor | None = None,
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
        segments: integers [B, L, 2], as in :func:`trmfast.recursion`, or None.

    Returns:
        The final value of every state.  Gradients flow through the updates with ``grad`` only.
    """
    problem.validate(states, x, weights, cos, sin, segments)
    current = list(states)
    for update in problem.program.updates:
        with torch.set_grad_enabled(update.grad and torch.is_grad_enabled()):
            net, used = problem.nets[update.net], problem.net_weights(weights, update.net)
            _, h = enter(net, update, current, x, used, int8)
            z = run_net(net, h, used, cos, sin, int8, segments)
        # torch.no_grad cuts gradients alone; tangents are cut by detach().
        current[update.dst] = z if update.grad else z.detach()
    return tuple(current)
