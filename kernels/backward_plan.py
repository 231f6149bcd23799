"""From a recursion to launches, backward: updates in reverse, each recomputed from its saved input, unless forward kept
what backward reads, and differentiated.

The blocks are in backward_block.py; the order of their kernels, and what each reads and writes, is in gradients.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from trmfast.kernels.backward_block import BlockBackward, Targets, norm_kernel
from trmfast.kernels.forward_block import is_plain, norm_names
from trmfast.kernels.forward_plan import NetValues, PlanWriter, Setting, forward_net, values_for_backward
from trmfast.kernels.injection import enter, enter_backward, gradient_buffer
from trmfast.kernels.kept_values import kept_buffers, kept_names, kept_rows, with_names
from trmfast.kernels.norm_backward import norm_backward
from trmfast.kernels.norm_weights import column_sums, unfold
from trmfast.kernels.plan import ALIGNMENT, Buffer, Plan
from trmfast.kernels.rows import Rows, normed_sum
from trmfast.kernels.tiles import most_parts
from trmfast.kernels.weight_gradient import sum_splits

from trmfast.problem import Problem

__all__ = ["BackwardPlan", "backward_plan", "pair_bytes"]


@dataclass(frozen=True)
class BackwardPlan:
    """A plan and where its results are; None for a gradient that is zero or not requested.

    Attributes:
        plan: its inputs are ``saved``, ``x`` where it reads it, ``grad.s`` in float32, weights and tables.
        grad_states: of the incoming states, [B, L, D] float32.
        grad_x: of x, [B, L, D] float32.
        grad_weights: of every weight, float32.
    """

    plan: Plan
    grad_states: tuple[Buffer | None, ...]
    grad_x: Buffer | None
    grad_weights: tuple[Buffer | None, ...]


def backward_plan(
    setting: Setting, needs_states: Sequence[bool], needs_x: bool, needs_weights: Sequence[bool], keep: int = 0
) -> BackwardPlan:
    """The launches that differentiate a whole recursion.

    Args:
        setting: what the plan is for.
        needs_states, needs_x, needs_weights: which gradients are requested.
        keep: as in :func:`forward_plan`.
    """
    problem, shape = setting.problem, setting.shape
    updates, part = tuple(problem.program.updates), problem.weight_slices
    writer = PlanWriter(setting)
    totals = WeightTotals(writer, needs_weights)
    saved = Buffer("saved", (problem.num_grad_updates - keep, *shape), setting.dtype)
    kept = _kept_values(setting, keep)
    kept_inputs = tuple(dict.fromkeys(buffer for _, buffers in kept for buffer in buffers))
    x = Buffer("x", shape, setting.dtype)
    incoming = [Buffer(f"grad.{s}", shape, torch.float32) for s in range(len(problem.program.states))]
    grads: list[Buffer | None] = list(incoming)
    grad_x: Buffer | None = None
    flows, _ = problem.live_updates(needs_states, needs_x, needs_weights)
    wanted = _wanted(setting, needs_states, flows, needs_weights)
    slot = problem.num_grad_updates
    for position in reversed(range(len(updates))):
        update = updates[position]
        gradient, grads[update.dst] = grads[update.dst], None
        if not update.grad:
            continue
        slot -= 1
        if gradient is None or not (flows[position] or any(needs_weights[part[update.net]])):
            continue
        weighed = problem.weighs(update)
        targets: list[tuple[Buffer, bool]] = []
        if flows[position]:
            for s in update.sources:
                if wanted[position][s]:
                    held = grads[s]
                    targets.append((incoming[s] if held is None else held, held is not None))
                    grads[s] = incoming[s]
        sources, entered = (targets, None) if weighed else ([], None)
        if weighed:
            targets = []
            if sources or needs_weights[part[update.net].stop - 1]:
                entered = gradient_buffer(writer, update.net)
                targets.append((entered, False))
        if flows[position] and update.inject_x and needs_x:
            targets.append((Buffer("grad_x", shape, torch.float32), grad_x is not None))
            grad_x = targets[-1][0]
        if slot < saved.shape[0]:
            total = saved[slot]
            h = enter(writer, update.net, total, x if update.inject_x else None) if weighed else total
            values = replace(_values(writer, update.net, h), total=total)
        else:
            values, _ = kept[slot - saved.shape[0]]
        _differentiate(writer, totals, update.net, values, gradient, targets)
        if entered is not None and values.total is not None:
            enter_backward(writer, totals, update.net, values.total, entered, sources)
    totals.finish()
    grad_states = tuple(g if need else None for g, need in zip(grads, needs_states, strict=True))
    grad_weights = tuple(totals.results.get(i) for i in range(problem.num_weights))
    results = (*grad_states, grad_x, *grad_weights)
    outputs = tuple(buffer for buffer in results if buffer is not None)
    reads_x = any(buffer.name == x.name for launch in writer.launches for buffer in launch.buffers(launch.reads))
    first = (*((saved,) if saved.numel else ()), *((x,) if reads_x else ()))
    inputs = (*first, *kept_inputs, *incoming, *writer.constants)
    plan = Plan(tuple(writer.launches), inputs, outputs, totals.zeros, kept_inputs)
    return BackwardPlan(plan, grad_states, grad_x, grad_weights)


def _values(writer: PlanWriter, net: int, saved: Buffer) -> NetValues:
    """Writes the launches that compute an application of a network again, from its input [B, L, D]."""
    return values_for_backward(writer, net, forward_net(writer, net, [saved], writer.state("layer"), keep=True))


def _kept_values(setting: Setting, keep: int) -> list[tuple[NetValues, list[Buffer]]]:
    """What the forward plan keeps: the values of its last updates with ``grad``, and their buffers in order."""
    problem = setting.problem
    kinds = [(update.net, problem.weighs(update)) for update in problem.program.updates if update.grad]
    kinds = kinds[len(kinds) - keep :]
    made = {kind: _net_values(setting, *kind) for kind in dict.fromkeys(kinds)}
    found = []
    for number, kind in enumerate(kinds):
        names = kept_names(problem.nets[kind[0]], made[kind], number)
        found.append((with_names(made[kind], names), list(names.values())))
    return found


def _net_values(setting: Setting, net: int, weighed: bool) -> NetValues:
    """The values of a network, by a plan that is not used."""
    writer = PlanWriter(setting)
    values = _values(writer, net, writer.state("input"))
    return replace(values, total=writer.state("total")) if weighed else values


def pair_bytes(setting: Setting) -> int:
    """At most so many bytes are kept of one update of one sequence, on any GPU.

    Args:
        setting: of one sequence, for the interpreter.
    """
    most = 0
    squares = 4 * most_parts(setting.problem.hidden_size) * setting.length
    for (number, net), fusion in itertools.product(enumerate(setting.problem.nets), ("most", "least")):
        configuration = replace(setting.configuration, fusion=fusion)
        values = _net_values(replace(setting, configuration=configuration), number, net.injection != "add")
        sizes = [buffer.nbytes for buffer in kept_buffers(net, values)]
        # Whether these exist, or how many there are, depends on the GPU.
        sizes += [
            4 * net.block.num_heads * setting.length for block in values.blocks if block.lse is None and block.qkv
        ]
        sizes += [squares for rows in kept_rows(net, values) if rows.squares is not None]
        most = max(most, sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes))
    return most


def _wanted(
    setting: Setting, needs_states: Sequence[bool], flows: Sequence[bool], needs_weights: Sequence[bool]
) -> list[list[bool]]:
    """For every update and state, whether anything before the update needs the state's gradient."""
    problem = setting.problem
    live, found = list(needs_states), []
    for update, flow in zip(problem.program.updates, flows, strict=True):
        found.append(list(live))
        trained = any(needs_weights[problem.weight_slices[update.net]])
        live[update.dst] = flow or (update.grad and trained)
    return found


