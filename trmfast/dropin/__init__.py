"""The fused recursion in models that exist already: recognised, swapped in, and out again."""

from trmfast.dropin.accelerate import accelerate, restore
from trmfast.dropin.structure import UnsupportedModelError

__all__ = ["UnsupportedModelError", "accelerate", "restore"]
