"""Cases through the Triton backend with PTX instead of the interpreter, and their kernels with barriers left out.

Products of float32 are also TF32; then eager PyTorch rounds its operands as ``mma`` reads them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from trmfast.kernels import plan as kernel_plan
from trmfast.kernels.configurations import Configuration, Sizes
from trmfast.kernels.plan import Launch, Tile

from ptx_plans import ARCHITECTURE, Executor, Recorded
from ptx_tools import PtxError, Schedule
from trmfast.backends import triton as backend
from trmfast.cases import Case, make_inputs
from trmfast.problem import Problem
from trmfast.program import RecursionProgram
from trmfast.testing import (
    compare_results,
    default_weight_scale,
    pool,
    require,
    run_eager,
    run_fused,
    run_truth,
)

__all__ = [
    "BARRIER",
    "MODES",
    "SCHEDULES",
    "OneTile",
    "one_update",
    "record",
    "required_barriers",
    "run_case",
    "without",
]

MODES = {
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
}
SCHEDULES = (Schedule(), Schedule("reverse"), Schedule("random", 1), Schedule("random", 2))


@dataclass(frozen=True)
class OneTile(Configuration):
    """Takes the tile of an index, or the last, wherever the model of time would choose one."""

    index: int = 0

    def launch(self, kernel: str, sizes: Sizes, build: Callable[[Tile], Launch]) -> Launch:
        tiles = self.tiles(kernel, sizes)
        return build(tiles[min(self.index, len(tiles) - 1)])


def one_update(case: Case, which: int) -> Case:
    """The case with one of its updates alone."""
    program = case.problem.program
    alone = RecursionProgram(program.states, program.nets, (program.updates[which],), 1)
    return replace(case, problem=Problem(alone, case.problem.nets))


def run_case(
    executor: Executor,
    case: Case,
    mode: str,
    fusion: str,
    schedule: Schedule,
    *,
    seeds: int = 2,
    scale: float | None = None,
    tile: int | None = None,
    recompute: bool = True,
) -> None:
    """Runs a case as PTX under a schedule and compares it with the truth by the policy."""
    dtype, tf32 = MODES[mode]
    configuration = Configuration(ARCHITECTURE, fusion=fusion)
    if tile is not None:
        configuration = OneTile(ARCHITECTURE, fusion=fusion, index=tile)
    setting = backend._setting
    executor.schedule = schedule
    # Half of the runs round products to zero, which a device may do.
    executor.truncate_mma = schedule.order != "forward"
    weight_scale = default_weight_scale(dtype) if scale is None else scale
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "_configuration", lambda _: configuration)
        patch.setattr(backend, "_setting", lambda *values: replace(setting(*values), tf32=tf32))
        patch.setattr(kernel_plan, "run", executor.run)
        for seed in range(5 if mode == "float32" else seeds):
            inputs = make_inputs(case, dtype, seed, weight_scale=weight_scale)
            with Tf32Products() if tf32 else nullcontext():
                eager = run_eager(inputs)
            found.append(compare_results(run_fused(inputs, "triton", recompute=recompute), eager, run_truth(inputs)))
    require(pool(found))


class Tf32Products(TorchDispatchMode):
    """Matrix products of float32 lose the low 13 bits of their operands, which ``mma`` ignores."""

    PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm)

    def __enter__(self) -> Tf32Products:
        self._stack = ExitStack()
        self._stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in self.PRODUCTS:
            args = (*args[:-2], *(cut(value) for value in args[-2:]))
        return func(*args, **(kwargs or {}))


def cut(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.float32:
        return tensor
    return (tensor.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


# ---- launches by themselves, and what is left out of their text


def record(executor: Executor, case: Case, fusion: str = "least", backward: bool = False) -> dict[str, Recorded]:
    """The first launch of each kernel of a case in bfloat16, with what it found in memory, by the kernel's name."""
    executor.schedule, executor.recorded = SCHEDULES[0], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "_configuration", lambda _: Configuration(ARCHITECTURE, fusion=fusion))
        patch.setattr(kernel_plan, "run", executor.run)
        run_fused(make_inputs(case, torch.bfloat16), "triton", backward=backward)
    found, executor.recorded = executor.recorded, None
    assert found is not None
    return {launch.compiled.name: launch for launch in reversed(found)}


def without(text: str, pattern: str, which: int, instead: str = "") -> str:
    """The text with one match of a pattern replaced."""
    found = list(re.finditer(pattern, text))[which]
    return text[: found.start()] + found.expand(instead) + text[found.end() :]


BARRIER = r"bar\.sync\s+0;"


def required_barriers(executor: Executor, launch: Recorded) -> tuple[list[int], int]:
    """Which barriers of a kernel are missed when they are left out, each by itself, and how many there are."""
    text = launch.compiled.ptx
    count = len(re.findall(BARRIER, text))
    found = []
    for i in range(count):
        try:
            executor.again(launch, without(text, BARRIER, i), SCHEDULES[1])
        except PtxError:
            found.append(i)
    return found, count
