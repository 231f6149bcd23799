"""The Triton backend on a GPU: graphs, streams, torch.compile, the published sizes.  ``pytest -m gpu`` runs them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from test_triton_backend import DTYPES, small
from trmfast import recursion
from trmfast.backends import triton as backend
from trmfast.cases import PUBLISHED, Case, Inputs, make_inputs
from trmfast.problem import Problem
from trmfast.testing import compare_results, default_weight_scale, require, run_eager, run_fused, run_truth

pytestmark = pytest.mark.gpu


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every plan becomes a graph at its second call."""
    monkeypatch.setenv("TRMFAST_GRAPHS", "1")
    backend.release_memory()
    yield
    backend.release_memory()


def run_once(inputs: Inputs) -> list[Tensor]:
    found = run_fused(inputs, "triton")
    return [*found.outputs.values(), *found.gradients.values()]


@pytest.mark.usefixtures("graphs")
def test_graphs_give_the_same_bits_and_never_their_own_buffers() -> None:
    case = small("graph", num_layers=2, length=97)
    inputs = make_inputs(case, torch.bfloat16, device="cuda")
    eager = run_once(inputs)
    captured, replayed = run_once(inputs), run_once(inputs)
    kept = [t.clone() for t in captured]
    other = run_once(make_inputs(case, torch.bfloat16, seed=1, device="cuda"))
    for first, second, third, copy in zip(eager, captured, replayed, kept, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)
        assert torch.equal(second, copy), "a later call overwrote what an earlier one returned"
    addresses = [t.data_ptr() for results in (captured, replayed, other) for t in results if t.numel()]
    assert len(set(addresses)) == len(addresses)


@pytest.mark.usefixtures("graphs")
def test_carries_can_be_fed_back() -> None:
    case = small("carry", num_layers=1)
    problem = case.problem
    inputs = make_inputs(case, torch.float32, device="cuda", weight_scale=0.7)

    def steps(name: str) -> list[Tensor]:
        states, seen = inputs.states, []
        for _ in range(4):
            states = recursion(
                problem.program, problem.nets, states, inputs.x, inputs.weights, inputs.cos, inputs.sin, name
            )
            seen += [state.clone() for state in states]
        return seen

    for found, expected in zip(steps("triton"), steps("reference"), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@pytest.mark.usefixtures("graphs")
def test_streams_and_threads() -> None:
    case = small("streams", length=97)
    draws = [make_inputs(case, torch.bfloat16, seed, device="cuda") for seed in range(3)]
    expected = [run_once(inputs) for inputs in draws]
    torch.cuda.synchronize()
    failures: list[str] = []

    def work(index: int) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            for _ in range(5):
                for found, true in zip(run_once(draws[index]), expected[index], strict=True):
                    if not torch.equal(found, true):
                        failures.append(f"thread {index}")
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.usefixtures("graphs")
def test_inside_of_another_capture() -> None:
    case = small("capture")
    problem, inputs = case.problem, make_inputs(case, torch.bfloat16, device="cuda")

    def run() -> tuple[Tensor, ...]:
        return recursion(
            problem.program, problem.nets, inputs.states, inputs.x, inputs.weights, inputs.cos, inputs.sin, "triton"
        )

    expected = [state.clone() for state in run()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    graph.replay()
    for state, true in zip(found, expected, strict=True):
        assert torch.equal(state, true)


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("options", [{}, {"mode": "reduce-overhead"}], ids=["default", "reduce-overhead"])
def test_under_torch_compile(options: dict[str, str]) -> None:
    case = small("compile")
    problem, inputs = case.problem, make_inputs(case, torch.bfloat16, device="cuda")

    def run(*states: Tensor) -> tuple[Tensor, ...]:
        out = recursion(
            problem.program, problem.nets, [s * 1 for s in states], inputs.x, inputs.weights, inputs.cos, inputs.sin,
            "triton",
        )  # fmt: skip
        return tuple(state + 1 for state in out)

    for _ in range(3):  # eager first: what a graph keeps must not end up in the memory pool of the compiled function
        run(*inputs.states)
    compiled: Callable[..., tuple[Tensor, ...]] = torch.compile(run, fullgraph=True, **options)  # type: ignore[call-overload]
    for _ in range(4):
        for found, expected in zip(compiled(*inputs.states), run(*inputs.states), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PUBLISHED, ids=str)
def test_published_sizes(case: Case, dtype: torch.dtype) -> None:
    """The last two updates at weight scale 1; and bitwise the same twice: nothing depends on the order of programs."""
    program = case.problem.program
    last = program.last(2)
    case = replace(case, problem=Problem(last, case.problem.nets), batch=2)
    inputs = make_inputs(case, dtype, device="cuda", weight_scale=default_weight_scale(dtype))
    first, second = run_fused(inputs, "triton"), run_fused(inputs, "triton")
    for name, tensor in {**first.outputs, **first.gradients}.items():
        assert torch.equal(tensor, {**second.outputs, **second.gradients}[name]), name
    require(compare_results(first, run_eager(inputs), run_truth(inputs)))


@pytest.mark.usefixtures("graphs")
def test_a_second_device() -> None:
    """Three calls, of which the second captures and the third replays."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU: torch.cuda.device_count() is 1")
    case = small("second")
    for _ in range(3):
        here, there = (run_once(make_inputs(case, torch.bfloat16, device=f"cuda:{i}")) for i in (0, 1))
        for a, b in zip(here, there, strict=True):
            assert b.device == torch.device("cuda:1")
            assert torch.equal(a.cpu(), b.cpu())
