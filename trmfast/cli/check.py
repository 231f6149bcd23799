"""Checks this installation on this machine: the gradient of every program in float64 against finite differences, and
every backend and engine target that works here against the float64 reference, forward and all gradients.  The exit
status is 1 if anything is outside the tolerance policy (trmfast/testing.py)."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch.autograd.gradcheck import GradcheckError

from trmfast import recursion
from trmfast.backends import BACKENDS, Backend
from trmfast.cli.console import UsageError, print_json, print_table, progress
from trmfast.testing import (
    CHOICES,
    PUBLISHED,
    SMALL,
    Case,
    Comparison,
    Inputs,
    MeaninglessComparisonError,
    Result,
    compare_results,
    default_weight_scale,
    make_case,
    make_inputs,
    pool,
    run_eager,
    run_fused,
    run_truth,
)

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
examples:
  trmfast check                       everything that works on this machine, a few minutes on two cores
  trmfast check --quick               small problems, the best target alone: seconds
  trmfast check --backend cpu         one backend
  trmfast check --problem trm hrm     some problems
  trmfast check --json                every comparison of every tensor as one JSON object
"""

QUICK = ("trm", "trm-mlp_t", "hrm", "hier6", "grouped-heads", "odd-sizes")
DTYPES = (torch.float32, torch.bfloat16)
SEEDS = tuple(range(5))

# Finite differences see every update, so every update here has a gradient.
GRADCHECK = tuple(
    make_case(
        name,
        model,
        H_cycles=2,
        L_cycles=1,
        window="all",
        batch=1,
        length=3,
        hidden_size=8,
        num_layers=1,
        intermediate_size=6,
        token_mixer=mixer,
        channel_mixer=channel,
    )
    for name, model, mixer, channel in (
        ("trm", "trm", "attention", "swiglu"),
        ("trm-mlp_t", "trm", "mlp_t", "swiglu"),
        ("hrm", "hrm", "attention", "swiglu"),
        ("single_z", "single_z", "attention", "swiglu"),
        ("hier6", "hier6", "attention", "swiglu"),
        ("urm", "urm", "attention", "conv_swiglu"),
    )
)


