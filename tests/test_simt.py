"""The SIMT emulator and the primitives: its cases, the lane maps of an independent source, what nvcc makes of them."""

from __future__ import annotations

import re
import subprocess

import numpy as np
import pytest
from tensor_layouts import atoms_nv

import cuda_tools
from benchmarks.offline.cuda import CUDA_ARCHITECTURES, machine_code

SOURCES = [cuda_tools.SIMT / "test_simt.cpp", cuda_tools.SIMT / "test_misuse.cpp"]
CASES = [case for source in SOURCES for case in re.findall(r'^    \{"(\w+)", ', source.read_text(), re.MULTILINE)]


def run(variant: str, *arguments: str, data: bytes | None = None) -> bytes:
    program = cuda_tools.build_emulated(SOURCES, variant=variant)
    done = subprocess.run([str(program), *arguments], input=data, capture_output=True, timeout=300)
    assert done.returncode == 0, f"exit {done.returncode}\n{(done.stdout + done.stderr).decode(errors='replace')}"
    return done.stdout


@pytest.mark.breadth  # the cases take a quarter of a minute to compile
def test_list_of_cases() -> None:
    assert run("plain", "list").decode().split() == CASES


@pytest.mark.breadth
@pytest.mark.parametrize("case", CASES)
def test_case(case: str) -> None:
    assert f"{case}: passed" in run("plain", case).decode()


@pytest.mark.sanitizer
@pytest.mark.parametrize("variant", ["sanitized", "ucontext"])
def test_cases_on_other_builds(variant: str) -> None:
    for case in CASES:
        assert f"{case}: passed" in run(variant, case).decode()


# ---- lane maps


def halves(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """The 16 bits of each number, which must be representable."""
    if dtype == "fp16":
        return numbers.astype(np.float16).view(np.uint16)
    return (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.breadth
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_mma_lane_map(dtype: str) -> None:
    """Operands laid out by tensor-layouts' atom give the product in the atom's layout: D + A [16, 16] B [16, 8]."""
    atom = {"bf16": atoms_nv.SM80_16x8x16_F32BF16BF16F32_TN, "fp16": atoms_nv.SM80_16x8x16_F32F16F16F32_TN}[dtype]
    random = np.random.default_rng(7)
    a, b, d = (random.integers(-100, 100, shape).astype(np.float32) for shape in [(16, 16), (16, 8), (16, 8)])
    fragment_a, fragment_b = np.zeros((32, 8), np.uint16), np.zeros((32, 4), np.uint16)
    fragment_d = np.zeros((32, 4), np.float32)
    for lane in range(32):
        for v in range(8):
            k, m = divmod(atom.a_layout(lane, v), 16)
            fragment_a[lane, v] = halves(a[m, k], dtype)
        for v in range(4):
            k, n = divmod(atom.b_layout(lane, v), 8)
            fragment_b[lane, v] = halves(b[k, n], dtype)
            n, m = divmod(atom.c_layout(lane, v), 16)
            fragment_d[lane, v] = d[m, n]
    output = run("plain", "mma", dtype, data=fragment_a.tobytes() + fragment_b.tobytes() + fragment_d.tobytes())
    result = np.frombuffer(output, np.float32).reshape(32, 4)
    expected = d + a @ b
    for lane in range(32):
        for v in range(4):
            n, m = divmod(atom.c_layout(lane, v), 16)
            assert result[lane, v] == expected[m, n], (lane, v, m, n)


@pytest.mark.breadth
@pytest.mark.parametrize(
    ("kind", "atom"), [("plain", atoms_nv.SM75_U32x4_LDSM_N), ("trans", atoms_nv.SM75_U16x8_LDSM_T)]
)
def test_ldmatrix_lane_map(kind: str, atom: atoms_nv.CopyAtom) -> None:
    """Lane i's 16 bytes of the source are row i; the atom says, bit by bit, where they go."""
    rows = np.random.default_rng(8).permutation(1 << 16)[:256].astype(np.uint16).reshape(32, 8)
    output = run("plain", "ldmatrix", kind, data=rows.tobytes())
    result = np.frombuffer(output, np.uint16).reshape(32, 8)
    for lane in range(32):
        assert atom.src_layout_bits(lane, 0) == 128 * lane
        for v in range(8):
            bit = atom.dst_layout_bits(lane, 16 * v)
            assert bit % 16 == 0
            assert result[lane, v] == rows.reshape(-1)[bit // 16], (lane, v)


# ---- nvcc


@pytest.mark.representative(when=lambda architecture: architecture == 90)
@pytest.mark.parametrize("architecture", CUDA_ARCHITECTURES)
def test_device_code(architecture: int) -> None:
    """Each primitive becomes its instruction: no functions, no local memory, no generic addresses."""
    kernels = machine_code(cuda_tools.build_device(cuda_tools.SIMT / "examples.cu", architecture))
    named = {
        name: next(found for kernel, found in kernels.items() if f"{len(name)}{name}" in kernel)
        for name in ("gemm_bf16", "gemm_fp16", "softmax", "ring", "pipeline")
    }
    for name, counts in named.items():
        for absent in ("RET", "LDL", "STL", "LD", "ST"):
            assert counts[absent] == 0, f"{name}: {counts[absent]} x {absent}"
    for name, type_of_operands in (("gemm_bf16", ".BF16"), ("gemm_fp16", "")):
        counts = named[name]
        assert counts[f"HMMA.16816.F32{type_of_operands}"] == counts["HMMA"] == 2 * 2 * 4
        assert counts["LDSM.16.M88.4"] == counts["LDSM.16.MT88.4"] == 2 * 2
        assert counts["LDGSTS"] > 0
        assert counts["LDG"] == counts["STS"] == 0, "cp.async alone fills shared memory"
        assert counts["STG.E.64"] == counts["STG"] == 2 * 4 * 2
    assert named["softmax"]["MUFU.EX2"] > 0
    assert named["softmax"]["MUFU.RCP"] > 0
    assert named["softmax"]["SHFL.BFLY"] == 10
    assert named["ring"]["NANOSLEEP"] > 0
    assert named["ring"]["MEMBAR.ALL.GPU"] > 0
    assert named["pipeline"]["BAR.ARV"] > 0


def test_missing_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVCC", "/nonexistent/nvcc")
    monkeypatch.delenv("TRMFAST_REQUIRE_NVCC", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no nvcc"):
        cuda_tools.nvcc()
    monkeypatch.setenv("TRMFAST_REQUIRE_NVCC", "1")
    with pytest.raises(pytest.fail.Exception, match="no nvcc"):
        cuda_tools.nvcc()
