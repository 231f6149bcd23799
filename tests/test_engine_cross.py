"""The portable engine as a program of its own, forward and backward, on this machine and on AArch64 under qemu."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import aarch64
from trmfast.cases import Case, Inputs, make_case
from trmfast.engine import block_fields
from trmfast.testing import Result, compare_results, draw_case, pool, require

pytestmark = pytest.mark.breadth  # two minutes of compilation on a busy machine

ROOT = Path(__file__).resolve().parent.parent
CPU = ROOT / "csrc" / "cpu"
ONCE = [CPU / f"{name}.cpp" for name in ("dispatch", "isa", "memory", "monitor", "thread_pool")]
ELEMENTS = {"f32": torch.float32, "bf16": torch.bfloat16}
SIZES = ("width", "inner", "attention", "heads", "kv_heads", "head_dim", "causal", "seq_len", "seq_inner", "conv_taps")

CASES = [
    make_case("attention", length=7, hidden_size=24, num_heads=3, intermediate_size=40),
    make_case("mlp_t", length=5, hidden_size=17, intermediate_size=24, token_mixer="mlp_t", num_layers=1),
    make_case("conv", "urm", length=5, hidden_size=16, intermediate_size=24, channel_mixer="conv_swiglu", num_layers=1),
    make_case("hrm", "hrm", H_cycles=1, length=4, hidden_size=16, intermediate_size=16, num_layers=1),
]


@pytest.fixture(scope="module", params=["native", "aarch64"])
def command(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """How to start the program."""
    if request.param == "aarch64":
        reason = aarch64.missing_reason()
        compiler, link, start = aarch64.COMPILER, aarch64.LINK, [aarch64.QEMU]
    else:
        compiler, link, start = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "g++", [], []
        reason = None if shutil.which(compiler) else "no C++ compiler on this machine"
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp(request.param)
    flags = ["-std=c++17", "-O2", "-pthread", "-Wall", "-Wextra", "-Werror"]
    targets = "-DTRMFAST_TARGETS=" + " ".join(f"X(portable,{element})" for element in ELEMENTS)
    jobs = [(source, f"{source.stem}.o", [targets]) for source in [*ONCE, ROOT / "tests" / "cpp" / "test_engine.cpp"]]
    for element in ELEMENTS:
        defines = ["-DTRMFAST_TARGET=portable", f"-DTRMFAST_ELEMENT={element}"]
        jobs.append((CPU / "engine_target.cpp", f"{element}.o", defines))

    def build(job: tuple[Path, str, list[str]]) -> subprocess.CompletedProcess[str]:
        source, output, defines = job
        words = [compiler, *flags, *defines, "-c", str(source), "-o", str(folder / output)]
        return subprocess.run(words, capture_output=True, text=True)

    with ThreadPoolExecutor(os.cpu_count()) as workers:
        for done in workers.map(build, jobs):
            assert done.returncode == 0, done.stderr
    program = folder / "test_engine"
    objects = [str(folder / output) for _, output, _ in jobs]
    done = subprocess.run([compiler, "-pthread", *link, *objects, "-o", str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [*start, str(program)]


def run(command: list[str], inputs: Inputs, element: str, threads: int, folder: Path) -> Result:
    problem, dtype = inputs.problem, ELEMENTS[element]
    shape, (first, *_) = inputs.states[0].shape, problem.nets
    fields = block_fields(first.block)
    sizes = [*shape[:2], *(int(fields[name]) for name in SIZES), first.num_layers]
    sizes += [len(problem.nets), len(problem.program.states), inputs.x is not None, inputs.cos is not None]
    rows: list[int] = []
    for update in problem.program.updates:
        rows += [update.dst, update.inject_x, update.net, update.grad, len(update.sources), *update.sources]
    with open(folder / "in", "wb") as file:
        file.write(struct.pack(f"={len(sizes) + 1}i", len(sizes), *sizes))
        file.write(struct.pack("=if", 1, fields["eps"]))
        file.write(struct.pack(f"={len(rows) + 1}i", len(rows), *rows))
        for weight in inputs.weights:
            file.write(struct.pack("=i", weight.numel()) + _bytes(weight))
        for tensor in (*inputs.states, *inputs.grad_states, inputs.x):
            data = b"" if tensor is None else _bytes(tensor)
            file.write(struct.pack("=i", len(data)) + data)
        for table in (inputs.cos, inputs.sin):
            data = b"" if table is None else _bytes(table)
            file.write(struct.pack("=i", len(data) // 4) + data)
    words = [*command, "portable", element, str(threads), str(folder / "in"), str(folder / "out")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = bytearray((folder / "out").read_bytes())

    def take(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = torch.Size(size).numel()
        tensor = torch.frombuffer(found, dtype=dtype, count=count).reshape(size).clone()
        del found[: count * dtype.itemsize]
        return tensor

    names = problem.program.states
    outputs = {name: take(shape, dtype) for name in names}
    gradients = {f"grad {name}": take(shape, torch.float32).to(dtype) for name in names}
    if inputs.x is not None:
        gradients["grad x"] = take(shape, torch.float32).to(dtype)
    for name, size in zip(problem.weight_names, problem.weight_shapes, strict=True):
        gradients[f"grad {name}"] = take(size, torch.float32)
    assert not found
    return Result(outputs, gradients)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(command: list[str], case: Case, element: str, tmp_path: Path) -> None:
    # Three threads for two sequences: a team of one and, with the third thread, a barrier of all.
    draws = draw_case(case, ELEMENTS[element])
    require(pool([compare_results(run(command, d.inputs, element, 3, tmp_path), d.eager, d.truth) for d in draws]))
