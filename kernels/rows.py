"""Rows that are normed where they are read.

A product whose tiles are narrower than a row cannot apply the norm that follows it.  It stores the norm's input s, and
of each row and column tile the sum of squares:

    squares[row, tile] = sum over the columns of the tile of s^2          [T, tiles] float32

A weightless norm is one number a row, r = 1 / sqrt(mean(s^2) + eps), so it commutes with the product behind it.  A
reader adds up the parts of its rows, from the first tile to the last, and multiplies: the rows of its product in the
epilogue, a residual at its load.  Every part belongs to one program, and all readers get the same bits.

Where a block norms what its mixers read, s is its residual too: the product stores the plain sum, and the readers of
the branch scale it.

Rounding: the squares are those of s before it is rounded to the compute dtype.  A product has round(s) as its operand
and a residual is round(s) r in float32: one rounding a norm, as when one program holds the row and stores round(s r).
``normed_sum`` and ``normed_rows`` store round(round(s) r), with the two roundings of eager PyTorch, and a third one
after the norm's weight, if it has one.

``normed_sum`` adds up tensors of which some are such pairs: a residual with the norm of its branch, and the input of an
update where the first product does not add it up at its loads (input_sum.py).  It writes the sum, its squares for the
norm ahead of a mixer, or both.  ``normed_rows`` norms up to eight tensors: the results of a recursion, and what
products of backward read.  Both are elementwise: they read each operand once and write each result once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from trmfast.kernels.dot import narrow
from trmfast.kernels.input_sum import checked_terms
from trmfast.kernels.plan import Buffer, Launch, Tile

__all__ = [
    "MAX_SOURCES",
    "Rows",
    "normed_rows",
    "normed_sum",
    "row_factor",
    "row_factors",
    "rows_of",
    "squares_buffer",
    "store_sum",
    "sum_arguments",
]

MAX_SOURCES = 8

# Parts of a row that are loaded at once.  80, of 2560 columns in tiles of 32, spill beside a tile of 128 x 256.
MOST_UNROLLED = tl.constexpr(32)


@dataclass(frozen=True)
class Rows:
    """The result of a norm over D: as it is, or as what the norm takes.

    Attributes:
        values: [..., D], the result if there are no squares, otherwise the input of the norm.
        squares: [..., tiles] float32, sums of squares of parts of a row, or None.
        eps: of the norm.
        weight: [D], factors of the columns behind the norm, or None; ``normed_sum`` and ``normed_rows`` alone take it.
        rstd: 1 / sqrt(mean(s^2) + eps) of every row in float32, where the norm is applied and backward needs them.
    """

    values: Buffer
    squares: Buffer | None = None
    eps: float = 0.0
    weight: Buffer | None = None
    rstd: Buffer | None = None

    @property
    def parts(self) -> int:
        """Sums of squares of a row; 0 without."""
        return 0 if self.squares is None else self.squares.shape[-1]


def rows_of(value: Buffer | Rows) -> Rows:
    """A tensor that is normed already, or needs no norm, as :class:`Rows`."""
    return value if isinstance(value, Rows) else Rows(value)


def squares_buffer(name: str, shape: Sequence[int], tile: Tile) -> Buffer:
    """The buffer for the sums of squares of a tensor [..., D] that is made in tiles of BLOCK_N columns."""
    *rows, width = shape
    return Buffer(name, (*rows, triton.cdiv(width, tile["BLOCK_N"])), torch.float32)


def sum_arguments(terms: Sequence[Buffer | Rows]) -> tuple[dict[str, tuple[Buffer, ...]], dict[str, tuple[Any, ...]]]:
    """The arguments ``terms`` and ``squares`` of a kernel that adds terms up, and its constants of each term: PLACES of
    its squares among those, -1 without, PARTS and TERM_EPS.

    Raises:
        ValueError: the number of terms.
    """
    rows = [rows_of(term) for term in terms]
    squares = [row.squares for row in rows]
    arguments = {
        "terms": checked_terms([row.values for row in rows]),
        "squares": tuple(buffer for buffer in squares if buffer is not None),
    }
    constants: dict[str, tuple[Any, ...]] = {
        "PLACES": _places(squares),
        "PARTS": tuple(row.parts for row in rows),
        "TERM_EPS": tuple(row.eps for row in rows),
    }
    return arguments, constants


@triton.jit
def row_factor(squares, first_row, rows, PARTS: tl.constexpr, WIDTH: tl.constexpr, EPS: tl.constexpr):
    """1 / sqrt(mean(s^2) + EPS) of rows ``first_row + rows``, all of which exist."""
    at = squares + first_row.to(tl.int64) * PARTS + rows * PARTS
    total = tl.load(at)
    if PARTS <= MOST_UNROLLED:
        for part in tl.static_range(1, PARTS):
            total += tl.load(at + part)
    else:
        for part in tl.range(1, PARTS, num_stages=1):
            total += tl.load(at + part)
    return tl.rsqrt(total / WIDTH + EPS)


@triton.jit
def row_factors(
    squares, first_row, rows, PLACES: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, EPS: tl.constexpr
):
    """:func:`row_factor` of each term that has squares; the constants are those of :func:`sum_arguments`."""
    factors = ()
    for i in tl.static_range(len(PLACES)):
        if PLACES[i] >= 0:
            factor = row_factor(squares[PLACES[i]], first_row, rows, PARTS[i], WIDTH, EPS[i])
            factors = factors + (factor,)  # type: ignore[assignment]  # noqa: RUF005 (Triton has no other way)
    return factors


@triton.jit
def store_sum(
    s,
    out,
    squares,
    first_row,
    column_tile,
    tokens,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Writes a tile of what a norm takes, [BLOCK_M, BLOCK_N] in float32, and its rows' sums of squares."""
    COLUMN_TILES: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    rows = tl.arange(0, BLOCK_M)
    row_in_range = rows < tokens - first_row
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = row_in_range[:, None]
    if D % BLOCK_N != 0:
        mask = mask & (columns < D)[None, :]
        s = tl.where((columns < D)[None, :], s, 0.0)
    start = first_row.to(tl.int64)
    tl.store(out + start * D + rows[:, None] * D + columns[None, :], narrow(s, out.dtype.element_ty), mask=mask)
    tl.store(squares + start * COLUMN_TILES + rows * COLUMN_TILES + column_tile, tl.sum(s * s, 1), mask=row_in_range)


