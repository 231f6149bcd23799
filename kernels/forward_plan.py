"""From a recursion to launches, forward; and the forward of one block, which the backward plan launches again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from trmfast.kernels.attention import attention
from trmfast.kernels.attention_projection import attention_projection
from trmfast.kernels.configurations import Configuration, Sizes
from trmfast.kernels.conv_swiglu import conv_projection
from trmfast.kernels.mixer_mlp_t import LONGEST, down_t, gate_up_t, mlp_t, padded_length
from trmfast.kernels.plan import Buffer, Launch, Plan, Tile
from trmfast.kernels.projection import projection
from trmfast.kernels.qkv import qkv
from trmfast.kernels.rows import MAX_SOURCES, Rows, normed_rows, normed_sum, rows_of, squares_buffer
from trmfast.kernels.swiglu import gate_up, swiglu

from trmfast.problem import Problem
from trmfast.spec import BlockSpec

__all__ = [
    "BlockValues",
    "PlanWriter",
    "Setting",
    "forward_block",
    "forward_net",
    "forward_plan",
    "normed_values",
    "weight_buffers",
]


@dataclass(frozen=True)
class Setting:
    """What a plan is made for.

    Attributes:
        problem: program and networks.
        batch, length: B and L.
        dtype: compute dtype.
        rope: whether attention rotates queries and keys.
        configuration: tiles and choices for a GPU.
        tf32: whether float32 products may round their operands to TF32.
    """

    problem: Problem
    batch: int
    length: int
    dtype: torch.dtype
    rope: bool
    configuration: Configuration
    tf32: bool = False

    @property
    def tokens(self) -> int:
        """T = B * L."""
        return self.batch * self.length

    @property
    def shape(self) -> tuple[int, int, int]:
        """[B, L, D] of a state."""
        return self.batch, self.length, self.problem.hidden_size

    @property
    def precision(self) -> str:
        """Of float32 products, as ``tl.dot`` takes it."""
        return "tf32" if self.tf32 and self.dtype == torch.float32 else "ieee"


def weight_buffers(problem: Problem, dtype: torch.dtype) -> tuple[Buffer, ...]:
    """The buffers of all weights, in the order of the problem.

    Shapes are the weights' own, except for ``mlp_t.gate_up_proj``, whose rows are padded with zeros.
    """
    buffers = []
    for i, (name, shape) in enumerate(zip(problem.weight_names, problem.weight_shapes, strict=True)):
        if name.endswith("mlp_t.gate_up_proj.weight"):
            shape = (shape[0], padded_length(shape[1]))
        buffers.append(Buffer(f"weights.{i}", shape, dtype))
    return tuple(buffers)


class PlanWriter:
    """The launches and buffers of a plan under construction.

    Attributes:
        launches: so far.
        setting: what the plan is for.
        weights: buffers of all weights in the compute dtype, in the order of the problem.
        sizes: what tiles depend on.
        cos, sin: RoPE tables [L, head_dim] in float32, or None.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        problem = setting.problem
        self.sizes = Sizes(problem.hidden_size, setting.length, setting.dtype, problem.rope_dim or 0)
        self.launches: list[Launch] = []
        self.weights = weight_buffers(setting.problem, setting.dtype)
        self.cos: Buffer | None = None
        self.sin: Buffer | None = None
        head_dim = setting.problem.rope_dim
        if setting.rope and head_dim is not None:
            table = (setting.length, head_dim)
            self.cos, self.sin = (Buffer(name, table, torch.float32) for name in ("cos", "sin"))
        self._count = 0

    @property
    def constants(self) -> tuple[Buffer, ...]:
        """The inputs that are the same in forward and backward: weights and tables."""
        return (*self.weights, *(table for table in (self.cos, self.sin) if table is not None))

    def make(self, kernel: str, build: Callable[..., Launch], *arguments: Any, **options: Any) -> Launch:
        """The launch that ``build`` makes of the arguments, with the tile of the configuration."""
        configuration = self.setting.configuration
        return configuration.launch(kernel, self.sizes, lambda tile: build(*arguments, tile=tile, **options))

    def make_product(self, kernel: str, build: Callable[..., Launch], *arguments: Any, **options: Any) -> Launch:
        """:meth:`make` for a kernel with matrix products, whose precision is the setting's."""
        return self.make(kernel, build, *arguments, precision=self.setting.precision, **options)

    def add(self, kernel: str, build: Callable[..., Launch], *arguments: Any, **options: Any) -> None:
        """:meth:`make`, and the launch is added to the plan."""
        self.launches.append(self.make(kernel, build, *arguments, **options))

    def add_product(self, kernel: str, build: Callable[..., Launch], *arguments: Any, **options: Any) -> None:
        """:meth:`make_product`, and the launch is added to the plan."""
        self.launches.append(self.make_product(kernel, build, *arguments, **options))

    def scratch(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Buffer:
        """A new buffer of the compute dtype or another, under a name that begins as asked."""
        self._count += 1
        return Buffer(f"{name}.{self._count}", shape, dtype or self.setting.dtype)

    def state(self, name: str) -> Buffer:
        """A new buffer [B, L, D]."""
        return self.scratch(name, self.setting.shape)

    def block_weights(self, net: int, layer: int) -> tuple[Buffer, ...]:
        """The weights of one block, in the order of ``BlockSpec.weight_shapes``."""
        count = len(self.setting.problem.nets[net].block.weight_shapes)
        start = self.setting.problem.weight_slices[net].start + layer * count
        return self.weights[start : start + count]


@dataclass(frozen=True)
class BlockValues:
    """The buffers that a block's forward leaves behind.

    Attributes:
        h: the sum that entered the block, [B, L, D].
        h1: what lies between the mixers, [B, L, D].
        output: of the block, [B, L, D].
        eps: of the norms.
        squares1, squares2: where they are not None, ``h1`` and ``output`` are what the norm takes, see rows.py; so is
            ``h``, if it is such an output.
        qkv, mixed, lse: of attention: [B, L, (Hq + 2 Hkv) d], [B, L, Hq d], [B, Hq, L].
        activation: ``silu(gate) * up`` [B, L, I], where it went through memory.
        rstd1, rstd2: of the two norms.
    """

    h: Buffer
    h1: Buffer
    output: Buffer
    eps: float
    squares1: Buffer | None = None
    squares2: Buffer | None = None
    qkv: Buffer | None = None
    mixed: Buffer | None = None
    lse: Buffer | None = None
    activation: Buffer | None = None
    rstd1: Buffer | None = None
    rstd2: Buffer | None = None

    @property
    def result(self) -> Rows:
        """The output, for its readers."""
        return Rows(self.output, self.squares2, self.eps)


def _product_and_norm(
    writer: PlanWriter, kernel: str, build: Callable[..., Launch], *arguments: Any, eps: float, rstd: Buffer | None
) -> tuple[Launch, Rows]:
    """A product with a residual and a norm, in programs that hold whole rows or in narrower tiles; and its result.

    Args:
        writer: the plan, to which nothing is added.
        kernel: its name in the table of tiles; that of narrower tiles ends in ``_columns``.
        build: makes the launch of the arguments, the last of which is its output, [B, L, D].
        arguments: of ``build``.
        eps: of the norm.
        rstd: [B, L], receives the norm's factors if a program holds whole rows; or None.
    """
    out = arguments[-1]
    name = writer.scratch("squares", (1,), torch.float32).name

    def tiled(*arguments: Any, tile: Tile, **options: Any) -> Launch:
        if tile["BLOCK_N"] >= out.shape[-1]:
            return build(*arguments, rstd=rstd, tile=tile, **options)
        return build(*arguments, squares=squares_buffer(name, out.shape, tile), tile=tile, **options)

    configuration = writer.setting.configuration
    found = [writer.make_product(f"{kernel}_columns", tiled, *arguments, eps=eps)]
    if configuration.offers(kernel, writer.sizes):
        found = list(configuration.choose([writer.make_product(kernel, tiled, *arguments, eps=eps)], found))
    squares = dict(found[0].arguments)["squares"]
    assert squares is None or isinstance(squares, Buffer)
    return found[0], Rows(out, squares, eps)


def forward_block(
    writer: PlanWriter,
    block: BlockSpec,
    weights: Sequence[Buffer],
    terms: Sequence[Buffer | Rows],
    out: Buffer,
    *,
    total: Buffer | None = None,
    keep: bool = False,
) -> BlockValues:
    """Writes the launches of one block.

    Args:
        writer: the plan.
        block: its sizes.
        weights: of the block, in the order of ``BlockSpec.weight_shapes``.
        terms: [B, L, D] each; their sum enters the block.
        out: [B, L, D], the result; it may be the buffer of a term.
        total: [B, L, D], receives the sum; None if there is one term, which is the sum itself.
        keep: whether everything that backward reads is kept: row sums of the softmax and the norms' factors.
    """
    setting, eps = writer.setting, block.rms_norm_eps
    product, make = writer.add_product, writer.make_product
    batch, length, width = setting.shape
    if total is None and len(terms) > 1:
        raise ValueError(f"total: got None with {len(terms)} terms, accepted with one")
    in_tiles = block.token_mixer == "mlp_t" and length > LONGEST
    if any(rows_of(term).squares is not None for term in terms) and (total is not None or in_tiles):
        total = total or writer.state("total")
        writer.add("normed_sum", normed_sum, terms, total)
        terms, total = [total], None
    source = terms[0] if total is None else total
    h1 = Rows(writer.state("h1"))
    rstd1 = rstd2 = lse = qkv_out = mixed = None
    if keep:
        over = (batch, length) if block.token_mixer == "attention" else (batch, width)
        rstd1 = writer.scratch("rstd1", over, torch.float32)
        rstd2 = writer.scratch("rstd2", (batch, length), torch.float32)

    if block.token_mixer == "attention":
        heads, head_dim = block.num_heads, block.head_dim
        qkv_out = writer.scratch("qkv", (batch, length, (heads + 2 * block.num_kv_heads) * head_dim))
        mixed = writer.scratch("mixed", (batch, length, heads * head_dim))
        if keep and not setting.configuration.keeps_sequences_whole(writer.sizes):  # otherwise backward recomputes them
            lse = writer.scratch("lse", (batch, heads, length), torch.float32)
        kernel = "qkv" if len(terms) == 1 else "qkv_sum" if len(terms) <= 3 else "qkv_many"
        product(kernel, qkv, block, terms, weights[0], qkv_out, cos=writer.cos, sin=writer.sin, total=total)
        attend = "attention_wide" if head_dim > 64 else "attention" if length <= LONGEST else "attention_long"
        rest = (weights[1], source, h1.values)
        last, normed = _product_and_norm(writer, "projection", projection, mixed, *rest, eps=eps, rstd=rstd1)
        two = [make(attend, attention, block, qkv_out, mixed, lse=lse), last]
        chosen: Sequence[Launch] = two
        # Its share of the weight, D rows of a head's width, must fit the shared memory.
        if head_dim <= 64 and setting.configuration.offers("attention_projection", writer.sizes):
            results = {"mixed": mixed if keep else None, "lse": lse, "rstd": rstd1}
            one = make("attention_projection", attention_projection, block, qkv_out, *rest, eps=eps, **results)
            chosen = setting.configuration.choose([one], two)
        writer.launches += chosen
        h1 = normed if chosen is two else h1
    elif not in_tiles:
        product("mlp_t", mlp_t, terms, *weights[:2], h1.values, eps=eps, total=total, rstd=rstd1)
    else:
        activation_t = writer.scratch("activation_t", (batch, block.seq_intermediate_size, width))
        normed_terms = [rows_of(term).values for term in terms]
        product("gate_up_t", gate_up_t, normed_terms, weights[0], activation_t, total=total)
        rest = (weights[1], rows_of(source).values, h1.values)
        product("down_t", down_t, activation_t, *rest, eps=eps, rstd=rstd1)

    inner, (gate_up_weight, *conv, down) = block.intermediate_size, weights[2:]
    activation = writer.scratch("activation", (batch, length, inner))
    name, build = ("conv_projection", conv_projection) if conv else ("projection", projection)
    last, normed = _product_and_norm(writer, name, build, activation, *conv, down, h1, out, eps=eps, rstd=rstd2)
    two = [make("gate_up", gate_up, h1, gate_up_weight, activation), last]
    chosen = two
    whole = "swiglu" if h1.squares is None else "swiglu_rows"
    if not conv and setting.configuration.offers(whole, writer.sizes):
        one = make(whole, swiglu, h1, gate_up_weight, down, out, eps=eps, rstd=rstd2)
        chosen = setting.configuration.choose([one], two)
    writer.launches += chosen
    kept, squares2 = (activation, normed.squares) if chosen is two else (None, None)
    found = rows_of(source).values, h1.values, out, eps, h1.squares, squares2
    return BlockValues(*found, qkv_out, mixed, lse, kept, rstd1, rstd2)


def forward_net(
    writer: PlanWriter,
    net: int,
    terms: Sequence[Buffer | Rows],
    out: Buffer,
    *,
    total: Buffer | None = None,
    keep: bool = False,
) -> list[BlockValues]:
    """Writes the launches of a network; arguments as in :func:`forward_block`.  Returns the values of its blocks."""
    spec = writer.setting.problem.nets[net]
    values = []
    for layer in range(spec.num_layers):
        target = out if layer + 1 == spec.num_layers else writer.state("layer")
        weights = writer.block_weights(net, layer)
        values.append(forward_block(writer, spec.block, weights, terms, target, total=total, keep=keep))
        terms, total = (values[-1].result,), None
    return values


def normed_values(writer: PlanWriter, layers: Sequence[BlockValues]) -> list[BlockValues]:
    """The values of a network's blocks with every norm applied, by launches that follow the forward ones."""
    made: dict[Buffer, tuple[Rows, Buffer, Buffer]] = {}
    for values in layers:
        for source, squares in ((values.h1, values.squares1), (values.output, values.squares2)):
            if squares is not None:
                rstd = writer.scratch("rstd", writer.setting.shape[:2], torch.float32)
                made[source] = Rows(source, squares, values.eps), writer.state("normed"), rstd
    _norm_rows(writer, *zip(*made.values(), strict=True))

    def normed(buffer: Buffer) -> Buffer:
        return made[buffer][1] if buffer in made else buffer

    def factors(buffer: Buffer, rstd: Buffer | None) -> Buffer | None:
        return made[buffer][2] if buffer in made else rstd

    return [
        replace(
            values,
            h=normed(values.h),
            h1=normed(values.h1),
            output=normed(values.output),
            squares1=None,
            squares2=None,
            rstd1=factors(values.h1, values.rstd1),
            rstd2=factors(values.output, values.rstd2),
        )
        for values in layers
    ]


def _norm_rows(
    writer: PlanWriter, sources: Sequence[Rows] = (), outs: Sequence[Buffer] = (), rstds: Sequence[Buffer] = ()
) -> None:
    """Writes the launches of any number of norms."""
    for first in range(0, len(sources), MAX_SOURCES):
        some = slice(first, first + MAX_SOURCES)
        writer.add("normed_rows", normed_rows, sources[some], outs[some], rstds[some])


def forward_plan(setting: Setting, save: bool) -> Plan:
    """The launches of a whole recursion.

    Inputs are ``states.s``, ``x``, ``weights.i`` and the tables; outputs are ``out.s`` of every state that an update
    writes, and, if ``save``, ``saved`` [G, B, L, D] with the summed input of every update with ``grad``.

    Args:
        setting: what the plan is for.
        save: whether inputs are saved for backward.
    """
    problem, shape = setting.problem, setting.shape
    program = problem.program
    writer = PlanWriter(setting)
    incoming = [Buffer(f"states.{s}", shape, setting.dtype) for s in range(len(program.states))]
    current = [Rows(state) for state in incoming]
    x = Buffer("x", shape, setting.dtype)
    inputs = (*incoming, *((x,) if problem.uses_x else ()), *writer.constants)
    written = sorted({update.dst for update in program.counts()})
    out = {s: Buffer(f"out.{s}", shape, setting.dtype) for s in written}
    saved = Buffer("saved", (problem.num_grad_updates, *shape), setting.dtype)
    save = save and problem.num_grad_updates > 0
    slot = 0
    for update in program.updates:
        terms = [current[s] for s in update.sources] + [Rows(x)] * update.inject_x
        total = None
        if save and update.grad:
            total = saved[slot]
            slot += 1
        elif len(terms) > 1:
            total = writer.state("total")
        # In place where the state is among the terms: the last launch of a network reads none of them.
        current[update.dst] = forward_net(writer, update.net, terms, out[update.dst], total=total)[-1].result
    scaled = [state for state in current if state.squares is not None]
    _norm_rows(writer, scaled, [state.values for state in scaled])
    outputs = (*out.values(), *((saved,) if save else ()))
    return Plan(tuple(writer.launches), inputs, outputs)
