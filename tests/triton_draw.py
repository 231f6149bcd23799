"""Random tensors for kernels, and the buffers that stand for them in launches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from trmfast.kernels.plan import Buffer

__all__ = ["Tensors", "buffer", "buffers", "draw"]

Tensors = dict[str, Tensor]


def draw(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, seed: int = 0) -> Tensors:
    """Tensors of standard deviation 1, or 1 / sqrt(last axis) where the name ends in ``weight``."""
    generator = torch.Generator().manual_seed(seed)
    scale = {name: shape[-1] ** -0.5 if name.endswith("weight") else 1.0 for name, shape in shapes.items()}
    return {name: (torch.randn(shape, generator=generator) * scale[name]).to(dtype) for name, shape in shapes.items()}


def buffer(name: str, tensor: Tensor) -> Buffer:
    return Buffer(name, tuple(tensor.shape), tensor.dtype)


def buffers(tensors: Tensors) -> dict[str, Buffer]:
    return {name: buffer(name, tensor) for name, tensor in tensors.items()}
