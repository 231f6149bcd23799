"""The published configurations that ``trmfast bench`` runs, with their real inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from trmfast.benchmark.eager import EagerHRM, EagerTRM
from trmfast.models import HRM, TRM, ACTModel
from trmfast.puzzles import ARC_SIDE, arc_batch, sudoku_batch

__all__ = ["CONFIGS", "BenchConfig"]

COMMON: dict[str, Any] = {
    "hidden_size": 512,
    "num_heads": 8,
    "expansion": 4,
    "pos_encodings": "rope",
    "puzzle_emb_ndim": 512,
    "halt_max_steps": 16,
    "halt_exploration_prob": 0.1,
    "forward_dtype": "bfloat16",
}


@dataclass(frozen=True)
class BenchConfig:
    """One published configuration.

    Attributes:
        name: what options call it.
        title: what tables call it.
        family: ``"trm"`` or ``"hrm"``.
        puzzle: ``"arc"`` or ``"sudoku"``.
        batch: sequences by default, few enough for two cores.
        options: the configuration's keys beyond those that all share.
        check: (H_cycles, L_cycles) over which bfloat16 is compared with float64, or None for all.  Where rounding
            errors grow fast (mlp_t), eager PyTorch is too far off for a verdict over the whole program.
    """

    name: str
    title: str
    family: str
    puzzle: str
    batch: int
    options: dict[str, Any] = field(hash=False)
    check: tuple[int, int] | None = None

    def inputs(self, batch: int) -> dict[str, Tensor]:
        """A batch of real puzzles."""
        return arc_batch(batch)[0] if self.puzzle == "arc" else sudoku_batch(batch)

    def model(self, batch: int, fused: bool, overrides: dict[str, Any]) -> ACTModel:
        """The model with random weights: trmfast's, or eager PyTorch."""
        sizes: dict[str, Any] = (
            {"seq_len": ARC_SIDE**2, "vocab_size": 12, "num_puzzle_identifiers": 401}
            if self.puzzle == "arc"
            else {"seq_len": 81, "vocab_size": 11, "num_puzzle_identifiers": 1}
        )
        classes: dict[tuple[str, bool], type[ACTModel]] = {
            ("trm", True): TRM,
            ("trm", False): EagerTRM,
            ("hrm", True): HRM,
            ("hrm", False): EagerHRM,
        }
        config = {**COMMON, **sizes, **self.options, "batch_size": batch, **overrides}
        return classes[self.family, fused](config)


TRM_SUDOKU: dict[str, Any] = {"H_cycles": 3, "L_cycles": 6, "L_layers": 2}

CONFIGS: dict[str, BenchConfig] = {
    config.name: config
    for config in (
        BenchConfig("arc", "TRM ARC-AGI", "trm", "arc", 1, {"H_cycles": 3, "L_cycles": 4, "L_layers": 2}),
        BenchConfig("sudoku", "TRM Sudoku, attention", "trm", "sudoku", 8, TRM_SUDOKU),
        BenchConfig(
            *("sudoku-mlp", "TRM Sudoku, MLP", "trm", "sudoku", 8),
            {**TRM_SUDOKU, "mlp_t": True, "pos_encodings": "none"},
            check=(1, 2),
        ),
        BenchConfig(
            *("hrm-sudoku", "HRM Sudoku", "hrm", "sudoku", 8),
            {"H_cycles": 2, "L_cycles": 2, "H_layers": 4, "L_layers": 4},
        ),
    )
}
