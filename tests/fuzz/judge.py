"""Examines one trial under one variant with a choice of checks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .checks import CHECKS, Run, Tally
from .poison import poisoned_allocations
from .trial import Trial
from .variant import Variant

__all__ = ["Finding", "examine"]


@dataclass(frozen=True)
class Finding:
    """What is wrong.

    Attributes:
        check: the name of the check.
        wrong: the tensors, in words.
    """

    check: str
    wrong: tuple[str, ...]

    def __str__(self) -> str:
        more = f" and {len(self.wrong) - 3} more" if len(self.wrong) > 3 else ""
        return f"{self.check}: {'; '.join(self.wrong[:3])}{more}"


def examine(
    trial: Trial, variant: Variant, checks: Iterable[str] = tuple(CHECKS), tally: Tally | None = None
) -> list[Finding]:
    """The faults of a trial under a variant; empty if the engine is right.

    Args:
        trial, variant: what to run, and how.
        checks: names of :data:`CHECKS`, all by default.
        tally: counts are added to it.
    """
    run = Run(trial, variant)
    found = []
    with poisoned_allocations():
        for check in checks:
            try:
                wrong = CHECKS[check](run)
            except Exception as error:
                wrong = [f"raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]
            if wrong:
                found.append(Finding(check, tuple(wrong)))
    if tally is not None:
        tally.tensors += run.tally.tensors
        tally.unjudged += run.tally.unjudged
    return found
