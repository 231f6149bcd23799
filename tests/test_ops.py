"""The operators: recompute structure under gradcheck, registration, gradients only where asked for, ownership."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from trmfast import Problem, RecursionProgram, recursion
from trmfast.backends import BACKENDS, BackwardCall
from trmfast.budget import EVERYTHING
from trmfast.cases import SMALL, Case, Inputs, make_case, make_inputs
from trmfast.reference import run_program

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOWS: list[Any] = ["one_step", "last_cycle", 2, "all"]
TINY: dict[str, Any] = {
    "batch": 2,
    "length": 3,
    "hidden_size": 4,
    "num_heads": 2,
    "num_layers": 1,
    "intermediate_size": 3,
}


def tiny(model: str, window: Any = "last_cycle", **options: Any) -> Case:
    return make_case(model, model, H_cycles=2, L_cycles=1, window=window, **{**TINY, **options})


GRADCHECK: dict[str, dict[str, Any]] = {
    "trm": {},
    "trm mlp_t": {"token_mixer": "mlp_t"},
    "hrm": {},
    "single_z": {},
    "hier6": {},
    "urm": {"channel_mixer": "conv_swiglu"},
    "trm grouped causal": {"num_kv_heads": 1, "causal": True},
}


def call(inputs: Inputs, backend: str = "reference", **changes: Any) -> tuple[Tensor, ...]:
    """recursion() on inputs, some arguments replaced."""
    arguments: dict[str, Any] = {
        "program": inputs.problem.program,
        "nets": inputs.problem.nets,
        "states": inputs.states,
        "x": inputs.x,
        "weights": inputs.weights,
        "cos": inputs.cos,
        "sin": inputs.sin,
        "backend": backend,
    }
    return recursion(**{**arguments, **changes})


def leaves(tensors: Any) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


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


# ---------------------------------------------------------------- registration


def forward_sample(case: Case, backend: str, requires_grad: bool, save: bool, budget: int = 0) -> tuple[Any, ...]:
    inputs = make_inputs(case)

    def take(tensors: Any) -> list[Tensor]:
        return [tensor.clone().requires_grad_(requires_grad) for tensor in tensors]

    assert inputs.x is not None
    program, nets = case.problem.program.key, [net.key for net in case.problem.nets]
    states, (x,), weights = take(inputs.states), take([inputs.x]), take(inputs.weights)
    return states, x, weights, inputs.cos, inputs.sin, program, nets, backend, save, budget


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


# ---------------------------------------------------------------- gradients only where asked for


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
