"""The stand-in for the CUDA runtime finds what it is there to find, and lets through what is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from trmfast.kernels import plan as plan_module
from trmfast.kernels.plan import Buffer, Launch, Plan, Tile

from standin import HazardError, Runtime, standin

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the stand-in takes its place"),
]


@pytest.fixture
def cuda() -> Iterator[Runtime]:
    with standin(devices=2) as runtime:
        yield runtime


def launch(size: int = 8) -> Plan:
    """One kernel that reads ``a`` and writes ``b``."""
    a, b = (Buffer(name, (size,), torch.float32) for name in "ab")
    made = Launch.of(
        "none.none", (1,), {"a": a, "b": b}, reads=["a"], writes=["b"], constants={"N": size}, tile=Tile.of()
    )
    return Plan((made,), (a,), (b,))


def run(tensors: dict[str, Tensor]) -> None:
    plan_module.run(launch(tensors["a"].numel()), tensors)


def pair(device: str = "cuda:0") -> dict[str, Tensor]:
    return {"a": torch.ones(8, device=device), "b": torch.zeros(8, device=device)}


@pytest.mark.usefixtures("cuda")
def test_tensors_of_the_device() -> None:
    """Factories, copies, views, autograd and inference mode are PyTorch's."""
    a = torch.arange(6.0).to("cuda:1").view(2, 3)
    assert a.device == torch.device("cuda", 1)
    assert a.is_cuda
    assert not a[1:].cpu().is_cuda
    assert a.t()[2].cpu().tolist() == [2, 5]
    a[0].zero_()
    assert a.sum().item() == 12
    w = torch.full((3,), 2.0, device="cuda:1").requires_grad_()
    (a @ w).sum().backward()
    assert w.grad is not None
    assert torch.equal(w.grad.cpu(), torch.tensor([3.0, 4.0, 5.0]))
    with torch.inference_mode():
        made = torch.zeros(2, device="cuda:0")
    with pytest.raises(RuntimeError, match="inference"):
        made.zero_()
    with pytest.raises(HazardError, match="cuda:1 and on cuda:0"):
        a + torch.zeros(2, 3, device="cuda:0")


