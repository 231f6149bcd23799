"""From a recursion to launches, backward: updates in reverse, each recomputed from its saved input and differentiated.

The order of the kernels in a block, and what each reads and writes, is in gradients.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from trmfast.kernels.attention_backward import attention_backward_keys, attention_backward_queries
from trmfast.kernels.configurations import WIDEST_ROW
from trmfast.kernels.conv_swiglu_backward import (
    conv_gradient,
    conv_partials_shape,
    conv_swiglu_backward,
    gate_up_backward,
)
from trmfast.kernels.forward_plan import BlockValues, PlanWriter, Setting, forward_net, normed_values
from trmfast.kernels.mixer_mlp_t_backward import mlp_t_backward, mlp_t_norm_backward, mlp_t_weight_gradient
from trmfast.kernels.norm_backward import norm_backward
from trmfast.kernels.plan import Buffer, Launch, Plan, Tile
from trmfast.kernels.projection_backward import projection_backward
from trmfast.kernels.swiglu_backward import swiglu_backward
from trmfast.kernels.weight_gradient import sum_splits, weight_gradient

__all__ = ["BackwardPlan", "backward_plan"]

Targets = Sequence[tuple[Buffer, bool]]


@dataclass(frozen=True)
class BackwardPlan:
    """A plan and where its results are; None for a gradient that is zero or not requested.

    Attributes:
        plan: its inputs are ``saved``, ``grad.s`` in float32, weights and tables.
        grad_states: of the incoming states, [B, L, D] float32.
        grad_x: of x, [B, L, D] float32.
        grad_weights: of every weight, float32.
    """

    plan: Plan
    grad_states: tuple[Buffer | None, ...]
    grad_x: Buffer | None
    grad_weights: tuple[Buffer | None, ...]


def backward_plan(
    setting: Setting, needs_states: Sequence[bool], needs_x: bool, needs_weights: Sequence[bool]
) -> BackwardPlan:
    """The launches that differentiate a whole recursion.

    Args:
        setting: what the plan is for.
        needs_states, needs_x, needs_weights: which gradients are requested.
    """
    problem, shape = setting.problem, setting.shape
    updates, part = tuple(problem.program.updates), problem.weight_slices
    writer = PlanWriter(setting)
    totals = WeightTotals(writer, needs_weights)
    saved = Buffer("saved", (problem.num_grad_updates, *shape), setting.dtype)
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
        targets: list[tuple[Buffer, bool]] = []
        if flows[position]:
            for s in update.sources:
                if wanted[position][s]:
                    held = grads[s]
                    targets.append((incoming[s] if held is None else held, held is not None))
                    grads[s] = incoming[s]
            if update.inject_x and needs_x:
                targets.append((Buffer("grad_x", shape, torch.float32), grad_x is not None))
                grad_x = targets[-1][0]
        _differentiate(writer, totals, update.net, saved[slot], gradient, targets)
    totals.finish()
    grad_states = tuple(g if need else None for g, need in zip(grads, needs_states, strict=True))
    grad_weights = tuple(totals.results.get(i) for i in range(problem.num_weights))
    results = (*grad_states, grad_x, *grad_weights)
    outputs = tuple(buffer for buffer in results if buffer is not None)
    inputs = (saved, *incoming, *writer.constants)
    plan = Plan(tuple(writer.launches), inputs, outputs, totals.zeros)
    return BackwardPlan(plan, grad_states, grad_x, grad_weights)


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


class WeightTotals:
    """Float32 sums of weight gradients over all applications, created on first use.

    Attributes:
        needs: for each weight, whether its gradient is requested.
        results: the gradients, by weight.
    """

    def __init__(self, writer: PlanWriter, needs: Sequence[bool]) -> None:
        self.writer, self.needs = writer, needs
        self.results: dict[int, Buffer] = {}
        self._splits: dict[int, Buffer] = {}

    def of(self, weight: int) -> Buffer | None:
        """The accumulator of a weight's gradient, of the weight's shape; None if not requested."""
        if not self.needs[weight]:
            return None
        shape = self.writer.setting.problem.weight_shapes[weight]
        return self.results.setdefault(weight, Buffer(f"grad_weights.{weight}", shape, torch.float32))

    def split(self, weight: int) -> Buffer | None:
        """The accumulator in parts, [splits, *shape], for a weight that has few tiles and many rows."""
        total = self.of(weight)
        if total is None:
            return None
        splits = self.writer.setting.configuration.splits
        if splits == 1:
            return total.view(1, *total.shape)
        if weight not in self._splits:
            self._splits[weight] = self.writer.scratch("splits", (splits, *total.shape), torch.float32)
        return self._splits[weight]

    def finish(self) -> None:
        """Adds up the parts."""
        for weight, parts in self._splits.items():
            self.writer.add("sum_splits", sum_splits, parts, self.results[weight])

    @property
    def zeros(self) -> tuple[Buffer, ...]:
        """The buffers that must be zero before the first launch."""
        return tuple(self._splits.get(weight, total) for weight, total in self.results.items())


def _differentiate(
    writer: PlanWriter, totals: WeightTotals, net: int, saved: Buffer, gradient: Buffer, targets: Targets
) -> None:
    """Writes the launches that recompute one application of a network and differentiate it.

    Args:
        writer, totals: the plan.
        net: index of the network.
        saved: its input [B, L, D].
        gradient: of its output, [B, L, D] float32.
        targets: gradients of the sources of the input, and whether to add to them; none if its gradient is not needed.
    """
    problem = writer.setting.problem
    layers = normed_values(writer, forward_net(writer, net, [saved], writer.state("layer"), keep=True))
    blocks = [BlockBackward(writer, totals, net, layer, values) for layer, values in enumerate(layers)]
    part = problem.weight_slices[net]
    count = (part.stop - part.start) // len(blocks)
    needed_below = [
        bool(targets) or any(totals.needs[part.start : part.start + layer * count]) for layer in range(len(blocks))
    ]
    top = layers[-1]
    grad_sum = writer.state("grad_sum")
    writer.add(_norm_kernel(writer), norm_backward, gradient, top.output, top.rstd2, grad_sum)
    for layer in reversed(range(len(blocks))):
        below = layers[layer - 1] if layer else None
        next_sum = blocks[layer].differentiate(grad_sum, below, needed_below[layer], targets if layer == 0 else ())
        if next_sum is None:
            break
        grad_sum = next_sum


def _norm_kernel(writer: PlanWriter) -> str:
    """Programs of ``norm_backward`` hold whole rows, fewer where they are wide."""
    return "norm_backward" if writer.sizes.width <= WIDEST_ROW else "norm_backward_wide"


class BlockBackward:
    """Writes the launches that differentiate one block."""

    def __init__(self, writer: PlanWriter, totals: WeightTotals, net: int, layer: int, values: BlockValues) -> None:
        self.writer, self.totals, self.values = writer, totals, values
        self.block = writer.setting.problem.nets[net].block
        self.weights = writer.block_weights(net, layer)
        count = len(self.weights)
        self.first = writer.setting.problem.weight_slices[net].start + layer * count
        self.needs = list(totals.needs[self.first : self.first + count])
        self.products: list[tuple[Buffer, Buffer, Buffer]] = []

    def differentiate(
        self, grad_sum: Buffer, below: BlockValues | None, need_input: bool, targets: Targets
    ) -> Buffer | None:
        """From the gradient of what the block's last norm takes to that of the block below.

        Args:
            grad_sum: ds2 [B, L, D].
            below: values of the block below, None in the first block.
            need_input: whether the gradient of the block's input is needed.
            targets: what it is added to, in the first block.
        """
        mixer_trained = any(self.needs[:2])
        grad_gate_up = self._channel_mixer(grad_sum, need_input or mixer_trained)
        result = None
        if grad_gate_up is not None and (need_input or mixer_trained):
            if self.block.token_mixer == "attention":
                result = self._attention(grad_sum, grad_gate_up, below, need_input, targets)
            else:
                result = self._mlp_t(grad_sum, grad_gate_up, below, need_input, targets)
        if self.products:
            self.writer.add_product("weight_gradient", weight_gradient, self.products)
        return result

    def _total(self, index: int) -> Buffer | None:
        return self.totals.of(self.first + index)

    def _product(self, index: int, gradient: Buffer, source: Buffer) -> None:
        """Records a linear layer's weight gradient for the block's weight-gradient launch."""
        total = self._total(index)
        if total is not None:
            self.products.append((gradient, source, total))

    def _channel_mixer(self, grad_sum: Buffer, need_h1: bool) -> Buffer | None:
        """From ds2 [B, L, D] to the gradient of gate and up [B, L, 2I]; None if nothing needs it."""
        writer, values, add = self.writer, self.values, self.writer.add_product
        batch, length, _ = writer.setting.shape
        inner, gate_up, down = self.block.intermediate_size, self.weights[2], self.weights[-1]
        need_gate_up = need_h1 or self.needs[2]
        if not need_gate_up and not any(self.needs[3:]):
            return None
        grad_gate_up = writer.scratch("grad_gate_up", (batch, length, 2 * inner))
        if self.block.channel_mixer == "swiglu":
            activation = writer.scratch("activation", (batch, length, inner)) if self.needs[3] else None
            add("swiglu_backward", swiglu_backward, values.h1, grad_sum, gate_up, down, grad_gate_up, activation)
            if activation is not None:
                self._product(3, grad_sum, activation)
        else:
            conv, bias = self.weights[3:5]
            grad_conv, convolved = (writer.scratch(name, (batch, length, inner)) for name in ("grad_conv", "convolved"))
            partials = writer.scratch("partials", (1,), torch.float32).name if any(self.needs[3:5]) else None
            first = (grad_sum, down, values.activation, conv, bias, grad_conv, convolved)
            add("conv_swiglu_backward", partial(self._convolution, partials), *first)
            sums = dict(writer.launches[-1].arguments)["partials"]
            if sums is not None:
                writer.add("conv_gradient", conv_gradient, sums, self._total(3), self._total(4))
            self._product(5, grad_sum, convolved)
            if need_gate_up:
                add("gate_up_backward", gate_up_backward, values.h1, gate_up, grad_conv, conv, grad_gate_up)
        if self.needs[2]:
            self._product(2, grad_gate_up, values.h1)
        return grad_gate_up if need_gate_up else None

    def _convolution(self, partials: str | None, *arguments: Buffer, tile: Tile, precision: str) -> Launch:
        """The launch for a tile, which decides the shape of the partial sums."""
        setting, inner = self.writer.setting, self.block.intermediate_size
        sums = None
        if partials is not None:
            shape = conv_partials_shape(setting.tokens, inner, self.block.conv_kernel, tile)
            sums = Buffer(partials, shape, torch.float32)
        return conv_swiglu_backward(*arguments, sums, tile=tile, precision=precision)

    def _attention(
        self, grad_sum: Buffer, grad_gate_up: Buffer, below: BlockValues | None, need_input: bool, targets: Targets
    ) -> Buffer | None:
        writer, values, add, block = self.writer, self.values, self.writer.add_product, self.block
        assert values.qkv is not None
        assert values.mixed is not None
        batch, length, _ = writer.setting.shape
        grad_s1 = self._projection_and_norm(grad_gate_up, self.weights[2], grad_sum, values.h1, values.rstd1)
        self._product(1, grad_s1, values.mixed)
        if not need_input and not self.needs[0]:
            return None
        grad_mixed = writer.scratch("grad_mixed", values.mixed.shape)
        add("projection_backward", projection_backward, grad_s1, self.weights[1], grad_mixed)
        grad_qkv = writer.scratch("grad_qkv", values.qkv.shape)
        rotation = {"cos": writer.cos, "sin": writer.sin}
        if writer.setting.configuration.keeps_sequences_whole(writer.sizes):
            add("attention_backward", attention_backward_keys, block, values.qkv, grad_mixed, grad_qkv, **rotation)
        else:
            delta = writer.scratch("delta", (batch, block.num_heads, length), torch.float32)
            sums = {"lse": values.lse, "delta": delta, **rotation}
            inputs = (block, values.qkv, values.mixed, grad_mixed, grad_qkv)
            wide = "_wide" if block.head_dim > 64 else ""
            add(f"attention_backward_queries{wide}", attention_backward_queries, *inputs, **sums)
            keys = (block, values.qkv, grad_mixed, grad_qkv)
            add(f"attention_backward_keys{wide}", attention_backward_keys, *keys, **sums)
        self._product(0, grad_qkv, values.h)
        return self._input(grad_qkv, grad_s1, below, targets) if need_input else None

    def _input(self, grad_qkv: Buffer, residual: Buffer, below: BlockValues | None, targets: Targets) -> Buffer | None:
        """The gradient of the block's input: into the targets, or through the last norm of the block below."""
        if below is None:
            self.writer.add_product(
                *("projection_backward_targets", projection_backward, grad_qkv, self.weights[0]),
                residual=residual,
                targets=targets,
            )
            return None
        return self._projection_and_norm(grad_qkv, self.weights[0], residual, below.output, below.rstd2)

    def _projection_and_norm(
        self, gradient: Buffer, weight: Buffer, residual: Buffer, norm_output: Buffer, rstd: Buffer | None
    ) -> Buffer:
        """The gradient of a layer's input plus the residual's, through the norm that made the input.

        Either one kernel, whose programs hold whole rows and therefore have narrow tiles, or two.
        """
        writer = self.writer
        out, between = writer.state("grad_sum"), writer.state("grad_norm_output")
        product = ("projection_backward", projection_backward, gradient, weight)
        chosen: Sequence[Launch] = [
            writer.make_product(*product, between, residual=residual),
            writer.make(_norm_kernel(writer), norm_backward, between, norm_output, rstd, out),
        ]
        if writer.setting.configuration.offers("projection_backward_norm", writer.sizes):
            options = {"residual": residual, "norm_output": norm_output, "rstd": rstd}
            one = writer.make_product("projection_backward_norm", *product[1:], out, **options)
            chosen = writer.setting.configuration.choose([one], chosen)
        writer.launches += chosen
        return out

    def _mlp_t(
        self, grad_sum: Buffer, grad_gate_up: Buffer, below: BlockValues | None, need_input: bool, targets: Targets
    ) -> Buffer | None:
        writer, values, add = self.writer, self.values, self.writer.add_product
        batch, length, width = writer.setting.shape
        gate_up, down = self.weights[:2]
        h, h1, rstd = values.h, values.h1, values.rstd1
        grad_h1, grad_s1 = writer.state("grad_h1"), writer.state("grad_s1")
        add("projection_backward", projection_backward, grad_gate_up, self.weights[2], grad_h1, residual=grad_sum)
        gradient = writer.state("grad_input") if need_input and below is not None else None
        totals = [self.totals.split(self.first + i) for i in (0, 1)]
        trained = any(total is not None for total in totals)
        if writer.setting.configuration.keeps_sequences_whole(writer.sizes):
            kept = grad_s1 if trained else None
            if need_input:
                shared = (h, grad_h1, h1, rstd, gate_up, down, kept, gradient)
                add("mlp_t_backward", mlp_t_backward, *shared, targets=targets)
            else:
                writer.add("mlp_t_norm_backward", mlp_t_norm_backward, grad_h1, h1, rstd, grad_s1)
            if trained:
                add("mlp_t_weight_gradient", mlp_t_weight_gradient, h, grad_s1, gate_up, down, *totals)
        else:
            inner = self.block.seq_intermediate_size
            grad_gates = writer.scratch("grad_gate_up_t", (batch, 2 * inner, width))
            activation = writer.scratch("activation_t", (batch, inner, width)) if totals[1] is not None else None
            writer.add("mlp_t_norm_backward", mlp_t_norm_backward, grad_h1, h1, rstd, grad_s1)
            recomputed = (h, grad_s1, gate_up, down, grad_gates, activation)
            add("swiglu_backward_t", swiglu_backward, *recomputed, transposed=True)
            if need_input:
                add(
                    *("projection_backward_t", projection_backward, grad_gates, gate_up, gradient),
                    residual=grad_s1,
                    targets=targets,
                    transposed=True,
                    width=length,
                )
            products = [(grad_gates, h, totals[0]), (grad_s1, activation, totals[1])]
            products = [product for product in products if product[2] is not None]
            if products:
                add("weight_gradient_t", weight_gradient, products, transposed=True)
        if gradient is None or below is None:
            return None
        below_sum = writer.state("grad_sum")
        writer.add(_norm_kernel(writer), norm_backward, gradient, below.output, below.rstd2, below_sum)
        return below_sum
