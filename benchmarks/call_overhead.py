"""The overhead of a call: the first one after an update of the weights, and a very small one.

    python benchmarks/call_overhead.py                    # 10 seconds

The first table has TRM Sudoku with one sequence, in bfloat16: a call after all weights were changed in place (they are
repacked) and the calls after it.  The second has two updates of one layer with D = 64 and 4 tokens, which is nearly all
overhead: the operator's dispatch, its checks, the fingerprint of the weights, the tensors that it returns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

import trmfast
from trmfast.backends import cpu
from trmfast.benchmark.rivals import RIVALS, Trained
from trmfast.cases import find_case, make_case, make_inputs
from trmfast.cli.console import print_table


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def timed_forward(engine: Any, times: list[float]) -> Any:
    """The extension module, with a forward that records its time."""

    def forward(*arguments: Any) -> None:
        start = time.perf_counter()
        engine.forward(*arguments)
        times.append(time.perf_counter() - start)

    return SimpleNamespace(**{**vars(engine), "forward": forward})


def time_after_update(case: str, rounds: int) -> tuple[float, float]:
    """Median seconds of the first call after an update of the weights, and of later ones."""
    inputs = make_inputs(replace(find_case(case), batch=1), torch.bfloat16, weight_scale=0.3)
    runner = RIVALS["trmfast"](inputs, torch.get_num_threads())
    assert isinstance(runner, Trained)
    first, later = [], []
    for _ in range(rounds):
        for weight in runner.weights:
            weight.data.mul_(1.001)
        first.append(seconds(runner.forward))
        later += [seconds(runner.forward) for _ in range(2)]
    return statistics.median(first), statistics.median(later)


def time_small_call(mode: Callable[[], AbstractContextManager[object]], calls: int) -> tuple[float, float]:
    """Median seconds of a small call, and of the engine's part of it."""
    case = make_case("small", H_cycles=1, L_cycles=1, batch=1, length=4, hidden_size=64, num_heads=1, num_layers=1)
    inputs = make_inputs(case, torch.bfloat16)
    program, nets = case.problem.program, case.problem.nets

    def call() -> None:
        trmfast.recursion(program, nets, inputs.states, inputs.x, inputs.weights, inputs.cos, inputs.sin, backend="cpu")

    inside: list[float] = []
    with mode(), mock.patch.object(cpu, "_cpu", timed_forward(cpu._cpu, inside)):
        for _ in range(calls // 10):
            call()
        inside.clear()
        whole = [seconds(call) for _ in range(calls)]
    return statistics.median(whole), statistics.median(inside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25, metavar="N", help="updates of the weights (default: 25)")
    parser.add_argument("--calls", type=int, default=3000, metavar="N", help="small calls (default: 3000)")
    arguments = parser.parse_args()
    rows = []
    for case in ("trm-sudoku-att", "trm-sudoku-mlp"):
        first, later = time_after_update(case, arguments.rounds)
        rows.append([case, f"{first * 1e3:.2f}", f"{later * 1e3:.2f}", f"{(first - later) * 1e3:.2f}"])
    print_table("a call after an update of the weights", ("case", "first ms", "later ms", "more by ms"), rows)
    rows = []
    for name, mode in (("no_grad", torch.no_grad), ("inference_mode", torch.inference_mode)):
        whole, engine = time_small_call(mode, arguments.calls)
        rows.append([name, f"{whole * 1e6:.1f}", f"{engine * 1e6:.1f}", f"{(whole - engine) * 1e6:.1f}"])
    print_table("a small call", ("under", "us", "in the engine", "besides"), rows)


if __name__ == "__main__":
    main()
