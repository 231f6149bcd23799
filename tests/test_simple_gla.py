"""Simple gated linear attention: its parallel form against the recurrence, and what is its own on the CPU engine.

Its options, targets, bits and NaN are in the tests that every token mixer shares.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trmfast import recursion
from trmfast.backends import BACKENDS
from trmfast.backends import cpu as engine
from trmfast.cases import Case, Inputs, make_case, make_inputs
from trmfast.nn import Block, Net, Recursion
from trmfast.program import RecursionProgram
from trmfast.reference import simple_gla
from trmfast.testing import Draw, check_draws, draw_case, require, run_eager, run_fused, run_truth

no_engine = BACKENDS["cpu"].available()
needs_engine = pytest.mark.skipif(no_engine is not None, reason=f"backend cpu: {no_engine}")
pytestmark = pytest.mark.usefixtures("one_thread")

SIZES: dict[str, Any] = {
    "token_mixer": "simple_gla", "causal": True, "H_cycles": 1, "L_cycles": 1, "num_layers": 1,
    "intermediate_size": 32,
}  # fmt: skip


def gla_case(name: str, model: str = "urm", **options: Any) -> Case:
    return make_case(name, model, window="all", **SIZES, **options)


def drawn(length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and v [2, 3, L, 4], and logarithms of decays [2, 3, L] of which some are next to 0 and some strong."""
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, 3, length, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    logits = 4 * torch.randn(2, 3, length, generator=generator, dtype=torch.float64)
    return q, k, v, torch.nn.functional.logsigmoid(logits)


def recurrence(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, starts: Tensor) -> Tensor:
    """Token by token: the state [d, d] of every head decays, takes k^T v in, and is read by q."""
    state = torch.zeros(*q.shape[:2], q.shape[-1], v.shape[-1], dtype=q.dtype)
    outputs = []
    for t in range(q.shape[2]):
        kept = log_decay[..., t].exp() * (starts[:, t] != t)[:, None]
        state = kept[..., None, None] * state + k[..., t, :, None] * v[..., t, None, :]
        outputs.append(torch.einsum("bhd,bhde->bhe", q[..., t, :], state) / math.sqrt(q.shape[-1]))
    return torch.stack(outputs, dim=2)


@pytest.mark.parametrize("length", [1, 2, 7, 64])
def test_the_parallel_form_is_the_recurrence(length: int) -> None:
    tensors = drawn(length)
    whole = torch.zeros(2, length, dtype=torch.int64)
    torch.testing.assert_close(simple_gla(*tensors), recurrence(*tensors, whole), rtol=1e-12, atol=1e-12)
    position = torch.arange(length)
    starts = torch.stack((position // 3 * 3, (position >= 2) * 2))  # sequences of three tokens; two, then the others
    torch.testing.assert_close(simple_gla(*tensors, starts), recurrence(*tensors, starts), rtol=1e-12, atol=1e-12)


def test_gradients_of_the_parallel_form() -> None:
    leaves = [tensor.requires_grad_() for tensor in drawn(6)]
    starts = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 2, 2, 2, 2]])
    assert torch.autograd.gradcheck(simple_gla, (*leaves, starts))


def test_a_decay_that_forgets_all_overflows_nothing() -> None:
    """What a key behind the query would count for is beyond float64, and is not computed."""
    q, k, v, _ = drawn(5)
    log_decay = torch.full((2, 3, 5), -1e4, dtype=torch.float64).requires_grad_()
    out = simple_gla(q, k, v, log_decay)
    torch.testing.assert_close(out.detach(), (q * k).sum(-1, keepdim=True) / 2 * v)
    (gradient,) = torch.autograd.grad(out.sum(), log_decay)
    assert not gradient.any()


def test_parameters() -> None:
    """The rows of in_proj are the gate's, the decays', then queries, keys and values; decays begin without a bias."""
    case = gla_case("names", hidden_size=32, num_heads=4, num_kv_heads=2, gate="channel", qk_norm="learned")
    (spec,) = case.problem.nets
    assert spec.block.weight_shapes == {
        "simple_gla.in_proj.weight": (32 + 4 + 32 + 2 * 16, 32),
        "simple_gla.o_proj.weight": (32, 32),
        "mlp.gate_up_proj.weight": (64, 32),
        "mlp.down_proj.weight": (32, 32),
        "simple_gla.decay_bias": (4,),
        "simple_gla.q_norm.weight": (8,),
        "simple_gla.k_norm.weight": (8,),
    }
    net, twin = Net(spec), Net(spec)
    block = net.layers[0]
    assert isinstance(block, Block)
    assert not block.simple_gla.decay_bias.any()
    twin.load_state_dict(net.state_dict())
    h = torch.randn(2, 5, 32)
    assert torch.equal(net(h), twin(h))
    torch.testing.assert_close(net(h), Recursion(RecursionProgram.looped(1), [net], "reference")([h])[0])
    assert block.simple_gla(h).shape == h.shape


