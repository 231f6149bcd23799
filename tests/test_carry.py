"""What passes from one supervision step to the next, and who halts."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from model_cases import TINY, make, make_batch
from trmfast.models import TRM

pytestmark = pytest.mark.usefixtures("one_thread")


def test_initial_carry_is_all_halted_zeros_on_the_batch_device() -> None:
    model = TRM(TINY)
    batch = make_batch(0)
    with torch.device("meta"):  # a default device does not decide
        carry = model.initial_carry(batch)
    assert carry.halted.all()
    assert carry.halted.dtype == torch.bool
    assert carry.steps.dtype == torch.int32
    assert carry.inner_carry.z_H.shape == (3, 9, 32)
    for tensor in (carry.steps, carry.inner_carry.z_H, carry.inner_carry.z_L, *carry.current_data.values()):
        assert tensor.device == batch["inputs"].device
        assert (tensor == 0).all()
    assert {k: v.dtype for k, v in carry.current_data.items()} == {k: v.dtype for k, v in batch.items()}


def test_only_halted_rows_take_new_data_and_initial_states() -> None:
    model, _ = make("trm")
    model.eval()
    first, second = make_batch(1), make_batch(2)
    carry, _ = model(model.initial_carry(first), first)
    assert not carry.halted.any()
    mixed = dataclasses.replace(carry, halted=torch.tensor([False, True, False]))
    mixed.inner_carry.z_H[1] = torch.nan  # a halted row's state is never read
    after, outputs = model(mixed, second)
    for key in first:
        assert torch.equal(after.current_data[key][1], second[key][1])
        assert torch.equal(after.current_data[key][[0, 2]], first[key][[0, 2]])
    assert after.steps.tolist() == [2, 1, 2]
    fresh, fresh_outputs = model(model.initial_carry(second), second)
    torch.testing.assert_close(outputs["logits"][1], fresh_outputs["logits"][1])
    torch.testing.assert_close(after.inner_carry.z_L[1], fresh.inner_carry.z_L[1])
    assert outputs["logits"].isfinite().all()


def test_evaluation_halts_at_the_last_step_only() -> None:
    model, _ = make("hrm")
    with torch.no_grad():
        assert model.inner.q_head.bias is not None
        model.inner.q_head.bias.copy_(torch.tensor([50.0, -50.0]))
    model.eval()
    batch = make_batch(1)
    carry = model.initial_carry(batch)
    for step in range(1, 5):
        state = torch.get_rng_state()
        carry, outputs = model(carry, batch)
        assert torch.equal(state, torch.get_rng_state())
        assert carry.steps.tolist() == [step] * 3
        assert carry.halted.all() == (step == 4)
    assert "target_q_continue" not in outputs


@pytest.mark.parametrize("name", ["trm", "trm-continue", "hrm"])
def test_training_halts_with_the_published_draws(name: str) -> None:
    model, _ = make(name, halt_max_steps=6)
    batch = make_batch(1)
    carry = model.initial_carry(batch)
    halts = 0
    for seed in range(12):
        before = carry
        torch.manual_seed(seed)
        carry, outputs = model(before, batch)
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        explores = torch.rand(3) < 0.5
        least = explores * torch.randint_like(carry.steps, low=2, high=7)
        assert torch.equal(after, torch.get_rng_state())
        steps = torch.where(before.halted, 0, before.steps) + 1
        q, q_continue = outputs["q_halt_logits"], outputs["q_continue_logits"]
        wants = q > 0 if name == "trm" else q > q_continue
        assert torch.equal(carry.steps, steps)
        assert torch.equal(carry.halted, (wants | (steps >= 6)) & (steps >= least))
        halts += int(carry.halted.sum())
    assert 0 < halts < 36


@pytest.mark.parametrize("name", ["trm-continue", "hrm"])
def test_continue_target_is_the_next_step(name: str) -> None:
    model, eager = make(name, halt_max_steps=2, halt_exploration_prob=1.0)
    batch = make_batch(1)
    carry = model.initial_carry(batch)
    states = eager.inner.reset_carry(torch.ones(3, dtype=torch.bool), eager.inner.empty_carry(3))
    for last in (False, True):
        carry, outputs = model(carry, batch)
        assert carry.halted.all() == last
        states = eager.inner(states, batch)[0]
        q_halt, q_continue = eager.inner(states, batch)[2]
        target = torch.sigmoid(q_halt if last else torch.maximum(q_halt, q_continue))
        torch.testing.assert_close(outputs["target_q_continue"], target, rtol=1e-4, atol=1e-5)
        assert not outputs["target_q_continue"].requires_grad


@pytest.mark.parametrize("name", ["trm", "trm-continue", "hrm"])
def test_a_training_script_may_go_without_the_target(name: str) -> None:
    model, _ = make(name, halt_max_steps=4)
    batch, found = make_batch(1), []
    for asked in (True, False):
        torch.manual_seed(0)
        found.append(model(model.initial_carry(batch), batch, compute_target_q=asked))
    (carry, outputs), (carry_without, without) = found
    assert ("target_q_continue" in outputs) == (name in ("trm-continue", "hrm"))
    assert "target_q_continue" not in without
    assert torch.equal(carry.halted, carry_without.halted)
    assert torch.equal(outputs["logits"], without["logits"])


def test_new_carry_has_no_gradient_and_its_own_memory() -> None:
    for name in ("trm", "trm_hier6"):
        model, _ = make(name)
        batch = make_batch(1)
        first, _ = model(model.initial_carry(batch), batch)
        kept = copy.deepcopy(first)
        second, outputs = model(first, batch)
        outputs["logits"].sum().backward()
        old, new = vars(first.inner_carry), vars(second.inner_carry)
        assert not any(z.requires_grad for z in new.values())
        pointers = {z.data_ptr() for z in (*old.values(), *new.values())}
        assert len(pointers) == len(old) + len(new)
        for key, value in vars(kept.inner_carry).items():
            assert torch.equal(value, old[key])
