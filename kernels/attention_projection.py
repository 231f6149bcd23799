"""Attention, output projection, residual and norm: the first half of an attention block after the QKV product.

    mixed = softmax(q k^T / sqrt(d)) v of all heads          [B, L, H d]
    out   = rms_norm(residual + mixed @ weight^T)            [B, L, D]

A program owns BLOCK_M queries of one sequence and holds their rows of the result, [BLOCK_M, D] in float32.  It goes
from head to head: attention to all keys in tiles of BLOCK_N (attention.py), then the head's share of the projection,
[BLOCK_M, d] @ [d, D].  ``mixed`` stays in registers; it is written only if backward needs it.

A program loads BLOCK_M H d elements of queries, 2 L H d of keys and values, D H d of the weight, and moves 2 BLOCK_M D
for the residual and the result; 4 L H d + 2 H d D FLOP a query.  The weight is loaded as often as by a projection of as
many rows; one launch and 2 H d elements a token of memory traffic are saved.  Few tokens make few programs, each
running all heads in series; long sequences load all keys for every BLOCK_M queries.  In both cases two kernels are
faster.
"""

from __future__ import annotations

import math
from math import prod

import triton
import triton.language as tl
from trmfast.kernels.attention import LN2, attend, load_rows
from trmfast.kernels.dot import dot, narrow
from trmfast.kernels.plan import Buffer, Launch, Tile
from trmfast.kernels.projection import begin_sum, block_width, end_sum, store_normed
from trmfast.kernels.rows import Rows, rows_of

from trmfast.spec import BlockSpec

__all__ = ["attention_projection"]


