"""Gradients of the weights of linear layers, up to four in one launch.

    total [out, in] += gradient [T, out]^T @ source [T, in]

One program owns a tile [BLOCK_M, BLOCK_N] of one weight's float32 gradient: it walks the tokens in steps of BLOCK_K,
then loads its tile of ``total``, adds and stores.  So the gradient of a net's weight is accumulated over all its
applications in one buffer, without atomics, in a fixed order.  The weights of one block together have enough tiles to
fill a GPU (208 of 128x128 at D = 512, 104 of 128x256), however few tokens there are, and one launch shares the rows
that they read through L2.

A weight with few tiles and many rows (the mixer over the sequence sums over B * D rows) gives its ``total`` a leading
axis of S splits: split s walks the s-th part of the steps and owns total[s].  The parts are kept apart over all
applications and ``sum_splits`` adds them up once, at the end.

Reads T (out + in) elements a weight and its float32 total, writes that total; 2 T out in FLOP.  At 128x128 a step
does 64 FLOP for each byte from L2, at 128x256 85.

Transposed, for the mixer over the sequence: gradient is [B, out, D] and source [B, in, D], summed over B and D.
"""

from collections.abc import Sequence
from math import prod

import triton
import triton.language as tl
from trmfast.kernels.dot import dot
from trmfast.kernels.plan import Buffer, Launch, Tile

__all__ = ["MAX_PRODUCTS", "sum_splits", "weight_gradient"]

MAX_PRODUCTS = 4


@triton.jit
def _add(total, part, rows, columns, OUT: tl.constexpr, IN: tl.constexpr):
    """Adds a tile [rows, columns] to the total [OUT, IN]."""
    at = total + rows[:, None] * IN + columns[None, :]
    mask = (rows < OUT)[:, None] & (columns < IN)[None, :]
    tl.store(at, tl.load(at, mask, 0.0) + part, mask)


