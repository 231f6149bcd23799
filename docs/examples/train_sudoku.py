"""Trains a small TRM on Sudoku, with the published recipe, on a CPU or a GPU.

    python docs/examples/train_sudoku.py runs/mlp                        # tokens mixed by mlp_t
    python docs/examples/train_sudoku.py runs/attention --mixer attention
    torchrun --nproc-per-node 2 docs/examples/train_sudoku.py runs/mlp   # data parallel
    python docs/examples/train_sudoku.py runs/eager --eager              # the same without trmfast, for comparison

The recipe is that of the paper (arXiv 2510.04871): deep supervision through the carry, halting with exploration,
stablemax cross entropy, AdamAtan2, an average of the weights (EMA).  Puzzles are generated (`sudoku_data.py`); every
batch holds random symmetric copies of some of them.  With small batches attention does not find rows, columns and boxes
by itself: it starts with positions and heads that attend to them (`start_related`), and learns one short supervision
step (`--shallow-steps`) before the whole recursion.  The folder receives

    puzzles.npz          the generated puzzles
    checkpoint.pt        everything that training needs to go on
    log.csv, loss.png    losses, accuracy, speed
    model.safetensors    the averaged weights, for `trmfast.load`

`export_sudoku.py` makes a file for `trmfast solve` of it, `compare_sudoku.py` draws two trainings in one chart.

The same command goes on from the last checkpoint.  A step depends on the seed, the rank and its number alone, so a run
that was killed ends with the same weights, bit for bit, as one that was not (on the same machine and as many threads).

Needs: pip install 'trmfast[examples]'
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import sudoku_data
import torch
import torch.distributed as dist
from adam_atan2_pytorch import AdamAtan2
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from sudoku_log import Row, write_log
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import trmfast
from trmfast.budget import recompute_of
from trmfast.models import TRM, ACTLossHead
from trmfast.sudoku_puzzles import symmetric_copies

COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)
NAMES = ("steps", "lr", "shallow_steps", "fixed_attention", "fewest_clues", "most_clues")
DEFAULTS = {
    "mlp_t": dict(zip(NAMES, (4000, 1e-3, 0, 0, 28, 50), strict=True)),
    "attention": dict(zip(NAMES, (9000, 5e-4, 3000, 600, 32, 52), strict=True)),
}
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Training:
    """Model, optimizer, average, carry and history: what a checkpoint holds."""

    def __init__(self, options: argparse.Namespace, puzzles: dict[str, np.ndarray]) -> None:
        self.options = options
        self.train, self.test = puzzles["train"], puzzles["test"]
        self.device = (
            torch.device("cuda", RANK % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
        )
        torch.manual_seed(options.seed)
        mlp_t = options.mixer == "mlp_t"
        config = {
            "batch_size": options.batch,
            "seq_len": 81,
            "vocab_size": 11,
            "num_puzzle_identifiers": 1,
            "puzzle_emb_ndim": 0,
            "hidden_size": options.hidden,
            "num_heads": max(1, options.hidden // 32),
            "expansion": 4,
            "L_layers": 2,
            "H_cycles": options.H_cycles,
            "L_cycles": options.L_cycles,
            # Without the tokens of a puzzle embedding, rotation gives attention no fixed point to count cells from.
            "pos_encodings": "none" if mlp_t else "learned",
            "mlp_t": mlp_t,
            "halt_max_steps": 16,
            "halt_exploration_prob": 0.1,
            "forward_dtype": options.dtype,
            "recompute": options.recompute,
        }
        self.config = config
        model = TRM(config)
        if not mlp_t:
            start_related(model.inner)
        if options.eager:
            from trmfast.benchmark.eager import EagerTRM

            fused, model = model, EagerTRM(config)
            model.load_state_dict(fused.state_dict())  # the same initial weights
        self.head = ACTLossHead(model, "stablemax_cross_entropy").to(self.device).train()
        self.average: Any = AveragedModel(self.head, multi_avg_fn=get_ema_multi_avg_fn(options.ema))
        self.optimizer = AdamAtan2(
            self.head.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=options.weight_decay
        )
        self.carry = self.head.initial_carry(self.batch(0))
        self.step, self.seconds = 0, 0.0
        self.history: list[Row] = []

    def batch(self, step: int) -> dict[str, Tensor]:
        """Symmetric copies of random training puzzles, some cells revealed; the same for a step and rank."""
        generator = np.random.default_rng([self.options.seed, RANK, step])
        chosen = self.train[generator.integers(0, len(self.train), self.options.batch)]
        pairs = symmetric_copies(chosen, generator)
        most = self.options.reveal * max(0.0, 1 - 2 * step / self.options.steps)
        revealed = generator.random((len(pairs), 81)) < most * generator.random((len(pairs), 1))
        pairs[:, 0][revealed] = pairs[:, 1][revealed]
        return self.tensors(pairs)

    def tensors(self, pairs: np.ndarray) -> dict[str, Tensor]:
        """Puzzles and solutions [B, 2, 81] as the model's batch; token 1 is an empty cell."""
        tokens = torch.from_numpy(pairs.astype(np.int32) + 1).to(self.device)
        identifiers = torch.zeros(len(tokens), dtype=torch.int32, device=self.device)
        return {
            "inputs": tokens[:, 0].contiguous(),
            "labels": tokens[:, 1].contiguous(),
            "puzzle_identifiers": identifiers,
        }

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine down to a tenth."""
        options = self.options
        if self.step < options.warmup:
            return options.lr * (self.step + 1) / options.warmup
        progress = (self.step - options.warmup) / max(1, options.steps - options.warmup)
        return options.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))

    def advance(self) -> dict[str, float]:
        """One optimizer step, which is one supervision step of every row; its metrics."""
        torch.manual_seed(hash((self.options.seed, RANK, self.step)))  # exploration
        self.set_depth()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.carry, loss, metrics, _, _ = self.head([], carry=self.carry, batch=self.batch(self.step))
        (loss / (self.options.batch * RANKS)).backward()
        if RANKS > 1:
            gradients = [p.grad for p in self.head.parameters() if p.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        if self.step < self.options.fixed_attention:
            fix_attention(self.head.model.inner)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update_parameters(self.head)
        self.step += 1
        return {name: float(value) for name, value in metrics.items()}

    def set_depth(self) -> None:
        """A supervision step of two updates on new puzzles every time at first, then the whole recursion."""
        shallow = self.step < self.options.shallow_steps
        for head in (self.head, self.average.module):
            head.model.inner.set_cycles(*((1, 1) if shallow else (self.options.H_cycles, self.options.L_cycles)))
            head.model.halt_max_steps = 1 if shallow else self.config["halt_max_steps"]

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Share of the empty cells and of the held-out puzzles that the averaged weights get right."""
        head = self.average.module.eval()
        cells, exact, empty = 0, 0, 0
        for start in range(0, len(self.test), self.options.batch):
            batch = self.tensors(self.test[start : start + self.options.batch])
            carry, ended = head.initial_carry(batch), False
            while not ended:
                carry, _, _, outputs, all_halted = head(["preds"], carry=carry, batch=batch)
                ended = bool(all_halted)
            right, blank = outputs["preds"] == batch["labels"], batch["inputs"] == 1
            cells, empty = cells + int((right & blank).sum()), empty + int(blank.sum())
            exact += int(right.all(-1).sum())
        head.train()
        return cells / empty, exact / len(self.test)

    def averaged(self) -> ACTLossHead:
        """The model with the averaged weights, fused whatever it was trained with."""
        model = TRM(self.config)
        model.load_state_dict(self.average.module.model.state_dict())
        return ACTLossHead(model, "stablemax_cross_entropy").to(self.device)

    # ---------------------------------------------------------------- files

    def save(self, folder: Path) -> None:
        """Writes the checkpoint; a kill in between leaves the one before."""
        carry: list[Any] = [None] * RANKS
        mine = (self.carry.inner_carry, self.carry.steps, self.carry.halted, self.carry.current_data)
        if RANKS > 1:
            dist.gather_object(mine, carry if RANK == 0 else None)
        else:
            carry = [mine]
        if RANK > 0:
            return
        content = {
            "options": vars(self.options),
            "head": self.head.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "carry": carry,
            "step": self.step,
            "seconds": self.seconds,
            "history": [asdict(row) for row in self.history],
        }
        part = folder / "checkpoint.pt.part"
        torch.save(content, part)
        os.replace(part, folder / "checkpoint.pt")

    def resume(self, folder: Path) -> None:
        """Goes on from the checkpoint, if there is one."""
        path = folder / "checkpoint.pt"
        if not path.exists():
            return
        content = torch.load(path, map_location=self.device, weights_only=False)
        began = options_of(content)
        for name, value in vars(self.options).items():
            if name not in ("folder", "steps", "stop_after") and began[name] != value:
                option = f"--{name.replace('_', '-')}"
                raise SystemExit(f"{option}: got {value}, accepted is {began[name]}, with which {path} began")
        self.head.load_state_dict(content["head"])
        self.average.load_state_dict(content["average"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.carry.inner_carry, self.carry.steps, self.carry.halted, self.carry.current_data = content["carry"][RANK]
        self.step, self.seconds = content["step"], content["seconds"]
        self.history = [Row(**row) for row in content["history"]]

    def report(self, folder: Path) -> None:
        """Writes log.csv, loss.png and the averaged model."""
        write_log(folder, self.history)
        trmfast.save(self.averaged(), folder / "model.safetensors")


@torch.no_grad()
def start_related(inner: Any) -> None:
    """Cells of a row, a column or a box begin with like positions, and heads attend to cells that are like their own.

    A position is the sum of a vector for its row, its column and its box; keys start as half the queries.
    """
    positions = inner.embed_pos.embedding_weight
    units = torch.randn(3, 9, positions.shape[1]) * 2 * inner.config.hidden_size**-0.5 / math.sqrt(3)
    row, column = torch.arange(81) // 9, torch.arange(81) % 9
    positions.copy_(units[0, row] + units[1, column] + units[2, row // 3 * 3 + column // 3])
    for layer in inner.L_level.layers:
        query, key, _ = layer.self_attn.qkv_proj.weight.chunk(3)
        key.copy_(query / 2)


def fix_attention(inner: Any) -> None:
    """Keeps positions, queries and keys as they are in this step: Adam's first steps would blur their start."""
    inner.embed_pos.embedding_weight.grad.zero_()
    for layer in inner.L_level.layers:
        query, key, _ = layer.self_attn.qkv_proj.weight.grad.chunk(3)
        query.zero_()
        key.zero_()


def options_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The options of a checkpoint; what was not an option when it was written has its default."""
    return {**vars(parse([""])), **checkpoint["options"]}


def puzzles_of(options: argparse.Namespace) -> dict[str, np.ndarray]:
    """The puzzles of the folder, generated by the first rank if they are not there."""
    path = options.folder / "puzzles.npz"
    if RANK == 0 and not path.exists():
        clues = (options.fewest_clues, options.most_clues)
        with Progress(*COLUMNS) as progress:
            made = {}
            for name, count in (("train", options.puzzles), ("test", options.test_puzzles)):
                done = partial(progress.advance, progress.add_task(f"{name} puzzles", total=count))
                made[name] = sudoku_data.make(count, options.seed, name == "test", clues, done)
        with (options.folder / "puzzles.npz.part").open("wb") as file:
            np.savez(file, **made)  # type: ignore[arg-type]
        os.replace(options.folder / "puzzles.npz.part", path)
    if RANKS > 1:
        dist.barrier()
    with np.load(path) as content:
        return dict(content)


def run(options: argparse.Namespace) -> Training:
    """Trains until ``options.steps``, or for ``options.stop_after`` seconds."""
    options.folder.mkdir(parents=True, exist_ok=True)
    training = Training(options, puzzles_of(options))
    training.resume(options.folder)
    started = time.monotonic()
    with Progress(*COLUMNS, disable=RANK > 0) as progress:
        task = progress.add_task("training", total=options.steps, completed=training.step)
        sums: dict[str, float] = {}
        since, last = training.step, time.monotonic()
        logged = last
        while training.step < options.steps:
            for name, value in training.advance().items():
                sums[name] = sums.get(name, 0.0) + value
            now = time.monotonic()
            training.seconds, last = training.seconds + now - last, now
            progress.update(task, completed=training.step)
            out_of_time = options.stop_after is not None and now - started > options.stop_after
            if RANKS > 1:  # all ranks stop at the same step
                votes = torch.tensor(float(out_of_time))
                dist.all_reduce(votes)
                out_of_time = bool(votes > 0)
            if training.step % options.log_every and training.step < options.steps and not out_of_time:
                continue
            steps, count = training.step - since, max(1.0, sums["count"])
            row = Row(
                step=training.step,
                seconds=round(training.seconds, 3),
                loss=sums["lm_loss"] / steps / options.batch,
                q_loss=sums["q_halt_loss"] / steps / options.batch,
                exact=sums["exact_accuracy"] / count,
                halted_after=sums["steps"] / count,
            )
            if training.step % options.test_every == 0 or training.step == options.steps:
                row.test_cells, row.test_exact = training.evaluate()
                progress.console.print(
                    f"step {row.step}: loss {row.loss:.4f}, held-out puzzles solved {row.test_exact:.1%}"
                )
            training.history.append(row)
            training.save(options.folder)
            if RANK == 0:
                training.report(options.folder)
            speed = steps / (now - logged)
            progress.update(task, description=f"loss {row.loss:.3f}, {row.exact:.1%} solved, {speed:.1f} steps/s")
            sums, since, last = {}, training.step, time.monotonic()
            logged = last
            if out_of_time:
                break
    return training


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, help="where the run lives; the same folder goes on from its checkpoint")
    add("--mixer", choices=("mlp_t", "attention"), default="mlp_t", help="token mixer (default: mlp_t)")
    add("--hidden", type=int, default=128, metavar="D", help="width of the states (default: 128)")
    add("--H-cycles", type=int, default=2, metavar="N")
    add("--L-cycles", type=int, default=2, metavar="N")
    add("--batch", type=int, default=32, metavar="N", help="puzzles of a batch on each rank (default: 32)")
    add("--steps", type=int, metavar="N", help="optimizer steps (default: 4000, attention 9000)")
    add("--stop-after", type=float, metavar="SECONDS", help="stop with a checkpoint after this time")
    add("--lr", type=float, help="learning rate (default: 1e-3, attention 5e-4)")
    add("--warmup", type=int, default=200, metavar="N", help="steps of linear warm-up (default: 200)")
    add("--weight-decay", type=float, default=0.1)
    add("--ema", type=float, default=0.995, help="decay of the averaged weights (default: 0.995)")
    add("--dtype", choices=("bfloat16", "float32"), default="float32", help="compute dtype")
    add("--eager", action="store_true", help="without trmfast: eager PyTorch as upstream writes it")
    add(
        "--recompute",
        type=recompute_of,
        default=False,
        metavar="SETTING",
        help="True, or a size such as 256MB that may be kept instead of computed again (default: False, keep all)",
    )
    add("--shallow-steps", type=int, metavar="N", help="of one short supervision step (default: 0, attention 3000)")
    add("--fixed-attention", type=int, metavar="N", help="before queries and keys move (default: 0, attention 600)")
    add("--puzzles", type=int, default=8000, metavar="N", help="generated for training (default: 8000)")
    add("--test-puzzles", type=int, default=512, metavar="N", help="held out (default: 512)")
    add("--fewest-clues", type=int, metavar="N", help="clues are uniform from here (default: 28, attention 32)")
    add("--most-clues", type=int, metavar="N", help="to here (default: 50, attention 52)")
    add(
        "--reveal",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="share of a puzzle's empty cells filled in at most, falling to 0 in the first half (default: 0.5)",
    )
    add("--log-every", type=int, default=100, metavar="N", help="steps from checkpoint to checkpoint (default: 100)")
    add("--test-every", type=int, default=1000, metavar="N", help="steps from test to test (default: 1000)")
    add("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for name, value in DEFAULTS[options.mixer].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if RANKS > 1:
        dist.init_process_group("gloo")
    try:
        run(options)
    finally:
        if RANKS > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
