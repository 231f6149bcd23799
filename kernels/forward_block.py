"""The launches of one block, forward; the backward plan launches them again.

What a block's norms do to its launches, with s the sum that enters a mixer, m what the mixer's last product makes:

    post          norm(s + m)          the product norms whole rows, or leaves it to its readers (rows.py)
    pre           s + m                the product stores the sum and its squares, with which the next mixer's readers
                                       scale their rows
    sandwich      s + norm(m)          the product stores m, ``normed_sum`` the sum and its squares
    sandwich_sum  norm(s + m)          the product stores s + m, ``normed_sum`` its norm and the squares of that

The weight of a norm ahead of a mixer is folded into the mixer's first product (norm_weights.py), that of a norm behind
one is a factor of ``normed_sum``; a post-norm block with weights runs as sandwich_sum does, without the first norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from trmfast.kernels.attention import attention
from trmfast.kernels.attention_projection import attention_projection
from trmfast.kernels.conv_swiglu import conv_projection
from trmfast.kernels.head_norm import head_norm
from trmfast.kernels.mixer_mlp_t import LONGEST, down_t, gate_up_t, mlp_t
from trmfast.kernels.plan import Buffer, Launch, Tile
from trmfast.kernels.projection import projection
from trmfast.kernels.qkv import qkv
from trmfast.kernels.rows import Rows, normed_sum, rows_of, squares_buffer
from trmfast.kernels.simple_gla import simple_gla, sum_decays
from trmfast.kernels.swiglu import gate_up, is_gated, swiglu

from trmfast.spec import BlockSpec

if TYPE_CHECKING:
    from trmfast.kernels.forward_plan import PlanWriter

__all__ = ["BlockValues", "BlockWeights", "add_sum", "add_totals", "forward_block", "is_plain", "norm_names"]

MOST_NORMED = 3
"""The most terms that a product norms and adds up."""


def is_plain(block: BlockSpec) -> bool:
    """Whether both norms lie behind their mixers and have no weight: products and their readers apply them."""
    return block.norm_placement == "post" and not block.norm_weight


def norm_names(block: BlockSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the weights of the norms ahead of the two mixers and of those behind them, whether they exist or not.

    Empty where there are no such norms.
    """
    ahead, behind = {"post": ("", "12"), "pre": ("12", "")}.get(block.norm_placement, ("13", "24"))
    names = tuple(tuple(f"norm{number}.weight" for number in numbers) for numbers in (ahead, behind))
    return names[0], names[1]


@dataclass(frozen=True)
class BlockWeights:
    """The weights of one block by what they do.

    Attributes:
        token: the two products of the token mixer; the first one times the weight of the norm ahead of it.
        channel: of the channel mixer, in the order of ``BlockSpec.weight_shapes``; the first one likewise.
        qk_bias: [(Hq + Hkv) d], or None.
        decay_bias: [Hq], of simple_gla, or None.
        qk_norm: [d], of the norms of queries and keys, or None.
        behind: [D], of the norms behind the mixers, or None.
    """

    token: tuple[Buffer, Buffer]
    channel: tuple[Buffer, ...]
    qk_bias: Buffer | None
    decay_bias: Buffer | None
    qk_norm: tuple[Buffer | None, Buffer | None]
    behind: tuple[Buffer | None, Buffer | None]


@dataclass(frozen=True)
class BlockValues:
    """The buffers that a block's forward leaves behind; all of [B, L, D] but those that say so.

    Attributes:
        h: what the token mixer multiplies: the sum that entered the block, or the norm of it.
        h1: what the channel mixer multiplies.
        output: of the block, for its readers; where norms lie ahead of mixers, the sum that they norm, with its
            squares, if it feeds one.
        behind1, behind2: what the norms behind the mixers make, without their weights; None where there are none.
        qkv, mixed, lse: of attention: [B, L, G + (Hq + 2 Hkv) d], [B, L, Hq d] times the gate, [B, Hq, L].
        activation: [B, L, I], where it went through memory.
        heads: what the norms of queries and keys make, without their weights, [B, L, H d], and factors [B, L, H].
    """

    h: Rows
    h1: Rows
    output: Rows
    behind1: Rows | None = None
    behind2: Rows | None = None
    qkv: Buffer | None = None
    mixed: Buffer | None = None
    lse: Buffer | None = None
    activation: Buffer | None = None
    heads: tuple[Rows, ...] = ()


