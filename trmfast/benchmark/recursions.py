"""A recursion of a suite as work: its implementations, built and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from trmfast.benchmark.errors import check_forward, check_training
from trmfast.benchmark.measure import Prepared, Row, Runs, build, count_flops, measure_works
from trmfast.benchmark.rivals import Runner, missing, runner_of
from trmfast.benchmark.suites import Work
from trmfast.cases import make_inputs

__all__ = ["measure_work", "prepare_work"]

# Rounding errors grow from update to update by a factor that grows with the weights; at this scale eager PyTorch stays
# close enough to float64 over a published program in bfloat16 for a verdict.  Times do not depend on it.
WEIGHT_SCALE = 0.3


def prepare_work(work: Work, say: Callable[[str], None], without: Sequence[str] = ()) -> Prepared:
    """Builds and checks all implementations of one problem.

    Args:
        work: the problem.
        say: called with what is being done.
        without: rivals to leave out.
    """
    inputs = make_inputs(work.case, work.state_dtype, device=work.place, weight_scale=WEIGHT_SCALE)
    makers: dict[str, tuple[str, Callable[[], Runs]]] = {}
    absent = []
    for name in (*work.rivals, "trmfast"):
        kind = runner_of(name, work.dtype)
        reason = "left out" if name in without else missing(name, work.dtype, work.device)
        if reason is None:
            makers[name] = kind.title, partial(kind, inputs, torch.get_num_threads())
        else:
            absent.append(f"{work}: no {kind.title}: {reason}")
    built, failed = build(str(work), makers, work.steps, say, ("trmfast",), work.device)
    say(f"{work}: error")
    runners = {name: b.runner for name, b in built.items() if isinstance(b.runner, Runner)}
    check = {"forward": check_forward, "training": check_training}
    checks = {step: check[step](runners, inputs) for step in work.steps}
    flops = count_flops(work.case.problem, work.case.batch, work.case.length)
    return Prepared(work, built, checks, flops, [*absent, *failed])


def measure_work(
    work: Work, seconds: float, say: Callable[[str], None], without: Sequence[str] = ()
) -> tuple[list[Row], list[str]]:
    """Builds, checks and times all implementations of one problem.

    Args:
        work: the problem.
        seconds: time to spend on the rounds of one step.
        say: called with what is being done.
        without: rivals to leave out.

    Returns:
        The rows, and remarks for the reader.
    """
    prepared = prepare_work(work, say, without)
    return measure_works([prepared], seconds * len(work.steps), say), prepared.remarks
