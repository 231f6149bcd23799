"""The fused recursion in existing models: recognised, swapped in, and swapped out."""

from trmfast.dropin.accelerate import accelerate, restore
from trmfast.dropin.structure import UnsupportedModelError

__all__ = ["UnsupportedModelError", "accelerate", "restore"]
