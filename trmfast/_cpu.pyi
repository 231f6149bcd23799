"""The extension module that setup.py builds from csrc/cpu."""

from typing import Any

def __getattr__(name: str) -> Any: ...
