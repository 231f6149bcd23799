"""Memory and time of a training step: as the gradient window grows, or for several budgets for activations.

    python benchmarks/window_memory.py                       # TRM Sudoku, B = 32, L_cycles 6 to 48
    python benchmarks/window_memory.py --chart memory.png
    python benchmarks/window_memory.py --recompute True 24MB 60MB 120MB False --batch 8 --chart budgets.png

TRM's window is its last cycle, of L_cycles + 1 updates.  A step is the recursion forward and backward into x and all
weights.  Memory is how far resident memory rises during it (VmHWM), packed weights and workspace of the engine
included.  Eager PyTorch skips sizes that need more memory than is free.  With ``--recompute`` the window is the
published one, and all settings and eager PyTorch take turns.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trmfast.benchmark.memory import peak_bytes, saved_bytes
from trmfast.benchmark.rivals import RIVALS, Fused, Trained
from trmfast.benchmark.turns import quartiles
from trmfast.budget import Recompute, recompute_of
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


@dataclass
class Budget:
    """Training steps with one setting of ``recompute``, None for eager PyTorch; kept and peak in bytes."""

    recompute: Recompute | None
    kept: int
    peak: int
    times: list[float]

    @property
    def title(self) -> str:
        return TITLES["eager"] if self.recompute is None else f"recompute={self.recompute}"

    @property
    def seconds(self) -> float:
        return statistics.median(self.times)


def measure_budgets(case: Case, settings: list[Recompute], rounds: int) -> list[Budget]:
    """Memory of each by itself; then one step of each in turn, so that all see the same state of the machine."""
    inputs, threads = make_inputs(case, torch.bfloat16, weight_scale=0.3), torch.get_num_threads()
    runners: list[tuple[Budget, Trained]] = []
    for recompute in (None, *settings):
        runner = (RIVALS["eager"] if recompute is None else Fused)(inputs, threads)
        assert isinstance(runner, Trained)
        if isinstance(runner, Fused) and recompute is not None:
            runner.recompute = recompute
        budget = Budget(recompute, saved_bytes(runner.outputs, runner.weights), peak_bytes(runner.training) or 0, [])
        runner.change_weights()
        for leaf in (runner.x, *runner.weights):
            if leaf is not None:
                leaf.grad = None
        runners.append((budget, runner))
    for _ in range(rounds):
        for budget, runner in runners:
            runner.training()  # warm, and packs the weights
            start = time.perf_counter()
            runner.training()
            budget.times.append(time.perf_counter() - start)
    return [budget for budget, _ in runners]


def print_budgets(found: list[Budget], tokens: int, title: str) -> None:
    eager, ours = found[0], found[1:]
    slow = max(budget.seconds for budget in ours)
    gain = slow - min(budget.seconds for budget in ours)
    rows = []
    for budget in found:
        low, high = quartiles(budget.times)
        rows.append(
            [
                budget.title,
                f"{budget.kept / 1e6:,.1f}",
                f"{budget.kept / tokens:,.0f}",
                f"{budget.peak / 1e6:,.0f}",
                f"{budget.peak / eager.peak:.0%}",
                f"{budget.seconds * 1e3:.1f}",
                f"{low * 1e3:.1f} to {high * 1e3:.1f}",
                f"{min(budget.times) * 1e3:.1f}",
                "" if budget is eager or not gain else f"{(slow - budget.seconds) / gain:.0%}",
            ]
        )
    columns = ["", "kept MB", "kept B/token", "peak MB", "of eager's", "step ms", "quartiles", "fastest", "of the gain"]
    print_table(title, columns, rows)


def draw_budgets(path: Path, found: list[Budget], title: str) -> None:
    figure, axis, pyplot = _figure()
    ours = found[1:]
    for field, line, what in (("peak", "-", "rise of resident memory"), ("kept", ":", "kept for backward")):
        x, y = [b.seconds * 1e3 for b in ours], [getattr(b, field) / 1e6 for b in ours]
        axis.plot(x, y, line, marker="o", color="#1f4e79", label=f"trmfast, {what}")
    for budget in ours:
        at = (budget.seconds * 1e3, budget.peak / 1e6)
        axis.annotate(budget.title, at, xytext=(5, 5), textcoords="offset points", fontsize=7.5)
    axis.axhline(found[0].peak / 4e6, color="#8a929c", linewidth=0.8, label="a quarter of eager PyTorch's rise")
    axis.set_ylim(0)
    axis.margins(x=0.15)
    axis.set_xlabel(f"ms for a training step (PyTorch eager: {found[0].seconds * 1e3:.0f})")
    axis.set_ylabel("MB")
    _save(figure, axis, pyplot, path, title)


def _figure() -> tuple[Any, Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    return figure, axis, pyplot


def _save(figure: Any, axis: Any, pyplot: Any, path: Path, title: str) -> None:
    axis.grid(color="#e3e5e8", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    axis.set_title(title, fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw(path: Path, found: dict[str, dict[int, Step]], title: str) -> None:
    figure, axis, pyplot = _figure()
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
    _save(figure, axis, pyplot, path, title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="sequences (default: 32)")
    parser.add_argument("--l-cycles", type=int, nargs="+", default=[6, 12, 24, 48], metavar="N", help="(6 12 24 48)")
    parser.add_argument(
        "--recompute", nargs="+", metavar="SETTING", help="True, False or sizes, to compare over the published window"
    )
    parser.add_argument("--case", default="trm-sudoku-att", metavar="NAME", help="(trm-sudoku-att)")
    parser.add_argument("--rounds", type=int, default=11, metavar="N", help="steps of each setting (default: 11)")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="where the picture goes (default: none)")
    arguments = parser.parse_args()
    threads = torch.get_num_threads()
    if arguments.recompute:
        case = replace(find_case(arguments.case), batch=arguments.batch)
        title = f"{case.name}, L={case.length}, B={case.batch}, bf16, {threads} threads"
        budgets = measure_budgets(case, [recompute_of(text) for text in arguments.recompute], arguments.rounds)
        print_budgets(budgets, case.batch * case.length, title)
        if arguments.chart:
            draw_budgets(arguments.chart, budgets, title)
        return
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
    title = f"TRM Sudoku, D=512, L=97, B={arguments.batch}, bf16, {threads} threads"
    columns = ["L_cycles", "window", "kept B/token: eager", "trmfast", "peak MB: eager", "trmfast", "share"]
    print_table(title, [*columns, "step s: eager", "trmfast"], rows)
    if arguments.chart:
        draw(arguments.chart, found, title)


if __name__ == "__main__":
    main()
