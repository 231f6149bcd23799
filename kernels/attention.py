"""Softmax attention over whole sequences: the second launch of an attention block.

    mixed[i] = sum_j softmax_j(q_i . k_j / sqrt(d)) v_j          for every sequence and head

A program holds BLOCK_M queries of one head and walks over tiles of BLOCK_N keys, with the running maximum and sum of
FlashAttention (arXiv 2205.14135, 2307.08691): no [L, L] tensor.  Exponentials are powers of two of scores scaled by
log2(e) / sqrt(d), one multiply-add and one ex2 each.  Query tiles of one head are neighbours in the grid and share its
keys and values in L2: a head reads (1 + 2 ceil(L / BLOCK_M)) L d elements and writes L d, for 4 L^2 d FLOP.

Only the last key tile (causal: those on the diagonal) is masked.  With a window or segments every query has a first and
a last key: the tiles between the first and the last of a program's queries are walked, all of them masked.  Rows beyond
L repeat the last one, so that no load of queries, keys or values needs a mask where d is a power of two.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from trmfast.kernels.dot import dot, narrow
from trmfast.kernels.plan import Buffer, Launch, Tile

from trmfast.spec import BlockSpec

__all__ = ["LN2", "attend", "attention", "load_rows", "seen_keys", "sigmoid", "store_mixed"]

LN2 = tl.constexpr(math.log(2))
LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def load_rows(base, first, length, ROW, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of one head [BLOCK, BLOCK_D], from ``first`` on; beyond the sequence its last row, beyond the head zero."""
    rows = tl.minimum(first + tl.arange(0, BLOCK), length - 1)
    columns = tl.arange(0, BLOCK_D)
    source = base + rows[:, None] * ROW + columns[None, :]
    if HEAD_DIM == BLOCK_D:
        return tl.load(source)
    return tl.load(source, mask=(columns < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def sigmoid(gate):
    """Of a gate, rounded as the gate is."""
    return narrow(1.0 / (1.0 + tl.exp2(gate.to(tl.float32) * -LOG2E)), gate.dtype)


@triton.jit
def seen_keys(segments, first_token, query, length, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """The first key that each query sees, and the one behind the last; ``segments`` or WINDOW says so.

    Queries beyond the sequence see what its last one sees.
    """
    near = tl.minimum(query, length - 1)
    if segments is not None:
        bounds = segments + (first_token + near) * 2
        # No address outside of the sequence comes from segments that were not checked.
        begin = tl.maximum(tl.load(bounds), 0)
        end = tl.minimum(tl.maximum(tl.load(bounds + 1), near + 1), length)
    else:
        begin = tl.maximum(near - (WINDOW - 1), 0)
        if CAUSAL:
            end = near + 1
        else:
            end = tl.minimum(near + WINDOW, length)
    return begin, end


@triton.jit
def attend(
    q,
    k_base,
    v_base,
    first_query,
    first_key,
    length,
    mixed,
    row_max,
    row_sum,
    ROW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    FIRST: tl.constexpr,
    begin=None,
    end=None,
):
    """Adds one tile of keys to the running softmax; SCALE includes log2(e), and row_max is in its units.

    ``begin`` and ``end``, where they are not None, are the ranges of keys that MASKED means.
    """
    k = load_rows(k_base, first_key, length, ROW, HEAD_DIM, BLOCK_N, BLOCK_D)
    v = load_rows(v_base, first_key, length, ROW, HEAD_DIM, BLOCK_N, BLOCK_D)
    scores = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
    if MASKED:
        keys = first_key + tl.arange(0, BLOCK_N)
        if begin is not None:
            seen = (keys[None, :] >= begin[:, None]) & (keys[None, :] < end[:, None])
        else:
            seen = (keys < length)[None, :]
            if CAUSAL:
                seen = seen & (keys[None, :] <= (first_query + tl.arange(0, BLOCK_M))[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    if FIRST:
        row_max = tl.max(scores, 1) * SCALE
        weights = tl.exp2(scores * SCALE - row_max[:, None])
        row_sum = tl.sum(weights, 1)
        mixed = dot(narrow(weights, v.dtype), v, mixed, PRECISION)
    else:
        new_max = tl.maximum(row_max, tl.max(scores, 1) * SCALE)
        base = new_max
        if begin is not None:  # a row may have seen no key yet
            base = tl.where(new_max == float("-inf"), 0.0, new_max)
        shrink = tl.exp2(row_max - base)
        weights = tl.exp2(scores * SCALE - base[:, None])
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        row_max = new_max
        mixed = dot(narrow(weights, v.dtype), v, mixed * shrink[:, None], PRECISION)
    return mixed, row_max, row_sum


@triton.jit
def store_mixed(
    out,
    mixed,
    gates,
    first_token,
    first_query,
    head,
    length,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GATE: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Stores what the queries of a tile mixed, times their gate if there is one; returns their positions."""
    rows = first_query + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < length)[:, None]
    if HEAD_DIM != BLOCK_D:
        mask = mask & (columns < HEAD_DIM)[None, :]
    target = out + first_token * (HEADS * HEAD_DIM) + head * HEAD_DIM + rows[:, None] * (HEADS * HEAD_DIM)
    result = narrow(mixed, out.dtype.element_ty)
    if GATE > 0:
        if GATE == HEADS:
            gate = tl.load(gates + rows * ROW + head, mask=rows < length, other=0.0)[:, None]
        else:
            gate = tl.load(gates + head * HEAD_DIM + rows[:, None] * ROW + columns[None, :], mask=mask, other=0.0)
        result = narrow(result.to(tl.float32) * sigmoid(gate).to(tl.float32), result.dtype)
    tl.store(target + columns[None, :], result, mask=mask)
    return rows


@triton.jit
def attention_kernel(
    qkv,
    segments,
    out,
    lse,
    length,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    GATE: tl.constexpr,  # columns of the gate: none, one a head, or one a channel
    ONE_TILE: tl.constexpr,  # all keys fit one tile
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    ROW: tl.constexpr = GATE + (HEADS + 2 * KV_HEADS) * HEAD_DIM
    RANGED: tl.constexpr = WINDOW > 0 or segments is not None
    tiles = tl.cdiv(length, BLOCK_M)
    pid = tl.program_id(0)
    first_query = pid % tiles * BLOCK_M
    head = pid // tiles % HEADS
    sequence = pid // tiles // HEADS
    first_token = sequence.to(tl.int64) * length
    gates = qkv + first_token * ROW
    q_base = gates + GATE + head * HEAD_DIM
    k_base = gates + GATE + (HEADS + head // (HEADS // KV_HEADS)) * HEAD_DIM
    v_base = k_base + KV_HEADS * HEAD_DIM

    q = load_rows(q_base, first_query, length, ROW, HEAD_DIM, BLOCK_M, BLOCK_D)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    if RANGED:
        begin, end = seen_keys(segments, first_token, first_query + tl.arange(0, BLOCK_M), length, CAUSAL, WINDOW)
        for first_key in range(tl.min(begin, 0) // BLOCK_N * BLOCK_N, tl.max(end, 0), BLOCK_N):
            mixed, row_max, row_sum = attend(
                q, k_base, v_base, first_query, first_key, length, mixed, row_max, row_sum,
                ROW, HEAD_DIM, SCALE, CAUSAL, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, MASKED=True, FIRST=False,
                begin=begin, end=end,
            )  # fmt: skip
    elif ONE_TILE:
        mixed, row_max, row_sum = attend(
            q, k_base, v_base, first_query, 0, length, mixed, row_max, row_sum,
            ROW, HEAD_DIM, SCALE, CAUSAL, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, MASKED=True, FIRST=True,
        )  # fmt: skip
    else:
        if CAUSAL:
            end = tl.minimum(length, first_query + BLOCK_M)
            masked_from = (first_query + 1) // BLOCK_N * BLOCK_N
        else:
            end = length
            masked_from = length // BLOCK_N * BLOCK_N
        for first_key in range(0, masked_from, BLOCK_N):
            mixed, row_max, row_sum = attend(
                q, k_base, v_base, first_query, first_key, length, mixed, row_max, row_sum,
                ROW, HEAD_DIM, SCALE, CAUSAL, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, MASKED=False, FIRST=False,
            )  # fmt: skip
        for first_key in range(masked_from, end, BLOCK_N):
            mixed, row_max, row_sum = attend(
                q, k_base, v_base, first_query, first_key, length, mixed, row_max, row_sum,
                ROW, HEAD_DIM, SCALE, CAUSAL, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, MASKED=True, FIRST=False,
            )  # fmt: skip

    mixed = mixed / row_sum[:, None]
    rows = store_mixed(
        out, mixed, gates, first_token, first_query, head, length, HEADS, HEAD_DIM, GATE, ROW, BLOCK_M, BLOCK_D
    )  # fmt: skip
    if lse is not None:
        of_rows = lse + (first_token * HEADS + head * length) + rows
        tl.store(of_rows, (row_max + tl.log2(row_sum)) * LN2, mask=rows < length)


def attention(
    block: BlockSpec,
    qkv: Buffer,
    out: Buffer,
    *,
    segments: Buffer | None = None,
    lse: Buffer | None = None,
    tile: Tile,
    precision: str = "ieee",
) -> Launch:
    """The launch of the attention of every head.

    Args:
        block: sizes of the block.
        qkv: [B, L, G + (Hq + 2 Hkv) d], the gate, queries and keys rotated, values.
        out: [B, L, Hq d], times the gate if the block has one.
        segments: int32 [B, L, 2], of each token the start of its sequence and the end of its prefix, or None.
        lse: [B, Hq, L] float32, receives the natural logarithm of sum exp(q . k / sqrt(d)) for backward, or None.
        tile: BLOCK_M queries, BLOCK_N keys.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.
    """
    batch, length, _ = qkv.shape
    pairs = block.attention_pairs(length)
    keys = length
    if block.attention_window:
        keys = min(length, tile["BLOCK_M"] + (1 if block.causal else 2) * block.attention_window)
    return Launch.of(
        "attention.attention_kernel",
        (triton.cdiv(length, tile["BLOCK_M"]) * block.num_heads * batch,),
        {"qkv": qkv, "segments": segments, "out": out, "lse": lse, "length": length},
        reads=("qkv", "segments"),
        writes=("out", "lse"),
        constants={
            "HEADS": block.num_heads,
            "KV_HEADS": block.num_kv_heads,
            "HEAD_DIM": block.head_dim,
            "SCALE": block.head_dim**-0.5 * math.log2(math.e),
            "CAUSAL": block.causal,
            "WINDOW": min(block.attention_window, length),
            "GATE": block.gate_rows,
            "ONE_TILE": length <= tile["BLOCK_N"],
            "PRECISION": precision,
            "BLOCK_D": max(16, triton.next_power_of_2(block.head_dim)),
        },
        tile=tile,
        flops=4 * batch * block.num_heads * pairs * block.head_dim,
        special=batch * block.num_heads * pairs + 2 * batch * length * block.gate_rows,
        loads=(2 * (tile["BLOCK_M"] + keys) + (block.gate == "channel") * tile["BLOCK_M"]) * block.head_dim,
    )
