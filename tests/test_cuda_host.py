"""The host code of the CUDA backend on the stand-in for the CUDA runtime, with a stand-in for its extension too."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from trmfast.kernels.architectures import GPUS

from standin import HazardError, standin
from standin.engine import Engine
from standin.streams import Stream
from trmfast import backends, recursion
from trmfast.backends import BACKENDS, cuda
from trmfast.backends.triton import TritonBackend
from trmfast.cases import Case, Inputs, make_case, make_inputs
from trmfast.problem import Problem
from trmfast.spec import NetSpec

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the stand-in takes its place"),
]

CASE = make_case("hrm", "hrm", H_cycles=1, L_cycles=1, hidden_size=32, intermediate_size=48, length=9, batch=2)
CACHES = ("_limits", "_device", "_block", "_prepare", "_resident_blocks", "_words", "_failed", "is_slower")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    def clear() -> None:
        for name in CACHES:
            getattr(cuda, name).cache_clear()
        backends.select.cache_clear()

    with standin(devices=2) as runtime:
        found = Engine(runtime, CASE.problem)
        monkeypatch.setattr(cuda, "_cuda", found)
        monkeypatch.setattr(backends, "_told", set())
        clear()
        yield found
        clear()


def draw(seed: int = 0, device: str = "cuda:0") -> Inputs:
    return make_inputs(CASE, torch.bfloat16, seed, device=device)


def run(inputs: Inputs, backend: str = "cuda") -> tuple[Tensor, ...]:
    problem = inputs.problem
    return recursion(
        problem.program, problem.nets, inputs.states, inputs.x, inputs.weights, inputs.cos, inputs.sin, backend
    )


def check(found: Any, seed: int = 0) -> None:
    """The states are the reference's, in every bit: it computed them from what lay at the addresses."""
    for a, b in zip(found, run(draw(seed, "cpu"), "reference"), strict=True):
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("current", [0, 1])
def test_each_device(current: int, engine: Engine) -> None:
    with torch.cuda.device(current):
        for seed in range(2):
            for device in ("cuda:0", "cuda:1"):
                found = run(draw(seed, device))
                assert {str(state.device) for state in found} == {device}
                check(found, seed)
        assert torch.cuda.current_device() == current
    assert engine.launches == 4


def test_forward_and_backward(engine: Engine) -> None:
    inputs = draw()
    weights = [weight.requires_grad_() for weight in inputs.weights]
    found = run(inputs)
    check([state.detach() for state in found])
    torch.autograd.backward(found, inputs.grad_states)
    assert all(w.grad is not None and w.grad.shape == w.shape and w.grad.is_cuda for w in weights)
    assert engine.launches == 1


@pytest.mark.usefixtures("engine")
def test_streams() -> None:
    draws = [draw(seed) for seed in range(2)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in draws]
    found = []
    for _ in range(2):
        for seed, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found.append((run(draws[seed]), seed))
    torch.cuda.synchronize()
    for states, seed in found:
        check(states, seed)


