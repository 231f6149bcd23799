"""The reference against code written independently of it: loops over heads, positions and taps at tiny sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from trmfast import BlockSpec, NetSpec, Problem
from trmfast.cases import SMALL, Case, Inputs, make_case, make_inputs, rope_tables
from trmfast.reference import attention, conv_swiglu, rms_norm, rotate, run_block, run_net, run_program, swiglu

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_exact(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- naive pieces


def naive_norm(row: Tensor, eps: float) -> Tensor:
    return row / math.sqrt(sum(v * v for v in row.tolist()) / len(row) + eps)


def naive_silu(value: Tensor) -> Tensor:
    return value / (1 + torch.exp(-value))


def naive_swiglu(row: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    inner = gate_up.shape[0] // 2
    return down @ (naive_silu(gate_up[:inner] @ row) * (gate_up[inner:] @ row))


def naive_rotate(row: Tensor, position: int, base: float = 1e4) -> Tensor:
    """Pairs (i, i + d/2) as complex numbers, turned by position / base^(2i/d)."""
    half = len(row) // 2
    turned = [
        complex(row[i].item(), row[i + half].item()) * torch.polar(torch.tensor(1.0, dtype=torch.float64), angle).item()
        for i in range(half)
        for angle in [torch.tensor(position / base ** (2 * i / len(row)), dtype=torch.float64)]
    ]
    return torch.tensor([t.real for t in turned] + [t.imag for t in turned], dtype=torch.float64)


def naive_attention(h: Tensor, block: BlockSpec, qkv: Tensor, out: Tensor, rope: bool) -> Tensor:
    """h: [L, D] of one sequence."""
    length, d = h.shape[0], block.head_dim
    heads, kv_heads = block.num_heads, block.num_kv_heads

    def head(position: int, index: int, rotated: bool) -> Tensor:
        row = qkv[index * d : (index + 1) * d] @ h[position]
        return naive_rotate(row, position) if rotated and rope else row

    mixed = torch.zeros(length, heads * d, dtype=torch.float64)
    for n in range(heads):
        group = n // (heads // kv_heads)
        for i in range(length):
            seen = range(i + 1) if block.causal else range(length)
            q = head(i, n, True)
            scores = [math.exp((q @ head(j, heads + group, True)).item() / math.sqrt(d)) for j in seen]
            for score, j in zip(scores, seen, strict=True):
                mixed[i, n * d : (n + 1) * d] += score / sum(scores) * head(j, heads + kv_heads + group, False)
    return mixed @ out.T


def naive_block(h: Tensor, block: BlockSpec, weights: list[Tensor], rope: bool) -> Tensor:
    """h: [L, D] of one sequence."""
    length, width = h.shape
    first, second, *rest = weights
    if block.token_mixer == "attention":
        h = h + naive_attention(h, block, first, second, rope)
        h = torch.stack([naive_norm(h[i], block.rms_norm_eps) for i in range(length)])
    else:
        columns = [h[:, c] + naive_swiglu(h[:, c], first, second) for c in range(width)]
        h = torch.stack([naive_norm(column, block.rms_norm_eps) for column in columns], dim=1)
    if block.channel_mixer == "swiglu":
        mixed = torch.stack([naive_swiglu(h[i], *rest) for i in range(length)])
    else:
        gate_up, conv, bias, down = rest
        inner, taps = conv.shape[0], conv.shape[-1]
        rows = [naive_silu(gate_up[:inner] @ h[i]) * (gate_up[inner:] @ h[i]) for i in range(length)]
        mixed = torch.zeros(length, width, dtype=torch.float64)
        for i in range(length):
            total = bias.clone()
            for tap in range(taps):
                j = i + tap - taps // 2
                if 0 <= j < length:
                    total += conv[:, 0, tap] * rows[j]
            mixed[i] = down @ naive_silu(total)
    return torch.stack([naive_norm(row, block.rms_norm_eps) for row in h + mixed])


BLOCKS = {
    "attention": BlockSpec(8, 6, num_heads=2),
    "causal": BlockSpec(8, 6, num_heads=2, causal=True),
    "grouped": BlockSpec(8, 6, num_heads=4, num_kv_heads=2),
    "one kv head": BlockSpec(8, 6, num_heads=4, num_kv_heads=1),
    "narrow heads": BlockSpec(8, 6, num_heads=3, head_dim=2),
    "mlp_t": BlockSpec(8, 6, token_mixer="mlp_t", seq_len=5, seq_intermediate_size=7),
    "conv 2": BlockSpec(8, 6, channel_mixer="conv_swiglu", num_heads=2),
    "conv 3": BlockSpec(8, 6, channel_mixer="conv_swiglu", num_heads=2, conv_kernel=3),
    "conv 4": BlockSpec(8, 6, channel_mixer="conv_swiglu", num_heads=2, conv_kernel=4),
    "mlp_t conv": BlockSpec(
        8, 6, token_mixer="mlp_t", channel_mixer="conv_swiglu", seq_len=5, seq_intermediate_size=7, rms_norm_eps=1e-2
    ),
}


@pytest.mark.parametrize("rope", [True, False], ids=["rope", "no-rope"])
@pytest.mark.parametrize("name", BLOCKS)
def test_block(name: str, rope: bool) -> None:
    block = BLOCKS[name]
    if rope and block.token_mixer != "attention":
        rope = False
    weights = [randn(*shape, seed=i) for i, shape in enumerate(block.weight_shapes.values(), 1)]
    h = randn(2, 5, 8)
    # Tables in float64, as the naive rotation has them.
    angles = torch.outer(
        torch.arange(6, dtype=torch.float64),
        1e4 ** -(torch.arange(0, max(block.head_dim, 2), 2, dtype=torch.float64) / max(block.head_dim, 2)),
    ).repeat(1, 2)
    cos, sin = (angles.cos(), angles.sin()) if rope else (None, None)
    expected = torch.stack([naive_block(sequence, block, weights, rope) for sequence in h])
    assert_exact(run_block(block, h, weights, cos, sin), expected)


def test_the_norm_of_mlp_t_runs_over_the_sequence() -> None:
    block = BLOCKS["mlp_t"]
    weights = [torch.zeros(shape, dtype=torch.float64) for shape in block.weight_shapes.values()]
    h = randn(1, 5, 8)
    over_sequence = h / (h.square().mean(1, keepdim=True) + 1e-5).sqrt()
    expected = over_sequence / (over_sequence.square().mean(2, keepdim=True) + 1e-5).sqrt()
    assert_exact(run_block(block, h, weights, None, None), expected)


def test_pieces_have_the_documented_layouts() -> None:
    h = randn(2, 3, 4)
    assert_exact(rms_norm(h, 1e-5), torch.nn.functional.rms_norm(h, (4,), eps=1e-5))
    gate_up, down = randn(6, 4, seed=1), randn(4, 3, seed=2)
    gate, up = h @ gate_up[:3].T, h @ gate_up[3:].T
    assert_exact(swiglu(h, gate_up, down), (torch.nn.functional.silu(gate) * up) @ down.T)
    # One tap of one and no bias leaves only the second SiLU.
    inner = torch.nn.functional.silu(torch.nn.functional.silu(gate) * up)
    ones, zeros = torch.ones(3, 1, 1).double(), torch.zeros(3).double()
    assert_exact(conv_swiglu(h, gate_up, ones, zeros, down), inner @ down.T)
    # Rotation keeps lengths, and position 0 as it is.
    cos, sin = rope_tables(7, 4)
    q = randn(2, 3, 2, 4)
    torch.testing.assert_close(rotate(q, cos, sin).norm(dim=-1), q.norm(dim=-1), rtol=0, atol=1e-6)
    assert_exact(rotate(q, cos, sin)[:, 0], q[:, 0])


def test_bfloat16_attention_accumulates_in_float32() -> None:
    block = BlockSpec(64, 8, num_heads=2)
    h = randn(1, 300, 64).to(torch.bfloat16)
    qkv, out = randn(192, 64, seed=1) / 8, randn(64, 64, seed=2) / 8
    exact = attention(block, h.double(), qkv.to(torch.bfloat16).double(), out.to(torch.bfloat16).double(), None, None)
    error = (attention(block, h, qkv, out, None, None) - exact).abs().max()
    assert error < 0.02


# ---------------------------------------------------------------- programs, written out as the models' loops


def loop_trm(f: list[Callable[[Tensor], Tensor]], states: list[Tensor], x: Tensor, H: int, L: int) -> list[Tensor]:
    z_H, z_L = states
    high, low = f[0], f[-1]
    with torch.no_grad():
        for _ in range(H - 1):
            for _ in range(L):
                z_L = low(z_L + (z_H + x))
            z_H = high(z_H + z_L)
    for _ in range(L):
        z_L = low(z_L + (z_H + x))
    return [high(z_H + z_L), z_L]


def loop_hrm(f: list[Callable[[Tensor], Tensor]], states: list[Tensor], x: Tensor, H: int, L: int) -> list[Tensor]:
    z_H, z_L = states
    with torch.no_grad():
        for h in range(H):
            for step in range(L):
                if not (h == H - 1 and step == L - 1):
                    z_L = f[1](z_L + (z_H + x))
            if h != H - 1:
                z_H = f[0](z_H + z_L)
    z_L = f[1](z_L + (z_H + x))
    return [f[0](z_H + z_L), z_L]


def loop_single_z(f: list[Callable[[Tensor], Tensor]], states: list[Tensor], x: Tensor, H: int, L: int) -> list[Tensor]:
    (z,) = states
    for h in range(H):
        with torch.set_grad_enabled(h == H - 1):
            for _ in range(L):
                z = f[0](z + x)
            z = f[0](z)
    return [z]


def loop_hier6(f: list[Callable[[Tensor], Tensor]], states: list[Tensor], x: Tensor, H: int, L: int) -> list[Tensor]:
    z_H, *lows = states
    for h in range(H):
        with torch.set_grad_enabled(h == H - 1):
            for k in range(L):
                lows[k] = f[0](torch.stack(lows).sum(0) + z_H + x)
            z_H = f[0](z_H + torch.stack(lows).sum(0))
    return [z_H, *lows]


def loop_urm(f: list[Callable[[Tensor], Tensor]], states: list[Tensor], x: Tensor, H: int, L: int) -> list[Tensor]:
    (z,) = states
    for h in range(H):
        with torch.set_grad_enabled(h == H - 1):
            for _ in range(L):
                z = f[0](z + x)
    return [z]


def nets_of(inputs: Inputs, weights: Sequence[Tensor]) -> list[Callable[[Tensor], Tensor]]:
    problem = inputs.problem

    def apply(index: int, h: Tensor) -> Tensor:
        return run_net(problem.nets[index], h, problem.net_weights(weights, index), inputs.cos, inputs.sin)

    return [partial(apply, index) for index in range(len(problem.nets))]


LOOPS = {"trm": loop_trm, "hrm": loop_hrm, "single_z": loop_single_z, "hier6": loop_hier6, "urm": loop_urm}


def loop_case(model: str, H: int, L: int, length: int = 4) -> Case:
    return make_case(
        model,
        model,
        H_cycles=H,
        L_cycles=L,
        window="one_step" if model == "hrm" else "last_cycle",
        length=length,
        hidden_size=8,
        intermediate_size=6,
        num_layers=1,
    )


@pytest.mark.parametrize("cycles", [(1, 1), (2, 3), (3, 2)], ids=str)
@pytest.mark.parametrize("model", LOOPS)
def test_program_and_its_gradients(model: str, cycles: tuple[int, int]) -> None:
    case = loop_case(model, *cycles)
    problem = case.problem
    inputs = make_inputs(case, torch.float64)
    results = []
    for run in ("program", "loop"):
        states = [state.clone().requires_grad_() for state in inputs.states]
        assert inputs.x is not None
        x = inputs.x.clone().requires_grad_()
        weights = [weight.double().requires_grad_() for weight in inputs.weights]
        if run == "program":
            out = list(run_program(problem, states, x, weights, inputs.cos, inputs.sin))
        else:
            nets = nets_of(inputs, weights)
            out = LOOPS[model](nets, states, x, *cycles)
        pairs = [(o, g) for o, g in zip(out, inputs.grad_states, strict=True) if o.requires_grad]
        roots, grads = zip(*pairs, strict=True)
        found = torch.autograd.grad(roots, [*states, x, *weights], grads, materialize_grads=True)
        results.append([o.detach() for o in out] + list(found))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model", ["trm", "hrm", "single_z", "urm"])
def test_bfloat16_rounds_where_the_models_round(model: str) -> None:
    case = loop_case(model, 2, 2)
    problem, inputs = case.problem, make_inputs(case, torch.bfloat16)
    assert inputs.x is not None
    nets = nets_of(inputs, inputs.weights)
    expected = LOOPS[model](nets, list(inputs.states), inputs.x, 2, 2)
    for ours, theirs in zip(
        run_program(problem, inputs.states, inputs.x, inputs.weights, inputs.cos, inputs.sin), expected, strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_no_gradient_outside_the_window(case: Case) -> None:
    problem = Problem(case.problem.program.with_window("none"), case.problem.nets)
    inputs = make_inputs(case)
    weights = [weight.clone().requires_grad_() for weight in inputs.weights]
    outputs = run_program(problem, inputs.states, inputs.x, weights, inputs.cos, inputs.sin)
    assert not any(out.requires_grad for out in outputs)


def test_two_layers_are_two_blocks() -> None:
    block = BLOCKS["attention"]
    net = NetSpec(block, 2)
    weights = [randn(*shape, seed=i) for i, (_, shape) in enumerate(net.weight_shapes, 1)]
    h = randn(1, 4, 8)
    expected = run_block(block, run_block(block, h, weights[:4], None, None), weights[4:], None, None)
    assert torch.equal(run_net(net, h, weights, None, None), expected)


def test_a_table_longer_than_the_sequence_is_cut() -> None:
    case = loop_case("trm", 1, 1)
    inputs = make_inputs(case)
    long = rope_tables(50, 4)
    short = run_program(case.problem, inputs.states, inputs.x, inputs.weights, inputs.cos, inputs.sin)
    for ours, theirs in zip(
        run_program(case.problem, inputs.states, inputs.x, inputs.weights, *long), short, strict=True
    ):
        assert torch.equal(ours, theirs)


def test_bad_tensors_are_refused_here_too() -> None:
    case = loop_case("trm", 1, 1)
    inputs = make_inputs(case)
    with pytest.raises(ValueError, match=r"^states: got 1, accepted are 2 \(z_H, z_L\)$"):
        run_program(case.problem, inputs.states[:1], inputs.x, inputs.weights)


@pytest.mark.parametrize("batch, length", [(0, 3), (2, 0)])
def test_tensors_without_elements(batch: int, length: int) -> None:
    inputs = make_inputs(make_case("empty", window="all", batch=batch, length=length))
    states = [state.requires_grad_() for state in inputs.states]
    out = run_program(inputs.problem, states, inputs.x, inputs.weights, inputs.cos, inputs.sin)
    assert [z.shape for z in out] == [(batch, length, 64)] * 2
    (gradient,) = torch.autograd.grad(out[0].sum(), states[:1], allow_unused=True, materialize_grads=True)
    assert gradient.shape == (batch, length, 64)
