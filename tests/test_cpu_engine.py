"""The CPU engine beyond parity: every target, kept activations, and weights that change under it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trmfast
from budgets import budget_with_outputs, budget_with_pairs
from trmfast.backends import BACKENDS, packed_weights
from trmfast.backends import cpu as engine
from trmfast.cases import LOOPED, PUBLISHED, SMALL, Case, Inputs, make_case, make_inputs
from trmfast.problem import Problem
from trmfast.program import RecursionProgram
from trmfast.targets import TARGETS
from trmfast.testing import Draw, check_draws, draw_case, require, run_fused, run_truth

_reason = BACKENDS["cpu"].available()
pytestmark = pytest.mark.skipif(_reason is not None, reason=f"backend cpu: {_reason}")

DTYPES = [torch.float32, torch.bfloat16]
ATTENTION = make_case("attention", batch=5, length=23, intermediate_size=96)
MLP_T = make_case("mlp_t", batch=5, length=23, intermediate_size=96, token_mixer="mlp_t")


def forward(inputs: Inputs, weights: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
    problem = inputs.problem
    return trmfast.recursion(
        problem.program, problem.nets, inputs.states, inputs.x, weights or inputs.weights, inputs.cos, inputs.sin, "cpu"
    )


def assert_current(inputs: Inputs, out: tuple[Tensor, ...]) -> None:
    """The result is that of these weights; stale ones would be off by much more than rounding."""
    truth = run_truth(inputs, backward=False).outputs
    for name, fused in zip(inputs.problem.program.states, out, strict=True):
        assert (fused.double() - truth[name]).abs().max() < 1e-4


# ---------------------------------------------------------------- targets


@lru_cache(maxsize=1)
def _drawn(case: Case, dtype: torch.dtype) -> list[Draw]:
    return draw_case(case, dtype)


# Other programs and windows over blocks that other cases have, and the large one.
PROGRAMS = {"hrm", "single_z", "hier6", "window-one_step", "window-2-cycles", "window-all", "published-width"}
# Deeper than the 512 that AMX takes at once, in tiles of 32 rows and a rest.
DEEP = make_case("deep", H_cycles=1, L_cycles=1, length=37, num_layers=1, intermediate_size=544)


IN_BFLOAT16 = {"trm", "trm-mlp_t", "deep"}


# The target varies fastest, so that all of them share the draws.
@pytest.mark.representative(
    when=lambda case, dtype: case.name not in PROGRAMS and (dtype == torch.float32 or case.name in IN_BFLOAT16)
)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        *SMALL,
        DEEP,
        make_case("published-width", H_cycles=1, L_cycles=1, length=97, num_layers=1, hidden_size=512, num_heads=8),
    ],
    ids=str,
)
def test_every_target(case: Case, dtype: torch.dtype, target: str) -> None:
    reason = engine.targets().get(target, f"{target} is not in this build")
    if reason is not None:
        pytest.skip(reason)
    reason = BACKENDS["cpu"].supports(case.problem, torch.device("cpu"), dtype, case.batch, case.length)
    if reason is not None:
        pytest.skip(f"backend cpu, {case}: {reason}")
    with engine.force_target(target):
        require(check_draws(_drawn(case, dtype), "cpu"))


def test_a_forced_target_serves_elements_it_lacks_by_the_next_one_below() -> None:
    with engine.force_target("portable"):
        assert {engine.target_for(dtype) for dtype in DTYPES} == {"portable"}
    with pytest.raises(ValueError, match="TRMFAST_CPU_ISA: got 'sse9', accepted are "), engine.force_target("sse9"):
        pass


# ---------------------------------------------------------------- kept activations

BATCHES = [
    make_case("hrm-all", "hrm", batch=5, length=13, window="all", num_layers=1),
    make_case("mlp_t-odd", batch=3, length=13, hidden_size=48, intermediate_size=24, token_mixer="mlp_t"),
    make_case(
        *("conv-odd", "urm"),
        batch=3,
        length=7,
        hidden_size=40,
        num_heads=5,
        intermediate_size=24,
        channel_mixer="conv_swiglu",
        conv_kernel=3,
    ),
]


FEW = {"trm", "trm-mlp_t", *(case.name for case in BATCHES)}


# Emulated tiles are slow, under a sanitizer a quarter of a minute for a case.
@pytest.mark.representative(
    when=lambda target, store, few: target != "amx_emulated" or (few and store is not None), rest="grid product"
)
@pytest.mark.parametrize("few", [True, False], ids=["few", "rest"])
@pytest.mark.parametrize("store", [None, 200_000])
@pytest.mark.parametrize("target", TARGETS)
def test_kept_activations_give_the_bits_of_recomputed_ones(
    target: str, store: int | None, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = engine.targets().get(target, f"{target} is not in this build")
    if reason is not None:
        pytest.skip(reason)
    if store is not None:
        monkeypatch.setattr(engine, "store_bytes", lambda _: store)
    with engine.force_target(target):
        dtype = torch.bfloat16 if target in ("amx", "amx_emulated", "avx512_bf16") else torch.float32
        for case in (*SMALL, *BATCHES):
            if (case.name in FEW) != few:
                continue
            inputs = make_inputs(case, dtype, weight_scale=0.5)
            recomputed = run_fused(inputs, "cpu", recompute=True)
            pairs, outputs = budget_with_pairs(case, dtype, 2), budget_with_outputs(case, dtype, 2)
            for recompute in (False, pairs, outputs):
                kept = run_fused(inputs, "cpu", recompute=recompute)
                for name, tensor in recomputed.outputs.items():
                    assert torch.equal(kept.outputs[name], tensor), (case, recompute, name)
                for name, tensor in recomputed.gradients.items():
                    assert torch.equal(kept.gradients[name], tensor), (case, recompute, name)


@pytest.mark.parametrize("recompute", [False, "60kB"])
def test_kept_activations_serve_two_backward_passes_and_their_memory_returns(recompute: bool | str) -> None:
    inputs = make_inputs(ATTENTION)
    problem = inputs.problem
    weights = [weight.clone().requires_grad_() for weight in inputs.weights]
    arguments = (inputs.states, inputs.x, weights, inputs.cos, inputs.sin, "cpu", recompute)
    out = trmfast.recursion(problem.program, problem.nets, *arguments)
    first, second = (
        torch.autograd.grad(out, weights, inputs.grad_states, retain_graph=True, materialize_grads=True) for _ in "12"
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    again = trmfast.recursion(problem.program, problem.nets, *arguments)  # while the first is alive
    del out
    for a, b in zip(first, torch.autograd.grad(again, weights, inputs.grad_states), strict=True):
        assert torch.equal(a, b)


def test_bytes_that_are_kept() -> None:
    case = make_case("sudoku", batch=4, H_cycles=3, L_cycles=6, hidden_size=512, num_heads=8, length=97)
    size = BACKENDS["cpu"].pair_bytes(case.problem, torch.bfloat16, 97)
    # h, h1, qkv, mixed, gate and up, activation of two layers, and the output: 2 x 7,680 + 512 channels of two bytes.
    assert 1.0 <= size / (97 * 2 * (2 * 7680 + 512)) < 1.1
    # The outputs of two layers.
    assert 1.0 <= BACKENDS["cpu"].output_bytes(case.problem, torch.bfloat16, 97) / (97 * 2 * 2 * 512) < 1.1


def test_bytes_of_the_store() -> None:
    (text,) = LOOPED
    elements = sum(prod(shape) for shape in text.problem.weight_shapes)
    assert engine.store_bytes(text.problem) == 8 * elements // 5 > 100 << 20
    two = Problem(RecursionProgram.hrm(2, 2), text.problem.nets * 2)  # a store is of one network at a time
    assert engine.store_bytes(two) == engine.store_bytes(text.problem)
    assert all(engine.store_bytes(case.problem) == 36 << 20 for case in PUBLISHED)


# ---------------------------------------------------------------- weights that change


def write_through_data(weight: Tensor) -> None:
    weight.data.mul_(1.5)


def write_one_element_through_data(weight: Tensor) -> None:
    weight.data.view(-1)[-1] += 3.0


def optimizer_step(weight: Tensor) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.05).step()
    weight.grad = None


def ema_copy(weight: Tensor) -> None:
    weight.data.copy_(0.9 * weight.data + 0.1)


@pytest.mark.parametrize("change", [write_through_data, write_one_element_through_data, optimizer_step, ema_copy])
def test_packed_weights_are_never_stale(change: Callable[[Tensor], None]) -> None:
    case = make_case("one-cycle", H_cycles=1, L_cycles=1, num_layers=1, length=9, intermediate_size=96)
    inputs = make_inputs(case, torch.float32, weight_scale=0.5)
    weights = tuple(nn.Parameter(weight.clone()) for weight in inputs.weights)
    with torch.no_grad():
        before = forward(inputs, weights)
        for which in (0, len(weights) - 1):
            change(weights[which])
            changed = Inputs(**{**inputs.__dict__, "weights": tuple(w.detach().clone() for w in weights)})
            after = forward(inputs, weights)
            assert_current(changed, after)
            assert not torch.equal(after[0], before[0])


def test_weights_of_the_same_bytes_in_another_dtype() -> None:
    inputs = make_inputs(ATTENTION, torch.float32)
    last = (inputs.weights[-1] * 4).to(torch.bfloat16)
    for weight in (last, last.view(torch.float16)):
        changed = Inputs(**{**inputs.__dict__, "weights": (*inputs.weights[:-1], weight)})
        assert_current(changed, forward(changed))


def test_a_pack_of_weights_that_change_meanwhile_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(ATTENTION, torch.float32)
    weights = tuple(weight.clone() for weight in inputs.weights)
    module = packed_weights._cpu
    assert module is not None

    def packed_while_another_thread_writes(*arguments: Any) -> Any:
        weights[0].add_(1.0)
        return module.PackedWeights(*arguments)

    writing = SimpleNamespace(**{**vars(module), "PackedWeights": packed_while_another_thread_writes})
    with monkeypatch.context() as patch:
        patch.setattr(packed_weights, "_cpu", writing)
        forward(inputs, weights)
    weights[0].copy_(inputs.weights[0])
    assert_current(inputs, forward(inputs, weights))


def test_modules_that_are_copied_moved_and_loaded() -> None:
    program = trmfast.RecursionProgram.trm(1, 1)
    spec = trmfast.NetSpec(trmfast.BlockSpec(64, 96, num_heads=2), 1)
    torch.manual_seed(0)
    module = trmfast.nn.Recursion(program, [trmfast.nn.Net(spec)], backend="cpu")
    other = trmfast.nn.Recursion(program, [trmfast.nn.Net(spec)], backend="cpu")
    states, x = [torch.randn(2, 7, 64) for _ in range(2)], torch.randn(2, 7, 64)

    def out(m: nn.Module) -> Tensor:
        with torch.no_grad():
            result: Tensor = m(states, x)[0]
        return result

    mine, theirs = out(module), out(other)
    assert not torch.equal(mine, theirs)
    twin = copy.deepcopy(module)
    assert torch.equal(out(twin), mine)
    twin.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(out(twin), theirs)
    assert torch.equal(out(module), mine)
    narrow = copy.deepcopy(module).to(torch.bfloat16)  # weights of another dtype, the same compute dtype
    wide = copy.deepcopy(narrow).to(torch.float32)
    assert torch.equal(out(narrow), out(wide))
    assert torch.equal(out(narrow.to(torch.float32)), out(wide))


def test_non_contiguous_weights() -> None:
    inputs = make_inputs(ATTENTION, torch.float32)
    strided = tuple(torch.stack([w, w + 1], dim=-1)[..., 0] for w in inputs.weights)
    assert not strided[0].is_contiguous()
    assert torch.equal(forward(inputs, strided)[0], forward(inputs)[0])


def test_packed_weights_of_deleted_models_are_freed() -> None:
    engine.release_memory()
    for seed in range(5):
        forward(make_inputs(ATTENTION, torch.float32, seed=seed))
    assert len(engine._cache._entries) <= 2
