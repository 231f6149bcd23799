"""trmfast against eager PyTorch with both forced to the same instruction set.

    python benchmarks/instruction_sets.py                 # every set of this processor, float32 and bfloat16

Each set is forced in a process of its own: for the engine by TRMFAST_CPU_ISA, for PyTorch's kernels and libraries by
ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA and MKL_ENABLE_INSTRUCTIONS.  There, the two take turns on a forward and a
training step of TRM Sudoku.  Minutes: without AVX512-BF16, PyTorch's bfloat16 is slow.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace

import torch

from trmfast.backends.cpu import targets
from trmfast.benchmark.rivals import RIVALS, Trained
from trmfast.benchmark.turns import Turns
from trmfast.cases import find_case, make_inputs
from trmfast.cli.console import print_table

# Engine, ATen, oneDNN, MKL.  The portable target has no counterpart: PyTorch's kernels start at SSE4.1.
SETS = {
    "amx": ("avx512", "AVX512_CORE_AMX", "AVX512_E4"),
    "avx512_bf16": ("avx512", "AVX512_CORE_BF16", "AVX512_E4"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
    "avx2": ("avx2", "AVX2", "AVX2"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def time_both(dtype: torch.dtype, case: str, batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds by step and implementation, in this process."""
    inputs = make_inputs(replace(find_case(case), batch=batch), dtype, weight_scale=0.3)
    runners = {name: RIVALS[name](inputs, torch.get_num_threads()) for name in ("eager", "trmfast")}
    found = {}
    for step in ("forward", "training"):
        runs = {name: getattr(runner, step) for name, runner in runners.items()}
        for run in runs.values():
            run()
        between = {name: r.change_weights for name, r in runners.items() if isinstance(r, Trained)}
        turns = Turns(runs, dtype, between if step == "training" else None)
        for _ in range(rounds):
            turns.round()
        found[step] = {name: statistics.median(times) for name, times in turns.timing.times.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="trm-sudoku-att", help="a problem (default: trm-sudoku-att)")
    parser.add_argument("--batch", type=int, default=2, metavar="N", help="sequences (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="samples of each (default: 3)")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES), help="(default: both)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(time_both(DTYPES[arguments.dtype[0]], arguments.case, arguments.batch, arguments.rounds)))
        return
    rows = []
    known = targets()
    for target, (aten, onednn, mkl) in SETS.items():
        if known.get(target, "not compiled") is not None:
            print(f"{target}: {known.get(target, 'not compiled')}")
            continue
        environment = {"ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn, "MKL_ENABLE_INSTRUCTIONS": mkl}
        for dtype in arguments.dtype:
            if dtype == "float32" and target in ("amx", "avx512_bf16"):
                continue  # these targets compute it as avx512
            command = [sys.executable, __file__, "--child", "--dtype", dtype, "--case", arguments.case]
            command += ["--batch", str(arguments.batch), "--rounds", str(arguments.rounds)]
            done = subprocess.run(
                command,
                env={**os.environ, **environment, "TRMFAST_CPU_ISA": target},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            for step, seconds in json.loads(done.stdout).items():
                eager, fused = 1e3 * seconds["eager"], 1e3 * seconds["trmfast"]
                rows.append([target, dtype, step, f"{eager:.0f}", f"{fused:.0f}", f"{eager / fused:.2f}x"])
    title = f"{arguments.case}, B={arguments.batch}, {torch.get_num_threads()} threads, both forced"
    print_table(title, ("set", "dtype", "step", "eager ms", "trmfast ms", "faster"), rows)


if __name__ == "__main__":
    main()