def test_streams_in_order_are_let_through(cuda: Runtime) -> None:
    tensors, side = pair(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(tensors)
    torch.cuda.current_stream().wait_stream(side)
    copy = tensors["b"] * 2
    with torch.cuda.stream(side):
        run({"a": torch.ones(8, device="cuda:0"), "b": torch.zeros(8, device="cuda:0")})
        tensors["a"] + 1  # both streams only read it
    side.synchronize()
    assert torch.equal(copy.cpu(), tensors["b"].cpu() * 2)
    assert cuda.current_stream() is cuda.default_stream()


def unordered_read() -> None:
    tensors = pair()
    with torch.cuda.stream(torch.cuda.Stream()):
        run(tensors)


def unordered_write() -> None:
    tensors, side = pair(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(tensors)
    tensors["a"].zero_()


def wrong_device() -> None:
    run(pair("cuda:1"))


def tensor_of_the_host() -> None:
    run({**pair(), "a": torch.ones(8)})


def captured(*steps: Callable[[], object]) -> Any:
    """A graph of some steps, each run once before."""
    for step in steps:
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    return graph


def host_waits() -> None:
    captured(lambda: torch.ones(2, device="cuda:0").sum().item())


def device_is_synchronised() -> None:
    captured(torch.cuda.synchronize)


def stream_is_synchronised() -> None:
    captured(lambda: torch.cuda.current_stream().synchronize())


def copy_of_the_host() -> None:
    captured(lambda: torch.ones(2).to("cuda:0"))


def event_from_outside() -> None:
    event = torch.cuda.Event()
    event.record()
    captured(lambda: torch.cuda.current_stream().wait_event(event))


def event_from_inside() -> None:
    event = torch.cuda.Event()
    captured(event.record)
    event.synchronize()


def compiled_inside() -> None:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        run(pair())


def compiled_inside_for_another_alignment() -> None:
    whole = torch.ones(9, device="cuda:0")
    run({**pair(), "a": whole[1:]})
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        run(pair())


def default_stream() -> None:
    torch.cuda.CUDAGraph().capture_begin()


def freed_buffer() -> None:
    tensors = pair()
    graph = captured(lambda: run(tensors))
    tensors.clear()
    graph.replay()


def other_device() -> None:
    tensors = pair()
    graph = captured(lambda: run(tensors))
    with torch.cuda.device(1):
        graph.replay()


def unordered_replays() -> None:
    tensors = pair()
    graph = captured(lambda: run(tensors))
    graph.replay()
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.replay()


def unordered_graphs_of_one_pool() -> None:
    tensors = [pair(), pair()]
    first = captured(lambda: run({**tensors[0], "b": torch.empty(8, device="cuda:0")}))
    second = torch.cuda.CUDAGraph()
    with torch.cuda.graph(second, pool=first.pool()):
        run({**tensors[1], "b": torch.empty(8, device="cuda:0")})
    first.replay()
    with torch.cuda.stream(torch.cuda.Stream()):
        second.replay()


def pool_without_graphs() -> None:
    pool = captured(lambda: torch.ones(2, device="cuda:0")).pool()
    with torch.cuda.graph(torch.cuda.CUDAGraph(), pool=pool):
        pass


FAULTS = {
    unordered_read: "reads the 32 bytes at .* of cuda:0, nothing orders it after stream",
    unordered_write: "writes the 32 bytes at",
    wrong_device: "none.none: launched on stream -1 of cuda:0, its tensors lie on cuda:1",
    tensor_of_the_host: "a tensor of the host is passed to a kernel",
    host_waits: "the host waits for a value during a capture",
    device_is_synchronised: "a device is synchronised during a capture",
    stream_is_synchronised: "a stream is synchronised during a capture",
    copy_of_the_host: "a copy from pageable memory during a capture",
    event_from_outside: "waits for an event of another capture, or of none",
    event_from_inside: "an event that was recorded during a capture",
    compiled_inside: "none.none: compiled and loaded during a capture",
    compiled_inside_for_another_alignment: "none.none: compiled and loaded during a capture",
    default_stream: "a capture begins on the default stream",
    freed_buffer: "a graph replays over memory that was freed",
    other_device: "a graph of cuda:0 is replayed on stream -2 of cuda:1",
    unordered_replays: "nothing orders it after",
    unordered_graphs_of_one_pool: "a graph runs on stream .*, nothing orders it after one on .* that shares its memory",
    pool_without_graphs: "a capture shares the memory of graphs that are gone",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_hazards(fault: Callable[[], None], cuda: Runtime) -> None:
    with pytest.raises(HazardError, match=FAULTS[fault]):
        fault()
    cuda.faults.clear()  # what was in use when the fault ended it


@pytest.mark.parametrize("waits", [True, False])
def test_memory_that_is_freed_while_another_stream_uses_it(waits: bool) -> None:
    def use() -> None:
        tensors, side = pair(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run(tensors)
        if waits:
            torch.cuda.current_stream().wait_stream(side)

    if waits:
        with standin():
            use()
    else:
        with (
            pytest.raises(HazardError, match=r"32 bytes at .* were freed while stream . of cuda:0 may still use them"),
            standin(),
        ):
            use()


def test_a_graph_computes_at_replay(cuda: Runtime) -> None:
    tensors = pair()
    run(tensors)
    expected = tensors["b"].clone()
    graph = captured(lambda: run(tensors))
    tensors["b"].zero_()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        run(tensors)
        result = tensors["b"] + 1
    assert not tensors["b"].cpu().any(), "a capture ran what it captured"
    assert bool(result.cpu().isnan().all())
    graph.replay()
    assert torch.equal(tensors["b"].cpu(), expected.cpu())
    assert (cuda.captures, cuda.replays) == (2, 1)


def test_memory_ends(cuda: Runtime) -> None:
    cuda.capacity = 1000
    kept = torch.empty(200, device="cuda:0")
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(200, device="cuda:0")
    del kept
    torch.empty(200, device="cuda:0")