def add_sum(writer: PlanWriter, terms: Sequence[Buffer | Rows], out: Buffer | None, *, squares: bool) -> Buffer | None:
    """Adds the launch of a sum to the plan; the buffer of its squares, if it writes them."""
    name = writer.scratch("squares", (1,), torch.float32).name

    def build(terms: Sequence[Buffer | Rows], out: Buffer | None, *, tile: Tile) -> Launch:
        made = squares_buffer(name, writer.setting.shape, tile) if squares else None
        return normed_sum(terms, out, squares=made, tile=tile)

    writer.add("normed_sum", build, terms, out)
    found = dict(writer.launches[-1].arguments)["sums"]
    assert found is None or isinstance(found, Buffer)
    return found


def _add_first(writer: PlanWriter, make: Callable[..., Launch], terms: Sequence[Rows], total: Buffer | None) -> None:
    """Adds a mixer's first product to the plan, which ``make`` makes of the terms and the buffer of their sum.

    It norms its terms and adds them up, or follows a launch that does, whichever is faster.
    """
    if not _sums_norms(terms, total):
        writer.launches.append(make(terms, total))
        return
    choices = [[writer.make("normed_sum", normed_sum, terms, total), make([Rows(total)], None)]]
    if len(terms) <= MOST_NORMED:
        choices.insert(0, [make(terms, total)])
    writer.launches += writer.setting.configuration.fastest(choices)


def _sums_norms(terms: Sequence[Rows], total: Buffer | None) -> bool:
    """Whether the sum of terms is stored and a norm of one of them is not applied yet."""
    return total is not None and any(term.squares is not None for term in terms)


def _product(
    writer: PlanWriter,
    kernel: str,
    build: Callable[..., Launch],
    *arguments: Any,
    eps: float,
    norms: bool = False,
    rstd: Buffer | None = None,
) -> tuple[Launch, Rows]:
    """A product, and the norm that follows it: applied by programs that hold whole rows, or left to its readers.

    Args:
        writer: the plan, to which nothing is added.
        kernel: its name in the table of tiles.
        build: makes the launch of the arguments, the last of which is its output, [B, L, D].
        arguments: of ``build``.
        eps: of the norm.
        norms: whether programs of whole rows apply it.
        rstd: [B, L], receives its factors if they do; or None.
    """
    out = arguments[-1]
    name = writer.scratch("squares", (1,), torch.float32).name

    def tiled(*arguments: Any, tile: Tile, **options: Any) -> Launch:
        if norms and tile["BLOCK_N"] >= out.shape[-1]:
            return build(*arguments, rstd=rstd, tile=tile, **options)
        return build(*arguments, squares=squares_buffer(name, out.shape, tile), tile=tile, **options)

    launch = writer.make_product(kernel, tiled, *arguments, eps=eps)
    squares = dict(launch.arguments)["squares"]
    assert squares is None or isinstance(squares, Buffer)
    return launch, Rows(out, squares, eps, rstd=rstd if squares is None else None)


def _product_and_norm(
    writer: PlanWriter, kernel: str, build: Callable[..., Launch], *arguments: Any, eps: float, rstd: Buffer | None
) -> tuple[Launch, Rows]:
    """:func:`_product` in whole rows or in narrower tiles, whichever is faster; those end in ``_columns``."""
    configuration = writer.setting.configuration
    narrow = _product(writer, f"{kernel}_columns", build, *arguments, eps=eps, norms=True, rstd=rstd)
    if not configuration.offers(kernel, writer.sizes):
        return narrow
    whole = _product(writer, kernel, build, *arguments, eps=eps, norms=True, rstd=rstd)
    return whole if configuration.choose([whole[0]], [narrow[0]])[0] is whole[0] else narrow


