"""The extension module that setup.py builds from csrc/cuda."""

from typing import Any

def __getattr__(name: str) -> Any: ...
