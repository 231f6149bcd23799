"""Memory and time of a training step as the gradient window grows: trmfast beside eager PyTorch.

    python benchmarks/window_memory.py                       # TRM Sudoku, B = 32, L_cycles 6 to 48
    python benchmarks/window_memory.py --chart memory.png

TRM's window is its last cycle, of L_cycles + 1 updates.  A step is the recursion forward and backward into x and all
weights.  Memory is how far resident memory rises during it (VmHWM), packed weights and workspace of the engine
included.  Eager PyTorch skips sizes that need more memory than is free.
"""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from trmfast.benchmark.memory import peak_bytes, saved_bytes
from trmfast.benchmark.rivals import RIVALS, Trained
from trmfast.cases import Case, find_case, make_inputs
from trmfast.cli.console import print_table
from trmfast.cli.machine import machine
from trmfast.program import RecursionProgram

TITLES = {"eager": "PyTorch eager", "trmfast": "trmfast"}
# Skip a step of eager PyTorch unless this many times its extrapolated memory is free.
MARGIN = 2.0


@dataclass
class Step:
    """One measured training step; kept and peak in bytes."""

    updates: int
    kept: int
    peak: int
    seconds: float


def case_of(batch: int, l_cycles: int) -> Case:
    case = find_case("trm-sudoku-att")
    program = RecursionProgram.trm(3, l_cycles)
    return replace(case, batch=batch, problem=replace(case.problem, program=program))


def measure(name: str, case: Case) -> Step:
    inputs = make_inputs(case, torch.bfloat16, weight_scale=0.3)
    runner = RIVALS[name](inputs, torch.get_num_threads())
    assert isinstance(runner, Trained)
    kept = saved_bytes(runner.outputs, runner.weights)
    peak = peak_bytes(runner.training)
    start = time.perf_counter()
    runner.training()
    seconds = time.perf_counter() - start
    for gradient in runner.gradients().values():
        assert gradient.isfinite().all()
    del runner
    gc.collect()
    return Step(case.problem.num_grad_updates, kept, peak or 0, seconds)


def draw(path: Path, found: dict[str, dict[int, Step]], title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    for (name, steps), colour in zip(found.items(), ("#8a929c", "#1f4e79"), strict=True):
        x = [step.updates for step in steps.values()]
        for field, line in (("peak", "-"), ("kept", ":")):
            label = f"{TITLES[name]}, {'rise of resident memory' if field == 'peak' else 'kept for backward'}"
            y = [getattr(step, field) / 1e9 for step in steps.values()]
            axis.plot(x, y, line, marker="o", color=colour, label=label)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    ticks = [step.updates for step in found["trmfast"].values()]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("updates that gradients flow through (L_cycles + 1)")
    axis.set_ylabel("GB")
    axis.grid(color="#e3e5e8", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    axis.set_title(title, fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="sequences (default: 32)")
    parser.add_argument("--l-cycles", type=int, nargs="+", default=[6, 12, 24, 48], metavar="N", help="(6 12 24 48)")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="where the picture goes (default: none)")
    arguments = parser.parse_args()
    found: dict[str, dict[int, Step]] = {"eager": {}, "trmfast": {}}
    per_update = 0.0
    for l_cycles in sorted(arguments.l_cycles):
        case = case_of(arguments.batch, l_cycles)
        for name, steps in found.items():
            free = machine()["memory_available"]
            if name == "eager" and free is not None and MARGIN * per_update * case.problem.num_grad_updates > free:
                continue
            steps[l_cycles] = measure(name, case)
        if l_cycles in found["eager"]:
            step = found["eager"][l_cycles]
            per_update = step.peak / step.updates
    rows = []
    for l_cycles, fused in found["trmfast"].items():
        eager = found["eager"].get(l_cycles)
        tokens = arguments.batch * 97
        rows.append(
            [
                str(l_cycles),
                str(fused.updates),
                f"{eager.kept / tokens:,.0f}" if eager else "-",
                f"{fused.kept / tokens:,.0f}",
                f"{eager.peak / 1e6:,.0f}" if eager else f"over {per_update * fused.updates / 1e6:,.0f}, left out",
                f"{fused.peak / 1e6:,.0f}",
                f"{fused.peak / eager.peak:.1%}" if eager else "-",
                f"{eager.seconds:.2f}" if eager else "-",
                f"{fused.seconds:.2f}",
            ]
        )
    title = f"TRM Sudoku, D=512, L=97, B={arguments.batch}, bf16, {torch.get_num_threads()} threads"
    columns = ["L_cycles", "window", "kept B/token: eager", "trmfast", "peak MB: eager", "trmfast", "share"]
    print_table(title, [*columns, "step s: eager", "trmfast"], rows)
    if arguments.chart:
        draw(arguments.chart, found, title)


if __name__ == "__main__":
    main()
