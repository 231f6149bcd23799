"""trmfast: recursive reasoning models (TRM, HRM and relatives) as one fused operation."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from trmfast.version import __version__

if TYPE_CHECKING:  # what type checkers and editors see; the table below says the same at run time
    from trmfast import nn
    from trmfast.checkpoint import load, save
    from trmfast.dropin.accelerate import accelerate, restore
    from trmfast.dropin.structure import UnsupportedModelError
    from trmfast.models import HRM, TRM, URM
    from trmfast.ops import recursion
    from trmfast.problem import Problem
    from trmfast.program import RecursionProgram, Update
    from trmfast.solving import Solver
    from trmfast.spec import BlockSpec, NetSpec

__all__ = [
    "HRM",
    "TRM",
    "URM",
    "BlockSpec",
    "NetSpec",
    "Problem",
    "RecursionProgram",
    "Solver",
    "UnsupportedModelError",
    "Update",
    "__version__",
    "accelerate",
    "load",
    "nn",
    "recursion",
    "restore",
    "save",
]

# Imported on first use, PyTorch with them: trmfast.runtime and the command line do without it.
_LAZY = {
    "BlockSpec": "trmfast.spec",
    "HRM": "trmfast.models",
    "NetSpec": "trmfast.spec",
    "Problem": "trmfast.problem",
    "RecursionProgram": "trmfast.program",
    "Solver": "trmfast.solving",
    "TRM": "trmfast.models",
    "URM": "trmfast.models",
    "UnsupportedModelError": "trmfast.dropin.structure",
    "Update": "trmfast.program",
    "accelerate": "trmfast.dropin.accelerate",
    "load": "trmfast.checkpoint",
    "recursion": "trmfast.ops",
    "restore": "trmfast.dropin.accelerate",
    "save": "trmfast.checkpoint",
}
_MODULES = ("backends", "nn", "ops", "problem", "program", "reference", "runtime", "spec")


if not TYPE_CHECKING:  # type checkers report unknown names only where they see no __getattr__

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return import_module(f"trmfast.{name}")
        if name not in _LAZY:
            raise AttributeError(f"module 'trmfast' has no attribute {name!r}")
        found = getattr(import_module(_LAZY[name]), name)
        globals()[name] = found  # the next use costs no import
        return found


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, *(name for name in globals() if name.startswith("__"))})


if "torch" in sys.modules:  # so that programs exported by torch.export find the operators when they are loaded
    import_module("trmfast.ops")
