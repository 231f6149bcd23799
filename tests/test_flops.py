"""Counted operations against the published figures, in GFLOP a sequence."""

from __future__ import annotations

import pytest

from trmfast.cases import PUBLISHED, make_case
from trmfast.flops import block_flops, forward_flops, window_flops


@pytest.mark.parametrize(
    "name, forward, training",
    [
        ("trm-sudoku-mlp", 25.6, 42.7),
        ("trm-sudoku-att", 28.6, 47.6),
        ("trm-arc-att", 238.8, 398.1),
        ("hrm-sudoku", 13.7, 36.7 - 13.7),  # its training runs the recursion twice
        ("hrm-arc", 187.3, 499.4 - 187.3),
    ],
)
def test_published(name: str, forward: float, training: float) -> None:
    case = next(case for case in PUBLISHED if case.name == name)
    counted = forward_flops(case.problem, 1, case.length)
    assert counted * 1e-9 == pytest.approx(forward, abs=0.06)
    assert (counted + 2 * window_flops(case.problem, 1, case.length)) * 1e-9 == pytest.approx(training, abs=0.11)
    assert forward_flops(case.problem, 3, case.length) == 3 * counted


def test_options() -> None:
    full = make_case("full", length=10).problem.nets[0].block
    causal = make_case("causal", length=10, causal=True).problem.nets[0].block
    grouped = make_case("grouped", length=10, num_heads=2, num_kv_heads=1).problem.nets[0].block
    conv = make_case("conv", length=10, channel_mixer="conv_swiglu").problem.nets[0].block
    # 45 of 100 pairs are masked: one product for the scores and one for the values, both of width 64.
    assert block_flops(full, 10) - block_flops(causal, 10) == 2 * 2 * 45 * 64
    # One head of keys and one of values less, each 64 -> 32.
    assert block_flops(full, 10) - block_flops(grouped, 10) == 2 * 10 * 64 * 2 * 32
    assert block_flops(conv, 10) - block_flops(full, 10) == 2 * 10 * full.intermediate_size * 2
