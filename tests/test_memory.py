"""Resident memory over thousands of calls of the CPU engine."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from trmfast.backends import BACKENDS

_reason = BACKENDS["cpu"].available()
pytestmark = [
    pytest.mark.skipif(_reason is not None, reason=f"backend cpu: {_reason}"),
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the measurement reads Linux's /proc/self/statm"),
]

WARM_UP = 1000
CALLS = 500  # in each part
PARTS = 4
# The heap settles in ever fewer steps of a page (and a few larger ones): a part may grow by one, not every part by two,
# as it would with a leak of ten bytes a call.
PAGE = resource.getpagesize()
MOST_SETTLING = 1 << 20

PROGRAM = """
import gc, json, resource, sys
import torch, trmfast
from trmfast.cases import make_case, make_inputs

def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

torch.set_num_threads(2)
case = make_case("tiny", batch=3, length=5, hidden_size=32, num_heads=2, intermediate_size=32, num_layers=1)
inputs = make_inputs(case)
problem = inputs.problem
train = sys.argv[1] == "train"
weights = [weight.requires_grad_(train) for weight in inputs.weights]

def call(i):
    if i % 4 == 0:
        with torch.no_grad():
            weights[0].mul_(1.001)  # packed again
    states = trmfast.recursion(
        problem.program, problem.nets, inputs.states, inputs.x, weights, inputs.cos, inputs.sin, backend="cpu"
    )
    if train:
        torch.autograd.grad(states, weights, inputs.grad_states)

warm_up, parts, calls = map(int, sys.argv[2:])
for i in range(warm_up):
    call(i)
seen = [resident()]
for part in range(parts):
    for i in range(calls):
        call(i)
    seen.append(resident())
print(json.dumps(seen))
"""


@pytest.mark.breadth
@pytest.mark.spread("mode")
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_resident_memory_does_not_grow(mode: str) -> None:
    command = [sys.executable, "-c", PROGRAM, mode, str(WARM_UP), str(PARTS), str(CALLS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    growth = [after - before for before, after in pairwise(seen)]
    steps = ", ".join(f"{step / 1024:+.0f}" for step in growth)
    print(f"{mode}: resident {seen[0] >> 10} KiB; every {CALLS} calls, in KiB: {steps}")
    assert min(growth) <= PAGE, f"every part grows: {growth}"
    assert sum(growth) <= MOST_SETTLING, f"{growth}"
