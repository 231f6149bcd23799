"""The judge of damaged files: ``load``, ``save`` and ``convert`` raise what their docstrings list, in one line, within
bounds of time and memory; a file that loads is one that can be saved and loaded again."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import resource
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import trmfast
from trmfast.cli import main

from .damage import FileTrial, file_bytes

__all__ = ["CPU_SECONDS", "MEMORY", "examine_file"]

CPU_SECONDS = 4.0  # of the process, so that a busy machine changes nothing; these files take milliseconds
LONGEST = 2000  # characters of an error
MEMORY = 600 << 20  # bytes of address space above what the process has; these files have a few kilobytes


class TooLongError(BaseException):
    """Not an Exception: a loader could turn one into a proper error."""


def examine_file(trial: FileTrial) -> list[str]:
    """The faults in how trmfast refuses or accepts a damaged file; empty if it is right."""
    suffix = ".safetensors" if trial.form.endswith("safetensors") else ".pt"
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path, out = Path(folder) / f"in{suffix}", Path(folder) / "out.safetensors"
        path.write_bytes(file_bytes(trial))
        loaded, wrong = _judged(trmfast.load, path, **trial.options)
        if loaded is not None and not wrong:
            _, wrong = _judged(trmfast.save, loaded, out)
            if not wrong and out.exists():
                _, wrong = _judged(trmfast.load, out)
                wrong = [f"of the saved model {text}" for text in wrong]
        if not any(kind == "option" for kind, *_ in trial.edits):
            wrong += _convert(path, Path(folder) / "converted.safetensors", trial)
        return wrong


def _judged(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, list[str]]:
    """The function's result, and the faults of its errors."""
    name = function.__name__
    try:
        with _bounded():
            return function(*arguments, **options), []
    except TooLongError:
        return None, [f"{name}: takes more than {CPU_SECONDS:g} s"]
    except Exception as error:
        text = str(error)
        if not isinstance(error, _listed(function)):
            what = f"{type(error).__name__} in {_place(error)}"
            return None, [f"{name}: raises {what}, which it does not list: {_short(text)}"]
        lines = len(text.splitlines())
        if lines != 1 or len(text) > LONGEST:
            what = f"{type(error).__name__} of {lines} lines, {len(text)} characters"
            return None, [f"{name}: {what}: {_short(text)}"]
        return None, []


def _convert(path: Path, out: Path, trial: FileTrial) -> list[str]:
    """The command ends with 0, or with 2 and one line."""
    words = [f"{key}={value}" for key, value in trial.options.items()]
    printed, complained = io.StringIO(), io.StringIO()
    status: Any
    try:
        with _bounded(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complained):
            status = main(["convert", str(path), str(out), *(["--set", *words] if words else [])])
    except SystemExit as ended:
        status = ended.code
    except TooLongError:
        return [f"convert: takes more than {CPU_SECONDS:g} s"]
    except Exception as error:
        return [f"convert: raises {type(error).__name__} in {_place(error)}: {_short(str(error))}"]
    lines = complained.getvalue().splitlines()
    if status not in (0, 2) or len(lines) != (status == 2):
        return [f"convert: ends with {status} and {len(lines)} lines: {_short(complained.getvalue())}"]
    leftover = [p.name for p in out.parent.iterdir() if p.name not in (path.name, out.name, "out.safetensors")]
    return [f"convert: leaves {leftover}"] if leftover or (status and out.exists()) else []


def _listed(function: Callable[..., Any]) -> tuple[type[BaseException], ...]:
    """The kinds of errors in the ``Raises:`` section of a docstring."""
    section = (inspect.getdoc(function) or "").partition("Raises:")[2]
    names = re.findall(r"\b[A-Z]\w*Error\b", section)
    kinds = {name: getattr(__import__("builtins"), name, None) for name in names}
    return tuple(kind for kind in kinds.values() if isinstance(kind, type))


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Ends what runs inside after CPU_SECONDS, and refuses allocations above MEMORY."""

    def stop(*_: object) -> None:
        raise TooLongError

    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _place(error: Exception) -> str:
    """The innermost function of trmfast that the error went through."""
    frames = traceback.extract_tb(error.__traceback__)
    home = str(Path(trmfast.__file__).parent)
    inside = [frame for frame in frames if frame.filename.startswith(home)] or frames
    return f"{Path(inside[-1].filename).name} {inside[-1].name}"


def _short(text: str) -> str:
    return " ".join(text.split())[:160]
