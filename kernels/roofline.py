"""A model of the time of launches on a GPU: the roofline, with the shared cache as a second roof.

It chooses between tiles and between plans, and it is what docs/gpu.md prints.  It is a model: nothing in it was
measured.  A launch takes as long as the slowest of

* its matrix products at a fraction of the tensor cores' rate,
* its operands and results, each once, at a fraction of the memory's bandwidth,
* what its programs load and store altogether, at a fraction of the shared cache's bandwidth,
* its waves: programs run in groups of one a multiprocessor, and a wave takes as long as one program's products at one
  multiprocessor's rate, or its loads through one multiprocessor's port,

and a gap between launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import ceil, prod
from typing import Any

import torch
from trmfast.kernels.architectures import Gpu
from trmfast.kernels.plan import Buffer, Launch

__all__ = ["CACHE", "GAP", "MEMORY", "TENSOR", "launch_time", "plan_time", "program_bytes"]

TENSOR, MEMORY, CACHE = 0.75, 0.85, 0.75
"""The fractions of a GPU's peaks that a kernel is taken to reach."""
GAP = 1.3e-6
"""Seconds between two launches of a CUDA graph."""

Constants = dict[str, Any]


def _projection_backward(c: Constants, _: dict[str, Any]) -> int:
    return (c["BLOCK_M"] + c["BLOCK_N"]) * c["DEPTH"] + 2 * c["BLOCK_M"] * c["BLOCK_N"]


def _attention_backward_keys(c: Constants, a: dict[str, Any]) -> int:
    queries = 2 * a["length"] * c["HEADS"] // c["KV_HEADS"]
    return (4 * c["BLOCK_N"] + queries) * c["HEAD_DIM"]


def _weight_gradient(c: Constants, a: dict[str, Any]) -> int:
    splits = max(c[f"SPLITS{i}"] for i in range(4))
    rows = a["rows"] * (c["CHANNELS"] or 1)
    return (c["BLOCK_M"] + c["BLOCK_N"]) * rows // splits + 4 * c["BLOCK_M"] * c["BLOCK_N"]


# Elements of the compute dtype that one program loads and stores, of the kernels that load an operand many times.
_ELEMENTS: dict[str, Callable[[Constants, dict[str, Any]], int]] = {
    "qkv.qkv_kernel": lambda c, _: (c["TERMS"] * c["BLOCK_M"] + c["BLOCK_N"]) * c["D"] + c["BLOCK_M"] * c["BLOCK_N"],
    "attention.attention_kernel": lambda c, a: 2 * (c["BLOCK_M"] + a["length"]) * c["HEAD_DIM"],
    "attention_projection.attention_projection_kernel": lambda c, a: (
        (c["BLOCK_M"] + 2 * a["length"] + c["D"]) * c["HEADS"] * c["HEAD_DIM"] + 2 * c["BLOCK_M"] * c["D"]
    ),
    "projection.projection_kernel": lambda c, _: (c["BLOCK_M"] + c["D"]) * c["DEPTH"] + 2 * c["BLOCK_M"] * c["D"],
    "swiglu.swiglu_kernel": lambda c, _: (
        (c["BLOCK_M"] * ceil(c["INTER"] / c["BLOCK_I"]) + 3 * c["INTER"] + 2 * c["BLOCK_M"]) * c["D"]
    ),
    "swiglu.gate_up_kernel": lambda c, _: (c["BLOCK_M"] + 2 * c["BLOCK_I"]) * c["D"] + c["BLOCK_M"] * c["BLOCK_I"],
    "conv_swiglu.conv_projection_kernel": lambda c, _: (
        (c["TAPS"] * c["BLOCK_M"] + c["D"]) * c["INTER"] + 2 * c["BLOCK_M"] * c["D"]
    ),
    "mixer_mlp_t.mlp_t_kernel": lambda c, _: ((c["TERMS"] + 1) * c["BLOCK_C"] + 3 * c["INTER"]) * c["LENGTH"],
    "mixer_mlp_t.gate_up_t_kernel": lambda c, _: (
        (2 * c["BLOCK_I"] + c["TERMS"] * c["BLOCK_C"]) * c["LENGTH"] + c["BLOCK_I"] * c["BLOCK_C"]
    ),
    "mixer_mlp_t.down_t_kernel": lambda c, _: (
        (ceil(c["LENGTH"] / c["BLOCK_L"]) * c["BLOCK_C"] + c["LENGTH"]) * c["INTER"] + 4 * c["BLOCK_C"] * c["LENGTH"]
    ),
    "swiglu_backward.swiglu_backward_kernel": lambda c, _: (
        (2 * c["BLOCK_M"] + 3 * c["BLOCK_N"]) * c["DEPTH"] + 3 * c["BLOCK_M"] * c["BLOCK_N"]
    ),
    "projection_backward.projection_backward_kernel": _projection_backward,
    "attention_backward.attention_backward_keys_kernel": _attention_backward_keys,
    "attention_backward.attention_backward_queries_kernel": lambda c, a: (
        (4 * c["BLOCK_M"] + 2 * a["length"]) * c["HEAD_DIM"]
    ),
    "weight_gradient.weight_gradient_kernel": _weight_gradient,
    "conv_swiglu_backward.conv_swiglu_backward_kernel": lambda c, _: (
        (c["BLOCK_M"] + c["BLOCK_N"]) * c["DEPTH"] + (c["TAPS"] + 2) * c["BLOCK_M"] * c["BLOCK_N"]
    ),
    "conv_swiglu_backward.gate_up_backward_kernel": lambda c, _: (
        (c["BLOCK_M"] + 2 * c["BLOCK_N"]) * c["DEPTH"] + (c["TAPS"] + 2) * c["BLOCK_M"] * c["BLOCK_N"]
    ),
    "mixer_mlp_t_backward.mlp_t_backward_kernel": lambda c, _: (
        5 * c["BLOCK_N"] * c["LENGTH"] + 3 * c["INNER"] * c["LENGTH"]
    ),
    "mixer_mlp_t_backward.mlp_t_weight_gradient_kernel": lambda c, a: (
        2 * c["LENGTH"] * c["WIDTH"] * a["batches"] // c["SPLITS"] + 12 * c["BLOCK_I"] * c["LENGTH"]
    ),
}


def program_bytes(launch: Launch) -> float:
    """Bytes that one program of a launch loads and stores."""
    elements = _ELEMENTS.get(launch.kernel)
    if elements is None:
        return launch.nbytes / prod(launch.grid)
    return elements(dict(launch.constants), dict(launch.arguments)) * _dtype(launch).itemsize


def launch_time(gpu: Gpu, launch: Launch) -> float:
    """Seconds of one launch, without the gap before it."""
    programs, loads = prod(launch.grid), program_bytes(launch)
    flops = gpu.tensor_flops * TENSOR * (0.5 if _dtype(launch) == torch.float32 else 1.0)
    waves = ceil(programs / gpu.multiprocessors)
    wave = max(
        launch.flops / programs / (flops / gpu.multiprocessors),
        loads / (gpu.port_bandwidth * CACHE),
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
    buffers = [value for _, value in launch.arguments if isinstance(value, Buffer)]
    return min((buffer.dtype for buffer in buffers), key=lambda dtype: dtype.itemsize)
