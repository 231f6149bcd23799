"""Gradients of attention: queries, keys and values from the gradient of what they mixed; no [L, L] tensor in memory.

Scores s = scale q k^T and probabilities p = exp(s - lse) are made again from the rotated q and k and the saved row
sums lse.  With delta = sum(grad mixed * mixed) over a head:

    grad v = p^T grad mixed             grad s = p * (grad mixed v^T - delta) * scale
    grad k = grad s^T q                 grad q = grad s k

The rotation is undone on the accumulators.  It pairs column c of a head with column c + head_dim / 2, so q, k and
their gradients are held as two halves, and s is a sum of two products.

attention_backward_keys: a program owns BLOCK_N keys of one key/value head and walks the queries of its query heads in
steps of BLOCK_M; grad k and grad v stay in registers.  If BLOCK_N covers the sequence, the program has all that grad
q needs too, and one launch is enough: it reads Q + 2 A elements a token and writes Q.  Otherwise
attention_backward_queries runs before it: a program owns BLOCK_M queries of one head, walks the keys, and writes grad
q and delta.  Together they read 2 Q + 3 A elements a token and write Q.  10 A L (one launch) or 14 A L FLOP a
token.  Either way every result has one owner: no atomics, and the same bits on every run.
"""

import triton
import triton.language as tl
from trmfast.kernels.dot import dot
from trmfast.kernels.plan import Buffer, Launch, Tile

