"""Gradients of simple GLA: queries, keys, values and decays, from the gradient of what they mixed.

With s = q k^T / sqrt(d), decays D = exp(c_i - c_j) and p = s D, all recomputed,

    grad v = p^T grad mixed             grad s = grad p D,  grad p = grad mixed v^T
    grad q = grad s k / sqrt(d)         grad k = grad s^T q / sqrt(d)
    grad c_t = sum_(j < t) (grad p p)_tj - sum_(i > t) (grad p p)_it

and the running sum of grad c from the last token on is the gradient of the logarithms of the decays.

simple_gla_backward_queries: a program owns BLOCK_M queries of one head, walks the keys, writes grad q and the first sum
of grad c.  simple_gla_backward_keys: a program owns BLOCK_N keys of one key/value head, walks the queries of its query
heads, one head after the other, writes grad k and grad v, and takes the second sum off.  Together they read 2 Q + 2 A
elements a token, write Q, and take 7 A L FLOP a token.  decays_backward: a program owns one head of a sequence.  Every
result has one owner.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from trmfast.kernels.attention_backward import (
    head_columns,
    load_columns,
    product_flops,
    rotation_constants,
    seeing_queries,
    store_unrotated,
)
from trmfast.kernels.dot import dot, narrow
from trmfast.kernels.plan import Buffer, Launch, Tile
from trmfast.kernels.simple_gla import DECAY_UNIT, first_keys, load_logits, pair_decays

from trmfast.spec import BlockSpec

__all__ = ["decays_backward", "simple_gla_backward_keys", "simple_gla_backward_queries"]


@triton.jit
def simple_gla_backward_queries_kernel(
    qkv,
    totals,
    segments,
    grad_mixed,
    cos,
    sin,
    grad_totals,
    grad_qkv,
    length,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,  # half of a rotated head; 0: no rotation
    INTERLEAVED: tl.constexpr,
    GROUP: tl.constexpr,
    AHEAD: tl.constexpr,  # columns of the gate and the decays, which come first
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    STRIDE: tl.constexpr = AHEAD + (HEADS + 2 * KV_HEADS) * HEAD_DIM
    MIXED_STRIDE: tl.constexpr = HEADS * HEAD_DIM
    first_query = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1)
    kv_head = head // (HEADS // KV_HEADS)
    batch = tl.program_id(2).to(tl.int64)
    query = first_query + tl.arange(0, BLOCK_M)
    start = batch * length * STRIDE + AHEAD
    query_at = start + head * HEAD_DIM
    key_at = start + (HEADS + kv_head) * HEAD_DIM
    value_at = start + (HEADS + KV_HEADS + kv_head) * HEAD_DIM
    of_head = (batch * HEADS + head) * length
    dtype: tl.constexpr = qkv.dtype.element_ty

    plain = tl.arange(0, BLOCK_D)
    column = head_columns(HALF, INTERLEAVED, GROUP, BLOCK_D)
    q = load_columns(qkv + query_at, query, column, length, STRIDE, HEAD_DIM, BLOCK_D)
    mixed_at = batch * length * MIXED_STRIDE + head * HEAD_DIM
    grad = load_columns(grad_mixed + mixed_at, query, plain, length, MIXED_STRIDE, HEAD_DIM, BLOCK_D)
    base = tl.load(totals + of_head + first_query)
    of_query = (tl.load(totals + of_head + tl.minimum(query, length - 1)) - base).to(tl.float32)
    begin = first_keys(segments, batch * length, query, length)
    grad_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    grad_total = tl.zeros((BLOCK_M,), tl.float32)
    zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first_key in range(tl.min(begin, 0) // BLOCK_N * BLOCK_N, tl.minimum(first_query + BLOCK_M, length), BLOCK_N):
        key = first_key + tl.arange(0, BLOCK_N)
        k = load_columns(qkv + key_at, key, column, length, STRIDE, HEAD_DIM, BLOCK_D)
        v = load_columns(qkv + value_at, key, plain, length, STRIDE, HEAD_DIM, BLOCK_D)
        of_key = (base - tl.load(totals + of_head + tl.minimum(key, length - 1))).to(tl.float32)
        decay = pair_decays(of_query[:, None], of_key[None, :]) * SCALE
        seen = (key[None, :] >= begin[:, None]) & (key[None, :] <= query[:, None])
        grad_s = tl.where(seen, dot(grad, tl.trans(v), zero, PRECISION) * decay, 0.0)
        scores = dot(q, tl.trans(k), zero, PRECISION)
        grad_total += tl.sum(tl.where(seen & (key[None, :] < query[:, None]), grad_s * scores, 0.0), 1)
        grad_q = dot(narrow(grad_s, dtype), k, grad_q, PRECISION)
    tl.store(grad_totals + of_head + query, grad_total, query < length)
    store_unrotated(
        grad_qkv + query_at, grad_q, cos, sin, query, length, STRIDE, HEAD_DIM, HALF, INTERLEAVED, GROUP, BLOCK_D
    )  # fmt: skip


@triton.jit
def simple_gla_backward_keys_kernel(
    qkv,
    totals,
    segments,
    grad_mixed,
    cos,
    sin,
    grad_totals,
    grad_qkv,
    length,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,  # half of a rotated head; 0: no rotation
    INTERLEAVED: tl.constexpr,
    GROUP: tl.constexpr,
    AHEAD: tl.constexpr,  # columns of the gate and the decays, which come first
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    SHARED: tl.constexpr = HEADS // KV_HEADS  # query heads of one key head
    STRIDE: tl.constexpr = AHEAD + (HEADS + 2 * KV_HEADS) * HEAD_DIM
    MIXED_STRIDE: tl.constexpr = HEADS * HEAD_DIM
    first_key = tl.program_id(0) * BLOCK_N
    kv_head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    key = first_key + tl.arange(0, BLOCK_N)
    near = tl.minimum(key, length - 1)
    start = batch * length * STRIDE + AHEAD
    key_at = start + (HEADS + kv_head) * HEAD_DIM
    value_at = start + (HEADS + KV_HEADS + kv_head) * HEAD_DIM
    dtype: tl.constexpr = qkv.dtype.element_ty

    plain = tl.arange(0, BLOCK_D)
    column = head_columns(HALF, INTERLEAVED, GROUP, BLOCK_D)
    k = load_columns(qkv + key_at, key, column, length, STRIDE, HEAD_DIM, BLOCK_D)
    v = load_columns(qkv + value_at, key, plain, length, STRIDE, HEAD_DIM, BLOCK_D)
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    zero = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    last_query = length
    if segments is not None:
        _, last_query = seeing_queries(segments, batch * length, first_key, length, True, 0, BLOCK_N)
    for shared in range(SHARED):
        head = kv_head * SHARED + shared
        of_head = (batch * HEADS + head) * length
        query_at = start + head * HEAD_DIM
        mixed_at = batch * length * MIXED_STRIDE + head * HEAD_DIM
        base = tl.load(totals + of_head + first_key)
        of_key = (base - tl.load(totals + of_head + near)).to(tl.float32)
        grad_total = tl.zeros((BLOCK_N,), tl.float32)
        for first_query in range(first_key // BLOCK_M * BLOCK_M, last_query, BLOCK_M):
            query = first_query + tl.arange(0, BLOCK_M)
            q = load_columns(qkv + query_at, query, column, length, STRIDE, HEAD_DIM, BLOCK_D)
            grad = load_columns(grad_mixed + mixed_at, query, plain, length, MIXED_STRIDE, HEAD_DIM, BLOCK_D)
            of_query = (tl.load(totals + of_head + tl.minimum(query, length - 1)) - base).to(tl.float32)
            begin = first_keys(segments, batch * length, query, length)
            # [keys, queries], so that p and grad_s are left operands of the next products as they lie in registers.
            decay = pair_decays(of_query[None, :], of_key[:, None]) * SCALE
            seen = (key[:, None] >= begin[None, :]) & (key[:, None] <= query[None, :]) & (query < length)[None, :]
            scores = dot(k, tl.trans(q), zero, PRECISION)
            grad_s = tl.where(seen, dot(v, tl.trans(grad), zero, PRECISION) * decay, 0.0)
            p = tl.where(seen, scores * decay, 0.0)
            grad_total += tl.sum(tl.where(seen & (key[:, None] < query[None, :]), grad_s * scores, 0.0), 1)
            grad_v = dot(narrow(p, dtype), grad, grad_v, PRECISION)
            grad_k = dot(narrow(grad_s, dtype), q, grad_k, PRECISION)
        at = grad_totals + of_head + key
        of_queries = tl.load(at, key < length, 0.0)
        tl.debug_barrier()  # several warps may have loaded a key, of which one stores
        tl.store(at, of_queries - grad_total, key < length)
    store_unrotated(
        grad_qkv + key_at, grad_k, cos, sin, key, length, STRIDE, HEAD_DIM, HALF, INTERLEAVED, GROUP, BLOCK_D
    )  # fmt: skip
    store_unrotated(
        grad_qkv + value_at, grad_v, cos, sin, key, length, STRIDE, HEAD_DIM, 0, INTERLEAVED, GROUP, BLOCK_D
    )  # fmt: skip


@triton.jit
def decays_backward_kernel(
    qkv,
    bias,
    grad_totals,
    grad_qkv,
    length,
    HEADS: tl.constexpr,
    GATE: tl.constexpr,  # columns of the gate, ahead of those of the decays
    ROW: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    head = tl.program_id(0) % HEADS
    sequence = (tl.program_id(0) // HEADS).to(tl.int64)
    at = sequence * length * ROW + GATE + head
    source = grad_totals + (sequence * HEADS + head) * length
    behind = tl.zeros((1,), tl.float64)
    tiles = tl.cdiv(length, BLOCK_L)
    for i in range(tiles):
        token = (tiles - 1 - i) * BLOCK_L + tl.arange(0, BLOCK_L)
        inside = token < length
        part = tl.load(source + token, inside, 0.0).to(tl.float64)
        gradient = (behind + tl.cumsum(part, 0, reverse=True)).to(tl.float32)
        behind += tl.sum(part, 0)
        logit = load_logits(qkv + at, bias + head, token, inside, ROW)
        gradient = gradient * (DECAY_UNIT / (1.0 + tl.exp(logit)))
        tl.store(grad_qkv + at + token * ROW, narrow(gradient, grad_qkv.dtype.element_ty), inside)


def _launch(
    kernel: str,
    grid: tuple[int, int, int],
    block: BlockSpec,
    arguments: dict[str, Buffer | None],
    tile: Tile,
    precision: str,
    **options: Any,
) -> Launch:
    qkv = arguments["qkv"]
    assert qkv is not None
    constants = rotation_constants(block, arguments["cos"] is not None)
    constants |= {"AHEAD": block.rows_ahead, "PRECISION": precision}
    return Launch.of(
        f"simple_gla_backward.{kernel}_kernel",
        grid,
        {**arguments, "length": qkv.shape[1]},
        constants=constants,
        tile=tile,
        special=product_flops(block, qkv, 1) // (2 * block.head_dim),
        **options,
    )


def simple_gla_backward_queries(
    block: BlockSpec,
    qkv: Buffer,
    totals: Buffer,
    grad_mixed: Buffer,
    grad_totals: Buffer,
    grad_qkv: Buffer,
    *,
    segments: Buffer | None = None,
    cos: Buffer | None = None,
    sin: Buffer | None = None,
    tile: Tile,
    precision: str = "ieee",
) -> Launch:
    """Gradient of the queries, and the first part of that of the sums of decays.

    Args:
        block: sizes of the block.
        qkv: the gate, logits of decays, rotated queries and keys, and values, [B, L, G + Hq + (Hq + 2 Hkv) d].
        totals: [B, Hq, L] float64, from :func:`trmfast.kernels.simple_gla.sum_decays`.
        grad_mixed: gradient of what was mixed, [B, L, Hq d].
        grad_totals: [B, Hq, L] float32, result.
        grad_qkv: result, the shape of ``qkv``: gradients of the queries before rotation.
        segments: int32 [B, L, 2], of each token the start of its sequence, and what is not read; or None.
        cos, sin: [>= L, d] float32, or None if nothing was rotated.
        tile: BLOCK_M queries, BLOCK_N keys.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.

    Raises:
        ValueError: a rotation of an odd head_dim.
    """
    batch, length, _ = qkv.shape
    return _launch(
        "simple_gla_backward_queries",
        (triton.cdiv(length, tile["BLOCK_M"]), block.num_heads, batch),
        block,
        {
            "qkv": qkv,
            "totals": totals,
            "segments": segments,
            "grad_mixed": grad_mixed,
            "cos": cos,
            "sin": sin,
            "grad_totals": grad_totals,
            "grad_qkv": grad_qkv,
        },
        tile,
        precision,
        reads=("qkv", "totals", "segments", "grad_mixed", "cos", "sin"),
        writes=("grad_totals", "grad_qkv"),
        flops=product_flops(block, qkv, 3),
        loads=(4 * tile["BLOCK_M"] + 2 * length) * block.head_dim,
    )


def simple_gla_backward_keys(
    block: BlockSpec,
    qkv: Buffer,
    totals: Buffer,
    grad_mixed: Buffer,
    grad_totals: Buffer,
    grad_qkv: Buffer,
    *,
    segments: Buffer | None = None,
    cos: Buffer | None = None,
    sin: Buffer | None = None,
    tile: Tile,
    precision: str = "ieee",
) -> Launch:
    """Gradients of keys and values, and the second part of that of the sums of decays.

    Arguments as in :func:`simple_gla_backward_queries`; ``grad_totals`` holds the first part.
    """
    batch, length, _ = qkv.shape
    return _launch(
        "simple_gla_backward_keys",
        (triton.cdiv(length, tile["BLOCK_N"]), block.num_kv_heads, batch),
        block,
        {
            "qkv": qkv,
            "totals": totals,
            "segments": segments,
            "grad_mixed": grad_mixed,
            "cos": cos,
            "sin": sin,
            "grad_totals": grad_totals,
            "grad_qkv": grad_qkv,
        },
        tile,
        precision,
        reads=("qkv", "totals", "segments", "grad_mixed", "cos", "sin", "grad_totals"),
        writes=("grad_totals", "grad_qkv"),
        flops=product_flops(block, qkv, 4),
        loads=(4 * tile["BLOCK_N"] + 2 * length * block.num_heads // block.num_kv_heads) * block.head_dim,
    )


def decays_backward(
    block: BlockSpec, qkv: Buffer, bias: Buffer, grad_totals: Buffer, grad_qkv: Buffer, *, tile: Tile
) -> Launch:
    """From the gradients of the sums of decays to those of the logits.

    Args:
        block: sizes of the block.
        qkv: [B, L, G + Hq + (Hq + 2 Hkv) d], the logits of the decays behind the gate.
        bias: [Hq].
        grad_totals: [B, Hq, L] float32.
        grad_qkv: result, the shape of ``qkv``: the columns of the decays.
        tile: BLOCK_L tokens.
    """
    batch, length, row = qkv.shape
    return Launch.of(
        "simple_gla_backward.decays_backward_kernel",
        (batch * block.num_heads,),
        {"qkv": qkv, "bias": bias, "grad_totals": grad_totals, "grad_qkv": grad_qkv, "length": length},
        reads=("qkv", "bias", "grad_totals"),
        writes=("grad_qkv",),
        constants={"HEADS": block.num_heads, "GATE": block.gate_rows, "ROW": row},
        tile=tile,
        special=batch * length * block.num_heads,
        loads=2 * length,
    )
