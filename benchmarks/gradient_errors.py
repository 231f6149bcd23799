"""Errors of the engine's results against float64, as multiples of eager PyTorch's, tensor by tensor over several seeds.

    python benchmarks/gradient_errors.py                  # every small case and program, float32 and bfloat16
    python benchmarks/gradient_errors.py --published      # the published configurations, one sequence each (minutes)

For every final state, and the gradient of every weight, state and x: root mean square of (trmfast - float64) over that
of (eager - float64), the median over the seeds.  Printed are the median and the largest of these over the tensors of a
case.  Weights are scaled down as in the tests, see trmfast/testing.py; mlp_t in bfloat16 runs one cycle.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

import torch
from torch import Tensor

from trmfast.cases import PUBLISHED, SMALL, Case
from trmfast.cli.console import print_table
from trmfast.program import RecursionProgram
from trmfast.testing import draw_case, run_fused


def ratios(case: Case, dtype: torch.dtype, backend: str, seeds: int) -> dict[str, float]:
    """Median over the seeds by tensor; omits tensors that eager PyTorch gets exactly."""
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        (draw,) = draw_case(case, dtype, seeds=(seed,))
        fused = run_fused(draw.inputs, backend)
        for part in ("outputs", "gradients"):
            for name, truth in getattr(draw.truth, part).items():
                eager = _rms(getattr(draw.eager, part)[name], truth)
                if eager > 0:
                    found.setdefault(name, []).append(_rms(getattr(fused, part)[name], truth) / eager)
    return {name: statistics.median(values) for name, values in found.items()}


def _rms(tensor: Tensor, truth: Tensor) -> float:
    return (tensor.double() - truth).square().mean().sqrt().item()


def one_cycle(case: Case) -> Case:
    """The last L cycle alone, where rounding errors of mlp_t in bfloat16 are still small."""
    cycles = {"H_cycles": 1, "L_cycles": 1}
    return replace(case, problem=replace(case.problem, program=RecursionProgram.trm(**cycles)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", action="store_true", help="the published configurations")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="draws of each case (default: 5)")
    parser.add_argument("--backend", default="cpu", help="(default: cpu)")
    arguments = parser.parse_args()
    rows = []
    for case in PUBLISHED if arguments.published else SMALL:
        for dtype in (torch.float32, torch.bfloat16):
            mixes = case.problem.nets[0].block.token_mixer
            chosen = one_cycle(case) if mixes == "mlp_t" and dtype == torch.bfloat16 else case
            found = ratios(chosen, dtype, arguments.backend, arguments.seeds)
            worst = max(found, key=lambda name: found[name])
            middle = statistics.median(found.values())
            rows.append(
                [
                    case.name,
                    str(dtype).removeprefix("torch."),
                    str(len(found)),
                    f"{middle:.2f}",
                    f"{found[worst]:.2f}",
                    worst,
                ]
            )
    title = f"error of trmfast / error of eager PyTorch, against float64, {arguments.seeds} seeds"
    print_table(title, ("case", "dtype", "tensors", "median", "largest", "of"), rows)


if __name__ == "__main__":
    main()
