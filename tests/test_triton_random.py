"""Random combinations of all options of a block in the Triton kernels, as the CPU engine's tests draw them."""

from __future__ import annotations

from random import Random

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton_guard
from test_cpu_choices import comparable, random_case, require_most
from test_triton_choices import check_races, check_small_tiles
from triton_bounds import checked_run
from triton_guard import INTERPRETED

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="the interpreter shows addresses and races"),
    pytest.mark.usefixtures("one_thread"),
]


def check_random(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy through the operator; in small tiles no access outside of a buffer, and no two programs that meet.

    Of two draws alone more are outside of the policy by chance than of five; the median of nine decides then.
    """
    case = random_case(Random(seed))
    for dtype in (torch.float32, torch.bfloat16):
        require_most(case, dtype, comparable(case, dtype, 2), "triton", others=9)
    check_races(case, torch.bfloat16)
    monkeypatch.setattr(triton_guard, "run", checked_run)
    check_small_tiles(case)


@pytest.mark.representative(when=lambda seed: seed < 2)
@pytest.mark.parametrize("seed", range(8))
def test_random_combinations(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_random(seed, monkeypatch)


@pytest.mark.grid
@pytest.mark.parametrize("seed", range(8, 300))
def test_three_hundred_random_combinations(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_random(seed, monkeypatch)
