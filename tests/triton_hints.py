"""Launches whole plans through Triton's own launch path, with a driver that does nothing and kernels that are empty.

Triton derives a kernel's assumptions from the launch that compiles it, and finds that kernel again by its key; what
``TRMFAST_CHECK_LAUNCHES=1`` compares at every launch (kernels/assumptions.py) is counted here.  ``PYTHONPATH=.:tests
TRMFAST_CHECK_LAUNCHES=1 python tests/triton_hints.py`` prints launches, kernels, assumptions and misaligned pointers as
JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from trmfast.kernels import assumptions
from trmfast.kernels.backward_plan import backward_plan
from trmfast.kernels.configurations import Configuration
from trmfast.kernels.forward_plan import Setting, forward_plan
from trmfast.kernels.plan import Plan, run

from trmfast.cases import Case, make_case

__all__ = ["Kernel", "cases", "main"]

seen = {"launches": 0, "kernels": 0, "assumptions": 0, "misaligned": 0}


class Driver:
    """What Triton asks of the active driver."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Kernel:
    """In the place of a compiled kernel: what it would be compiled from, and launches that are counted."""

    function, packed_metadata, metadata = 0, (), None

    def __init__(self, source: ASTSource) -> None:
        self.src = source
        seen["kernels"] += 1

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *arguments: Any) -> None:
        values = arguments[9:]  # after grid, stream, function, metadata and hooks
        seen["launches"] += 1
        seen["misaligned"] += sum(hasattr(v, "data_ptr") and v.data_ptr() % 16 != 0 for v in values)


def compile_nothing(
    self: Any, key: Any, signature: Any, device: int, constants: Any, options: Any, attributes: Any, *_: Any
) -> Any:
    """In the place of ``JITFunction._do_compile``."""
    del options
    kernel = self.device_caches[device][0][key] = Kernel(ASTSource(self, signature, constants, attributes))
    return kernel


def cases() -> Iterator[Case]:
    """Odd lengths and widths beside multiples of 16."""
    for length in (16, 13):
        for width, inner in ((48, 80), (36, 52)):
            sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": inner, "num_heads": 2, "length": length}
            for mixer in ("attention", "mlp_t"):
                for channel in ("swiglu", "conv_swiglu"):
                    yield make_case(
                        "odd", "urm", H_cycles=1, L_cycles=1, num_layers=1, batch=1, token_mixer=mixer,
                        channel_mixer=channel, **sizes,
                    )  # fmt: skip


def plans(case: Case) -> Iterator[Plan]:
    problem = case.problem
    setting = Setting(problem, 1, case.length, torch.bfloat16, case.rope, Configuration("sm_90", 132))
    yield forward_plan(setting, True).packed()
    needs = [True] * len(problem.program.states), problem.uses_x, [True] * problem.num_weights
    yield backward_plan(setting, *needs).plan.packed()


def counted(source: ASTSource, values: Any) -> int:
    found = check(source, values)
    seen["assumptions"] += found
    return found


check = assumptions.check


def main(compile_: Callable[..., Any] = compile_nothing, over: Iterable[Case] | None = None) -> dict[str, int]:
    """Launches every plan over aligned tensors, misaligned ones, and aligned ones again."""
    driver.set_active(Driver())
    JITFunction._do_compile = compile_
    assumptions.check = counted
    for case in cases() if over is None else over:
        for plan in plans(case):
            for shift in (0, 1, 0):
                sizes = plan.sizes().items()
                run(plan, {name: torch.zeros(size + shift, dtype=dtype)[shift:] for name, (size, dtype) in sizes})
    return seen


if __name__ == "__main__":
    print(json.dumps(main()))
