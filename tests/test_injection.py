"""How the state enters a network: edges, arguments and modules; the policy is in test_cpu_choices.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from trmfast import BlockSpec, NetSpec, Problem, RecursionProgram, recursion
from trmfast.cases import Case, Inputs, make_case, make_inputs
from trmfast.flops import backward_flops, forward_flops, window_flops
from trmfast.nn import Net, Recursion
from trmfast.program import Update
from trmfast.reference import inject, run_net
from trmfast.testing import run_eager, run_fused

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ["diagonal", "linear"]


def x_of(inputs: Inputs) -> Tensor:
    assert inputs.x is not None
    return inputs.x


def with_program(injections: Sequence[str], updates: Sequence[Update], states: int, **sizes: Any) -> Inputs:
    block = (
        make_case("block", length=7, hidden_size=48, num_heads=3, intermediate_size=40, **sizes).problem.nets[0].block
    )
    names = tuple(f"z{i}" for i in range(states)), tuple(f"f{i}" for i in range(len(injections)))
    program = RecursionProgram(*names, tuple(updates), len(updates))
    problem = Problem(program, tuple(NetSpec(block, 1, injection=injection) for injection in injections))
    return make_inputs(Case("case", problem, 2, 7), weight_scale=0.5)


def mixed_inputs() -> Inputs:
    """Three networks that differ in nothing else; one source twice, an update without x, one without sources."""
    updates = (
        Update(0, (0, 1), True, 0, True),
        Update(1, (0, 0, 1), True, 1, True),
        Update(0, (1,), False, 2, True),
        Update(2, (), True, 2, True),
        Update(1, (0, 2), False, 1, True),
        Update(2, (), True, 1, False),
        Update(0, (2, 1, 0), True, 2, True),
    )
    return with_program(["add", "diagonal", "linear"], updates, 3)


def check_mixed(backend: str) -> None:
    inputs = mixed_inputs()
    eager = run_eager(inputs)
    for recompute in (True, False):
        found = run_fused(inputs, backend, recompute=recompute)
        for name, tensor in {**found.outputs, **found.gradients}.items():
            expected = {**eager.outputs, **eager.gradients}[name]
            torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-4, msg=f"{name}: {tensor - expected}")


def test_networks_with_injections_of_their_own(backend: str) -> None:
    check_mixed(backend)


@pytest.mark.parametrize("injection", KINDS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_without_sources_the_weight_is_not_read(backend: str, injection: str) -> None:
    """Not even a NaN of it: h is x, and the weight's gradient is zero."""
    inputs = with_program([injection], [Update(0, (), True, 0, True)], 1)
    plain = with_program(["add"], [Update(0, (), True, 0, True)], 1)
    results = []
    for given in (inputs, plain):
        weights = [*plain.weights, *([torch.full_like(inputs.weights[-1], float("nan"))] if given is inputs else [])]
        leaves = [x_of(plain).clone().requires_grad_(), *(w.clone().requires_grad_() for w in weights)]
        program, nets = given.problem.program, given.problem.nets
        out = recursion(program, nets, plain.states, leaves[0], leaves[1:], plain.cos, plain.sin, backend)
        results.append([*out, *torch.autograd.grad(out, leaves, plain.grad_states)])
    *found, of_weight = results[0]
    assert not of_weight.any()
    assert all(torch.equal(a, b) for a, b in zip(found, results[1], strict=True))


