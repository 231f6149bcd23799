"""How much memory training may take for activations instead of computing them again.  Imports no PyTorch."""

from __future__ import annotations

import reprlib
from typing import TypeAlias

__all__ = ["DEFAULT", "EVERYTHING", "Recompute", "budget_of", "recompute_of"]

Recompute: TypeAlias = bool | int | str
"""True: backward computes the gradient window again; False: nothing of it; else a number of bytes, or a size such as
``"256MB"``, that forward may keep."""

_DEFAULT_BYTES = 24 * 10**6

DEFAULT: Recompute = "24MB"
"""The reason for this size: docs/cpu.md, "Budget and measurements"."""

EVERYTHING = 2**63 - 1
"""The budget of ``recompute=False``."""

# Longest first: every name ends with B.
_UNITS = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1}
_MOST_DIGITS = 18

# The setting may come from a file.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def budget_of(recompute: Recompute) -> int:
    """The bytes of activations that forward may keep.

    Raises:
        TypeError: recompute is of another type.
        ValueError: it is negative, or no size.
    """
    if isinstance(recompute, bool):
        return 0 if recompute else EVERYTHING
    if isinstance(recompute, int):
        if recompute >= 0:
            return min(recompute, EVERYTHING)
    elif not isinstance(recompute, str):
        raise TypeError(_refusal(recompute))
    elif recompute == DEFAULT:
        return _DEFAULT_BYTES  # at once: nearly every call comes here
    else:
        # String methods and no regular expression: torch.compile traces this.
        for unit, size in _UNITS.items():
            if recompute.upper().endswith(unit):
                number = recompute[: -len(unit)].removesuffix(" ")
                if len(number) <= _MOST_DIGITS and number.replace(".", "", 1).isdecimal() and number.isascii():
                    return min(int(float(number) * size), EVERYTHING)
                break
    raise ValueError(_refusal(recompute))


def recompute_of(text: str) -> Recompute:
    """The setting that a text of the command line stands for.

    Raises:
        ValueError: it stands for none.
    """
    setting: Recompute = {"True": True, "False": False}.get(text, int(text) if text.isdecimal() else text)
    budget_of(setting)
    return setting


def _refusal(got: object) -> str:
    return f"recompute: got {_SHORT.repr(got)}, accepted are True, False, a number of bytes or a size such as '256MB'"