def forward_block(
    writer: PlanWriter,
    block: BlockSpec,
    weights: BlockWeights,
    terms: Sequence[Buffer | Rows],
    out: Buffer,
    *,
    total: Buffer | None = None,
    keep: bool = False,
    feeds_norm: bool = True,
) -> BlockValues:
    """Writes the launches of one block.

    Args:
        writer: the plan.
        block: its sizes and options.
        weights: of the block.
        terms: [B, L, D] each; their sum enters the block.  Where norms lie ahead of mixers, that sum alone, with its
            squares.
        out: [B, L, D], the result; it may be the buffer of a term.
        total: [B, L, D], receives the sum; None if there is one term, which is the sum itself.
        keep: whether everything that backward reads is kept: row sums of the softmax and the norms' factors.
        feeds_norm: whether a norm reads the block's output; otherwise its squares may be left out.
    """
    batch, length, width = writer.setting.shape
    if total is None and len(terms) > 1:
        raise ValueError(f"total: got None with {len(terms)} terms, accepted with one")
    ahead, plain = block.norm_placement != "post", is_plain(block)
    attends = block.attends
    in_tiles = not attends and length > LONGEST
    rows = [rows_of(term) for term in terms]
    weighted = any(row.weight is not None for row in rows)
    scaled = any(row.squares is not None for row in rows)
    if not ahead and (weighted or (scaled and (in_tiles or not plain))):
        total = total or writer.state("total")
        add_sum(writer, terms, total, squares=False)
        rows, total = [Rows(total)], None
    h = rows[0] if total is None else Rows(total)
    rstd1 = rstd2 = None
    if keep and plain:
        rstd1 = writer.scratch("rstd1", (batch, length) if attends else (batch, width), torch.float32)
        rstd2 = writer.scratch("rstd2", (batch, length), torch.float32)
    residual = Rows(h.values) if ahead else h

    middle, qkv_out, mixed, lse, heads, behind1 = writer.state("h1"), None, None, None, (), None
    if attends:
        qkv_out, mixed, lse, heads, attend = _attention(writer, block, weights, rows, total, keep)
        product = ("projection", projection, mixed, weights.token[1])
        if plain:
            last, h1 = _product_and_norm(writer, *product, residual, middle, eps=block.rms_norm_eps, rstd=rstd1)
            two = [attend, last]
            one = _whole_attention(
                writer, block, qkv_out, weights, residual, middle, mixed if keep else None, lse, rstd1
            )
            chosen = two if one is None else writer.setting.configuration.choose([one], two)
            h1 = h1 if chosen is two else Rows(middle, rstd=rstd1)
            behind1 = h1
            writer.launches += chosen
        else:
            writer.launches.append(attend)
            h1, behind1 = _placed(writer, block, *product, residual.values, middle, weights.behind[0], ahead)
    else:
        _mlp_t(writer, block, weights, rows, total, middle, in_tiles, rstd1)
        behind1 = h1 = Rows(middle, rstd=rstd1)
    residual = Rows(h1.values) if ahead else h1

    first, *conv, down = weights.channel
    activation: Buffer | None = writer.scratch("activation", (batch, length, block.intermediate_size))
    name, build = ("conv_projection", conv_projection) if conv else ("projection", projection)
    product = (name, build, activation, *conv, down)
    kind = "swiglu" if is_gated(block.channel_mixer) else block.channel_mixer
    up = writer.make_product("gate_up", gate_up, h1, first, activation, activation_of=kind)
    if plain:
        last, output = _product_and_norm(writer, *product, residual, out, eps=block.rms_norm_eps, rstd=rstd2)
        two = [up, last]
        chosen = two
        whole = "swiglu" if h1.squares is None else "swiglu_rows"
        if block.channel_mixer == "swiglu" and writer.setting.configuration.offers(whole, writer.sizes):
            one = writer.make_product(whole, swiglu, h1, first, down, out, eps=block.rms_norm_eps, rstd=rstd2)
            chosen = writer.setting.configuration.choose([one], two)
        if chosen is not two:
            activation, output = None, Rows(out, rstd=rstd2)
        behind2: Rows | None = output
        writer.launches += chosen
    else:
        writer.launches.append(up)
        feeds = ahead and feeds_norm
        output, behind2 = _placed(writer, block, *product, residual.values, out, weights.behind[1], feeds)
    return BlockValues(h, h1, output, behind1, behind2, qkv_out, mixed, lse, activation, heads)


