"""Small models of every kind, each with the plain model (dropin_models) that it is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dropin_models as plain
import trmfast
from trmfast.models import HRM, TRM, ACTModel, TRMHier6, TRMSingleZ

TINY: dict[str, Any] = {
    "batch_size": 3,
    "seq_len": 6,
    "puzzle_emb_ndim": 32,
    "num_puzzle_identifiers": 5,
    "vocab_size": 7,
    "H_cycles": 2,
    "L_cycles": 2,
    "H_layers": 1,
    "L_layers": 2,
    "hidden_size": 32,
    "expansion": 1,
    "num_heads": 2,
    "pos_encodings": "rope",
    "halt_max_steps": 4,
    "halt_exploration_prob": 0.5,
    "forward_dtype": "float32",
    "puzzle_emb_len": 3,
    "causal": False,
}
SUDOKU = TINY | {
    "batch_size": 768, "seq_len": 81, "puzzle_emb_ndim": 512, "num_puzzle_identifiers": 1, "vocab_size": 11,
    "H_cycles": 3, "L_cycles": 6, "L_layers": 2, "hidden_size": 512, "expansion": 4, "num_heads": 8,
    "halt_max_steps": 16, "forward_dtype": "bfloat16", "puzzle_emb_len": 16,
}  # fmt: skip
HRM_SUDOKU = SUDOKU | {"H_cycles": 2, "L_cycles": 2, "H_layers": 4, "L_layers": 4}
# A small one for `trmfast solve`.
SOLVER: dict[str, Any] = {
    "batch_size": 8, "seq_len": 81, "vocab_size": 11, "num_puzzle_identifiers": 1, "puzzle_emb_ndim": 32,
    "puzzle_emb_len": 1, "hidden_size": 32, "num_heads": 2, "expansion": 1, "L_layers": 1, "H_cycles": 1,
    "L_cycles": 1, "pos_encodings": "learned", "halt_max_steps": 6, "halt_exploration_prob": 0.1,
    "forward_dtype": "float32",
}  # fmt: skip
MLP = {"mlp_t": True, "pos_encodings": "none"}

# name -> (class, the plain model's class, what differs from TINY, puzzle tokens)
CASES: dict[str, tuple[type[ACTModel], type[Any], dict[str, Any], int]] = {
    "trm": (TRM, plain.TRM, {}, 3),
    "trm-learned": (TRM, plain.TRM, {"pos_encodings": "learned", "puzzle_emb_ndim": 40, "puzzle_emb_len": 0}, 2),
    "trm-bare": (TRM, plain.TRM, {"pos_encodings": "none", "puzzle_emb_ndim": 0}, 0),
    "trm-mlp_t": (TRM, plain.TRM, MLP | {"H_cycles": 1}, 3),
    "trm-continue": (TRM, plain.TRM, {"no_ACT_continue": False}, 3),
    "trm_singlez": (TRMSingleZ, plain.SingleZ, {}, 3),
    "trm_hier6": (TRMHier6, plain.Hier6, {"L_cycles": 4}, 3),
    "hrm": (HRM, plain.HRM, {}, 1),
    "hrm-mlp_t": (HRM, plain.HRM, MLP | {"L_cycles": 1}, 1),
}
# What the plain models have no default for.
EXPLICIT: dict[str, Any] = {"mlp_t": False, "rms_norm_eps": 1e-5, "rope_theta": 1e4}


def make_batch(seed: int, rows: int = 3, config: dict[str, Any] = TINY) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(
        0, config["vocab_size"], (2, rows, config["seq_len"]), generator=generator, dtype=torch.int32
    )
    tokens[1, :, 0] = -100
    ids = torch.randint(0, config["num_puzzle_identifiers"], (rows,), generator=generator, dtype=torch.int32)
    return {"inputs": tokens[0], "labels": tokens[1], "puzzle_identifiers": ids}


def randomise(model: ACTModel) -> None:
    """Gives the parts that start at zero something to say."""
    inner = model.inner
    with torch.no_grad():
        inner.q_head.weight.normal_(std=0.3)
        assert inner.q_head.bias is not None
        inner.q_head.bias.zero_()
        if model.config.puzzle_emb_ndim:
            model.puzzle_emb.weights.normal_(std=0.2)


def make_plain(name: str, **extra: Any) -> Any:
    """The plain model of a case."""
    _, cls, differs, prefix = CASES[name]
    return cls(EXPLICIT | TINY | differs | {"puzzle_emb_len": prefix} | extra)


def make(name: str, scale: float = 1.0, **extra: Any) -> tuple[ACTModel, Any]:
    """A model and the plain one with the same weights, those of the networks times ``scale``."""
    cls, _, differs, _ = CASES[name]
    torch.manual_seed(0)
    model = cls(TINY | differs | extra)
    randomise(model)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "_level." in key:
                parameter.mul_(scale)
    eager = make_plain(name, **extra)
    eager.load_state_dict(model.state_dict(), strict=True)
    return model, eager


def save_solver(path: Path, **extra: Any) -> str:
    """An untrained Sudoku model whose Q head stops rows after different numbers of steps, as a file."""
    torch.manual_seed(0)
    model = TRM(SOLVER | extra)
    with torch.no_grad():
        model.inner.q_head.weight.normal_(std=0.5)
        model.inner.q_head.bias.zero_()  # type: ignore[union-attr]
    trmfast.save(model, path)
    return str(path)
