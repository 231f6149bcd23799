"""The rules that decide when a row halts."""

from __future__ import annotations

from dataclasses import dataclass

from trmfast.solving.checks import integer, number

__all__ = ["Confident", "Halting", "Never", "Unchanged"]


@dataclass(frozen=True)
class Confident:
    """Halts when the Q head's logit is above a threshold; 0 is the published rule of training.

    The logit is ``q_halt`` for TRM and URM, and ``q_halt - q_continue`` for models that learn when to continue (HRM).

    Attributes:
        threshold: a number; infinity never halts.

    Raises:
        TypeError: ``threshold`` is not a number.
        ValueError: it is NaN.
    """

    threshold: float = 0.0

    def __post_init__(self) -> None:
        number("threshold", self.threshold)


@dataclass(frozen=True)
class Unchanged:
    """Halts when the prediction has been the same for some steps; needs no Q head.

    Attributes:
        steps: how many steps in a row repeat the prediction of the step before them.

    Raises:
        TypeError: ``steps`` is not an integer.
        ValueError: it is below 1.
    """

    steps: int = 2

    def __post_init__(self) -> None:
        integer("steps", self.steps, 1)


@dataclass(frozen=True)
class Never:
    """Takes the maximum number of steps, as the published evaluation does."""


Halting = Confident | Unchanged | Never
