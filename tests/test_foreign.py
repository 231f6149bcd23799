"""The models of tiny-recursive-model and hrm-pytorch, recomputed: results, gradients, memory, copies."""

from __future__ import annotations

import copy
import io
import pickle
import random
from typing import Any

import pytest
import torch
from tiny_recursive_model import TinyRecursiveModel
from torch import Tensor, nn

import trmfast
from foreign_cases import (
    DIM,
    LENGTH,
    MODELS,
    TOKENS,
    gradients,
    make,
    mixer,
    network,
    outputs,
    puzzle,
    same,
    saved_bytes,
    step,
    swap,
)
from trmfast import RecursionProgram, foreign
from trmfast.nn import Recursion
from trmfast.testing import compare, require

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", MODELS)
def test_packages_outputs_gradients_and_memory(name: str) -> None:
    """Bitwise the same outputs, loss and gradients, from a fraction of the memory; undone bitwise."""
    plain, model = make(name), make(name)
    keys = list(model.state_dict())
    before = outputs(plain)
    much = saved_bytes(plain, lambda: step(plain))
    grads = gradients(plain)
    assert any(g is not None and g.any() for g in grads.values())
    swap(model)
    assert list(model.state_dict()) == keys
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), before, strict=True))
    assert saved_bytes(model, lambda: step(model)) < much / 4
    assert torch.equal(step(model), step(plain))
    assert same(gradients(model), grads)
    assert foreign.undo(model) == len(foreign.recognise(model).parts)  # type: ignore[union-attr]
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert saved_bytes(model, lambda: step(model)) == much
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), before, strict=True))
    assert foreign.undo(model) == 0


