"""Chooses tiles by timing them once on the GPU at hand, and keeps the winners in a file.

Off unless ``TRMFAST_TUNE=1`` is set when a plan is made; then kernels/configurations.py asks a :class:`Tuner` instead
of the time model.  An entry is valid for a GPU, a version of Triton, the source of kernels/ and the candidate
launches, without their optional results: backward must recompute forward with the same tiles.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from trmfast.kernels.plan import Launch, Plan, run

__all__ = ["Tuner", "cache_file", "time_launch"]


def cache_file() -> Path:
    """Where winners are kept: ``TRMFAST_TUNING_CACHE``, or a file in the user's cache folder."""
    asked = os.environ.get("TRMFAST_TUNING_CACHE")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(asked) if asked else folder / "trmfast" / "tuning.json"


class Tuner:
    """Chooses between launches that do the same.

    Args:
        file: where winners are kept; made when the first one is found.
        device: identifies the GPU: its name and the version of Triton.
        timer: seconds of a launch.
    """

    def __init__(self, file: Path, device: str, timer: Callable[[Launch], float]) -> None:
        self.file, self.device, self.timer = file, device, timer
        self._found: dict[str, int] = {}

    def fastest(self, launches: Sequence[Launch]) -> Launch:
        """The launch that takes least time, from the file if it is there; the same for the life of the tuner."""
        if len(launches) == 1:
            return launches[0]
        key = self._key(launches)
        # Another process may write another winner between a forward plan and its backward plan.
        if key not in self._found:
            found = self._read().get(key)
            if not isinstance(found, int) or not 0 <= found < len(launches):
                times = [self.timer(launch) for launch in launches]
                found = times.index(min(times))
                self._write(key, found)
            self._found.setdefault(key, found)
        return launches[self._found[key]]

    def _key(self, launches: Sequence[Launch]) -> str:
        text = [self.device, _source()]
        for launch in launches:
            numbers = [(name, value) for name, value in launch.arguments if isinstance(value, int | float)]
            read = [(buffer.shape, str(buffer.dtype)) for buffer in launch.buffers(launch.reads)]
            arguments = [*numbers, *read]
            text.append(repr((launch.kernel, arguments, launch.constants, launch.num_warps, launch.num_stages)))
        return hashlib.sha256("\n".join(text).encode()).hexdigest()

    def _read(self) -> dict[str, object]:
        try:
            found = json.loads(self.file.read_text())
        except (OSError, ValueError):  # no file yet, or a process died while it wrote one
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, key: str, index: int) -> None:
        """Adds an entry; a reader sees the old file or the new one."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        entries = {**self._read(), key: index}
        handle, name = tempfile.mkstemp(dir=self.file.parent)
        with os.fdopen(handle, "w") as file:
            json.dump(entries, file)
        os.replace(name, self.file)


@lru_cache(maxsize=1)
def _source() -> str:
    """A digest of everything in this folder."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def time_launch(launch: Launch) -> float:
    """Seconds of a launch on the current CUDA device, over buffers of random numbers."""
    from triton.testing import do_bench

    device = torch.device("cuda", torch.cuda.current_device())
    tensors = {
        name: torch.randn(size, device=device).to(dtype) for name, (size, dtype) in Plan((launch,)).sizes().items()
    }
    milliseconds = do_bench(lambda: run([launch], tensors), return_mode="median")
    return float(milliseconds) / 1e3
