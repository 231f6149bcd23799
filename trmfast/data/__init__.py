"""Trained models that come with trmfast, by name.  Imports no PyTorch."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["model_file", "model_names"]

FOLDER = Path(__file__).parent


def model_names() -> list[str]:
    """The names of the models, such as ``"sudoku-mlp"``."""
    return sorted(file.stem for file in FOLDER.glob("*.safetensors"))


def model_file(path: str | os.PathLike[str]) -> Path:
    """The file of a model that comes with trmfast, if ``path`` is its name and no file here has that name; else
    ``path``."""
    given = Path(path)
    packaged = FOLDER / f"{given}.safetensors"
    return packaged if given.name == str(given) and packaged.is_file() and not given.exists() else given
