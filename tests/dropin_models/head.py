"""The loss head around a model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def stablemax_cross_entropy(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    logits = logits.to(torch.float64)
    scores = torch.where(logits < 0, 1 / (1 - logits + 1e-30), logits + 1)
    log_p = torch.log(scores / scores.sum(-1, keepdim=True))
    chosen = log_p.gather(-1, torch.where(valid, labels, 0).long().unsqueeze(-1)).squeeze(-1)
    return -torch.where(valid, chosen, 0)


class ACTLossHead(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def initial_carry(self, batch: dict[str, Tensor]) -> Any:
        return self.model.initial_carry(batch)  # type: ignore[operator]

    def forward(self, carry: Any, batch: dict[str, Tensor]) -> tuple[Any, Tensor, Tensor]:
        """The new carry, the loss, whether every row has halted."""
        carry, outputs = self.model(carry=carry, batch=batch)
        labels = carry.current_data["labels"]
        with torch.no_grad():
            valid = labels != -100
            counts = valid.sum(-1)
            solved = (valid & (outputs["logits"].argmax(-1) == labels)).sum(-1) == counts
        per_token = stablemax_cross_entropy(outputs["logits"], labels, valid)
        loss = (per_token / counts.clamp_min(1).unsqueeze(-1)).sum()
        q_halt = outputs["q_halt_logits"]
        q_loss = F.binary_cross_entropy_with_logits(q_halt, solved.to(q_halt.dtype), reduction="sum")
        if "target_q_continue" in outputs:
            q_loss = q_loss + F.binary_cross_entropy_with_logits(
                outputs["q_continue_logits"], outputs["target_q_continue"], reduction="sum"
            )
        return carry, loss + 0.5 * q_loss, carry.halted.all()
