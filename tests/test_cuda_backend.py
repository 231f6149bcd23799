"""The CUDA engine behind the backend protocol: what it refuses, when it is chosen, and errors.

The kernel itself is tested in the emulator (test_cuda_emulated.py, test_cuda_hand_over.py) and, with ``-m gpu``, here.
"""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trmfast.kernels.architectures import ARCHITECTURES, GPUS
from trmfast.kernels.configurations import Configuration
from trmfast.kernels.forward_plan import Setting

import trmfast
from benchmarks.offline import tables
from benchmarks.offline.tables import fill
from trmfast import backends
from trmfast.backends import BACKENDS, cuda
from trmfast.backends.triton import TritonBackend
from trmfast.cases import Case, make_case, make_inputs
from trmfast.problem import Problem
from trmfast.program import RecursionProgram, Update
from trmfast.spec import NetSpec
from trmfast.testing import SMALL, check_case, require

HAS_GPU = torch.cuda.is_available()
# CUDA's text where there is no driver or an old one, and where there is one and no GPU.
NO_DRIVER = "(?:CUDA driver version is insufficient for CUDA runtime version|no CUDA-capable device is detected)"


@pytest.fixture
def extension() -> Any:
    """``trmfast._cuda``; with TRMFAST_REQUIRE_CUDA=1 its absence is a failure."""
    if cuda._cuda is None:
        reason = BACKENDS["cuda"].available()
        assert os.environ.get("TRMFAST_REQUIRE_CUDA") != "1", reason
        pytest.skip(f"backend cuda: {reason}")
    return cuda._cuda


def prepare(case: Case, gpu: str = "L40S", **changed: int) -> Any:
    limits = cuda.limits_of(GPUS[gpu])._replace(**changed)
    return cuda._prepare(case.problem, case.batch, case.length, limits)


# ---------------------------------------------------------------- refusals


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_cuda", None)
    monkeypatch.setattr(cuda, "_import_error", "nothing there")
    reason = BACKENDS["cuda"].available()
    assert reason is not None
    assert reason.startswith("the engine was not built: ")
    assert "\n" not in reason


@pytest.mark.usefixtures("extension")
@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_without_a_driver_the_reason_is_cudas_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a driver that is too old: CUDA has one error for both."""
    inputs = make_inputs(make_case("small"), torch.bfloat16)
    problem = inputs.problem
    with pytest.raises(ValueError, match="backend: got 'cuda'"):
        trmfast.recursion(
            problem.program, problem.nets, inputs.states, inputs.x, inputs.weights, inputs.cos, inputs.sin, "cuda"
        )
    monkeypatch.setattr(torch.version, "cuda", None)
    assert BACKENDS["cuda"].available() == "this PyTorch is built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    reason = BACKENDS["cuda"].available()
    assert reason is not None
    assert re.fullmatch(NO_DRIVER, reason)


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_an_error_of_a_launch_leaves_the_process_usable(extension: Any) -> None:
    """Each call says what it was doing, in CUDA's words, and the next ones start without that error."""
    case = make_case("small")
    prepared = prepare(case)
    addresses = dict.fromkeys(("steps", "sources", "runs", "x", "saved", "cos", "sin", "exchange", "arrivals"), 0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="trmfast CUDA: packing weights: " + NO_DRIVER):
            extension.pack("bf16", cuda._block(case.problem), [0, 0, 0, 0], 0, 0)
        with pytest.raises(RuntimeError, match="trmfast CUDA: shared memory: " + NO_DRIVER):
            extension.forward(
                element="bf16",
                prepared=prepared,
                **addresses,
                weights=[0],
                states_in=[0, 0],
                states_out=[0, 0],
                failed=0,
                timeout_ns=1,
                stream=0,
            )
        with pytest.raises(RuntimeError, match="trmfast CUDA: shared memory: " + NO_DRIVER):
            prepared.resident_blocks("fp16")
        with pytest.raises(RuntimeError, match="trmfast CUDA: device attributes: " + NO_DRIVER):
            extension.limits(0)
    assert not isinstance(prepare(make_case("another", length=20)), str)


