"""From a recursion to launches, forward; the blocks are in forward_block.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from trmfast.kernels.configurations import Configuration, Sizes
from trmfast.kernels.forward_block import BlockValues, BlockWeights, add_sum, forward_block, norm_names
from trmfast.kernels.injection import enter
from trmfast.kernels.kept_values import kept_names
from trmfast.kernels.mixer_mlp_t import padded_length
from trmfast.kernels.norm_weights import fold
from trmfast.kernels.plan import Buffer, Launch, Plan
from trmfast.kernels.rows import MAX_SOURCES, Rows, normed_rows, rows_of

from trmfast.problem import Problem

__all__ = [
    "NetValues",
    "PlanWriter",
    "Setting",
    "forward_net",
    "forward_plan",
    "values_for_backward",
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
        segments: boundaries of sequences, int32 [B, L, 2], or None.
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
        self.segments: Buffer | None = None
        if problem.uses_segments:
            self.segments = Buffer("segments", (setting.batch, setting.length, 2), torch.int32)
        self._folded: dict[Buffer, Buffer] = {}
        self._count = 0

    @property
    def constants(self) -> tuple[Buffer, ...]:
        """The inputs that are the same in forward and backward: weights, tables and boundaries."""
        return (*self.weights, *(buffer for buffer in (self.cos, self.sin, self.segments) if buffer is not None))

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

    def block_weights(self, net: int, layer: int) -> BlockWeights:
        """The weights of one block; the launches that fold those of norms are added at the first call."""
        block = self.setting.problem.nets[net].block
        count = len(block.weight_shapes)
        start = self.setting.problem.weight_slices[net].start + layer * count
        named = dict(zip(block.weight_shapes, self.weights[start : start + count], strict=True))
        token = [weight for name, weight in named.items() if name.startswith(f"{block.mixer_name}.")][:2]
        channel = [weight for name, weight in named.items() if name.startswith("mlp.")]
        ahead, behind = norm_names(block)
        if block.norm_weight and ahead:
            token[0], channel[0] = (
                self._fold(weight, named[name]) for weight, name in zip((token[0], channel[0]), ahead, strict=True)
            )
        first, second = (named.get(name) for name in (behind or ("", "")))
        mixer = block.mixer_name
        heads = (named.get(f"{mixer}.q_norm.weight"), named.get(f"{mixer}.k_norm.weight"))
        biases = named.get(f"{mixer}.qk_bias"), named.get(f"{mixer}.decay_bias")
        return BlockWeights((token[0], token[1]), tuple(channel), *biases, heads, (first, second))

    def final_weight(self, net: int) -> Buffer | None:
        """The weight of a network's final norm, or None."""
        spec = self.setting.problem.nets[net]
        place = self.setting.problem.weight_slices[net].stop - 1 - (spec.injection != "add")
        return self.weights[place] if spec.final_norm and spec.block.norm_weight else None

    def injection_weight(self, net: int) -> Buffer:
        """The weight of a network's injection, which has one: [D] or [D, D]."""
        return self.weights[self.setting.problem.weight_slices[net].stop - 1]

    def _fold(self, weight: Buffer, factor: Buffer) -> Buffer:
        if weight not in self._folded:
            self._folded[weight] = self.scratch("folded", weight.shape)
            self.add("fold", fold, weight, factor, self._folded[weight])
        return self._folded[weight]


@dataclass(frozen=True)
class NetValues:
    """What a network's forward leaves behind.

    Attributes:
        blocks: the values of its blocks.
        output: its result, [B, L, D], for its readers.
        total: what the weight of its injection met, [B, L, D]; None where there was none.
    """

    blocks: tuple[BlockValues, ...]
    output: Rows
    total: Buffer | None = None


def forward_net(
    writer: PlanWriter,
    net: int,
    terms: Sequence[Buffer | Rows],
    out: Buffer,
    *,
    total: Buffer | None = None,
    keep: bool = False,
) -> NetValues:
    """Writes the launches of a network; arguments as in :func:`forward_block`, but for terms of any number."""
    spec = writer.setting.problem.nets[net]
    block, eps = spec.block, spec.block.rms_norm_eps
    ahead = block.norm_placement != "post"
    if ahead:
        first = rows_of(terms[0])
        made = total is not None or len(terms) > 1 or first.squares is not None
        h = total or writer.state("total") if made else first.values
        squares = add_sum(writer, terms, h if made else None, squares=True)
        terms, total = [Rows(h, squares, eps)], None
    blocks: list[BlockValues] = []
    for layer in range(spec.num_layers):
        last = layer + 1 == spec.num_layers
        target = out if last and (ahead or not spec.final_norm) else writer.state("layer")
        weights = writer.block_weights(net, layer)
        feeds_norm = not last or spec.final_norm
        blocks.append(
            forward_block(writer, block, weights, terms, target, total=total, keep=keep, feeds_norm=feeds_norm)
        )
        terms, total = (blocks[-1].output,), None
    output = blocks[-1].output
    if spec.final_norm:
        if not ahead:
            output = Rows(out, add_sum(writer, [output], out, squares=True))
        output = replace(output, eps=eps, weight=writer.final_weight(net))
    elif ahead:
        output = Rows(output.values)
    return NetValues(tuple(blocks), output)


