"""A network with every choice of a block, written independently of the reference: loops over tokens and heads."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from trmfast import BlockSpec, NetSpec

__all__ = ["DRAWN", "LENGTH", "OPTIONS", "naive_net", "sees", "segments_of", "spec_of"]

# One value of every option that is not the default's, by itself and in pairs.
OPTIONS: tuple[dict[str, Any], ...] = (
    {"norm_placement": "pre"},
    {"norm_placement": "sandwich"},
    {"norm_placement": "sandwich_sum"},
    {"norm_weight": True},
    {"rotation": "interleaved"},
    {"qk_norm": "plain"},
    {"qk_norm": "learned"},
    {"qk_bias": True},
    {"gate": "channel"},
    {"gate": "head"},
    {"attention_window": 2},
    {"causal": True},
    {"channel_mixer": "relu2"},
    {"channel_mixer": "gelu"},
    {"channel_mixer": "conv_swiglu"},
    {"num_kv_heads": 4},
    {"final_norm": True},
    {"injection": "diagonal"},
    {"injection": "linear"},
    {"segments": True, "causal": True},
    {"token_mixer": "simple_gla", "causal": True},
)
GLA: dict[str, Any] = {"token_mixer": "simple_gla", "causal": True}
# Two sequences in a row: two tokens of which the first is a prefix, and three of which the first two are.
SEGMENTS = torch.tensor([[0, 1], [0, 1], [2, 4], [2, 4], [2, 4]])
# The same without prefixes, for simple_gla.
STARTS = torch.tensor([[0, 0], [0, 0], [2, 2], [2, 2], [2, 2]])


def segments_of(block: BlockSpec) -> Tensor:
    """The boundaries of the one row, [1, L, 2]."""
    return (STARTS if block.token_mixer == "simple_gla" else SEGMENTS)[None]


def spec_of(options: dict[str, Any]) -> NetSpec:
    """A block of width 8 with four heads of 2; with a final norm two of them.  Sizes differ, so that axes do."""
    given = {"num_kv_heads": 2, **options}
    final, injection = given.pop("final_norm", False), given.pop("injection", "add")
    return NetSpec(BlockSpec(8, 6, num_heads=4, **given), 1 + final, final, injection)


EXCLUSIVE = ({"segments", "attention_window"}, {"token_mixer", "attention_window"})


def pairs(count: int) -> Iterator[dict[str, Any]]:
    """Random pairs of options that do not exclude each other."""
    rng = random.Random(0)
    while count:
        first, second = rng.sample(OPTIONS, 2)
        if not first.keys() & second.keys() and not any(no <= first.keys() | second.keys() for no in EXCLUSIVE):
            yield {**first, **second}
            count -= 1


DRAWN = (
    *OPTIONS,
    *pairs(24),
    {**GLA, "segments": True},
    {**GLA, "gate": "channel", "qk_norm": "learned", "norm_placement": "pre"},
    {**GLA, "gate": "head", "qk_bias": True, "rotation": "interleaved", "num_kv_heads": 4},
)
LENGTH = 5


# ---------------------------------------------------------------- the network


def norm(row: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    scaled = row / math.sqrt(sum(v * v for v in row.tolist()) / len(row) + eps)
    return scaled if weight is None else scaled * weight


def turned(row: Tensor, position: int, rotation: str) -> Tensor:
    """Pairs of channels as complex numbers, turned by position / 1e4^(2i/d)."""
    width, out = len(row), row.clone()
    for i in range(width // 2):
        a, b = (i, i + width // 2) if rotation == "half" else (2 * i, 2 * i + 1)
        angle = position / 1e4 ** (2 * i / width)
        value = complex(row[a].item(), row[b].item()) * complex(math.cos(angle), math.sin(angle))
        out[a], out[b] = value.real, value.imag
    return out


def sees(block: BlockSpec, i: int, j: int) -> bool:
    if block.segments:
        start, prefix_end = SEGMENTS[i].tolist()
        return start <= j and (j <= i or j < prefix_end)
    if block.causal and j > i:
        return False
    return not block.attention_window or abs(i - j) < block.attention_window


def attention(rows: list[Tensor], block: BlockSpec, w: dict[str, Tensor]) -> list[Tensor]:
    heads, kv, d = block.num_heads, block.num_kv_heads, block.head_dim
    linear = block.token_mixer == "simple_gla"
    w = {name.removeprefix("self_attn.").removeprefix("simple_gla."): weight for name, weight in w.items()}
    packed = w["in_proj.weight" if linear else "qkv_proj.weight" if block.gate == "none" else "gqkv_proj.weight"]
    gate_rows = {"none": 0, "channel": heads * d, "head": heads}[block.gate]
    before = gate_rows + heads * linear
    projected = [packed[before:] @ row for row in rows]

    def key_or_query(position: int, index: int, kind: str) -> Tensor:
        at = (index if kind == "q" else heads + index) * d
        row = projected[position][at : at + d]
        if block.qk_bias:
            row = row + w["qk_bias"][at : at + d]
        if block.qk_norm != "none":
            row = norm(row, block.rms_norm_eps, w.get(f"{kind}_norm.weight"))
        return turned(row, position, block.rotation)

    def value(position: int, index: int) -> Tensor:
        at = (heads + kv + index) * d
        return projected[position][at : at + d]

    out = []
    states = [torch.zeros(d, d, dtype=torch.float64)] * heads  # of simple_gla, token by token
    for i, row in enumerate(rows):
        mixed = torch.zeros(heads * d, dtype=torch.float64)
        seen = [j for j in range(len(rows)) if sees(block, i, j)]
        for n in range(heads):
            group = n // (heads // kv)
            q, own = key_or_query(i, n, "q"), slice(n * d, (n + 1) * d)
            if linear:
                logit = packed[gate_rows + n] @ row + w["decay_bias"][n]
                kept = 0.0 if block.segments and STARTS[i, 0] == i else (1 / (1 + math.exp(-logit))) ** (1 / 16)
                states[n] = kept * states[n] + torch.outer(key_or_query(i, group, "k"), value(i, group))
                mixed[own] = q @ states[n] / math.sqrt(d)
            else:
                scores = [math.exp((q @ key_or_query(j, group, "k")).item() / math.sqrt(d)) for j in seen]
                for score, j in zip(scores, seen, strict=True):
                    mixed[own] += score / sum(scores) * value(j, group)
            if block.gate != "none":
                part = packed[n * d : (n + 1) * d] if block.gate == "channel" else packed[n : n + 1]
                mixed[own] *= 1 / (1 + torch.exp(-(part @ row)))
        out.append(w["o_proj.weight"] @ mixed)
    return out


def channels(rows: list[Tensor], block: BlockSpec, w: dict[str, Tensor]) -> list[Tensor]:
    down, inner = w["mlp.down_proj.weight"], block.intermediate_size
    if block.channel_mixer in ("relu2", "gelu"):
        ups = [w["mlp.up_proj.weight"] @ row for row in rows]
        if block.channel_mixer == "relu2":
            return [down @ torch.tensor([max(u, 0.0) ** 2 for u in up.tolist()], dtype=torch.float64) for up in ups]
        normal = [[u * 0.5 * math.erfc(-u / math.sqrt(2)) for u in up.tolist()] for up in ups]
        return [down @ torch.tensor(row, dtype=torch.float64) for row in normal]
    gates = [w["mlp.gate_up_proj.weight"] @ row for row in rows]
    activations = [g[:inner] / (1 + torch.exp(-g[:inner])) * g[inner:] for g in gates]
    if block.channel_mixer == "conv_swiglu":  # two taps: the token before and the token itself
        before = [torch.zeros(inner, dtype=torch.float64), *activations[:-1]]
        taps, bias = w["mlp.dwconv.weight"][:, 0], w["mlp.dwconv.bias"]
        sums = [taps[:, 0] * a + taps[:, 1] * b + bias for a, b in zip(before, activations, strict=True)]
        activations = [s / (1 + torch.exp(-s)) for s in sums]
    return [down @ a for a in activations]


def naive_block(rows: list[Tensor], block: BlockSpec, w: dict[str, Tensor]) -> list[Tensor]:
    eps, index = block.rms_norm_eps, iter(range(1, 5))

    def normed(these: list[Tensor]) -> list[Tensor]:
        weight = w.get(f"norm{next(index)}.weight")
        return [norm(row, eps, weight) for row in these]

    def plus(these: list[Tensor], those: list[Tensor]) -> list[Tensor]:
        return [a + b for a, b in zip(these, those, strict=True)]

    for mix in (attention, channels):
        if block.norm_placement == "post":
            rows = normed(plus(rows, mix(rows, block, w)))
        elif block.norm_placement == "pre":
            rows = plus(rows, mix(normed(rows), block, w))
        elif block.norm_placement == "sandwich":
            rows = plus(rows, normed(mix(normed(rows), block, w)))
        else:
            rows = normed(plus(rows, mix(normed(rows), block, w)))
    return rows


def naive_net(total: Tensor, x: Tensor, spec: NetSpec, weights: list[Tensor]) -> Tensor:
    """total: the sum of an update's sources, [L, D]; x: [L, D]."""
    named = dict(zip((name for name, _ in spec.weight_shapes), weights, strict=True))
    rows = list(total + x)
    if spec.injection == "diagonal":
        weight = named["injection.weight"].tolist()
        rows = [torch.stack([w * v for w, v in zip(weight, s, strict=True)]) + e for s, e in zip(total, x, strict=True)]
    elif spec.injection == "linear":
        rows = [
            sum((w * v for w, v in zip(named["injection.weight"].T, s, strict=True)), e)
            for s, e in zip(total, x, strict=True)
        ]
    for layer in range(spec.num_layers):
        prefix = f"layers.{layer}."
        block = {name.removeprefix(prefix): w for name, w in named.items() if name.startswith(prefix)}
        rows = naive_block(rows, spec.block, block)
    if spec.final_norm:
        rows = [norm(row, spec.block.rms_norm_eps, named.get("norm.weight")) for row in rows]
    return torch.stack(rows)
