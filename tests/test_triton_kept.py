"""Activations that the forward plans of the Triton kernels keep for backward: bits, bounds, bytes."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from trmfast.kernels.architectures import ARCHITECTURES, GPUS
from trmfast.kernels.backward_plan import BackwardPlan, backward_plan
from trmfast.kernels.configurations import Configuration
from trmfast.kernels.forward_plan import Setting, forward_plan
from trmfast.kernels.plan import KEPT, Plan
from trmfast.kernels.plans import plans
from trmfast.kernels.roofline import plan_time

from test_triton_backend import CASES, guarded, small
from test_triton_choices import CASES as CHOSEN
from test_triton_choices import values
from test_triton_plan import check_written_before_read, setting_of
from triton_guard import DEVICE, INTERPRETED
from triton_races import check_plan
from trmfast.backends import BACKENDS, Kept, what_fits
from trmfast.backends import triton as backend
from trmfast.budget import EVERYTHING
from trmfast.cases import LOOPED, PUBLISHED, Case, make_case, make_inputs
from trmfast.testing import run_fused

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = [case for case in (*CASES, *CHOSEN) if case.length < 20]
MANY = small("kept", "hrm", window="all", batch=3)
# Where its norm over D is left to the readers, h of the second block is a copy of its own.
LONG_MLP_T = make_case(
    "long-mlp_t", "urm", H_cycles=1, L_cycles=1, batch=1, length=200, hidden_size=512, num_layers=2, token_mixer="mlp_t"
)
DEFAULT = {"long-mlp_t", "mlp_t-and-conv", "hrm_text", "one-token"}


def both(case: Case, setting: Setting, keep: int) -> tuple[Plan, BackwardPlan]:
    problem = case.problem
    needs = [True] * len(problem.program.states), problem.uses_x, [True] * problem.num_weights
    return forward_plan(setting, True, keep), backward_plan(setting, *needs, keep)


def pair_bytes(case: Case, dtype: torch.dtype) -> int:
    return BACKENDS["triton"].pair_bytes(case.problem, dtype, case.length)


# ---------------------------------------------------------------- results


@pytest.mark.representative(when=lambda case: case.name in DEFAULT)
@pytest.mark.spread("case")
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_no_bit_depends_on_what_is_kept(case: Case) -> None:
    dtype = torch.float32 if case.length % 2 else torch.bfloat16
    inputs, one = make_inputs(case, dtype, device=DEVICE), pair_bytes(case, dtype) * case.batch
    expected = run_fused(inputs, "triton", recompute=True)
    for budget in (False, one, case.problem.num_grad_updates * one - 1):
        found = run_fused(inputs, "triton", recompute=budget)
        for name, tensor in {**expected.outputs, **expected.gradients}.items():
            assert torch.equal(tensor, {**found.outputs, **found.gradients}[name]), (budget, name)


@pytest.mark.skipif(not INTERPRETED, reason="zones of NaN lie between tensors of the CPU")
@pytest.mark.representative(when=lambda case, fusion: case.name == "hrm_text" and fusion == "least")
@pytest.mark.spread("case", "fusion")
@pytest.mark.parametrize("fusion", ["least", "most"])
@pytest.mark.parametrize("case", [*CASES[:1], MANY, CHOSEN[0], CHOSEN[1], CHOSEN[6], CHOSEN[8]], ids=str)
def test_between_guard_zones(case: Case, fusion: str) -> None:
    """Each kept buffer is poisoned and lies between zones of NaN; backward finds nothing else that forward made."""
    dtype = torch.bfloat16
    inputs = make_inputs(case, dtype, device=DEVICE)
    configuration = replace(backend._configuration(DEVICE), fusion=fusion)
    setting = Setting(case.problem, case.batch, case.length, dtype, case.rope, configuration)
    given, results = values(inputs, dtype), []
    grads = {f"grad.{s}": gradient.float() for s, gradient in enumerate(inputs.grad_states)}
    for keep in (0, 1, case.problem.num_grad_updates):
        forward, backward = both(case, setting, keep)
        made = guarded(forward, given)
        assert {buffer.name for buffer in forward.kept} <= set(made)
        handed = {name: tensor for name, tensor in made.items() if name == "saved" or name.startswith(KEPT)}
        found = guarded(backward.plan, {**given, **grads, **handed})
        results.append({b.name: t for b in forward.outputs for t in [made[b.name]] if b.name.startswith("out.")})
        gradients = (*backward.grad_states, backward.grad_x, *backward.grad_weights)
        results[-1].update({b.name: found[b.name] for b in gradients if b is not None})
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for name, tensor in results[0].items():
            assert torch.equal(tensor, other[name]), name


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter shows accesses")
@pytest.mark.representative(when=lambda case: case is CASES[0])
@pytest.mark.parametrize("case", [CASES[0], MANY, CHOSEN[0], CHOSEN[6]], ids=str)
def test_programs_do_not_meet(case: Case) -> None:
    setting = setting_of(case, Configuration("sm_90"), torch.bfloat16)
    forward, backward = both(case, setting, min(2, case.problem.num_grad_updates))
    for plan in (forward.packed(), backward.plan.packed()):
        races, programs = check_plan(plan)
        assert not races, "\n".join(map(str, races))
        assert programs > len(plan) / 4


# ---------------------------------------------------------------- plans and bytes


@pytest.mark.parametrize("case", [*SHORT, MANY], ids=str)
def test_plans(case: Case) -> None:
    """Both plans have the same buffers in the same places; the more is kept, the fewer launches backward has."""
    updates = case.problem.num_grad_updates
    setting = setting_of(case)
    all_launches = []
    for keep in range(updates + 1):
        forward, backward = both(case, setting, keep)
        check_written_before_read(forward)
        check_written_before_read(backward.plan)
        assert forward.kept == backward.plan.kept
        assert set(forward.kept) <= set(forward.outputs)
        packed = [forward.packed().outputs, backward.plan.packed().inputs]
        arenas = [[b for b in buffers if b.name.startswith(KEPT)] for buffers in packed]
        assert arenas[0] == arenas[1]
        assert len(arenas[0]) <= 2
        assert bool(arenas[0]) == bool(keep)
        assert sum(b.nbytes for b in arenas[0]) >= sum(b.nbytes for b in forward.kept)
        saved = [b.shape[0] for b in forward.outputs if b.name == "saved"]
        assert saved == ([updates - keep] if keep < updates else [])
        all_launches.append(len(backward.plan))
    assert all_launches == sorted(all_launches, reverse=True)
    assert all_launches[-1] < all_launches[0]


@pytest.mark.representative(when=lambda case, dtype: dtype == torch.bfloat16 and case.name in DEFAULT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [*SHORT, MANY, LONG_MLP_T, *PUBLISHED, *LOOPED], ids=str)
def test_what_is_kept_fits_the_bytes_of_a_pair(case: Case, dtype: torch.dtype) -> None:
    """On every GPU, for every batch; at published sizes nine tenths of them are used."""
    one, updates = pair_bytes(case, dtype), case.problem.num_grad_updates
    for architecture, batch, keep in product(ARCHITECTURES, (1, 3), {1, updates}):
        setting = Setting(case.problem, batch, case.length, dtype, case.rope, Configuration(architecture))
        forward = forward_plan(setting, True, keep).packed()
        needed = sum(buffer.nbytes for buffer in forward.outputs if buffer.name.startswith(KEPT))
        assert needed <= keep * batch * one
        if case in PUBLISHED and keep == updates and len(case.problem.nets) == 1:
            assert needed > 0.9 * keep * batch * one


def test_the_budget_keeps_whole_updates() -> None:
    problem, dtype = MANY.problem, torch.bfloat16
    one, triton, updates = pair_bytes(MANY, dtype), BACKENDS["triton"], problem.num_grad_updates
    for budget, pairs in {one: 0, 3 * one - 1: 0, 3 * one: 3, 8 * one: 6, EVERYTHING: 3 * updates}.items():
        assert what_fits(triton, problem, dtype, 3, MANY.length, budget) == Kept(pairs, 0, pairs * one)
    assert what_fits(triton, problem, dtype, 3, MANY.length, one - 1) == Kept()


@pytest.mark.parametrize("budget", [0, 5 * 10**3, EVERYTHING])
def test_the_operator_and_its_fake_agree(budget: int) -> None:
    case = small("fake", num_layers=1)
    inputs = make_inputs(case, device=DEVICE)
    nets = [net.key for net in case.problem.nets]
    tensors = (list(inputs.states), inputs.x, list(inputs.weights), inputs.cos, inputs.sin)
    arguments = (*tensors, case.problem.program.key, nets, "triton", True, budget)
    torch.library.opcheck(torch.ops.trmfast.recursion.default, arguments, test_utils=["test_faketensor", "test_schema"])


def test_kept_of_another_layout_is_refused() -> None:
    case = small("refused", num_layers=1)
    inputs, nets = make_inputs(case, device=DEVICE), case.problem.nets
    keys = case.problem.program.key, [net.key for net in nets], "triton"
    tensors: list[Any] = [list(inputs.states), inputs.x, list(inputs.weights), inputs.cos, inputs.sin]
    _, saved, kept = torch.ops.trmfast.recursion.default(*tensors, *keys, True, EVERYTHING)
    rest = (*tensors[2:], *keys, [True] * 2, True, [True] * len(inputs.weights))
    with pytest.raises(ValueError, match=rf"^kept: got {len(kept) - 64} bytes, accepted is what forward kept, such as"):
        torch.ops.trmfast.recursion_backward.default(list(inputs.grad_states), saved, kept[64:].clone(), *rest)


@pytest.mark.representative(when=lambda name, gpu: name == "trm-sudoku-mlp" and gpu == "H100")
@pytest.mark.parametrize("name", ["trm-sudoku-att", "trm-sudoku-mlp", "trm-arc-att"])
@pytest.mark.parametrize("gpu", ["H100", "A100"])
def test_the_model_expects_faster_training(gpu: str, name: str) -> None:
    case = next(case for case in PUBLISHED if case.name == name)
    times = []
    for keep in (0, case.problem.num_grad_updates):
        made = plans(GPUS[gpu], case.problem, case.batch, case.length, torch.bfloat16, keep=keep)
        times.append(sum(plan_time(GPUS[gpu], plan) for plan in made))
    assert times[0] > 1.1 * times[1]