__all__ = ["attention_backward_keys", "attention_backward_queries"]

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_rows(pointer, row, stride, inside, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Columns ``first`` to ``first + WIDTH - 1`` of some rows; zeros up to BLOCK columns and where not inside."""
    column = tl.arange(0, BLOCK)
    mask = inside[:, None] & (column < WIDTH)[None, :]
    return tl.load(pointer + row[:, None] * stride + first + column[None, :], mask, 0.0)


@triton.jit
def _store_unrotated(
    pointer, low, high, cos, sin, row, inside, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr
):
    """Stores the gradient of an unrotated head, whose rotated gradient has the halves ``low`` and ``high``."""
    HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    if cos is not None:
        cos_low = _load_rows(cos, row, HEAD_DIM, inside, 0, HALF, BLOCK_H)
        sin_low = _load_rows(sin, row, HEAD_DIM, inside, 0, HALF, BLOCK_H)
        cos_high = _load_rows(cos, row, HEAD_DIM, inside, HALF, HEAD_DIM - HALF, BLOCK_H)
        sin_high = _load_rows(sin, row, HEAD_DIM, inside, HALF, HEAD_DIM - HALF, BLOCK_H)
        unrotated = low * cos_low + high * sin_high
        high = high * cos_high - low * sin_low
        low = unrotated
    column = tl.arange(0, BLOCK_H)
    at = pointer + row[:, None] * STRIDE + column[None, :]
    dtype = pointer.dtype.element_ty
    tl.store(at, low.to(dtype), inside[:, None] & (column < HALF)[None, :])
    tl.store(at + HALF, high.to(dtype), inside[:, None] & (column < HEAD_DIM - HALF)[None, :])


@triton.jit
def _score_gradient(
    q_low, q_high, k_low, k_high, v, grad, lse, delta, visible, scale, PRECISION: tl.constexpr
):  # queries along axis 0, keys along axis 1
    """Probabilities and the gradient of ``q k^T``, in float32."""
    zero = tl.zeros((q_low.shape[0], k_low.shape[0]), tl.float32)
    scores = dot(q_low, k_low.T, zero, PRECISION)
    scores = dot(q_high, k_high.T, scores, PRECISION)
    p = tl.exp2((scores * scale - lse[:, None]) * LOG2_E)
    p = tl.where(visible, p, 0.0)
    grad_p = dot(grad, v.T, zero, PRECISION)
    return p, p * (grad_p - delta[:, None]) * scale


@triton.jit
def attention_backward_keys_kernel(
    qkv,
    mixed,
    grad_mixed,
    lse,
    delta,
    cos,
    sin,
    grad_qkv,
    length,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    GROUP: tl.constexpr = HEADS // KV_HEADS
    HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    STRIDE: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    MIXED_STRIDE: tl.constexpr = HEADS * HEAD_DIM
    first_key = tl.program_id(0) * BLOCK_N
    kv_head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    key = first_key + tl.arange(0, BLOCK_N)
    key_inside = key < length
    start = batch * length * STRIDE
    mixed_start = batch * length * MIXED_STRIDE
    dtype = qkv.dtype.element_ty

    key_at = start + (HEADS + kv_head) * HEAD_DIM
    value_at = start + (HEADS + KV_HEADS + kv_head) * HEAD_DIM
    k_low = _load_rows(qkv + key_at, key, STRIDE, key_inside, 0, HALF, BLOCK_H)
    k_high = _load_rows(qkv + key_at, key, STRIDE, key_inside, HALF, HEAD_DIM - HALF, BLOCK_H)
    v = _load_rows(qkv + value_at, key, STRIDE, key_inside, 0, HEAD_DIM, BLOCK_D)
    grad_k_low = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    grad_k_high = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)

    first_tile = first_key // BLOCK_M if CAUSAL else 0
    tiles = tl.cdiv(length, BLOCK_M) - first_tile
    for i in range(GROUP * tiles):
        head = kv_head * GROUP + i // tiles
        query = (first_tile + i % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        query_inside = query < length
        query_at = start + head * HEAD_DIM
        mixed_at = mixed_start + head * HEAD_DIM
        row_at = (batch * HEADS + head) * length + query
        q_low = _load_rows(qkv + query_at, query, STRIDE, query_inside, 0, HALF, BLOCK_H)
        q_high = _load_rows(qkv + query_at, query, STRIDE, query_inside, HALF, HEAD_DIM - HALF, BLOCK_H)
        grad = _load_rows(grad_mixed + mixed_at, query, MIXED_STRIDE, query_inside, 0, HEAD_DIM, BLOCK_D)
        if WHOLE:
            o = _load_rows(mixed + mixed_at, query, MIXED_STRIDE, query_inside, 0, HEAD_DIM, BLOCK_D)
            dots = tl.sum(grad.to(tl.float32) * o.to(tl.float32), 1)
        else:
            dots = tl.load(delta + row_at, query_inside, 0.0)
        visible = query_inside[:, None] & key_inside[None, :]
        if CAUSAL:
            visible &= key[None, :] <= query[:, None]
        row_lse = tl.load(lse + row_at, query_inside, 0.0)
        p, grad_s = _score_gradient(q_low, q_high, k_low, k_high, v, grad, row_lse, dots, visible, scale, PRECISION)
        grad_v = dot(p.to(dtype).T, grad, grad_v, PRECISION)
        grad_s = grad_s.to(dtype)
        grad_k_low = dot(grad_s.T, q_low, grad_k_low, PRECISION)
        grad_k_high = dot(grad_s.T, q_high, grad_k_high, PRECISION)
        if WHOLE:
            zero = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
            low = dot(grad_s, k_low, zero, PRECISION)
            high = dot(grad_s, k_high, zero, PRECISION)
            _store_unrotated(grad_qkv + query_at, low, high, cos, sin, query, query_inside, STRIDE, HEAD_DIM, BLOCK_H)

    _store_unrotated(grad_qkv + key_at, grad_k_low, grad_k_high, cos, sin, key, key_inside, STRIDE, HEAD_DIM, BLOCK_H)
    column = tl.arange(0, BLOCK_D)
    tl.store(
        grad_qkv + value_at + key[:, None] * STRIDE + column[None, :],
        grad_v.to(dtype),
        key_inside[:, None] & (column < HEAD_DIM)[None, :],
    )


@triton.jit
def attention_backward_queries_kernel(
    qkv,
    mixed,
    grad_mixed,
    lse,
    delta,
    cos,
    sin,
    grad_qkv,
    length,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    STRIDE: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    MIXED_STRIDE: tl.constexpr = HEADS * HEAD_DIM
    first_query = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1)
    kv_head = head // (HEADS // KV_HEADS)
    batch = tl.program_id(2).to(tl.int64)
    query = first_query + tl.arange(0, BLOCK_M)
    query_inside = query < length
    start = batch * length * STRIDE
    mixed_at = batch * length * MIXED_STRIDE + head * HEAD_DIM
    query_at = start + head * HEAD_DIM
    key_at = start + (HEADS + kv_head) * HEAD_DIM
    value_at = start + (HEADS + KV_HEADS + kv_head) * HEAD_DIM
    row_at = (batch * HEADS + head) * length + query
    dtype = qkv.dtype.element_ty

    q_low = _load_rows(qkv + query_at, query, STRIDE, query_inside, 0, HALF, BLOCK_H)
    q_high = _load_rows(qkv + query_at, query, STRIDE, query_inside, HALF, HEAD_DIM - HALF, BLOCK_H)
    grad = _load_rows(grad_mixed + mixed_at, query, MIXED_STRIDE, query_inside, 0, HEAD_DIM, BLOCK_D)
    o = _load_rows(mixed + mixed_at, query, MIXED_STRIDE, query_inside, 0, HEAD_DIM, BLOCK_D)
    dots = tl.sum(grad.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + row_at, dots, query_inside)
    row_lse = tl.load(lse + row_at, query_inside, 0.0)
    low = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    high = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    keys = tl.minimum(first_query + BLOCK_M, length) if CAUSAL else length
    for first_key in range(0, keys, BLOCK_N):
        key = first_key + tl.arange(0, BLOCK_N)
        key_inside = key < length
        k_low = _load_rows(qkv + key_at, key, STRIDE, key_inside, 0, HALF, BLOCK_H)
        k_high = _load_rows(qkv + key_at, key, STRIDE, key_inside, HALF, HEAD_DIM - HALF, BLOCK_H)
        v = _load_rows(qkv + value_at, key, STRIDE, key_inside, 0, HEAD_DIM, BLOCK_D)
        visible = query_inside[:, None] & key_inside[None, :]
        if CAUSAL:
            visible &= key[None, :] <= query[:, None]
        _, grad_s = _score_gradient(q_low, q_high, k_low, k_high, v, grad, row_lse, dots, visible, scale, PRECISION)
        grad_s = grad_s.to(dtype)
        low = dot(grad_s, k_low, low, PRECISION)
        high = dot(grad_s, k_high, high, PRECISION)
    _store_unrotated(grad_qkv + query_at, low, high, cos, sin, query, query_inside, STRIDE, HEAD_DIM, BLOCK_H)


def _constants(num_heads: int, num_kv_heads: int, causal: bool, precision: str, head_dim: int) -> dict[str, int | str]:
    return {
        "HEADS": num_heads,
        "KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "CAUSAL": causal,
        "PRECISION": precision,
        "BLOCK_H": max(16, triton.next_power_of_2(-(-head_dim // 2))),
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
    }


def attention_backward_keys(
    qkv: Buffer,
    mixed: Buffer,
    grad_mixed: Buffer,
    lse: Buffer,
    delta: Buffer | None,
    grad_qkv: Buffer,
    tile: Tile,
    *,
    length: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    causal: bool = False,
    cos: Buffer | None = None,
    sin: Buffer | None = None,
    precision: str = "ieee",
) -> Launch:
    """Gradients of keys and values; of queries too, if BLOCK_N keys are all of a sequence.

    Args:
        qkv: rotated queries, keys and values, [T, (num_heads + 2 num_kv_heads) * head_dim].
        mixed: what attention returned, [T, num_heads * head_dim].
        grad_mixed: its gradient.
        lse: log(sum(exp(scores))) of each query over its keys, [B, num_heads, L] float32, natural logarithm.
        delta: [B, num_heads, L] float32, from :func:`attention_backward_queries`; None if BLOCK_N >= L.
        grad_qkv: result, the shape of ``qkv``: its columns of keys and values, or all.
        tile: BLOCK_M queries, BLOCK_N keys.
        length: L.
        num_heads, num_kv_heads, head_dim, causal: as in ``BlockSpec``.
        cos, sin: tables [>= L, head_dim] float32, or None if nothing was rotated.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.

    Raises:
        ValueError: BLOCK_N < L without delta.
    """
    whole = tile["BLOCK_N"] >= length
    if not whole and delta is None:
        raise ValueError(f"delta: got None with BLOCK_N {tile['BLOCK_N']}, accepted if BLOCK_N is at least {length}")
    batch = qkv.shape[0] // length
    return Launch.of(
        "attention_backward.attention_backward_keys_kernel",
        (triton.cdiv(length, tile["BLOCK_N"]), num_kv_heads, batch),
        {
            "qkv": qkv,
            "mixed": mixed if whole else None,
            "grad_mixed": grad_mixed,
            "lse": lse,
            "delta": None if whole else delta,
            "cos": cos,
            "sin": sin,
            "grad_qkv": grad_qkv,
            "length": length,
            "scale": head_dim**-0.5,
        },
        reads=("qkv", "mixed", "grad_mixed", "lse", "delta", "cos", "sin"),
        writes=("grad_qkv",),
        constants={**_constants(num_heads, num_kv_heads, causal, precision, head_dim), "WHOLE": whole},
        tile=tile,
        flops=(10 if whole else 8) * qkv.shape[0] * num_heads * head_dim * length // (2 if causal else 1),
    )


def attention_backward_queries(
    qkv: Buffer,
    mixed: Buffer,
    grad_mixed: Buffer,
    lse: Buffer,
    delta: Buffer,
    grad_qkv: Buffer,
    tile: Tile,
    *,
    length: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    causal: bool = False,
    cos: Buffer | None = None,
    sin: Buffer | None = None,
    precision: str = "ieee",
) -> Launch:
    """Gradient of the queries, and delta; arguments as in :func:`attention_backward_keys`, delta is a result here."""
    return Launch.of(
        "attention_backward.attention_backward_queries_kernel",
        (triton.cdiv(length, tile["BLOCK_M"]), num_heads, qkv.shape[0] // length),
        {
            "qkv": qkv,
            "mixed": mixed,
            "grad_mixed": grad_mixed,
            "lse": lse,
            "delta": delta,
            "cos": cos,
            "sin": sin,
            "grad_qkv": grad_qkv,
            "length": length,
            "scale": head_dim**-0.5,
        },
        reads=("qkv", "mixed", "grad_mixed", "lse", "cos", "sin"),
        writes=("delta", "grad_qkv"),
        constants=_constants(num_heads, num_kv_heads, causal, precision, head_dim),
        tile=tile,
        flops=6 * qkv.shape[0] * num_heads * head_dim * length // (2 if causal else 1),
    )
