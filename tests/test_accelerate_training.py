"""Thirty training steps with and without acceleration, against the same training in float64."""

from __future__ import annotations

import copy
from statistics import fmean, median
from typing import Any

import pytest
import torch
from adam_atan2_pytorch import AdamAtan2
from torch import Tensor, nn

import trmfast
from dropin_cases import inner_of, make, make_batch
from dropin_models import ACTLossHead
from trmfast.models.sparse_embedding import CastedSparseEmbeddingSignSGD_Distributed

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ["trm", "trm-mlp_t", "trm_singlez", "trm_hier6", "hrm", "baseline", "urm", "nano-2d"]
STEPS, SEEDS = 30, (0, 1, 2)


class Average:
    """The moving average of the weights as upstream's helper keeps it."""

    def __init__(self, model: nn.Module, mu: float) -> None:
        self.mu = mu
        self.shadow = {key: p.data.clone() for key, p in model.named_parameters()}

    def update(self, model: nn.Module) -> None:
        for key, p in model.named_parameters():
            self.shadow[key] = (1 - self.mu) * p.data + self.mu * self.shadow[key]

    def averaged(self, model: Any) -> Any:
        copied = copy.deepcopy(model)
        for key, p in copied.named_parameters():
            p.data.copy_(self.shadow[key])
        return copied


def train(model: Any, name: str, seed: int) -> list[float]:
    """The losses of training, supervision step by supervision step, then of an evaluation with the averaged weights."""
    head = ACTLossHead(model.train())
    puzzle = inner_of(model).puzzle_emb
    optimizers: list[Any] = [
        CastedSparseEmbeddingSignSGD_Distributed(puzzle.buffers(), world_size=1, lr=1e-2, weight_decay=0.1),
        AdamAtan2(head.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1),
    ]
    average = Average(head, 0.9)
    torch.manual_seed(seed)
    batches = [make_batch(name, 100 * seed + i) for i in range(STEPS)]
    carry = head.initial_carry(batches[0])
    losses, halts = [], set()
    for i, batch in enumerate(batches):
        carry, loss, _ = head(carry, batch)
        (loss / 4).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.update(head)
        losses.append(loss.item())
        if i == 0:
            carry.steps = torch.arange(4, dtype=torch.int32)  # from here on the rows halt one after the other
        halts.add(int(carry.halted.sum()))
    assert halts == {0, 1}
    evaluated = average.averaged(head).eval()
    with torch.inference_mode():
        carry, finished = evaluated.initial_carry(batches[0]), torch.tensor(False)
        while not finished:
            carry, loss, finished = evaluated(carry, batches[0])
            losses.append(loss.item())
    return losses


def make_donor(name: str, seed: int) -> Any:
    """Weights and states that every dtype represents.

    The networks are scaled down: full weights this small a model make chaos of, so that a flipped bit decides.  For the
    same reason nobody halts before the last step, a decision with q near zero would be one of luck: as published, the q
    head starts at zero weights and -5, and q_continue a little above it.
    """
    donor = make(name, seed, scale=0.5, forward_dtype="bfloat16")
    head = inner_of(donor).q_head
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([-5.0, -4.0])[: len(head.bias)])
    return donor


def in_float64(name: str) -> Any:
    model = make(name, forward_dtype="float64").double()
    puzzle = inner_of(model).puzzle_emb
    puzzle.local_weights = puzzle.local_weights.detach().requires_grad_()  # .double() has made it a result
    return model


def off_by(losses: list[float], truth: list[float]) -> float:
    assert len(losses) == len(truth) == STEPS + 4
    return fmean(abs(loss - true) for loss, true in zip(losses, truth, strict=True))


@pytest.mark.breadth
@pytest.mark.representative(when=lambda name: name in {"trm", "trm-mlp_t", "hrm", "urm"}, rest="grid product")
@pytest.mark.spread("name")
@pytest.mark.parametrize("name", FAMILIES)
def test_thirty_steps_lose_no_more_than_eager(name: str) -> None:
    dtypes = ("float32", "bfloat16")
    plain = {dtype: make(name, forward_dtype=dtype) for dtype in dtypes}
    accelerated = {dtype: trmfast.accelerate(make(name, forward_dtype=dtype)) for dtype in dtypes}
    errors: dict[tuple[str, str], list[float]] = {}
    for seed in SEEDS:
        donor = make_donor(name, seed)

        def losses(model: Any, donor: Any = donor, seed: int = seed) -> list[float]:
            model.load_state_dict(donor.state_dict())
            return train(model, name, seed)

        truth = losses(in_float64(name))
        for dtype in dtypes:
            errors.setdefault((dtype, "ours"), []).append(off_by(losses(accelerated[dtype]), truth))
            errors.setdefault((dtype, "eager"), []).append(off_by(losses(plain[dtype]), truth))
    for dtype in dtypes:
        ours, eager = median(errors[dtype, "ours"]), median(errors[dtype, "eager"])
        print(f"{name} {dtype}: accelerated is off by {ours:.3g}, eager by {eager:.3g} at losses of {truth[-1]:.3g}")
        assert 0 < eager < 0.01 * truth[-1]  # or the comparison would say nothing
        assert ours <= 2 * eager


def test_acceleration_in_mid_training_and_back() -> None:
    """Optimizer state, carry and average stay valid across both calls."""
    name = "trm"
    plain, switched = make(name), make(name)
    results = []
    for model in (plain, switched):
        head = ACTLossHead(model)
        optimizer = AdamAtan2(head.parameters(), lr=1e-3)
        torch.manual_seed(0)
        carry = head.initial_carry(make_batch(name))
        losses: list[Tensor] = []
        for i in range(9):
            if model is switched and i == 3:
                trmfast.accelerate(head)
            if model is switched and i == 6:
                trmfast.restore(head)
            carry, loss, _ = head(carry, make_batch(name, i))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        results.append(torch.stack(losses))
    assert torch.equal(results[0][:3], results[1][:3])
    assert not torch.equal(results[0][3:], results[1][3:])
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=0)
