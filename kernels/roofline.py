"""A model of the time of launches on a GPU: the roofline, with the shared cache as a second roof.

It chooses between tiles and between plans, and it is what docs/gpu_model.md prints.  It is a model: nothing in it was
measured.  A launch takes as long as the slowest of

* its matrix products at a fraction of the tensor cores' rate,
* its operands and results, each once, at a fraction of the memory's bandwidth,
* what its programs load and store altogether, at a fraction of the shared cache's bandwidth,
* its waves: programs run in groups of one per multiprocessor, and a wave takes as long as one program's products at one
  multiprocessor's rate, its loads through one multiprocessor's port, or its exponentials and reciprocals at the rate of
  one multiprocessor's special-function units,

and a gap between launches.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, prod

import torch
from trmfast.kernels.architectures import Gpu
from trmfast.kernels.plan import Launch

__all__ = ["CACHE", "GAP", "MEMORY", "TENSOR", "launch_time", "plan_time", "program_bytes"]

TENSOR, MEMORY, CACHE = 0.75, 0.85, 0.75
"""The fractions of a GPU's peaks that a kernel is assumed to reach."""
GAP = 1.3e-6
"""Seconds between two launches of a CUDA graph."""


def program_bytes(launch: Launch) -> float:
    """Bytes that one program of a launch loads and stores."""
    return launch.loads * _dtype(launch).itemsize if launch.loads else launch.nbytes / prod(launch.grid)


def launch_time(gpu: Gpu, launch: Launch) -> float:
    """Seconds of one launch, without the gap before it."""
    programs, loads = prod(launch.grid), program_bytes(launch)
    flops = gpu.tensor_flops * TENSOR * (0.5 if _dtype(launch) == torch.float32 else 1.0)
    waves = ceil(programs / gpu.multiprocessors)
    wave = max(
        launch.flops / programs / (flops / gpu.multiprocessors),
        loads / (gpu.port_bandwidth * CACHE),
        launch.special / programs / gpu.special_rate,
    )
    return max(
        launch.flops / flops,
        launch.nbytes / (gpu.memory_bandwidth * MEMORY),
        programs * loads / (gpu.cache_bandwidth * CACHE),
        waves * wave,
    )


def plan_time(gpu: Gpu, launches: Iterable[Launch]) -> float:
    """Seconds of launches one after the other."""
    return sum(launch_time(gpu, launch) + GAP for launch in launches)


def _dtype(launch: Launch) -> torch.dtype:
    """The narrowest float dtype among the buffers: the compute dtype."""
    buffers = launch.buffers(name for name, _ in launch.arguments)
    return min((buffer.dtype for buffer in buffers), key=lambda dtype: dtype.itemsize)
