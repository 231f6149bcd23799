"""What ``trmfast bench --suite`` runs: cases of the one problem list, with batch, dtype, steps and rivals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from trmfast.benchmark import gpu
from trmfast.benchmark.rivals import implementation_of
from trmfast.cases import Case, find_case, make_case

__all__ = ["BOTH", "GPU_BATCHES", "SUITES", "Suite", "Work", "title"]

BF16, F32, INT8 = torch.bfloat16, torch.float32, torch.int8
FORWARD, BOTH = ("forward",), ("forward", "training")
TORCH = ("eager", "compile")
ENGINES = (*TORCH, "openvino", "onnxruntime")
ALL = (*TORCH, "max-autotune", "openvino", "onnxruntime")

TITLES = {
    "trm-sudoku-att": "TRM Sudoku, attention",
    "trm-sudoku-mlp": "TRM Sudoku, MLP",
    "trm-arc-att": "TRM ARC and Maze",
    "hrm-sudoku": "HRM Sudoku",
    "hrm-arc": "HRM ARC",
    "urm-arc": "URM ARC",
    "trm-small-att": "small TRM (D=128), attention",
    "trm-small-mlp": "small TRM (D=128), MLP",
    "block-att-97": "one block, attention",
    "block-att-916": "one block, attention",
    "block-mlp-97": "one block, MLP",
    "block-conv-97": "one block, ConvSwiGLU",
    "trm-deep-256": "TRM Sudoku, 256 updates",
    "hrm-text-net": "one network of HRM-Text B",
}


def title(case: str) -> str:
    """What tables and charts call a case."""
    return TITLES.get(case, case)


@dataclass(frozen=True)
class Work:
    """One line of a suite.

    Attributes:
        case: problem, batch and length.
        dtype: of the products by weights; states are bfloat16 where it is int8.
        steps: ``"forward"``, the recursion without gradients, and ``"training"``, forward and backward.
        rivals: names in :data:`trmfast.benchmark.rivals.RIVALS`.
        device: ``"cpu"`` or ``"cuda"``.
    """

    case: Case
    dtype: torch.dtype
    steps: tuple[str, ...]
    rivals: tuple[str, ...]
    device: str = "cpu"

    @property
    def place(self) -> torch.device:
        """The device, a GPU with its number."""
        return torch.device("cpu") if self.device == "cpu" else gpu.current()

    @property
    def dtype_name(self) -> str:
        return {BF16: "bf16", F32: "fp32", INT8: "int8"}[self.dtype]

    @property
    def state_dtype(self) -> torch.dtype:
        """The compute dtype."""
        return BF16 if self.dtype == INT8 else self.dtype

    def __str__(self) -> str:
        return f"{title(self.case.name)}, B={self.case.batch}, L={self.case.length}, {self.dtype_name}"


@dataclass(frozen=True)
class Suite:
    """Attributes:
    works: what is run, in order.
    seconds: time to aim at on two cores.
    scaling: whether cost against batch, length and depth is measured too.
    device: of its works.
    """

    works: tuple[Work, ...]
    seconds: float
    scaling: bool = False
    device: str = "cpu"

    def on(self, device: str) -> Suite:
        """The same on another device."""
        return replace(self, works=tuple(replace(work, device=device) for work in self.works), device=device)

    def tiny(self) -> Suite:
        """The same at width 64 and one sequence a case, for tests."""
        return replace(self, works=tuple(replace(work, case=_tiny(work.case)) for work in self.works))


def _work(
    name: str, batch: int, dtype: torch.dtype = BF16, steps: tuple[str, ...] = BOTH, rivals: tuple[str, ...] = TORCH
) -> Work:
    return Work(replace(find_case(name), batch=batch), dtype, steps, rivals)


def _tiny(case: Case) -> Case:
    block = case.problem.nets[0].block
    sizes: dict[str, Any] = {"length": min(case.length, 20), "token_mixer": block.token_mixer}
    model = case.name.split("-")[0]
    return make_case(
        case.name,
        model if model in ("trm", "hrm", "urm") else "urm",
        H_cycles=1,
        channel_mixer=block.channel_mixer,
        num_layers=1,
        batch=min(case.batch, 2),
        causal=block.causal,
        final_norm=case.problem.nets[0].final_norm,
        norm_placement=block.norm_placement,
        gate=block.gate,
        **sizes,
    )


QUICK = (
    _work("trm-sudoku-att", 8, rivals=(*TORCH, "openvino")),
    _work("trm-sudoku-mlp", 8),
    _work("trm-arc-att", 1, rivals=("eager",)),
    _work("hrm-sudoku", 8, rivals=("eager",)),
    _work("trm-small-att", 8, rivals=("eager",)),
    _work("block-att-97", 8, steps=FORWARD, rivals=("eager",)),
    _work("trm-sudoku-att", 8, F32, FORWARD, rivals=("eager", "onnxruntime")),
)

STANDARD = (
    _work("trm-sudoku-att", 8, rivals=(*TORCH, "openvino")),
    _work("trm-sudoku-att", 1),
    _work("trm-sudoku-mlp", 8),
    _work("trm-arc-att", 1),
    _work("hrm-sudoku", 8),
    _work("hrm-arc", 1, rivals=("eager",)),
    _work("urm-arc", 1, rivals=("eager",)),
    _work("trm-small-att", 8),
    _work("block-att-97", 8, rivals=("eager",)),
    _work("block-mlp-97", 8, rivals=("eager",)),
    _work("trm-deep-256", 1, steps=FORWARD, rivals=("eager",)),
    _work("trm-sudoku-att", 8, F32, rivals=("eager", "onnxruntime")),
)

FULL = (
    _work("trm-sudoku-att", 8, rivals=ALL),
    _work("trm-sudoku-mlp", 8, rivals=ALL),
    _work("trm-arc-att", 1, rivals=ALL),
    _work("hrm-sudoku", 8, rivals=ALL),
    _work("hrm-arc", 1),
    _work("urm-arc", 1),
    _work("trm-sudoku-att", 1, rivals=(*TORCH, "openvino")),
    _work("trm-sudoku-att", 64, steps=FORWARD, rivals=("eager",)),
    _work("trm-small-att", 1),
    _work("trm-small-att", 8, rivals=(*TORCH, "openvino")),
    _work("trm-small-att", 64, rivals=("eager",)),
    _work("trm-small-mlp", 8),
    _work("trm-deep-256", 1, steps=FORWARD, rivals=(*TORCH, "openvino")),
    _work("trm-sudoku-att", 8, F32, rivals=ENGINES),
    _work("trm-arc-att", 1, F32, FORWARD, rivals=("eager", "onnxruntime")),
    _work("hrm-sudoku", 8, F32, FORWARD, rivals=("eager", "onnxruntime")),
    _work("block-att-97", 8),
    _work("block-att-916", 1, rivals=("eager",)),
    _work("block-mlp-97", 8),
    _work("block-conv-97", 8, rivals=("eager",)),
)

BLOCKS = tuple(
    _work(name, batch, rivals=("eager",))
    for name, batch in (("block-att-97", 8), ("block-att-916", 1), ("block-mlp-97", 8), ("block-conv-97", 8))
)

INT8_WORKS = tuple(
    _work(name, batch, INT8, FORWARD, rivals=("trmfast-bf16",))
    for batch in (1, 8)
    for name in ("trm-sudoku-att", "trm-sudoku-mlp", "trm-small-att", "trm-small-mlp")
)

# One GPU: latency, a small batch, and the published global batch over the published number of GPUs.
GPU_BATCHES = {
    "trm-sudoku-att": (8, 1, 768),
    "trm-sudoku-mlp": (8, 1, 768),
    "trm-arc-att": (1, 8, 192),
    "hrm-sudoku": (8, 1, 384),
    "hrm-arc": (1, 8, 96),
    "urm-arc": (1, 8, 96),
}
GPU_RIVALS = (*TORCH, implementation_of(False))
GPU_WORKS = tuple(
    replace(_work(name, batches[place], rivals=GPU_RIVALS), device="cuda")
    for place in range(3)
    for name, batches in GPU_BATCHES.items()
)

LOOPED_WORKS = (_work("hrm-text-net", 2),)

SUITES: dict[str, Suite] = {
    "quick": Suite(QUICK, 120),
    "standard": Suite(STANDARD, 400),
    "full": Suite(FULL, 800, scaling=True),
    "blocks": Suite(BLOCKS, 60),
    "int8": Suite(INT8_WORKS, 90),
    "looped": Suite(LOOPED_WORKS, 120),
    "scaling": Suite((), 120, scaling=True),
    "gpu": Suite(GPU_WORKS, 800, device="cuda"),
}
