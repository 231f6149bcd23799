"""``trmfast info --plan``: the launches of a problem on a GPU, counted and timed by a model, and what training keeps.

Needs no GPU.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from trmfast.backends import BACKENDS, Backend, what_fits
from trmfast.budget import Recompute, budget_of
from trmfast.cases import PUBLISHED, SMALL, Case
from trmfast.cli.console import UsageError, print_table

if TYPE_CHECKING:
    from trmfast.kernels.architectures import Gpu
    from trmfast.kernels.plan import Plan

__all__ = ["describe", "print_plan"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
COLUMNS = ("kernel", "launches", "programs", "tile", "warps", "MB", "GFLOP", "model us")


def describe(name: str, batch: int | None, dtype: str, gpu: str, recompute: Recompute) -> dict[str, Any]:
    """The plans of a problem as one record.

    Args:
        name: of a problem in SMALL or PUBLISHED.
        batch: B, by default the problem's.
        dtype: name of the compute dtype.
        gpu: name of a GPU.
        recompute: as in :func:`trmfast.recursion`.

    Raises:
        UsageError: something unknown, or Triton is missing.
    """
    cases = {case.name: case for case in (*PUBLISHED, *SMALL)}
    for option, value, accepted in (("--plan", name, cases), ("--dtype", dtype, DTYPES)):
        if value not in accepted:
            raise UsageError(f"{option}: got {value!r}, accepted are {', '.join(accepted)}")
    if importlib.util.find_spec("triton") is None:
        raise UsageError("--plan: needs Triton, `pip install -c constraints.txt -e '.[triton]'` installs it on Linux")
    from trmfast.kernels.architectures import GPUS
    from trmfast.kernels.plans import plans

    if gpu not in GPUS:
        raise UsageError(f"--gpu: got {gpu!r}, accepted are {', '.join(GPUS)}")
    if batch is not None and batch < 1:
        raise UsageError(f"--batch: got {batch}, accepted are numbers >= 1")
    case = cases[name] if batch is None else replace(cases[name], batch=batch)
    window = _window(BACKENDS["triton"], case, DTYPES[dtype], recompute, None)
    keep = window["kept_pairs"] // case.batch
    sizes = (case.problem, case.batch, case.length, DTYPES[dtype])
    forward, backward = plans(GPUS[gpu], *sizes, rope=case.rope, keep=keep)
    cpu = BACKENDS["cpu"]
    reason = cpu.available() or cpu.supports(case.problem, torch.device("cpu"), sizes[-1], case.batch, case.length)
    return {
        "problem": name,
        "batch": case.batch,
        "length": case.length,
        "dtype": dtype,
        "gpu": gpu,
        "forward": _summary(forward, GPUS[gpu]),
        "backward": _summary(backward, GPUS[gpu]),
        "gpu_window": window,
        "window": _window(cpu, case, DTYPES[dtype], recompute, reason),
    }


def _window(
    backend: Backend, case: Case, dtype: torch.dtype, recompute: Recompute, reason: str | None
) -> dict[str, Any]:
    """What a backend keeps of the gradient window for backward; ``reason``: why nothing."""
    problem = case.problem
    size = 0 if reason else backend.pair_bytes(problem, dtype, case.length)
    keep = what_fits(backend, problem, dtype, case.batch, case.length, 0 if reason else budget_of(recompute))
    updates, tokens = problem.num_grad_updates, case.batch * case.length
    return {
        "recompute": recompute,
        "reason": reason,
        "updates": updates,
        "pairs": updates * case.batch,
        "kept_pairs": keep.pairs,
        "kept_outputs": keep.outputs,
        "kept_bytes": keep.nbytes,
        "all_bytes": updates * case.batch * size,
        "saved_bytes": (updates - keep.pairs // case.batch) * tokens * problem.hidden_size * dtype.itemsize,
    }


def _summary(plan: Plan, gpu: Gpu) -> dict[str, Any]:
    from trmfast.kernels.roofline import launch_time, plan_time

    groups: dict[tuple[Any, ...], list[Any]] = {}
    for launch in plan:
        tile = ", ".join(f"{name[6:]} {size}" for name, size in launch.constants if name.startswith("BLOCK_"))
        groups.setdefault((launch.kernel, launch.grid, tile, launch.num_warps), []).append(launch)
    rows = [
        {
            "kernel": kernel.split(".")[1].removesuffix("_kernel"),
            "launches": len(launches),
            "grid": list(grid),
            "tile": tile,
            "warps": warps,
            "bytes": sum(launch.nbytes for launch in launches),
            "flops": sum(launch.flops for launch in launches),
            "model_seconds": sum(launch_time(gpu, launch) for launch in launches),
        }
        for (kernel, grid, tile, warps), launches in groups.items()
    ]
    return {
        "launches": len(plan),
        "bytes": plan.nbytes,
        "flops": plan.flops,
        "scratch_bytes": plan.scratch_bytes,
        "model_seconds": plan_time(gpu, plan),
        "kernels": rows,
    }


def print_plan(record: dict[str, Any]) -> None:
    """Prints what :func:`describe` returns."""
    print(f"{record['problem']}, B={record['batch']}, L={record['length']}, {record['dtype']}, {record['gpu']}")
    for direction in ("forward", "backward"):
        summary = record[direction]
        print_table(f"{direction.capitalize()} plan", COLUMNS, [*map(_row, summary["kernels"])])
        print(
            f"{summary['launches']} launches, {summary['bytes'] / 1e9:.3f} GB, {summary['flops'] / 1e9:.1f} GFLOP, "
            f"{summary['scratch_bytes'] / 1e6:.1f} MB of scratch, {summary['model_seconds'] * 1e3:.3f} ms by the model"
        )
    print(f"\n{_kept(record)}")
    print("\nBytes: each operand once and each result once.  Times are a model's (kernels/roofline.py), not measured.")


def _kept(record: dict[str, Any]) -> str:
    lines = [f"recompute={record['window']['recompute']!r}"]
    tokens = record["batch"] * record["length"]
    for name, window in (("GPU backends", record["gpu_window"]), ("the CPU engine", record["window"])):
        if window["reason"]:
            lines.append(f"  {name}: does not run this: {window['reason']}")
            continue
        outputs = f"outputs of blocks of {window['kept_outputs']} more, " if window["kept_outputs"] else ""
        lines.append(
            f"  {name}: activations of {window['kept_pairs']} of {window['pairs']} (update, sequence) pairs, {outputs}"
            f"{window['kept_bytes'] / 1e6:.1f} of {window['all_bytes'] / 1e6:.1f} MB "
            f"({window['kept_bytes'] / tokens:,.0f} of {window['all_bytes'] / tokens:,.0f} bytes a token), "
            f"and {window['saved_bytes'] / 1e6:.1f} MB of summed inputs"
        )
    return "\n".join(lines)


def _row(kernel: dict[str, Any]) -> list[str]:
    grid = " x ".join(str(size) for size in kernel["grid"])
    return [
        *(kernel["kernel"], str(kernel["launches"]), grid, kernel["tile"], str(kernel["warps"])),
        f"{kernel['bytes'] / 1e6:.2f}",
        f"{kernel['flops'] / 1e9:.2f}",
        f"{kernel['model_seconds'] * 1e6:.1f}",
    ]
