"""Changes of modules that a fused recursion does not call: they have their effect, or are refused with their path."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import trmfast
from dropin_cases import make, make_batch
from trmfast.models import TRM
from trmfast.nn import CastedLinear

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG: dict[str, Any] = {
    "batch_size": 2,
    "seq_len": 9,
    "vocab_size": 7,
    "num_puzzle_identifiers": 5,
    "puzzle_emb_ndim": 32,
    "puzzle_emb_len": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "expansion": 1,
    "L_layers": 2,
    "H_cycles": 1,
    "L_cycles": 2,
    "pos_encodings": "rope",
    "halt_max_steps": 4,
    "halt_exploration_prob": 0.1,
    "forward_dtype": "float32",
}


class Adapter(nn.Module):
    """A projection inside another module that shows its weight, as adapters do."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.scale = nn.Parameter(torch.ones(1))

    @property
    def weight(self) -> Tensor:
        return self.base.weight  # type: ignore[return-value]

    def forward(self, h: Tensor) -> Tensor:
        return self.scale * self.base(h)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def ours() -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randint(7, (2, 9), generator=generator)
    return TRM(CONFIG), {"inputs": inputs, "puzzle_identifiers": torch.zeros(2, dtype=torch.int32)}


def accelerated() -> tuple[Any, dict[str, Tensor]]:
    return trmfast.accelerate(make("trm")), make_batch("trm")


MODELS = pytest.mark.parametrize("model_of", (ours, accelerated), ids=lambda f: f.__name__)


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    result: Tensor = model(model.initial_carry(batch), batch)[1]["logits"]
    return result


def block(model: Any, index: int = 0) -> Any:
    return model.inner.L_level.layers[index]


def wrap(model: Any) -> None:
    block(model).mlp.down_proj = Adapter(block(model).mlp.down_proj)


def hook(model: Any) -> None:
    model.inner.L_level.register_forward_hook(lambda *_: None)


def pre_hook(model: Any) -> None:
    block(model, 1).self_attn.qkv_proj.register_forward_pre_hook(lambda *_: None)


def backward_hook(model: Any) -> None:
    block(model).register_full_backward_hook(lambda *_: None)


def new_forward(model: Any) -> None:
    block(model).mlp.forward = lambda h: h


