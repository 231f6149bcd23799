"""What the Triton backend decides before it launches: TF32 or not, a graph or not; and Triton that is too old."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from trmfast.kernels import tuning
from trmfast.kernels.architectures import GPUS
from trmfast.kernels.configurations import Configuration
from trmfast.kernels.forward_plan import Setting, forward_plan

from standin import Runtime, standin
from trmfast.backends import BACKENDS, graphs
from trmfast.backends import triton as backend
from trmfast.cases import PUBLISHED, make_case

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the stand-in takes its place")


# ---------------------------------------------------------------- TF32


@pytest.fixture
def cuda() -> Iterator[Runtime]:
    with standin() as runtime:
        yield runtime


@pytest.fixture
def matmul() -> Iterator[object]:
    """PyTorch's setting for products of float32, restored afterwards."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield matmul
    matmul.fp32_precision = before


def uses_tf32(dtype: torch.dtype) -> bool:
    problem = make_case("small", hidden_size=32).problem
    return backend._setting(problem, torch.zeros(1, 5, 32, dtype=dtype, device="cuda:0"), True).tf32


@without_gpu
@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="PyTorch has no fp32_precision")
@pytest.mark.usefixtures("cuda")
def test_either_way_to_ask_for_tf32(matmul: object) -> None:
    """After ``fp32_precision`` was set, PyTorch 2.13 raises where ``allow_tf32`` is read."""
    for name, value, expected in (
        ("allow_tf32", True, True),
        ("allow_tf32", False, False),
        ("fp32_precision", "tf32", True),
        ("fp32_precision", "ieee", False),
    ):
        setattr(matmul, name, value)
        assert uses_tf32(torch.float32) is expected
        assert not uses_tf32(torch.bfloat16)


@without_gpu
@pytest.mark.usefixtures("cuda")
def test_an_older_pytorch_has_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    class Matmul:
        allow_tf32 = True

    monkeypatch.setattr(torch.backends.cuda, "matmul", Matmul())
    assert uses_tf32(torch.float32)