@triton.jit
def _times_weight(value, weights, PLACE: tl.constexpr, columns, D: tl.constexpr, MASKED: tl.constexpr):
    """Rounded values [rows, columns] times the weight at a place of a tuple, rounded again; PLACE -1: as they are."""
    if PLACE >= 0:
        if MASKED:
            weight = tl.load(weights[PLACE] + columns, mask=columns < D, other=0.0)
        else:
            weight = tl.load(weights[PLACE] + columns)
        value = narrow(value.to(tl.float32) * weight.to(tl.float32)[None, :], value.dtype)
    return value


@triton.jit
def normed_sum_kernel(
    terms,
    squares,
    weights,
    out,
    sums,
    tokens,
    D: tl.constexpr,
    WEIGHTED: tl.constexpr,  # a tuple like the next three: of each term, the place of its weight, -1 without
    PLACES: tl.constexpr,
    PARTS: tl.constexpr,
    TERM_EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    COLUMN_TILES: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    LAST: tl.constexpr = len(terms) - 1
    first_row = tl.program_id(0) // COLUMN_TILES * BLOCK_M
    column_tile = tl.program_id(0) % COLUMN_TILES
    rows = tl.arange(0, BLOCK_M)
    near_rows = tl.minimum(rows, tokens - first_row - 1)
    row_in_range = rows < tokens - first_row
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = row_in_range[:, None]
    if D % BLOCK_N != 0:
        mask = mask & (columns < D)[None, :]
    at = first_row.to(tl.int64) * D + rows[:, None] * D + columns[None, :]
    like = terms[0] if out is None else out
    dtype: tl.constexpr = like.dtype.element_ty
    # From the right, rounded after each addition, as the reference does.
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype)
    for i in tl.static_range(len(terms)):
        value = tl.load(terms[LAST - i] + at, mask=mask, other=0.0)
        if PLACES[LAST - i] >= 0:
            factor = row_factor(
                squares[PLACES[LAST - i]], first_row, near_rows, PARTS[LAST - i], D, TERM_EPS[LAST - i]
            )  # fmt: skip
            value = narrow(value.to(tl.float32) * factor[:, None], dtype)
        value = _times_weight(value, weights, WEIGHTED[LAST - i], columns, D, D % BLOCK_N != 0)
        total = narrow(value.to(tl.float32) + total.to(tl.float32), dtype)
    if out is not None:
        tl.store(out + at, total, mask=mask)
    if sums is not None:
        wide = total.to(tl.float32)
        target = sums + first_row.to(tl.int64) * COLUMN_TILES + rows * COLUMN_TILES + column_tile
        tl.store(target, tl.sum(wide * wide, 1), mask=row_in_range)


