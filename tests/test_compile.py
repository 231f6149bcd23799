"""The operator inside PyTorch's other machinery: compile, export, functional_call, autocast, inference mode, copies."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from trmfast import RecursionProgram, recursion
from trmfast.cases import Case, Inputs, make_case, make_inputs
from trmfast.nn import Net, Recursion

CASE = make_case("small", L_cycles=1, length=5, hidden_size=32, num_layers=1, intermediate_size=16)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def module(backend: str, case: Case = CASE) -> Recursion:
    torch.manual_seed(0)
    return Recursion(case.problem.program, [Net(spec) for spec in case.problem.nets], backend)


def arguments(inputs: Inputs) -> tuple[Any, ...]:
    assert inputs.cos is not None
    assert inputs.sin is not None
    return inputs.states, inputs.x, (inputs.cos, inputs.sin)


def close(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def grads(parameters: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The gradient of every parameter, all of which have one."""
    found = [p.grad for p in parameters]
    assert all(grad is not None for grad in found)
    return tuple(grad for grad in found if grad is not None)


# ---------------------------------------------------------------- compile and export


def step(net: Recursion, inputs: Inputs) -> tuple[Tensor, ...]:
    """Operations around the recursion, so that a graph has something on either side of it."""
    states, x, tables = arguments(inputs)
    outputs = net([state * 0.5 for state in states], x.sin(), tables)
    return tuple(out.cos() for out in outputs)


@pytest.mark.representative(when=lambda compiler: compiler == "aot_eager")
@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
def test_compile_fullgraph(compiler: str, backend: str) -> None:
    net, inputs = module(backend), make_inputs(CASE)
    found = []
    for run in (step, torch.compile(step, fullgraph=True, backend=compiler)):
        net.zero_grad()
        outputs = run(net, inputs)
        torch.stack(outputs).sum().backward()
        found.append((tuple(out.detach() for out in outputs), grads(net.parameters())))
    close(found[0][0], found[1][0])
    close(found[0][1], found[1][1])


def test_compiled_graph_holds_one_operator(backend: str) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    net, inputs = module(backend), make_inputs(CASE)
    with torch.no_grad():
        torch.compile(net, fullgraph=True, backend=record)(*arguments(inputs))
    (graph,) = graphs
    calls = [node.target for node in graph.graph.nodes if node.op == "call_function" and "trmfast" in str(node.target)]
    assert calls == [torch.ops.trmfast.recursion.default]


@pytest.mark.representative(when=lambda backend: backend == "cpu")
def test_compile_follows_the_program_and_the_batch(backend: str) -> None:
    net = module(backend)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for batch in (2, 3, 4):
        inputs = make_inputs(make_case("batch", batch=batch, length=5, hidden_size=32))
        for program in (None, RecursionProgram.trm(1, 2), RecursionProgram.trm(2, 1, "all")):
            close(compiled(*arguments(inputs), program), net(*arguments(inputs), program))


def test_errors_name_the_argument_under_compile(backend: str) -> None:
    inputs = make_inputs(CASE)
    states, _, tables = arguments(inputs)
    with pytest.raises(Exception, match="x: got None, accepted are tensors of shape"):
        torch.compile(module(backend), fullgraph=True, backend="aot_eager")(states, None, tables)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export(strict: bool, backend: str) -> None:
    net, inputs = module(backend), make_inputs(CASE)
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = ([{0: batch}, {0: batch}], {0: batch}, (None, None))
    states, x, tables = arguments(inputs)
    exported = torch.export.export(net, (list(states), x, tables), dynamic_shapes=shapes, strict=strict)
    targets = [node.target for node in exported.graph.nodes if "trmfast" in str(node.target)]
    assert targets == [torch.ops.trmfast.recursion.default]
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for size in (2, 5):
        other = make_inputs(make_case("other", batch=size, length=5, hidden_size=32))
        states, x, tables = arguments(other)
        close(loaded(list(states), x, tables), net(states, x, tables))


# ---------------------------------------------------------------- parameters from elsewhere


def test_functional_call(backend: str) -> None:
    net, inputs = module(backend), make_inputs(CASE)
    replaced = {name: (p.detach() * 0.5).requires_grad_() for name, p in net.named_parameters()}
    outputs = torch.func.functional_call(net, replaced, arguments(inputs))
    other = module(backend)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    expected = other(*arguments(inputs))
    close(outputs, expected)
    outputs[0].sum().backward()
    expected[0].sum().backward()
    close(grads(replaced.values()), grads(other.parameters()))
    assert all(p.grad is None for p in net.parameters())


