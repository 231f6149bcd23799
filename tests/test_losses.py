"""Losses and metrics against sums written out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trmfast.models import IGNORE_LABEL_ID, ACTLossHead, Carry, softmax_cross_entropy, stablemax_cross_entropy

NEVER = IGNORE_LABEL_ID


def stablemax_loss(logits: list[float], label: int) -> float:
    s = [x + 1 if x >= 0 else 1 / (1 - x) for x in logits]
    return -math.log(s[label] / sum(s))


def softmax_loss(logits: list[float], label: int) -> float:
    return -math.log(math.exp(logits[label]) / sum(math.exp(x) for x in logits))


LOGITS = torch.tensor([[[0.0, 2.0, -3.0], [1.0, -0.5, 40.0]], [[-1.0, -1.0, 0.0], [5.0, 1.0, 1.0]]])
LABELS = torch.tensor([[1, NEVER], [2, 0]], dtype=torch.int32)


@pytest.mark.parametrize(
    "loss, by_hand, dtype, digits",
    [
        (stablemax_cross_entropy, stablemax_loss, torch.float64, 1e-14),
        (softmax_cross_entropy, softmax_loss, torch.float32, 1e-5),
    ],
)
def test_cross_entropies(loss: Any, by_hand: Any, dtype: torch.dtype, digits: float) -> None:
    got = loss(LOGITS, LABELS)
    assert got.dtype == dtype
    assert got[0, 1] == 0
    for row, column in ((0, 0), (1, 0), (1, 1)):
        assert float(got[row, column]) == pytest.approx(
            by_hand(LOGITS[row, column].tolist(), int(LABELS[row, column])), rel=digits
        )
    # The mask decides where it is given, also against the labels.
    masked = loss(LOGITS, LABELS, valid_mask=torch.tensor([[True, False], [False, True]]))
    assert torch.equal(masked, torch.stack((got[0], torch.stack((torch.zeros(()).to(got), got[1, 1])))))
    assert torch.equal(loss(LOGITS, LABELS.where(LABELS != NEVER, -1), ignore_index=-1), got)
    # Logits as the models give them are a slice of a longer tensor.
    longer = torch.cat((torch.zeros(2, 3, 3), LOGITS), 1)
    assert torch.equal(loss(longer[:, 3:], LABELS), got)


@pytest.mark.parametrize("loss", [stablemax_cross_entropy, softmax_cross_entropy])
def test_gradients_of_cross_entropies(loss: Any) -> None:
    logits = LOGITS.double().requires_grad_()
    loss(logits, LABELS).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[0, 1] == 0).all()
    step = 1e-3
    for index in ((0, 0, 0), (0, 0, 1), (0, 0, 2), (1, 0, 1), (1, 1, 0)):
        moved = [LOGITS.double().clone() for _ in range(2)]
        moved[0][index] += step
        moved[1][index] -= step
        slope = (loss(moved[0], LABELS).double().sum() - loss(moved[1], LABELS).double().sum()) / (2 * step)
        if LOGITS[index] == 0:
            continue  # stablemax has a kink in its second derivative there
        assert float(logits.grad[index]) == pytest.approx(float(slope), abs=1e-3)


def test_stablemax_gradient_is_finite_at_one() -> None:
    # At x = 1 the branch for negative x, 1 / (1 - x), has a pole.
    logits = torch.ones(1, 1, 3, dtype=torch.float32, requires_grad=True)
    stablemax_cross_entropy(logits, torch.zeros(1, 1, dtype=torch.long)).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0, 0], torch.tensor([1 / 6 - 0.5, 1 / 6, 1 / 6]))


class Recorded(nn.Module):
    """A model whose outputs and carry are given."""

    def __init__(self, outputs: dict[str, Tensor], labels: Tensor, halted: list[bool]) -> None:
        super().__init__()
        self.outputs = outputs
        rows = len(halted)
        steps = torch.arange(1, rows + 1, dtype=torch.int32)
        self.carry = Carry(None, steps, torch.tensor(halted), {"labels": labels})

    def initial_carry(self, _: dict[str, Tensor]) -> Carry:
        return self.carry

    def forward(self, **_: Any) -> tuple[Carry, dict[str, Tensor]]:
        return self.carry, dict(self.outputs)


def recorded(halted: list[bool], **extra: Tensor) -> Recorded:
    # Rows: solved; half right; nothing labelled; solved with one token labelled.
    labels = torch.tensor([[1, 2], [1, 2], [NEVER, NEVER], [0, NEVER]], dtype=torch.int32)
    predicted = torch.tensor([[1, 2], [1, 0], [0, 0], [0, 2]])
    logits = (nn.functional.one_hot(predicted, 3).float() * 3).requires_grad_()
    q = torch.tensor([2.0, 1.0, -1.0, -3.0], requires_grad=True)
    q_continue = torch.tensor([0.5, -0.5, 0.0, 1.0], requires_grad=True)
    return Recorded({"logits": logits, "q_halt_logits": q, "q_continue_logits": q_continue, **extra}, labels, halted)


def test_loss_head_sums_by_hand() -> None:
    model = recorded([True, True, True, True])
    head = ACTLossHead(model, "stablemax_cross_entropy")
    carry, loss, metrics, returned, finished = head(return_keys=["preds", "logits", "absent"], carry=None, batch={})
    right, wrong = stablemax_loss([0, 3, 0], 1), stablemax_loss([3, 0, 0], 2)
    lm_loss = right + (right + wrong) / 2 + 0 + right
    # The third row has no labelled token, so all of them are right.
    q_loss = sum(
        math.log1p(math.exp(-q if solved else q))
        for q, solved in ((2.0, True), (1.0, False), (-1.0, True), (-3.0, True))
    )
    assert float(loss.detach()) == pytest.approx(lm_loss + 0.5 * q_loss, rel=1e-6)
    assert {key: float(value) for key, value in metrics.items()} == pytest.approx(
        {
            "count": 3,  # the row without labels is not counted
            "accuracy": 2.5,
            "exact_accuracy": 2,
            "q_halt_accuracy": 1,
            "steps": 1 + 2 + 4,
            "lm_loss": lm_loss,
            "q_halt_loss": q_loss,
        }
    )
    assert not any(value.requires_grad for value in metrics.values())
    assert set(returned) == {"preds", "logits"}
    assert not returned["logits"].requires_grad
    assert bool(finished)
    assert carry is model.carry
    assert head.initial_carry({}) is model.carry


def test_loss_head_counts_halted_rows_only_and_bootstraps() -> None:
    target = torch.tensor([0.1, 0.9, 0.5, 0.5])
    model = recorded([False, True, False, False], target_q_continue=target)
    head = ACTLossHead(model, "softmax_cross_entropy")
    _, loss, metrics, _, finished = head(return_keys=[], carry=None, batch={})
    assert [float(metrics[k]) for k in ("count", "accuracy", "exact_accuracy", "steps")] == [1, 0.5, 0, 2]
    assert not bool(finished)
    expected = sum(
        t * math.log1p(math.exp(-q)) + (1 - t) * math.log1p(math.exp(q))
        for q, t in zip((0.5, -0.5, 0.0, 1.0), target.tolist(), strict=True)
    )
    assert float(metrics["q_continue_loss"]) == pytest.approx(expected, rel=1e-6)
    total = float(metrics["lm_loss"]) + 0.5 * (float(metrics["q_halt_loss"]) + expected)
    assert float(loss.detach()) == pytest.approx(total, rel=1e-6)
    loss.backward()
    assert all(model.outputs[k].grad is not None for k in ("logits", "q_halt_logits", "q_continue_logits"))


def test_unknown_losses_say_so_in_one_line() -> None:
    with pytest.raises(ValueError, match="loss_type: got 'hinge', accepted are stablemax_cross_entropy, softmax_cross"):
        ACTLossHead(nn.Identity(), "hinge")


def test_labels_that_are_missing_or_not_integers_say_so_in_one_line() -> None:
    model = recorded([True, True, True, True])
    head = ACTLossHead(model, "stablemax_cross_entropy")
    labels = model.carry.current_data.pop("labels")
    with pytest.raises(ValueError, match=r"^batch: got no labels, required by ACTLossHead$"):
        head(return_keys=[], carry=None, batch={})
    model.carry.current_data["labels"] = labels.float()
    with pytest.raises(ValueError, match=r"^batch\['labels'\].dtype: got float32, accepted are integers, as int32 and"):
        head(return_keys=[], carry=None, batch={})
