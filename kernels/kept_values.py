"""What forward keeps of the last updates of the gradient window, so that backward need not compute them again.

Both plans name the kept buffers alike: by the number of the update and their place in :func:`kept_buffers`.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from trmfast.kernels.plan import KEPT, Buffer
from trmfast.kernels.rows import Rows

from trmfast.spec import NetSpec

if TYPE_CHECKING:
    from trmfast.kernels.forward_plan import NetValues

__all__ = ["kept_buffers", "kept_names", "kept_rows", "with_names"]

T = TypeVar("T")


def kept_buffers(net: NetSpec, values: NetValues) -> list[Buffer]:
    """The buffers that the backward pass of a network reads, once each.

    Args:
        net: the network.
        values: of its forward pass, as :func:`values_for_backward` makes them.
    """
    found: list[Buffer | None] = []
    for rows in (*kept_rows(net, values), *(rows for block in values.blocks for rows in block.heads)):
        found += [rows.values, rows.rstd, rows.squares]
    for block in values.blocks:
        found += [block.qkv, block.mixed, block.lse]
        if net.block.channel_mixer == "conv_swiglu":
            found.append(block.activation)
    found.append(values.total)
    return list(dict.fromkeys(buffer for buffer in found if buffer is not None))


def kept_rows(net: NetSpec, values: NetValues) -> list[Rows]:
    """The rows [B, L, D] that the backward pass of a network reads, normed or not, once each."""
    found: list[Rows | None] = [values.output] if net.final_norm else []
    for block in values.blocks:
        found += [block.h, block.h1, block.behind1, block.behind2]
    return list({rows.values: rows for rows in found if rows is not None}.values())


def kept_names(net: NetSpec, values: NetValues, number: int) -> dict[str, Buffer]:
    """The buffers that stand in both plans for what an update keeps, by the names of those that one plan has made.

    Args:
        net, values: as in :func:`kept_buffers`.
        number: of the update among those that are kept.
    """
    buffers = kept_buffers(net, values)
    return {b.name: replace(b, name=f"{KEPT}{number}.{place}", offset=0) for place, b in enumerate(buffers)}


def with_names(value: T, names: dict[str, Buffer]) -> T:
    """Values with some of their buffers replaced, by name."""
    if isinstance(value, Buffer):
        return names.get(value.name, value)
    if isinstance(value, tuple):
        return tuple(with_names(item, names) for item in value)  # type: ignore[return-value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: with_names(getattr(value, f.name), names) for f in fields(value)})
    return value
