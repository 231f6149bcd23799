"""The operators compute gradients only where asked for, and once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from operator_cases import call, forward_sample, leaves, tiny
from trmfast import RecursionProgram
from trmfast.backends import BACKENDS, BackwardCall
from trmfast.cases import Inputs, make_case, make_inputs

pytestmark = pytest.mark.usefixtures("one_thread")


def count_products(run: Any) -> int:
    with profile(activities=[ProfilerActivity.CPU]) as record:
        run()
    return sum(event.count for event in record.key_averages() if event.key in ("aten::mm", "aten::bmm", "aten::addmm"))


def test_frozen_weights_do_no_work() -> None:
    """The reference backend's matrix products in backward: all, only those of x, only those of one weight."""
    case = tiny("trm", "all", length=5, hidden_size=16)
    inputs = make_inputs(case)
    assert inputs.x is not None

    def products(train_weights: bool, train_x: bool) -> int:
        weights = [w.clone().requires_grad_(train_weights) for w in inputs.weights]
        x = inputs.x.clone().requires_grad_(train_x)  # type: ignore[union-attr]
        loss = call(inputs, weights=weights, x=x)[0].sum()
        return count_products(loss.backward)

    everything, only_x, only_weights = products(True, True), products(False, True), products(True, False)
    assert only_x < everything
    assert only_weights < everything


@pytest.mark.parametrize("frozen", ["weights", "x", "states", "all but one weight"])
def test_needs_input_grad(frozen: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend is asked for exactly what requires a gradient, and the rest stays None."""
    case = make_case("asked", window="all", length=5, hidden_size=32, num_layers=1)
    inputs = make_inputs(case)
    assert inputs.x is not None
    needs = {
        "states": [frozen not in ("states", "all but one weight")] * 2,
        "x": [frozen not in ("x", "all but one weight")],
        "weights": [frozen != "weights"] * len(inputs.weights),
    }
    if frozen == "all but one weight":
        needs["weights"] = [i == 1 for i in range(len(inputs.weights))]
    asked: list[Any] = []
    chosen = BACKENDS[backend]
    genuine = chosen.backward

    def spy(call: BackwardCall) -> Any:
        asked.append((call.needs_states, call.needs_x, call.needs_weights))
        return genuine(call)

    monkeypatch.setattr(chosen, "backward", spy)
    groups = {"states": inputs.states, "x": [inputs.x], "weights": inputs.weights}
    tensors = {
        name: [t.clone().requires_grad_(need) for t, need in zip(group, needs[name], strict=True)]
        for name, group in groups.items()
    }
    expected = {name: leaves(group) for name, group in groups.items()}
    for run in (tensors, expected):
        out = call(inputs, backend, states=run["states"], x=run["x"][0], weights=run["weights"])
        (out[0] * inputs.grad_states[0]).sum().backward()
    assert [list(map(bool, flags)) if isinstance(flags, list) else flags for flags in asked[0]] == [
        needs["states"],
        needs["x"][0],
        needs["weights"],
    ]
    for name, group in tensors.items():
        for tensor, full, need in zip(group, expected[name], needs[name], strict=True):
            assert (tensor.grad is not None) == need
            if need:
                assert tensor.grad is not None
                assert full.grad is not None
                torch.testing.assert_close(tensor.grad, full.grad)


def test_one_network_of_two_frozen(backend: str) -> None:
    case = tiny("hrm", "all", hidden_size=32)
    inputs = make_inputs(case)
    part = case.problem.weight_slices[1]
    weights = [w.clone().requires_grad_(part.start <= i < part.stop) for i, w in enumerate(inputs.weights)]
    full = leaves(inputs.weights)
    for group in (weights, full):
        call(inputs, backend, weights=group)[0].sum().backward()
    for i, (weight, other) in enumerate(zip(weights, full, strict=True)):
        if part.start <= i < part.stop:
            assert weight.grad is not None
            assert other.grad is not None
            torch.testing.assert_close(weight.grad, other.grad)
        else:
            assert weight.grad is None


def test_outputs_without_a_path_require_no_gradient(backend: str) -> None:
    inputs = make_inputs(tiny("trm", hidden_size=32))
    assert not any(out.requires_grad for out in call(inputs, backend))
    # States that enter before the window do not reach the outputs.
    assert not any(
        out.requires_grad for out in call(inputs, backend, states=leaves(inputs.states), program=none(inputs))
    )
    with torch.no_grad():
        assert not any(out.requires_grad for out in call(inputs, backend, weights=leaves(inputs.weights)))


def none(inputs: Inputs) -> RecursionProgram:
    return inputs.problem.program.with_window("none")


def test_double_backward_is_refused(backend: str) -> None:
    inputs = make_inputs(tiny("trm", hidden_size=32))
    weights = leaves(inputs.weights)
    loss = call(inputs, backend, weights=weights)[0].square().sum()
    grads = torch.autograd.grad(loss, weights, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^trmfast::recursion: double backward is not supported"):
        grads[0].sum().backward()


def test_backward_without_saved_inputs_is_refused(backend: str) -> None:
    arguments = forward_sample(tiny("trm", hidden_size=32), backend, True, save=False)
    outputs, _, _ = torch.ops.trmfast.recursion.default(*arguments)
    with pytest.raises(RuntimeError, match="save=False"):
        outputs[0].sum().backward()
