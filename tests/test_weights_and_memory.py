"""Weights written between forward and backward, and too little memory: errors of the CPU engine in one line."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import trmfast
from trmfast.backends import BACKENDS, cpu
from trmfast.cases import make_case, make_inputs

_reason = BACKENDS["cpu"].available()
pytestmark = pytest.mark.skipif(_reason is not None, reason=f"backend cpu: {_reason}")


@pytest.mark.parametrize("recompute", [True, False])
def test_weights_written_after_forward(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("small", batch=2, length=5)
    inputs, program, nets = make_inputs(case), case.problem.program, case.problem.nets
    weights = [weight.requires_grad_() for weight in inputs.weights]

    def forward() -> tuple[torch.Tensor, ...]:
        return trmfast.recursion(
            program, nets, inputs.states, inputs.x, weights, inputs.cos, inputs.sin, backend="cpu", recompute=recompute
        )

    first, second = forward(), forward()  # two graphs alive
    expected = torch.autograd.grad(first, weights, inputs.grad_states, retain_graph=True)
    before = weights[1].detach().clone()
    weights[1].data.view(-1)[7] += 1e-3
    third = forward()
    for stale in (first, second):
        with pytest.raises(RuntimeError, match=rf"^weights: those of {program.nets[0]} were changed after[^\n]*$"):
            torch.autograd.grad(stale, weights, inputs.grad_states, retain_graph=True)
    torch.autograd.grad(third, weights, inputs.grad_states)
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "CHECK_WEIGHTS", False)
        torch.autograd.grad(first, weights, inputs.grad_states, retain_graph=True)
    weights[1].data.copy_(before)
    for gradient, right in zip(torch.autograd.grad(first, weights, inputs.grad_states), expected, strict=True):
        assert torch.equal(gradient, right)


TOO_LITTLE = """
import resource, sys
import torch, trmfast
from trmfast.cases import make_case, make_inputs

torch.set_num_threads(1)
case = make_case("wide", "urm", H_cycles=1, L_cycles=4, window="all", batch=64, length=128, num_layers=1)
inputs = make_inputs(case)
weights = [weight.requires_grad_() for weight in inputs.weights]
call = lambda states, x, recompute: trmfast.recursion(
    case.problem.program, case.problem.nets, states, x, weights, inputs.cos, inputs.sin, backend="cpu",
    recompute=recompute,
)
call([z[:1] for z in inputs.states], inputs.x[:1], True)
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (int(sys.argv[1]) << 20),) * 2)
try:
    call(inputs.states, inputs.x, sys.argv[2] == "recompute")
except MemoryError as error:
    print(error)
"""


@pytest.mark.representative(when=lambda how: how == "keep")
@pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory is Linux's")
@pytest.mark.parametrize(
    "limit, how, expected",
    [
        (40, "keep", "bytes of activations kept for backward"),
        (1, "recompute", "bytes of saved inputs, states or gradients"),
    ],
)
def test_out_of_memory(limit: int, how: str, expected: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TOO_LITTLE, str(limit), how], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("out of memory: ")
    assert expected in line
    assert "64 sequences of 128 tokens" in line
    assert line.endswith("needs less")
    assert ("recompute=True" in line) == (how == "keep")
