"""The host code of the Triton backend, capture and replay included, on the stand-in for the CUDA runtime.

Kernels are replaced by a formula (standin/kernels.py): results are compared with those of launches without a graph.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from standin import Runtime, standin
from standin.streams import Stream
from trmfast import recursion
from trmfast.backends import graphs
from trmfast.backends import triton as backend
from trmfast.cases import Case, Inputs, make_case, make_inputs
from trmfast.testing import run_fused

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the stand-in takes its place"),
]

SMALL: dict[str, Any] = {"H_cycles": 1, "L_cycles": 1, "num_layers": 1, "hidden_size": 32, "intermediate_size": 48}
CASE = make_case("trm", length=9, batch=2, **SMALL)
# Its weights over the sequence are padded, so that copies into a graph's buffers are not all alike.
MIXER = make_case("mlp_t", token_mixer="mlp_t", length=9, batch=2, **SMALL)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    """Two devices; every plan becomes a graph at its second call."""
    monkeypatch.setenv("TRMFAST_GRAPHS", "1")
    with standin(devices=2) as runtime:
        yield runtime


def draw(seed: int = 0, device: str = "cuda:0", case: Case = CASE, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    return make_inputs(case, dtype, seed, device=device)


def forward(inputs: Inputs) -> tuple[Tensor, ...]:
    problem = inputs.problem
    return recursion(
        problem.program, problem.nets, inputs.states, inputs.x, inputs.weights, inputs.cos, inputs.sin, "triton"
    )


def both(inputs: Inputs) -> list[Tensor]:
    """States and gradients."""
    found = run_fused(inputs, "triton")
    return [*found.outputs.values(), *found.gradients.values()]


def check(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.cpu(), b.cpu())


def without_graphs(call: Callable[[Inputs], Any], inputs: Inputs) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRMFAST_GRAPHS", "0")
        backend.release_memory()
        found = [tensor.clone() for tensor in call(inputs)]
        backend.release_memory()
    return found


# ---------------------------------------------------------------- replays


@pytest.mark.parametrize("case", [CASE, MIXER], ids=str)
def test_replays_give_what_launches_give_and_never_their_own_buffers(case: Case, cuda: Runtime) -> None:
    draws = [draw(seed, case=case) for seed in range(2)]
    expected = [without_graphs(both, inputs) for inputs in draws]
    assert cuda.captures == 0
    kept = []
    for turn in (0, 1, 0, 1):
        found = both(draws[turn])
        check(found, expected[turn])
        kept.append((turn, found))
    assert (cuda.captures, cuda.replays) == (2, 6)
    for turn, found in kept:
        check(found, expected[turn])


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_a_graph_serves_inside_and_outside_of_inference_mode(first: Any, cuda: Runtime) -> None:
    inputs = draw()
    expected = without_graphs(forward, inputs)
    for mode in (first, first, torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            check(forward(inputs), expected)
    assert (cuda.captures, cuda.replays) == (1, 4)


@pytest.mark.breadth
def test_a_second_device(cuda: Runtime) -> None:
    """Three calls on each, the third a replay; the current device is another one half of the time."""
    for current in (0, 1):
        with torch.cuda.device(current):
            for _ in range(3):
                here, there = (both(draw(device=f"cuda:{i}")) for i in (0, 1))
                assert {t.device.index for t in there if t.numel()} == {1}
                check(here, there)
                assert torch.cuda.current_device() == current
    assert cuda.captures == 4


def test_what_a_call_keeps_lies_outside_of_the_pool_of_a_caller(cuda: Runtime) -> None:
    """Inductor warms reduce-overhead up in a pool that may hold outputs alone afterwards."""
    inputs, stream = draw(), Stream()
    torch.cuda.synchronize()
    expected = forward(inputs)
    for _ in range(2):
        with cuda.private_pool(stream) as taken, torch.no_grad():
            found = forward(inputs)
        stream.synchronize()
        outputs = {state.block for state in found}  # type: ignore[attr-defined]
        assert set(taken) == outputs
        check(found, expected)
    assert cuda.captures == 1


def test_inside_of_another_capture(cuda: Runtime) -> None:
    inputs = draw()
    expected = [state.clone() for state in forward(inputs)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = forward(inputs)
    graph.replay()
    check(found, expected)
    assert cuda.captures == 1


@pytest.mark.usefixtures("cuda")
def test_misaligned_tensors_first() -> None:
    """Kernels for aligned addresses are compiled before the capture, not in it."""
    misaligned_first()


def misaligned_first() -> None:
    inputs = draw()
    odd = torch.zeros(inputs.states[0].numel() + 1, dtype=torch.bfloat16, device="cuda:0")[1:]
    odd = odd.view(inputs.states[0].shape)
    odd.copy_(inputs.states[0])
    assert odd.data_ptr() % 16
    moved = Inputs(**{**vars(inputs), "states": [odd, *inputs.states[1:]]})
    found = [forward(moved) for _ in range(3)]
    for results in found:
        check(results, forward(inputs))


def test_copies_are_few(cuda: Runtime) -> None:
    for case, one_by_one in ((CASE, 0), (MIXER, 1)):
        inputs = draw(case=case)
        for _ in range(2):
            forward(inputs)
        cuda.counts.clear()
        forward(inputs)
        assert cuda.counts["_foreach_copy_"] <= 4  # in: bfloat16, float32 to it, tables; and out
        assert cuda.counts["copy_"] == one_by_one


# ---------------------------------------------------------------- memory


def test_without_memory_for_a_graph_calls_go_on_without(cuda: Runtime) -> None:
    inputs = draw()
    expected = without_graphs(forward, inputs)
    forward(inputs)
    cuda.capacity = cuda.memory.used[0] + _peak(cuda, lambda: without_graphs(forward, inputs))
    backend.release_memory()
    for _ in range(3):
        check(forward(inputs), expected)
    assert cuda.captures == 0
    cuda.capacity = 1 << 60
    check(forward(inputs), expected)
    assert cuda.captures == 0, "there is no second try"
    backend.release_memory()
    for _ in range(2):
        check(forward(inputs), expected)
    assert cuda.captures == 1


def _peak(cuda: Runtime, call: Callable[[], object]) -> int:
    before = cuda.memory.peak = cuda.memory.used[0]
    call()
    return cuda.memory.peak - before


def test_no_memory_during_a_capture(cuda: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of the failed capture raises another error, as CUDA does."""
    inputs = draw()
    expected = without_graphs(forward, inputs)
    cuda.fail_captures = True
    for _ in range(3):
        check(forward(inputs), expected)
    cuda.fail_captures = False
    backend.release_memory()
    forward(inputs)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", lambda *_, **__: _raise(RuntimeError("another")))
    with pytest.raises(RuntimeError, match="another"):
        forward(inputs)


