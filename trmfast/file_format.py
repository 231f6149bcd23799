"""The metadata of trmfast's safetensors files: which model the tensors are of.  Imports no PyTorch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["KEY", "VERSION", "described", "naming"]

KEY = "trmfast"  # of the safetensors metadata
VERSION = 1


def described(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """What the metadata says: ``model``, ``config``, ``window`` and ``loss``; None if trmfast did not write the file.

    Raises:
        ValueError: it is damaged or of another version.
    """
    if KEY not in metadata:
        return None
    try:
        found = json.loads(metadata[KEY])
    except ValueError as error:
        raise ValueError(f"path: the metadata of {path} is not JSON: {error}") from error
    version = found.get("version") if isinstance(found, dict) else None
    if version != VERSION:
        raise ValueError(f"path: {path} is of format version {version}, this trmfast reads version {VERSION}")
    absent = [name for name in ("model", "config", "window", "loss") if name not in found]
    if absent:
        raise ValueError(f"path: the metadata of {path} has no {', '.join(absent)}")
    result: dict[str, Any] = found
    return result


@contextmanager
def naming(argument: str, path: Path) -> Iterator[None]:
    """Names the argument in errors of the file system."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise type(error)(f"{argument}: got {path}, accepted are files that can be read: {reason}") from error
