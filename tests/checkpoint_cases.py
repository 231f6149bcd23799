"""Small models, their checkpoints, and whether two models are the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model_cases import CASES, TINY, make_batch, randomise
from trmfast.models import ACTModel

# What no tensor tells.
UNTOLD = ("H_cycles", "L_cycles", "halt_max_steps")


def make(name: str, **extra: Any) -> ACTModel:
    cls, _, differs, _ = CASES[name]
    torch.manual_seed(1)
    model = cls(TINY | differs | extra)
    randomise(model)
    return model


def words(model: ACTModel) -> dict[str, Any]:
    """The configuration keys that a caller has to give for a checkpoint of this model."""
    names = [*UNTOLD]
    if not model.config.mlp_t:
        names += ["num_heads"]
        if model.config.pos_encodings != "learned":
            names += ["pos_encodings", "seq_len"]
    if model.config.puzzle_emb_ndim and hasattr(model.config, "puzzle_emb_len"):
        names += ["puzzle_emb_len"]
    return {name: getattr(model.config, name) for name in names}


def steps(model: nn.Module) -> list[Tensor]:
    """Outputs of two supervision steps in evaluation."""
    bare: Any = getattr(model, "model", model)
    bare.eval()
    batch = make_batch(0)
    carry = bare.initial_carry(batch)
    found: list[Tensor] = []
    with torch.no_grad():
        for _ in range(2):
            carry, outputs = bare(carry=carry, batch=batch)
            found += outputs.values()
    return found


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether all tensors and the outputs are bitwise those of the other, dtypes included."""
    one, two = a.state_dict(), b.state_dict()
    tensors = one.keys() == two.keys() and all(
        t.dtype == two[k].dtype and torch.equal(t, two[k]) for k, t in one.items()
    )
    return tensors and all(torch.equal(t, u) for t, u in zip(steps(a), steps(b), strict=True))


def saved(tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], name: str = "trm") -> tuple[Path, dict[str, Any]]:
    model = make(name)
    tensors = dict(model.state_dict())
    path = tmp_path / "m.pt"
    torch.save(change(tensors) or tensors, path)
    return path, words(model)
