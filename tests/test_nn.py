"""Modules: names and shapes of parameters, initialisation, tables, and the plain forward against the recursion."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from trmfast import BlockSpec, NetSpec, Problem, RecursionProgram, Update, recursion
from trmfast.cases import SMALL, Case, make_case
from trmfast.nn import (
    Attention,
    Block,
    CastedEmbedding,
    CastedLinear,
    ConvSwiGLU,
    Net,
    Recursion,
    RotaryEmbedding,
    trunc_normal_init_,
)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_parameters_are_those_of_the_spec(case: Case) -> None:
    for spec in case.problem.nets:
        net = Net(spec)
        named = dict(net.named_parameters())
        assert [(name, tuple(p.shape)) for name, p in named.items()] == list(spec.weight_shapes)
        assert all(weight is named[name] for weight, (name, _) in zip(net.weights(), spec.weight_shapes, strict=True))
        assert all(p.dtype == torch.float32 for p in named.values())
        assert list(net.state_dict()) == list(named)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_net_forward_is_one_update(case: Case, backend: str, need_support: Callable[[Case, torch.dtype], None]) -> None:
    need_support(case, torch.float32)
    net = Net(case.problem.nets[0])
    program = RecursionProgram(("z",), ("f",), (Update(0, (0,), False, 0, True),), 1)
    h = torch.randn(2, case.length, case.problem.hidden_size, generator=torch.Generator().manual_seed(0))
    dim = case.problem.rope_dim
    tables = RotaryEmbedding(dim, case.length, 1e4)() if case.rope and dim else None
    (fused,) = Recursion(program, [net], backend)([h], cos_sin=tables)
    torch.testing.assert_close(net(h, tables), fused, rtol=1e-4, atol=1e-4)
    by_parts = h
    for layer in net.layers:
        by_parts = layer(by_parts, tables)
    assert torch.equal(by_parts, net(h, tables))


def test_parts_add_up_to_a_block() -> None:
    spec = BlockSpec(16, 8, num_heads=2, channel_mixer="conv_swiglu")
    block = Block(spec)
    assert isinstance(block.self_attn, Attention)
    assert isinstance(block.mlp, ConvSwiGLU)
    h = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    tables = RotaryEmbedding(8, 5, 1e4)()
    mixed = torch.nn.functional.rms_norm(h + block.self_attn(h, tables), (16,), eps=1e-5)
    expected = torch.nn.functional.rms_norm(mixed + block.mlp(mixed), (16,), eps=1e-5)
    torch.testing.assert_close(block(h, tables), expected)


def test_truncated_normal() -> None:
    torch.manual_seed(0)
    values = trunc_normal_init_(torch.zeros(400_000), std=0.5)
    assert abs(values.std().item() - 0.5) < 2e-3
    assert abs(values.mean().item()) < 2e-3
    # A normal cut at two standard deviations keeps 0.8796 of its standard deviation.
    assert values.abs().max().item() == pytest.approx(2 * 0.5 / 0.87962566, rel=1e-3)
    assert not trunc_normal_init_(torch.ones(5), std=0).any()
    assert trunc_normal_init_(torch.zeros(1000, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_one_uniform_draw_an_element() -> None:
    """The draws of the published code: a seed gives the published weights, whatever was drawn after them."""
    torch.manual_seed(3)
    layer = CastedLinear(7, 5)
    after = torch.rand(())
    torch.manual_seed(3)
    edge = math.erf(math.sqrt(2))
    uniform = torch.empty(5, 7).uniform_(-edge, edge)
    expected = torch.erfinv(uniform) * math.sqrt(2) * (7**-0.5 / 0.87962566)
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(after, torch.rand(()))


def test_casted_modules_compute_in_the_dtype_of_their_input() -> None:
    layer = CastedLinear(4, 3, bias=True)
    out = layer(torch.ones(2, 4, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    assert layer.bias is not None
    assert not layer.bias.any()
    assert CastedLinear(4, 3).bias is None
    embedding = CastedEmbedding(10, 4, init_std=1.0, cast_to=torch.bfloat16)
    assert list(embedding.state_dict()) == ["embedding_weight"]
    ids = torch.tensor([[1, 2, 1]], dtype=torch.int32)
    assert torch.equal(embedding(ids), embedding.embedding_weight.bfloat16()[ids.long()])


def test_rotary_tables() -> None:
    rotary = RotaryEmbedding(8, 20, 1e4)
    cos, sin = rotary()
    assert cos.shape == sin.shape == (20, 8)
    assert cos.dtype == torch.float32
    assert not rotary.state_dict()
    for position in (0, 1, 19):
        for i in range(4):
            angle = position / 1e4 ** (2 * i / 8)
            assert cos[position, i].item() == pytest.approx(math.cos(angle), abs=1e-5)
            assert sin[position, i + 4].item() == pytest.approx(math.sin(angle), abs=1e-5)


def test_recursion_state_dict_and_defaults() -> None:
    case = make_case("hrm", "hrm", hidden_size=16, num_layers=1, intermediate_size=8)
    recursion = Recursion(case.problem.program, [Net(spec) for spec in case.problem.nets])
    assert recursion.backend == "auto"
    assert list(recursion.state_dict()) == [
        f"nets.{n}.{name}" for n in range(2) for name, _ in case.problem.nets[0].weight_shapes
    ]
    other = Recursion(case.problem.program, [Net(spec) for spec in case.problem.nets])
    other.load_state_dict(recursion.state_dict())


@pytest.mark.parametrize("count", [1, 3])
def test_recursion_with_the_wrong_number_of_networks(count: int) -> None:
    spec = NetSpec(BlockSpec(16, 8, num_heads=2), 1)
    with pytest.raises(ValueError, match=rf"^nets: got {count}, accepted are 2 \(f_H, f_L\)$"):
        Recursion(RecursionProgram.hrm(1, 1), [Net(spec) for _ in range(count)])


def test_a_program_of_another_shape_is_refused() -> None:
    spec = NetSpec(BlockSpec(16, 8, num_heads=2), 1)
    recursion = Recursion(RecursionProgram.trm(1, 1), [Net(spec)])
    states: list[Any] = [torch.zeros(1, 2, 16)] * 2
    with pytest.raises(ValueError, match=r"^nets: got 1, accepted are 2"):
        recursion(states, states[0], program=RecursionProgram.hrm(1, 1))
    assert Problem(RecursionProgram.trm(1, 1), (spec,)).num_weights == 4


def test_networks_that_are_no_list() -> None:
    spec = NetSpec(BlockSpec(16, 8, num_heads=2), 1)
    for wrong in (Net(spec), torch.nn.Sequential(Net(spec)), None):
        got = type(wrong).__name__
        with pytest.raises(TypeError, match=f"^nets: got {got}, accepted are lists and tuples of torch.nn.Module$"):
            Recursion(RecursionProgram.trm(1, 1), wrong)  # type: ignore[arg-type]
    nets: Any = torch.nn.ModuleList([Net(spec)])
    assert len(Recursion(RecursionProgram.trm(1, 1), nets).nets) == 1


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu", "mps", "mtia", "meta"])
def test_every_device_type_has_shapes(device: str) -> None:
    spec = BlockSpec(16, 8, num_heads=2)
    with torch.no_grad(), FakeTensorMode():
        weights = [torch.empty(shape, device=device) for _, shape in NetSpec(spec, 1).weight_shapes]
        z_H, z_L, x = (torch.empty(2, 5, 16, device=device) for _ in range(3))
        states = recursion(RecursionProgram.trm(1, 1), [NetSpec(spec, 1)], [z_H, z_L], x, weights)
        assert [(state.shape, state.device.type) for state in states] == [((2, 5, 16), device)] * 2
