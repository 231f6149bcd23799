"""URM against a plain PyTorch model of the published structure, and its checkpoints."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trmfast
from dropin_models import urm as plain_urm
from model_cases import TINY, make_batch
from trmfast.models import URM, ACTLossHead, URMConfig
from trmfast.testing import Comparison, compare, pool, require

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG: dict[str, Any] = {
    key: value for key, value in TINY.items() if not key.startswith(("halt_", "puzzle_emb_len", "H_layers", "L_layers"))
} | {"num_layers": 2, "loops": 3, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "attn_dropout": 0.0, "L_cycles": 3}


def make(scale: float = 0.7, seed: int = 0, **extra: Any) -> tuple[URM, plain_urm.URM]:
    """The model and the plain one with the same weights."""
    torch.manual_seed(seed)
    model, eager = URM(CONFIG | extra), plain_urm.URM(CONFIG | extra)
    with torch.no_grad():
        model.inner.q_head.weight.normal_(std=0.3)
        assert model.inner.q_head.bias is not None
        model.inner.q_head.bias.zero_()
        model.puzzle_emb.weights.normal_(std=0.2)
        for name, parameter in model.named_parameters():
            if ".layers." in name:
                parameter.mul_(scale)
    eager.load_state_dict(model.state_dict(), strict=True)
    return model, eager


def run(model: nn.Module, steps: int = 1, seed: int = 0) -> tuple[list[dict[str, Tensor]], Any]:
    """Outputs of some supervision steps on one batch, and the last carry."""
    batch = make_batch(seed)
    carry = model.initial_carry(batch)  # type: ignore[operator]
    found = []
    for _ in range(steps):
        carry, outputs = model(carry=carry, batch=batch)
        found.append(outputs)
    return found, carry


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_outputs_and_gradients_within_the_tolerance_policy(dtype: str) -> None:
    require(pool([compare_draw(dtype, seed) for seed in range(10)]))


def compare_draw(dtype: str, seed: int) -> list[Comparison]:
    """The model and the plain one against the plain one in float64: state, outputs and gradients of one step."""
    extra = {"H_cycles": 1, "L_cycles": 1} if dtype == "bfloat16" else {}
    model, eager = make(seed=seed, forward_dtype=dtype, **extra)
    truth = plain_urm.URM(CONFIG | extra | {"forward_dtype": "float64"})
    truth.load_state_dict(model.state_dict())
    for parameter in truth.parameters():
        parameter.data = parameter.data.double()
    results = []
    for m in (model, eager, truth):
        (outputs,), carry = run(m, seed=seed)
        loss = outputs["logits"].double().logsumexp(-1).sum() + outputs["q_halt_logits"].double().square().sum()
        loss.backward()
        grads = {name: p.grad for name, p in m.named_parameters()}
        grads["puzzle"] = m.puzzle_emb.local_weights.grad
        results.append((outputs, carry, grads))
    (mine, my_carry, my_grads), (plain, plain_carry, plain_grads), (true, true_carry, true_grads) = results
    assert not my_carry.current_hidden.requires_grad
    found = [compare("state", my_carry.current_hidden, plain_carry.current_hidden, true_carry.current_hidden)]
    found += [compare(name, mine[name], plain[name], true[name].double()) for name in mine]
    for name, truth_grad in true_grads.items():
        a, b = my_grads[name], plain_grads[name]
        assert a is not None
        assert b is not None
        assert truth_grad is not None
        if truth_grad.any():
            found.append(compare(name, a, b, truth_grad.double(), is_gradient=True))
    return found


def test_halting_and_carry_are_those_of_the_plain_model() -> None:
    model, eager = make()
    for training in (True, False):
        carries = []
        for m in (model.train(training), eager.train(training)):
            torch.manual_seed(3)
            _, carry = run(m, steps=4)
            carries.append(carry)
        mine, plain = carries
        assert torch.equal(mine.steps, plain.steps)
        assert torch.equal(mine.halted, plain.halted)
        assert all(torch.equal(value, plain.current_data[key]) for key, value in mine.current_data.items())
        torch.testing.assert_close(mine.current_hidden, plain.current_hidden, atol=1e-4, rtol=1e-4)
    assert mine.steps.max() <= 3


def test_training_in_a_loss_head() -> None:
    """The same losses as the plain model's over deep supervision."""
    losses = []
    for m in make():
        head = ACTLossHead(m, "stablemax_cross_entropy")
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
        torch.manual_seed(0)
        carry = head.initial_carry(make_batch(0))
        values = []
        for i in range(8):
            carry, loss, *_ = head([], carry=carry, batch=make_batch(i))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        losses.append(values)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(set(losses[0])) == 8


def test_configuration() -> None:
    config = URMConfig.from_dict(CONFIG)
    assert (config.L_layers, config.halt_max_steps, config.halt_exploration_prob, config.prefix_len) == (2, 3, 0.1, 1)
    block = config.net_spec(2).block
    assert (block.channel_mixer, block.conv_kernel, block.token_mixer) == ("conv_swiglu", 2, "attention")
    with pytest.raises(ValueError, match=r"^pos_encodings: got 'learned', accepted are rope$"):
        URM(CONFIG | {"pos_encodings": "learned"})
    with pytest.raises(ValueError, match=r"^mlp_t: got True, accepted are False$"):
        URM(CONFIG | {"mlp_t": True})
    with pytest.raises(ValueError, match=r"^config_dict: got no L_layers, required by URMConfig$"):
        URM({key: value for key, value in CONFIG.items() if key != "num_layers"})
    with pytest.raises(TypeError, match=r"^config_dict: got list"):
        URM([])  # type: ignore[arg-type]


def test_convolutions_have_the_compute_dtype() -> None:
    state = URM(CONFIG | {"forward_dtype": "bfloat16"}).state_dict()
    kept = {name for name, tensor in state.items() if tensor.dtype == torch.bfloat16}
    convs = {f"inner.layers.{i}.mlp.dwconv.{what}" for i in range(2) for what in ("weight", "bias")}
    assert kept == convs | {"inner.init_hidden"}


def test_copies() -> None:
    model, _ = make()
    expected = run(model.eval())[0][0]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = run(copied)[0][0]
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize("form", ["saved", "upstream"])
def test_checkpoints(form: str, tmp_path: Path) -> None:
    model, _ = make(forward_dtype="bfloat16")
    path = tmp_path / ("m.safetensors" if form == "saved" else "step_1")
    if form == "saved":
        trmfast.save(ACTLossHead(model, "softmax_cross_entropy"), path)
        head = trmfast.load(path)
        assert isinstance(head, ACTLossHead)
        loaded: Any = head.model
        assert loaded.config == model.config
    else:
        torch.save({f"_orig_mod.model.{key}": tensor for key, tensor in model.state_dict().items()}, path)
        untold = ("H_cycles", "L_cycles", "loops", "num_heads", "seq_len")
        loaded = trmfast.load(path, {key: CONFIG[key] for key in untold})
        for name in untold:
            with pytest.raises(
                ValueError, match=r"^config: got no (H_cycles|L_cycles|halt_max_steps|num_heads|seq_len)"
            ):
                trmfast.load(path, {key: CONFIG[key] for key in untold if key != name})
    assert type(loaded) is URM
    state = loaded.state_dict()
    assert all(t.dtype == state[k].dtype and torch.equal(t, state[k]) for k, t in model.state_dict().items())
    expected = run(model.eval())[0][0]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in run(loaded.eval())[0][0].items())