def test_packed_sequences_are_sequences() -> None:
    """A row of two sequences gives what each gives by itself: the state begins anew."""
    case = gla_case("packed", batch=1, length=9, segments=True, rope=False)
    inputs = make_inputs(case, torch.float64)
    weights = [weight.double() for weight in inputs.weights]
    program, nets = case.problem.program, case.problem.nets
    x = inputs.x
    assert x is not None

    def run(rows: slice, segments: Tensor) -> Tensor:
        states = [state[:, rows] for state in inputs.states]
        return recursion(program, nets, states, x[:, rows], weights, None, None, "reference", segments=segments)[0]

    packed = run(slice(None), torch.tensor([[[0, 0]] * 4 + [[4, 5]] * 5]))
    for rows in (slice(0, 4), slice(4, 9)):
        alone = run(rows, torch.zeros(1, rows.stop - rows.start, 2, dtype=torch.int64))
        torch.testing.assert_close(packed[:, rows], alone)


# ---------------------------------------------------------------- CPU engine


def with_bias(inputs: Inputs, bias: float | None) -> Inputs:
    """All biases of decays at a value; None: far apart, strong ones between weak ones."""
    changed = [
        weight if not name.endswith("decay_bias")
        else torch.tensor([-1e3, 40.0, -60.0, 0.0])[: len(weight)] if bias is None
        else torch.full_like(weight, bias)
        for name, weight in zip(inputs.problem.weight_names, inputs.weights, strict=True)
    ]  # fmt: skip
    return replace(inputs, weights=tuple(changed))


# The strongest decays leave a token alone with itself: the gradients of decays are 0, or far below other roundings.
@needs_engine
@pytest.mark.parametrize("target", [name for name, reason in engine.targets().items() if reason is None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [-60.0, -6.0, 8.0, None], ids=str)
def test_strong_and_weak_decays(bias: float | None, dtype: torch.dtype, target: str) -> None:
    """Where decays within a tile of rows are far below 1, and where c grows over many tokens."""
    case = gla_case("decays", hidden_size=32, num_heads=4, num_kv_heads=2, length=70)
    draws = []
    for seed in range(3):
        inputs = with_bias(make_inputs(case, dtype, seed, weight_scale=0.5), bias)
        draws.append(Draw(inputs, run_eager(inputs), run_truth(inputs)))
    with engine.force_target(target):
        if engine.target_for(dtype) != target:
            pytest.skip(f"{target} has no products of {dtype}")
        require(check_draws(draws, "cpu"))


@needs_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"length": 333, "batch": 1},
        {"length": 1},
        {"length": 200, "segments": True, "hidden_size": 32},
        {"length": 33, "num_heads": 5, "head_dim": 6, "hidden_size": 30, "qk_bias": True},
        {"length": 130, "num_heads": 40, "num_kv_heads": 8, "head_dim": 2, "hidden_size": 24, "gate": "head"},
    ],
    ids=str,
)
def test_sizes(options: dict[str, Any], dtype: torch.dtype) -> None:
    require(check_draws(draw_case(gla_case("sizes", **options), dtype, seeds=range(3)), "cpu"))


@needs_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_later_tokens_change_nothing(dtype: torch.dtype) -> None:
    """Outputs do not depend on later tokens, nor gradients of later tokens on earlier outputs."""
    inputs = make_inputs(gla_case("causal", length=67, hidden_size=32), dtype, weight_scale=0.5)
    cut = 35
    states, grads = (tuple(t.clone() for t in group) for group in (inputs.states, inputs.grad_states))
    for tensor in states:
        tensor[:, cut:] += 1
    changed = run_fused(replace(inputs, states=states), "cpu")
    plain = run_fused(inputs, "cpu")
    for name, out in plain.outputs.items():
        assert torch.equal(changed.outputs[name][:, :cut], out[:, :cut])
        assert not torch.equal(changed.outputs[name], out)
    for tensor in grads:
        tensor[:, cut:] = 0
    gradients = run_fused(replace(inputs, grad_states=grads), "cpu").gradients
    for name in ("grad x", *(f"grad {state}" for state in plain.outputs)):
        assert not gradients[name][:, cut:].any()


@needs_engine
def test_no_sequences() -> None:
    inputs = make_inputs(gla_case("none", batch=0, norm_placement="pre", final_norm=True))
    for result in (run_eager(inputs), run_fused(inputs, "cpu")):
        assert all(z.shape == (0, 12, 64) for z in result.outputs.values())
        assert not any(gradient.any() for gradient in result.gradients.values())


@needs_engine
def test_int8_refuses_it() -> None:
    problem, cpu = gla_case("int8").problem, BACKENDS["cpu"]
    device = torch.device("cpu")
    assert cpu.supports(problem, device, torch.bfloat16, 1, 8) is None
    reason = "it runs networks with token_mixer attention or mlp_t, not simple_gla"
    assert cpu.supports(problem, device, torch.int8, 1, 8) == reason
