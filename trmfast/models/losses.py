"""Losses and metrics of one supervision step."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["IGNORE_LABEL_ID", "LOSSES", "ACTLossHead", "softmax_cross_entropy", "stablemax_cross_entropy"]

IGNORE_LABEL_ID = -100


def stablemax_cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int = IGNORE_LABEL_ID, valid_mask: Tensor | None = None
) -> Tensor:
    """Cross entropy with stablemax (arXiv 2501.04697) in place of softmax, computed in float64.

    Stablemax replaces exp(x) by s(x) = x + 1 for x >= 0 and 1 / (1 - x) for x < 0.

    Args:
        logits: [..., V], any float dtype.
        labels: [...], integers below V, or ``ignore_index``.
        valid_mask: bool [...], the positions that count; by default those whose label is not ``ignore_index``.

    Returns:
        float64 [...], 0 where a position does not count.
    """
    if valid_mask is None:
        valid_mask = labels != ignore_index
    x = logits.to(torch.float64)
    # The branch that is not taken stays at 1, so that its gradient is finite.
    s = torch.where(x < 0, 1 / (1 - x.clamp(max=0)), x + 1)
    index = torch.where(valid_mask, labels, 0).to(torch.long).unsqueeze(-1)
    loss = s.sum(-1).log() - s.gather(-1, index).squeeze(-1).log()
    return torch.where(valid_mask, loss, 0)


def softmax_cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int = IGNORE_LABEL_ID, valid_mask: Tensor | None = None
) -> Tensor:
    """Cross entropy with softmax, in float32; arguments and returned shape as :func:`stablemax_cross_entropy`."""
    if valid_mask is not None:
        labels = torch.where(valid_mask, labels, ignore_index)
    flat = logits.to(torch.float32).reshape(-1, logits.shape[-1])
    loss = F.cross_entropy(flat, labels.to(torch.long).reshape(-1), ignore_index=ignore_index, reduction="none")
    return loss.view(labels.shape)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "stablemax_cross_entropy": stablemax_cross_entropy,
    "softmax_cross_entropy": softmax_cross_entropy,
}


class ACTLossHead(nn.Module):
    """Loss and metrics around a model with adaptive computation time (TRM, HRM).

    The loss is a sum over rows: the mean cross entropy of a row's labelled tokens, plus half the binary cross entropy
    of ``q_halt`` against "every token is right" and, where the model gives a target for it, of ``q_continue``.

    Args:
        model: a model with ``initial_carry(batch)`` and ``forward(carry, batch)``.
        loss_type: ``"stablemax_cross_entropy"`` or ``"softmax_cross_entropy"``.

    Raises:
        ValueError: ``loss_type`` is another name.
    """

    def __init__(self, model: nn.Module, loss_type: str) -> None:
        super().__init__()
        if loss_type not in LOSSES:
            raise ValueError(f"loss_type: got {reprlib.repr(loss_type)}, accepted are {', '.join(LOSSES)}")
        self.model = model
        self.loss_fn = LOSSES[loss_type]

    def initial_carry(self, *args: Any, **kwargs: Any) -> Any:
        """The model's initial carry."""
        return self.model.initial_carry(*args, **kwargs)  # type: ignore[operator]

    def forward(
        self, return_keys: Sequence[str], **model_kwargs: Any
    ) -> tuple[Any, Tensor, dict[str, Tensor], dict[str, Tensor], Tensor]:
        """One supervision step.

        Args:
            return_keys: outputs to return, of ``logits``, ``preds``, ``q_halt_logits``, ``q_continue_logits`` and
                ``target_q_continue``; a key that the step did not produce is left out.
            model_kwargs: ``carry`` and ``batch`` of the model.

        Returns:
            The new carry; the loss (scalar, a sum over rows); metrics (scalars without gradient, sums over the rows
            that halted, ``lm_loss``, ``q_halt_loss`` and ``q_continue_loss`` over all rows); the requested outputs
            without gradient; whether every row has halted (bool scalar).

        Raises:
            ValueError: the batch has no labels, or they are not integers.
        """
        carry, outputs = self.model(**model_kwargs)
        labels = carry.current_data.get("labels")
        if labels is None:
            raise ValueError(f"batch: got no labels, required by {type(self).__name__}")
        if labels.dtype.is_floating_point or labels.dtype.is_complex:
            got = str(labels.dtype).removeprefix("torch.")
            raise ValueError(f"batch['labels'].dtype: got {got}, accepted are integers, as int32 and int64")
        logits, q_halt = outputs["logits"], outputs["q_halt_logits"]

        with torch.no_grad():
            outputs["preds"] = logits.argmax(-1)
            valid = labels != IGNORE_LABEL_ID
            counts = valid.sum(-1)
            divisor = counts.clamp_min(1).unsqueeze(-1)
            correct = valid & (outputs["preds"] == labels)
            solved = correct.sum(-1) == counts
            done = carry.halted & (counts > 0)
            metrics = {
                "count": done.sum(),
                "accuracy": torch.where(done, (correct.to(torch.float32) / divisor).sum(-1), 0).sum(),
                "exact_accuracy": (done & solved).sum(),
                "q_halt_accuracy": (done & ((q_halt >= 0) == solved)).sum(),
                "steps": torch.where(done, carry.steps, 0).sum(),
            }

        lm_loss = (self.loss_fn(logits, labels, ignore_index=IGNORE_LABEL_ID, valid_mask=valid) / divisor).sum()
        q_loss = F.binary_cross_entropy_with_logits(q_halt, solved.to(q_halt.dtype), reduction="sum")
        metrics["lm_loss"] = lm_loss.detach()
        metrics["q_halt_loss"] = q_loss.detach()
        if "target_q_continue" in outputs:
            q_continue_loss = F.binary_cross_entropy_with_logits(
                outputs["q_continue_logits"], outputs["target_q_continue"], reduction="sum"
            )
            metrics["q_continue_loss"] = q_continue_loss.detach()
            q_loss = q_loss + q_continue_loss

        returned = {key: outputs[key].detach() for key in return_keys if key in outputs}
        return carry, lm_loss + 0.5 * q_loss, metrics, returned, carry.halted.all()
