"""The protocol between the solving loop and a model: rows of states that take supervision steps together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

__all__ = ["Batch", "Evaluator", "Step"]


class Step(NamedTuple):
    """The outcome of one supervision step for every row.

    Attributes:
        predictions: token ids, int32 [B, S].
        q_halt: the Q head's halting logit, float32 [B]; None without a Q head.
        margin: the logit that the model's published rule compares with 0, float32 [B]: ``q_halt``, or for models that
            learn when to continue ``q_halt - q_continue``; None without a Q head.
    """

    predictions: np.ndarray
    q_halt: np.ndarray | None
    margin: np.ndarray | None


class Batch(Protocol):
    """The active rows.  A row's states and steps never depend on the other rows."""

    def update(self, keep: Sequence[int], inputs: np.ndarray, identifiers: np.ndarray) -> None:
        """Keeps some rows, in ascending order, and appends new ones in their initial states.

        Args:
            keep: indices of rows.
            inputs: token ids of the new rows, int32 [N, S].
            identifiers: their puzzle identifiers, int32 [N].
        """

    def step(self, noise: np.ndarray | None) -> Step:
        """One supervision step of every row.

        Args:
            noise: float32 [B, *noise_shape], added to the latent states before the step and rounded with them to the
                compute dtype; None for none.
        """


@runtime_checkable
class Evaluator(Protocol):
    """A model for the solving loop."""

    @property
    def seq_len(self) -> int:
        """Tokens S of a puzzle."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""

    @property
    def num_identifiers(self) -> int:
        """Rows of the puzzle embedding; 0 if the model has none."""

    @property
    def has_q_head(self) -> bool:
        """Whether steps return ``q_halt``."""

    @property
    def halt_max_steps(self) -> int:
        """The supervision steps of the published evaluation."""

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape (states, L, D) of one row's noise: the states that the heads do not read, or the only state."""

    def new_batch(self) -> Batch:
        """A batch without rows."""
