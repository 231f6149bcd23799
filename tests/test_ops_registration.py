"""The operators as torch.library sees them, and what forward saves for backward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from operator_cases import call, forward_sample, leaves, tiny
from trmfast.autograd import LAYOUT
from trmfast.budget import EVERYTHING
from trmfast.cases import Case, Inputs, make_case, make_inputs
from trmfast.reference import run_program

pytestmark = pytest.mark.usefixtures("one_thread")

OPCHECK = [
    tiny("trm", hidden_size=32, length=5),
    tiny("hrm", "one_step", hidden_size=32, length=5),
    tiny("trm", "all", hidden_size=32, length=5, token_mixer="mlp_t"),
]


@pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("case", OPCHECK, ids=["trm", "hrm", "mlp_t"])
def test_opcheck_forward(case: Case, requires_grad: bool, backend: str) -> None:
    sample = forward_sample(case, backend, requires_grad, save=requires_grad)
    # The operator against itself: a matrix product may round differently where its operands are aligned differently.
    # PyTorch 2.6 takes no tolerances, its own are 1.3e-6 and 1e-5.
    accepted = inspect.signature(torch.library.opcheck).parameters
    tolerances: dict[str, Any] = {name: 1e-4 for name in ("rtol", "atol") if name in accepted}
    torch.library.opcheck(torch.ops.trmfast.recursion.default, sample, **tolerances)


@pytest.mark.representative(
    when=lambda case, requires_grad, budget: requires_grad or (case is OPCHECK[0] and not budget)
)
@pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("case", OPCHECK, ids=["trm", "hrm", "mlp_t"])
@pytest.mark.parametrize("budget", [0, 20_000, EVERYTHING], ids=["recompute", "part", "keep"])
def test_opcheck_backward(case: Case, requires_grad: bool, budget: int, backend: str) -> None:
    states, x, weights, *rest = forward_sample(case, backend, False, save=True, budget=budget)
    _, saved, kept = torch.ops.trmfast.recursion.default(states, x, weights, *rest)
    grads = [state.clone().requires_grad_(requires_grad) for state in states]
    for needs in (True, False):
        flags = ([needs] * len(states), True, [True] * (len(weights) - 1) + [needs])
        # With gradients required, the checks that differentiate would meet the refusal of double backward.
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(
            torch.ops.trmfast.recursion_backward.default,
            (grads, saved, kept, weights, *rest[:-2], *flags),
            test_utils=checks if requires_grad else (*checks, "test_aot_dispatch_dynamic"),
        )


@pytest.mark.parametrize("case", OPCHECK, ids=["trm", "hrm", "mlp_t"])
def test_opcheck_forward_that_keeps_activations(case: Case, backend: str) -> None:
    sample = forward_sample(case, backend, True, save=True, budget=20_000)
    # Without the checks that compare results: what is kept has gaps that nobody writes.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.trmfast.recursion.default, sample, test_utils=checks)


# ---------------------------------------------------------------- calls that record nothing


@contextmanager
def frozen(inputs: Inputs) -> Iterator[list[Tensor]]:
    yield list(inputs.weights)


@contextmanager
def without_grad(inputs: Inputs) -> Iterator[list[Tensor]]:
    with torch.no_grad():
        yield leaves(inputs.weights)


@contextmanager
def inference(inputs: Inputs) -> Iterator[list[Tensor]]:
    with torch.inference_mode():
        yield leaves(inputs.weights)


@pytest.mark.parametrize("mode", [frozen, without_grad, inference])
def test_a_call_that_records_nothing_passes_no_function_of_autograd(
    mode: Callable[[Inputs], AbstractContextManager[list[Tensor]]],
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = make_inputs(tiny("trm", "all", hidden_size=32))
    expected = run_program(inputs.problem, inputs.states, inputs.x, inputs.weights, inputs.cos, inputs.sin)
    passed: list[Any] = []
    monkeypatch.setattr("trmfast.autograd.refuse_tangents", passed.append)
    with mode(inputs) as weights:
        out = call(inputs, backend, weights=weights)
        assert not any(state.requires_grad for state in out)
        torch.testing.assert_close(out, expected)
    assert not passed
    call(inputs, backend, weights=leaves(inputs.weights))
    assert passed


@pytest.mark.parametrize("mode", [frozen, without_grad])
def test_tracers_and_modes_see_a_call_that_records_nothing(
    mode: Callable[[Inputs], AbstractContextManager[list[Tensor]]], backend: str
) -> None:
    inputs = make_inputs(tiny("trm", "all", hidden_size=32))
    assert inputs.x is not None
    expected = call(inputs, backend)
    with mode(inputs) as weights:

        def run(x: Tensor) -> tuple[Tensor, ...]:
            return call(inputs, backend, x=x, weights=weights)

        for before_autograd in (False, True):
            graph = make_fx(run, pre_dispatch=before_autograd)(inputs.x)
            assert [node.target for node in graph.graph.nodes].count(torch.ops.trmfast.recursion.default) == 1
            torch.testing.assert_close(graph(inputs.x), expected)
        torch.testing.assert_close(torch.func.functionalize(run)(inputs.x), expected)
        with FlopCounterMode(display=False) as counter:
            run(inputs.x)
        assert counter.get_total_flops() > 0
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            assert [type(state) for state in run(fake.from_tensor(inputs.x))] == [FakeTensor] * len(expected)


def test_a_traced_call_says_the_layout(backend: str) -> None:
    """What a compiler has on disk for another version of the operator is not found: the graph differs."""
    inputs = make_inputs(tiny("trm", "all", hidden_size=32))
    found: list[tuple[Any, ...]] = []

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        found.extend(n.args for n in graph.graph.nodes if n.target is torch.ops.trmfast.recursion.default)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(
        lambda weights: call(inputs, backend, weights=weights), backend=aot_autograd(fw_compiler=record), fullgraph=True
    )
    compiled(leaves(inputs.weights))
    ((*arguments, layout),) = found
    assert layout == LAYOUT > 0
    assert len(arguments) == 12
    *sample, _, _ = forward_sample(tiny("trm", "all", hidden_size=32), backend, False, save=True)
    with pytest.raises(ValueError, match=r"^layout: got 1, accepted is 2; the graph was made by another version of"):
        torch.ops.trmfast.recursion.default(*sample, True, 0, False, None, 1)


# ---------------------------------------------------------------- what is saved


def test_saved_is_the_window_and_nothing_more(backend: str) -> None:
    case = make_case("sudoku", H_cycles=3, L_cycles=6)
    *arguments, _, _ = forward_sample(case, backend, False, save=True)
    _, saved, kept = torch.ops.trmfast.recursion.default(*arguments, True, 0)
    assert kept.numel() == 0
    assert saved.shape == (7, case.batch, case.length, 64)
    assert torch.isfinite(saved).all()
    _, nothing, kept = torch.ops.trmfast.recursion.default(*arguments, False, EVERYTHING)
    assert nothing.shape == (0, case.batch, case.length, 64)
    assert kept.numel() == 0


def test_inputs_saved_for_backward(backend: str) -> None:
    """Bytes a token between forward and backward: 7 inputs of width 512 in bfloat16 for TRM Sudoku."""
    case = make_case("sudoku", H_cycles=3, L_cycles=6, length=16, hidden_size=512, num_heads=8)
    inputs = make_inputs(case, torch.bfloat16)
    weights = leaves(inputs.weights)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        call(inputs, backend, weights=weights, recompute=True)
    held = {id(t) for t in (*weights, inputs.cos, inputs.sin)}
    size = sum(
        t.numel() * t.element_size() for t in kept if id(t) not in held and t.shape[-1:] == (512,) and t.dim() == 4
    )
    assert size / (case.batch * case.length) == 7 * 512 * 2
