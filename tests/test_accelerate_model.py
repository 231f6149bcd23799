"""Accelerated models: hooks, tables, frozen weights, a caller's modes, weights of zero, and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import trmfast
from dropin_cases import assert_close, fused_calls, make, make_batch, same, step
from dropin_models import TRM
from dropin_models.layers import SwiGLU
from trmfast.dropin import UnsupportedModelError

# Models this small are slower on several threads.
pytestmark = pytest.mark.usefixtures("one_thread")


def test_hooks_outside_of_the_networks_still_run() -> None:
    model, batch = make("trm"), make_batch("trm")
    seen: list[str] = []
    inner = model.inner
    for name in ("embed_tokens", "puzzle_emb", "rotary_emb", "lm_head", "q_head"):
        getattr(inner, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    inner.register_forward_pre_hook(lambda *_: seen.append("inner"))
    model.register_forward_hook(lambda *_: seen.append("model"))
    inner.L_level.layers[0].mlp.down_proj.weight.register_hook(lambda _: seen.append("gradient"))
    trmfast.accelerate(model)
    assert seen == []  # none ran while the model was looked at
    step(model, batch)
    assert sorted(seen) == sorted(
        ["inner", "rotary_emb", "embed_tokens", "puzzle_emb", "lm_head", "q_head", "model", "gradient"]
    )


def test_a_hook_that_comes_later_is_named() -> None:
    model, batch = trmfast.accelerate(make("trm")), make_batch("trm")
    handle = model.inner.L_level.layers[1].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(
        RuntimeError, match=r"^L_level\.layers\.1\.mlp: has forward hooks, .*; this came after accelerate"
    ):
        step(model, batch)
    handle.remove()
    step(model, batch)


def test_tables_are_read_at_every_call() -> None:
    model, batch = trmfast.accelerate(make("trm")), make_batch("trm")
    first = step(model, batch)
    model.inner.rotary_emb.cos_cached.zero_()
    assert not same(step(model, batch), first)
    assert_close(step(model, batch), step(trmfast.restore(model), batch))


def test_frozen_weights_and_inference_mode() -> None:
    model, batch = make("trm"), make_batch("trm")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    expected = model(model.initial_carry(batch), batch)[1]["logits"]
    expected.sum().backward()
    gradient = model.puzzle_emb.local_weights.grad.clone()
    model.puzzle_emb.local_weights.grad = None
    trmfast.accelerate(model)
    model(model.initial_carry(batch), batch)[1]["logits"].sum().backward()
    torch.testing.assert_close(model.puzzle_emb.local_weights.grad, gradient, rtol=1e-3, atol=1e-4)
    assert all(p.grad is None for p in model.parameters())
    with torch.inference_mode():
        got = model(model.initial_carry(batch), batch)[1]["logits"]
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_accelerate_under_a_callers_modes() -> None:
    batch = make_batch("trm")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model = trmfast.accelerate(make("trm"))
    assert fused_calls(model, batch) == 1
    model = make("trm")
    with torch.device("meta"):
        trmfast.accelerate(model)
    assert fused_calls(model, batch) == 1
    with torch.device("meta"):
        model = make("trm")
    trmfast.accelerate(model)
    donor = make("trm")
    model.to_empty(device="cpu").load_state_dict(donor.state_dict())
    for mine, theirs in zip(model.buffers(), donor.buffers(), strict=True):
        mine.data.copy_(theirs)
    assert_close(step(model.eval(), batch), step(donor.eval(), batch))


def test_weights_of_zero_and_of_nan_hide_nothing() -> None:
    for value in (0.0, float("nan")):
        model = make("trm")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        trmfast.accelerate(model)

        class Wrong(SwiGLU):
            def forward(self, x: Tensor) -> Tensor:
                gate, up = self.gate_up_proj(x).chunk(2, -1)
                return self.down_proj(torch.relu(gate) * up)

        other = make("trm")
        other.inner.L_level.layers[1].mlp.__class__ = Wrong
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.fill_(value)
        with pytest.raises(UnsupportedModelError):
            trmfast.accelerate(other)


class Allocations(TorchDispatchMode):
    """The largest storage, in bytes, that an operator returned, other than one that existed."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.largest = 0
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


def test_a_large_puzzle_table_is_not_copied() -> None:
    model = TRM({**vars(make("trm").config), "num_puzzle_identifiers": 100_000})
    with Allocations(model.puzzle_emb.weights) as allocations:
        trmfast.accelerate(model)
    assert 1e5 < allocations.largest < model.puzzle_emb.weights.nbytes / 4
