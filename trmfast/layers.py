"""The layers of a block and of a model, with float32 parameters under the names of the published state_dicts."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from trmfast import reference
from trmfast.spec import BlockSpec, NetSpec

__all__ = [
    "MLP",
    "Attention",
    "CastedEmbedding",
    "CastedLinear",
    "ConvSwiGLU",
    "CosSin",
    "Injection",
    "RMSNorm",
    "RotaryEmbedding",
    "SimpleGLA",
    "SwiGLU",
    "trunc_normal_init_",
]

CosSin = tuple[Tensor, Tensor]


@torch.no_grad()
def trunc_normal_init_(tensor: Tensor, std: float = 1.0, lower: float = -2.0, upper: float = 2.0) -> Tensor:
    """Fills a tensor from a normal distribution cut at lower and upper, scaled to a standard deviation of ``std``.

    The inverse of the error function is applied to one uniform draw an element, as in JAX, so a seed gives the weights
    that the published training code draws.
    """
    if tensor.is_meta:  # nothing to fill, and these operators would import a second's worth of PyTorch
        return tensor
    if std == 0:
        return tensor.zero_()
    low, high = math.erf(lower / math.sqrt(2)), math.erf(upper / math.sqrt(2))
    mass = (high - low) / 2
    at_lower, at_upper = (math.exp(-0.5 * cut * cut) / math.sqrt(2 * math.pi) for cut in (lower, upper))
    variance = 1 - (upper * at_upper - lower * at_lower) / mass - ((at_upper - at_lower) / mass) ** 2
    scale = std / math.sqrt(variance)
    tensor.uniform_(low, high).erfinv_().mul_(math.sqrt(2) * scale)
    return tensor.clip_(lower * scale, upper * scale)


class CastedLinear(nn.Module):
    """A linear layer with float32 parameters that computes in the dtype of its input.

    ``weight`` is [out_features, in_features], drawn with std 1 / sqrt(in_features); ``bias`` is zeros, or None.
    """

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(trunc_normal_init_(torch.empty(out_features, in_features), std=in_features**-0.5))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, h: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(h.dtype)
        return nn.functional.linear(h, self.weight.to(h.dtype), bias)


class CastedEmbedding(nn.Module):
    """An embedding with a float32 table, ``embedding_weight`` [num_embeddings, embedding_dim], read in ``cast_to``.

    Rows are cast after the look-up: the values are those of a cast table, but the gradients of tokens that share a row
    are summed in float32.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, init_std: float, cast_to: torch.dtype) -> None:
        super().__init__()
        self.cast_to = cast_to
        table = torch.empty(num_embeddings, embedding_dim)
        self.embedding_weight = nn.Parameter(trunc_normal_init_(table, std=init_std))

    def forward(self, ids: Tensor) -> Tensor:
        """ids: integers [...]; returns [..., embedding_dim]."""
        return nn.functional.embedding(ids, self.embedding_weight).to(self.cast_to)


