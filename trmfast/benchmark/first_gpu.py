"""The first day on a GPU as one command: ``python -m trmfast.benchmark.first_gpu --minutes 10``.

Steps run in the order of what they tell, each in a process of its own, so that a kernel's fault ends its step alone.
Every result is written to first_gpu.json at once: the same command goes on where it was ended.  Steps that no longer
fit into the time are named.  ``python benchmarks/update_docs.py FOLDER`` puts the report into docs/gpu.md.

Exit status: 0 if every step that ran passed, 1 otherwise, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trmfast.benchmark import gpu
from trmfast.benchmark.first_gpu_report import markdown
from trmfast.benchmark.first_gpu_steps import Options, Step, identity, run_command, steps, work_once

__all__ = ["Call", "main"]

Call = Callable[[Step, Options, float], dict[str, Any]]
"""Runs a step within so many seconds; returns its result, whose ``"status"`` is pass, fail, skip or error."""

LEAST_SECONDS = 5.0
FINAL = ("pass", "fail")  # what another call does not run again


def main(words: Sequence[str] | None = None, call: Call | None = None) -> int:
    """Runs the steps; see the module.

    Args:
        words: the command line.
        call: how a step runs, by default in a process of its own.
    """
    options, arguments = _parse(words)
    if arguments.once is not None:
        work_once(arguments.once, options)
        return 0
    reason = gpu.missing_gpu()
    if reason is not None:
        print(f"first_gpu: {reason}", file=sys.stderr)
        return 2
    if arguments.step is not None:
        found = {step.name: step for step in steps(options)}[arguments.step].run(options)
        Path(arguments.result).write_text(json.dumps(found))
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "first_gpu.json"
    record: dict[str, Any] = {"identity": identity(), "steps": {}}
    if file.exists():
        before = json.loads(file.read_text())
        if before["identity"] != record["identity"]:
            was = ", ".join(str(value) for value in before["identity"].values())
            print(f"first_gpu: --output: {file} is of {was}; accepted is another folder", file=sys.stderr)
            return 2
        record = before
    _run(record, file, options, arguments.minutes, call or _in_a_process)
    text = markdown(record)
    (options.output / "first_gpu.md").write_text(text + "\n")
    _show(text)
    print(f"\n{file}, {file.with_suffix('.md')}")
    return 1 if any(found["status"] in ("fail", "error") for found in record["steps"].values()) else 0


def _parse(words: Sequence[str] | None) -> tuple[Options, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python -m trmfast.benchmark.first_gpu", description=__doc__)
    add = parser.add_argument
    add("--minutes", type=float, metavar="M", help="start no step that would end later (default: run all)")
    add("--output", type=Path, default=Path("first-gpu"), metavar="DIR", help="where results go (default: first-gpu)")
    add("--tests", type=Path, metavar="DIR", help="the folder of tests (default: that of the source tree)")
    for hidden in ("--step", "--result", "--once"):  # of the processes of steps
        add(hidden, help=argparse.SUPPRESS)
    add("--tiny", action="store_true", help=argparse.SUPPRESS)  # for tests: width 64
    arguments = parser.parse_args(words)
    if arguments.minutes is not None and not arguments.minutes > 0:
        parser.error(f"--minutes: got {arguments.minutes:g}, accepted are positive numbers")
    tests = arguments.tests
    if tests is None:
        beside = Path(__file__).resolve().parent.parent.parent / "tests"
        tests = beside if (beside / "conftest.py").exists() else None
    return Options(arguments.output, tests, arguments.tiny), arguments


def _run(record: dict[str, Any], file: Path, options: Options, minutes: float | None, call: Call) -> None:
    """Runs what is missing in the record, and writes it after each step."""
    begin = time.monotonic()
    end = float("inf") if minutes is None else begin + 60 * minutes
    for step in steps(options):
        if record["steps"].get(step.name, {}).get("status") in FINAL:
            print(f"{step.name}: {record['steps'][step.name]['status']}, from an earlier call", flush=True)
            continue
        left = end - time.monotonic()
        if left < max(step.seconds, LEAST_SECONDS):
            found: dict[str, Any] = {
                "status": "skip",
                "late": True,
                "reason": f"takes about {step.seconds:.0f} s, {max(left, 0):.0f} s were left",
            }
        else:
            start = time.monotonic()
            found = call(step, options, min(left, step.limit))
            found["seconds"] = round(time.monotonic() - start, 1)
        record["steps"][step.name] = {"title": step.title, **found}
        _write(file, record)
        reason = f": {found['reason']}" if "reason" in found else ""
        print(f"{step.name}: {found['status']}{reason}", flush=True)


def _in_a_process(step: Step, options: Options, limit: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        words = ["--step", step.name, "--result", str(file), "--output", str(options.output)]
        words += ["--tests", str(options.tests)] if options.tests is not None else []
        words += ["--tiny"] if options.tiny else []
        done = run_command([sys.executable, "-m", "trmfast.benchmark.first_gpu", *words], limit)
        if done.status is None:
            return {"status": "error", "reason": f"did not end within {limit:.0f} s"}
        if done.status != 0 or not file.exists():
            lines = [line for line in done.output.splitlines() if line.strip()]
            return {"status": "error", "reason": f"ended with {done.status}: {lines[-1][:300] if lines else ''}"}
        found: dict[str, Any] = json.loads(file.read_text())
        return found


def _write(file: Path, record: dict[str, Any]) -> None:
    """A reader sees the old file or the new one."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(new, file)


def _show(text: str) -> None:
    """On a terminal as rich renders it, if it is installed."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.markdown import Markdown
        except ModuleNotFoundError:
            pass
        else:
            Console().print(Markdown(text))
            return
    print(f"\n{text}")


if __name__ == "__main__":
    sys.exit(main())
