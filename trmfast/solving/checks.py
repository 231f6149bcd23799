"""Checks of numeric arguments; an error is one line that names the argument."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np

__all__ = ["integer", "number"]


def integer(name: str, value: Any, least: int, most: int | None = None) -> int:
    """An integer from ``least`` to ``most``, or at least ``least``.

    Raises:
        TypeError: another type.
        ValueError: out of range.
    """
    accepted = f"from {least} to {most}" if most is not None else f">= {least}"
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: got {value!r}, accepted are integers {accepted}")
    if value < least or (most is not None and value > most):
        raise ValueError(f"{name}: got {value}, accepted are integers {accepted}")
    return int(value)


def number(name: str, value: Any, accepted: str = "numbers") -> float:
    """A number that is not NaN.

    Raises:
        TypeError: another type.
        ValueError: NaN.
    """
    if isinstance(value, bool) or not isinstance(value, (Real, np.floating)):
        raise TypeError(f"{name}: got {value!r}, accepted are {accepted}")
    if math.isnan(float(value)):
        raise ValueError(f"{name}: got nan, accepted are {accepted}")
    return float(value)