def _placed(
    writer: PlanWriter, block: BlockSpec, kernel: str, build: Callable[..., Launch], *arguments: Any
) -> tuple[Rows, Rows | None]:
    """Adds a mixer's last product with its residual and the norm behind it, as the block places it.

    Args:
        writer: the plan.
        block: its options.
        kernel, build: as in :func:`_product`.
        arguments: those of ``build``, the residual and the result [B, L, D], the norm's weight or None, and whether a
            norm reads the result.

    Returns:
        The result, with its squares if a norm reads it, and what the norm behind the mixer makes, without its weight.
    """
    *sources, residual, out, weight, feeds_norm = arguments
    eps, placement = block.rms_norm_eps, block.norm_placement
    if placement == "pre":
        launch, result = _product(writer, f"{kernel}_columns", build, *sources, residual, out, eps=eps)
        writer.launches.append(launch)
        return result, None
    bypassed = placement == "sandwich"
    made = (None if bypassed else residual, writer.state("branch"))
    launch, normed = _product(writer, f"{kernel}_columns", build, *sources, *made, eps=eps)
    writer.launches.append(launch)
    behind = replace(normed, weight=weight)
    squares = add_sum(writer, [residual, behind] if bypassed else [behind], out, squares=feeds_norm)
    return Rows(out, squares, eps), normed


def _attention(
    writer: PlanWriter,
    block: BlockSpec,
    weights: BlockWeights,
    terms: Sequence[Rows],
    total: Buffer | None,
    keep: bool,
) -> tuple[Buffer, Buffer, Buffer | None, tuple[Rows, ...], Launch]:
    """Adds the QKV product and what follows it ahead of attention.

    Returns:
        Its result, the buffers of what attention makes, what the norms of heads made, and the launch of attention.
    """
    setting = writer.setting
    batch, length, _ = setting.shape
    heads, head_dim = block.num_heads, block.head_dim
    qkv_out = writer.scratch("qkv", (batch, length, weights.token[0].shape[0]))
    mixed = writer.scratch("mixed", (batch, length, heads * head_dim))
    lse = None
    whole = setting.configuration.keeps_sequences_whole(writer.sizes)
    if keep and not whole and not block.decay_rows:  # otherwise backward recomputes them
        lse = writer.scratch("lse", (batch, heads, length), torch.float32)
    tables = {"cos": writer.cos, "sin": writer.sin}
    options = {"bias": weights.qk_bias, **(tables if block.qk_norm == "none" else {})}

    def first(terms: Sequence[Rows], total: Buffer | None) -> Launch:
        padded = block.rotation == "interleaved" or block.rows_ahead % block.head_dim
        if _sums_norms(terms, total):
            kernel = "qkv_normed_padded" if padded else "qkv_normed"
        elif len(terms) > 3:
            kernel = "qkv_many"
        else:
            kernel = "qkv_padded" if padded else "qkv_sum" if len(terms) > 1 else "qkv"
        return writer.make_product(kernel, qkv, block, terms, weights.token[0], qkv_out, total=total, **options)

    _add_first(writer, first, terms, total)
    normed = []
    for keys, number in enumerate((heads, block.num_kv_heads) if block.qk_norm != "none" else ()):
        values = writer.scratch("normed_heads", (batch, length, number * head_dim)) if keep else None
        rstd = writer.scratch("rstd_heads", (batch, length, number), torch.float32) if keep else None
        options = {"weight": weights.qk_norm[keys], **tables, "normed": values, "rstd": rstd}
        writer.add("head_norm", head_norm, block, qkv_out, keys=bool(keys), **options)
        normed += [] if values is None else [Rows(values, rstd=rstd)]
    segments = writer.segments if block.segments else None
    if block.decay_rows:
        totals = add_totals(writer, block, weights, qkv_out)
        kernel = "simple_gla_wide" if head_dim > 64 else "simple_gla"
        launch = writer.make_product(kernel, simple_gla, block, qkv_out, totals, mixed, segments=segments)
        return qkv_out, mixed, None, tuple(normed), launch
    ranged = block.segments or block.attention_window
    kind = "wide" if head_dim > 64 else "ranged" if ranged else "long" if length > LONGEST else ""
    attend = f"attention_{kind}" if kind else "attention"
    launch = writer.make_product(attend, attention, block, qkv_out, mixed, segments=segments, lse=lse)
    return qkv_out, mixed, lse, tuple(normed), launch


