"""Prints what this machine and this installation can do: processor, versions, engine targets and backends, with the
reason for each that is off."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from trmfast.backends import BACKENDS
from trmfast.budget import DEFAULT, recompute_of
from trmfast.build_info import build_info
from trmfast.cases import PROGRAMS
from trmfast.cli.console import UsageError, print_json, print_table
from trmfast.cli.machine import commit, machine, versions
from trmfast.cli.plan import describe, print_plan
from trmfast.program import GradientWindow, RecursionProgram
from trmfast.targets import TARGETS

__all__ = ["EXAMPLES", "add_arguments", "parse_program", "run"]

EXAMPLES = """\
examples:
  trmfast info
  trmfast info --json                           everything as one JSON object
  trmfast info --program trm:3,6                the updates of TRM with 3 H cycles of 6 L cycles
  trmfast info --program hrm:2,2,all            with gradients through every update
  trmfast info --plan trm-sudoku-att --batch 8  the kernel launches of a problem on a GPU,
                                                and what training keeps on a CPU
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--program",
        metavar="MODEL:H,L[,WINDOW]",
        help=f"print the updates of a program; models are {', '.join(PROGRAMS)}; windows are one_step, last_cycle, "
        "all, none, or a number of cycles",
    )
    parser.add_argument("--plan", metavar="PROBLEM", help="print the launches of a problem on a GPU; needs no GPU")
    parser.add_argument("--batch", type=int, metavar="B", help="sequences of the plan; by default the problem's")
    parser.add_argument("--dtype", help="compute dtype of the plan (default: bfloat16)")
    parser.add_argument("--gpu", help="GPU of the plan (default: H100)")
    parser.add_argument(
        "--recompute",
        metavar="SETTING",
        help=f"what training computes again: True, False, or a size that forward may keep (default: {DEFAULT})",
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints; always 0."""
    if arguments.plan is None:
        for option in ("batch", "dtype", "gpu", "recompute"):
            value = getattr(arguments, option)
            if value is not None:
                raise UsageError(f"--{option}: got {value} without --plan, accepted only with --plan")
    else:
        if arguments.program is not None:
            raise UsageError(f"--program: got {arguments.program} with --plan, accepted is one of the two")
        dtype = "bfloat16" if arguments.dtype is None else arguments.dtype
        gpu = "H100" if arguments.gpu is None else arguments.gpu
        try:
            recompute = DEFAULT if arguments.recompute is None else recompute_of(arguments.recompute)
        except ValueError as error:
            raise UsageError(f"--{error}") from error
        found = describe(arguments.plan, arguments.batch, dtype, gpu, recompute)
        if arguments.json:
            print_json(found)
        else:
            print_plan(found)
        return 0
    if arguments.program is not None:
        program = parse_program(arguments.program)
        if arguments.json:
            rows = [vars(update) | {"sources": list(update.sources)} for update in program.updates]
            print_json({"states": program.states, "nets": program.nets, "updates": rows})
        else:
            print(program.table())
        return 0
    record = {
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "targets": engine_targets(),
        "backends": [
            {"name": name, "available": (reason := backend.available()) is None, "reason": reason}
            for name, backend in BACKENDS.items()
        ],
    }
    if arguments.json:
        print_json(record)
    else:
        _print(record)
    return 0


def parse_program(text: str) -> RecursionProgram:
    """The program that ``MODEL:H,L[,WINDOW]`` describes.

    Raises:
        UsageError: another form, or values that the model does not take.
    """
    model, _, rest = text.partition(":")
    parts = rest.split(",")
    if model not in PROGRAMS or len(parts) not in (2, 3) or not all(part.strip().isdigit() for part in parts[:2]):
        models = ", ".join(PROGRAMS)
        raise UsageError(
            f"--program: got {text!r}, accepted are MODEL:H,L or MODEL:H,L,WINDOW with MODEL one of {models}"
        )
    try:
        program = PROGRAMS[model](int(parts[0]), int(parts[1]))
        if len(parts) == 3:
            window: GradientWindow = int(parts[2]) if parts[2].isdigit() else parts[2]
            program = program.with_window(window)
    except ValueError as error:
        raise UsageError(f"--program: {error}") from error
    return program


def engine_targets() -> list[dict[str, Any]]:
    """Every target of the CPU engine, best first: compiled, supported, the dtypes it is chosen for, why it is off."""
    from trmfast.backends.cpu import CpuBackend, target_for, targets

    off = CpuBackend().available()
    left_out = build_info().left_out
    compiled = targets()
    chosen: dict[str, list[str]] = {}
    if off is None:
        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            chosen.setdefault(target_for(dtype), []).append(str(dtype).removeprefix("torch."))
    rows = []
    shipped = [name for name in TARGETS if name != "amx_emulated"]
    for name in (*shipped, *(target for target in compiled if target == "amx_emulated")):
        if name in compiled:
            reason = compiled[name]
            if reason is None and name == "amx_emulated":
                reason = "for tests only"
        else:
            reason = off or left_out.get(name, "not compiled for this architecture")
        supported = name in compiled and compiled[name] is None
        rows.append(
            {
                "name": name,
                "compiled": name in compiled,
                "supported": supported,
                "chosen_for": chosen.get(name, []),
                "reason": reason if reason or name in chosen else "a better target runs here",
            }
        )
    return rows


def _print(record: dict[str, Any]) -> None:
    facts = record["machine"]
    caches = ", ".join(
        f"L{cache['level']} {cache['type']} {_bytes(cache['size'])} (CPUs {cache['shared_by']})"
        for cache in facts["caches"]
    )
    quota = f", quota {facts['cpu_quota']:g} cores" if facts["cpu_quota"] else ""
    shared = "PyTorch's" if facts["engine_threads"] == "pytorch" else "its own, beside PyTorch's"
    rows = [
        ["processor", facts["cpu"] or "unknown"],
        ["architecture", f"{facts['architecture']}, {facts['system']}"],
        [
            "cores",
            f"{facts['cores'] or 'unknown'} cores, {facts['logical_cpus']} logical, "
            f"{facts['affinity'] or 'unknown'} in the affinity mask{quota}",
        ],
        ["threads", f"{facts['torch_threads']}; the CPU engine runs on {shared}"],
        ["instruction sets", " ".join(facts["instruction_sets"]) or "unknown"],
        ["caches", caches or "unknown"],
        ["memory", f"{_bytes(facts['memory'])}, {_bytes(facts['memory_available'])} available"],
    ]
    print_table("Machine", ("what", "value"), rows)
    found = {**record["versions"], "commit": record["commit"]}
    print_table("Versions", ("what", "value"), [[name, value or "none"] for name, value in found.items()])
    rows = [
        [
            target["name"],
            "yes" if target["compiled"] else "no",
            "yes" if target["supported"] else "no",
            ", ".join(target["chosen_for"]) or "-",
            target["reason"] or "",
        ]
        for target in record["targets"]
    ]
    print_table("Targets of the CPU engine", ("target", "compiled", "runs here", "chosen for", "why not"), rows)
    rows = [[b["name"], "on" if b["available"] else "off", b["reason"] or ""] for b in record["backends"]]
    print_table("Backends", ("backend", "state", "why not"), rows)


def _bytes(count: int | None) -> str:
    if count is None:
        return "unknown"
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} B"
