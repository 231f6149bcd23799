"""Launches of plans, timed one kind at a time on the GPU: beside the model of time, and tile against tile."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from trmfast.backends import BACKENDS, cuda, what_fits
from trmfast.backends.triton import forward_setting
from trmfast.benchmark.gpu import current, seconds_of
from trmfast.benchmark.rivals import implementation_of
from trmfast.benchmark.suites import Work
from trmfast.budget import DEFAULT, Recompute, budget_of
from trmfast.kernels.architectures import GPUS, Gpu
from trmfast.kernels.backward_plan import backward_plan
from trmfast.kernels.forward_plan import Setting, forward_plan
from trmfast.kernels.plan import Launch, Plan, run
from trmfast.kernels.roofline import launch_time, plan_time
from trmfast.kernels.tuning import Tuner, cache_file

__all__ = ["counted", "engines", "host_seconds", "measured", "modelled", "seconds_of_launch", "tuned"]

# Of one graph; a launch on the host may take longer than the kernel.
REPEATS = 20
REPLAYS = 5
QUEUED = 256  # launches that a stream holds; CUDA's limit is about four times that


def seconds_of_launch(launch: Launch) -> float:
    """Seconds of a launch among its like in a CUDA graph, over random numbers; operands that fit stay in the cache."""
    sizes = Plan((launch,)).sizes().items()
    tensors = {name: torch.randn(size, device=current()).to(dtype) for name, (size, dtype) in sizes}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run([launch], tensors)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run([launch] * REPEATS, tensors)
        graph.replay()
        times = [seconds_of(graph.replay, 1) for _ in range(REPLAYS)]
    torch.cuda.current_stream().wait_stream(stream)
    return statistics.median(times) / REPEATS


def modelled(work: Work) -> dict[str, Any]:
    """Seconds, launches and bytes of each step by the model of time; of training with each setting that is measured."""
    gpu, setting = _gpu(work), _setting(work)
    found: dict[str, Any] = {"gpu": gpu.name}
    if "forward" in work.steps:
        found["forward"] = _amounts(gpu, [forward_plan(setting, save=False)])
    if "training" in work.steps:
        found["training"] = _amounts(gpu, _plans(setting, _keep(work, DEFAULT)))
        everything = implementation_of(False)
        if everything in work.rivals:
            found[everything] = _amounts(gpu, _plans(setting, _keep(work, False)))
    return found


def _amounts(gpu: Gpu, parts: Sequence[Plan]) -> dict[str, float]:
    return {
        "seconds": sum(plan_time(gpu, plan) for plan in parts),
        "launches": sum(len(plan) for plan in parts),
        "bytes": sum(plan.nbytes for plan in parts),
    }


def _keep(work: Work, recompute: Recompute) -> int:
    """The updates that training keeps."""
    case = work.case
    sizes = (case.problem, work.dtype, case.batch, case.length)
    return what_fits(BACKENDS["triton"], *sizes, budget_of(recompute)).pairs // case.batch


def engines(work: Work) -> dict[str, float]:
    """Modelled seconds of a forward pass by backend, of those that could run it."""
    case, setting = work.case, _setting(work)
    found = {"triton": plan_time(_gpu(work), forward_plan(setting, save=False))}
    if BACKENDS["cuda"].available() is None:
        limits = cuda._limits(torch.cuda.current_device())
        times = cuda.modelled_times(case.problem, case.batch, case.length, setting, limits)
        found |= {} if times is None else {"cuda": times[0]}
    return found


def counted(work: Work) -> dict[str, float]:
    """Bytes of the forward plan by kernel, each operand read once and each result written once."""
    found: dict[str, float] = {}
    for launch in forward_plan(_setting(work), save=False):
        name = launch.kernel.split(".")[1]
        found[name] = found.get(name, 0) + launch.nbytes
    return found


def measured(work: Work) -> list[dict[str, Any]]:
    """Every kind of launch of both plans: how often, seconds timed and modelled, and rates."""
    gpu = _gpu(work)
    rows = []
    for launches in _kinds(launch for plan in _plans(_setting(work)) for launch in plan):
        one = launches[0]
        seconds = seconds_of_launch(one)
        rows.append(
            {
                "kernel": one.kernel.split(".")[1].removesuffix("_kernel"),
                "tile": _tile(one),
                "launches": len(launches),
                "programs": prod(one.grid),
                "seconds": seconds,
                "modelled": launch_time(gpu, one),
                "bytes": one.nbytes,
                "flops": one.flops,
            }
        )
    return rows


def host_seconds(work: Work) -> float:
    """Seconds that the host takes to launch a kernel of the forward plan, kernel by kernel, without a wait for the GPU.

    The least of a few passes, over launches that a stream takes without making the host wait.
    """
    plan = forward_plan(_setting(work), save=False).packed()
    plan = replace(plan, launches=plan.launches[:QUEUED])
    tensors = {name: torch.zeros(size, dtype=dtype, device=current()) for name, (size, dtype) in plan.sizes().items()}
    run(plan, tensors)  # compiles
    times = []
    for _ in range(REPLAYS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run(plan, tensors)
        times.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return min(times) / len(plan)


def tuned(work: Work) -> dict[str, Any]:
    """Times the tiles of every launch, and keeps the winners where ``TRMFAST_TUNE=1`` looks for them."""
    import triton

    setting, gpu = _setting(work), _gpu(work)
    device = f"{torch.cuda.get_device_name(torch.cuda.current_device())}, Triton {triton.__version__}"
    tuner = _Recorder(device)
    with_tuner = replace(setting, configuration=replace(setting.configuration, tuner=tuner))
    before = sum(plan_time(gpu, plan) for plan in _plans(setting))
    after = sum(plan_time(gpu, plan) for plan in _plans(with_tuner))
    rows = [row.record(gpu) for row in tuner.rows]
    return {"rows": rows, "cache": str(tuner.file), "modelled before": before, "modelled after": after}


@dataclass(frozen=True)
class _Choice:
    launches: Sequence[Launch]
    seconds: Sequence[float]

    def record(self, gpu: Gpu) -> dict[str, Any]:
        chosen = min(range(len(self.launches)), key=lambda i: launch_time(gpu, self.launches[i]))
        best = min(range(len(self.launches)), key=lambda i: self.seconds[i])
        return {
            "kernel": self.launches[0].kernel.split(".")[1].removesuffix("_kernel"),
            "tiles": [_tile(launch) for launch in self.launches],
            "seconds": list(self.seconds),
            "of the model": chosen,
            "fastest": best,
        }


class _Recorder(Tuner):
    """Keeps what it timed; a choice that the file already has is not timed again."""

    def __init__(self, device: str) -> None:
        self.times: dict[Any, float] = {}
        self.rows: list[_Choice] = []
        super().__init__(cache_file(), device, self._timed)

    def _timed(self, launch: Launch) -> float:
        kind = _kind(launch)
        if kind not in self.times:
            self.times[kind] = seconds_of_launch(launch)
        return self.times[kind]

    def fastest(self, launches: Sequence[Launch]) -> Launch:
        found = super().fastest(launches)
        kinds = [_kind(launch) for launch in launches]
        if len(launches) > 1 and all(kind in self.times for kind in kinds):
            choice = _Choice(launches, [self.times[kind] for kind in kinds])
            if all([_kind(launch) for launch in other.launches] != kinds for other in self.rows):
                self.rows.append(choice)
        return found


# ---------------------------------------------------------------- plans


def _setting(work: Work) -> Setting:
    case = work.case
    return forward_setting(case.problem, current(), work.dtype, case.batch, case.length)


def _plans(setting: Setting, keep: int = 0) -> list[Plan]:
    """Forward, which saves or keeps, and backward to x and the weights."""
    problem = setting.problem
    needs = [False] * len(problem.program.states), problem.uses_x, [True] * problem.num_weights
    return [forward_plan(setting, True, keep), backward_plan(setting, *needs, keep).plan]


def _gpu(work: Work) -> Gpu:
    """The numbers of the current product, or those that choose its tiles."""
    name = torch.cuda.get_device_name()
    return next((gpu for gpu in GPUS.values() if gpu.name in name), _setting(work).configuration.gpu)


def _kind(launch: Launch) -> tuple[Any, ...]:
    """Equal for launches of the same compiled kernel over buffers of the same sizes."""
    arguments = []
    for name, value in launch.arguments:
        buffers = launch.buffers([name])
        arguments.append((name, tuple((b.shape, b.dtype) for b in buffers) if buffers else value))
    return (launch.kernel, tuple(arguments), launch.constants, launch.grid, launch.num_warps, launch.num_stages)


def _kinds(launches: Iterable[Launch]) -> list[list[Launch]]:
    found: dict[Any, list[Launch]] = {}
    for launch in launches:
        found.setdefault(_kind(launch), []).append(launch)
    return list(found.values())


def _tile(launch: Launch) -> str:
    blocks = " ".join(f"{name[6:]}{size}" for name, size in launch.constants if name.startswith("BLOCK_"))
    return f"{blocks}, {launch.num_warps} x {launch.num_stages}"
