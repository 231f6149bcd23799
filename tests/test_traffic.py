"""Counting of eager PyTorch's bytes and of compiled PyTorch's kernels, on functions whose counts are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.offline.traffic import bytes_touched, compiled_kernels, count_traffic


def test_each_operand_and_each_result_once() -> None:
    a, b = torch.randn(2, 6, 8)
    traffic = count_traffic(lambda: a + b)
    assert (traffic.read, traffic.written, traffic.operations) == (2 * 6 * 8 * 4, 6 * 8 * 4, 1)
    assert count_traffic(lambda: a * a).read == 6 * 8 * 4
    product = count_traffic(lambda: F.linear(a, b))
    assert (product.read, product.written) == (2 * 6 * 8 * 4, 6 * 6 * 4)


def test_views_and_allocations_move_nothing() -> None:
    a = torch.randn(6, 8)
    traffic = count_traffic(lambda: a.view(48).view(8, 6).t()[1:].chunk(2))
    assert traffic.nbytes == traffic.operations == 0
    assert count_traffic(lambda: torch.ops.aten.empty_like(a)).operations == 0


def test_in_place_and_expanded() -> None:
    a, row = torch.randn(6, 8), torch.randn(8)
    added = count_traffic(lambda: a.add_(row))
    assert (added.read, added.written) == ((6 * 8 + 8) * 4, 6 * 8 * 4)
    copied = count_traffic(lambda: a.copy_(row))
    assert (copied.read, copied.written) == (8 * 4, 6 * 8 * 4)
    assert bytes_touched(row.expand(6, 8)) == 8 * 4


def test_backward_is_counted() -> None:
    a = torch.randn(6, 8, requires_grad=True)
    traffic = count_traffic(lambda: a.sin().sum().backward())
    assert set(traffic.by_operation) >= {"sin", "sum", "cos", "mul"}


def net(x: Tensor, weight: Tensor) -> Tensor:
    return F.silu(F.linear(x, weight)) * 2 + x


@pytest.mark.breadth
@pytest.mark.parametrize("depth", [1, 3])
def test_kernels_of_compiled_pytorch(depth: int) -> None:
    x, weight = torch.randn(4, 16), torch.randn(16, 16)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        for _ in range(depth):
            x = net(x, weight)
        return x

    def forward(compiled: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, weight), function(x, weight))

    def training(compiled: Callable[..., Tensor]) -> None:
        compiled(x, weight.requires_grad_()).sum().backward()

    found = compiled_kernels(forward, function)
    # A product and what follows it, fused into one kernel.
    assert (found.library, found.generated, found.launches) == (depth, depth, 2 * depth)
    trained = compiled_kernels(training, function)
    # Backward adds the weight's gradient for every application, and the input's for all but the first.
    assert trained.library == depth + depth + depth - 1
