"""What ``first_gpu`` runs: each step returns a record whose ``"status"`` is pass, fail or skip."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trmfast.backends import BACKENDS
from trmfast.backends.graphs import HOST_LAUNCH
from trmfast.benchmark import gpu, launches
from trmfast.benchmark.measure import measure_works
from trmfast.benchmark.recursions import prepare_work
from trmfast.benchmark.rivals import is_ours
from trmfast.benchmark.suites import GPU_BATCHES, SUITES, Work
from trmfast.benchmark.turns import FEWEST_ROUNDS
from trmfast.build_info import build_info
from trmfast.cases import SMALL, make_inputs
from trmfast.ops import recursion
from trmfast.testing import MeaninglessComparisonError, check_case

__all__ = ["Done", "Options", "Step", "identity", "run_command", "steps", "work_once"]

CASES = ("trm", "trm-mlp_t", "urm", "odd-sizes")
TOOLS = ("memcheck", "racecheck", "synccheck")
ROUND_SECONDS = 4.0
FAULT = 86  # exit status of compute-sanitizer if it found something
DRAM = ("dram__bytes_read.sum", "dram__bytes_write.sum")


@dataclass(frozen=True)
class Options:
    """Attributes:
    output: folder of the results.
    tests: folder of the tests, or None.
    tiny: whether published problems run at width 64, for tests.
    """

    output: Path
    tests: Path | None = None
    tiny: bool = False


@dataclass(frozen=True)
class Step:
    """Attributes:
    name: in the record, and of options.
    title: for the reader.
    seconds: that it takes about on an A100, kernels compiled for the first time.
    run: returns its record.
    """

    name: str
    title: str
    seconds: float
    run: Callable[[Options], dict[str, Any]]

    @property
    def limit(self) -> float:
        """Seconds after which it is ended."""
        return 60 + 5 * self.seconds


class Done(NamedTuple):
    """The exit status of a command, None if it was ended; and what it printed."""

    status: int | None
    output: str


def run_command(command: list[str], limit: float, **environment: str) -> Done:
    """Runs a command; after ``limit`` seconds it is ended, with all that it started."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return Done(None, process.communicate()[0])
    return Done(process.returncode, output)


def steps(options: Options) -> list[Step]:
    """All steps, the most telling first."""
    works = {_title(work): work for work in SUITES["gpu"].works}
    names = list(works)
    first, second, third = (f"{name}, B={GPU_BATCHES[name][0]}" for name in list(GPU_BATCHES)[:3])
    found = [
        Step("environment", "What is here", 10, environment),
        Step("small", "Small programs against float64, forward and backward", 60, small),
        _speed(works[first]),
        _engines(works[first]),
        _model(works[first]),
        _sanitizer("memcheck"),
        _speed(works[second]),
        _speed(works[third]),
        _tiles(works[first]),
        *(_sanitizer(tool) for tool in TOOLS[1:]),
        _bytes(works[first]),
    ]
    files = sorted(options.tests.glob("test_*.py")) if options.tests is not None else []
    found += [_tests(file) for file in files if _has_gpu_tests(file)]
    found += [_speed(works[name]) for name in names if name not in (first, second, third)]
    for kind in (_engines, _model, _tiles, _bytes):
        found += [kind(works[name]) for name in names[1 : len(GPU_BATCHES)]]
    return found


def _title(work: Work) -> str:
    return f"{work.case.name}, B={work.case.batch}"


def _named(work: Work, options: Options) -> Work:
    """The work itself, or the same problem in small."""
    return replace(SUITES["gpu"], works=(work,)).tiny().works[0] if options.tiny else work


def _speed(work: Work) -> Step:
    title = f"Parity and speed: {_title(work)}"
    return Step(f"speed {_title(work)}", title, 120 if work.case.batch < 16 else 240, partial(speed, work))


def _engines(work: Work) -> Step:
    return Step(f"engines {_title(work)}", f"Triton and the CUDA engine: {_title(work)}", 20, partial(engines, work))


def _model(work: Work) -> Step:
    return Step(f"model {_title(work)}", f"The model of time: {_title(work)}", 60, partial(model, work))


def _tiles(work: Work) -> Step:
    return Step(f"tiles {_title(work)}", f"Tiles by the clock: {_title(work)}", 120, partial(tiles, work))


def _bytes(work: Work) -> Step:
    return Step(f"bytes {_title(work)}", f"Bytes counted by the GPU: {_title(work)}", 60, partial(moved, work))


def _sanitizer(tool: str) -> Step:
    return Step(f"sanitizer {tool}", f"compute-sanitizer {tool} on a small program", 90, partial(sanitizer, tool))


def _tests(file: Path) -> Step:
    return Step(f"tests {file.name}", f"pytest -m gpu {file.name}", 60, partial(run_tests, file))


# ---------------------------------------------------------------- what is here


