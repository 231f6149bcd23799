"""Times an accelerated model of upstream's structure against ``trmfast.TRM``, and against the unaccelerated model.

    python benchmarks/dropin.py                 # TRM Sudoku, attention, B = 8, about a minute on two cores

One supervision step forward and one training step in bfloat16, the three models with the same weights taking turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import trmfast
from trmfast.models import ACTLossHead
from trmfast.puzzles import sudoku_batch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from dropin_models import recursive as upstream  # its structure, written from the published facts

CONFIG: dict[str, Any] = {
    "batch_size": 8,
    "seq_len": 81,
    "vocab_size": 11,
    "num_puzzle_identifiers": 1,
    "puzzle_emb_ndim": 512,
    "puzzle_emb_len": 16,
    "hidden_size": 512,
    "num_heads": 8,
    "expansion": 4,
    "H_layers": 0,
    "L_layers": 2,
    "H_cycles": 3,
    "L_cycles": 6,
    "pos_encodings": "rope",
    "halt_max_steps": 16,
    "halt_exploration_prob": 0.1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "no_ACT_continue": True,
    "forward_dtype": "bfloat16",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11, metavar="N", help="rounds (default: 11)")
    parser.add_argument("--mlp_t", action="store_true", help="the MLP variant")
    arguments = parser.parse_args()
    config = {**CONFIG, "mlp_t": arguments.mlp_t, "pos_encodings": "none" if arguments.mlp_t else "rope"}
    torch.manual_seed(0)
    own = trmfast.TRM(config)
    plain, accelerated = upstream.TRM(config), upstream.TRM(config)
    for model in (plain, accelerated):
        model.load_state_dict(own.state_dict())
    models = {"plain": plain, "accelerate": trmfast.accelerate(accelerated), "trmfast.TRM": own}
    heads = {name: ACTLossHead(model, "stablemax_cross_entropy") for name, model in models.items()}
    batch = sudoku_batch(config["batch_size"])
    carries = {name: model.initial_carry(batch) for name, model in models.items()}

    def forward(name: str) -> None:
        with torch.no_grad():
            models[name].eval()(carry=carries[name], batch=batch)

    def training(name: str) -> None:
        head = heads[name].train()
        head.zero_grad(set_to_none=True)
        head([], carry=carries[name], batch=batch)[1].backward()

    print(
        f"TRM Sudoku, B={config['batch_size']}, bf16, {torch.get_num_threads()} threads; medians of {arguments.repeats}"
    )
    for step in (forward, training):
        report(step, list(models), arguments.repeats)


def report(step: Callable[[str], None], names: list[str], repeats: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats + 1):
        for name in names if turn % 2 else reversed(names):
            start = time.perf_counter()
            step(name)
            if turn:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    median = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    shown = ", ".join(f"{name} {value:.0f} ms" for name, value in median.items())
    print(
        f"{step.__name__}: {shown}; accelerate takes {median['accelerate'] / median['trmfast.TRM']:.3f} "
        f"of the time of trmfast.TRM, and is {median['plain'] / median['accelerate']:.2f} times as fast as before"
    )


if __name__ == "__main__":
    main()