def _raise(error: Exception) -> None:
    raise error


def test_no_memory_for_the_results_of_a_replay(cuda: Runtime) -> None:
    inputs = draw()
    expected = without_graphs(forward, inputs)
    for _ in range(2):
        forward(inputs)
    cuda.capacity = cuda.memory.used[0]
    with pytest.raises(torch.OutOfMemoryError):
        forward(inputs)
    cuda.capacity = 1 << 60
    torch.cuda.synchronize(1)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        check(forward(inputs), expected)


def test_graphs_share_their_scratch(cuda: Runtime) -> None:
    for case in (CASE, MIXER):
        for device in ("cuda:0", "cuda:1"):
            for _ in range(2):
                forward(draw(case=case, device=device))
    found: list[tuple[int, Any]] = [(device.index, entry) for (_, device), entry in backend._graphs._entries.items()]
    pools = {(index, entry.graph.pool()) for index, entry in found}
    assert len(found) == 4
    assert len(pools) == 2
    for _, entry in found:
        assert not any(name.startswith("scratch") for name in entry.tensors)
    assert cuda.captures == 4


def test_old_graphs_are_dropped(cuda: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_PLANS", 1)
    a, b = draw(), draw(case=MIXER)
    for inputs in (a, a, b, b, a, a):
        forward(inputs)
    assert cuda.captures == 3
    assert len(backend._graphs._entries) == 1


@pytest.mark.usefixtures("cuda")
def test_a_graph_that_another_thread_drops_before_its_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw()
    expected = without_graphs(forward, inputs)
    for _ in range(2):
        forward(inputs)
    get = backend._graphs.get

    def get_and_drop(*arguments: Any) -> Any:
        found = get(*arguments)
        backend.release_memory()
        return found

    monkeypatch.setattr(backend._graphs, "get", get_and_drop)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        check(forward(inputs), expected)


# ---------------------------------------------------------------- streams and threads


def on_many_streams() -> None:
    """Two problems on three streams, one call after the other."""
    draws = [draw(seed) for seed in range(2)] + [draw(case=MIXER)]
    expected = [without_graphs(forward, inputs) for inputs in draws]
    torch.cuda.synchronize()
    kept = []
    streams = [torch.cuda.Stream() for _ in draws]
    for _ in range(3):
        for stream, inputs, true in zip(streams, draws, expected, strict=True):
            with torch.cuda.stream(stream):
                kept.append((forward(inputs), true))
    torch.cuda.synchronize()
    for found, true in kept:
        check(found, true)
    backend.release_memory()


@pytest.mark.usefixtures("cuda")
def test_streams() -> None:
    on_many_streams()


@pytest.mark.usefixtures("cuda")
def test_threads() -> None:
    draws = [draw(seed) for seed in range(3)]
    expected = [without_graphs(forward, inputs) for inputs in draws]
    torch.cuda.synchronize()
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
                for _ in range(4):
                    found = forward(draws[index])
                    torch.cuda.current_stream().synchronize()
                    check(found, expected[index])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def dropped_while_it_runs() -> None:
    inputs = draw()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            forward(inputs)
        backend.release_memory()


@pytest.mark.usefixtures("cuda")
def test_memory_is_freed_after_the_last_replay() -> None:
    dropped_while_it_runs()


ALLOCATED = "tensors = {**allocate(plan, device, skip=self.tensors), **self.tensors}\n"
CAPTURE = "            with torch.cuda.graph("
PLANTED: dict[str, tuple[Callable[[], None], list[tuple[str, str]]]] = {
    "a replay does not wait for the last": (
        on_many_streams,
        [("torch.cuda.current_stream().wait_event(self.shared.done)", "pass")],
    ),
    "a replay leaves no event": (on_many_streams, [("self.shared.done.record()", "pass")]),
    "results are the graph's own buffers": (
        on_many_streams,
        [("torch.empty_like(source) for b, source", "source for b, source")],
    ),
    "buffers are freed under a replay": (
        dropped_while_it_runs,
        [("            self.shared.done.synchronize()\n", "")],
    ),
    "kernels are compiled in the capture": (
        misaligned_first,
        [("            run(plan, {**allocate(", "            dict({**allocate(")],
    ),
    "scratch is freed before the replay": (
        on_many_streams,
        [(f"    {ALLOCATED}", "    pass\n"), (CAPTURE, f"            {ALLOCATED}{CAPTURE}")],
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario, changes = PLANTED[fault]
    source = inspect.getsource(graphs)
    for old, new in changes:
        assert source.count(old) == 1
        source = source.replace(old, new)
    module = ModuleType("planted")
    exec(compile(source, "planted", "exec"), module.__dict__)
    monkeypatch.setattr(backend, "_graphs", module.Graphs())
    monkeypatch.setenv("TRMFAST_GRAPHS", "1")
    with pytest.raises(AssertionError), standin():
        scenario()
