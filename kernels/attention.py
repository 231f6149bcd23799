"""Softmax attention over whole sequences: the second launch of an attention block.

    mixed[i] = sum_j softmax_j(q_i . k_j / sqrt(d)) v_j          for every sequence and head

A program holds BLOCK_M queries of one head and walks over tiles of BLOCK_N keys, with the running maximum and sum of
FlashAttention (arXiv 2205.14135, 2307.08691): no [L, L] tensor.  Exponentials are powers of two of scores scaled by
log2(e) / sqrt(d), one multiply-add and one ex2 each.  Query tiles of one head are neighbours in the grid and share its
keys and values in L2: a head reads (1 + 2 ceil(L / BLOCK_M)) L d elements and writes L d, for 4 L^2 d FLOP.

Only the last key tile (causal: those on the diagonal) is masked.  Rows beyond L repeat the last one, so that no load of
queries, keys or values needs a mask where d is a power of two.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from trmfast.kernels.dot import dot, narrow
from trmfast.kernels.plan import Buffer, Launch, Tile

from trmfast.spec import BlockSpec

__all__ = ["LN2", "attend", "attention", "load_rows"]

LN2 = tl.constexpr(math.log(2))


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
):
    """Adds one tile of keys to the running softmax; SCALE includes log2(e), and row_max is in its units."""
    k = load_rows(k_base, first_key, length, ROW, HEAD_DIM, BLOCK_N, BLOCK_D)
    v = load_rows(v_base, first_key, length, ROW, HEAD_DIM, BLOCK_N, BLOCK_D)
    scores = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
    if MASKED:
        keys = first_key + tl.arange(0, BLOCK_N)
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
        shrink = tl.exp2(row_max - new_max)
        weights = tl.exp2(scores * SCALE - new_max[:, None])
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        row_max = new_max
        mixed = dot(narrow(weights, v.dtype), v, mixed * shrink[:, None], PRECISION)
    return mixed, row_max, row_sum


@triton.jit
def attention_kernel(
    qkv,
    out,
    lse,
    length,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    ONE_TILE: tl.constexpr,  # all keys fit one tile
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    ROW: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    tiles = tl.cdiv(length, BLOCK_M)
    pid = tl.program_id(0)
    first_query = pid % tiles * BLOCK_M
    head = pid // tiles % HEADS
    sequence = pid // tiles // HEADS
    first_token = sequence.to(tl.int64) * length
    q_base = qkv + first_token * ROW + head * HEAD_DIM
    k_base = qkv + first_token * ROW + (HEADS + head // (HEADS // KV_HEADS)) * HEAD_DIM
    v_base = k_base + KV_HEADS * HEAD_DIM

    q = load_rows(q_base, first_query, length, ROW, HEAD_DIM, BLOCK_M, BLOCK_D)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    if ONE_TILE:
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

    rows = first_query + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < length)[:, None]
    if HEAD_DIM != BLOCK_D:
        mask = mask & (columns < HEAD_DIM)[None, :]
    target = out + first_token * (HEADS * HEAD_DIM) + head * HEAD_DIM + rows[:, None] * (HEADS * HEAD_DIM)
    tl.store(target + columns[None, :], narrow(mixed / row_sum[:, None], out.dtype.element_ty), mask=mask)
    if lse is not None:
        of_rows = lse + (first_token * HEADS + head * length) + rows
        tl.store(of_rows, (row_max + tl.log2(row_sum)) * LN2, mask=rows < length)


def attention(
    block: BlockSpec, qkv: Buffer, out: Buffer, *, lse: Buffer | None = None, tile: Tile, precision: str = "ieee"
) -> Launch:
    """The launch of the attention of every head.

    Args:
        block: sizes of the block.
        qkv: [B, L, (Hq + 2 Hkv) d], queries and keys rotated.
        out: [B, L, Hq d].
        lse: [B, Hq, L] float32, receives the natural logarithm of sum exp(q . k / sqrt(d)) for backward, or None.
        tile: BLOCK_M queries, BLOCK_N keys.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.
    """
    batch, length, _ = qkv.shape
    pairs = length * (length + 1) // 2 if block.causal else length * length
    return Launch.of(
        "attention.attention_kernel",
        (triton.cdiv(length, tile["BLOCK_M"]) * block.num_heads * batch,),
        {"qkv": qkv, "out": out, "lse": lse, "length": length},
        reads=("qkv",),
        writes=("out", "lse"),
        constants={
            "HEADS": block.num_heads,
            "KV_HEADS": block.num_kv_heads,
            "HEAD_DIM": block.head_dim,
            "SCALE": block.head_dim**-0.5 * math.log2(math.e),
            "CAUSAL": block.causal,
            "ONE_TILE": length <= tile["BLOCK_N"],
            "PRECISION": precision,
            "BLOCK_D": max(16, triton.next_power_of_2(block.head_dim)),
        },
        tile=tile,
        flops=4 * batch * block.num_heads * pairs * block.head_dim,
        special=batch * block.num_heads * pairs,
        loads=2 * (tile["BLOCK_M"] + length) * block.head_dim,
    )
