"""Budgets of training on the CPU engine that keep so much and no more."""

from __future__ import annotations

import torch

from trmfast.backends import BACKENDS
from trmfast.cases import Case

__all__ = ["budget_with_outputs", "budget_with_pairs"]


def budget_with_outputs(case: Case, dtype: torch.dtype, outputs: int) -> int:
    """The bytes of the outputs of the blocks of so many (update, sequence) pairs."""
    return outputs * BACKENDS["cpu"].output_bytes(case.problem, dtype, case.length)


def budget_with_pairs(case: Case, dtype: torch.dtype, pairs: int) -> int:
    """The bytes of so many whole pairs and of the outputs of all others."""
    others = case.problem.num_grad_updates * case.batch - pairs
    size = BACKENDS["cpu"].pair_bytes(case.problem, dtype, case.length)
    return pairs * size + budget_with_outputs(case, dtype, others)
