"""The int8 arithmetic of the CPU engine, bit for bit: how operands are quantised and how a product is summed.

An operand is symmetric, x ~ q * scale with q from -127 to 127, and has one scale for what a sum runs over: a weight for
each output channel, an activation for each token, or in the SwiGLU over the sequence for each channel of a sequence.
Scales of activations are found at run time, so no calibration is needed.  Sums are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["int8_linear", "quantize", "quantize_weight"]

LEAST = 2.0**-100  # smaller operands are all zeros
LARGEST = torch.finfo(torch.float32).max


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations along the last axis.

    ``127 / max|x|`` is cut to 16 bits of mantissa, so that its product with a bfloat16 is exact in float32.

    Args:
        x: [..., K], of at most 29 bits of mantissa; bfloat16 in the engine.

    Returns:
        q, int8 [..., K], and the scales, float32 [..., 1]: NaN where x holds a NaN or an infinity.
    """
    most = x.abs().amax(-1, keepdim=True).float()
    valid = (most >= LEAST) & (most <= LARGEST)
    # PyTorch computes 127 / most as 127 times the reciprocal, which is rounded twice.
    cut = ((torch.full_like(most, 127) / most).view(torch.int32) & ~0xFF).view(torch.float32)
    inverse = torch.where(valid, cut, 0)
    q = (x.double() * inverse.double()).round().nan_to_num(0)
    return q.to(torch.int8), torch.where(valid, 1 / cut, most - most)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight, float32 [N, K]: q, int8 [N, K], and the scales ``max|row| / 127``, float32 [N]."""
    weight = weight.float()
    most = weight.abs().amax(-1, keepdim=True)
    valid = (most >= LEAST) & (most <= LARGEST)
    scale = torch.where(valid, most / 127, most - most)
    q = torch.where(valid, (weight / scale).round(), 0)
    return q.to(torch.int8), scale.squeeze(-1)


def int8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` of x [..., K] and a weight [N, K], both quantised, in the dtype of x."""
    q, scale = quantize(x)
    q_weight, weight_scale = quantize_weight(weight)
    sums = q.double() @ q_weight.double().T  # integers below 2^53
    return (sums.float() * (scale * weight_scale)).to(x.dtype)
