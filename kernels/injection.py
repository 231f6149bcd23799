"""How the sum of an update's sources enters a network where it has a weight there, and the way back.

    linear      projection            h = total @ weight^T + x         in narrow tiles, whose squares nothing reads
                projection_backward   grad h @ weight                  added to the gradients of the sources
                weight_gradient       (grad h)^T total
    diagonal    normed_sum            h = round(weight total) + x
                normed_sum            gradient of a source += weight grad h          one launch a source
                column_sums           sum over the rows of grad h total

The gradient of h comes from the last launch of the network, which adds it to that of x too.  An update without sources
takes x, as a network without such a weight does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from trmfast.kernels.norm_weights import column_sums
from trmfast.kernels.plan import Buffer, Launch, Tile
from trmfast.kernels.projection import projection
from trmfast.kernels.projection_backward import projection_backward
from trmfast.kernels.rows import Rows, normed_sum, squares_buffer
from trmfast.kernels.weight_gradient import weight_gradient

if TYPE_CHECKING:
    from trmfast.kernels.backward_plan import WeightTotals
    from trmfast.kernels.forward_plan import PlanWriter

__all__ = ["enter", "enter_backward", "gradient_buffer"]


def enter(writer: PlanWriter, net: int, total: Buffer, x: Buffer | None) -> Buffer:
    """Writes the launch that makes a network's input, [B, L, D].

    Args:
        writer: the plan.
        net: index of the network.
        total: the sum of the sources, [B, L, D].
        x: [B, L, D], or None where the update does not inject it.
    """
    h, weight = writer.state("entered"), writer.injection_weight(net)
    if writer.setting.problem.nets[net].injection == "diagonal":
        writer.add("normed_sum", normed_sum, [Rows(total, weight=weight), *([] if x is None else [x])], h)
        return h
    name = writer.scratch("squares", (1,), torch.float32).name

    def build(total: Buffer, weight: Buffer, x: Buffer | None, h: Buffer, *, tile: Tile, precision: str) -> Launch:
        squares = squares_buffer(name, h.shape, tile)
        return projection(total, weight, x, h, eps=0.0, squares=squares, tile=tile, precision=precision)

    writer.add_product("projection_columns", build, total, weight, x, h)
    return h


def gradient_buffer(writer: PlanWriter, net: int) -> Buffer:
    """A buffer for the gradient of a network's input, [B, L, D], as :func:`enter_backward` takes it."""
    diagonal = writer.setting.problem.nets[net].injection == "diagonal"
    return writer.scratch("grad_entered", writer.setting.shape, torch.float32 if diagonal else None)


def enter_backward(
    writer: PlanWriter,
    totals: WeightTotals,
    net: int,
    total: Buffer,
    gradient: Buffer,
    targets: Sequence[tuple[Buffer, bool]],
) -> None:
    """Writes the launches from the gradient of a network's input to those of the sources and of the weight.

    Args:
        writer, totals: the plan.
        net: index of the network.
        total: the sum of the sources, [B, L, D].
        gradient: that of :func:`gradient_buffer`.
        targets: float32 gradients of the sources, and whether to add to them (True) or to overwrite them.
    """
    place, weight = writer.setting.problem.weight_slices[net].stop - 1, writer.injection_weight(net)
    if writer.setting.problem.nets[net].injection == "diagonal":
        sums = totals.split(place)
        if sums is not None:
            writer.add("column_sums", column_sums, gradient, total, sums)
        for target, add in targets:
            terms = [*([target] if add else []), Rows(gradient, weight=weight)]
            writer.add("normed_sum", normed_sum, terms, target)
        return
    accumulator = totals.of(place)
    if accumulator is not None:
        writer.add_product("weight_gradient", weight_gradient, [(gradient, total, accumulator)])
    if targets:
        writer.add_product("projection_backward", projection_backward, gradient, weight, targets=targets)
