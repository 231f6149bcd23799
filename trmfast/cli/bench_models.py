"""``trmfast bench`` without ``--suite``: supervision steps of the published configurations."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch

from trmfast.benchmark import gpu
from trmfast.benchmark.compare import Change
from trmfast.benchmark.configs import CONFIGS
from trmfast.benchmark.measure import Row, measure_works
from trmfast.benchmark.models import prepare_model
from trmfast.benchmark.report import Report
from trmfast.benchmark.turns import FEWEST_ROUNDS, VISIT_SECONDS, fastest_dtype
from trmfast.budget import recompute_of
from trmfast.cli.bench_compare import Again
from trmfast.cli.console import Progress, UsageError, progress
from trmfast.cli.machine import describe_machine, facts

__all__ = ["measure_models"]

# Configurations that begin after this share of the time run without torch.compile.
COMPILE_SHARE = 0.7
TINY = {"hidden_size": 64, "num_heads": 2, "puzzle_emb_ndim": 64, "H_cycles": 2, "L_cycles": 2}


def measure_models(arguments: argparse.Namespace) -> tuple[Report, Again]:
    """Runs the configurations; also returns what measures some of them again.

    Raises:
        UsageError: puzzles come with a package that is not installed.
    """
    start = time.monotonic()
    names = arguments.config or list(CONFIGS)
    scope = None if arguments.no_compile or arguments.quick else arguments.compile
    others = [recompute_of(text) for text in arguments.recompute or ()]
    device = arguments.device
    peak_dtype, peak_source = fastest_dtype() if device == "cpu" else (torch.bfloat16, gpu.PEAK_SOURCE)
    settings = {
        "threads": torch.get_num_threads(),
        "compile": scope,
        "quick": arguments.quick,
        "tiny": arguments.tiny,
        "recompute": arguments.recompute,
        "device": device,
        "dtype": "bfloat16",
    }
    known = {**facts(settings), "peak_source": peak_source}

    def measure(name: str, compiled: str | None, seconds: float, bar: Progress) -> tuple[list[Row], list[str]]:
        try:
            prepared = prepare_model(
                CONFIGS[name],
                bar.step,
                compile_scope=compiled,
                overrides=TINY if arguments.tiny else {},
                peak_dtype=peak_dtype,
                batch=arguments.batch,
                check=(1, 2) if arguments.quick else None,
                settings=others,
                device=device,
            )
        except ModuleNotFoundError as error:
            raise UsageError(str(error)) from error
        fewest, visit = (2, 0.3) if arguments.quick else (FEWEST_ROUNDS, VISIT_SECONDS)
        rows = measure_works([prepared], seconds, bar.step, fewest=fewest, visit_seconds=visit)
        return rows, prepared.remarks

    rows: list[Row] = []
    remarks: list[str] = []
    # Eager PyTorch, trmfast, the options, accuracy and two steps.
    with progress((5 + (scope is not None) + len(others)) * len(names)) as bar:
        for i, name in enumerate(names):
            spent = time.monotonic() - start
            late = scope is not None and spent > COMPILE_SHARE * arguments.seconds
            if late:
                remarks.append(f"{CONFIGS[name].title}: no torch.compile, {spent:.0f} s had passed (--seconds)")
            # The rounds take half of an equal share; models, compilation and accuracy take the rest.
            seconds = 2.0 if arguments.quick else max(2.0, (arguments.seconds - spent) / (len(names) - i) / 2)
            found, said = measure(name, None if late else scope, seconds, bar)
            rows += found
            remarks += said
            torch.compiler.reset()

    def again(suspects: Sequence[Change]) -> list[Row]:
        silent = Progress(None, 0)
        cases = dict.fromkeys(change.key[0] for change in suspects)
        return [row for name in cases for row in measure(name, None, 20 * FEWEST_ROUNDS, silent)[0]]

    description, seconds = describe_machine(known["machine"]), time.monotonic() - start
    if device != "cpu":
        description = f"{gpu.describe()}; {description}"
    return Report(description, known, {}, tuple(rows), (), tuple(remarks), seconds), again
