"""accelerate() and restore(): models of every structure compute what they did, whatever PyTorch does to them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import trmfast
from dropin_cases import CASES, assert_close, fused_calls, inner_of, make, make_batch, same, states_of, step
from dropin_models import ACTLossHead
from trmfast.testing import Comparison, compare, default_weight_scale, pool, require

FAMILIES = ["trm", "trm-mlp_t", "trm_singlez", "trm_hier6", "hrm", "baseline", "urm", "nano-2d"]
FEW = {"trm", "trm-mlp_t", "hrm", "urm"}  # one of each kind of block, and two networks


# Models this small are slower on several threads.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---------------------------------------------------------------- the same numbers


@pytest.mark.representative(when=lambda name, dtype: name in FEW and (dtype == "float32" or name == "trm"))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_as_exact_as_the_model_itself(name: str, dtype: str) -> None:
    draws = []
    truth, accelerated = make(name, forward_dtype="float64"), trmfast.accelerate(make(name, forward_dtype=dtype))
    for seed in range(5):
        model = make(name, seed, default_weight_scale(getattr(torch, dtype)), forward_dtype=dtype)
        for other in (truth, accelerated):
            other.load_state_dict(model.state_dict())
        ours, eager, exact = (step(m, make_batch(name, seed)) for m in (accelerated, model, truth))
        draws.append(comparisons(ours, eager, exact))
    require(pool(draws))


def comparisons(ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> list[Comparison]:
    assert ours.keys() == eager.keys() == exact.keys()
    ours, eager, exact = (by_module(results) for results in (ours, eager, exact))
    found = []
    for key, value in ours.items():
        truth = exact[key].double()
        one = compare(key, value, eager[key], truth, is_gradient=key.startswith("grad"))
        if (
            exact[key].dtype == torch.float32
        ):  # what the model stores in float32 in every dtype: the truth is rounded too
            one = replace(one, rounding=one.rounding + torch.finfo(torch.float32).eps * truth.abs().max().item())
        found.append(one)
    return found


def by_module(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of one part of the model in one vector: the largest of three numbers says little."""
    grouped: dict[str, list[Tensor]] = {}
    for key, value in results.items():
        part = key.removeprefix("grad inner.").removeprefix("grad ").split(".")[0]
        grouped.setdefault(f"grad {part}" if key.startswith("grad") else key, []).append(value.flatten())
    return {key: torch.cat(values) for key, values in grouped.items()}


@pytest.mark.representative(when=lambda name: name in FAMILIES)
@pytest.mark.parametrize("name", CASES)
def test_float64_is_the_model_itself(name: str) -> None:
    model, batch = make(name, forward_dtype="float64"), make_batch(name)
    expected = step(model, batch, steps=2)
    trmfast.accelerate(model, backend="reference")
    for key, value in step(model, batch, steps=2).items():
        bound = 1e-12 if value.dtype == torch.float64 else 2e-6  # q and the gradients of float32 weights
        assert (value - expected[key]).abs().max() <= bound * expected[key].abs().max().clamp_min(1), key


@pytest.mark.representative(when=lambda name: name in FAMILIES)
@pytest.mark.parametrize("name", CASES)
def test_one_operator_takes_the_place_of_the_loop(name: str) -> None:
    model, batch = make(name), make_batch(name)
    assert fused_calls(model, batch) == 0
    trmfast.accelerate(model)
    assert fused_calls(model, batch) == 1
    trmfast.restore(model)
    assert fused_calls(model, batch) == 0


