"""What the CUDA engine hands over: forward in its emulator, backward in Triton's interpreter, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from simt_recursion import ATTENTION, FEW, MIXER, build, run_emulated
from trmfast.backends import BackwardCall, Kept, cuda
from trmfast.backends.triton import interprets
from trmfast.cases import Inputs, make_case, make_inputs
from trmfast.testing import Result, compare_results, require, run_eager, run_truth

pytestmark = [
    pytest.mark.breadth,
    pytest.mark.skipif(not interprets(), reason="Triton does not interpret in this process"),
]

HAND_OVER = {"attention": ATTENTION, "mlp_t": MIXER}


@pytest.fixture(scope="module")
def emulator() -> Any:
    return build(FEW)


@pytest.mark.parametrize("token_mixer", HAND_OVER)
def test_triton_goes_backward_from_what_cuda_saved(token_mixer: str, emulator: Any) -> None:
    """Forward in the emulator, backward in Triton's interpreter, against the reference."""
    case = make_case("trm", batch=1, length=12, num_layers=1, intermediate_size=64, token_mixer=token_mixer)
    inputs = make_inputs(case, torch.bfloat16, weight_scale=0.5)
    run = run_emulated(emulator, inputs, HAND_OVER[token_mixer])
    assert run.report["failed"] == 0
    require(compare_results(_hand_over(inputs, run.states, run.saved), run_eager(inputs), run_truth(inputs)))


def _hand_over(inputs: Inputs, states: Any, saved: torch.Tensor) -> Result:
    problem = inputs.problem
    count, weights = len(problem.program.states), len(inputs.weights)
    tables = [None if table is None else table[: saved.shape[2]].contiguous() for table in (inputs.cos, inputs.sin)]
    call = BackwardCall(
        problem,
        grad_states=[g.contiguous() for g in inputs.grad_states],
        saved=saved,
        kept=saved.new_empty(0, dtype=torch.uint8),
        keep=Kept(),
        weights=inputs.weights,
        cos=tables[0],
        sin=tables[1],
        needs_states=[True] * count,
        needs_x=True,
        needs_weights=[True] * weights,
    )
    gs, gx, gw = cuda.CudaBackend().backward(call)
    names = problem.program.states

    def filled(gradient: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(like) if gradient is None else gradient.to(like.dtype)

    gradients = {f"grad {name}": filled(g, s) for name, g, s in zip(names, gs, inputs.states, strict=True)}
    assert inputs.x is not None
    gradients["grad x"] = filled(gx, inputs.x)
    gradients |= {
        f"grad {name}": filled(g, w) for name, g, w in zip(problem.weight_names, gw, inputs.weights, strict=True)
    }
    return Result(dict(zip(names, states, strict=True)), gradients)
