"""Gradients of attention: queries, keys and values from the gradient of what they mixed; no [L, L] tensor in memory.

Scores s = scale q k^T and probabilities p = exp(s - lse) are recomputed from the rotated q and k and the saved row
sums lse.  With delta = sum(grad mixed * mixed) over a head:

    grad v = p^T grad mixed             grad s = p * (grad mixed v^T - delta) * scale
    grad k = grad s^T q                 grad q = grad s k

The rotation is undone on the accumulators.  It pairs column c of a head with column c + head_dim / 2, or 2 c with
2 c + 1; the columns of q and k are taken in an order that keeps both in one thread (pairs.py).  Rows beyond L repeat
the last one.

attention_backward_keys: a program owns BLOCK_N keys of one key/value head and walks the queries of its query heads in
steps of BLOCK_M; grad k and grad v stay in registers.  If BLOCK_N covers the sequence, the program also recomputes the
row sums, has all that grad q needs, and one launch is enough: it reads Q + A elements a token and writes Q.  Otherwise
attention_backward_queries runs before it: a program owns BLOCK_M queries of one head, walks the keys, and writes grad
q and delta.  Together they read 2 Q + 3 A elements a token and write Q.  10 A L (one launch) or 14 A L FLOP a token.
Either way every result has one owner: no atomics, and the same bits on every run.
"""

import math

import triton
import triton.language as tl
from trmfast.kernels.attention import seen_keys
from trmfast.kernels.dot import dot, narrow
from trmfast.kernels.pairs import group_of, pair_of, part_columns
from trmfast.kernels.plan import Buffer, Launch, Tile

from trmfast.spec import BlockSpec