def test_wrong_arguments_of_the_extension(extension: Any) -> None:
    block = cuda._block(make_case("small").problem)
    with pytest.raises(ValueError, match="element: got f32, accepted are bf16 and fp16"):
        extension.pack("f32", block, [0, 0, 0, 0], 0, 0)
    with pytest.raises(ValueError, match="weights: got 3, accepted are 4"):
        extension.pack("bf16", block, [0, 0, 0], 0, 0)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize(
    "case, limits, expected",
    [
        (make_case("wide", hidden_size=528, num_heads=8, num_layers=1), {}, "hidden_size: got 528, accepted are"),
        (make_case("odd", hidden_size=72, num_heads=2, num_layers=1), {}, "hidden_size: got 72, accepted are"),
        (make_case("head", hidden_size=160, num_heads=1, num_layers=1), {}, "head_dim: got 160, accepted are"),
        (make_case("conv", "urm", channel_mixer="conv_swiglu"), {}, "channel_mixer: got conv_swiglu, accepted is"),
        (make_case("small"), {"shared_bytes": 8192}, "shared memory: a block needs"),
        (
            make_case("long", length=916),
            {"multiprocessors": 4, "shared_bytes": 227 << 10},
            "blocks at the same time, the device runs 4",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, Case) else "",
)
def test_refusals_are_one_line(case: Case, limits: dict[str, Any], expected: str) -> None:
    reason = prepare(case, **limits)
    assert isinstance(reason, str)
    assert expected in reason
    assert "\n" not in reason


@pytest.mark.usefixtures("extension")
def test_refusals_of_programs() -> None:
    case = make_case("two", "hrm")
    first, second = case.problem.nets
    wider = NetSpec(replace(second.block, intermediate_size=48), second.num_layers)
    other = replace(case, problem=Problem(case.problem.program, (first, wider)))
    assert prepare(other) == "it takes networks whose blocks are equal, these differ"
    states = tuple(f"z{i}" for i in range(17))
    program = RecursionProgram(states, ("f",), (Update(dst=0, sources=(0,), inject_x=True, net=0, grad=True),), 1)
    many = replace(case, problem=Problem(program, (first,)))
    assert prepare(many) == "it takes up to 16 states and 8 networks"


@pytest.fixture
def l40s(extension: Any, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A device that is not there: what CUDA would say of an L40S, for whoever asks before a launch."""
    assert extension is not None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "_limits", lambda *_: cuda.limits_of(GPUS["L40S"]))
    monkeypatch.setattr(cuda, "_resident_blocks", lambda *_: GPUS["L40S"].multiprocessors)
    monkeypatch.setattr(cuda.CudaBackend, "available", lambda *_: None)
    monkeypatch.setattr(TritonBackend, "available", lambda *_: None)
    monkeypatch.setattr(TritonBackend, "supports", lambda *_: None)
    monkeypatch.setattr(backends, "_told", set())
    backends.select.cache_clear()
    return monkeypatch


def supports(case: Case, dtype: torch.dtype = torch.bfloat16) -> str | None:
    return BACKENDS["cuda"].supports(case.problem, torch.device("cuda"), dtype, case.batch, case.length)


def test_refusals_of_devices(l40s: pytest.MonkeyPatch) -> None:
    case = make_case("small", length=40)
    assert supports(case) is None
    assert supports(case, torch.float32) == "it computes in bfloat16, float16, not in float32"
    with l40s.context() as patch:
        patch.setattr(cuda, "_resident_blocks", lambda *_: 3)
        assert supports(case) == "it needs 6 blocks at the same time, the device runs 3"
    with l40s.context() as patch:
        patch.setattr(TritonBackend, "supports", lambda *_: "it has a reason")
        assert supports(case) == "its backward pass needs the triton backend: it has a reason"
    l40s.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert supports(case) == "it needs compute capability 8.0 or newer, not 7.5"


def choose(case: Case) -> str:
    return backends.select("auto", case.problem, torch.device("cuda"), torch.bfloat16, case.batch, case.length).name


def test_auto_goes_on_to_triton_and_says_why_once(l40s: pytest.MonkeyPatch) -> None:
    wide = make_case("wide", hidden_size=528, num_heads=11)
    with pytest.warns(UserWarning, match="backend cuda is not used: hidden_size: got 528, accepted are") as told:
        chosen = [choose(case) for case in (wide, replace(wide, batch=3))]
    assert chosen == ["triton", "triton"]
    assert len(told) == 1
    l40s.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with pytest.warns(UserWarning, match="backend cuda is not used: it needs compute capability 8.0 or newer") as told:
        chosen = [choose(make_case("small"))]
    assert chosen == ["triton"]
    assert len(told) == 1


@pytest.mark.parametrize("declines, expected", [(False, "cuda"), (True, "triton")])
def test_auto_keeps_to_the_rule_and_says_nothing(l40s: pytest.MonkeyPatch, declines: bool, expected: str) -> None:
    l40s.setattr(cuda.CudaBackend, "declines", lambda *_: declines)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(make_case("small")) == expected


def test_a_group_that_waited_too_long_is_an_error_of_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The word that the kernel writes is read, reported and cleared: the call after that goes through."""
    failed = torch.tensor([3], dtype=torch.int32)
    monkeypatch.setattr(cuda, "_failed", lambda *_: failed)
    with pytest.raises(RuntimeError, match="trmfast CUDA: 3 blocks waited more than 10 s for others of their group"):
        cuda._raise_if_failed(0)
    cuda._raise_if_failed(0)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("gpu", ["A100", "L40S", "RTX 4090", "H100"])
@pytest.mark.parametrize("length", [81, 97, 916])
def test_published_sizes_fit_every_gpu(gpu: str, length: int) -> None:
    case = make_case("trm", H_cycles=3, L_cycles=6, batch=8, hidden_size=512, num_heads=8, length=length)
    prepared = prepare(case, gpu)
    assert not isinstance(prepared, str), prepared
    assert prepared.groups * prepared.group_blocks <= GPUS[gpu].multiprocessors
    assert prepared.group_blocks * prepared.rows >= length
    assert prepared.shared_bytes <= ARCHITECTURES[GPUS[gpu].architecture].block_shared


# ---------------------------------------------------------------- choice


def setting_of(case: Case, gpu: str) -> Setting:
    configuration = Configuration(GPUS[gpu].architecture, GPUS[gpu].multiprocessors)
    return Setting(case.problem, case.batch, case.length, torch.bfloat16, case.rope, configuration)


def slower(batch: int, width: int, gpu: str) -> bool:
    case = make_case("trm", H_cycles=3, L_cycles=6, batch=batch, hidden_size=width, num_heads=width // 64, length=97)
    return cuda.is_slower(case.problem, batch, 97, setting_of(case, gpu), cuda.limits_of(GPUS[gpu]))


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize(
    "gpu, batch, width, expected",
    [("L40S", 16, 128, False), ("RTX 4090", 64, 256, False), ("A100", 768, 512, True), ("H100", 1, 512, True)],
)
def test_rule_of_auto(gpu: str, batch: int, width: int, expected: bool) -> None:
    """One launch for narrow attention on GPUs whose ports are wide for their tensor cores, Triton's elsewhere."""
    assert slower(batch, width, gpu) is expected


@pytest.mark.usefixtures("extension")
def test_a_tie_is_left_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("small")
    limits, setting = cuda.limits_of(GPUS["L40S"]), setting_of(case, "L40S")
    for times, expected in (((1.0, 1.09), True), ((1.0, 1.11), False), (None, True)):
        cuda.is_slower.cache_clear()
        monkeypatch.setattr(cuda, "modelled_times", lambda *_, times=times: times)
        assert cuda.is_slower(case.problem, case.batch, case.length, setting, limits) is expected
    cuda.is_slower.cache_clear()


@pytest.mark.usefixtures("extension")
def test_the_document_has_the_plans_and_bytes_of_these_sources() -> None:
    """docs/gpu_model.md, written by ``python -m benchmarks.offline.tables --write docs/gpu_model.md``."""
    text = (Path(__file__).resolve().parent.parent / "docs" / "gpu_model.md").read_text()
    assert fill(text, "cuda-traffic", tables.cuda_traffic_section()) == text
    winning = {line.split("|")[2].strip() for line in tables.cuda_model_section() if "**" in line}
    assert winning, "auto takes this engine for nothing"
    assert winning <= {"L40S", "RTX 4090"}


def test_without_the_extension_there_is_no_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda, "_cuda", None)
    assert tables.main(["--section", "cuda-model"]) == 2
    assert capsys.readouterr().err.startswith("no cuda-traffic, no cuda-model: the engine was not built: ")


# ---------------------------------------------------------------- on a GPU

ON_GPU = [case for case in SMALL if not any(net.block.channel_mixer == "conv_swiglu" for net in case.problem.nets)]


@pytest.mark.gpu
@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ON_GPU, ids=str)
def test_parity_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    reason = BACKENDS["cuda"].supports(case.problem, torch.device("cuda"), dtype, case.batch, case.length)
    if reason is not None:
        pytest.skip(reason)
    require(check_case(case, dtype, "cuda", device="cuda"))


@pytest.mark.gpu
@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("batch", [1, 7, 400])
def test_published_width_on_a_gpu(batch: int) -> None:
    case = make_case("trm", H_cycles=1, L_cycles=2, batch=batch, hidden_size=512, num_heads=8, length=97)
    require(check_case(case, torch.bfloat16, "cuda", device="cuda", seeds=range(2)))


@pytest.mark.gpu
@pytest.mark.usefixtures("extension")
def test_graph_capture_and_streams_on_a_gpu() -> None:
    case = make_case("trm", batch=3, length=40, hidden_size=128)
    inputs = make_inputs(case, torch.bfloat16, device="cuda")
    problem = inputs.problem

    def call() -> tuple[torch.Tensor, ...]:
        return trmfast.recursion(
            problem.program, problem.nets, inputs.states, inputs.x, inputs.weights, inputs.cos, inputs.sin, "cuda"
        )

    with torch.no_grad():
        expected = call()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            other = call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        graph.replay()
    for a, b, c in zip(expected, other, captured, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.gpu
def test_an_error_of_a_launch_leaves_a_gpu_usable(extension: Any) -> None:
    """A cooperative grid for a device of many more multiprocessors is refused at launch; the call after it runs."""
    case = make_case("trm", batch=3, length=97, hidden_size=128)
    limits = cuda._limits(torch.cuda.current_device())._replace(multiprocessors=100_000)
    too_large = cuda._prepare(case.problem, 30_000, case.length, limits)
    assert too_large.group_blocks > 1
    addresses = dict.fromkeys(("steps", "sources", "runs", "x", "saved", "cos", "sin", "exchange", "arrivals"), 0)
    with pytest.raises(RuntimeError, match="trmfast CUDA: launching the recursion: "):
        extension.forward(
            element="bf16",
            prepared=too_large,
            **addresses,
            weights=[0],
            states_in=[0, 0],
            states_out=[0, 0],
            failed=0,
            timeout_ns=1,
            stream=torch.cuda.current_stream().cuda_stream,
        )
    require(check_case(case, torch.bfloat16, "cuda", device="cuda"))
