"""Formulas against kernels: how the tests of backward kernels compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor
from trmfast.kernels.plan import Launch

from triton_draw import Tensors, draw
from triton_guard import guarded_run
from trmfast.testing import compare, pool, require

EPS = 1e-5
# Kernels treat both halves alike: alone they are tried in float16 with -m grid, in whole programs without.
DTYPES = [torch.float32, pytest.param(torch.float16, marks=pytest.mark.grid), torch.bfloat16]
TRUTH = torch.float64
DRAWS = 3

# From tensors in some dtype to the results that are compared; in that dtype, float32 or float64.
Formula = Callable[[Tensors], Tensors]
# From tensors in the compute dtype to what the launches take and the launches.
Kernel = Callable[[Tensors], tuple[Tensors, Sequence[Launch]]]


def check(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, formula: Formula, kernel: Kernel) -> None:
    """Draws tensors of some shapes and requires that the kernel keeps to the tolerance policy."""
    draws = []
    for seed in range(DRAWS):
        drawn = draw(shapes, dtype, seed)
        truth, eager = (formula({k: t.to(d) for k, t in drawn.items()}) for d in (TRUTH, dtype))
        inputs, launches = kernel(drawn)
        found = guarded_run(launches, inputs)
        draws.append(
            [
                compare(name, found[name].cpu(), eager[name].to(found[name].dtype), value, is_gradient=True)
                for name, value in truth.items()
            ]
        )
    require(pool(draws))


def gradients(output: Tensor, gradient: Tensor, **of: Tensor) -> Tensors:
    """Gradients of ``(output * gradient).sum()`` with respect to tensors, by name."""
    return dict(zip(of, torch.autograd.grad(output, list(of.values()), gradient), strict=True))


def norm_factor(s: Tensor, axis: int) -> Tensor:
    return torch.rsqrt(s.float().square().mean(axis) + EPS)
