"""The metadata of trmfast's safetensors files: which model the tensors are of.  Imports no PyTorch."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["KEY", "LONGEST", "VALUES", "VERSION", "described", "naming", "shortened"]

KEY = "trmfast"  # of the safetensors metadata
VERSION = 1
LONGEST = 65536  # characters of the metadata; those of a published model are fewer than 1000

KINDS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "config": (dict,),
    "window": (str, int),
    "loss": (str, type(None)),
}
# Absent from files that trmfast wrote before it had them.
OPTIONAL: dict[str, tuple[type, ...]] = {
    "stored": (str,),  # the dtype that save was asked to store weights in
    "notes": (dict,),
}
VALUES = (str, int, float, bool, type(None))


def shortened(error: Exception) -> str:
    """A reason in one line of at most 200 characters: parsers quote what they read, which may be a whole file."""
    line = " ".join(str(error).split())
    return line if len(line) <= 200 else f"{line[:197]}..."


def described(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """What the metadata says: ``model``, ``config``, ``window`` and ``loss``, and ``stored`` and ``notes`` where they
    are there; None if trmfast did not write the file.

    The metadata has at most ``LONGEST`` characters, and every value of ``config`` and ``notes`` is a word, a number, a
    truth value or null.

    Raises:
        ValueError: it is damaged or of another version.
    """
    if KEY not in metadata:
        return None
    text = metadata[KEY]
    if len(text) > LONGEST:
        raise ValueError(f"path: the metadata of {path} has {len(text)} characters, accepted are up to {LONGEST}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"path: the metadata of {path} is not JSON: {shortened(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"path: the metadata of {path} is {_kind(found)}, accepted is an object")
    version = found.get("version")
    if type(version) is not int or version != VERSION:
        got = reprlib.repr(version)
        raise ValueError(f"path: {path} is of format version {got}, this trmfast reads version {VERSION}")
    absent = [name for name in KINDS if name not in found]
    if absent:
        raise ValueError(f"path: the metadata of {path} has no {', '.join(absent)}")
    for name, kinds in KINDS.items():
        _check(path, name, found[name], kinds)
    present = {name: kinds for name, kinds in OPTIONAL.items() if name in found}
    for name, kinds in present.items():
        _check(path, name, found[name], kinds)
    for table in ("config", *(name for name in present if name == "notes")):
        for name, value in found[table].items():
            _check(path, f"{table}[{reprlib.repr(name)}]", value, VALUES)
    return {name: found[name] for name in ("version", *KINDS, *present)}


def _check(path: Path, name: str, value: object, kinds: tuple[type, ...]) -> None:
    if type(value) not in kinds:
        accepted = ", ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"path: the metadata of {path} has {_kind(value)} as {name}, accepted are {accepted}")


def _kind(value: object) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


@contextmanager
def naming(argument: str, path: Path) -> Iterator[None]:
    """Names the argument in errors of the file system."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise type(error)(f"{argument}: got {path}, accepted are files that can be read: {reason}") from error
