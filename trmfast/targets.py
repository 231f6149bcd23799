"""The extension ``trmfast._cpu`` and the instruction sets that it runs on here.  Imports no PyTorch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType

try:
    from trmfast import _cpu as _extension
except ImportError as error:
    extension: ModuleType | None = None
    import_error = str(error)
else:
    extension = _extension
    import_error = ""

__all__ = ["TARGETS", "extension", "force_target", "import_error", "target_of", "targets"]

# Best first.  If a target is not compiled for an element, the next one below serves it.
TARGETS = ("amx", "amx_emulated", "avx512_bf16", "avx512_vnni", "avx512", "avx_vnni", "avx2", "portable")

_forced: str | None = os.environ.get("TRMFAST_CPU_ISA") or None


def targets() -> dict[str, str | None]:
    """Every target of this build, best first, with None if this machine runs it, otherwise the reason."""
    if extension is None:
        return {}
    compiled = {target for target, _ in extension.compiled_pairs()}
    return {target: extension.missing_reason(target) for target in TARGETS if target in compiled}


@contextmanager
def force_target(target: str | None) -> Iterator[None]:
    """Runs the engine on one target inside a ``with`` block; None lets it choose again.

    The environment variable ``TRMFAST_CPU_ISA`` does the same for a process.

    Raises:
        ValueError: the target is not compiled or the machine cannot run it.
    """
    global _forced
    before, _forced = _forced, target
    try:
        if target is not None:
            target_of("f32")
        yield
    finally:
        _forced = before


def target_of(element: str) -> str:
    """The target that computes in ``"f32"`` or ``"bf16"``: the best that this machine runs, or the one forced.

    Raises:
        ValueError: the forced target is not compiled or the machine cannot run it.
    """
    return _target_of(element, _forced)


@lru_cache(maxsize=32)
def _target_of(element: str, forced: str | None) -> str:
    assert extension is not None
    pairs = set(extension.compiled_pairs())
    if forced is not None:
        known = targets()
        accepted = ", ".join(target for target, reason in known.items() if reason is None)
        if forced not in known:
            raise ValueError(f"TRMFAST_CPU_ISA: got {forced!r}, accepted are {accepted}")
        missing = known[forced]
        if missing is not None:
            missing = missing.split(": ", 1)[-1]  # without the target's name
            raise ValueError(f"TRMFAST_CPU_ISA: got {forced!r}, but {missing}; accepted are {accepted}")
        candidates = TARGETS[TARGETS.index(forced) :]
    else:
        candidates = tuple(target for target in TARGETS if target != "amx_emulated")
    for target in candidates:
        if (target, element) in pairs and extension.missing_reason(target) is None:
            return target
    raise ValueError(f"TRMFAST_CPU_ISA: got {forced!r}, accepted are targets compiled for {element}")