@triton.jit
def attention_projection_kernel(
    qkv,
    weight,
    residual,
    residual_squares,
    out,
    mixed_out,
    lse,
    rstd,
    length,
    heads,  # HEADS, at run time: a constant trip count would be unrolled
    D: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    EPS: tl.constexpr,
    RESIDUAL_PARTS: tl.constexpr,
    RESIDUAL_EPS: tl.constexpr,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    ONE_TILE: tl.constexpr,  # all keys fit one tile
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,  # of a head
    BLOCK_D: tl.constexpr,
):
    ROW: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    tiles = tl.cdiv(length, BLOCK_M)
    first_query = tl.program_id(0) % tiles * BLOCK_M
    first_token = (tl.program_id(0) // tiles).to(tl.int64) * length
    base = qkv + first_token * ROW
    rows = first_query + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_H)
    near = tl.minimum(tl.arange(0, BLOCK_D), D - 1)
    weight_offsets = near[:, None] * (HEADS * HEAD_DIM) + columns[None, :]
    h = begin_sum(
        residual, residual_squares, first_token + first_query, 0, first_token + length,
        D, RESIDUAL_PARTS, RESIDUAL_EPS, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    for head in range(heads):
        k_base = base + (HEADS + head // (HEADS // KV_HEADS)) * HEAD_DIM
        v_base = k_base + KV_HEADS * HEAD_DIM
        q = load_rows(base + head * HEAD_DIM, first_query, length, ROW, HEAD_DIM, BLOCK_M, BLOCK_H)
        mixed = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
        row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        if ONE_TILE:
            mixed, row_max, row_sum = attend(
                q, k_base, v_base, first_query, 0, length, mixed, row_max, row_sum,
                ROW, HEAD_DIM, SCALE, CAUSAL, PRECISION, BLOCK_M, BLOCK_N, BLOCK_H, MASKED=True, FIRST=True,
            )  # fmt: skip
        else:
            if CAUSAL:
                end = tl.minimum(length, first_query + BLOCK_M)
            else:
                end = length
            for first_key in range(0, end, BLOCK_N):
                mixed, row_max, row_sum = attend(
                    q, k_base, v_base, first_query, first_key, length, mixed, row_max, row_sum,
                    ROW, HEAD_DIM, SCALE, CAUSAL, PRECISION, BLOCK_M, BLOCK_N, BLOCK_H, MASKED=True, FIRST=False,
                )  # fmt: skip
        rounded = narrow(mixed / row_sum[:, None], out.dtype.element_ty)
        if mixed_out is not None:
            mask = (rows < length)[:, None]
            if HEAD_DIM != BLOCK_H:
                mask = mask & (columns < HEAD_DIM)[None, :]
            target = mixed_out + first_token * (HEADS * HEAD_DIM) + head * HEAD_DIM
            tl.store(target + rows[:, None] * (HEADS * HEAD_DIM) + columns[None, :], rounded, mask=mask)
        if lse is not None:
            sums = (row_max + tl.log2(row_sum)) * LN2
            tl.store(lse + (first_token * HEADS + head * length) + rows, sums, mask=rows < length)
        if HEAD_DIM == BLOCK_H:
            w = tl.load(weight + head * HEAD_DIM + weight_offsets)
        else:
            w = tl.load(weight + head * HEAD_DIM + weight_offsets, mask=(columns < HEAD_DIM)[None, :], other=0.0)
        h = dot(rounded, tl.trans(w), h, PRECISION)
    h = end_sum(
        h, residual, residual_squares, first_token + first_query, 0, first_token + length,
        D, RESIDUAL_PARTS, RESIDUAL_EPS, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    store_normed(h, out, rstd, first_token + first_query, first_token + length, D, EPS, BLOCK_M, BLOCK_D)


def attention_projection(
    block: BlockSpec,
    qkv: Buffer,
    weight: Buffer,
    residual: Buffer | Rows,
    out: Buffer,
    *,
    eps: float,
    mixed: Buffer | None = None,
    lse: Buffer | None = None,
    rstd: Buffer | None = None,
    tile: Tile,
    precision: str = "ieee",
) -> Launch:
    """The launch of attention with the projection, the residual and the norm.

    Args:
        block: sizes of the block.
        qkv: [B, L, (Hq + 2 Hkv) d], queries and keys rotated.
        weight: [D, Hq d].
        residual: [B, L, D].
        out: [B, L, D]; not the buffer of ``qkv``.
        eps: of the norm.
        mixed: [B, L, Hq d], receives the attention output, or None.
        lse: [B, Hq, L] float32, receives the natural logarithm of the sums of exp(q . k / sqrt(d)), or None.
        rstd: [B, L] float32, receives 1 / sqrt(mean(h^2) + eps) of each row, or None.
        tile: BLOCK_M queries, BLOCK_N keys.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.
    """
    (batch, length, _), width = qkv.shape, weight.shape[0]
    heads, head_dim, bypass = block.num_heads, block.head_dim, rows_of(residual)
    pairs = length * (length + 1) // 2 if block.causal else length * length
    return Launch.of(
        "attention_projection.attention_projection_kernel",
        (triton.cdiv(length, tile["BLOCK_M"]) * batch,),
        {
            "qkv": qkv,
            "weight": weight,
            "residual": bypass.values,
            "residual_squares": bypass.squares,
            "out": out,
            "mixed_out": mixed,
            "lse": lse,
            "rstd": rstd,
            "length": length,
            "heads": heads,
        },
        reads=("qkv", "weight", "residual", "residual_squares"),
        writes=("out", "mixed_out", "lse", "rstd"),
        constants={
            "D": width,
            "HEADS": heads,
            "KV_HEADS": block.num_kv_heads,
            "HEAD_DIM": head_dim,
            "EPS": eps,
            "RESIDUAL_PARTS": bypass.parts,
            "RESIDUAL_EPS": bypass.eps,
            "SCALE": head_dim**-0.5 * math.log2(math.e),
            "CAUSAL": block.causal,
            "ONE_TILE": length <= tile["BLOCK_N"],
            "PRECISION": precision,
            "BLOCK_H": max(16, triton.next_power_of_2(head_dim)),
            "BLOCK_D": block_width(width),
        },
        tile=tile,
        flops=4 * batch * heads * pairs * head_dim + 2 * prod(qkv.shape[:-1]) * heads * head_dim * width,
        special=batch * heads * pairs,
        loads=(tile["BLOCK_M"] + 2 * length + width) * heads * head_dim + 2 * tile["BLOCK_M"] * width,
    )