@pytest.mark.parametrize("name", ["trm-mixer", "hrm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packages_within_the_tolerance_policy(name: str, dtype: torch.dtype) -> None:
    """Against the same model in float64, the swapped model loses no more than the policy allows."""
    truth = make(name).double()
    truth_loss = step(truth).detach()
    truth_grads = gradients(truth)
    losses, grads = {}, {}
    for kind in ("eager", "fused"):
        model = make(name).to(dtype)
        model.load_state_dict({k: v.to(dtype) for k, v in truth.state_dict().items()})
        if kind == "fused":
            swap(model)
        losses[kind] = step(model).detach()
        grads[kind] = gradients(model)
    relative = (loss / truth_loss for loss in losses.values())  # the loss is a sum over rows, the policy wants order 1
    eager, fused = (value.to(dtype) for value in relative)
    found = [compare("loss", fused, eager, torch.ones_like(truth_loss))]
    for key, t in truth_grads.items():
        e, f = grads["eager"][key], grads["fused"][key]
        if t is None or e is None or f is None:
            assert t is e is f is None, key
        elif (
            not t.numel() or t.abs().max() < 1e-12
        ):  # a bias that the next norm takes away: zero but for rounding, which has no scale
            assert torch.equal(e, f)
        elif dtype == torch.float32 or key.startswith("to_"):
            found.append(compare(key, f, e, t, is_gradient=True))
    require(found)


@pytest.mark.breadth
@pytest.mark.parametrize("name", ["trm-mixer", "trm-dense", "hrm", "hrm-act"])
def test_thirty_training_steps(name: str) -> None:
    """Deep supervision with carried states and AdamW: the same losses, step for step."""

    def train(model: nn.Module) -> list[float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        states: Any = None
        for i in range(30):
            if i % 3 == 0:  # a new puzzle, carried over three steps
                seq, labels = puzzle(i)
                states = model.get_initial() if hasattr(model, "get_initial") else None  # type: ignore[operator]
            random.seed(i)
            if hasattr(model, "get_initial"):
                loss, _, *states = model(seq, *states, labels=labels)
                states = states[:2]
            else:
                loss, states, *_ = model(seq, states, labels=labels)
                states = tuple(states)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    plain = train(make(name))
    assert len(set(plain)) == 30
    assert train(swap(make(name))) == plain


@pytest.mark.representative(when=lambda name: name == "hrm")
@pytest.mark.parametrize("name", ["trm-encoder", "hrm"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "assign", "p.data", "twice"])
def test_what_a_drop_in_survives(name: str, how: str) -> None:
    """The copy is as swapped as the original, computes with its own parameters, and can be undone alone."""
    plain, model = make(name), swap(make(name))
    copied = model
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    elif how == "twice":
        swap(model)
    with torch.no_grad():
        values = {key: value * 0.9 for key, value in plain.state_dict().items()}
    plain.load_state_dict(values)
    if how == "p.data":
        for key, parameter in copied.named_parameters():
            parameter.data = values[key].clone()
        for key, buffer in copied.named_buffers():
            if key in values:
                buffer.copy_(values[key])
    else:
        copied.load_state_dict({key: value.clone() for key, value in values.items()}, assign=how == "assign")
    if how in ("deepcopy", "pickle", "torch.save"):
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
    assert torch.equal(step(copied), step(plain))
    assert same(gradients(copied), gradients(plain))
    assert saved_bytes(copied, lambda: step(copied)) < saved_bytes(plain, lambda: step(plain)) / 4
    assert foreign.undo(copied) > 0
    assert saved_bytes(copied, lambda: step(copied)) == saved_bytes(plain, lambda: step(plain))
    assert torch.equal(step(copied), step(plain))


def test_a_forward_of_the_instance_is_recomputed_and_given_back() -> None:
    net, x = network(), torch.randn(2, DIM)

    def own(h: Tensor) -> Tensor:
        out: Tensor = type(net).forward(net, h)
        return out * 2

    net.forward = own
    wanted = net(x)
    assert foreign.recompute(foreign.recompute(net)) is net  # the second call changes nothing
    assert torch.equal(net(x), wanted)
    assert saved_bytes(net, lambda: net(x)) < 64 + x.nbytes
    assert foreign.undo(net) == 1
    assert net.__dict__["forward"] is own


def test_dropout_draws_the_same_again() -> None:
    grads = []
    for swapped in (False, True):
        torch.manual_seed(0)
        model = TinyRecursiveModel(dim=DIM, num_tokens=TOKENS, network=mixer(dropout=0.3))
        grads.append(gradients(swap(model) if swapped else model))
    assert same(*grads)


def test_autocast() -> None:
    plain, model = make("trm-mixer"), swap(make("trm-mixer"))
    with torch.autocast("cpu", torch.bfloat16):
        losses = [step(plain), step(model)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    assert same(*({k: p.grad for k, p in m.named_parameters()} for m in (plain, model)))


def test_recognised_inside_wrappers() -> None:
    model = make("trm-mixer")
    wrapped = nn.ModuleDict({"ema": torch.compile(model, backend="eager")})  # type: ignore[dict-item]
    found = foreign.recognise(wrapped)
    assert found is not None
    assert found.owner is model
    assert (found.kind, found.name, list(found.parts)) == ("TinyRecursiveModel", "ema._orig_mod", ["network"])
    for other in (nn.Linear(2, 2), network(), Recursion(RecursionProgram.trm(1, 1), [network()])):
        assert foreign.recognise(other) is None


@pytest.mark.parametrize("name", MODELS)
def test_accelerate_and_restore(name: str) -> None:
    """The one call, and back."""
    plain, model = make(name), make(name)
    assert trmfast.accelerate(model) is model
    assert trmfast.accelerate(model) is model
    assert same(gradients(model), gradients(plain))
    assert saved_bytes(model, lambda: step(model)) < saved_bytes(plain, lambda: step(plain)) / 4
    copied = trmfast.restore(copy.deepcopy(model))
    assert not any("forward" in module.__dict__ for module in copied.modules())
    assert saved_bytes(model, lambda: step(model)) < saved_bytes(copied, lambda: step(copied)) / 4
    assert trmfast.restore(model) is model
    assert torch.equal(step(model), step(plain))


def test_accelerate_refuses() -> None:
    model = make("trm-mixer")
    with pytest.raises(ValueError, match=r"^backend: got 'cpu', accepted is 'auto', the networks are TinyRecursive"):
        trmfast.accelerate(model, backend="cpu")
    with pytest.raises(ValueError, match=r"^recompute: got False, accepted is True, which is all that is done for"):
        trmfast.accelerate(model, recompute=False)
    both = nn.ModuleDict({"model": model, "ema": copy.deepcopy(model)})
    with pytest.raises(trmfast.UnsupportedModelError, match="several modules hold a recursion: model, ema; accelerate"):
        trmfast.accelerate(both)
    model.network = nn.Sequential(network(), nn.BatchNorm1d(LENGTH))
    with pytest.raises(trmfast.UnsupportedModelError, match="network: BatchNorm1d at 1 keeps running statistics"):
        trmfast.accelerate(model)
    assert foreign.undo(both) == 0


@pytest.mark.breadth
def test_compiled() -> None:
    torch.manual_seed(0)
    sizes = {"num_refinement_blocks": 2, "num_latent_refinements": 1}
    plain = TinyRecursiveModel(dim=DIM, num_tokens=TOKENS, network=network(), **sizes)
    model = torch.compile(swap(copy.deepcopy(plain)), backend="aot_eager")
    assert isinstance(model, nn.Module)
    torch.testing.assert_close(step(model), step(plain))
    found, wanted = gradients(model), gradients(plain)
    for name, grad in wanted.items():
        torch.testing.assert_close(found[f"_orig_mod.{name}"], grad, msg=name)
    torch.compiler.reset()


@pytest.mark.parametrize(
    "layer, reason",
    [
        (nn.BatchNorm1d(LENGTH), "BatchNorm1d at 1 keeps running statistics"),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(DIM, DIM)), "spectral norm at 1.parametrizations.weight.0"),
        (nn.utils.spectral_norm(nn.Linear(DIM, DIM)), "spectral norm at 1 keeps"),
    ],
    ids=["batch-norm", "spectral", "old-spectral"],
)
def test_networks_that_count_their_calls_are_refused(layer: nn.Module, reason: str) -> None:
    net = nn.Sequential(nn.Linear(DIM, DIM), layer)
    model = TinyRecursiveModel(dim=DIM, num_tokens=TOKENS, network=net)
    found = foreign.recognise(model)
    assert found is not None
    assert [line.startswith(f"network: {reason}") for line in found.refusals()] == [True]
    with pytest.raises(ValueError, match=f"^network: {reason}"):
        found.swap()
    assert foreign.undo(model) == 0
    with pytest.raises(ValueError, match=f"^module: {reason}"):
        foreign.recompute(net)
    with pytest.raises(ValueError, match=rf"^nets\[0\]: {reason}.*accepted with recompute=False$"):
        Recursion(RecursionProgram.trm(1, 1), [net])
    Recursion(RecursionProgram.trm(1, 1), [net], recompute=False)
