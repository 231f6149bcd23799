"""The record of the build: setup.py writes ``_build_info_*.json``, ``trmfast info`` and the backends read them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

__all__ = ["BuildInfo", "build_info"]


@dataclass(frozen=True)
class BuildInfo:
    """The record of one build of an extension, ``trmfast._cpu`` or ``trmfast._cuda``.

    Attributes:
        error: None if the extension was built, otherwise the reason in one line.
        log: the compiler's first error and the lines after it.
        compiler: the first line of the compiler's --version.
        targets: what it is compiled for: for the CPU pairs as "target/element", best first, for example
            "avx512_bf16/bf16"; for CUDA architectures, for example "sm_90".
        left_out: targets that this compiler cannot build, with the reason.
        sanitize: the sanitizers of an instrumented build, "" for a plain one.
    """

    error: str | None
    log: str = ""
    compiler: str = ""
    targets: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict, hash=False)
    sanitize: str = ""


@lru_cache(maxsize=2)
def build_info(engine: str = "cpu") -> BuildInfo:
    """The record of this installation for the engine ``"cpu"`` or ``"cuda"``; a source tree that was never installed
    says so in `error`."""
    path = Path(__file__).with_name(f"_build_info_{engine}.json")
    if not path.exists():
        return BuildInfo(error="the extension was never built here: run `pip install -e .` in the source tree")
    record = json.loads(path.read_text())
    return BuildInfo(**{**record, "targets": tuple(record.get("targets", ()))})
