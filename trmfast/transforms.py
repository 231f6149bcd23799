"""Fallbacks of the operator: under torch.func's transforms and with dual numbers a recursion runs in plain PyTorch, and
tracers are refused."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from trmfast.problem import Problem
from trmfast.program import RecursionProgram
from trmfast.reference import run_program
from trmfast.spec import NetSpec

__all__ = ["inside_transform", "refuse_onnx", "refuse_tangents", "run_plainly"]

_NO_SUCH_OPERATOR = (
    "trmfast.recursion: got a call under torch.jit.trace or an ONNX exporter, accepted are torch.compile and "
    "torch.export; TorchScript and ONNX have no such operator"
)


def inside_transform() -> bool:
    """Whether a transform of torch.func or dual numbers are active, which no fused backend differentiates.

    Raises:
        RuntimeError: torch.jit.trace or an ONNX exporter records.
    """
    if torch._C._is_tracing():
        raise RuntimeError(_NO_SUCH_OPERATOR)
    if forward_ad._current_level >= 0:
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    return any(i.key() != TransformType.Functionalize for i in retrieve_all_functorch_interpreters())


def run_plainly(
    program: RecursionProgram,
    nets: Sequence[NetSpec],
    states: Sequence[Tensor],
    x: Tensor | None,
    weights: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    backend: str,
    segments: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The recursion operation by operation, at eager speed: every transform of PyTorch knows these operations.

    Raises:
        ValueError: the backend was named, and is not the reference.
    """
    if backend not in ("auto", "reference"):
        raise ValueError(
            f"backend: got {backend!r} inside a transform of torch.func or with dual numbers, accepted are auto and "
            "reference, which compute in plain PyTorch there"
        )
    if backend == "auto":
        warnings.warn(
            "trmfast.recursion computes in plain PyTorch inside transforms of torch.func and with dual numbers",
            stacklevel=3,
        )
    # The fused kernels of attention have neither tangents nor second derivatives.
    with sdpa_kernel(SDPBackend.MATH):
        return run_program(Problem(program, tuple(nets)), states, x, weights, cos, sin, segments=segments)


def refuse_tangents(tensors: Sequence[Tensor]) -> None:
    """Raises RuntimeError if one of the tensors is a dual number: the operator would lose its tangent."""
    if forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(
            "trmfast::recursion: got a dual number, accepted are plain tensors; trmfast.recursion takes dual numbers"
        )


def refuse_onnx() -> None:
    """Raises RuntimeError under the ONNX exporter that goes through torch.export; for fake kernels."""
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(_NO_SUCH_OPERATOR)