@pytest.mark.parametrize("injection", KINDS)
def test_infinite_gradients_of_an_update_without_sources(injection: str) -> None:
    """0 times infinity is no part of a weight's gradient."""
    updates = [Update(0, (), True, 0, True), Update(1, (1,), True, 0, True)]
    inputs = with_program([injection], updates, 2)
    grads = torch.full_like(inputs.grad_states[0], float("inf")), inputs.grad_states[1]
    alone = with_program([injection], updates[1:], 2)
    weight = inputs.weights[-1].clone().requires_grad_()
    found: list[Tensor] = []
    for problem, given in ((inputs.problem, grads), (alone.problem, (torch.zeros_like(grads[0]), grads[1]))):
        weights = [*inputs.weights[:-1], weight]
        out = recursion(problem.program, problem.nets, inputs.states, inputs.x, weights, inputs.cos, inputs.sin, "cpu")
        roots = [(o, g) for o, g in zip(out, given, strict=True) if o.requires_grad]
        found += torch.autograd.grad([o for o, _ in roots], weight, [g for _, g in roots])
    assert found[0].isfinite().all()
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("injection", KINDS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradients_that_are_wanted_alone(backend: str, injection: str) -> None:
    inputs = make_inputs(make_case("alone", "urm", H_cycles=3, L_cycles=1, window=2, num_layers=1, injection=injection))
    everything = run_fused(inputs, backend).gradients
    names = [*inputs.problem.weight_names]
    for wanted in (names[-1], names[0], "x"):
        leaves = {name: w.clone() for name, w in zip(names, inputs.weights, strict=True)} | {"x": x_of(inputs).clone()}
        leaf = leaves[wanted].requires_grad_()
        weights = [leaves[name] for name in names]
        program, nets = inputs.problem.program, inputs.problem.nets
        out = recursion(program, nets, inputs.states, leaves["x"], weights, inputs.cos, inputs.sin, backend)
        assert torch.equal(torch.autograd.grad(out, leaf, inputs.grad_states)[0], everything[f"grad {wanted}"])


# ---------------------------------------------------------------- arguments


def test_bad_arguments() -> None:
    block = BlockSpec(16, 8, num_heads=2)
    values: tuple[Any, ...] = ("concat", None, True)
    for value in values:
        message = rf"^injection: got {value!r}, accepted are add or diagonal or linear$"
        with pytest.raises(ValueError, match=message):
            NetSpec(block, 1, injection=value)
    inputs = make_inputs(make_case("linear", injection="linear", num_layers=1, H_cycles=1, L_cycles=1))
    problem, states = inputs.problem, inputs.states
    name = r"weights\[4\] \(f\.injection\.weight\)"
    with pytest.raises(ValueError, match=rf"^{name}\.shape: got \[64\], accepted is \[64, 64\]$"):
        recursion(problem.program, problem.nets, states, inputs.x, [*inputs.weights[:-1], torch.ones(64)])
    with pytest.raises(ValueError, match=r"^weights: got 4 tensors, accepted are 5$"):
        recursion(problem.program, problem.nets, states, inputs.x, inputs.weights[:-1])
    with pytest.raises(ValueError, match=r"cpu.*injection add, not linear$"):
        recursion(problem.program, problem.nets, states, inputs.x, inputs.weights, backend="cpu", dtype="int8")


def test_backward_without_x_is_refused() -> None:
    inputs = make_inputs(make_case("linear", injection="linear", num_layers=1, H_cycles=1, L_cycles=1))
    problem = inputs.problem
    keys = problem.program.key, [net.key for net in problem.nets]
    given = inputs.x, list(inputs.weights), inputs.cos, inputs.sin, *keys, "reference", True, 0
    _, saved, kept = torch.ops.trmfast.recursion(list(inputs.states), *given)
    needs = [True] * 2, True, [True] * 5
    arguments = list(inputs.grad_states), saved, kept, list(inputs.weights), inputs.cos, inputs.sin, *keys, "reference"
    with pytest.raises(ValueError, match=r"^x: got None, accepted is that of the forward pass, from which backward"):
        torch.ops.trmfast.recursion_backward(*arguments, *needs)
    assert len(torch.ops.trmfast.recursion_backward(*arguments, *needs, None, inputs.x)) == 8


@pytest.mark.parametrize("injection", KINDS)
def test_x_written_between_forward_and_backward(injection: str) -> None:
    """It is read again, so autograd must notice; a network that only adds it does not read it."""
    for kind in (injection, "add"):
        inputs = make_inputs(make_case("written", "urm", H_cycles=1, L_cycles=1, num_layers=1, injection=kind))
        weights = [w.clone().requires_grad_() for w in inputs.weights]
        problem = inputs.problem
        out = recursion(problem.program, problem.nets, inputs.states, inputs.x, weights, inputs.cos, inputs.sin)
        x_of(inputs).add_(1)
        if kind == "add":
            torch.autograd.grad(out, weights, inputs.grad_states)
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(out, weights, inputs.grad_states)


def test_keys() -> None:
    block = BlockSpec(64, 32, num_heads=4)
    start = '[{"hidden_size":64,"intermediate_size":32,"num_heads":4,"num_kv_heads":4,"head_dim":16},2'
    for final, injection, rest in (
        (False, "add", "]"),
        (True, "add", ",true]"),
        (False, "linear", ',false,"linear"]'),
        (True, "diagonal", ',true,"diagonal"]'),
    ):
        spec = NetSpec(block, 2, final, injection)
        assert spec.key == start + rest
        assert NetSpec.from_key(spec.key) == spec


def test_flops() -> None:
    B, L, D = 3, 10, 64
    counts = {}
    for injection in ("add", *KINDS):
        case = make_case("flops", "urm", H_cycles=5, L_cycles=1, window=2, injection=injection, length=L)
        problem, trained = case.problem, [True] * case.problem.num_weights
        backward = backward_flops(problem, B, L, trained), backward_flops(problem, B, L, [False] * len(trained))
        counts[injection] = forward_flops(problem, B, L), window_flops(problem, B, L), *backward
    assert counts["diagonal"] == counts["add"]
    product = 2 * B * L * D * D
    more = [a - b for a, b in zip(counts["linear"], counts["add"], strict=True)]
    assert more == [5 * product, 2 * product, 4 * product, 2 * product]


# ---------------------------------------------------------------- modules


@pytest.mark.parametrize("injection", KINDS)
def test_a_network_begins_as_one_that_adds(injection: str) -> None:
    torch.manual_seed(0)
    spec = NetSpec(BlockSpec(32, 48, num_heads=2, norm_weight=True), 1, final_norm=True, injection=injection)
    net, plain = Net(spec), Net(NetSpec(spec.block, 1, final_norm=True))
    assert list(net.state_dict())[-2:] == ["norm.weight", "injection.weight"]
    plain.load_state_dict({name: value for name, value in net.state_dict().items() if name != "injection.weight"})
    z, x = torch.randn(2, 2, 5, 32)
    program = RecursionProgram.urm(2, 1)
    torch.testing.assert_close(Recursion(program, [net])([z], x), Recursion(program, [plain])([z], x))


def test_a_replaced_or_hooked_injection_is_noticed() -> None:
    net = Net(NetSpec(BlockSpec(16, 8, num_heads=2), 1, injection="diagonal"))
    module = Recursion(RecursionProgram.urm(1, 1), [net], "reference")
    h = torch.randn(1, 4, 16)
    module([h], h)
    handle = net.injection.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"^nets\.0\.injection: has forward hooks, accepted are none"):
        module([h], h)
    handle.remove()
    module([h], h)
    net.add_module("injection", torch.nn.Identity())
    with pytest.raises(RuntimeError, match=r"^nets\.0\.injection: got Identity, accepted is Injection"):
        module([h], h)