def prune(model: Any) -> None:
    torch.nn.utils.prune.l1_unstructured(block(model).mlp.down_proj, "weight", 0.5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def weight_norm(model: Any) -> None:
    nn.utils.weight_norm(block(model).mlp.down_proj)


def spectral_norm(model: Any) -> None:
    nn.utils.spectral_norm(block(model).mlp.down_proj)


def bias(model: Any) -> None:
    block(model).mlp.down_proj.bias = nn.Parameter(torch.ones(32))


def missing_block(model: Any) -> None:
    del model.inner.L_level.layers[1]


REFUSED: dict[Callable[[Any], None], str] = {
    wrap: r"L_level\.layers\.0\.mlp\.down_proj",
    hook: r"L_level: has forward hooks",
    pre_hook: r"L_level\.layers\.1\.self_attn\.qkv_proj: has forward pre hooks",
    backward_hook: r"L_level\.layers\.0: has backward hooks",
    new_forward: r"L_level\.layers\.0\.mlp\.forward",
    prune: r"L_level\.layers\.0\.mlp\.down_proj",
    weight_norm: r"L_level\.layers\.0\.mlp\.down_proj",
    spectral_norm: r"L_level\.layers\.0\.mlp\.down_proj",
    bias: r"L_level\.layers\.0\.mlp\.down_proj\.bias: got a bias",
    missing_block: r"L_level.*: got 1 blocks, accepted are 2",
}


@MODELS
@pytest.mark.parametrize("change", REFUSED, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_change_that_would_be_lost_is_refused(
    model_of: Callable[[], tuple[Any, dict[str, Tensor]]], change: Callable[[Any], None]
) -> None:
    model, batch = model_of()
    logits(model, batch)  # a snapshot is there
    fresh = copy.deepcopy(model)  # without a snapshot
    for changed in (model, fresh):
        change(changed)
        with pytest.raises(RuntimeError, match=f"^{REFUSED[change]}") as caught:
            logits(changed, batch)
        assert "\n" not in str(caught.value)


@MODELS
def test_a_change_that_is_undone_is_forgotten(model_of: Callable[[], tuple[Any, dict[str, Tensor]]]) -> None:
    model, batch = model_of()
    expected = logits(model, batch)
    handle = model.inner.L_level.register_forward_hook(lambda *_: None)
    original = block(model).mlp.down_proj
    wrap(model)
    with pytest.raises(RuntimeError):
        logits(model, batch)
    handle.remove()
    block(model).mlp.down_proj = original
    assert torch.equal(logits(model, batch), expected)


def test_a_class_that_is_patched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = ours()
    logits(model, batch)
    monkeypatch.setattr(CastedLinear, "forward", lambda _, h: h)
    with pytest.raises(RuntimeError, match=r"^L_level\.layers\.0\.\S+: got another CastedLinear\.forward"):
        logits(model, batch)


@pytest.mark.parametrize(
    "name, value, told",
    [("causal", True, "causal True, accepted is False"), ("norm_eps", 0.1, "rms_norm_eps 0.1, accepted is 1e-05")],
)
def test_a_setting_that_changes_after_accelerate_is_refused(name: str, value: Any, told: str) -> None:
    model, batch = accelerated()
    logits(model, batch)
    for layer in (block(model), block(model, 1)):
        setattr(layer if name == "norm_eps" else layer.self_attn, name, value)
    with pytest.raises(RuntimeError, match=f"L_level: got {told}; this came after accelerate"):
        logits(model, batch)


def test_a_spec_that_changes_is_refused() -> None:
    model, batch = ours()
    logits(model, batch)
    block(model).spec = replace(block(model).spec, causal=True)
    with pytest.raises(RuntimeError, match=r"L_level\.layers\.0\.spec: got .*causal=True"):
        logits(model, batch)


@MODELS
def test_parametrized_weights_are_followed(model_of: Callable[[], tuple[Any, dict[str, Tensor]]]) -> None:
    """A parametrization that doubles a weight does what doubling the weight does, in training as well."""
    model, batch = model_of()
    logits(model, batch)
    doubled = copy.deepcopy(model)
    with torch.no_grad():
        block(doubled).mlp.down_proj.weight.mul_(2)
    linear = block(model).mlp.down_proj
    parametrize.register_parametrization(linear, "weight", Doubled())
    result = logits(model, batch)
    assert torch.equal(result, logits(doubled, batch))
    result.float().square().sum().backward()
    gradient = linear.parametrizations.weight.original.grad
    assert gradient is not None
    assert gradient.abs().max() > 0
    parametrizations.weight_norm(block(model, 1).mlp.down_proj)
    torch.testing.assert_close(logits(model, batch), logits(doubled, batch), rtol=1e-3, atol=1e-4)


@MODELS
def test_what_has_no_effect_is_no_change(model_of: Callable[[], tuple[Any, dict[str, Tensor]]]) -> None:
    model, batch = model_of()
    expected = logits(model, batch)
    block(model).mlp.compile()
    block(model).note = "kept by the user"
    for parameter in block(model).parameters():
        parameter.requires_grad_(False)
    assert torch.equal(logits(model, batch), expected)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied, batch), expected)
        assert copied.inner.__dict__["_trmfast_watch"].owner is copied.inner


def test_a_tensor_in_a_parameters_place_is_read() -> None:
    model, batch = ours()
    before = logits(model, batch)
    linear = block(model).mlp.down_proj
    zeros = torch.zeros_like(linear.weight)
    del linear.weight
    linear.weight = zeros
    assert not torch.equal(logits(model, batch), before)


def test_a_block_and_a_recursion_are_watched() -> None:
    spec = trmfast.BlockSpec(32, 16, num_heads=2)
    net = trmfast.nn.Net(trmfast.NetSpec(spec, 1))
    recursion = trmfast.nn.Recursion(trmfast.RecursionProgram.urm(1, 1), [net])
    z, x = torch.randn(2, 1, 3, 32, generator=torch.Generator().manual_seed(0))
    expected = recursion([z], x)
    seen: list[int] = []
    net.layers[0].register_forward_hook(lambda *_: seen.append(0))
    net(z)
    assert seen == [0]  # here the block is called
    with pytest.raises(RuntimeError, match=r"^nets\.0\.layers\.0: has forward hooks"):
        recursion([z], x)
    net.layers[0]._forward_hooks.clear()
    assert torch.equal(recursion([z], x)[0], expected[0])
    mlp: Any = net.layers[0].mlp
    mlp.down_proj = Adapter(mlp.down_proj)
    for call in (lambda: net(z), lambda: recursion([z], x)):
        with pytest.raises(RuntimeError, match=r"mlp\.down_proj: got Adapter, accepted is CastedLinear"):
            call()
