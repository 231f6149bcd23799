"""What a user could run a recursion with: eager PyTorch, compilers, inference engines, and trmfast.

All get the same states, x and float32 weights.  All run any program over their networks, except OpenVINO when it
compiles the whole recursion as one graph.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from importlib.util import find_spec
from typing import cast

import torch
from torch import Tensor, nn

from trmfast.benchmark.eager import EagerRecursion
from trmfast.benchmark.inference_rivals import MaxAutotune, OnnxRuntime, OpenVino
from trmfast.benchmark.runner import Runner, Trained, descend, rope_tables
from trmfast.budget import DEFAULT, Recompute, recompute_of
from trmfast.cases import Inputs
from trmfast.ops import recursion
from trmfast.program import RecursionProgram

__all__ = [
    "RIVALS",
    "TITLES",
    "Fused",
    "Runner",
    "Trained",
    "descend",
    "implementation_of",
    "in_order",
    "is_ours",
    "missing",
    "runner_of",
    "title_of",
]


class Fused(Trained):
    title = "trmfast"
    recompute: Recompute = DEFAULT

    def __init__(self, inputs: Inputs, threads: int) -> None:
        super().__init__(inputs, threads)
        self.weights = [nn.Parameter(weight.clone()) for weight in inputs.weights]

    def recur(self, x: Tensor | None, program: RecursionProgram) -> Sequence[Tensor]:
        i = self.inputs
        return recursion(program, i.problem.nets, i.states, x, self.weights, i.cos, i.sin, recompute=self.recompute)


class FusedInt8(Fused):
    """trmfast where the work is int8: inference alone."""

    steps = ("forward",)
    dtypes = (torch.int8,)

    def recur(self, x: Tensor | None, program: RecursionProgram) -> Sequence[Tensor]:
        i = self.inputs
        return recursion(program, i.problem.nets, i.states, x, self.weights, i.cos, i.sin, dtype="int8")


class FusedBf16(Fused):
    """What int8 is compared with: the same states with bf16 operands."""

    title = "trmfast bf16"
    steps = ("forward",)
    dtypes = (torch.int8,)


class Eager(Trained):
    title = "PyTorch eager"

    def __init__(self, inputs: Inputs, threads: int) -> None:
        super().__init__(inputs, threads)
        self.model = EagerRecursion(inputs.problem, inputs.weights, rope_tables(inputs))
        self.weights = list(self.model.parameters())

    def recur(self, x: Tensor | None, program: RecursionProgram) -> Sequence[Tensor]:
        return cast(Sequence[Tensor], self.model(self.inputs.states, x, program))


class Compiled(Eager):
    """Each network compiled, its weights cast once a step; on a GPU as CUDA graphs."""

    title = "torch.compile"

    def __init__(self, inputs: Inputs, threads: int) -> None:
        super().__init__(inputs, threads)
        self.graphs = inputs.states[0].is_cuda
        self.model.stacks.compile("network", self.graphs)
        self.note = "network by network, CUDA graphs" if self.graphs else "network by network"

    def recur(self, x: Tensor | None, program: RecursionProgram) -> Sequence[Tensor]:
        if not self.graphs:
            return super().recur(x, program)
        torch.compiler.cudagraph_mark_step_begin()
        return [state.clone() for state in super().recur(x, program)]  # graphs overwrite what they returned

    def forward(self, program: RecursionProgram | None = None) -> Sequence[Tensor]:
        if self.graphs:
            self.drop_gradients()  # they lie in memory of the graphs
        return super().forward(program)


RIVALS: dict[str, type[Runner]] = {
    "eager": Eager,
    "compile": Compiled,
    "max-autotune": MaxAutotune,
    "openvino": OpenVino,
    "onnxruntime": OnnxRuntime,
    "trmfast-bf16": FusedBf16,
    "trmfast": Fused,
}
"""Implementations of a recursion by name, trmfast the last."""

TITLES = {name: kind.title for name, kind in RIVALS.items()}
"""What tables and charts call an implementation, in their order; see :func:`title_of`."""

_SETTING = "recompute="


def implementation_of(recompute: Recompute) -> str:
    """The name of trmfast with a setting of ``recompute`` other than the default."""
    return f"{_SETTING}{recompute}"


def is_ours(name: str) -> bool:
    """Whether an implementation is trmfast, with whatever setting, and no rival."""
    return name == "trmfast" or name.startswith(_SETTING)


def title_of(name: str) -> str:
    """What tables and charts call an implementation."""
    return f"trmfast, {name}" if name.startswith(_SETTING) else TITLES[name]


def in_order(names: Collection[str]) -> list[str]:
    """Implementations in the order of tables and charts: trmfast and its settings last."""
    return [*(name for name in TITLES if name in names), *(name for name in names if name not in TITLES)]


def runner_of(name: str, dtype: torch.dtype) -> type[Runner]:
    """The implementation of that name, in a dtype of products."""
    if name.startswith(_SETTING):
        setting = recompute_of(name.removeprefix(_SETTING))
        return type("FusedSetting", (Fused,), {"title": title_of(name), "steps": ("training",), "recompute": setting})
    return FusedInt8 if (name, dtype) == ("trmfast", torch.int8) else RIVALS[name]


def missing(name: str, dtype: torch.dtype, device: str = "cpu") -> str | None:
    """None, or why an implementation does not run in a dtype on a device here."""
    kind = runner_of(name, dtype)
    if device not in kind.device_types:
        return f"it runs on {', '.join(kind.device_types)}, not on {device}"
    absent = [module for module in kind.modules if find_spec(module) is None]
    if absent:
        return f"{', '.join(absent)} not installed, `pip install 'trmfast[rivals]'` installs it"
    if dtype not in kind.dtypes:
        return f"it computes in {', '.join(str(d).removeprefix('torch.') for d in kind.dtypes)}"
    return None