@triton.jit
def normed_rows_kernel(
    sources,
    squares,
    weights,
    outs,
    rstds,
    tokens,
    D: tl.constexpr,
    WEIGHTED: tl.constexpr,  # a tuple like the next two: of each source, the place of its weight, -1 without
    PARTS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    COLUMN_TILES: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    first_row = tl.program_id(0) // COLUMN_TILES * BLOCK_M
    column_tile = tl.program_id(0) % COLUMN_TILES
    rows = tl.arange(0, BLOCK_M)
    near_rows = tl.minimum(rows, tokens - first_row - 1)
    row_in_range = rows < tokens - first_row
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = row_in_range[:, None]
    if D % BLOCK_N != 0:
        mask = mask & (columns < D)[None, :]
    at = first_row.to(tl.int64) * D + rows[:, None] * D + columns[None, :]
    for i in tl.static_range(len(sources)):
        factor = row_factor(squares[i], first_row, near_rows, PARTS[i], D, EPS[i])
        value = tl.load(sources[i] + at, mask=mask, other=0.0).to(tl.float32) * factor[:, None]
        value = narrow(value, outs[i].dtype.element_ty)
        value = _times_weight(value, weights, WEIGHTED[i], columns, D, D % BLOCK_N != 0)
        tl.store(outs[i] + at, value, mask=mask)
        if len(rstds) > 0:
            tl.store(rstds[i] + first_row + rows, factor, mask=row_in_range & (column_tile == 0))


def _places(present: Sequence[object | None]) -> tuple[int, ...]:
    """Of each item its place among those that are not None, -1 for those that are."""
    counts = [sum(other is not None for other in present[:i]) for i in range(len(present))]
    return tuple(-1 if item is None else count for item, count in zip(present, counts, strict=True))


def normed_sum(
    terms: Sequence[Buffer | Rows], out: Buffer | None, *, squares: Buffer | None = None, tile: Tile
) -> Launch:
    """The launch of a sum of tensors, those with squares normed and rounded before they are added.

    Args:
        terms: 1 to 8 of [..., D] in the order of the update, x last; the sum is taken from the right.  One term alone
            may be float32, and is then cast; in a float32 sum all are.
        out: [..., D], the buffer of a term or another; or None.
        squares: [..., tiles] float32, receives the sums of squares of the rounded sum; or None.
        tile: BLOCK_M, BLOCK_N.

    Raises:
        ValueError: the number of terms, or nothing to write.
    """
    weights = [rows_of(term).weight for term in terms]
    summed, constants = sum_arguments(terms)
    if out is None and squares is None:
        raise ValueError("out: got None without squares, accepted with them")
    like = summed["terms"][0] if out is None else out
    tokens, width = prod(like.shape[:-1]), like.shape[-1]
    return Launch.of(
        "rows.normed_sum_kernel",
        (triton.cdiv(tokens, tile["BLOCK_M"]) * triton.cdiv(width, tile["BLOCK_N"]),),
        {
            **summed,
            "weights": tuple(weight for weight in weights if weight is not None),
            "out": out,
            "sums": squares,
            "tokens": tokens,
        },
        reads=("terms", "squares", "weights"),
        writes=("out", "sums"),
        constants={
            "D": width,
            "WEIGHTED": _places(weights),
            **constants,
        },
        tile=tile,
    )


def normed_rows(sources: Sequence[Rows], outs: Sequence[Buffer], rstds: Sequence[Buffer] = (), *, tile: Tile) -> Launch:
    """The launch of the norms of several tensors of one shape.

    Args:
        sources: 1 to 8 of [..., D], all with squares.
        outs: [..., D] for each; it may be the buffer of its source.
        rstds: [...] float32 for each, receives 1 / sqrt(mean(s^2) + eps) of each row; or none at all.
        tile: BLOCK_M, BLOCK_N.

    Raises:
        ValueError: the number of sources.
    """
    if not 1 <= len(sources) <= MAX_SOURCES:
        raise ValueError(f"sources: got {len(sources)}, accepted are 1 to {MAX_SOURCES}")
    tokens, width = prod(outs[0].shape[:-1]), outs[0].shape[-1]
    return Launch.of(
        "rows.normed_rows_kernel",
        (triton.cdiv(tokens, tile["BLOCK_M"]) * triton.cdiv(width, tile["BLOCK_N"]),),
        {
            "sources": tuple(source.values for source in sources),
            "squares": tuple(source.squares for source in sources if source.squares is not None),
            "weights": tuple(source.weight for source in sources if source.weight is not None),
            "outs": tuple(outs),
            "rstds": tuple(rstds),
            "tokens": tokens,
        },
        reads=("sources", "squares", "weights"),
        writes=("outs", "rstds"),
        constants={
            "D": width,
            "WEIGHTED": _places([source.weight for source in sources]),
            "PARTS": tuple(source.parts for source in sources),
            "EPS": tuple(source.eps for source in sources),
        },
        tile=tile,
    )
