"""Simple GLA over whole sequences, in the place of softmax attention: two launches behind the QKV product.

    c_t      = c_(t-1) + logsigmoid(logit_t + bias) / 16              one sum for every sequence and head
    mixed[i] = sum_(j <= i) (q_i . k_j / sqrt(d)) exp(c_i - c_j) v_j

The quadratic form of trmfast/reference.py: causal attention whose scores are multiplied by decays, so there is no
running maximum and no sum.  The sums c are float64: two of them may be large and their difference small.  A program of
``simple_gla`` subtracts the sum of its first query from those of its queries and of each tile of keys, in float64, and
adds the two float32 differences for every pair; keys behind a query are masked after their exponential, which may be
infinite.  Loads, tiles and FLOP are those of causal attention; ``sum_decays`` reads one column of the product for each
head.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from trmfast.kernels.attention import load_rows, store_mixed
from trmfast.kernels.dot import dot, narrow
from trmfast.kernels.plan import Buffer, Launch, Tile

from trmfast.spec import DECAY_NORMALIZER, BlockSpec

__all__ = ["DECAY_UNIT", "first_keys", "load_logits", "pair_decays", "simple_gla", "sum_decays"]

LOG2E = tl.constexpr(math.log2(math.e))
DECAY_UNIT = tl.constexpr(1 / DECAY_NORMALIZER)


@triton.jit
def load_logits(column, bias, token, inside, ROW: tl.constexpr):
    """The logits of a head's decays [tokens], with their bias."""
    logit = tl.load(column + token * ROW, inside, 0.0).to(tl.float32)
    return logit + tl.load(bias).to(tl.float32)


