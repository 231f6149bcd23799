"""The plans of a problem on a GPU that need not be present: compiled offline, counted and printed."""

from __future__ import annotations

import torch
from trmfast.kernels.architectures import Gpu
from trmfast.kernels.backward_plan import backward_plan
from trmfast.kernels.configurations import Configuration
from trmfast.kernels.forward_plan import Setting, forward_plan
from trmfast.kernels.plan import Plan

from trmfast.problem import Problem

__all__ = ["plans", "setting_on"]


def setting_on(
    gpu: Gpu, problem: Problem, batch: int, length: int, dtype: torch.dtype, *, rope: bool = True
) -> Setting:
    """The setting of a problem on a GPU; float32 products are TF32.

    Args:
        gpu: whose tiles and choices.
        problem: program and networks.
        batch, length: B and L.
        dtype: compute dtype.
        rope: whether attention rotates queries and keys.
    """
    configuration = Configuration(gpu.architecture, gpu.multiprocessors)
    return Setting(problem, batch, length, dtype, rope and problem.rope_dim is not None, configuration, tf32=True)


def plans(
    gpu: Gpu,
    problem: Problem,
    batch: int,
    length: int,
    dtype: torch.dtype,
    *,
    rope: bool = True,
    needs_states: bool = False,
    keep: int = 0,
) -> tuple[Plan, Plan]:
    """The forward plan that saves, and the backward plan with the gradients of x and of all weights.

    Args:
        gpu, problem, batch, length, dtype, rope: as in :func:`setting_on`.
        needs_states: whether the incoming states need gradients; in training they come from a carry and do not.
        keep: as in :func:`forward_plan`.
    """
    setting = setting_on(gpu, problem, batch, length, dtype, rope=rope)
    needs = [needs_states] * len(problem.program.states)
    backward = backward_plan(setting, needs, problem.uses_x, [True] * problem.num_weights, keep)
    return forward_plan(setting, True, keep).packed(), backward.plan.packed()