def identity() -> dict[str, str]:
    """What results depend on: the GPU, versions, and the source."""
    digest = hashlib.sha256()
    for file in sorted(Path(gpu.__file__).resolve().parent.parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return {
        "gpu": gpu.describe(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "trmfast": version("trmfast"),
        "source": digest.hexdigest()[:12],
    }


def environment(_: Options) -> dict[str, Any]:
    """Driver, tools, and which backends run."""
    smi = shutil.which("nvidia-smi")
    query = ["--query-gpu=name,driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    found: dict[str, Any] = {
        "status": "pass",
        "driver": run_command([smi, *query], 20).output.strip() if smi else "no nvidia-smi",
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "memory": torch.cuda.mem_get_info()[1],
        "tools": {name: _tool(name) or "missing" for name in ("compute-sanitizer", "ncu", "nvcc")},
        "backends": {name: BACKENDS[name].available() or "runs" for name in ("triton", "cuda")},
        "cuda engine": build_info("cuda").error or "built",
        "versions": {},
    }
    for name in ("torch", "triton", "numpy", "trmfast"):
        try:
            found["versions"][name] = version(name)
        except PackageNotFoundError:
            found["versions"][name] = "missing"
    return found


def _tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")


# ---------------------------------------------------------------- parity


def small(options: Options) -> dict[str, Any]:
    """Every backend of the GPU on small programs, by the tolerance policy."""
    rows = []
    for name in ("triton", "cuda"):
        reason = BACKENDS[name].available()
        if reason is not None:
            rows.append({"backend": name, "case": "-", "verdict": f"does not run: {reason}"})
            continue
        for case in (case for case in SMALL if case.name in CASES):
            dtype = torch.bfloat16
            refused = BACKENDS[name].supports(case.problem, gpu.current(), dtype, case.batch, case.length)
            verdict = f"refused: {refused}" if refused else _judged(case, dtype, name, 1 if options.tiny else 3)
            rows.append({"backend": name, "case": case.name, "verdict": verdict})
    ran = [row for row in rows if not row["verdict"].startswith(("does not run", "refused"))]
    passed = bool(ran) and all(row["verdict"].startswith("pass") for row in ran)
    return {"status": "pass" if passed else "fail", "rows": rows}


def _judged(case: Any, dtype: torch.dtype, backend: str, draws: int) -> str:
    try:
        found = check_case(case, dtype, backend, seeds=range(draws), device=gpu.current())
    except MeaninglessComparisonError as error:
        return f"no verdict: {error}"
    failed = [str(comparison) for comparison in found if not comparison.passed]
    if failed:
        return f"fail: {len(failed)} of {len(found)}: {failed[0]}"
    closest = max(found, key=lambda c: c.error / c.bound if c.bound else 0.0)
    return f"pass: {len(found)} tensors, {closest.name} takes {closest.error / (closest.bound or 1):.0%} of its bound"


def _silent(_: str) -> None:
    pass


def speed(work: Work, options: Options) -> dict[str, Any]:
    """A published problem against float64, and its time against eager PyTorch and torch.compile as CUDA graphs."""
    work = _named(work, options)
    prepared = prepare_work(work, _silent)
    seconds = ROUND_SECONDS * len(work.steps)
    rows = measure_works([prepared], seconds, _silent, visit_seconds=ROUND_SECONDS / FEWEST_ROUNDS)
    failed = [row for row in rows if is_ours(row.implementation) and row.verdict.startswith("fail")]
    return {
        "status": "fail" if failed else "pass",
        "rows": [asdict(row) for row in rows],
        "remarks": prepared.remarks,
        "modelled": launches.modelled(work),
        **({"reason": failed[0].verdict} if failed else {}),
    }


def engines(work: Work, options: Options) -> dict[str, Any]:
    """Each backend of the GPU forward, timed and modelled: the rule of ``backend="auto"`` rests on the model."""
    work = _named(work, options)
    case, inputs = work.case, make_inputs(work.case, work.dtype, device=gpu.current())
    states, x, weights, cos, sin = inputs.states, inputs.x, inputs.weights, inputs.cos, inputs.sin
    times = launches.engines(work)
    rows = []
    for name in ("triton", "cuda"):
        backend = BACKENDS[name]
        reason = backend.available() or backend.supports(
            case.problem, gpu.current(), work.dtype, case.batch, case.length
        )
        row: dict[str, Any] = {"backend": name, "case": case.name, "batch": case.batch, "modelled": times.get(name)}
        if reason is None:
            run = partial(recursion, case.problem.program, case.problem.nets, states, x, weights, cos, sin, name)
            with torch.no_grad():
                for _ in range(3):  # compiles, captures, replays
                    run()
                row["seconds"] = min(gpu.seconds_of(run, 5) for _ in range(5))
        else:
            row["reason"] = reason
        rows.append(row)
    return {"status": "pass", "rows": rows}


def run_tests(file: Path, _: Options) -> dict[str, Any]:
    """The tests of a file that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(file)]
    done = run_command(command, 3600)
    lines = [line for line in done.output.splitlines() if line.strip()]
    last = lines[-1].strip("= ") if lines else ""
    if done.status == 5:
        return {"status": "skip", "reason": "no test is marked gpu"}
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"status": "fail" if done.status else "pass", "summary": last, "failed": failed[:20]}


def _has_gpu_tests(file: Path) -> bool:
    return file.name.startswith(("test_triton", "test_cuda")) or "mark.gpu" in file.read_text()


# ---------------------------------------------------------------- kernels


def model(work: Work, options: Options) -> dict[str, Any]:
    """Every kernel of a problem, timed and modelled; and the host's time of a launch, by which graphs are chosen."""
    work = _named(work, options)
    host = launches.host_seconds(work)
    remark = (
        f"{_title(work)}: the host takes {host * 1e6:.1f} us to launch a kernel; whether a CUDA graph pays is decided "
        f"with {HOST_LAUNCH * 1e6:.0f} us (HOST_LAUNCH in trmfast/backends/graphs.py)"
    )
    return {"status": "pass", "rows": launches.measured(work), "host seconds": host, "remarks": [remark]}


def tiles(work: Work, options: Options) -> dict[str, Any]:
    """The tiles of every kernel, timed; the winners are those that ``TRMFAST_TUNE=1`` takes."""
    return {"status": "pass", **launches.tuned(_named(work, options))}


def work_once(name: str, options: Options) -> None:
    """One forward pass of a problem, or of a small program with its backward pass, for tools that watch it."""
    if name == "small":
        case = next(case for case in SMALL if case.name == "trm")
    else:
        case = _named({_title(work): work for work in SUITES["gpu"].works}[name], options).case
    inputs = make_inputs(case, torch.bfloat16, device=gpu.current())
    weights = [weight.requires_grad_(name == "small") for weight in inputs.weights]
    problem = inputs.problem
    out = recursion(
        problem.program, problem.nets, inputs.states, inputs.x, weights, inputs.cos, inputs.sin, backend="triton"
    )
    if name == "small":
        torch.autograd.backward(out, inputs.grad_states)
    torch.cuda.synchronize()


def _once(name: str, options: Options) -> list[str]:
    words = [sys.executable, "-m", "trmfast.benchmark.first_gpu", "--once", name]
    return [*words, "--tiny"] if options.tiny else words


def sanitizer(tool: str, options: Options) -> dict[str, Any]:
    """A small program forward and backward under compute-sanitizer, each tensor an allocation of its own."""
    found = _tool("compute-sanitizer")
    if found is None:
        return {"status": "skip", "reason": "no compute-sanitizer: it comes with the CUDA toolkit"}
    command = [found, "--tool", tool, "--error-exitcode", str(FAULT), *_once("small", options)]
    environment = {"TRMFAST_GRAPHS": "0", "TRMFAST_CHECK_LAUNCHES": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = run_command(command, 600, **environment)
    said = [line.strip("= ") for line in done.output.splitlines() if line.startswith("=========")]
    last = said[-1] if said else "it printed nothing"
    if done.status == 0:
        return {"status": "pass", "summary": last}
    return {"status": "fail", "reason": f"exit status {done.status}: {last}", "printed": said[:40]}


def moved(work: Work, options: Options) -> dict[str, Any]:
    """Bytes between the GPU and its memory, by Nsight Compute with empty caches, beside the counted ones."""
    found = _tool("ncu")
    if found is None:
        return {"status": "skip", "reason": "no ncu: Nsight Compute comes with the CUDA toolkit"}
    command = [
        found,
        "--csv",
        "--page",
        "raw",
        "--print-units",
        "base",
        "--metrics",
        ",".join(DRAM),
        *_once(_title(work), options),
    ]
    done = run_command(command, 600, TRMFAST_GRAPHS="0")
    lines = done.output.splitlines()
    head = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if done.status != 0 or head is None:
        told = re.search(r"ERR_\w+", done.output)
        return {"status": "skip", "reason": f"ncu does not count here: {told[0] if told else f'exit {done.status}'}"}
    counted = launches.counted(_named(work, options))
    seen: dict[str, list[float]] = {}
    for row in list(csv.DictReader(io.StringIO("\n".join(lines[head:]))))[1:]:  # the first row holds the units
        name = row["Kernel Name"].split("(")[0]
        if name in counted:
            seen.setdefault(name, []).append(sum(float(row[metric].replace(",", "")) for metric in DRAM))
    rows = [
        {"kernel": name, "launches": len(values), "bytes": sum(values), "counted": counted[name]}
        for name, values in seen.items()
    ]
    return {"status": "pass" if rows else "skip", "rows": rows, **({} if rows else {"reason": "no kernel was seen"})}