class RotaryEmbedding(nn.Module):
    """RoPE tables [max_position_embeddings, dim] in float32 (arXiv 2104.09864).

    ``rotation`` is as in :class:`trmfast.BlockSpec`: ``"half"``, where channels c and c + dim / 2 share an angle, or
    ``"interleaved"``, where 2i and 2i + 1 do.  The tables are float32 in a module of any dtype, and are made again by
    every move.
    """

    cos_cached: Tensor
    sin_cached: Tensor

    def __init__(
        self,
        dim: int,
        max_position_embeddings: int,
        base: float,
        device: torch.device | str | None = None,
        rotation: str = "half",
    ) -> None:
        super().__init__()
        self.dim, self.max_position_embeddings, self.base = dim, max_position_embeddings, base
        self.rotation = rotation
        self.make_tables(device)

    def make_tables(self, device: torch.device | str | None) -> None:
        """Makes the tables on a device."""
        if torch.empty(0, device=device).is_meta:  # arange of the meta device imports a second's worth of PyTorch
            for name in ("cos_cached", "sin_cached"):
                empty = torch.empty(self.max_position_embeddings, self.dim, device=device)
                self.register_buffer(name, empty, persistent=False)
            return
        inv_freq = 1.0 / (self.base ** (torch.arange(0, self.dim, 2, dtype=torch.float32, device=device) / self.dim))
        positions = torch.arange(self.max_position_embeddings, dtype=torch.float32, device=device)
        angles = torch.outer(positions, inv_freq)
        angles = angles.repeat(1, 2) if self.rotation == "half" else angles.repeat_interleave(2, dim=1)
        self.register_buffer("cos_cached", angles.cos(), persistent=False)
        self.register_buffer("sin_cached", angles.sin(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        before = self.cos_cached
        super()._apply(fn, recurse)
        moved = self.cos_cached
        if moved is not before and not moved.is_meta:  # to_empty, another device or another dtype
            self.make_tables(moved.device)
        return self

    def forward(self) -> CosSin:
        return self.cos_cached, self.sin_cached


class RMSNorm(nn.Module):
    """A norm over the last axis with a weight [width] of ones; epsilon is the block's."""

    def __init__(self, spec: BlockSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, h: Tensor) -> Tensor:
        return reference.rms_norm(h, self.spec.rms_norm_eps, self.weight)


class Injection(nn.Module):
    """The weight of a network's injection: [D] of ones, or the identity [D, D], so that it begins as ``"add"``."""

    def __init__(self, spec: NetSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.block.hidden_size
        self.weight = nn.Parameter(torch.ones(width) if spec.injection == "diagonal" else torch.eye(width))

    def forward(self, total: Tensor | None, x: Tensor | None) -> Tensor:
        """total: the sum of an update's sources, or None without sources; x: or None; [B, L, D] both."""
        return reference.inject(self.spec, total, x, self.weight)


class Attention(nn.Module):
    """The parameters of self-attention: ``qkv_proj`` (``gqkv_proj`` with a gate) and ``o_proj``.

    With the spec's options also ``qk_bias``, zeros, and ``q_norm`` and ``k_norm``.
    """

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.spec = spec
        query, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.add_module(spec.packed_name, CastedLinear(spec.hidden_size, spec.rows_ahead + query + 2 * kv))
        self.o_proj = CastedLinear(query, spec.hidden_size)
        if spec.decay_rows:
            self.decay_bias = nn.Parameter(torch.zeros(spec.decay_rows))
        if spec.qk_bias:
            self.qk_bias = nn.Parameter(torch.zeros(query + kv))
        if spec.qk_norm == "learned":
            self.q_norm, self.k_norm = RMSNorm(spec, spec.head_dim), RMSNorm(spec, spec.head_dim)

    def forward(self, h: Tensor, cos_sin: CosSin | None = None) -> Tensor:
        """h: [B, L, D]; cos_sin: RoPE tables [>= L, head_dim]."""
        cos, sin = cos_sin if cos_sin is not None else (None, None)
        packed = getattr(self, self.spec.packed_name)
        extras = [self.decay_bias] if self.spec.decay_rows else []
        if self.spec.qk_bias:
            extras.append(self.qk_bias)
        if self.spec.qk_norm == "learned":
            extras += [self.q_norm.weight, self.k_norm.weight]
        return reference.attention(self.spec, h, packed.weight, self.o_proj.weight, cos, sin, *extras)


class SimpleGLA(Attention):
    """The parameters of simple GLA: ``in_proj``, ``o_proj`` and ``decay_bias``, zeros.

    With the spec's options also those of :class:`Attention`.
    """


class SwiGLU(nn.Module):
    """The parameters of a SwiGLU over the last axis: ``gate_up_proj`` and ``down_proj``."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = CastedLinear(hidden_size, 2 * intermediate_size)
        self.down_proj = CastedLinear(intermediate_size, hidden_size)

    def forward(self, h: Tensor) -> Tensor:
        return reference.swiglu(h, self.gate_up_proj.weight, self.down_proj.weight)


class ConvSwiGLU(nn.Module):
    """The parameters of URM's SwiGLU: ``gate_up_proj``, the depthwise convolution ``dwconv``, and ``down_proj``."""

    def __init__(self, hidden_size: int, intermediate_size: int, conv_kernel: int = 2) -> None:
        super().__init__()
        self.gate_up_proj = CastedLinear(hidden_size, 2 * intermediate_size)
        self.dwconv = nn.Conv1d(intermediate_size, intermediate_size, conv_kernel, groups=intermediate_size)
        self.down_proj = CastedLinear(intermediate_size, hidden_size)

    def forward(self, h: Tensor) -> Tensor:
        conv = self.dwconv
        assert conv.bias is not None
        return reference.conv_swiglu(h, self.gate_up_proj.weight, conv.weight, conv.bias, self.down_proj.weight)


class MLP(nn.Module):
    """The parameters of a channel mixer without a gate, ``relu2`` or ``gelu``: ``up_proj`` and ``down_proj``."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.spec = spec
        self.up_proj = CastedLinear(spec.hidden_size, spec.intermediate_size)
        self.down_proj = CastedLinear(spec.intermediate_size, spec.hidden_size)

    def forward(self, h: Tensor) -> Tensor:
        mix = reference.relu2 if self.spec.channel_mixer == "relu2" else reference.gelu
        return mix(h, self.up_proj.weight, self.down_proj.weight)
