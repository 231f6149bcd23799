"""Noise that depends only on the seed, the puzzle, the trajectory and the step."""

from __future__ import annotations

import numpy as np

__all__ = ["gaussian"]


def gaussian(seed: int, puzzle: int, trajectory: int, step: int, shape: tuple[int, ...], sigma: float) -> np.ndarray:
    """Normal noise of standard deviation ``sigma``, float32 of ``shape``.

    Philox is keyed by seed and puzzle and starts at a counter of trajectory and step, whose streams do not overlap.
    """
    bits = np.random.Philox(counter=[0, 0, step, trajectory], key=[seed, puzzle])
    noise = np.random.Generator(bits).standard_normal(shape, dtype=np.float32)
    noise *= np.float32(sigma)
    return noise
