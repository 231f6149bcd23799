"""``trmfast bench --device cuda`` on the stand-in for the CUDA runtime: events, memory, rivals as graphs, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from standin import HazardError, Runtime, standin
from trmfast.benchmark import gpu, suites
from trmfast.benchmark import turns as turns_module
from trmfast.benchmark.eager import EagerHRM, EagerInner
from trmfast.benchmark.models import ModelRunner
from trmfast.benchmark.rivals import Compiled, Eager
from trmfast.benchmark.turns import Turns
from trmfast.cases import make_case, make_inputs
from trmfast.cli import bench_suite, main

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the stand-in takes its place"),
]

CASE = make_case("hrm", "hrm", H_cycles=1, L_cycles=1, num_layers=1, length=7, hidden_size=32, intermediate_size=48)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    monkeypatch.setattr(gpu, "PEAK_SIZE", 32)
    with standin() as runtime:
        yield runtime


class Graphs:
    """In the place of ``torch.compile(mode="reduce-overhead")``: a step overwrites what the one before returned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.modes: list[str | None] = []
        self.steps = 0
        self.returned: list[Tensor] = []
        monkeypatch.setattr(torch, "compile", self.compile)
        monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", self.begin)

    def compile(self, function: Callable[..., Any], *, mode: str | None = None, **_: Any) -> Callable[..., Any]:
        self.modes.append(mode)

        def run(*arguments: Any) -> Any:
            found = function(*arguments)
            tensors = [t for net in found for t in net.values()] if isinstance(found, list) else [found]
            self.returned += [tensor.detach() for tensor in tensors]
            return found

        return run

    def begin(self) -> None:
        self.steps += 1
        for tensor in self.returned:
            tensor.fill_(float("nan"))
        self.returned = []


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "words, expected",
    [
        (
            ["--device", "cuda"],
            "--device: got 'cuda', accepted here is cpu: no GPU: torch.cuda.is_available() is False",
        ),
        (["--suite", "gpu"], "--suite: got 'gpu', which needs --device cuda"),
        *(
            (
                ["--device", "cuda", "--suite", suite],
                f"--suite: got '{suite}', accepted with --device cuda are quick, standard, blocks, looped, gpu",
            )
            for suite in ("full", "int8", "scaling", "solve")
        ),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
    ],
)
def test_refusals(words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", *words, "--output", str(tmp_path / "out")])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert expected in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("cuda")
def test_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from trmfast.backends.triton import TritonBackend

    assert gpu.missing_gpu() is None
    monkeypatch.setattr(TritonBackend, "available", lambda _: "Triton is not installed")
    assert gpu.missing_gpu() == "the triton backend does not run: Triton is not installed"


# ---------------------------------------------------------------- time and memory


@pytest.mark.usefixtures("cuda")
def test_a_sample_is_the_time_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what happens between calls, and without waits for the device."""
    now = [0.0]
    monkeypatch.setattr("standin.streams.perf_counter", lambda: now[0])

    calls: list[str] = []

    def take(seconds: float, name: str) -> None:
        now[0] += seconds
        calls.append(name)

    found = gpu.seconds_of(lambda: take(0.25, "run"), 3, between=lambda: take(5.0, "between"))
    assert found == 0.25
    assert calls == ["between", "run"] * 3


@pytest.mark.usefixtures("cuda")
def test_the_time_of_events_that_are_not_over() -> None:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with pytest.raises(HazardError, match="not recorded"):
        begin.elapsed_time(end)
    begin.record()
    end.record()
    with pytest.raises(HazardError, match="has not waited for"):
        begin.elapsed_time(end)
    end.synchronize()
    assert begin.elapsed_time(end) >= 0


@pytest.mark.usefixtures("cuda")
def test_turns_and_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "SAMPLE_SECONDS", 1e-3)
    monkeypatch.setattr(turns_module, "SETTLE_SECONDS", 0.0)
    x = torch.ones(64, 64, device="cuda")
    turns = Turns({"a": lambda: x @ x, "b": lambda: x + 1}, torch.float32, {"a": lambda: x.add_(0)}, "cuda")
    turns.round()
    turns.visit(0)
    assert [len(times) for times in turns.timing.times.values()] == [2, 2]
    assert min(*turns.timing.peaks, *turns.timing.times["a"], *turns.timing.times["b"]) > 0
    assert gpu.bandwidth(1 << 16) > 0
    assert gpu.describe() == "stand-in, 132 multiprocessors, CUDA 13.0"


@pytest.mark.usefixtures("cuda")
def test_peak_bytes() -> None:
    kept = torch.ones(1000, device="cuda")
    assert gpu.peak_bytes(lambda: torch.ones(5000, dtype=torch.uint8, device="cuda")) == 5000
    assert gpu.peak_bytes(lambda: kept.sum()) < 100


# ---------------------------------------------------------------- rivals as CUDA graphs


@pytest.mark.usefixtures("cuda")
def test_compiled_networks_are_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = Graphs(monkeypatch)
    inputs = make_inputs(CASE, torch.bfloat16, device=gpu.current())
    compiled, eager = Compiled(inputs, 1), Eager(inputs, 1)
    assert set(graphs.modes) == {"reduce-overhead"}
    assert compiled.note == "network by network, CUDA graphs"
    expected = [state.cpu() for state in eager.forward()]
    eager.training()
    gradients = {name: gradient.cpu() for name, gradient in eager.gradients().items()}
    first, second = compiled.forward(), compiled.forward()
    assert graphs.steps == 2
    for states in (first, second):  # those of the first are not overwritten
        assert all(torch.equal(a.cpu(), b) for a, b in zip(states, expected, strict=True))
    compiled.training()
    assert graphs.steps == 3
    assert all(torch.equal(g.cpu(), gradients[name]) for name, g in compiled.gradients().items())
    compiled.change_weights()
    compiled.forward()
    assert all(weight.grad is None for weight in compiled.weights), "it lies in memory of the graphs"


def test_on_the_cpu_nothing_is_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = Graphs(monkeypatch)
    inputs = make_inputs(CASE, torch.bfloat16)
    compiled = Compiled(inputs, 1)
    compiled.forward()
    compiled.training()
    assert set(graphs.modes) == {None}
    assert graphs.steps == 0


def test_a_step_of_a_model_is_one_step_of_its_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """HRM's training runs its recursion twice before it goes back."""
    graphs = Graphs(monkeypatch)
    config = {
        "batch_size": 1, "seq_len": 5, "vocab_size": 11, "num_puzzle_identifiers": 1, "puzzle_emb_ndim": 0,
        "hidden_size": 32, "num_heads": 2, "expansion": 2, "H_cycles": 1, "L_cycles": 1, "H_layers": 1, "L_layers": 1,
        "pos_encodings": "rope", "halt_max_steps": 2, "halt_exploration_prob": 0.1, "forward_dtype": "float32",
    }  # fmt: skip
    model = EagerHRM(config)
    cast(EagerInner, model.inner).stacks.compile("network", graphs=True)
    batch = {
        "inputs": torch.ones(1, 5, dtype=torch.int32),
        "labels": torch.ones(1, 5, dtype=torch.int32),
        "puzzle_identifiers": torch.zeros(1, dtype=torch.int32),
    }
    runner = ModelRunner("compile", model, batch)
    runner.training()
    assert graphs.steps == 1
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients)
    runner.forward()
    assert graphs.steps == 2
    assert all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------- the command


