"""trmfast: recursive reasoning models (TRM, HRM and relatives) as one fused operation."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from trmfast.version import __version__

if TYPE_CHECKING:
    from trmfast import nn
    from trmfast.ops import recursion
    from trmfast.problem import Problem
    from trmfast.program import RecursionProgram, Update
    from trmfast.spec import BlockSpec, NetSpec

__all__ = [
    "BlockSpec",
    "NetSpec",
    "Problem",
    "RecursionProgram",
    "Update",
    "__version__",
    "nn",
    "recursion",
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
    "UnsupportedModelError": "trmfast.dropin",
    "Update": "trmfast.program",
    "accelerate": "trmfast.dropin",
    "load": "trmfast.checkpoint",
    "recursion": "trmfast.ops",
    "restore": "trmfast.dropin",
    "save": "trmfast.checkpoint",
}
_MODULES = ("backends", "nn", "ops", "problem", "program", "reference", "runtime", "spec")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"trmfast.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'trmfast' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


if "torch" in sys.modules:  # so that programs exported by torch.export find the operators when they are loaded
    import_module("trmfast.ops")
