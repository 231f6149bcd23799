"""What is not in the state_dict survives moves, copies and other ways to give a model its tensors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from model_cases import CASES, TINY, make, make_batch
from trmfast.models import CastedSparseEmbeddingSignSGD_Distributed

pytestmark = pytest.mark.usefixtures("one_thread")


def outputs(model: Any) -> Tensor:
    batch = make_batch(0)
    torch.manual_seed(0)
    return model(model.initial_carry(batch), batch)[1]["logits"]


def on_meta() -> Any:
    with torch.device("meta"):
        return CASES["trm"][0](TINY)


def emptied(model: Any) -> Any:
    made = on_meta().to_empty(device="cpu")
    for name, buffer in made.named_buffers():
        if name.endswith(("cached", "local_weights")):
            assert buffer.device.type == "cpu"
    made.load_state_dict(model.state_dict())
    return made


def assigned(model: Any) -> Any:
    made = on_meta()
    made.load_state_dict(model.state_dict(), assign=True)
    return made


WAYS: dict[str, Callable[[Any], Any]] = {
    "to_empty": emptied,
    "assign": assigned,
    "to": lambda model: model.to("cpu", torch.float64).float(),
    "half and back": lambda model: _weights_kept(model, lambda m: m.to(torch.bfloat16).float()),
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


def _weights_kept(model: Any, change: Callable[[Any], Any]) -> Any:
    state = copy.deepcopy(model.state_dict())
    changed = change(model)
    changed.load_state_dict(state)
    return changed


@pytest.mark.parametrize("way", WAYS)
def test_tables_and_leaf(way: str) -> None:
    model, _ = make("trm")
    expected = outputs(copy.deepcopy(model))
    made = WAYS[way](model)
    rope = made.inner.rotary_emb
    assert rope.cos_cached.dtype == torch.float32
    assert torch.equal(outputs(made), expected)
    local = made.puzzle_emb.local_weights
    assert local.is_leaf
    assert local.requires_grad
    outputs(made).sum().backward()
    assert local.grad is not None
    copy.deepcopy(made)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_optimizer_that_was_built_before(dtype: torch.dtype) -> None:
    model, _ = make("trm")
    puzzle = model.puzzle_emb
    optimizer = CastedSparseEmbeddingSignSGD_Distributed(puzzle.buffers(), world_size=1, lr=0.5, weight_decay=0.0)
    outputs(model).sum().backward()
    model.to(dtype)
    assert puzzle.local_weights.grad is not None
    assert puzzle.local_weights.grad.dtype == dtype
    before = puzzle.weights.clone()
    optimizer.step()
    rows = puzzle.local_ids.long().unique()
    assert ((puzzle.weights - before)[rows].abs() > 0.4).all()


def test_an_optimizer_whose_buffers_are_gone() -> None:
    model = on_meta()
    optimizer = CastedSparseEmbeddingSignSGD_Distributed(model.puzzle_emb.buffers(), world_size=1)
    model.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match=r"^params: the embedding's buffers were replaced"):
        optimizer.step()
    made, _ = make("trm")
    optimizer = CastedSparseEmbeddingSignSGD_Distributed(made.puzzle_emb.buffers(), world_size=1)
    made.load_state_dict(copy.deepcopy(made.state_dict()), assign=True)
    with pytest.raises(RuntimeError, match=r"^params: the embedding's buffers were replaced"):
        optimizer.step()
