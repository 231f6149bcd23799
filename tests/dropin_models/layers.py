"""Layers shared by the models: post-norm blocks, rotary tables, embeddings."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Tables = tuple[Tensor, Tensor]


def rms_norm(hidden_states: Tensor, variance_epsilon: float) -> Tensor:
    # Upstream casts to float32; float64 must stay, or it would not be the truth.
    wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    return (wide / (wide.pow(2).mean(-1, keepdim=True) + variance_epsilon).sqrt()).to(hidden_states.dtype)


def swiglu_inner(width: int, expansion: float) -> int:
    return math.ceil(round(expansion * width * 2 / 3) / 256) * 256


class CastedLinear(nn.Module):
    def __init__(self, width_in: int, width_out: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width_out, width_in) * width_in**-0.5)
        self.bias = nn.Parameter(torch.zeros(width_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class CastedEmbedding(nn.Module):
    def __init__(self, rows: int, width: int, std: float, cast_to: torch.dtype) -> None:
        super().__init__()
        self.cast_to = cast_to
        self.embedding_weight = nn.Parameter(torch.randn(rows, width) * std)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.embedding_weight.to(self.cast_to))


class CastedSparseEmbedding(nn.Module):
    weights: Tensor
    local_weights: Tensor
    local_ids: Tensor

    def __init__(self, rows: int, width: int, batch_size: int, cast_to: torch.dtype) -> None:
        super().__init__()
        self.cast_to = cast_to
        self.register_buffer("weights", torch.randn(rows, width) * 0.1)
        self.register_buffer("local_weights", torch.zeros(batch_size, width, requires_grad=True), persistent=False)
        self.register_buffer("local_ids", torch.zeros(batch_size, dtype=torch.int32), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        if not self.training:
            return self.weights[ids].to(self.cast_to)
        with torch.no_grad():
            self.local_weights.copy_(self.weights[ids])
            self.local_ids.copy_(ids)
        return self.local_weights.to(self.cast_to)


class RotaryEmbedding(nn.Module):
    cos_cached: Tensor
    sin_cached: Tensor

    def __init__(self, dim: int, length: int, base: float = 10000.0) -> None:
        super().__init__()
        frequencies = 1 / base ** (torch.arange(0, dim, 2) / dim)
        angles = torch.arange(length)[:, None] * frequencies
        self.register_buffer("cos_cached", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin_cached", angles.sin().repeat(1, 2), persistent=False)

    def forward(self) -> Tables:
        return self.cos_cached, self.sin_cached


class RotaryEmbedding2D(nn.Module):
    """nano-trm's tables: prefix positions in one dimension, then rows and columns of a square grid."""

    cos_cached: Tensor
    sin_cached: Tensor

    def __init__(self, dim: int, prefix_len: int, side: int, base: float = 10000.0) -> None:
        super().__init__()
        frequencies = 1 / base ** (torch.arange(0, dim, 2) / dim)
        self.register_buffer("inv_freq", frequencies, persistent=False)
        prefix = torch.arange(prefix_len)[:, None] * frequencies
        row, column = torch.arange(side * side) // side, torch.arange(side * side) % side
        quarter = frequencies[: dim // 4]
        grid = torch.cat((row[:, None] * quarter, column[:, None] * quarter), 1)
        angles = torch.cat((prefix, grid)).repeat(1, 2)
        self.register_buffer("cos_cached", angles.cos(), persistent=False)
        self.register_buffer("sin_cached", angles.sin(), persistent=False)

    def forward(self) -> Tables:
        return self.cos_cached, self.sin_cached


def turn(q: Tensor, tables: Tables) -> Tensor:
    cos, sin = tables
    wide = q.to(torch.promote_types(q.dtype, cos.dtype))  # upstream writes cos.dtype, as in rms_norm
    low, high = wide.chunk(2, -1)
    turned = torch.cat((-high, low), -1)
    return (wide * cos[:, None] + turned * sin[:, None]).to(q.dtype)


class Attention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.hidden_size, self.num_heads, self.num_key_value_heads = hidden_size, num_heads, num_heads
        self.head_dim = hidden_size // num_heads
        self.output_size = num_heads * self.head_dim
        self.causal = False
        self.qkv_proj = CastedLinear(hidden_size, 3 * self.output_size)
        self.o_proj = CastedLinear(self.output_size, hidden_size)

    def forward(self, cos_sin: Tables | None, hidden_states: Tensor) -> Tensor:
        rows, length, _ = hidden_states.shape
        q, k, v = self.qkv_proj(hidden_states).view(rows, length, 3, self.num_heads, self.head_dim).unbind(2)
        if cos_sin is not None:
            q, k = turn(q, cos_sin), turn(k, cos_sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o_proj(mixed.transpose(1, 2).reshape(rows, length, self.output_size))


class SwiGLU(nn.Module):
    def __init__(self, hidden_size: int, expansion: float) -> None:
        super().__init__()
        inner = swiglu_inner(hidden_size, expansion)
        self.gate_up_proj = CastedLinear(hidden_size, 2 * inner)
        self.down_proj = CastedLinear(inner, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class ConvSwiGLU(nn.Module):
    """URM's: the convolution holds its weights in the forward dtype."""

    def __init__(self, hidden_size: int, expansion: float, dtype: torch.dtype) -> None:
        super().__init__()
        inner = swiglu_inner(hidden_size, expansion)
        self.gate_up_proj = CastedLinear(hidden_size, 2 * inner)
        self.dwconv = nn.Conv1d(inner, inner, 2, padding=1, groups=inner).to(dtype)
        self.act = nn.SiLU()
        self.down_proj = CastedLinear(inner, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        mixed = self.dwconv((F.silu(gate) * up).transpose(1, 2).to(self.dwconv.weight.dtype))
        return self.down_proj(self.act(mixed[..., : x.shape[1]]).transpose(1, 2))
