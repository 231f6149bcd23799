"""Every kernel of the CUDA engine compiled for GPUs that are not there, and its machine code inspected.

Two architectures stand for the rest here; ``python -m benchmarks.offline.cuda`` compiles for all.
"""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cuda_tools
from benchmarks.offline import cuda as cuda_kernels
from benchmarks.offline.cuda import CUDA_ARCHITECTURES, Instance, InstanceCode, compile_all, markdown
from simt_recursion import listed_instances

FIRST = (80, 90)
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "cuda_kernels.md"

# What runs where: row tiles, stages, width tiles, token tiles, strip tiles.
SMALL_SHARED = {
    *((1, 8, 4, 0, 0), (4, 3, 4, 0, 0), (1, 8, 8, 0, 0), (2, 4, 8, 0, 0)),
    *((4, 3, 4, 2, 4), (2, 4, 8, 2, 4), (2, 4, 8, 16, 1)),
}
MIDDLE_SHARED = SMALL_SHARED | {(4, 4, 8, 0, 0), (1, 8, 4, 2, 4), (4, 4, 8, 2, 4), (4, 4, 8, 16, 2)}
LARGE_SHARED = MIDDLE_SHARED | {(4, 8, 8, 0, 0), (4, 8, 8, 2, 4)}
FITTING = {
    80: MIDDLE_SHARED,
    86: SMALL_SHARED,
    89: SMALL_SHARED,
    90: LARGE_SHARED,
    100: LARGE_SHARED,
    120: SMALL_SHARED,
}

INSTANCE = Instance(2, 4, 8, 0, 0, 99456)
CODE = Counter({
    "HMMA": 40, "HMMA.16816.F32.BF16": 40, "LDSM": 8, "LDGSTS": 6, "LDGSTS.E.BYPASS.LTC128B.128": 6,
    "LDG": 9, "LDG.E.128": 4, "STG": 5, "STG.E.128": 5, "MEMBAR.ALL.GPU": 1, "CCTL.IVALL": 2,
})  # fmt: skip
GOOD = InstanceCode("bf16", "sm_89", INSTANCE, registers=255, stack=0, local=0, shared=0, counts=CODE)


@pytest.mark.compile
@pytest.mark.parametrize(
    "number", [*FIRST, *(pytest.param(n, marks=pytest.mark.grid) for n in CUDA_ARCHITECTURES if n not in FIRST)]
)
def test_compiled(number: int) -> None:
    """No warning, no local memory, tensor cores fed by ldmatrix and cp.async; as many blocks as plans count on."""
    cuda_tools.nvcc()
    found = compile_all([number])
    faulty = [f"{one.element}, {one.instance}: {'; '.join(one.faults)}" for one in found if one.faults]
    assert not faulty, "\n".join(faulty)
    assert len(found) == 2 * (len(LARGE_SHARED) + 1)
    assert {one.instance[:5] for one in found if one.instance and one.fits} == FITTING[number]


@pytest.mark.compile
def test_spills_are_found(tmp_path: Path) -> None:
    """A kernel that must leave half of the registers to a second block: the compiler's warning is an error."""
    cuda_tools.nvcc()
    source = Path(shutil.copytree(cuda_tools.CUDA, tmp_path / "cuda"))
    (source / "instances.h").write_text("#pragma once\n#define TRMFAST_INSTANCES(X) X(2, 4, 8, 0, 0)\n")
    kernels = (source / "kernels.cuh").read_text()
    (source / "kernels.cuh").write_text(kernels.replace("(kThreads, 1)", "(kThreads, 2)"))
    with pytest.raises(RuntimeError, match="spilled to local memory"):
        compile_all([80], source)


STALE = "no MEMBAR.ALL.GPU or no CCTL.IVALL: blocks of a group may read what was there before a barrier"


def counts(**changed: int) -> Counter[str]:
    return Counter({**CODE, **changed})


@pytest.mark.parametrize(
    "changed, fault",
    [
        ({"counts": counts(LDL=2, STL=1)}, "3 loads and stores of local memory, 0 bytes of it"),
        ({"stack": 8}, "0 loads and stores of local memory, 8 bytes of it"),
        ({"local": 4}, "0 loads and stores of local memory, 4 bytes of it"),
        ({"counts": counts(LD=1)}, "1 x LD: a generic address"),
        ({"counts": counts(ST=1)}, "1 x ST: a generic address"),
        ({"element": "fp16"}, "0 of 40 HMMA are HMMA.16816.F32, expected all and 16"),
        ({"counts": counts(HMMA=41)}, "40 of 41 HMMA are HMMA.16816.F32.BF16, expected all and 16"),
        ({"counts": Counter(), "instance": None, "stack": 1}, "0 loads and stores of local memory, 1 bytes of it"),
        ({"counts": counts(LDSM=0)}, "no LDSM: operands of products don't come by ldmatrix"),
        ({"counts": counts(LDGSTS=7)}, "no LDGSTS of 16 bytes: weights don't come by cp.async"),
        ({"counts": counts(STG=6)}, "5 of 6 stores have 16 bytes, or no load has"),
        ({"counts": counts(**{"LDG.E.128": 0})}, "5 of 5 stores have 16 bytes, or no load has"),
        ({"counts": counts(**{"CCTL.IVALL": 0})}, STALE),
        ({"counts": counts(**{"MEMBAR.ALL.GPU": 0})}, STALE),
        ({"registers": 257}, "0 resident blocks, plans count on 1"),
    ],
)
def test_each_fault(changed: dict[str, Any], fault: str) -> None:
    assert GOOD.faults == []
    assert replace(GOOD, **changed).faults == [fault]


def test_shared_memory_decides_where_an_instance_runs() -> None:
    large = replace(GOOD, instance=INSTANCE._replace(shared=(99 << 10) + 1))
    assert (GOOD.fits, GOOD.resident) == (True, 1)
    assert not large.fits
    assert replace(large, architecture="sm_80").fits
    assert not replace(GOOD, shared=4096).fits
    table = markdown([GOOD, replace(GOOD, element="fp16", registers=200), large], "nvcc 0.0")
    assert "| attention, D up to 512, 32 rows, 4 stages | 255 / 200 | 0 | 97.1 | 1 | 40 | 8 | 6 | 0 |" in table
    assert "| 255 | 0 | 99.0 | - | 40 | 8 | 6 | 0 |" in table


def test_the_document_is_of_these_sources() -> None:
    """docs/cuda_kernels.md has every instance and architecture: who adds one writes it again."""
    sections = DOCUMENT.read_text().split("\n## ")[1:]
    names = [*(Instance(*instance, 0).name for instance in listed_instances()), "packing of weights"]
    for section, number in zip(sections, CUDA_ARCHITECTURES, strict=True):
        assert section.startswith(f"sm_{number}\n")
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line[:2] == "| "]
        assert [row[0] for row in rows[2:]] == names
        assert all((row[2], row[8]) == ("0", "0") for row in rows[2:])


def test_missing_tools(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("NVCC", "/nonexistent/nvcc")
    monkeypatch.setattr(cuda_kernels, "SOURCE", Path("/nonexistent/cuda"))
    monkeypatch.setattr(cuda_kernels, "find_cuobjdump", lambda: "cuobjdump")
    assert cuda_kernels.main([]) == 2
    assert capsys.readouterr().err == "no nvcc, no /nonexistent/cuda on this machine\n"