def test_a_replaced_submodule_is_used(backend: str) -> None:
    net, inputs = module(backend), make_inputs(CASE)
    before = net(*arguments(inputs))
    other = Net(CASE.problem.nets[0])
    cast(Net, net.nets[0]).layers[0] = other.layers[0]
    after = net(*arguments(inputs))
    assert not torch.equal(before[0], after[0])
    close(after, Recursion(CASE.problem.program, [other], backend)(*arguments(inputs)))


# ---------------------------------------------------------------- modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, backend: str, need_support: Callable[[Case, torch.dtype], None]) -> None:
    need_support(CASE, dtype)
    net, inputs = module(backend), make_inputs(CASE)
    states, x, tables = arguments(inputs)
    with torch.autocast("cpu", dtype=dtype):
        outputs = net(states, x, tables)
        outputs[0].sum().backward()
    assert all(out.dtype == dtype for out in outputs)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())
    # The same numbers as inputs cast by hand: nothing inside runs in another dtype than it would without autocast.
    plain = net([state.to(dtype) for state in states], x.to(dtype), tables)
    assert all(torch.equal(a, b) for a, b in zip(outputs, plain, strict=True))


def test_autocast_leaves_float64_alone() -> None:
    net, inputs = module("reference"), make_inputs(CASE, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = net(*arguments(inputs))
    assert all(out.dtype == torch.float64 for out in outputs)
    close(outputs, net(*arguments(inputs)))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_modes_without_gradient(mode: Any, backend: str) -> None:
    net, inputs = module(backend), make_inputs(CASE)
    expected = net(*arguments(inputs))
    with mode():
        outputs = net(*arguments(inputs))
        again = net(outputs, *arguments(inputs)[1:])
    close(outputs, expected)
    assert not any(out.requires_grad for out in (*outputs, *again))


def test_anomaly_mode_and_saved_tensor_hooks(backend: str) -> None:
    net, inputs = module(backend), make_inputs(CASE)
    with torch.autograd.detect_anomaly(check_nan=True), torch.autograd.graph.save_on_cpu():
        net(*arguments(inputs))[0].sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


def test_checkpoint(backend: str) -> None:
    net, inputs = module(backend), make_inputs(CASE)
    states, x, tables = arguments(inputs)
    found = []
    for run in (net, lambda *a: torch.utils.checkpoint.checkpoint(net, *a, use_reentrant=False)):
        net.zero_grad()
        run(states, x, tables)[0].sum().backward()
        found.append(grads(net.parameters()))
    close(*found)


# ---------------------------------------------------------------- copies, processes, threads


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how: str, backend: str) -> None:
    net, inputs = module(backend), make_inputs(CASE)
    expected = net(*arguments(inputs))
    if how == "deepcopy":
        other = copy.deepcopy(net)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(net))
    else:
        buffer = io.BytesIO()
        torch.save(net, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    close(other(*arguments(inputs)), expected)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    close(net(*arguments(inputs)), expected)
    assert not torch.equal(other(*arguments(inputs))[0], expected[0])


def test_weights_that_change_in_place_are_seen(backend: str) -> None:
    """An optimizer step, a write through p.data, an EMA copy_, load_state_dict(assign=True): never a stale result."""
    net, inputs = module(backend), make_inputs(CASE)
    fresh = module("reference")

    def check() -> None:
        fresh.load_state_dict(net.state_dict())
        close(net(*arguments(inputs)), fresh(*arguments(inputs)))

    net(*arguments(inputs))[0].sum().backward()
    torch.optim.SGD(net.parameters(), lr=0.01).step()
    check()
    for p in net.parameters():
        p.data.mul_(0.9)
    check()
    average = {name: torch.randn_like(p) * 0.1 for name, p in net.named_parameters()}
    for name, p in net.named_parameters():
        p.data.copy_(average[name])
    check()
    net.load_state_dict({name: torch.randn_like(p) * 0.1 for name, p in net.named_parameters()}, assign=True)
    check()
    net.load_state_dict({name: torch.randn_like(p) * 0.1 for name, p in net.named_parameters()})
    check()


def test_several_threads_at_once(backend: str) -> None:
    net, inputs = module(backend), make_inputs(CASE)
    expected = net(*arguments(inputs))
    results: list[tuple[Tensor, ...]] = []

    def work() -> None:
        for _ in range(5):
            results.append(net(*arguments(inputs)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20
    for outputs in results:
        close(outputs, expected)


def test_recursion_is_what_the_module_calls(backend: str) -> None:
    net, inputs = module(backend), make_inputs(CASE)
    weights = [weight for n in net.nets for weight in cast(Net, n).weights()]
    program, nets = CASE.problem.program, CASE.problem.nets
    direct = recursion(program, nets, inputs.states, inputs.x, weights, inputs.cos, inputs.sin, backend)
    assert all(torch.equal(a, b) for a, b in zip(direct, net(*arguments(inputs)), strict=True))