def _folded(problem: Problem) -> dict[int, int]:
    """For each weight behind a norm with a weight, the place of the norm's: together they are one factor."""
    found = {}
    for net, part in zip(problem.nets, problem.weight_slices, strict=True):
        names = list(net.block.weight_shapes)
        products = [names[0], next(name for name in names if name.startswith("mlp."))]
        ahead, _ = norm_names(net.block)
        for start in range(part.start, part.start + net.num_layers * len(names), len(names)):
            for product, norm in zip(products, ahead if net.block.norm_weight else (), strict=False):
                found[start + names.index(product)] = start + names.index(norm)
    return found


class WeightTotals:
    """Float32 sums of weight gradients over all applications, created on first use.

    Attributes:
        needs: for each weight, whether its gradient is requested.
        results: the gradients, by weight; those of folded norms after :meth:`finish`.
    """

    def __init__(self, writer: PlanWriter, needs: Sequence[bool]) -> None:
        self.writer, self.needs = writer, needs
        self.results: dict[int, Buffer] = {}
        self._totals: dict[int, Buffer] = {}
        self._splits: dict[int, Buffer] = {}
        self._folded = _folded(writer.setting.problem)

    def wants(self, weight: int) -> bool:
        """Whether a weight's gradient is requested, or needed for that of the norm folded into it."""
        return self.needs[weight] or (weight in self._folded and self.needs[self._folded[weight]])

    def of(self, weight: int) -> Buffer | None:
        """The accumulator of a weight's gradient, of the weight's shape; None if not needed."""
        if not self.wants(weight):
            return None
        if weight not in self._totals:
            self._totals[weight] = self._gradient(weight)
            if self.needs[weight]:
                self.results[weight] = self._totals[weight]
        return self._totals[weight]

    def _gradient(self, weight: int) -> Buffer:
        return Buffer(f"grad_weights.{weight}", self.writer.setting.problem.weight_shapes[weight], torch.float32)

    def split(self, weight: int, copies: int = 1) -> Buffer | None:
        """The accumulator in parts, [splits * copies, *shape], for a weight that has few tiles and many rows.

        Args:
            weight: which.
            copies: how often a row has the weight: the number of heads that share it.
        """
        total = self.of(weight)
        if total is None:
            return None
        splits = self.writer.setting.configuration.splits * copies
        if splits == 1:
            return total.view(1, *total.shape)
        if weight not in self._splits:
            self._splits[weight] = self.writer.scratch("splits", (splits, *total.shape), torch.float32)
        return self._splits[weight]

    def finish(self) -> None:
        """Adds up the parts, and parts the gradients of norms from those of the weights that they are folded into."""
        for weight, parts in self._splits.items():
            self.writer.add("sum_splits", sum_splits, parts, self._totals[weight])
        for weight, norm in self._folded.items():
            if weight in self._totals:
                if self.needs[norm]:
                    self.results[norm] = self._gradient(norm)
                factors = (self.writer.weights[weight], self.writer.weights[norm])
                self.writer.add("unfold", unfold, *factors, self._totals[weight], self.results.get(norm))

    @property
    def zeros(self) -> tuple[Buffer, ...]:
        """The buffers that must be zero before the first launch."""
        return tuple(self._splits.get(weight, total) for weight, total in self._totals.items())


