"""One block of every mixer, whole programs and the packing of weights, through the operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from trmfast.backends.cpu import release_memory
from trmfast.benchmark.rivals import Fused
from trmfast.cases import Case, find_case, make_inputs
from trmfast.flops import forward_flops, window_flops

BLOCKS = ("block-att-97", "block-att-916", "block-mlp-97", "block-conv-97")
PROGRAMS = ("trm-sudoku-att", "trm-sudoku-mlp", "trm-small-att", "hrm-sudoku")


def runner(case: Case, dtype: torch.dtype) -> Fused:
    return Fused(make_inputs(case, dtype, weight_scale=0.3), torch.get_num_threads())


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.benchmark(group="one block forward, one sequence a thread")
def test_block(name: str, threads: int, dtype: torch.dtype, measure: Callable[..., None]) -> None:
    case = replace(find_case(name), batch=threads)
    measure(runner(case, dtype).forward, forward_flops(case.problem, case.batch, case.length), dtype)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.benchmark(group="one block forward and backward, one sequence a thread")
def test_block_training(name: str, threads: int, dtype: torch.dtype, measure: Callable[..., None]) -> None:
    case = replace(find_case(name), batch=threads)
    flops = forward_flops(case.problem, case.batch, case.length) + 2 * window_flops(
        case.problem, case.batch, case.length
    )
    measure(runner(case, dtype).training, flops, dtype)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.benchmark(group="whole program forward, two sequences")
def test_program(name: str, dtype: torch.dtype, measure: Callable[..., None]) -> None:
    case = replace(find_case(name), batch=2)
    measure(runner(case, dtype).forward, forward_flops(case.problem, case.batch, case.length), dtype)


@pytest.mark.parametrize("name", ["block-att-97", "block-mlp-97"])
@pytest.mark.benchmark(group="a call with packed weights, and one that packs them; one token of work")
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "packs"])
def test_pack(name: str, packed: bool, dtype: torch.dtype, benchmark: Any) -> None:
    case = find_case(name)
    run = runner(replace(case, length=1) if case.problem.seq_len is None else case, dtype)
    run.forward()
    benchmark.extra_info["weights"] = sum(weight.numel() for weight in run.weights)
    benchmark.pedantic(run.forward, setup=None if packed else release_memory, rounds=20, warmup_rounds=2)
