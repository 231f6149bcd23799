"""Checks at every launch what the kernel that Triton chose assumes of addresses and sizes; without a GPU.

Launches plans through Triton's own launch path, with a driver that does nothing: Triton derives a kernel's assumptions
from the launch that compiles it, and finds that kernel again by its key.  ``PYTHONPATH=.:tests python
tests/triton_hints.py`` prints launches, kernels, assumptions and misaligned pointers as JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from trmfast.kernels.backward_plan import backward_plan
from trmfast.kernels.configurations import Configuration
from trmfast.kernels.forward_plan import Setting, forward_plan
from trmfast.kernels.plan import Plan, run

from trmfast.cases import Case, make_case

__all__ = ["Kernel", "main"]

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
    """In the place of a compiled kernel: it knows what was assumed, and compares at every launch.

    Args:
        name: of the function.
        assumed: by place among the arguments, and within tuples.
        constants: values that the compiler was given, by the same places.
    """

    function, packed_metadata, metadata = 0, (), None

    def __init__(self, name: str, assumed: dict[tuple[int, ...], Any], constants: dict[tuple[int, ...], Any]) -> None:
        self.name, self.assumed, self.constants = name, assumed, constants
        seen["kernels"] += 1

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *arguments: Any) -> None:
        values = arguments[9:]  # after grid, stream, function, metadata and hooks
        seen["launches"] += 1
        seen["misaligned"] += sum(hasattr(v, "data_ptr") and v.data_ptr() % 16 != 0 for v in values)
        for place, attributes in self.assumed.items():
            value = _at(values, place)
            number = value.data_ptr() if hasattr(value, "data_ptr") else value
            for name, size in attributes:
                assert name == "tt.divisibility", f"{self.name}: {name} is not checked"
                assert number % size == 0, f"{self.name}: argument {place} is {number}, assumed is a multiple of {size}"
                seen["assumptions"] += 1
        for place, constant in self.constants.items():
            value = _at(values, place)
            assert value == constant, f"{self.name}: argument {place} is {value}, assumed is {constant}"


def _at(values: Any, place: tuple[int, ...]) -> Any:
    for index in place:
        values = values[index]
    return values


def compile_nothing(
    self: Any, key: Any, signature: Any, device: int, constants: Any, options: Any, attributes: Any, *_: Any
) -> Any:
    """In the place of ``JITFunction._do_compile``."""
    del signature, options
    kernel = Kernel(self.__name__, attributes, constants)
    self.device_caches[device][0][key] = kernel
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


def main(compile_: Callable[..., Any] = compile_nothing) -> dict[str, int]:
    """Launches every plan over aligned tensors, misaligned ones, and aligned ones again."""
    driver.set_active(Driver())
    JITFunction._do_compile = compile_
    for case in cases():
        for plan in plans(case):
            for shift in (0, 1, 0):
                sizes = plan.sizes().items()
                run(plan, {name: torch.zeros(size + shift, dtype=dtype)[shift:] for name, (size, dtype) in sizes})
    return seen


if __name__ == "__main__":
    print(json.dumps(main()))
