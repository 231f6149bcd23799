"""Tensors of equal values that lie differently in memory.  Gaps hold NaN, so that a read of one shows."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LAYOUTS", "lay_out"]

LAYOUTS = ("plain", "offset", "strided", "gap", "transposed", "expanded")


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another layout.

    Args:
        tensor: of any shape.
        layout: ``offset``: contiguous, three elements behind the start of its storage, hence not aligned to a vector;
            ``strided``: every second element of the last axis; ``gap``: rows of a wider matrix; ``transposed``: first
            and last axis change places in memory; ``expanded``: stride 0 over the first axis, for tensors that are the
            same along it; ``plain``: a contiguous copy.
    """
    shape, numel = tensor.shape, tensor.numel()
    if layout == "offset":
        out = _gaps(tensor, (numel + 3,))[3:].view(shape)
    elif layout == "strided":
        out = _gaps(tensor, (*shape[:-1], 2 * shape[-1]))[..., ::2]
    elif layout == "gap":
        out = _gaps(tensor, (*shape[:-1], shape[-1] + 5))[..., : shape[-1]]
    elif layout == "transposed":
        out = _gaps(tensor, tuple(tensor.transpose(0, -1).shape)).transpose(0, -1)
    elif layout == "expanded":
        return tensor[:1].clone().expand_as(tensor)
    else:
        return tensor.clone()
    return out.copy_(tensor)


def _gaps(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.full(shape, float("nan"), dtype=like.dtype)
