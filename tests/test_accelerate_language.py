"""accelerate() for looped language models, over stand-ins with the modules of HRM-Text and Ouro."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trmfast
from language_models import VOCABULARY, HrmText, LanguageModel, Ouro
from trmfast.dropin.swap import is_swapped
from trmfast.testing import compare, pool, require

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS: dict[str, Any] = {"HRM-Text": HrmText, "Ouro": Ouro}
LENGTH = 11
IDS = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [7]])).long()
LEFT = MASK.flip(1)
PREFIX = (torch.arange(LENGTH) < torch.tensor([[4], [2]])).long()
CALLS: dict[str, dict[str, Tensor]] = {
    "plain": {},
    "ones": {"attention_mask": torch.ones_like(MASK)},
    "padded": {"attention_mask": MASK},
    "padded on the left": {"attention_mask": LEFT},
    "positions": {"position_ids": torch.arange(LENGTH)[None] + 5},
    "prefix": {"token_type_ids": PREFIX},
    "padded prefix": {"token_type_ids": PREFIX, "attention_mask": MASK},
}


def make(kind: str, seed: int = 0) -> LanguageModel:
    torch.manual_seed(seed)
    return LanguageModel(KINDS[kind]())


def fused(model: LanguageModel) -> LanguageModel:
    return trmfast.accelerate(model, backend="reference")


def step(model: LanguageModel, dtype: torch.dtype, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits of tokens that are no padding, and the gradients of every weight."""
    model.to(dtype).zero_grad()
    logits = model(IDS, **given)[given.get("attention_mask", torch.ones_like(IDS)).bool()]
    loss = logits.double() * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    loss.sum().backward()
    grads = {f"grad {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


@pytest.mark.representative(
    when=lambda kind, call, dtype: (
        call in ("plain", "padded prefix")
        or (kind, call) == ("Ouro", "padded")
        or (dtype == torch.float32 and call == "positions")
    )
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_as_exact_as_the_model_itself(kind: str, call: str, dtype: torch.dtype, recursions: Callable[[], int]) -> None:
    if kind == "Ouro" and "prefix" in call:
        return  # it has no prefixes
    draws = []
    for seed in range(3):
        models = [make(kind, seed) for _ in range(3)]
        for model in models:
            model.load_state_dict({n: w.to(dtype).float() for n, w in models[0].state_dict().items()})
        accelerated = fused(models[1])
        before = recursions()
        ours = step(accelerated, dtype, CALLS[call])
        assert recursions() == before + 1
        eager, truth = step(models[0], dtype, CALLS[call]), step(models[2], torch.float64, CALLS[call])
        assert ours.keys() == eager.keys() == truth.keys()
        draws.append([compare(n, ours[n], eager[n], t, is_gradient=n != "logits") for n, t in truth.items()])
    require(pool(draws))


@pytest.fixture
def recursions(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many recursions ran so far."""
    from trmfast import ops

    calls: list[int] = []
    real = ops.recursion

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(ops, "recursion", counted)
    return lambda: len(calls)


@pytest.mark.parametrize("kind", KINDS)
def test_undone_and_copied(kind: str) -> None:
    plain, model = make(kind), fused(make(kind))
    names, expected = list(plain.state_dict()), plain(IDS)
    assert list(model.state_dict()) == names
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fused(model)):
        assert is_swapped(other.model)
        torch.testing.assert_close(other(IDS), expected)
        with torch.no_grad():
            other.get_parameter(names[-3]).zero_()  # a copy reads its own weights
    torch.testing.assert_close(trmfast.restore(fused(make(kind)))(IDS), expected, rtol=0, atol=0)
    assert type(trmfast.restore(model).model) is type(plain.model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "given",
    [
        {"use_cache": True},
        {"output_hidden_states": True},
        {"past_key_values": "a cache"},
        {"attention_mask": torch.ones(1, LENGTH)},
        {"attention_mask": (torch.arange(LENGTH) % 3 > 0).long().expand(2, -1)},
        {"position_ids": torch.arange(LENGTH) + torch.tensor([[0], [3]])},
    ],
    ids=lambda given: " ".join(given),
)
def test_calls_that_run_the_model_s_own_code(kind: str, given: dict[str, Any], recursions: Callable[[], int]) -> None:
    plain, model = make(kind), fused(make(kind))
    before = recursions()
    assert torch.equal(model(IDS, **given), plain(IDS, **given))
    assert recursions() == before


def gelu_everywhere(layers: Any) -> None:
    for layer in layers:
        layer.mlp.act_fn = nn.GELU()


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "another activation": (gelu_everywhere, "forward: the last state is off by "),
    "one other activation": (
        lambda layers: setattr(layers[1].mlp, "act_fn", nn.GELU()),
        "layers.1.mlp.act_fn: got torch.nn.modules.activation.GELU.forward, accepted is torch.nn.modules.activation.",
    ),
    "dropout": (
        lambda layers: setattr(layers[1].self_attn, "attention_dropout", 0.1),
        "layers.1.self_attn.attention_dropout: got 0.1, accepted is none",
    ),
    "a bias": (
        lambda layers: setattr(layers[0].self_attn, "k_proj", nn.Linear(32, 32)),
        "layers.0.self_attn.k_proj.bias: got a bias, accepted is None",
    ),
    "an adapter": (
        lambda layers: setattr(layers[0].mlp, "up_proj", nn.Sequential(nn.Linear(32, 48))),
        "layers.0.mlp.up_proj: got Sequential, accepted is torch.nn.Linear",
    ),
    "a hook": (
        lambda layers: layers[1].mlp.register_forward_hook(lambda *_: None),
        "layers.1.mlp: has forward hooks, accepted are none",
    ),
    "another scale": (
        lambda layers: setattr(layers[0].self_attn, "scaling", 1.0),
        "layers.0.self_attn.scaling: got 1.0, accepted is head_dim^-0.5",
    ),
    "an extra part": (
        lambda layers: setattr(layers[0], "extra", nn.Linear(2, 2)),
        "layers.0: got the parts self_attn, mlp, input_layernorm, ",
    ),
}


def layers_of(model: LanguageModel) -> nn.ModuleList:
    inner = model.model
    layers = inner.H_module.layers if isinstance(inner, HrmText) else inner.layers
    assert isinstance(layers, nn.ModuleList)
    return layers


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_other_models_are_refused(kind: str, change: str) -> None:
    model = make(kind)
    apply, message = CHANGES[change]
    apply(layers_of(model))
    with pytest.raises(trmfast.UnsupportedModelError) as caught:
        trmfast.accelerate(model)
    (line,) = caught.value.differences
    assert message in line
    assert not is_swapped(model.model)


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "another activation"])
@pytest.mark.parametrize("kind", KINDS)
def test_later_changes_are_noticed(kind: str, change: str) -> None:
    model = fused(make(kind))
    model(IDS)
    apply, message = CHANGES[change]
    apply(layers_of(model))
    with pytest.raises(RuntimeError, match="accelerate") as caught:
        model(IDS)
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_another_loop_is_refused(kind: str) -> None:
    """A subclass whose loop differs has the same parts; what it computes tells."""

    def doubled(self: Any, **given: Any) -> Any:
        given["inputs_embeds"] = 2 * given["inputs_embeds"]
        return KINDS[kind].forward(self, **given)

    Other = type("Other", (KINDS[kind],), {"forward": doubled})
    with pytest.raises(trmfast.UnsupportedModelError, match="forward: the last state is off by"):
        trmfast.accelerate(Other())


def test_settings_are_read_at_every_call() -> None:
    plain, model = make("HRM-Text"), fused(make("HRM-Text"))
    for m in (plain, model):
        m.model.config.H_cycles, m.model.config.L_cycles = 1, 2
    torch.testing.assert_close(model(IDS), plain(IDS))
    plain, model = make("Ouro"), fused(make("Ouro"))
    plain.model.total_ut_steps = model.model.total_ut_steps = 2
    torch.testing.assert_close(model(IDS), plain(IDS))
