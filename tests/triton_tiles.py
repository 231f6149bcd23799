"""Records the launches that the tests of kernels make on a GPU, without running them, and compiles them without one.

``PYTHONPATH=.:tests TRITON_INTERPRET=0 python tests/triton_tiles.py sm_89 [--all]`` prints, as JSON, how many launches
differ, how many of them were compiled, and those that take more shared memory than a program may have there.
"""

from __future__ import annotations

import json
import os
import sys
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from trmfast.kernels.architectures import ARCHITECTURES
from trmfast.kernels.configurations import Configuration
from trmfast.kernels.plan import Launch

import triton_bounds
import triton_guard
from benchmarks.offline.triton import Job, compile_all
from trmfast.backends import triton as backend

__all__ = ["main", "record"]

FILES = ("accuracy", "backward", "block", "forward", "mixer_backward", "rows")


def record(architecture: str) -> list[Job]:
    """The launches of :func:`triton_guard.guarded_run` in tests that believe to be on a GPU; each once."""
    found: dict[Any, Job] = {}

    def note(launches: Any, tensors: Any) -> None:
        del tensors
        name = os.environ["PYTEST_CURRENT_TEST"].rpartition("/")[2].removesuffix(" (call)")
        for launch in launches:
            job = Job(launch, name, architecture)
            found.setdefault(job.key, job)
        pytest.skip("recorded")

    triton_guard.DEVICE = torch.device("cpu")
    for module in (triton_guard, triton_bounds):
        vars(module)["run"] = note
    backend._configuration = lambda _: Configuration(architecture)  # type: ignore[assignment]
    folder = Path(__file__).parent
    words = ["-q", "-m", "not compile", "-p", "no:cacheprovider", "-k", "not programs and not wide_rows"]
    status = pytest.main([*words, *(str(folder / f"test_triton_{name}.py") for name in FILES)])
    assert status == 0, status
    return list(found.values())


def tile_bytes(launch: Launch) -> int:
    """Bytes of all operands that its tile sizes could make, in every stage: what orders launches by shared memory."""
    sizes = [value for name, value in launch.constants if name.startswith("BLOCK_")]
    operands = launch.buffers((*launch.reads, *launch.writes))
    widest = min(operand.dtype.itemsize for operand in operands)
    return sum(prod(pair) for pair in combinations(sizes, 2)) * widest * launch.num_stages


def main(architecture: str, every: bool) -> dict[str, Any]:
    """Compiles those whose tiles alone might not fit, or every launch."""
    limit = ARCHITECTURES[architecture].block_shared
    jobs = record(architecture)
    chosen = [job for job in jobs if every or tile_bytes(job.launch) > limit]
    faults = []
    for job, code in zip(chosen, compile_all(chosen), strict=True):
        if code.error is not None or code.shared > limit:
            faults.append(f"{job.label}: {code.kernel}: {code.error or f'{code.shared} bytes of {limit}'}")
    return {"launches": len(jobs), "compiled": len(chosen), "faults": faults}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], "--all" in sys.argv)))
