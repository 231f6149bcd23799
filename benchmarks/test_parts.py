"""Attention, the mlp_t mixer, the norm and the projections of a block alone, on one thread: benchmarks/parts.cpp."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trmfast.backends.cpu import targets
from trmfast.cases import find_case

SOURCE = Path(__file__).with_name("parts.cpp")
ENGINE = SOURCE.parent.parent / "csrc" / "cpu"
SOURCES = [str(SOURCE), str(ENGINE / "monitor.cpp"), str(ENGINE / "thread_pool.cpp")]
PARTS = ("project qkv, rotate", "attention", "mlp_t", "norm", "project gate and up, SwiGLU", "project down, residual")
CASES = {"att-97": "block-att-97", "att-916": "block-att-916", "mlp-97": "block-mlp-97"}
CHOSEN = [(case, part) for case in CASES for part in PARTS if part not in (("mlp_t",) if "att" in case else PARTS[:2])]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """parts.cpp, compiled for this processor."""
    targets()  # on a processor with AMX this asks the system for the tile registers
    out = tmp_path_factory.mktemp("parts") / "parts.so"
    flags = ["-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread", "-w"]
    subprocess.run([os.environ.get("CXX", "c++"), *flags, *SOURCES, "-o", str(out)], check=True)
    found = ctypes.CDLL(str(out))
    found.make_parts.restype = ctypes.c_void_p
    found.run_part.argtypes = [ctypes.c_void_p, ctypes.c_int]
    found.pack_weights.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)]
    return found


def make(library: ctypes.CDLL, name: str, dtype: torch.dtype) -> Any:
    case = find_case(CASES[name])
    block = case.problem.nets[0].block
    sizes = (block.hidden_size, block.intermediate_size, block.num_heads, case.length, block.seq_intermediate_size)
    return library.make_parts(int(dtype == torch.bfloat16), int(block.token_mixer == "attention"), *sizes)


def flops(name: str, part: str) -> float:
    """Matrix products of a part; a norm has none, for it the additions and products of its sums and scaling count."""
    case = find_case(CASES[name])
    block, length = case.problem.nets[0].block, case.length
    D = block.hidden_size
    return {
        "project qkv, rotate": 2.0 * length * D * 3 * D,
        "attention": 4.0 * length * length * D,
        "mlp_t": 6.0 * D * length * block.seq_intermediate_size,
        "norm": 3.0 * length * D,
        "project gate and up, SwiGLU": 4.0 * length * D * block.intermediate_size,
        "project down, residual": 2.0 * length * D * block.intermediate_size,
    }[part]


@pytest.mark.parametrize("name, part", CHOSEN)
@pytest.mark.benchmark(group="parts of a block forward, one sequence, one thread")
def test_part(name: str, part: str, dtype: torch.dtype, library: ctypes.CDLL, measure: Callable[..., None]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    parts, index = make(library, name, dtype), PARTS.index(part)
    measure(lambda: library.run_part(parts, index), flops(name, part), dtype)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["att-97", "mlp-97"])
@pytest.mark.benchmark(group="packing the weights of a block for forward, one thread")
def test_pack_alone(name: str, dtype: torch.dtype, library: ctypes.CDLL, benchmark: Any) -> None:
    problem = find_case(CASES[name]).problem
    weights = [torch.randn(shape) for shape in problem.weight_shapes]
    pointers = (ctypes.c_void_p * len(weights))(*(weight.data_ptr() for weight in weights))
    parts = make(library, name, dtype)
    benchmark(library.pack_weights, parts, pointers)
    benchmark.extra_info["bytes_read"] = sum(weight.nbytes for weight in weights)
