"""The rival of the benchmarks computes what the reference computes, and shares its state_dict with the fused models."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from trmfast.benchmark.configs import CONFIGS
from trmfast.benchmark.eager import EagerInner, EagerRecursion
from trmfast.benchmark.errors import check_model
from trmfast.cases import SMALL, Case, make_case, make_inputs
from trmfast.models import ACTLossHead, ACTModel
from trmfast.testing import run_truth

PRE_NORM = make_case("pre", norm_placement="pre", gate="channel", final_norm=True, causal=True, num_layers=1)
TINY: dict[str, Any] = {"hidden_size": 64, "num_heads": 2, "puzzle_emb_ndim": 64, "H_cycles": 2, "L_cycles": 2}


def models(name: str, dtype: str, batch: int = 2) -> tuple[ACTModel, ACTModel]:
    options = {**TINY, "forward_dtype": dtype, "backend": "reference"}
    torch.manual_seed(0)
    fused = CONFIGS[name].model(batch, True, options)
    eager = CONFIGS[name].model(batch, False, options)
    assert list(eager.state_dict()) == list(fused.state_dict())
    eager.load_state_dict(fused.state_dict())
    fused.load_state_dict(eager.state_dict())
    return fused, eager


@pytest.mark.parametrize("name", ["sudoku", "sudoku-mlp", "hrm-sudoku"])
def test_same_step_and_gradients(name: str) -> None:
    fused, eager = models(name, "float64")
    batch = CONFIGS[name].inputs(2)
    losses = []
    for model in (fused, eager):
        torch.manual_seed(1)
        head = ACTLossHead(model, "stablemax_cross_entropy").train()
        carry, loss, _, outputs, _ = head(["logits"], carry=head.initial_carry(batch), batch=batch)
        carry, loss, _, outputs, _ = head(["logits"], carry=carry, batch=batch)
        loss.backward()
        losses.append((loss, outputs["logits"]))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=1e-9)
    for (key, a), (_, b) in zip(fused.named_parameters(), eager.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), key
        if a.grad is not None and b.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-7, msg=key)


@pytest.mark.parametrize("case", [*SMALL, PRE_NORM], ids=str)
def test_recursion_is_the_reference(case: Case) -> None:
    inputs = make_inputs(case, torch.float64, weight_scale=0.5)
    truth = run_truth(inputs)
    tables = None if inputs.cos is None or inputs.sin is None else (inputs.cos, inputs.sin)
    model = EagerRecursion(case.problem, inputs.weights, tables)
    assert [name for name, _ in model.named_parameters()] == list(case.problem.weight_names)
    model.double()
    out = model(inputs.states, inputs.x)
    pairs = [(z, g) for z, g in zip(out, inputs.grad_states, strict=True) if z.requires_grad]
    torch.autograd.backward([z for z, _ in pairs], [g for _, g in pairs])
    for z, t in zip(out, truth.outputs.values(), strict=True):
        torch.testing.assert_close(z, t, rtol=1e-9, atol=1e-9)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, truth.gradients[f"grad {name}"], rtol=1e-6, atol=1e-8)


def test_unknown_compilation() -> None:
    _, eager = models("sudoku", "float32")
    with pytest.raises(ValueError, match=r"^scope: got 'all', accepted are"):
        cast(EagerInner, eager.inner).stacks.compile("all")
    inputs = make_inputs(SMALL[0])
    with pytest.raises(ValueError, match=r"^scope: got 'all', accepted are"):
        EagerRecursion(SMALL[0].problem, inputs.weights, None).stacks.compile("all")


@pytest.mark.breadth
def test_compiled_by_a_debug_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network as a function of its weights: same results, one graph with and one without gradient, no more."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend="aot_eager", **options))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    fused, eager = models("hrm-sudoku", "bfloat16")
    _, compiled = models("hrm-sudoku", "bfloat16")
    batch = CONFIGS["hrm-sudoku"].inputs(2)
    cast(EagerInner, compiled.inner).stacks.compile("network")
    head = ACTLossHead(compiled, "stablemax_cross_entropy").train()
    head([], carry=head.initial_carry(batch), batch=batch)[1].backward()
    with torch.no_grad():
        compiled.eval()(head.initial_carry(batch), batch)
    for found in check_model({"eager": eager, "compile": compiled, "trmfast": fused}, batch).values():
        assert found["eager"] == found["trmfast"]  # the reference backend runs the same operations
        assert found["compile"].verdict == "pass"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch.compiler.reset()


def test_accuracy_notices_a_wrong_weight() -> None:
    fused, eager = models("sudoku", "bfloat16")
    batch = CONFIGS["sudoku"].inputs(2)
    for found in check_model({"eager": eager, "trmfast": fused}, batch, (1, 2)).values():
        assert found["trmfast"].verdict == "pass"
    with torch.no_grad():
        next(iter(eager.inner.L_level.parameters())).add_(0.05)
    for found in check_model({"eager": eager, "trmfast": fused}, batch, (1, 2)).values():
        assert found["eager"].verdict.startswith(("no verdict", "fail"))
