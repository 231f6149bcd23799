"""Writes what docs/gpu.md says of the CUDA engine: ``python -m trmfast.benchmark.cuda_engine --write docs/gpu.md``.

Bytes are those that the kernel moves (kernels/persistent.py, which tests/test_cuda_emulated.py holds against what the
emulator counts), times are a model's.  Needs the engine (``TRMFAST_CUDA=1``), which makes the plans; no GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from trmfast.backends import BACKENDS, cuda
from trmfast.benchmark.gpu import parse, put
from trmfast.cases import MEASURED, PUBLISHED, Case, make_case
from trmfast.kernels.architectures import GPUS
from trmfast.kernels.configurations import Configuration
from trmfast.kernels.forward_plan import Setting
from trmfast.kernels.persistent import GAIN, persistent_traffic

__all__ = ["SECTIONS", "model_section", "traffic_section"]

SHOWN = ("A100", "L40S", "RTX 4090", "H100")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 768)
# The published problems that the engine takes, and narrower ones.
CASES = (
    *(case for case in PUBLISHED if case.name != "urm-arc"),
    *(case for case in MEASURED if case.name.startswith("trm-small")),
    make_case("trm-256-att", H_cycles=3, L_cycles=6, batch=1, length=97, hidden_size=256, num_heads=4),
)


def traffic_section() -> list[str]:
    """Bytes of one sequence in one supervision step, at the batch of most sequences."""
    lines = [
        "| problem | GPU | blocks x tokens of a sequence | weights MB | RoPE tables MB | exchange MB | states MB "
        "| compulsory MB | exchange and states / compulsory |",
        "| --- | --- | --- |" + " ---: |" * 6,
    ]
    for case in CASES:
        for name in SHOWN:
            prepared = cuda._prepare(case.problem, BATCHES[-1], case.length, cuda.limits_of(GPUS[name]))
            grid = cuda.grid_of(prepared)
            one = persistent_traffic(case.problem, 1, case.length, grid, rope=case.rope)
            amounts = (one.weights, one.tables, one.exchange, one.states, one.compulsory)
            cells = [f"{nbytes / 1e6:.3g}" for nbytes in amounts]
            cells.append(f"{one.activations / one.compulsory:.1f}")
            lines.append(f"| {case.name} | {name} | {grid.group_blocks} x {grid.rows} | {' | '.join(cells)} |")
    return lines


def model_section() -> list[str]:
    """Milliseconds of one launch, and how many times faster than Triton's launches that is."""
    lines = [
        f"| problem | GPU | {' | '.join(f'B = {batch}' for batch in BATCHES)} |",
        f"| --- | --- |{' ---: |' * len(BATCHES)}",
    ]
    for case in CASES:
        for name in SHOWN:
            cells = [_compared(replace(case, batch=batch), name) for batch in BATCHES]
            lines.append(f"| {case.name} | {name} | {' | '.join(cells)} |")
    return lines


def _compared(case: Case, name: str) -> str:
    gpu = GPUS[name]
    configuration = Configuration(gpu.architecture, gpu.multiprocessors)
    setting = Setting(case.problem, case.batch, case.length, torch.bfloat16, case.rope, configuration)
    times = cuda.modelled_times(case.problem, case.batch, case.length, setting, cuda.limits_of(gpu))
    if times is None:
        return "-"
    one, launches = times
    text = f"{one * 1e3:.3g} ({launches / one:.2f})"
    return f"**{text}**" if launches >= GAIN * one else text


SECTIONS: dict[str, Callable[[], list[str]]] = {"cuda-traffic": traffic_section, "cuda-model": model_section}
"""What stands between ``<!-- name -->`` and ``<!-- /name -->`` in docs/gpu.md."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints sections, or writes them into a document; 2 without the engine."""
    parser = argparse.ArgumentParser(prog="python -m trmfast.benchmark.cuda_engine", description=__doc__)
    options = parse(parser, SECTIONS, arguments)
    if cuda._cuda is None:
        print(BACKENDS["cuda"].available(), file=sys.stderr)
        return 2
    put(SECTIONS, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
