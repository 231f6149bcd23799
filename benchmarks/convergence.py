"""Trains the same small TRM twice on Sudoku, in eager PyTorch and in trmfast, and draws both loss curves.

    python benchmarks/convergence.py                   # 200 optimizer steps, a few minutes on two cores
    python benchmarks/convergence.py --dtype float32

Both start from the same parameters and see the same puzzles; they take turns, step by step, in one process.  Training
is that of the paper (arXiv 2510.04871), without EMA: deep supervision through the carry, halting, stablemax loss,
AdamAtan2.  It prints the losses, the time spent in steps, and the time at which each first reached the final loss of
eager PyTorch (mean over 20 steps).
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from adam_atan2_pytorch import AdamAtan2
from torch import Tensor

from trmfast.benchmark.eager import EagerTRM
from trmfast.models import TRM, ACTLossHead
from trmfast.puzzles import sudoku_batch

WINDOW = 20


@dataclass
class Run:
    """One of the two trainings.

    Attributes:
        name: what charts call it.
        head: model and loss.
        losses: of each step, for one cell.
        seconds: how long each step took, optimizer included.
    """

    name: str
    head: ACTLossHead
    optimizer: torch.optim.Optimizer
    carry: Any
    generator: torch.Generator
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self, batch: dict[str, Tensor]) -> None:
        """One optimizer step; rows that have halted take new puzzles."""
        # Halting explores at random: each run has its own generator state, with the same numbers.
        with torch.random.fork_rng(devices=()):
            torch.set_rng_state(self.generator.get_state())
            start = time.perf_counter()
            self.optimizer.zero_grad(set_to_none=True)
            self.carry, loss, metrics, _, _ = self.head([], carry=self.carry, batch=batch)
            (loss / len(batch["inputs"])).backward()
            self.optimizer.step()
            self.seconds.append(time.perf_counter() - start)
            self.generator.set_state(torch.get_rng_state())
        self.losses.append(metrics["lm_loss"].item() / len(batch["inputs"]))

    def smooth(self) -> list[float]:
        """The mean of the last WINDOW losses at every step."""
        return [
            sum(part) / len(part)
            for i in range(len(self.losses))
            if (part := self.losses[max(0, i - WINDOW + 1) : i + 1])
        ]

    def seconds_to(self, loss: float) -> float | None:
        """Time spent in steps until the smoothed loss is reached."""
        reached = next((i for i, value in enumerate(self.smooth()) if i >= WINDOW and value <= loss), None)
        return None if reached is None else sum(self.seconds[: reached + 1])


def train(arguments: argparse.Namespace) -> list[Run]:
    config = {
        "batch_size": arguments.batch,
        "seq_len": 81,
        "vocab_size": 11,
        "num_puzzle_identifiers": 1,
        "puzzle_emb_ndim": 0,
        "hidden_size": arguments.hidden,
        "num_heads": arguments.hidden // 64,
        "expansion": 4,
        "L_layers": 2,
        "H_cycles": 3,
        "L_cycles": 6,
        "pos_encodings": "rope",
        "halt_max_steps": 16,
        "halt_exploration_prob": 0.1,
        "forward_dtype": arguments.dtype,
    }
    torch.manual_seed(arguments.seed)
    fused = TRM(config)
    models = {"eager PyTorch": EagerTRM(config), "trmfast": fused}
    puzzles = [sudoku_batch(arguments.batch, seed=seed) for seed in range(arguments.pool)]
    runs = []
    for name, model in models.items():
        model.load_state_dict(fused.state_dict())
        head = ACTLossHead(model, "stablemax_cross_entropy").train()
        optimizer = AdamAtan2(head.parameters(), lr=arguments.lr, betas=(0.9, 0.95), weight_decay=0.1)
        generator = torch.Generator().manual_seed(arguments.seed)
        runs.append(Run(name, head, optimizer, model.initial_carry(puzzles[0]), generator))
    order = random.Random(arguments.seed)
    for step in range(arguments.steps):
        batch = order.choice(puzzles)
        for run in runs if step % 2 else reversed(runs):
            run.step(batch)
    return runs


def draw(path: Path, runs: list[Run], title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from itertools import accumulate

    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    styles = {"eager PyTorch": ("#8a929c", 3.6), "trmfast": ("#1f4e79", 1.4)}
    for run in runs:
        colour, width = styles[run.name]
        axes[0].plot(range(1, len(run.losses) + 1), run.smooth(), color=colour, linewidth=width, label=run.name)
        axes[1].plot(list(accumulate(run.seconds)), run.smooth(), color=colour, linewidth=width, label=run.name)
    axes[0].set_xlabel("optimizer step")
    axes[1].set_xlabel("seconds spent in steps")
    axes[0].set_ylabel(f"cross entropy of a cell (mean over {WINDOW} steps)")
    for axis in axes:
        axis.grid(color="#e3e5e8", linewidth=0.8)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="optimizer steps (default: 200)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="puzzles of a batch (default: 32)")
    parser.add_argument("--hidden", type=int, default=128, metavar="D", help="width of the states (default: 128)")
    parser.add_argument("--pool", type=int, default=16, metavar="N", help="batches of puzzles (default: 16)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default: 1e-3)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="compute dtype")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chart", type=Path, metavar="FILE", help="where the picture goes (default: none)")
    arguments = parser.parse_args()
    runs = train(arguments)
    eager, fused = runs
    final = eager.smooth()[-1]
    what = f"D = {arguments.hidden}, B = {arguments.batch}, L = 81, {arguments.dtype}"
    print(f"TRM, {what}, {arguments.steps} steps")
    for run in runs:
        reached = run.seconds_to(final)
        at = f"{reached:.1f} s" if reached is not None else "not reached"
        losses = f"{run.losses[0]:.3f} -> {run.smooth()[-1]:.3f}"
        print(f"{run.name:14} loss {losses}, {sum(run.seconds):.1f} s; to loss {final:.3f}: {at}")
    gap = max(abs(a - b) for a, b in zip(eager.smooth(), fused.smooth(), strict=True))
    ratio = sum(eager.seconds) / sum(fused.seconds)
    print(f"largest distance of the curves {gap:.4f}; time of eager over time of trmfast {ratio:.2f}")
    if arguments.chart:
        title = f"Small TRM on Sudoku: {what}, {torch.get_num_threads()} threads"
        draw(arguments.chart, runs, title)


if __name__ == "__main__":
    main()