@pytest.mark.breadth
@pytest.mark.parametrize("suite", [None, "gpu"])
def test_command(suite: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model, and a recursion: what is a number on a GPU is one here; kernels of the stand-in are seen to be wrong.

    With kernels that compute, tests/test_first_gpu.py runs the same measurement.
    """
    monkeypatch.setattr(gpu, "PEAK_SIZE", 32)
    monkeypatch.setattr(turns_module, "SAMPLE_SECONDS", 1e-3)
    Graphs(monkeypatch)
    works = tuple(work for work in suites.SUITES["gpu"].works if work.case.name == "trm-sudoku-att")[:1]
    monkeypatch.setattr(bench_suite, "LATE", -1e9)  # no rival is left out
    monkeypatch.setitem(suites.SUITES, "gpu", suites.Suite(works, 1, device="cuda"))
    words = ["--config", "sudoku", "--batch", "1", "--seconds", "1"] if suite is None else ["--suite", "gpu"]
    with standin():
        status = main(["bench", "--device", "cuda", "--tiny", *words, "--output", str(tmp_path)])
    assert status == 1
    record = json.loads((tmp_path / f"{'suite' if suite else 'bench'}.json").read_text())
    assert record["settings"]["device"] == "cuda"
    assert record["description"].startswith("stand-in, 132 multiprocessors, CUDA 13.0; ")
    ours = {"trmfast", *(["recompute=False"] if suite else [])}
    assert {row["implementation"] for row in record["rows"]} == {"eager", "compile", *ours}
    for row in record["rows"]:
        assert row["seconds"] > 0
        assert row["peak"] > 0
        assert row["share"] > 0
        assert row["verdict"].startswith("fail") == (row["implementation"] in ours)
