"""The launches that differentiate one block.

The order of the kernels in a block, and what each reads and writes, is in gradients.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from trmfast.kernels.attention_backward import attention_backward_keys, attention_backward_queries
from trmfast.kernels.conv_swiglu_backward import (
    conv_gradient,
    conv_partials_shape,
    conv_swiglu_backward,
    gate_up_backward,
)
from trmfast.kernels.forward_block import BlockValues, add_totals, is_plain, norm_names
from trmfast.kernels.forward_plan import PlanWriter
from trmfast.kernels.gate_backward import gate_backward
from trmfast.kernels.head_norm import head_norm_backward
from trmfast.kernels.mixer_mlp_t_backward import mlp_t_backward, mlp_t_norm_backward, mlp_t_weight_gradient
from trmfast.kernels.norm_backward import norm_backward
from trmfast.kernels.norm_weights import column_sums
from trmfast.kernels.plan import Buffer, Launch, Tile
from trmfast.kernels.projection_backward import projection_backward
from trmfast.kernels.rows import Rows
from trmfast.kernels.simple_gla_backward import (
    decays_backward,
    simple_gla_backward_keys,
    simple_gla_backward_queries,
)
from trmfast.kernels.swiglu_backward import swiglu_backward
from trmfast.kernels.tiles import WIDEST_ROW
from trmfast.kernels.weight_gradient import weight_gradient

if TYPE_CHECKING:
    from trmfast.kernels.backward_plan import WeightTotals

__all__ = ["BlockBackward", "Targets", "norm_kernel"]

Targets = Sequence[tuple[Buffer, bool]]


def norm_kernel(writer: PlanWriter, targets: Targets = ()) -> str:
    """Programs of ``norm_backward`` hold whole rows, fewer where they are wide, or with gradients of states."""
    if writer.sizes.width > WIDEST_ROW:
        return "norm_backward_wide"
    return "norm_backward_targets" if targets else "norm_backward"


class BlockBackward:
    """Writes the launches that differentiate one block."""

    def __init__(self, writer: PlanWriter, totals: WeightTotals, net: int, layer: int, values: BlockValues) -> None:
        self.writer, self.totals, self.values = writer, totals, values
        self.block = writer.setting.problem.nets[net].block
        self.weights = writer.block_weights(net, layer)
        self.names = list(self.block.weight_shapes)
        self.first = writer.setting.problem.weight_slices[net].start + layer * len(self.names)
        self.products: list[tuple[Buffer, Buffer, Buffer]] = []
        self.norms_ahead, self.norms_behind = norm_names(self.block)

    def differentiate(
        self, gradient: Buffer, below: BlockValues | None, need_input: bool, targets: Targets
    ) -> Buffer | None:
        """From the gradient of the block's output to that of the block below's; None if it is not needed.

        Where products apply norms (:func:`is_plain`), both gradients are those of what the blocks' last norms take.

        Args:
            gradient: [B, L, D].
            below: values of the block below, None in the first block.
            need_input: whether the gradient of the block's input is needed.
            targets: what it is added to, in the first block.
        """
        if is_plain(self.block):
            result = self._plain(gradient, below, need_input, targets)
        elif need_input or self._wants(*self.names):
            result = self._placed(gradient, need_input, targets)
        else:
            result = None
        if self.products:
            self.writer.add_product("weight_gradient", weight_gradient, self.products)
        return result

    # ------------------------------------------------------------ weights

    def _wants(self, *names: str) -> bool:
        """Whether the gradient of any of these weights of the block is needed."""
        return any(self.totals.wants(self._place(name)) for name in names if name in self.names)

    def _place(self, name: str) -> int:
        return self.first + self.names.index(name)

    def _total(self, name: str) -> Buffer | None:
        return self.totals.of(self._place(name))

    def _product(self, name: str, gradient: Buffer, source: Buffer) -> None:
        """Records a linear layer's weight gradient for the block's weight-gradient launch."""
        total = self._total(name)
        if total is not None:
            self.products.append((gradient, source, total))

    @property
    def _token_names(self) -> list[str]:
        """The weights of the token mixer, and of the norm ahead of it."""
        return [name for name in self.names if name.startswith(f"{self.block.mixer_name}.")] + list(
            self.norms_ahead[:1]
        )

    # ------------------------------------------------------------ norms

    def _plain(self, grad_sum: Buffer, below: BlockValues | None, need_input: bool, targets: Targets) -> Buffer | None:
        mixer_trained = self._wants(*self._token_names)
        grad_gate_up = self._channel_mixer(grad_sum, need_input or mixer_trained)
        if grad_gate_up is None or not (need_input or mixer_trained):
            return None
        if self.block.token_mixer == "mlp_t":
            return self._mlp_t(grad_sum, grad_gate_up, below, need_input, targets)
        first, behind = self.weights.channel[0], self.values.behind1
        assert behind is not None
        grad_s1 = self._projection_and_norm(grad_gate_up, first, grad_sum, behind)
        grad_qkv = self._attention(grad_s1, need_input)
        if grad_qkv is None or not need_input:
            return None
        if below is None:
            product = ("projection_backward_targets", projection_backward, grad_qkv, self.weights.token[0])
            self.writer.add_product(*product, residual=grad_s1, targets=targets)
            return None
        assert below.behind2 is not None
        return self._projection_and_norm(grad_qkv, self.weights.token[0], grad_s1, below.behind2)

    def _projection_and_norm(self, gradient: Buffer, weight: Buffer, residual: Buffer, normed: Rows) -> Buffer:
        """The gradient of a layer's input plus the residual's, through the norm that made the input.

        Either one kernel, whose programs hold whole rows and therefore have narrow tiles, or two.
        """
        writer = self.writer
        out, between = writer.state("grad_sum"), writer.state("grad_norm_output")
        product = ("projection_backward", projection_backward, gradient, weight)
        chosen: Sequence[Launch] = [
            writer.make_product(*product, between, residual=residual),
            writer.make(norm_kernel(writer), norm_backward, between, normed, out),
        ]
        if writer.setting.configuration.offers("projection_backward_norm", writer.sizes):
            options = {"residual": residual, "norm_output": normed.values, "rstd": normed.rstd}
            one = writer.make_product("projection_backward_norm", *product[1:], out, **options)
            chosen = writer.setting.configuration.choose([one], chosen)
        writer.launches += chosen
        return out

    def _placed(self, gradient: Buffer, need_input: bool, targets: Targets) -> Buffer | None:
        """For norms ahead of mixers, behind them, or with weights: each has a launch of its own."""
        values, weights = self.values, self.weights
        need_mixer = need_input or self._wants(*self._token_names)
        need_h1 = need_mixer or self._wants(*self.norms_behind[:1])
        branch, bypass = self._behind(1, gradient, values.behind2)
        grad_inner = self._channel_mixer(branch, need_h1)
        if grad_inner is None or not need_h1:
            return None
        grad_h1 = self._ahead(grad_inner, weights.channel[0], bypass, values.h1)
        assert grad_h1 is not None
        branch, bypass = self._behind(0, grad_h1, values.behind1)
        grad_qkv = self._attention(branch, need_input) if need_mixer else None
        if grad_qkv is None or not need_input:
            return None
        return self._ahead(grad_qkv, weights.token[0], bypass, values.h, targets)

    def _behind(self, mixer: int, gradient: Buffer, normed: Rows | None) -> tuple[Buffer, Buffer]:
        """Through the norm behind a mixer: the gradients of the mixer's output and of the residual."""
        if normed is None:
            return gradient, gradient
        writer, weight = self.writer, self.weights.behind[mixer]
        if weight is not None:
            total = self.totals.split(self._place(self.norms_behind[mixer]))
            if total is not None:
                writer.add("column_sums", column_sums, gradient, normed.values, total)
        out = writer.state("grad_branch")
        writer.add(norm_kernel(writer), norm_backward, gradient, normed, out, weight=weight)
        return out, gradient if self.block.norm_placement == "sandwich" else out

    def _ahead(
        self, gradient: Buffer, weight: Buffer, bypass: Buffer, normed: Rows, targets: Targets = ()
    ) -> Buffer | None:
        """Through a mixer's first product and the norm ahead of it, if there is one, with what bypasses both."""
        writer = self.writer
        out = None if targets else writer.state("grad_sum")
        if not self.norms_ahead:
            kernel = "projection_backward_targets" if targets else "projection_backward"
            product = (kernel, projection_backward, gradient, weight, out)
            writer.add_product(*product, residual=bypass, targets=targets)
            return out
        between = writer.state("grad_normed")
        writer.add_product("projection_backward", projection_backward, gradient, weight, between)
        norm = (norm_kernel(writer, targets), norm_backward, between, normed, out)
        writer.add(*norm, residual=bypass, targets=targets)
        return out

    # ------------------------------------------------------------ mixers

    def _channel_mixer(self, gradient: Buffer, need_h1: bool) -> Buffer | None:
        """From the gradient of its output [B, L, D] to that of its first product; None if nothing needs it."""
        writer, values, add = self.writer, self.values, self.writer.add_product
        batch, length, _ = writer.setting.shape
        inner, (gate_up, *conv, down) = self.block.intermediate_size, self.weights.channel
        first, *others = (name for name in self.names if name.startswith("mlp."))
        need_gate_up = need_h1 or self._wants(first)
        if not need_gate_up and not self._wants(*others):
            return None
        source = values.h1.values
        grad_gate_up = writer.scratch("grad_gate_up", (batch, length, gate_up.shape[0]))
        if not conv:
            kind = self.block.channel_mixer
            activation = writer.scratch("activation", (batch, length, inner)) if self._wants(*others) else None
            inputs = (source, gradient, gate_up, down)
            add("swiglu_backward", swiglu_backward, *inputs, grad_gate_up, activation, activation_of=kind)
            if activation is not None:
                self._product(others[-1], gradient, activation)
        else:
            grad_conv, convolved = (writer.scratch(name, (batch, length, inner)) for name in ("grad_conv", "convolved"))
            partials = writer.scratch("partials", (1,), torch.float32).name if self._wants(*others[:2]) else None
            inputs = (gradient, down, values.activation, *conv, grad_conv, convolved)
            add("conv_swiglu_backward", partial(self._convolution, partials), *inputs)
            sums = dict(writer.launches[-1].arguments)["partials"]
            if sums is not None:
                writer.add("conv_gradient", conv_gradient, sums, *(self._total(name) for name in others[:2]))
            self._product(others[-1], gradient, convolved)
            if need_gate_up:
                add("gate_up_backward", gate_up_backward, source, gate_up, grad_conv, conv[0], grad_gate_up)
        if need_gate_up:
            self._product(first, grad_gate_up, source)
        return grad_gate_up if need_gate_up else None

    def _convolution(self, partials: str | None, *arguments: Buffer, tile: Tile, precision: str) -> Launch:
        """The launch for a tile, which decides the shape of the partial sums."""
        setting, inner = self.writer.setting, self.block.intermediate_size
        sums = None
        if partials is not None:
            shape = conv_partials_shape(setting.tokens, inner, self.block.conv_kernel, tile)
            sums = Buffer(partials, shape, torch.float32)
        return conv_swiglu_backward(*arguments, sums, tile=tile, precision=precision)

    def _attention(self, gradient: Buffer, need_input: bool) -> Buffer | None:
        """From the gradient of its output [B, L, D] to that of the QKV product; None if nothing needs it."""
        writer, values, add, block = self.writer, self.values, self.writer.add_product, self.block
        assert values.qkv is not None
        assert values.mixed is not None
        batch, length, _ = writer.setting.shape
        packed, projected, *_ = self.names
        self._product(projected, gradient, values.mixed)
        if not need_input and not self._wants(*(name for name in self._token_names if name != projected)):
            return None
        grad_mixed = writer.scratch("grad_mixed", values.mixed.shape)
        add("projection_backward", projection_backward, gradient, self.weights.token[1], grad_mixed)
        grad_qkv = writer.scratch("grad_qkv", values.qkv.shape)
        whole = writer.setting.configuration.keeps_sequences_whole(writer.sizes)
        delta = (
            None
            if whole or block.decay_rows
            else writer.scratch("delta", (batch, block.num_heads, length), torch.float32)
        )
        has_gate = block.gate != "none"
        if has_gate:
            inputs = (block, values.qkv, values.mixed, grad_mixed, grad_qkv)
            writer.add("gate_backward", gate_backward, *inputs, delta=delta)
        options = {"segments": writer.segments if block.segments else None, "cos": writer.cos, "sin": writer.sin}
        ranged = "_ranged" if block.segments or block.attention_window else ""
        kind = "_wide" if block.head_dim > 64 else ranged
        keys = (attention_backward_keys, block, values.qkv, grad_mixed, grad_qkv)
        if block.decay_rows:
            self._simple_gla(grad_mixed, grad_qkv, options)
        elif whole:
            add(f"attention_backward{ranged}", *keys, **options)
        else:
            options.update(lse=values.lse, delta=delta)
            mixed = None if has_gate else values.mixed
            queries = (attention_backward_queries, block, values.qkv, mixed, grad_mixed, grad_qkv)
            add(f"attention_backward_queries{kind}", *queries, **options)
            add(f"attention_backward_keys{kind}", *keys, **options)
        for number, normed in enumerate(values.heads):
            self._head_norm(grad_qkv, normed, keys=bool(number))
        if block.qk_bias:
            total = self.totals.split(self._place(f"{block.mixer_name}.qk_bias"))
            if total is not None:
                writer.add("column_sums", column_sums, grad_qkv, None, total, first=block.rows_ahead)
        self._product(packed, grad_qkv, values.h.values)
        return grad_qkv

    def _simple_gla(self, grad_mixed: Buffer, grad_qkv: Buffer, options: dict[str, Buffer | None]) -> None:
        """Gradients of the queries, keys and values of simple_gla, of the logits of its decays and of their bias."""
        writer, values, block, bias = self.writer, self.values, self.block, self.weights.decay_bias
        assert values.qkv is not None
        totals = add_totals(writer, block, self.weights, values.qkv)
        grad_totals = writer.scratch("grad_totals", totals.shape, torch.float32)
        inputs = (block, values.qkv, totals, grad_mixed, grad_totals, grad_qkv)
        wide = "_wide" if block.head_dim > 64 else ""
        writer.add_product(f"simple_gla_backward_queries{wide}", simple_gla_backward_queries, *inputs, **options)
        writer.add_product(f"simple_gla_backward_keys{wide}", simple_gla_backward_keys, *inputs, **options)
        writer.add("decays_backward", decays_backward, block, values.qkv, bias, grad_totals, grad_qkv)
        total = self.totals.split(self._place(f"{block.mixer_name}.decay_bias"))
        if total is not None:
            writer.add("column_sums", column_sums, grad_qkv, None, total, first=block.gate_rows)

    def _head_norm(self, grad_qkv: Buffer, normed: Rows, *, keys: bool) -> None:
        """Through the norm of all query heads, or of all key heads, in place."""
        writer, block, weight = self.writer, self.block, self.weights.qk_norm[keys]
        if weight is not None:
            heads = block.num_kv_heads if keys else block.num_heads
            place = self._place(f"{block.mixer_name}.{'k' if keys else 'q'}_norm.weight")
            total = self.totals.split(place, heads)
            if total is not None:
                rows = total.view(total.shape[0] // heads, heads * block.head_dim)
                first = block.rows_ahead + (block.num_heads * block.head_dim if keys else 0)
                writer.add("column_sums", column_sums, grad_qkv, normed.values, rows, first=first)
        arguments = (block, grad_qkv, normed.values, normed.rstd)
        writer.add("head_norm_backward", head_norm_backward, *arguments, keys=keys, weight=weight)

    def _mlp_t(
        self, grad_sum: Buffer, grad_gate_up: Buffer, below: BlockValues | None, need_input: bool, targets: Targets
    ) -> Buffer | None:
        writer, values, add = self.writer, self.values, self.writer.add_product
        batch, length, width = writer.setting.shape
        gate_up, down = self.weights.token
        assert values.behind1 is not None
        h, h1, rstd = values.h.values, values.h1.values, values.behind1.rstd
        grad_h1, grad_s1 = writer.state("grad_h1"), writer.state("grad_s1")
        first = self.weights.channel[0]
        add("projection_backward", projection_backward, grad_gate_up, first, grad_h1, residual=grad_sum)
        gradient = writer.state("grad_input") if need_input and below is not None else None
        totals = [self.totals.split(self._place(name)) for name in self.names[:2]]
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
        assert below.behind2 is not None
        below_sum = writer.state("grad_sum")
        writer.add(norm_kernel(writer), norm_backward, gradient, below.behind2, below_sum)
        return below_sum