@pytest.mark.parametrize("injection", KINDS)
def test_beside_a_module_of_another_kind(injection: str) -> None:
    """Then the program runs update by update, through the module of the injection."""
    torch.manual_seed(0)
    net = Net(NetSpec(BlockSpec(16, 8, num_heads=2), 1, injection=injection))
    torch.nn.init.normal_(net.injection.weight)
    other = torch.nn.Linear(16, 16)
    states, x = torch.randn(2, 2, 4, 16), torch.randn(2, 4, 16)
    found = Recursion(RecursionProgram.hrm(1, 1, "all"), [net, other])(states, x)
    low = other(states[1] + (states[0] + x))
    h = inject(net.spec, states[0] + low, None, net.injection.weight)
    torch.testing.assert_close(found, (run_net(net.spec, h, net.weights(), None, None), low))


@pytest.mark.parametrize("injection", KINDS)
def test_compiled_training(injection: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = Net(NetSpec(BlockSpec(32, 48, num_heads=2), 1, injection=injection))
    module = Recursion(RecursionProgram.urm(3, 1, window=2), [net])
    z, x = torch.randn(2, 2, 5, 32)
    found = []
    for run in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        net.zero_grad()
        given = x.clone().requires_grad_()
        (out,) = run([z], given.sin())
        out.square().sum().backward()
        found.append([out.detach(), given.grad, *(p.grad for p in net.parameters())])
    torch.testing.assert_close(*found)
