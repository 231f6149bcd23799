"""The operators: recompute structure under gradcheck, ownership of outputs, dtypes, programs that change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from operator_cases import call, leaves, tiny
from trmfast import Problem, RecursionProgram
from trmfast.cases import SMALL, Case, make_case, make_inputs
from trmfast.reference import run_program

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOWS: list[Any] = ["one_step", "last_cycle", 2, "all"]
GRADCHECK: dict[str, dict[str, Any]] = {
    "trm": {},
    "trm mlp_t": {"token_mixer": "mlp_t"},
    "hrm": {},
    "single_z": {},
    "hier6": {},
    "urm": {"channel_mixer": "conv_swiglu"},
    "trm grouped causal": {"num_kv_heads": 1, "causal": True},
}


@pytest.mark.representative(when=lambda name, window: window == "all" if name == "trm" else window == "last_cycle")
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", GRADCHECK)
def test_gradcheck(name: str, window: Any) -> None:
    case = tiny(name.split()[0], window, **GRADCHECK[name])
    inputs = make_inputs(case, torch.float64)
    count = len(inputs.states)
    assert inputs.x is not None
    # The derivative that the window defines is that of the program after the cut: differentiate only what comes later.
    first = case.problem.program.grad_updates[0]
    updates = case.problem.program.updates[first:]
    program = RecursionProgram(case.problem.program.states, case.problem.program.nets, updates, len(updates))

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        states, x, weights = tensors[:count], tensors[count], tensors[count + 1 :]
        return call(inputs, program=program, states=states, x=x, weights=weights)

    arguments = leaves([*inputs.states, inputs.x, *(weight.double() for weight in inputs.weights)])
    assert all(update.grad for update in program.updates)
    assert torch.autograd.gradcheck(run, arguments, fast_mode=False)


@pytest.mark.parametrize("window", [*WINDOWS, "none", "holes"])
@pytest.mark.parametrize("name", GRADCHECK)
def test_window_cuts_as_autograd_does(name: str, window: Any) -> None:
    """Values, gradients and which outputs require one, against the interpreter differentiated by autograd."""
    case = tiny(name.split()[0], "all" if window == "holes" else window, **GRADCHECK[name])
    if window == "holes":
        program = case.problem.program
        updates = tuple(replace(update, grad=i % 2 == 0) for i, update in enumerate(program.updates))
        program = RecursionProgram(program.states, program.nets, updates, program.updates_per_cycle)
        case = replace(case, problem=Problem(program, case.problem.nets))
    inputs = make_inputs(case, torch.float64)
    assert inputs.x is not None
    found = []
    for fused in (True, False):
        states, (x,) = leaves(inputs.states), leaves([inputs.x])
        weights = leaves(weight.double() for weight in inputs.weights)
        if fused:
            outputs = call(inputs, states=states, x=x, weights=weights)
        else:
            outputs = run_program(case.problem, states, x, weights, inputs.cos, inputs.sin)
        pairs = [(o, g) for o, g in zip(outputs, inputs.grad_states, strict=True) if o.requires_grad]
        grads: tuple[Tensor, ...] = ()
        if pairs:
            roots, gs = zip(*pairs, strict=True)
            grads = torch.autograd.grad(roots, [*states, x, *weights], gs, materialize_grads=True)
        found.append(([o.requires_grad for o in outputs], [o.detach() for o in outputs], grads))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1:], found[1][1:], rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------- what the outputs own


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_outputs_own_their_memory(case: Case, backend: str, need_support: Callable[[Case, torch.dtype], None]) -> None:
    need_support(case, torch.float32)
    inputs = make_inputs(case)
    before = [t.clone() for t in (*inputs.states, *inputs.weights)]
    outputs = call(inputs, backend)
    owned = [t.untyped_storage().data_ptr() for t in (*outputs, *inputs.states, *inputs.weights)]
    assert len(set(owned)) == len(owned)
    assert all(out.is_contiguous() for out in outputs)
    for tensor, value in zip((*inputs.states, *inputs.weights), before, strict=True):
        assert torch.equal(tensor, value)


def test_a_state_that_no_update_writes_is_copied(backend: str) -> None:
    case = tiny("hier6", hidden_size=32)
    inputs = make_inputs(case)
    states = leaves(inputs.states)
    outputs = call(inputs, backend, states=states)
    # L_cycles is 1: z_L2 to z_L6 pass through.
    for state, out in zip(states[2:], outputs[2:], strict=True):
        assert torch.equal(state, out)
        assert state.data_ptr() != out.data_ptr()
        (grad,) = torch.autograd.grad(out.sum(), [state], retain_graph=True)
        assert torch.equal(grad, torch.ones_like(grad))


def test_gradients_that_come_in_are_left_alone(backend: str) -> None:
    inputs = make_inputs(tiny("trm", hidden_size=32))
    weights = leaves(inputs.weights)
    grads = [torch.ones_like(state) for state in inputs.states]
    outputs = call(inputs, backend, weights=weights)
    first = torch.autograd.grad(outputs, weights, grads, retain_graph=True)
    assert all(torch.equal(g, torch.ones_like(g)) for g in grads)
    # And a second pass over the same graph gives the same.
    for a, b in zip(first, torch.autograd.grad(outputs, weights, grads), strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- dtypes


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gradients_have_the_dtype_of_the_weight(
    compute: torch.dtype, held: torch.dtype, backend: str, need_support: Callable[[Case, torch.dtype], None]
) -> None:
    case = tiny("trm", hidden_size=32)
    need_support(case, compute)
    inputs = make_inputs(case, compute)
    assert inputs.x is not None
    states, (x,) = leaves(inputs.states), leaves([inputs.x])
    weights = leaves(weight.to(held) for weight in inputs.weights)
    outputs = call(inputs, backend, states=states, x=x, weights=weights)
    assert all(out.dtype == compute for out in outputs)
    outputs[0].sum().backward()
    assert all(t.grad is not None and t.grad.dtype == t.dtype for t in (*states, x, *weights))


def test_weight_gradients_are_summed_in_float32(backend: str) -> None:
    """Many applications in bfloat16: a sum kept in bfloat16 would stop growing."""
    case = make_case("deep", "urm", H_cycles=1, L_cycles=200, hidden_size=32, length=4, num_layers=1)
    inputs = make_inputs(case, torch.bfloat16, weight_scale=0.5)
    shallow = RecursionProgram.urm(1, 1)
    assert inputs.x is not None
    # x is 0 and the state a fixed point of the norms, so that every application adds nearly the same gradient.
    weights = leaves(torch.zeros_like(w) if "down" in name or "o_proj" in name else w
                     for name, w in zip(case.problem.weight_names, inputs.weights, strict=True))  # fmt: skip
    x = torch.zeros_like(inputs.x)
    state = torch.nn.functional.rms_norm(inputs.states[0].float(), (32,)).bfloat16()
    grads = []
    for program in (case.problem.program, shallow):
        (out,) = call(inputs, backend, program=program, states=[state], x=x, weights=weights)
        grads.append(torch.autograd.grad((out * inputs.grad_states[0]).sum(), weights)[-1])
    ratio = (grads[0] * grads[1]).sum() / grads[1].square().sum()
    assert ratio > 100


# ---------------------------------------------------------------- the program is an argument


def test_program_changes_from_call_to_call(backend: str) -> None:
    case = tiny("trm", hidden_size=32)
    inputs = make_inputs(case)
    for H, L, window in ((1, 1, "all"), (2, 3, "last_cycle"), (3, 2, 2), (1, 4, "one_step"), (1, 1, "all")):
        program = RecursionProgram.trm(H, L, window)
        weights, others = leaves(inputs.weights), leaves(inputs.weights)
        fused = call(inputs, backend, program=program, weights=weights)
        problem = Problem(program, case.problem.nets)
        plain = run_program(problem, inputs.states, inputs.x, others, inputs.cos, inputs.sin)
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
        fused[0].sum().backward()
        plain[0].sum().backward()
        for a, b in zip(weights, others, strict=True):
            assert a.grad is not None
            assert b.grad is not None
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)


def test_a_very_deep_program() -> None:
    """A thousand cycles without gradient, as in test-time recursion."""
    case = tiny("trm", hidden_size=16, length=2)
    inputs = make_inputs(case)
    outputs = call(inputs, "auto", program=RecursionProgram.trm(1000, 2, "none"))
    assert all(torch.isfinite(out).all() for out in outputs)