__all__ = [
    "attention_backward_keys",
    "attention_backward_queries",
    "head_columns",
    "load_columns",
    "product_flops",
    "rotation_constants",
    "seeing_queries",
    "store_unrotated",
]

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def head_columns(HALF: tl.constexpr, INTERLEAVED: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which column of a head each column of its tile holds."""
    column = tl.arange(0, BLOCK_D)
    if HALF > 0:
        pair, half = pair_of(column, GROUP)
        if INTERLEAVED:
            column = 2 * pair + half
        else:
            column = pair + half * HALF
    return column


@triton.jit
def load_columns(pointer, row, column, length, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of one head [rows, BLOCK_D]: beyond the sequence its last row, beyond the head zero."""
    at = pointer + tl.minimum(row, length - 1)[:, None] * STRIDE + column[None, :]
    if HEAD_DIM == BLOCK_D:
        return tl.load(at)
    return tl.load(at, (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :], 0.0)


@triton.jit
def store_unrotated(
    pointer,
    gradient,
    cos,
    sin,
    row,
    length,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Stores the gradient of an unrotated head, given that of the rotated one in the order of its tile."""
    dtype: tl.constexpr = pointer.dtype.element_ty
    inside = (row < length)[:, None]
    if HALF > 0:
        low, high = part_columns(gradient, GROUP)
        pair = tl.arange(0, BLOCK_D // 2)
        if HALF * 2 != BLOCK_D:
            inside = inside & (pair < HALF)[None, :]
        STEP: tl.constexpr = 2 if INTERLEAVED else 1
        PARTNER: tl.constexpr = 1 if INTERLEAVED else HALF
        column = pair * STEP
        table = row[:, None] * HEAD_DIM + column[None, :]
        cos_low, sin_low = tl.load(cos + table, inside, 0.0), tl.load(sin + table, inside, 0.0)
        cos_high, sin_high = tl.load(cos + PARTNER + table, inside, 0.0), tl.load(sin + PARTNER + table, inside, 0.0)
        low, high = low * cos_low + high * sin_high, high * cos_high - low * sin_low
        at = pointer + row[:, None] * STRIDE + column[None, :]
        tl.store(at, narrow(low, dtype), inside)
        tl.store(at + PARTNER, narrow(high, dtype), inside)
    else:
        column = tl.arange(0, BLOCK_D)
        if HEAD_DIM != BLOCK_D:
            inside = inside & (column < HEAD_DIM)[None, :]
        tl.store(pointer + row[:, None] * STRIDE + column[None, :], narrow(gradient, dtype), inside)


@triton.jit
def seeing_queries(
    segments, first_token, first_key, length, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The first query that may see one of a tile of keys, and the one behind the last."""
    last_key = tl.minimum(first_key + BLOCK_N, length) - 1
    if segments is not None:
        # Those of the sequences that the tile touches: from the start of its first key's to the end of its last key's,
        # behind all tokens whose sequence starts up to that key.
        begin = tl.minimum(tl.maximum(tl.load(segments + (first_token + first_key) * 2), 0), first_key)
        STARTS: tl.constexpr = 512
        end = last_key * 0
        for at in range(0, length, STARTS):
            token = at + tl.arange(0, STARTS)
            start = tl.load(segments + (first_token + token) * 2, token < length, 2147483647)
            end += tl.sum((start <= last_key).to(tl.int32), 0)
    else:
        begin = first_key
        if not CAUSAL:
            begin = tl.maximum(first_key - (WINDOW - 1), 0)
        end = tl.minimum(last_key + WINDOW, length)
    return begin, end


@triton.jit
def attention_backward_keys_kernel(
    qkv,
    segments,
    grad_mixed,
    lse,
    delta,
    cos,
    sin,
    grad_qkv,
    length,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,  # half of a rotated head; 0: no rotation
    INTERLEAVED: tl.constexpr,
    GROUP: tl.constexpr,
    GATE: tl.constexpr,  # columns of the gate, which come first
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    WHOLE: tl.constexpr,  # all keys fit one tile
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    SHARED: tl.constexpr = HEADS // KV_HEADS  # query heads of one key head
    STRIDE: tl.constexpr = GATE + (HEADS + 2 * KV_HEADS) * HEAD_DIM
    RANGED: tl.constexpr = WINDOW > 0 or segments is not None
    MIXED_STRIDE: tl.constexpr = HEADS * HEAD_DIM
    first_key = tl.program_id(0) * BLOCK_N
    kv_head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    key = first_key + tl.arange(0, BLOCK_N)
    start = batch * length * STRIDE + GATE
    mixed_start = batch * length * MIXED_STRIDE
    dtype: tl.constexpr = qkv.dtype.element_ty

    plain = tl.arange(0, BLOCK_D)
    column = head_columns(HALF, INTERLEAVED, GROUP, BLOCK_D)
    key_at = start + (HEADS + kv_head) * HEAD_DIM
    value_at = start + (HEADS + KV_HEADS + kv_head) * HEAD_DIM
    k = load_columns(qkv + key_at, key, column, length, STRIDE, HEAD_DIM, BLOCK_D)
    v = load_columns(qkv + value_at, key, plain, length, STRIDE, HEAD_DIM, BLOCK_D)
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    zero = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)

    if RANGED:
        first_tile, last_query = seeing_queries(segments, batch * length, first_key, length, CAUSAL, WINDOW, BLOCK_N)
        first_tile = first_tile // BLOCK_M
        tiles = tl.cdiv(last_query, BLOCK_M) - first_tile
    else:
        first_tile = first_key // BLOCK_M if CAUSAL else 0
        tiles = tl.cdiv(length, BLOCK_M) - first_tile
    for i in range(SHARED * tiles):
        head = kv_head * SHARED + i // tiles
        query = (first_tile + i % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        query_at = start + head * HEAD_DIM
        mixed_at = mixed_start + head * HEAD_DIM
        q = load_columns(qkv + query_at, query, column, length, STRIDE, HEAD_DIM, BLOCK_D)
        grad = load_columns(grad_mixed + mixed_at, query, plain, length, MIXED_STRIDE, HEAD_DIM, BLOCK_D)
        # [keys, queries], so that p and grad_s are left operands of the next products as they lie in registers.
        scores = dot(k, tl.trans(q), zero, PRECISION)
        grad_p = dot(v, tl.trans(grad), zero, PRECISION)
        if RANGED:
            begin, end = seen_keys(segments, batch * length, query, length, CAUSAL, WINDOW)
            seen = (key[:, None] >= begin[None, :]) & (key[:, None] < end[None, :])
            scores = tl.where(seen, scores, float("-inf"))
        elif CAUSAL:
            scores = tl.where(key[:, None] <= query[None, :], scores, float("-inf"))
        if WHOLE:
            scores += tl.where(key < length, 0.0, float("-inf"))[:, None]
            p = tl.exp2((scores - tl.max(scores, 0)[None, :]) * (SCALE * LOG2E))
            p *= tl.where(query < length, 1.0 / tl.sum(p, 0), 0.0)[None, :]
            row_delta = tl.sum(p * grad_p, 0)
        else:
            # Keys beyond the sequence only touch their own gradients; queries beyond it have no weight.
            of_rows = (batch * HEADS + head) * length + query
            row_lse = tl.load(lse + of_rows, query < length, float("inf"))
            row_delta = tl.load(delta + of_rows, query < length, 0.0)
            p = tl.exp2(scores * (SCALE * LOG2E) - (row_lse * LOG2E)[None, :])
        grad_v = dot(narrow(p, dtype), grad, grad_v, PRECISION)
        grad_s = narrow(p * (grad_p - row_delta[None, :]) * SCALE, dtype)
        grad_k = dot(grad_s, q, grad_k, PRECISION)
        if WHOLE:
            grad_q = dot(tl.trans(grad_s), k, tl.zeros((BLOCK_M, BLOCK_D), tl.float32), PRECISION)
            store_unrotated(
                grad_qkv + query_at, grad_q, cos, sin, query, length,
                STRIDE, HEAD_DIM, HALF, INTERLEAVED, GROUP, BLOCK_D,
            )  # fmt: skip

    store_unrotated(
        grad_qkv + key_at, grad_k, cos, sin, key, length, STRIDE, HEAD_DIM, HALF, INTERLEAVED, GROUP, BLOCK_D
    )  # fmt: skip
    store_unrotated(
        grad_qkv + value_at, grad_v, cos, sin, key, length, STRIDE, HEAD_DIM, 0, INTERLEAVED, GROUP, BLOCK_D
    )  # fmt: skip


@triton.jit
def attention_backward_queries_kernel(
    qkv,
    segments,
    mixed,
    grad_mixed,
    lse,
    delta,
    cos,
    sin,
    grad_qkv,
    length,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,  # half of a rotated head; 0: no rotation
    INTERLEAVED: tl.constexpr,
    GROUP: tl.constexpr,
    GATE: tl.constexpr,  # columns of the gate, which come first
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    STRIDE: tl.constexpr = GATE + (HEADS + 2 * KV_HEADS) * HEAD_DIM
    RANGED: tl.constexpr = WINDOW > 0 or segments is not None
    MIXED_STRIDE: tl.constexpr = HEADS * HEAD_DIM
    first_query = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1)
    kv_head = head // (HEADS // KV_HEADS)
    batch = tl.program_id(2).to(tl.int64)
    query = first_query + tl.arange(0, BLOCK_M)
    start = batch * length * STRIDE + GATE
    mixed_at = batch * length * MIXED_STRIDE + head * HEAD_DIM
    query_at = start + head * HEAD_DIM
    key_at = start + (HEADS + kv_head) * HEAD_DIM
    value_at = start + (HEADS + KV_HEADS + kv_head) * HEAD_DIM
    of_rows = (batch * HEADS + head) * length + tl.minimum(query, length - 1)
    dtype: tl.constexpr = qkv.dtype.element_ty

    plain = tl.arange(0, BLOCK_D)
    column = head_columns(HALF, INTERLEAVED, GROUP, BLOCK_D)
    q = load_columns(qkv + query_at, query, column, length, STRIDE, HEAD_DIM, BLOCK_D)
    grad = load_columns(grad_mixed + mixed_at, query, plain, length, MIXED_STRIDE, HEAD_DIM, BLOCK_D)
    if mixed is not None:
        o = load_columns(mixed + mixed_at, query, plain, length, MIXED_STRIDE, HEAD_DIM, BLOCK_D)
        dots = tl.sum(grad.to(tl.float32) * o.to(tl.float32), 1)
        tl.store(delta + of_rows, dots, query < length)
    else:
        dots = tl.load(delta + of_rows)
    row_lse = tl.load(lse + of_rows)
    grad_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = 0
    keys = tl.minimum(first_query + BLOCK_M, length) if CAUSAL else length
    if RANGED:
        begin, end = seen_keys(segments, batch * length, query, length, CAUSAL, WINDOW)
        first = tl.min(begin, 0) // BLOCK_N * BLOCK_N
        keys = tl.max(end, 0)
    for first_key in range(first, keys, BLOCK_N):
        key = first_key + tl.arange(0, BLOCK_N)
        k = load_columns(qkv + key_at, key, column, length, STRIDE, HEAD_DIM, BLOCK_D)
        v = load_columns(qkv + value_at, key, plain, length, STRIDE, HEAD_DIM, BLOCK_D)
        scores = dot(q, tl.trans(k), zero, PRECISION)
        grad_p = dot(grad, tl.trans(v), zero, PRECISION)
        if RANGED:
            seen = (key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        else:
            scores += tl.where(key < length, 0.0, float("-inf"))[None, :]
            if CAUSAL:
                scores = tl.where(key[None, :] <= query[:, None], scores, float("-inf"))
        p = tl.exp2(scores * (SCALE * LOG2E) - (row_lse * LOG2E)[:, None])
        grad_q = dot(narrow(p * (grad_p - dots[:, None]) * SCALE, dtype), k, grad_q, PRECISION)
    store_unrotated(
        grad_qkv + query_at, grad_q, cos, sin, query, length, STRIDE, HEAD_DIM, HALF, INTERLEAVED, GROUP, BLOCK_D
    )  # fmt: skip


def rotation_constants(block: BlockSpec, rotated: bool) -> dict[str, int | float | str]:
    """The sizes of heads, and how they were rotated."""
    if rotated and block.head_dim % 2:
        raise ValueError(f"head_dim: got {block.head_dim} with cos and sin, accepted are even numbers")
    half = block.head_dim // 2 if rotated else 0
    return {
        "SCALE": block.head_dim**-0.5,
        "HEADS": block.num_heads,
        "KV_HEADS": block.num_kv_heads,
        "HEAD_DIM": block.head_dim,
        "HALF": half,
        "INTERLEAVED": block.rotation == "interleaved",
        "GROUP": group_of(half) if half else 1,
        "BLOCK_D": max(16, triton.next_power_of_2(block.head_dim)),
    }


def _constants(block: BlockSpec, length: int, rotated: bool, precision: str) -> dict[str, int | float | str]:
    return {
        **rotation_constants(block, rotated),
        "GATE": block.gate_rows,
        "CAUSAL": block.causal,
        "WINDOW": min(block.attention_window, length),
        "PRECISION": precision,
    }


def product_flops(block: BlockSpec, qkv: Buffer, products: int) -> int:
    """Of so many products between the queries and the keys that they see."""
    batch, length, _ = qkv.shape
    return 2 * products * batch * block.num_heads * block.attention_pairs(length) * block.head_dim


def attention_backward_keys(
    block: BlockSpec,
    qkv: Buffer,
    grad_mixed: Buffer,
    grad_qkv: Buffer,
    *,
    segments: Buffer | None = None,
    lse: Buffer | None = None,
    delta: Buffer | None = None,
    cos: Buffer | None = None,
    sin: Buffer | None = None,
    tile: Tile,
    precision: str = "ieee",
) -> Launch:
    """Gradients of keys and values; without lse and delta of queries too, from programs that hold whole sequences.

    Args:
        block: sizes of the block.
        qkv: the gate, rotated queries and keys, and values, [B, L, G + (Hq + 2 Hkv) d].
        grad_mixed: gradient of what attention returned, [B, L, Hq d].
        grad_qkv: result, the shape of ``qkv``: gradients before rotation, of keys and values or of all but the gate.
        segments: int32 [B, L, 2], of each token the start of its sequence and the end of its prefix, or None.
        lse: [B, Hq, L] float32, the natural logarithm of the sums of exp(q . k / sqrt(d)); needed if BLOCK_N < L.
        delta: [B, Hq, L] float32, from :func:`attention_backward_queries`; needed if BLOCK_N < L.
        cos, sin: [>= L, d] float32, or None if nothing was rotated.
        tile: BLOCK_M queries, BLOCK_N keys.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.

    Raises:
        ValueError: BLOCK_N < L without lse and delta, or a rotation of an odd head_dim.
    """
    batch, length, _ = qkv.shape
    whole = lse is None or delta is None
    if whole and tile["BLOCK_N"] < length:
        name, size = "lse" if lse is None else "delta", tile["BLOCK_N"]
        raise ValueError(f"{name}: got None with BLOCK_N {size}, accepted if BLOCK_N is at least {length}")
    return Launch.of(
        "attention_backward.attention_backward_keys_kernel",
        (triton.cdiv(length, tile["BLOCK_N"]), block.num_kv_heads, batch),
        {
            "qkv": qkv,
            "segments": segments,
            "grad_mixed": grad_mixed,
            "lse": None if whole else lse,
            "delta": None if whole else delta,
            "cos": cos,
            "sin": sin,
            "grad_qkv": grad_qkv,
            "length": length,
        },
        reads=("qkv", "segments", "grad_mixed", "lse", "delta", "cos", "sin"),
        writes=("grad_qkv",),
        constants={**_constants(block, length, cos is not None, precision), "WHOLE": whole},
        tile=tile,
        flops=product_flops(block, qkv, 5 if whole else 4),
        special=product_flops(block, qkv, 1) // (2 * block.head_dim),
        loads=(4 * tile["BLOCK_N"] + 2 * length * block.num_heads // block.num_kv_heads) * block.head_dim,
    )


def attention_backward_queries(
    block: BlockSpec,
    qkv: Buffer,
    mixed: Buffer | None,
    grad_mixed: Buffer,
    grad_qkv: Buffer,
    *,
    segments: Buffer | None = None,
    lse: Buffer,
    delta: Buffer,
    cos: Buffer | None = None,
    sin: Buffer | None = None,
    tile: Tile,
    precision: str = "ieee",
) -> Launch:
    """Gradient of the queries, and delta for the launch that follows.

    Arguments as in :func:`attention_backward_keys`, but for ``mixed``, what attention returned [B, L, Hq d], and for
    ``delta``, which is a result here; ``mixed`` is None where :func:`gate_backward` has made delta.
    """
    batch, length, _ = qkv.shape
    return Launch.of(
        "attention_backward.attention_backward_queries_kernel",
        (triton.cdiv(length, tile["BLOCK_M"]), block.num_heads, batch),
        {
            "qkv": qkv,
            "segments": segments,
            "mixed": mixed,
            "grad_mixed": grad_mixed,
            "lse": lse,
            "delta": delta,
            "cos": cos,
            "sin": sin,
            "grad_qkv": grad_qkv,
            "length": length,
        },
        reads=("qkv", "segments", "mixed", "grad_mixed", "lse", *(("delta",) if mixed is None else ()), "cos", "sin"),
        writes=("grad_qkv",) if mixed is None else ("delta", "grad_qkv"),
        constants=_constants(block, length, cos is not None, precision),
        tile=tile,
        flops=product_flops(block, qkv, 3),
        special=product_flops(block, qkv, 1) // (2 * block.head_dim),
        loads=(4 * tile["BLOCK_M"] + 2 * length) * block.head_dim,
    )