@pytest.mark.representative(when=lambda name: name in FEW)
@pytest.mark.parametrize("name", CASES)
def test_restore_leaves_nothing_behind(name: str) -> None:
    model, batch = make(name), make_batch(name)
    inner = inner_of(model)
    before, cls, attributes = step(model, batch, steps=3), type(inner), dict(inner.__dict__)
    keys, text = list(model.state_dict()), repr(model)
    ids = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    state = torch.get_rng_state()
    trmfast.accelerate(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(inner, cls)
    assert [id(tensor) for tensor in (*model.parameters(), *model.buffers())] == ids
    assert (list(model.state_dict()), repr(model)) == (keys, text)
    assert not same(step(model, batch, steps=3), before)  # a fused recursion rounds elsewhere
    assert trmfast.restore(model) is model
    assert type(inner) is cls
    assert inner.__dict__ == attributes
    assert same(step(model, batch, steps=3), before)
    assert trmfast.restore(model) is model


@pytest.mark.parametrize("name", ["trm", "hrm"])
def test_class_names_and_import_paths_do_not_matter(name: str) -> None:
    model, batch = make(name), make_batch(name)
    expected = step(model, batch)
    for module in model.modules():
        if type(module).__module__.startswith("dropin_models"):
            cls = type(module)
            renamed = {"__module__": "trm.models.architectures.trm", "__qualname__": f"X{cls.__name__}"}
            module.__class__ = type(f"X{cls.__name__}", (cls,), renamed)
    assert fused_calls(trmfast.accelerate(model), batch) == 1
    assert_close(step(model, batch), expected)


def test_cycles_follow_the_settings() -> None:
    model, batch = make("trm"), make_batch("trm")
    trmfast.accelerate(model)
    for H_cycles, L_cycles in ((1, 1), (3, 2)):
        model.config.H_cycles, model.config.L_cycles = H_cycles, L_cycles
        expected = step(make("trm", H_cycles=H_cycles, L_cycles=L_cycles), batch)
        assert_close(step(model, batch), expected)


def test_backends_and_arguments() -> None:
    model, batch = make("trm"), make_batch("trm")
    trmfast.accelerate(model, backend="reference")
    first = step(model, batch)
    trmfast.accelerate(model, backend="auto")  # a second call changes the backend
    assert not same(step(model, batch), first)
    trmfast.accelerate(model, backend="reference")
    assert same(step(model, batch), first)
    with pytest.raises(ValueError, match="backend: got 'quick', accepted are auto, cpu"):
        trmfast.accelerate(make("trm"), backend="quick")
    with pytest.raises(TypeError, match=r"model: got dict, accepted are torch\.nn\.Module"):
        trmfast.accelerate(cast(Any, {}))


@pytest.mark.skipif(trmfast.backends.BACKENDS["cpu"].available() is not None, reason="the CPU engine is not built")
def test_recompute() -> None:
    model, batch = make("trm"), make_batch("trm")
    found = []
    for recompute in (True, False, "1MB"):  # a later call changes it
        trmfast.accelerate(model, recompute=recompute)
        kept: list[int] = []

        def pack(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            if tensor.dtype == torch.uint8:
                kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found.append(step(model, batch))
        assert (sum(kept) > 0) is (recompute is not True)
    assert same(*found[:2])  # the engine gives the same bits in all ways
    assert same(*found[1:])
    with pytest.raises(TypeError, match=r"recompute: got 1\.5, accepted are True, False, a number of bytes or a size"):
        trmfast.accelerate(model, recompute=cast(Any, 1.5))


# ---------------------------------------------------------------- wrappers


@pytest.mark.usefixtures("_fresh_compiler")
def test_inside_a_loss_head_and_a_compiled_model() -> None:
    head = ACTLossHead(make("trm"))
    batch = make_batch("trm")
    expected = step(head.model, batch)
    assert trmfast.accelerate(head) is head
    assert_close(step(head.model, batch), expected)
    compiled: Any = torch.compile(ACTLossHead(make("trm")), backend="eager")
    assert trmfast.accelerate(compiled) is compiled
    assert fused_calls(compiled._orig_mod.model, batch) == 1
    averaged = torch.optim.swa_utils.AveragedModel(make("trm"))
    trmfast.accelerate(averaged)
    assert fused_calls(averaged.module, batch) == 1


@pytest.mark.breadth
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("name, when", [("trm", "before"), *((name, "after") for name in FAMILIES)])
def test_compiles_whole_with_its_loss(name: str, when: str) -> None:
    few = {"H_cycles": 1, "L_cycles": 1} if when == "before" else {}  # the plain loop is compiled update by update
    head, batch = ACTLossHead(make(name, **few)), make_batch(name)
    compiled: Any = torch.compile(head, backend="aot_eager", fullgraph=True)
    carry = head.initial_carry(batch)
    if when == "before":
        compiled(carry, batch)  # compiled code of the plain model, which has to give way
    trmfast.accelerate(compiled)
    results = []
    for run in (head, compiled):
        torch.manual_seed(0)
        head.zero_grad(set_to_none=True)
        new, loss, done = run(carry, batch)
        loss.backward()
        results.append((states_of(new), loss.detach(), done, [p.grad for p in head.parameters()]))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    trmfast.restore(compiled)
    if when == "before":
        torch.manual_seed(0)
        plain = head(carry, batch)[1]
        torch.manual_seed(0)
        assert torch.equal(compiled(carry, batch)[1], plain)


@pytest.mark.breadth
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_code_follows_the_settings() -> None:
    model, batch = make("trm"), make_batch("trm")
    trmfast.accelerate(model)
    carry = model.initial_carry(batch)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for L_cycles in (3, 1, 2):
        model.config.L_cycles = L_cycles
        assert torch.equal(compiled(carry, batch)[1]["logits"], model(carry, batch)[1]["logits"])


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_network_inside_is_seen_through() -> None:
    model, batch = make("trm"), make_batch("trm")
    expected = step(model, batch)
    model.inner.L_level = torch.compile(model.inner.L_level, backend="eager")
    trmfast.accelerate(model)
    assert fused_calls(model, batch) == 1
    got = step(model, batch)
    assert_close({key.replace("_orig_mod.", ""): value for key, value in got.items()}, expected)


# ---------------------------------------------------------------- copies and writes


def through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.representative(when=lambda name, copied: name == "trm" or (copied is copy.deepcopy and name in FEW))
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("name", FAMILIES)
def test_copies_follow_their_own_weights(name: str, copied: Any) -> None:
    model, batch = trmfast.accelerate(make(name)), make_batch(name)
    expected = step(model, batch)
    other = copied(model)
    assert fused_calls(other, batch) == 1
    assert same(step(other, batch), expected)
    with torch.no_grad():
        next(p for key, p in other.named_parameters() if ".layers." in key).mul_(1.5)
    assert not same(step(other, batch), expected)
    assert same(step(model, batch), expected)
    trmfast.restore(other)
    assert fused_calls(other, batch) == 0
    assert fused_calls(model, batch) == 1


@pytest.mark.representative(when=lambda name: name in FEW)
@pytest.mark.parametrize("name", FAMILIES)
def test_writes_to_the_weights_are_seen(name: str) -> None:
    batch, donor = make_batch(name), make(name, seed=7, scale=0.5)
    expected = step(donor, batch)

    def write(model: Any, how: str) -> None:
        if how == "p.data":
            for mine, theirs in zip(model.parameters(), donor.parameters(), strict=True):
                mine.data.copy_(theirs.data)
            for mine, theirs in zip(model.buffers(), donor.buffers(), strict=True):
                mine.data.copy_(theirs.data)
        else:
            model.load_state_dict(donor.state_dict(), assign=how == "assign")

    for how in ("p.data", "assign", "load"):
        model = trmfast.accelerate(make(name))
        step(model, batch)
        write(model, how)
        assert_close(step(model, batch), expected)


@pytest.mark.representative(when=lambda name, dtype: name == "trm" or (dtype == torch.bfloat16 and name in FEW))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", FAMILIES)
def test_model_to_dtype(name: str, dtype: torch.dtype) -> None:
    plain, batch = make(name, scale=0.5).eval().to(dtype), make_batch(name)
    accelerated = trmfast.accelerate(make(name, scale=0.5).eval()).to(dtype)
    exact = trmfast.accelerate(make(name, scale=0.5).eval(), backend="reference").to(dtype).double()
    ours, theirs, truth = (step(m, batch) for m in (accelerated, plain, exact))
    if name != "urm":  # whose convolution would no longer be in the forward dtype
        assert fused_calls(trmfast.accelerate(plain), batch) == 1
    for key in (*states_of(plain.initial_carry(batch)), "heads"):
        assert ours[key].dtype == theirs[key].dtype
        error, allowed = ((r[key].double() - truth[key].double()).norm() for r in (ours, theirs))
        assert error <= 2 * allowed + 1e-6 * truth[key].double().norm(), key


def test_functional_call_uses_the_given_weights() -> None:
    model, batch = trmfast.accelerate(make("trm")), make_batch("trm")
    donor = make("trm", seed=7)
    carry = model.initial_carry(batch)
    weights = {key: value.detach().requires_grad_() for key, value in donor.named_parameters()}
    _, outputs = torch.func.functional_call(model, weights | dict(donor.named_buffers()), (carry, batch))
    torch.testing.assert_close(outputs["logits"], donor(carry, batch)[1]["logits"], rtol=1e-3, atol=1e-4)
    outputs["logits"].sum().backward()
    assert weights["inner.L_level.layers.0.mlp.down_proj.weight"].grad is not None
    assert all(p.grad is None for p in model.parameters())


def test_autocast_keeps_the_dtype_of_the_carry() -> None:
    model, batch = make("trm", scale=0.5), make_batch("trm")
    # PyTorch 2.6 remembers a cast that it made under no_grad and gives it to operations that want a gradient.
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = step(model, batch)
    trmfast.accelerate(model)
    with torch.autocast("cpu", torch.bfloat16):
        got = step(model, batch)
    assert got.keys() == expected.keys()
    for key, value in got.items():
        assert value.dtype == expected[key].dtype, key
        assert (value - expected[key]).norm() <= 0.1 * expected[key].norm(), key