@triton.jit
def sum_decays_kernel(
    qkv,
    bias,
    totals,
    length,
    HEADS: tl.constexpr,
    GATE: tl.constexpr,  # columns of the gate, ahead of those of the decays
    ROW: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    head = tl.program_id(0) % HEADS
    sequence = (tl.program_id(0) // HEADS).to(tl.int64)
    column = qkv + sequence * length * ROW + GATE + head
    target = totals + (sequence * HEADS + head) * length
    before = tl.zeros((1,), tl.float64)
    for first in range(0, length, BLOCK_L):
        token = first + tl.arange(0, BLOCK_L)
        inside = token < length
        logit = load_logits(column, bias + head, token, inside, ROW)
        decay = tl.minimum(logit, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(logit)))
        decay = tl.where(inside, decay * DECAY_UNIT, 0.0).to(tl.float64)
        tl.store(target + token, before + tl.cumsum(decay, 0), inside)
        before += tl.sum(decay, 0)


@triton.jit
def first_keys(segments, first_token, query, length):
    """The first key that each query sees; queries beyond the sequence see what its last one sees."""
    near = tl.minimum(query, length - 1)
    if segments is not None:
        return tl.maximum(tl.load(segments + (first_token + near) * 2), 0)
    return near * 0


@triton.jit
def pair_decays(of_query, of_key):
    """exp of the sums of two float32 differences, [queries, 1] and [1, keys] or the other way round."""
    return tl.exp2((of_query + of_key) * LOG2E)


@triton.jit
def simple_gla_kernel(
    qkv,
    totals,
    segments,
    out,
    length,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    GATE: tl.constexpr,  # columns of the gate: none, one a head, or one a channel
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    AHEAD: tl.constexpr = GATE + HEADS
    ROW: tl.constexpr = AHEAD + (HEADS + 2 * KV_HEADS) * HEAD_DIM
    tiles = tl.cdiv(length, BLOCK_M)
    pid = tl.program_id(0)
    first_query = pid % tiles * BLOCK_M
    head = pid // tiles % HEADS
    sequence = (pid // tiles // HEADS).to(tl.int64)
    first_token = sequence * length
    gates = qkv + first_token * ROW
    q_base = gates + AHEAD + head * HEAD_DIM
    k_base = gates + AHEAD + (HEADS + head // (HEADS // KV_HEADS)) * HEAD_DIM
    v_base = k_base + KV_HEADS * HEAD_DIM
    sums = totals + (sequence * HEADS + head) * length

    query = first_query + tl.arange(0, BLOCK_M)
    q = load_rows(q_base, first_query, length, ROW, HEAD_DIM, BLOCK_M, BLOCK_D)
    base = tl.load(sums + first_query)
    of_query = (tl.load(sums + tl.minimum(query, length - 1)) - base).to(tl.float32)
    begin = first_keys(segments, first_token, query, length)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first_key in range(tl.min(begin, 0) // BLOCK_N * BLOCK_N, tl.minimum(length, first_query + BLOCK_M), BLOCK_N):
        key = first_key + tl.arange(0, BLOCK_N)
        k = load_rows(k_base, first_key, length, ROW, HEAD_DIM, BLOCK_N, BLOCK_D)
        v = load_rows(v_base, first_key, length, ROW, HEAD_DIM, BLOCK_N, BLOCK_D)
        of_key = (base - tl.load(sums + tl.minimum(key, length - 1))).to(tl.float32)
        scores = dot(q, tl.trans(k), zero, PRECISION)
        seen = (key[None, :] >= begin[:, None]) & (key[None, :] <= query[:, None])
        weights = tl.where(seen, scores * (pair_decays(of_query[:, None], of_key[None, :]) * SCALE), 0.0)
        mixed = dot(narrow(weights, v.dtype), v, mixed, PRECISION)
    store_mixed(out, mixed, gates, first_token, first_query, head, length, HEADS, HEAD_DIM, GATE, ROW, BLOCK_M, BLOCK_D)


def sum_decays(block: BlockSpec, qkv: Buffer, bias: Buffer, totals: Buffer, *, tile: Tile) -> Launch:
    """The launch of the sums of the logarithms of all decays.

    Args:
        block: sizes of the block.
        qkv: [B, L, G + Hq + (Hq + 2 Hkv) d], the logits of the decays behind the gate.
        bias: [Hq].
        totals: [B, Hq, L] float64, the result.
        tile: BLOCK_L tokens.
    """
    batch, length, row = qkv.shape
    return Launch.of(
        "simple_gla.sum_decays_kernel",
        (batch * block.num_heads,),
        {"qkv": qkv, "bias": bias, "totals": totals, "length": length},
        reads=("qkv", "bias"),
        writes=("totals",),
        constants={"HEADS": block.num_heads, "GATE": block.gate_rows, "ROW": row},
        tile=tile,
        special=2 * batch * length * block.num_heads,
        loads=length,
    )


def simple_gla(
    block: BlockSpec,
    qkv: Buffer,
    totals: Buffer,
    out: Buffer,
    *,
    segments: Buffer | None = None,
    tile: Tile,
    precision: str = "ieee",
) -> Launch:
    """The launch that mixes the values of every head.

    Args:
        block: sizes of the block.
        qkv: [B, L, G + Hq + (Hq + 2 Hkv) d], the gate, logits of decays, queries and keys rotated, values.
        totals: [B, Hq, L] float64, from :func:`sum_decays`.
        out: [B, L, Hq d], times the gate if the block has one.
        segments: int32 [B, L, 2], of each token the start of its sequence, and what is not read; or None.
        tile: BLOCK_M queries, BLOCK_N keys.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.
    """
    batch, length, _ = qkv.shape
    pairs = batch * block.num_heads * block.attention_pairs(length)
    return Launch.of(
        "simple_gla.simple_gla_kernel",
        (triton.cdiv(length, tile["BLOCK_M"]) * block.num_heads * batch,),
        {"qkv": qkv, "totals": totals, "segments": segments, "out": out, "length": length},
        reads=("qkv", "totals", "segments"),
        writes=("out",),
        constants={
            "HEADS": block.num_heads,
            "KV_HEADS": block.num_kv_heads,
            "HEAD_DIM": block.head_dim,
            "SCALE": block.head_dim**-0.5,
            "GATE": block.gate_rows,
            "PRECISION": precision,
            "BLOCK_D": max(16, triton.next_power_of_2(block.head_dim)),
        },
        tile=tile,
        flops=4 * pairs * block.head_dim,
        special=pairs + 2 * batch * length * block.gate_rows,
        loads=(2 * (tile["BLOCK_M"] + length) + (block.gate == "channel") * tile["BLOCK_M"]) * block.head_dim,
    )
