"""The cost and savings of recomputation for the unmodified models of tiny-recursive-model and hrm-pytorch.

One training step (forward, loss, backward) of each, plain and after ``trmfast.foreign``, in turns in one process: bytes
that autograd keeps after forward (every storage once, without parameters and buffers), median times, and whether loss
and gradients agree in every bit.

    pip install -e '.[test]' && python benchmarks/foreign.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from HRM import HRM
from tiny_recursive_model import MLPMixer1D, TinyRecursiveModel
from torch import Tensor, nn
from x_transformers import Encoder  # type: ignore[import-untyped]

from trmfast import foreign
from trmfast.benchmark.memory import saved_bytes
from trmfast.cli.console import print_table

TOKENS, LENGTH = 11, 81  # Sudoku


def networks(dim: int) -> dict[str, Callable[[], nn.Module]]:
    """The example models of the two packages' READMEs, the first also with attention."""
    encoder = {"dim": dim, "depth": 2, "heads": dim // 64, "use_rmsnorm": True, "rotary_pos_emb": True}
    return {
        "TinyRecursiveModel, MLPMixer1D": lambda: TinyRecursiveModel(
            dim=dim, num_tokens=TOKENS, network=MLPMixer1D(dim=dim, depth=2, seq_len=LENGTH)
        ),
        "TinyRecursiveModel, Encoder": lambda: TinyRecursiveModel(
            dim=dim, num_tokens=TOKENS, network=Encoder(**encoder)
        ),
        "HRM, two Encoders": lambda: HRM([encoder, encoder], dim=dim, num_tokens=TOKENS),
    }


def step(model: nn.Module, seq: Tensor, labels: Tensor) -> Tensor:
    """The loss of one supervision step from the initial states."""
    states = model.get_initial() if isinstance(model, TinyRecursiveModel) else ()
    loss: Tensor = model(seq, *states, labels=labels)[0]
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=256, help="width, a multiple of 64 (default: 256)")
    parser.add_argument("--batch", type=int, default=8, help="sequences (default: 8)")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each (default: 7)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    seq, labels = torch.randint(0, TOKENS, (2, arguments.batch, LENGTH))
    rows = []
    for name, make in networks(arguments.dim).items():
        model = make()
        found = foreign.recognise(model)
        assert found is not None
        kept, times = [0, 0], ([], [])  # type: tuple[list[int], tuple[list[float], list[float]]]
        results = []
        for repeat in range(arguments.repeats + 1):
            for kind in (0, 1):
                found.swap() if kind else foreign.undo(model)
                model.zero_grad()
                start = time.perf_counter()
                loss = step(model, seq, labels)
                loss.backward()
                if repeat:
                    times[kind].append(time.perf_counter() - start)
                else:  # the first step of each is not timed
                    kept[kind] = saved_bytes(partial(step, model, seq, labels), model.parameters(), model.buffers())
                    results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        before, after = (statistics.median(values) for values in times)
        tokens = arguments.batch * LENGTH
        rows.append(
            [
                name,
                f"{kept[0] / tokens:,.0f}",
                f"{kept[1] / tokens:,.0f}",
                f"{kept[0] / kept[1]:.1f}x",
                f"{1e3 * before:.0f}",
                f"{1e3 * after:.0f}",
                f"{after / before:.2f}x",
                "every bit" if same else "no",
            ]
        )
    title = f"D={arguments.dim}, L={LENGTH}, B={arguments.batch}, fp32, {torch.get_num_threads()} threads"
    columns = ("model", "kept B/token", "after", "less", "step ms", "after", "time", "same")
    print_table(title, columns, rows)


if __name__ == "__main__":
    main()