@dataclass(frozen=True)
class Verdict:
    """The verdict on one problem; error, eager and limit are of the tensor that comes closest to its limit.

    Attributes:
        problem, backend, target, dtype: what ran; target is "" where a backend has no targets.
        tensors: the number of tensors compared.
        worst: the name of that tensor.
        error, eager, limit: largest absolute difference of the backend and of eager PyTorch from the truth, and the
            most that passes; None where there is no verdict.
        passed: whether all tensors passed.
        reason: why there is no verdict, or "".
    """

    problem: str
    backend: str
    target: str
    dtype: str
    tensors: int = 0
    worst: str = ""
    error: float | None = None
    eager: float | None = None
    limit: float | None = None
    passed: bool = False
    reason: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--quick", action="store_true", help="small problems only, on the best target of every backend")
    parser.add_argument("--backend", action="append", metavar="NAME", help="only this backend; may be repeated")
    parser.add_argument("--problem", nargs="+", metavar="NAME", help="only these problems")
    parser.add_argument("--threads", type=int, metavar="N", help="threads, by default PyTorch's")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Runs the checks; 1 if any failed, or none ran on a backend that was asked for."""
    start = time.monotonic()
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise UsageError(f"--threads: got {arguments.threads}, accepted are integers >= 1")
        torch.set_num_threads(arguments.threads)
    jobs, skipped = _jobs(arguments)
    gradients: list[dict[str, object]] = []
    rows: list[Verdict] = []
    with progress(len(GRADCHECK) + len(jobs)) as bar:
        if arguments.problem is None:
            for case in GRADCHECK:
                bar.step(f"gradcheck {case.name}")
                gradients.append({"problem": case.name, "reason": (reason := gradcheck(case)), "passed": not reason})
        draws = _Draws()
        for job in jobs:
            bar.step(f"{job.case.name} {job.backend} {job.target} {job.dtype}")
            rows.append(_parity(job, draws))
    # Requested backends that accept none of the problems.
    idle = [name for name in dict.fromkeys(arguments.backend or ()) if all(row.backend != name for row in rows)]
    passed = bool(rows) and not idle and all(row.passed for row in rows) and all(g["passed"] for g in gradients)
    if arguments.json:
        print_json(
            {"passed": passed, "gradcheck": gradients, "parity": [asdict(row) for row in rows], "skipped": skipped}
        )
    else:
        _print(gradients, rows, skipped, time.monotonic() - start)
    if idle or not rows:
        print(f"trmfast check: nothing was checked on {', '.join(idle) or 'any backend'}", file=sys.stderr)
    return 0 if passed else 1


# ---------------------------------------------------------------- gradients


def gradcheck(case: Case) -> str:
    """Compares the operator's gradients in float64 with finite differences; "" or the difference in one line."""
    inputs = make_inputs(case, torch.float64)
    problem, count = inputs.problem, len(inputs.states)
    leaves = [t.double().requires_grad_() for t in (*inputs.states, inputs.x, *inputs.weights) if t is not None]

    def forward(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        states, x, weights = tensors[:count], tensors[count], tensors[count + 1 :]
        return recursion(problem.program, problem.nets, states, x, weights, inputs.cos, inputs.sin, "reference")

    try:
        torch.autograd.gradcheck(forward, leaves)
    except GradcheckError as error:
        return " ".join(str(error).split())[:160]
    return ""


# ---------------------------------------------------------------- parity


@dataclass(frozen=True)
class Job:
    """One problem on one backend, target and device in one dtype."""

    case: Case
    backend: str
    target: str
    dtype: torch.dtype
    device: torch.device


class _Draws:
    """Inputs, eager result and truth of the last problem and dtype: all targets are compared with the same ones."""

    def __init__(self) -> None:
        self._key: tuple[str, torch.dtype] | None = None
        self._draws: list[tuple[Inputs, Result, Result]] = []

    def get(self, job: Job) -> list[tuple[Inputs, Result, Result]]:
        key = (job.case.name, job.dtype)
        if key != self._key:
            # The largest error of a small tensor is a matter of luck, and varies from draw to draw.
            case, scale, seeds = job.case, default_weight_scale(job.dtype), SEEDS
            if case in PUBLISHED:
                seeds = SEEDS[:1]
                if job.dtype.itemsize == 2:
                    case, scale = _last_updates(case, 2), 0.3
            self._draws = []
            for seed in seeds:
                inputs = make_inputs(case, job.dtype, seed, weight_scale=scale)
                self._draws.append((inputs, run_eager(inputs), run_truth(inputs)))
            self._key = key
        return self._draws


def _last_updates(case: Case, count: int) -> Case:
    """The case with only the last updates of its program.

    Over a whole published program in 16 bits, eager PyTorch's own error is too large for a verdict: at 916 tokens the
    largest error of half a million elements is, even with small weights.
    """
    return replace(case, problem=replace(case.problem, program=case.problem.program.last(count)))


def _jobs(arguments: argparse.Namespace) -> tuple[list[Job], list[dict[str, str]]]:
    """The jobs, grouped by truth; and what is off, with the reason."""
    cases = {case.name: case for case in (*SMALL, *PUBLISHED, *CHOICES)}
    usual = [case.name for case in (*SMALL, *PUBLISHED)]
    names = arguments.problem or (QUICK if arguments.quick else usual)
    for name in names:
        if name not in cases:
            raise UsageError(f"--problem: got {name!r}, accepted are {', '.join(cases)}")
    for name in arguments.backend or ():
        if name not in BACKENDS:
            raise UsageError(f"--backend: got {name!r}, accepted are {', '.join(BACKENDS)}")
        off = BACKENDS[name].available()
        if off is None and _device(BACKENDS[name], asked=True) is None:
            off = f"it runs on {', '.join(BACKENDS[name].device_types)}"
        if off is not None:
            raise UsageError(f"--backend: {name} does not work here: {off}")
    small = {*_names(SMALL), *_names(CHOICES)}
    jobs: list[Job] = []
    skipped: list[dict[str, str]] = []
    runners: list[tuple[str, str, torch.device]] = []
    for name, backend in BACKENDS.items():
        if arguments.backend and name not in arguments.backend:
            continue
        reason = backend.available()
        if reason is not None:
            skipped.append({"what": name, "reason": reason})
            continue
        device = _device(backend, asked=arguments.backend is not None)
        if device is None:
            skipped.append({"what": name, "reason": f"it runs on {', '.join(backend.device_types)}"})
        elif name == "cpu":
            runners += [(name, target, device) for target in _cpu_targets(skipped)]
        else:
            runners.append((name, "", device))
    for name in names:
        for dtype in DTYPES:
            best = set()
            for backend_name, target, device in runners:
                if target and not _computes(target, dtype):
                    continue
                first = backend_name not in best
                best.add(backend_name)
                # Whole published programs on slow targets would take minutes; each target runs all the small problems.
                if not first and (arguments.quick or (name not in small and arguments.problem is None)):
                    continue
                case = cases[name]
                reason = BACKENDS[backend_name].supports(case.problem, device, dtype, case.batch, case.length)
                if reason is not None:
                    skipped.append({"what": f"{name} on {backend_name}", "reason": reason})
                else:
                    jobs.append(Job(case, backend_name, target, dtype, device))
    return jobs, [dict(item) for item in dict.fromkeys(tuple(s.items()) for s in skipped)]


def _device(backend: Backend, asked: bool) -> torch.device | None:
    """Where a backend is checked; Triton's interpreter, which is slow, only if it was asked for."""
    types = backend.device_types or ("cpu",)
    if asked:
        types = (*types, *backend.slow_device_types)
    if "cuda" in types and torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu") if "cpu" in types else None


def _cpu_targets(skipped: list[dict[str, str]]) -> Iterator[str]:
    from trmfast.backends.cpu import targets

    # The emulation comes last: it is never the best target, whatever it emulates.
    for target, reason in sorted(targets().items(), key=lambda item: item[0] == "amx_emulated"):
        if reason is None:
            yield target
        else:
            skipped.append({"what": f"cpu target {target}", "reason": reason})


def _computes(target: str, dtype: torch.dtype) -> bool:
    """Whether a target computes in a dtype itself instead of deferring to the next one."""
    from trmfast import _cpu
    from trmfast.backends.cpu import ELEMENTS

    return (target, ELEMENTS[dtype]) in set(_cpu.compiled_pairs())


def _forced(target: str) -> AbstractContextManager[None]:
    if not target:
        return nullcontext()
    from trmfast.backends.cpu import force_target

    return force_target(target)


def _run(inputs: Inputs, job: Job) -> Result:
    """The job's results on the CPU, where eager's and the truth are."""
    if job.device.type == "cpu":
        return run_fused(inputs, job.backend)
    moved: dict[str, Any] = {
        field.name: tuple(t.to(job.device) for t in value)
        if isinstance(value, tuple)
        else value.to(job.device)
        if isinstance(value, torch.Tensor)
        else value
        for field in fields(inputs)
        for value in (getattr(inputs, field.name),)
    }
    found = run_fused(Inputs(**moved), job.backend)
    outputs, gradients = ({name: t.cpu() for name, t in part.items()} for part in (found.outputs, found.gradients))
    return Result(outputs, gradients)


def _parity(job: Job, draws: _Draws) -> Verdict:
    what = (job.case.name, job.backend, job.target, str(job.dtype).removeprefix("torch."))
    drawn = draws.get(job)
    try:
        with _forced(job.target):
            comparisons = pool([compare_results(_run(i, job), eager, truth) for i, eager, truth in drawn])
    except MeaninglessComparisonError as error:
        return Verdict(*what, reason=f"no verdict: {error}")
    worst = max(comparisons, key=_closeness)
    passed = all(comparison.passed for comparison in comparisons)
    return Verdict(*what, len(comparisons), worst.name, worst.error, worst.eager, worst.bound, passed)


def _closeness(comparison: Comparison) -> float:
    if comparison.error != comparison.error:
        return float("inf")
    return comparison.error / comparison.bound if comparison.bound else float(comparison.error > 0)


# ---------------------------------------------------------------- output


def _print(
    gradients: Sequence[dict[str, object]], rows: Sequence[Verdict], skipped: Sequence[dict[str, str]], seconds: float
) -> None:
    if gradients:
        print_table(
            "Gradients of the operator in float64 against finite differences",
            ("problem", "pass", "reason"),
            [[str(g["problem"]), "yes" if g["passed"] else "NO", str(g["reason"])] for g in gradients],
            [i for i, g in enumerate(gradients) if not g["passed"]],
        )
    if rows:
        print_table(
            "Outputs and gradients against the float64 reference; of every problem the tensor closest to its limit",
            ("problem", "backend", "target", "dtype", "tensors", "tensor", "error", "eager", "limit", "pass"),
            [
                [
                    *(row.problem, row.backend, row.target or "-", row.dtype),
                    *(str(row.tensors), row.worst or "no verdict"),
                    *(_number(row.error), _number(row.eager), _number(row.limit), "yes" if row.passed else "NO"),
                ]
                for row in rows
            ],
            [i for i, row in enumerate(rows) if not row.passed],
        )
    for row in rows:
        if row.reason:
            print(f"\n{row.problem}, {row.backend} {row.target}, {row.dtype}: {row.reason}")
    if skipped:
        print_table("Not checked", ("what", "reason"), [[s["what"], s["reason"]] for s in skipped])
    failed = sum(not row.passed for row in rows) + sum(not g["passed"] for g in gradients)
    total = len(rows) + len(gradients)
    if any(row.problem in _names(PUBLISHED) for row in rows):
        print("\nOf published problems bfloat16 runs the last two updates, float32 the whole program.")
    print(f"\n{total - failed} of {total} checks passed in {seconds:.0f} s", flush=True)
    if failed:
        print(f"trmfast check: {failed} checks failed", file=sys.stderr)


def _names(cases: Sequence[Case]) -> set[str]:
    return {case.name for case in cases}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"