@triton.jit
def _accumulate(
    gradient,
    source,
    total,
    program,
    rows,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    SPLITS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    COLUMN_TILES: tl.constexpr = (IN + BLOCK_N - 1) // BLOCK_N
    TILES: tl.constexpr = (OUT + BLOCK_M - 1) // BLOCK_M * COLUMN_TILES
    split = program // TILES
    m = program % TILES // COLUMN_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    n = program % TILES % COLUMN_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    near_m = m
    if OUT % BLOCK_M != 0:
        near_m = tl.minimum(m, OUT - 1)
    near_n = n
    if IN % BLOCK_N != 0:
        near_n = tl.minimum(n, IN - 1)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if CHANNELS == 0:
        share = tl.cdiv(tl.cdiv(rows, BLOCK_K), SPLITS) * BLOCK_K
        begin = split * share
        end = tl.minimum(begin + share, rows)
        gradient_offsets = k[:, None] * OUT + near_m[None, :]
        source_offsets = k[:, None] * IN + near_n[None, :]
        for at in range(begin, end, BLOCK_K):
            left = (k < end - at)[:, None]
            g = tl.load(gradient + tl.cast(at, tl.int64) * OUT + gradient_offsets, left, 0.0)
            x = tl.load(source + tl.cast(at, tl.int64) * IN + source_offsets, left, 0.0)
            acc = dot(tl.trans(g), x, acc, PRECISION)
    else:
        STEPS: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
        share = tl.cdiv(rows * STEPS, SPLITS)
        begin = split * share
        end = tl.minimum(begin + share, rows * STEPS)
        gradient_offsets = near_m[:, None] * CHANNELS + k[None, :]
        source_offsets = near_n[:, None] * CHANNELS + k[None, :]
        for at in range(begin, end):
            batch = tl.cast(at // STEPS, tl.int64)
            first = at % STEPS * BLOCK_K
            gradient_at = gradient + (batch * (OUT * CHANNELS) + first) + gradient_offsets
            source_at = source + (batch * (IN * CHANNELS) + first) + source_offsets
            if CHANNELS % BLOCK_K == 0:
                g = tl.load(gradient_at)
                x = tl.load(source_at)
            else:
                left = (k < CHANNELS - first)[None, :]
                g = tl.load(gradient_at, left, 0.0)
                x = tl.load(source_at, left, 0.0)
            acc = dot(g, tl.trans(x), acc, PRECISION)
    result = total + split.to(tl.int64) * OUT * IN
    if BLOCK_N <= 128:
        _add(result, acc, m, n, OUT, IN)
    else:  # in halves: the totals of all columns would not fit beside so many accumulators
        HALF: tl.constexpr = BLOCK_N // 2
        low, high = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        column = program % TILES % COLUMN_TILES * BLOCK_N + tl.arange(0, HALF)
        _add(result, low, m, column, OUT, IN)
        _add(result, high, m, column + HALF, OUT, IN)


@triton.jit
def weight_gradient_kernel(
    gradients,
    sources,
    totals,
    rows,
    OUT: tl.constexpr,  # tuples like the next three: of each product
    IN: tl.constexpr,
    SPLITS: tl.constexpr,
    FIRST: tl.constexpr,  # its first program, and at last the number of programs
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0)
    for i in tl.static_range(len(totals)):
        if (pid >= FIRST[i]) & (pid < FIRST[i + 1]):
            _accumulate(
                gradients[i],
                sources[i],
                totals[i],
                pid - FIRST[i],
                rows,
                OUT[i],
                IN[i],
                SPLITS[i],
                CHANNELS,
                PRECISION,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
            )


@triton.jit
def sum_splits_kernel(parts, out, size, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = at < size
    total = tl.zeros((BLOCK_N,), tl.float32)
    for split in range(SPLITS):
        total += tl.load(parts + split * size + at, mask, 0.0)
    tl.store(out + at, total, mask)


def weight_gradient(
    products: Sequence[tuple[Buffer, Buffer, Buffer]],
    *,
    tile: Tile,
    transposed: bool = False,
    precision: str = "ieee",
) -> Launch:
    """Adds to the gradients of one to four weights, all of them over the same rows.

    Args:
        products: for each weight the gradient of its layer's output [..., out], the layer's input [..., in], and the
            float32 total [out, in] or [splits, out, in]; transposed [B, out, D], [B, in, D] and the same totals.
        tile: BLOCK_M of out, BLOCK_N of in, BLOCK_K rows.
        transposed: whether the layers run over the sequence.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.

    Raises:
        ValueError: not one to four products.
    """
    if not 1 <= len(products) <= MAX_PRODUCTS:
        raise ValueError(f"products: got {len(products)}, accepted are 1 to {MAX_PRODUCTS}")
    gradients, sources, totals = zip(*products, strict=True)
    shape = gradients[0].shape
    rows = shape[0] if transposed else prod(shape[:-1])
    channels = shape[-1] if transposed else 0
    outs, inners = zip(*(total.shape[-2:] for total in totals), strict=True)
    splits = tuple(total.shape[0] if len(total.shape) == 3 else 1 for total in totals)
    block_m, block_n = tile["BLOCK_M"], tile["BLOCK_N"]
    first = [0]
    for out, inner, parts in zip(outs, inners, splits, strict=True):
        first.append(first[-1] + triton.cdiv(out, block_m) * triton.cdiv(inner, block_n) * parts)
    depth = rows * (channels or 1)
    return Launch.of(
        "weight_gradient.weight_gradient_kernel",
        (first[-1],),
        {"gradients": gradients, "sources": sources, "totals": totals, "rows": rows},
        reads=("gradients", "sources", "totals"),
        writes=("totals",),
        constants={
            "OUT": outs,
            "IN": inners,
            "SPLITS": splits,
            "FIRST": tuple(first),
            "CHANNELS": channels,
            "PRECISION": precision,
        },
        tile=tile,
        flops=sum(2 * depth * out * inner for out, inner in zip(outs, inners, strict=True)),
        loads=(block_m + block_n) * depth // max(splits) + 4 * block_m * block_n,
    )


def sum_splits(parts: Buffer, out: Buffer, *, tile: Tile) -> Launch:
    """``out = parts.sum(0)``: the splits of a weight's gradient, [splits, ...] to [...], both float32.

    Args:
        parts: [splits, out, in].
        out: [out, in].
        tile: BLOCK_N elements.
    """
    return Launch.of(
        "weight_gradient.sum_splits_kernel",
        (triton.cdiv(out.numel, tile["BLOCK_N"]),),
        {"parts": parts, "out": out, "size": out.numel},
        reads=("parts",),
        writes=("out",),
        constants={"SPLITS": parts.shape[0]},
        tile=tile,
    )