def values_for_backward(writer: PlanWriter, net: int, values: NetValues) -> NetValues:
    """The values of a network as its backward reads them: with the norms applied, without weights, of what enters
    products and of what sums over rows read.  ``norm_backward`` applies the others.
    """
    block, blocks = writer.setting.problem.nets[net].block, values.blocks
    needed: list[Rows | None] = [rows for found in blocks for rows in (found.h, found.h1)]
    if block.norm_weight:
        needed += [rows for found in blocks for rows in (found.behind1, found.behind2)]
        needed.append(values.output)
    made: dict[Buffer, Rows] = {}
    sources: list[Rows] = []
    for rows in needed:
        if rows is not None and rows.squares is not None and rows.values not in made:
            sources.append(replace(rows, weight=None))
            rstd = writer.scratch("rstd", writer.setting.shape[:2], torch.float32)
            made[rows.values] = Rows(writer.state("normed"), rstd=rstd)
    targets = [made[source.values] for source in sources]
    _norm_rows(writer, sources, [t.values for t in targets], [t.rstd for t in targets if t.rstd is not None])

    def read(rows: Rows) -> Rows:
        return rows if rows.squares is None else made.get(rows.values, rows)

    def behind(rows: Rows | None) -> Rows | None:
        return None if rows is None else read(rows)

    blocks = tuple(
        replace(found, h=read(found.h), h1=read(found.h1), behind1=behind(found.behind1), behind2=behind(found.behind2))
        for found in blocks
    )
    return replace(values, blocks=blocks, output=read(values.output))


def _norm_rows(
    writer: PlanWriter, sources: Sequence[Rows] = (), outs: Sequence[Buffer] = (), rstds: Sequence[Buffer] = ()
) -> None:
    """Writes the launches of any number of norms."""
    for first in range(0, len(sources), MAX_SOURCES):
        some = slice(first, first + MAX_SOURCES)
        writer.add("normed_rows", normed_rows, sources[some], outs[some], rstds[some])


def _injected(problem: Problem) -> list[tuple[object, ...]]:
    """Of every update what it adds to its first source: sums are equal where this is, bit for bit.

    Nothing where the sum of the sources alone meets a weight.
    """
    written, found = Counter[int](), []
    for update in problem.program.updates:
        weighed = problem.weighs(update)
        found.append(() if weighed else (*((s, written[s]) for s in update.sources[1:]), update.inject_x))
        written[update.dst] += 1
    return found


def forward_plan(setting: Setting, save: bool, keep: int = 0) -> Plan:
    """The launches of a whole recursion.

    Inputs are ``states.s``, ``x``, ``weights.i``, the tables and ``segments``; outputs are ``out.s`` of every state
    that an update writes, and, if ``save``, ``saved`` [G, B, L, D] with the summed input of every update with ``grad``
    but the last ``keep``, and what those keep.

    Args:
        setting: what the plan is for.
        save: whether inputs are saved for backward.
        keep: of how many updates with ``grad``, from the last one on, the activations are kept.
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
    save = save and problem.num_grad_updates > 0
    saved = Buffer("saved", (problem.num_grad_updates - keep, *shape), setting.dtype)
    names: dict[str, Buffer] = {}
    slot = 0
    injected, sums = _injected(problem), {}
    uses = Counter(key for key in injected if key)
    for update, key in zip(program.updates, injected, strict=True):
        weighed = problem.weighs(update)
        terms = [current[s] for s in update.sources] + [Rows(x)] * (update.inject_x and not weighed)
        first, *others = terms
        if uses[key] * (len(others) - 1) > len(others) + 1:  # tensors that its readers spare, and that it moves
            if key not in sums:
                sums[key] = writer.state("injected")
                add_sum(writer, others, sums[key], squares=False)
            terms = [first, Rows(sums[key])]
        total, number = None, -1
        if save and update.grad:
            number = slot - saved.shape[0]
            total = writer.state("total") if number >= 0 else saved[slot]
            slot += 1
        elif len(terms) > 1:
            total = writer.state("total")
        entered = None
        if weighed:
            entered = _sum_of(writer, terms, total)
            terms, total = [Rows(enter(writer, update.net, entered, x if update.inject_x else None))], None
        if number >= 0:
            values = forward_net(writer, update.net, terms, writer.state("output"), total=total, keep=True)
            values = replace(values, total=entered)
            names.update(kept_names(problem.nets[update.net], values_for_backward(writer, update.net, values), number))
            current[update.dst] = values.output
        else:
            # In place where the state is among the terms: the last launch of a network reads none of them.
            current[update.dst] = forward_net(writer, update.net, terms, out[update.dst], total=total).output
    _write_results(writer, {out[s]: current[s] for s in written})
    kept = tuple(names.values())
    launches = tuple(launch.moved(lambda buffer: names.get(buffer.name, buffer)) for launch in writer.launches)
    outputs = (*out.values(), *((saved,) if save and saved.numel else ()), *kept)
    return Plan(launches, inputs, outputs, kept=kept)


def _sum_of(writer: PlanWriter, terms: Sequence[Rows], total: Buffer | None) -> Buffer:
    """The sum of terms, written to ``total`` if there is one; no launch where it is a tensor that is there."""
    (first, *others) = terms
    if total is None and not others and first.squares is None and first.weight is None:
        return first.values
    total = total or writer.state("total")
    add_sum(writer, terms, total, squares=False)
    return total


def _write_results(writer: PlanWriter, results: Mapping[Buffer, Rows]) -> None:
    """Writes the launches that leave each state in its output: a norm, a copy, or none."""
    scaled = [out for out, state in results.items() if state.squares is not None]
    _norm_rows(writer, [results[out] for out in scaled], scaled)
    for out, state in results.items():
        if state.squares is None and state.values != out:
            add_sum(writer, [state], out, squares=False)
