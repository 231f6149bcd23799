"""A NaN or an infinity in one sequence stays there: the others keep their bits, and the policy holds for them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from budgets import budget_with_outputs, budget_with_pairs
from trmfast.backends import BACKENDS
from trmfast.budget import Recompute
from trmfast.cases import Case, Inputs, make_case, make_inputs
from trmfast.testing import Result, compare_results, require, run_eager, run_fused, run_truth

POISONED = 1  # of three sequences: one is computed before it, one after it in the same buffers
WHERE = ("x", "state", "gradient")


def odd(name: str, model: str = "trm", **options: object) -> Case:
    """Widths and a length that are no multiple of anything that is padded."""
    defaults = {"H_cycles": 1, "L_cycles": 2, "window": "all", "num_layers": 2, "batch": 3, "intermediate_size": 20}
    sizes = defaults | options
    return make_case(name, model, **sizes)  # type: ignore[arg-type]


CASES = [
    odd("mlp_t-17", "urm", length=33, hidden_size=17, token_mixer="mlp_t"),
    odd("mlp_t-41", length=7, hidden_size=41, token_mixer="mlp_t", num_layers=1),
    odd("attention-18", length=19, hidden_size=18, num_heads=3),
    odd("attention-40-causal", "hrm", length=35, hidden_size=40, num_heads=5, causal=True, num_layers=1),
    odd("conv-20", "urm", length=9, hidden_size=20, num_heads=2, channel_mixer="conv_swiglu", conv_kernel=3),
]


def poison(inputs: Inputs, where: str, value: float) -> Inputs:
    def put(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[POISONED, tensor.shape[1] // 2, 5] = value
        return tensor

    if where == "x":
        assert inputs.x is not None
        return replace(inputs, x=put(inputs.x))
    if where == "state":
        return replace(inputs, states=(put(inputs.states[0]), *inputs.states[1:]))
    return replace(inputs, grad_states=(put(inputs.grad_states[0]), *inputs.grad_states[1:]))


def others(result: Result) -> Result:
    """Without the poisoned sequence, and without the weights, which every sequence shares."""
    keep = [b for b in range(3) if b != POISONED]
    gradients = {name: t[keep] for name, t in result.gradients.items() if t.dim() == 3 and t.shape[0] == 3}
    return Result({name: t[keep] for name, t in result.outputs.items()}, gradients)


def check(
    inputs: Inputs, backend: str, value: float, places: tuple[str, ...] = WHERE, recompute: Recompute = True
) -> None:
    clean = others(run_fused(inputs, backend, recompute=recompute))
    # Without the poison, which PyTorch 2.13's bf16 products on AMX carry into other sequences.
    eager = others(run_eager(inputs))
    for where in places:
        poisoned = poison(inputs, where, value)
        got, truth = run_fused(poisoned, backend, recompute=recompute), run_truth(poisoned)
        for name, tensor in {**clean.outputs, **clean.gradients}.items():
            assert torch.equal({**others(got).outputs, **others(got).gradients}[name], tensor), (where, name)
        require(compare_results(others(got), eager, others(truth)))
        for name, tensor in truth.gradients.items():
            if not tensor.isfinite().all():
                assert not got.gradients[name].isfinite().all(), (where, name)


# Each case on every target, with one kind of number.
@pytest.mark.representative(when=lambda case, dtype: dtype == (torch.float32, torch.bfloat16)[CASES.index(case) % 2])
@pytest.mark.parametrize(
    "dtype, value", [(torch.float32, float("inf")), (torch.bfloat16, float("nan"))], ids=("f32-inf", "bf16-nan")
)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("one_thread", "target")
def test_cpu_engine(case: Case, dtype: torch.dtype, value: float) -> None:
    inputs = make_inputs(case, dtype, weight_scale=0.5)
    # Two sequences of the last update; outputs alone of a part of the window.
    for recompute in (budget_with_pairs(case, dtype, 2), budget_with_outputs(case, dtype, case.batch + 1), False):
        check(inputs, "cpu", value, recompute=recompute)


def small(name: str, **options: object) -> Case:
    """For Triton's interpreter."""
    return odd(name, "urm", num_layers=1, L_cycles=1, **options)


@pytest.mark.parametrize(
    "case",
    [
        small("mlp_t-17", length=9, hidden_size=17, token_mixer="mlp_t"),
        pytest.param(small("attention-18", length=19, hidden_size=18, num_heads=3), marks=pytest.mark.grid),
        pytest.param(small("conv-20", length=7, hidden_size=20, channel_mixer="conv_swiglu"), marks=pytest.mark.grid),
    ],
    ids=str,
)
@pytest.mark.usefixtures("one_thread")
def test_triton(case: Case) -> None:
    if BACKENDS["triton"].available() is not None:
        pytest.skip(f"backend triton: {BACKENDS['triton'].available()}")
    inputs = make_inputs(case, torch.float32, weight_scale=0.5)
    check(inputs, "triton", float("nan"), ("x",))
    check(inputs, "triton", float("inf"), ("gradient",))
