"""Every Triton kernel compiled for every GPU that it is meant for, without one, and its machine code inspected."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime.jit import JITFunction, MockTensor, create_function_from_signature
from trmfast.kernels.architectures import ARCHITECTURES
from trmfast.kernels.plan import Buffer, Launch, Tile, map_buffers, resolve

from benchmarks.offline.triton import (
    OPTIONS,
    PRODUCTION,
    Job,
    KernelCode,
    compile_all,
    markdown,
    production_jobs,
    specialise,
    summary,
)
from trmfast.cases import Case

pytestmark = pytest.mark.compile

ROOT = Path(__file__).resolve().parent.parent

# These stand for the rest where time is short: no wgmma and much shared memory, wgmma, AMD.
FIRST = ("sm_80", "sm_90", "gfx942")
MODES = {"bfloat16": (torch.bfloat16, True), "tf32": (torch.float32, True), "float32": (torch.float32, False)}


def programs(architecture: str, mode: str, cases: Sequence[Case] = (*PRODUCTION, *OPTIONS)) -> list[Job]:
    dtype, tf32 = MODES[mode]
    return production_jobs(architecture, dtype, tf32=tf32, cases=cases)


def one_of_each_tile(jobs: list[Job]) -> list[Job]:
    """Of every kernel with every tile the program that has most operands."""
    found: dict[tuple[Any, ...], Job] = {}
    for job in sorted(jobs, key=lambda job: -len(job.launch.buffers((*job.launch.reads, *job.launch.writes)))):
        launch = job.launch
        blocks = tuple((name, size) for name, size in launch.constants if name.startswith("BLOCK_"))
        found.setdefault((launch.kernel, launch.num_warps, launch.num_stages, blocks), job)
    return list(found.values())


def check(jobs: list[Job], mode: str, kernels: Sequence[str] = ()) -> list[KernelCode]:
    """No spills, shared memory within the limit, tensor cores, loads of 16 bytes; wgmma on sm_90.

    float32 products without TF32 have no tensor cores on NVIDIA.
    """
    found = [replace(c, products=c.products and mode != "float32") for c in compile_all(jobs)]
    faulty = [f"{c.kernel} for {c.architecture}, {c.label}: {'; '.join(c.faults)}" for c in found if c.faults]
    assert not faulty, "\n".join(faulty)
    stems = set(kernels or EVERYTHING)
    if mode != "bfloat16":
        stems -= {"attention_projection", "mixer_mlp_t_backward"}
    assert stems <= {c.kernel.split(".")[0] for c in found}
    return found


OF_OPTIONS = ("norm_weights", "gate_backward", "head_norm", "rows", "simple_gla", "simple_gla_backward")
EVERYTHING = (
    *("qkv", "attention", "attention_projection", "projection", "rows", "swiglu", "conv_swiglu", "mixer_mlp_t"),
    *("norm_backward", "swiglu_backward", "projection_backward", "attention_backward", "weight_gradient"),
    *("conv_swiglu_backward", "mixer_mlp_t_backward"),
)


@pytest.mark.representative(when=lambda architecture, mode: mode == "bfloat16" or architecture == "sm_90", rest="grid")
@pytest.mark.parametrize("mode", ["bfloat16", "float32"])
@pytest.mark.parametrize("architecture", FIRST)
def test_a_program_of_each_tile(architecture: str, mode: str) -> None:
    found = check(one_of_each_tile(programs(architecture, mode, PRODUCTION)), mode)
    expected = {"sm_90": "wgmma", "gfx942": "mfma"}.get(architecture, "mma")
    assert mode == "float32" or expected in {c.instructions for c in found}


@pytest.mark.grid
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_program(architecture: str, mode: str) -> None:
    found = check(programs(architecture, mode), mode)
    expected = {"sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}.get(architecture, "mma")
    assert mode != "bfloat16" or expected in {c.instructions for c in found}


@pytest.mark.parametrize(
    "architecture", ["sm_89", *(pytest.param(name, marks=pytest.mark.grid) for name in ("sm_80", "sm_90", "sm_120"))]
)
def test_launches_of_tests_fit(architecture: str, request: pytest.FixtureRequest) -> None:
    """What the tests of kernels launch on a GPU has room in its shared memory; sm_89 and sm_120 have least."""
    every = ["--all"] if request.node.get_closest_marker("grid") else []
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    command = [sys.executable, "tests/triton_tiles.py", architecture, *every]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["launches"] > 400
    assert found["compiled"] > 10
    assert not found["faults"], "\n".join(found["faults"])


@pytest.mark.representative(
    when=lambda architecture, mode: mode == "bfloat16" and architecture in ("sm_90", "gfx942"), rest="grid"
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_options_of_blocks(architecture: str, mode: str) -> None:
    """Norms ahead of mixers, gates, masks, norms of heads, mixers without a gate: the kernels as those need them."""
    check(one_of_each_tile(programs(architecture, mode, OPTIONS)), mode, OF_OPTIONS)


def spilling() -> Job:
    """A tile that is too large for the registers and the shared memory of an A100."""
    job = next(job for job in production_jobs("sm_80") if job.launch.kernel == "projection.projection_kernel")
    blocks = {"BLOCK_M": 128, "BLOCK_K": 128}
    constants = tuple((name, blocks.get(name, value)) for name, value in job.launch.constants)
    return replace(job, launch=replace(job.launch, constants=constants, num_warps=4, num_stages=4), label="too large")


def test_faults_are_found() -> None:
    (found,) = compile_all([spilling()])
    assert found.error is None
    assert any("spills" in fault for fault in found.faults), found
    assert any("shared memory" in fault for fault in found.faults)
    assert "too large" in markdown([found])
    assert f"| sm_80 | 1 | 1 | {found.spills} | mma |" in summary([found])
    assert f"| projection | {found.registers} / {found.shared / 1024:.0f} / {found.occupancy} |" in summary([found])


def test_each_fault() -> None:
    good = KernelCode(
        "a.b", "sm_90", "tile", products=True, rows=64, registers=100, tensor=4, wide_loads=4, instructions="wgmma"
    )
    assert good.faults == []
    assert replace(good, spills=2).faults == ["2 spills"]
    assert replace(good, shared=1 << 20).faults == ["1048576 bytes of shared memory, the limit is 232448"]
    assert replace(good, tensor=0).faults == ["no tensor-core instructions"]
    assert replace(good, instructions="mma").faults == ["mma instead of wgmma"]
    assert replace(good, instructions="mma", rows=32).faults == []
    assert replace(good, wide_loads=0).faults == ["no 16-byte loads"]
    assert replace(good, error="it broke").faults == ["it broke"]


def test_specialisation_is_triton_s_own() -> None:
    """Signature, constants and divisibility are what Triton finds when it is launched with tensors."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    jobs = {job.launch.kernel: job.launch for job in production_jobs("sm_80")}
    backend = make_backend(GPUTarget("cuda", 80, 32))
    for kernel, launch in jobs.items():
        function = JITFunction(resolve(kernel).fn)
        bind = create_function_from_signature(function.signature, function.params, backend)
        values: dict[str, Any] = dict(launch.constants)
        for name, value in launch.arguments:
            values[name] = map_buffers(lambda buffer: MockTensor(buffer.dtype), value)
        bound, specialisation, options = bind(**values, num_warps=4)
        _, signature, constants, attributes = function._pack_args(backend, {}, bound, specialisation, options)
        ours = specialise(launch, function.params, amd=False)
        assert ours[0] == signature, kernel
        assert {k: v for k, v in ours[1].items() if v is not None} == {
            k: v for k, v in constants.items() if v is not None
        }
        assert ours[2] == {k: v for k, v in attributes.items() if v}, kernel


def test_pieces_that_are_not_aligned_are_not_called_aligned() -> None:
    whole = Buffer("a", (3, 5), torch.float32)

    def launch(buffer: Buffer) -> Launch:
        return Launch.of("none.none", (1,), {"a": buffer}, reads="a", writes=(), constants={}, tile=Tile.of())

    params = [type("Param", (), {"name": "a", "is_constexpr": False, "default": None})()]
    assert specialise(launch(whole), params, amd=False)[2] == {(0,): [["tt.divisibility", 16]]}
    assert specialise(launch(whole[1]), params, amd=False)[2] == {}
    assert specialise(launch(whole), params, amd=True)[2] == {(0,): [["tt.divisibility", 16], ["tt.pointer_range", 32]]}
    huge = Buffer("a", (1 << 30,), torch.float32)
    assert specialise(launch(huge), params, amd=True)[2] == {(0,): [["tt.divisibility", 16]]}