@without_gpu
@pytest.mark.parametrize("name, expected", [("gfx90a", False), ("gfx942", True), ("gfx950", False)])
def test_tf32_on_amd(name: str, expected: bool, cuda: Runtime, matmul: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's compiler accepts it for gfx942 alone, whose tiles the others share."""
    setattr(matmul, "allow_tf32", True)  # noqa: B010 the module has no declared attributes
    monkeypatch.setattr(torch.version, "hip", "7.0")
    cuda.gcn_arch = f"{name}:sramecc+:xnack-"
    assert backend._architecture(0) == ("gfx942", name)
    assert uses_tf32(torch.float32) is expected
    from triton.backends.amd.compiler import HIPBackend
    from triton.backends.compiler import GPUTarget

    accepted = HIPBackend(GPUTarget("hip", name, 64)).parse_options({}).allowed_dot_input_precisions
    assert ("tf32" in accepted) is expected


# ---------------------------------------------------------------- what runs on a device


@without_gpu
def test_refusals_on_a_device(cuda: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = BACKENDS["triton"]

    def supports(dtype: torch.dtype = torch.float16, batch: int = 2, device: str = "cuda:0", **sizes: Any) -> str:
        problem = make_case("case", "hier6", **sizes).problem
        reason = triton.supports(problem, torch.device(device), dtype, batch, 5)
        return "" if reason is None else reason

    assert triton.available() is None
    assert triton.slow_device_types == ()
    assert supports() == ""
    assert triton.pair_bytes(make_case("case").problem, torch.float16, 5) > 0
    assert supports(torch.float64) == "it computes in float32, bfloat16, float16, not in float64"
    assert supports(device="cpu") == "it runs on cuda, not on cpu"
    assert supports(batch=1 << 17) == "it takes up to 65535 sequences and 2^31 tokens, not 131072 of 5"
    assert supports(hidden_size=8192, num_heads=64) == "it takes widths up to 4096, not 8192"
    assert supports(hidden_size=512, num_heads=2) == "it takes head_dim up to 128, not 256"
    with monkeypatch.context() as patch:
        patch.setitem(backend.CHOICES, "causal", (True,))
        assert supports() == "it runs networks with causal True, not False"
    monkeypatch.setattr(backend, "MOST_TERMS", 2)
    assert supports().startswith("it adds up to 2 tensors in an update, not ")
    cuda.capability = (7, 5)
    backend._architecture.cache_clear()
    assert supports().startswith("it has no tiles for sm_75: it needs compute capability 8.0 or newer")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton.available() == "no GPU: torch.cuda.is_available() is False"
    monkeypatch.setattr(backend, "interprets", lambda: True)
    assert supports() == "TRITON_INTERPRET is set: it interprets, on CPU tensors"


@without_gpu
@pytest.mark.usefixtures("cuda")
def test_tiles_are_timed_on_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The largest is the fastest by this timer; the model would take the smallest for ten tokens."""
    file = tmp_path / "tuning.json"
    monkeypatch.setenv("TRMFAST_TUNING_CACHE", str(file))
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    case = make_case("case", H_cycles=1, L_cycles=1, num_layers=1, **sizes)

    def rows() -> int:
        backend._configuration.cache_clear()
        setting = backend.forward_setting(case.problem, torch.device("cuda:0"), torch.bfloat16, 2, 5)
        return dict(backend._forward_plan(setting, False).launches[0].constants)["BLOCK_M"]

    modelled = rows()
    backend._forward_plan.cache_clear()
    monkeypatch.setattr(tuning, "time_launch", lambda launch: 1 / dict(launch.constants)["BLOCK_M"])
    monkeypatch.setenv("TRMFAST_TUNE", "1")
    assert rows() > modelled
    backend._forward_plan.cache_clear()
    assert json.loads(file.read_text())


# ---------------------------------------------------------------- graphs


@pytest.mark.parametrize(
    "gpu, batch, expected",
    [("H100", 1, True), ("H100", 8, True), ("H100", 768, False), ("A100", 768, False), ("RTX 4090", 768, False)],
)
def test_a_graph_where_the_host_is_slower(
    gpu: str, batch: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(case for case in PUBLISHED if case.name == "trm-sudoku-att")
    configuration = Configuration(GPUS[gpu].architecture, GPUS[gpu].multiprocessors)
    plan = forward_plan(Setting(case.problem, batch, 97, torch.bfloat16, True, configuration), save=True)
    monkeypatch.delenv("TRMFAST_GRAPHS", raising=False)
    assert graphs.pays(plan, GPUS[gpu]) is expected
    for asked in (True, False):
        monkeypatch.setenv("TRMFAST_GRAPHS", str(int(asked)))
        assert graphs.pays(plan, GPUS[gpu]) is asked


# ---------------------------------------------------------------- no Triton, or one that is too old


@pytest.fixture
def asked_anew() -> Iterator[None]:
    """What is wrong with Triton is found once in a process."""
    backend._triton_problem.cache_clear()
    yield
    backend._triton_problem.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted = backend.interprets()
    assert interpreted is not torch.cuda.is_available()
    assert BACKENDS["triton"].slow_device_types == (("cpu",) if interpreted else ())
    backend._triton_problem.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    reason = "Triton is not installed: `pip install trmfast[triton]` installs it on Linux"
    assert BACKENDS["triton"].available() == reason
    assert not backend.interprets()


@pytest.mark.usefixtures("asked_anew")
def test_an_old_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.__version__", "3.3.1")
    reason = "Triton 3.3.1 is too old: it needs 3.4 or newer, which PyTorch 2.8 brings"
    assert BACKENDS["triton"].available() == reason
    assert not backend.interprets()


@pytest.mark.breadth
@pytest.mark.parametrize("version", ["3.2.0", "3.3.1"])
def test_the_triton_of_an_older_pytorch(version: str, tmp_path: Path) -> None:
    """It has no ``triton.knobs``: what is missing is said in one line, and the CPU goes on without."""
    package = tmp_path / "triton"
    package.mkdir()
    (package / "__init__.py").write_text(f"__version__ = '{version}'\n")
    code = (
        "import torch\n"
        "from trmfast.backends import BACKENDS, select\n"
        "from trmfast.backends.triton import interprets\n"
        "from trmfast.cases import make_case\n"
        "case = make_case('small')\n"
        "print(BACKENDS['triton'].available(), interprets())\n"
        "print(select('auto', case.problem, torch.device('cpu'), torch.float32, 2, case.length).name)\n"
        "try:\n"
        "    select('triton', case.problem, torch.device('cpu'), torch.float32, 2, case.length)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    said, chosen, refused = done.stdout.splitlines()
    reason = f"Triton {version} is too old: it needs 3.4 or newer, which PyTorch 2.8 brings"
    assert said == f"{reason} False"
    assert chosen in ("cpu", "reference")
    assert refused.startswith(f"backend: got 'triton', which does not work here: {reason}; accepted are ")