def _differentiate(
    writer: PlanWriter, totals: WeightTotals, net: int, values: NetValues, gradient: Buffer, targets: Targets
) -> None:
    """Writes the launches that differentiate one application of a network.

    Args:
        writer, totals: the plan.
        net: index of the network.
        values: what its forward pass left behind.
        gradient: of its output, [B, L, D] float32.
        targets: gradients of the sources of the input, and whether to add to them; none if its gradient is not needed.
    """
    problem = writer.setting.problem
    spec, part = problem.nets[net], problem.weight_slices[net]
    blocks = [BlockBackward(writer, totals, net, layer, block) for layer, block in enumerate(values.blocks)]
    count = len(spec.block.weight_shapes)
    needed_below = [
        bool(targets) or any(totals.needs[part.start : part.start + layer * count]) for layer in range(len(blocks))
    ]
    if spec.final_norm:
        weight = writer.final_weight(net)
        total = None if weight is None else totals.split(part.stop - 1 - (spec.injection != "add"))
        if total is not None:
            writer.add("column_sums", column_sums, gradient, values.output.values, total)
        gradient = _through_norm(writer, gradient, values.output, weight)
    if is_plain(spec.block):
        top = values.blocks[-1].behind2
        assert top is not None
        gradient = _through_norm(writer, gradient, top, None)
    elif not spec.final_norm:
        rounded = writer.state("grad_output")
        writer.add("normed_sum", normed_sum, [gradient], rounded)
        gradient = rounded
    for layer in reversed(range(len(blocks))):
        below = values.blocks[layer - 1] if layer else None
        found = blocks[layer].differentiate(gradient, below, needed_below[layer], targets if layer == 0 else ())
        if found is None:
            break
        gradient = found


def _through_norm(writer: PlanWriter, gradient: Buffer, normed: Rows, weight: Buffer | None) -> Buffer:
    """Writes the launch of a norm's gradient; returns that of its input, [B, L, D]."""
    out = writer.state("grad_sum")
    writer.add(norm_kernel(writer), norm_backward, gradient, normed, out, weight=weight)
    return out
