"""trmfast: recursive reasoning models (TRM, HRM and relatives) as one fused operation."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from trmfast import nn
from trmfast.ops import recursion
from trmfast.problem import Problem
from trmfast.program import RecursionProgram, Update
from trmfast.spec import BlockSpec, NetSpec
from trmfast.version import __version__

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

# Imported on first use: the models need packages that the operators do not.
_LAZY = {
    "HRM": "trmfast.models",
    "Solver": "trmfast.solving",
    "TRM": "trmfast.models",
    "URM": "trmfast.models",
    "UnsupportedModelError": "trmfast.dropin",
    "accelerate": "trmfast.dropin",
    "load": "trmfast.checkpoint",
    "restore": "trmfast.dropin",
    "save": "trmfast.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'trmfast' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