def add_totals(writer: PlanWriter, block: BlockSpec, weights: BlockWeights, qkv_out: Buffer) -> Buffer:
    """Adds the launch of the sums of decays to the plan; their buffer, which backward does not keep but makes again."""
    batch, length, _ = writer.setting.shape
    totals = writer.scratch("totals", (batch, block.num_heads, length), torch.float64)
    writer.add("sum_decays", sum_decays, block, qkv_out, weights.decay_bias, totals)
    return totals


def _whole_attention(
    writer: PlanWriter,
    block: BlockSpec,
    qkv_out: Buffer,
    weights: BlockWeights,
    residual: Rows,
    out: Buffer,
    mixed: Buffer | None,
    lse: Buffer | None,
    rstd: Buffer | None,
) -> Launch | None:
    """Attention with its projection and its norm in one launch, or None where there is none."""
    masked = block.segments or block.attention_window or block.rows_ahead
    # Its share of the weight, D rows of a head's width, must fit the shared memory.
    if masked or block.head_dim > 64 or not writer.setting.configuration.offers("attention_projection", writer.sizes):
        return None
    arguments = (block, qkv_out, weights.token[1], residual, out)
    results = {"mixed": mixed, "lse": lse, "rstd": rstd}
    return writer.make_product(
        "attention_projection", attention_projection, *arguments, eps=block.rms_norm_eps, **results
    )


def _mlp_t(
    writer: PlanWriter,
    block: BlockSpec,
    weights: BlockWeights,
    terms: Sequence[Rows],
    total: Buffer | None,
    out: Buffer,
    in_tiles: bool,
    rstd: Buffer | None,
) -> None:
    """Adds the SwiGLU over the sequence, with its norm."""
    add, eps = writer.add_product, block.rms_norm_eps

    def whole(terms: Sequence[Rows], total: Buffer | None) -> Launch:
        return writer.make_product("mlp_t", mlp_t, terms, *weights.token, out, eps=eps, total=total, rstd=rstd)

    if not in_tiles:
        _add_first(writer, whole, terms, total)
        return
    batch, _, width = writer.setting.shape
    activation = writer.scratch("activation_t", (batch, block.seq_intermediate_size, width))
    values = [term.values for term in terms]
    add("gate_up_t", gate_up_t, values, weights.token[0], activation, total=total)
    residual = values[0] if total is None else total
    add("down_t", down_t, activation, weights.token[1], residual, out, eps=eps, rstd=rstd)