@pytest.mark.usefixtures("engine")
def test_in_a_graph_of_the_caller() -> None:
    inputs = draw()
    run(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(inputs)
    for seed in (1, 0):
        for state, other in zip(inputs.states, draw(seed).states, strict=True):
            state.copy_(other)
        for weight, other in zip(inputs.weights, draw(seed).weights, strict=True):
            weight.copy_(other)
        x = draw(seed).x
        assert inputs.x is not None
        assert x is not None
        inputs.x.copy_(x)
        graph.replay()
        check(found, seed)


def test_what_a_call_keeps_lies_outside_of_the_pool_of_a_caller(engine: Engine) -> None:
    inputs, stream = draw(), Stream()
    torch.cuda.synchronize()
    with engine.runtime.private_pool(stream) as taken, torch.no_grad():
        found = run(inputs)
    stream.synchronize()
    assert set(taken) == {state.block for state in found}  # type: ignore[attr-defined]
    check(found)


@pytest.mark.usefixtures("engine")
def test_a_failure_is_reported_in_any_mode() -> None:
    """Also where the word for it was made in inference mode."""
    inputs = draw()
    with torch.inference_mode():
        run(inputs)
    for call in (lambda: run(inputs), lambda: _backward(inputs)):
        cuda._failed(0)[0] = 3
        with pytest.raises(RuntimeError, match="trmfast CUDA: 3 blocks waited more than 10 s"):
            call()
        check(run(inputs))


def _backward(inputs: Inputs) -> None:
    for weight in inputs.weights:
        weight.requires_grad_()
    cuda._failed(0)[0] = 0
    found = run(inputs)
    cuda._failed(0)[0] = 3
    try:
        torch.autograd.backward(found, inputs.grad_states)
    finally:
        for weight in inputs.weights:
            weight.requires_grad_(False)


# ---------------------------------------------------------------- choice and refusals


def supports(case: Case = CASE, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> str | None:
    return BACKENDS["cuda"].supports(case.problem, torch.device(device), dtype, case.batch, case.length)


def test_refusals(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert BACKENDS["cuda"].available() is None
    assert supports() is None
    assert supports(device="cuda:1") is None
    assert supports(dtype=torch.float32) == "it computes in bfloat16, float16, not in float32"
    with monkeypatch.context() as patch:
        patch.setitem(cuda.CHOICES, "causal", (True,))
        assert supports() == "it runs networks with causal True, not False"
    assert BACKENDS["cuda"].pair_bytes(CASE.problem, torch.bfloat16, CASE.length) == 0
    assert cuda.limits_of(GPUS["A100"]) == (8, 0, 163 << 10, 108)
    first, second = CASE.problem.nets
    wider = NetSpec(replace(second.block, intermediate_size=64), second.num_layers)
    other = replace(CASE, problem=Problem(CASE.problem.program, (first, wider)))
    assert supports(other) == "it takes networks whose blocks are equal, these differ"
    engine.runtime.multiprocessors = 7
    for name in CACHES:
        getattr(cuda, name).cache_clear()
    assert supports() == "it needs 8 blocks at the same time, the device runs 7"
    engine.runtime.multiprocessors = 132
    for name in CACHES:
        getattr(cuda, name).cache_clear()
    monkeypatch.setattr(TritonBackend, "supports", lambda *_: "it has a reason")
    assert supports() == "its backward pass needs the triton backend: it has a reason"
    engine.reason = "too large"
    cuda._prepare.cache_clear()
    assert supports() == "too large"
    engine.runtime.capability = (7, 5)
    assert supports() == "it needs compute capability 8.0 or newer, not 7.5"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert BACKENDS["cuda"].available() == "this PyTorch is built without CUDA"


def test_the_rule_of_auto(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the modelled times; without a launch it declines."""
    from trmfast.kernels import persistent

    from trmfast.backends.triton import forward_setting

    device = torch.device("cuda:0")
    setting = forward_setting(CASE.problem, device, torch.bfloat16, CASE.batch, CASE.length)
    times = cuda.modelled_times(CASE.problem, CASE.batch, CASE.length, setting, cuda._limits(0))
    assert times is not None
    for gain, name in ((times[1] / times[0] * 1.01, "triton"), (times[1] / times[0] * 0.99, "cuda")):
        monkeypatch.setattr(persistent, "GAIN", gain)
        cuda.is_slower.cache_clear()
        backends.select.cache_clear()
        chosen = backends.select("auto", CASE.problem, device, torch.bfloat16, CASE.batch, CASE.length)
        assert chosen.name == name
    engine.reason = "too large"
    cuda._prepare.cache_clear()
    cuda.is_slower.cache_clear()
    assert BACKENDS["cuda"].declines(CASE.problem, device, torch.bfloat16, CASE.batch, CASE.length)


# ---------------------------------------------------------------- planted faults

PLANTED: dict[str, tuple[str, str, str]] = {
    "counters that are not zero": ("torch.zeros(prepared.groups", "torch.ones(prepared.groups", "begin at zero"),
    "another device's stream": (
        "stream = torch.cuda.current_stream(device).cuda_stream",
        "stream = torch.cuda.default_stream(0).cuda_stream",
        "the engine launches on stream -1 of cuda:0, cuda:1 is current",
    ),
    "another current device": ("with torch.cuda.device(device):", "with torch.cuda.device(0):", "cuda:0 is current"),
    "a buffer that is too small": (
        "first.new_empty(prepared.exchange_elements)",
        "first.new_empty(3)",
        "beyond the end",
    ),
    "memory that is gone": (
        "exchange=exchange.data_ptr()",
        "exchange=exchange.clone().data_ptr()",
        "no block of device",
    ),
    "weights of half the width": (
        "weight.detach().to(torch.float32).contiguous()",
        "weight.detach().to(torch.bfloat16).contiguous()",
        "beyond the end",
    ),
    "pageable memory": ("pin_memory=True", "pin_memory=False", "not in pinned memory"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_caught(fault: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, message = PLANTED[fault]
    source = inspect.getsource(cuda)
    assert source.count(old) == 1
    module = ModuleType(f"{cuda.__name__}_planted")
    monkeypatch.setitem(__import__("sys").modules, module.__name__, module)
    exec(compile(source.replace(old, new), "planted", "exec"), module.__dict__)
    module._cuda = engine  # type: ignore[attr-defined]
    planted = module.CudaBackend()
    monkeypatch.setitem(BACKENDS, "cuda", planted)
    backends.select.cache_clear()
    with pytest.raises(HazardError, match=message):
        run(draw(device="cuda:1"))
    engine.runtime.faults.clear()
    backends.select.cache_clear()
