"""The CPU engine at the edges of the number formats: norms of one element, saturated softmax, huge and tiny values."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

import pytest
import torch

from trmfast.backends import cpu as engine
from trmfast.cases import Case, Inputs, make_case, make_inputs
from trmfast.testing import Comparison, require, run_eager, run_fused, run_truth

DTYPES = [torch.float32, torch.bfloat16]


def small(name: str, **options: object) -> Case:
    sizes = {"H_cycles": 1, "L_cycles": 1, "num_layers": 1, "intermediate_size": 32, "window": "all"} | options
    return make_case(name, "urm", **sizes)  # type: ignore[arg-type]


def scaled(inputs: Inputs, factor: float) -> Inputs:
    x = None if inputs.x is None else inputs.x * factor
    return replace(inputs, states=tuple(state * factor for state in inputs.states), x=x)


def require_no_worse(case: Case, dtype: torch.dtype, factor: float = 1.0) -> None:
    """The policy's bound for the median of five draws, also where eager is so far off that the policy refuses to judge.

    Errors are relative to the largest element, which here differs by orders of magnitude from draw to draw.  Their mean
    would judge luck: where the two largest scores of a row are equal to bf16, saturated softmax takes either.
    """
    draws: dict[str, list[list[float]]] = {}
    for seed in range(5):
        inputs = scaled(make_inputs(case, dtype, seed, weight_scale=0.5), factor)
        fused, eager, truth = (
            {**result.outputs, **result.gradients}
            for result in (run_fused(inputs, "cpu"), run_eager(inputs), run_truth(inputs))
        )
        for name, tensor in truth.items():
            stored, scale = tensor.to(fused[name].dtype), tensor.abs().max()
            errors = [
                ((other.double() - tensor).abs().max() / scale).item() for other in (fused[name], eager[name], stored)
            ]
            draws.setdefault(name, []).append(errors)
    require([Comparison(name, *map(median, zip(*errors, strict=True))) for name, errors in draws.items()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        small("one-position", length=1, batch=3, hidden_size=32, token_mixer="mlp_t"),
        small("one-channel", length=9, hidden_size=1, num_heads=1, rope=False),
    ],
    ids=str,
)
@pytest.mark.usefixtures("one_thread", "target")
def test_norm_of_one_element(case: Case, dtype: torch.dtype) -> None:
    require_no_worse(case, dtype)


@pytest.mark.usefixtures("one_thread", "target")
def test_norms_of_one_small_element() -> None:
    """Its gradient is that of a multiplication by 1 / sqrt(eps), where PyTorch is exact but for one rounding a norm."""
    case = small("one-small-element", length=1, batch=3, hidden_size=1, token_mixer="mlp_t", rms_norm_eps=1e-6)
    require_no_worse(case, torch.float32, 1e-12)


@pytest.mark.usefixtures("one_thread", "target")
def test_saturated_softmax() -> None:
    require_no_worse(small("saturated", length=4, batch=1, hidden_size=32), torch.bfloat16, 1e4)


@pytest.mark.parametrize("mixer", ["attention", "mlp_t"])
@pytest.mark.parametrize("factor", [1e-20, 1e-38])
@pytest.mark.usefixtures("one_thread", "target")
def test_tiny_states(mixer: str, factor: float) -> None:
    """A state of 1e-38 is a denormal number, which targets with a product of bf16 take for 0."""
    if engine.target_for(torch.bfloat16) in ("amx", "amx_emulated", "avx512_bf16") and factor < 1e-37:
        pytest.skip("docs/cpu.md: products of bf16 in hardware take denormal numbers for 0")
    hidden_size = 17 if mixer == "mlp_t" else 18
    require_no_worse(
        small("tiny", length=13, hidden_size=hidden_size, token_mixer=mixer, num_heads=1), torch.bfloat16, factor
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("one_thread", "target")
def test_infinite_sum_of_squares(dtype: torch.dtype) -> None:
    """A norm of elements of 1e22 is 0, and so is its gradient, as in eager PyTorch; the channel mixer sees the 0."""
    case = small("huge", length=13, hidden_size=36, token_mixer="mlp_t")
    inputs = make_inputs(case, dtype)
    inputs = scaled(replace(inputs, weights=(inputs.weights[0] * 0, *inputs.weights[1:])), 1e22)
    fused, eager = run_fused(inputs, "cpu"), run_eager(inputs)
    for name, tensor in {**eager.outputs, **eager.gradients}.items():
        assert torch.equal({**fused.outputs, **fused.gradients}[name], tensor), name
