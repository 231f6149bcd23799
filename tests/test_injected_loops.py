"""The loops of Huginn and Parcae in plain PyTorch against the library, and depths that change from step to step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trmfast import BlockSpec, NetSpec, Problem, RecursionProgram, recursion
from trmfast.backends import BACKENDS, packed_weights
from trmfast.backends import cpu as engine
from trmfast.cases import rope_tables
from trmfast.nn import Net, Recursion
from trmfast.program import Update
from trmfast.reference import wide_dtype
from trmfast.testing import Result, compare_results, pool, require

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, LENGTH, WIDTH, HEADS, INNER, LAYERS = 2, 9, 40, 2, 48, 2
HEAD_DIM = WIDTH // HEADS
DEPTH, WINDOW = 4, 3
COS, SIN = rope_tables(LENGTH, HEAD_DIM, rotation="interleaved")
HUGINN = BlockSpec(
    WIDTH, INNER, num_heads=HEADS, causal=True, rms_norm_eps=1e-6, norm_placement="sandwich_sum", norm_weight=True,
    rotation="interleaved", qk_bias=True,
)  # fmt: skip
PARCAE = BlockSpec(
    WIDTH, INNER, num_heads=HEADS, causal=True, norm_placement="pre", norm_weight=True, rotation="interleaved",
    qk_norm="plain", channel_mixer="relu2",
)  # fmt: skip


# ---------------------------------------------------------------- the published loops in plain PyTorch


def norm(h: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    wide = h.to(wide_dtype(h.dtype))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide.to(h.dtype) if weight is None else wide.to(h.dtype) * weight.to(h.dtype)


def turned(q: Tensor) -> Tensor:
    """q: [B, L, heads, head_dim]; channels 2i and 2i + 1 are a complex number."""
    wide = wide_dtype(q.dtype)
    angles = torch.complex(COS[:, ::2].to(wide), SIN[:, ::2].to(wide))
    pairs = torch.view_as_complex(q.to(wide).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * angles[:, None]).flatten(-2).to(q.dtype)


def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def linear(h: Tensor, weight: Tensor) -> Tensor:
    return F.linear(h, weight.to(h.dtype))


def huginn_block(h: Tensor, w: dict[str, Tensor]) -> Tensor:
    q, k, v = linear(norm(h, 1e-6, w["norm1"]), w["qkv"]).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
    q_bias, k_bias = w["qk_bias"].to(h.dtype).view(2, HEADS, HEAD_DIM)
    h = norm(h + linear(mixed(turned(q + q_bias), turned(k + k_bias), v), w["o"]), 1e-6, w["norm2"])
    gate, up = linear(norm(h, 1e-6, w["norm3"]), w["up"]).chunk(2, -1)
    return norm(h + linear(F.silu(gate) * up, w["down"]), 1e-6, w["norm4"])


def parcae_block(h: Tensor, w: dict[str, Tensor]) -> Tensor:
    q, k, v = linear(norm(h, 1e-5, w["norm1"]), w["qkv"]).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
    h = h + linear(mixed(norm(turned(q), 1e-5), norm(turned(k), 1e-5), v), w["o"])
    return h + linear(0.5 * F.relu(linear(norm(h, 1e-5, w["norm2"]), w["up"])).square(), w["down"])


def layer(w: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    return {name.partition(".")[2]: value for name, value in w.items() if name.startswith(f"{index}.")}


def huginn_input(s: Tensor, e: Tensor, w: dict[str, Tensor]) -> Tensor:
    return linear(torch.cat((s, e), -1), w["adapter"])


def parcae_input(s: Tensor, e: Tensor, w: dict[str, Tensor]) -> Tensor:
    dt = F.softplus(w["dt_bias"])
    decay = torch.exp(-dt * torch.exp(w["A_log"]))
    return decay.to(s.dtype) * s + dt.to(s.dtype) * linear(e, w["B"])


Loop = tuple[BlockSpec, Callable[..., Tensor], Callable[..., Tensor]]
LOOPS: dict[str, Loop] = {
    "huginn": (HUGINN, huginn_input, huginn_block),
    "parcae": (PARCAE, parcae_input, parcae_block),
}


def plain(loop: Loop, s: Tensor, e: Tensor, w: dict[str, Tensor]) -> Tensor:
    _, enter, block = loop
    for step in range(DEPTH):
        with torch.set_grad_enabled(step >= DEPTH - WINDOW):
            h = enter(s, e, w)
            for i in range(LAYERS):
                h = block(h, layer(w, i))
            s = h
    return s


def fused(loop: Loop, s: Tensor, e: Tensor, w: dict[str, Tensor], backend: str, recompute: bool) -> Tensor:
    """The same by the library: what the state does not enter is computed once, as x."""
    names = ["qkv", "o", "up", "down"]
    if loop[0] is HUGINN:
        names += ["qk_bias", "norm1", "norm2", "norm3", "norm4"]
        weight, x = w["adapter"][:, :WIDTH], linear(e, w["adapter"][:, WIDTH:])
    else:
        names += ["norm1", "norm2"]
        dt = F.softplus(w["dt_bias"])
        weight, x = torch.exp(-dt * torch.exp(w["A_log"])), dt.to(e.dtype) * linear(e, w["B"])
    weights = [layer(w, i)[name] for i in range(LAYERS) for name in names]
    if loop[0] is PARCAE:  # the half of its activation is one of the product behind it
        weights = [0.5 * value if i % len(names) == 3 else value for i, value in enumerate(weights)]
    spec = NetSpec(loop[0], LAYERS, injection="linear" if weight.dim() == 2 else "diagonal")
    program = RecursionProgram.urm(DEPTH, 1, window=WINDOW)
    (out,) = recursion(program, [spec], [s], x, [*weights, weight], COS, SIN, backend, recompute)
    return out


def drawn_weights(loop: Loop, generator: torch.Generator) -> dict[str, Tensor]:
    def draw(*shape: int, mean: float = 0.0) -> Tensor:
        return mean + 0.5 * torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    found: dict[str, Tensor] = {}
    for i in range(LAYERS):
        up = (2 if loop[0] is HUGINN else 1) * INNER
        matrices = {"qkv": (3 * WIDTH, WIDTH), "o": (WIDTH, WIDTH), "up": (up, WIDTH), "down": (WIDTH, INNER)}
        found |= {f"{i}.{name}": draw(*shape) for name, shape in matrices.items()}
        found |= {f"{i}.norm{k + 1}": draw(WIDTH, mean=1.0) for k in range(loop[0].num_norms)}
        if loop[0] is HUGINN:
            found[f"{i}.qk_bias"] = draw(2 * WIDTH)
    if loop[0] is HUGINN:
        return found | {"adapter": draw(WIDTH, 2 * WIDTH)}
    return found | {"A_log": draw(WIDTH), "dt_bias": draw(WIDTH), "B": draw(WIDTH, WIDTH)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOOPS)
def test_a_published_loop(name: str, dtype: torch.dtype, backend: str) -> None:
    """Within the policy of the loop that calls everything in every step, forward and all gradients."""
    if BACKENDS[backend].supports(problem_of(name), torch.device("cpu"), dtype, BATCH, LENGTH) is not None:
        pytest.skip(f"{backend} has no such injection, or not in {dtype}")
    loop = LOOPS[name]

    def run(function: Callable[..., Tensor], to: torch.dtype, drawn: Tensor, w: dict[str, Tensor]) -> Result:
        s, e, g = (t.to(dtype).to(to) for t in drawn)
        held = torch.promote_types(to, torch.float32)
        leaves = {"s": s, "e": e, **{key: value.to(held, copy=True) for key, value in w.items()}}
        for leaf in leaves.values():
            leaf.requires_grad_()
        out = function(loop, s, e, {key: leaves[key] for key in w})
        grads = torch.autograd.grad(out, list(leaves.values()), g, allow_unused=True, materialize_grads=True)
        return Result({"out": out.detach()}, dict(zip(leaves, grads, strict=True)))

    for recompute in (True, False):
        comparisons = []
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randn(3, BATCH, LENGTH, WIDTH, generator=generator)
            weights = drawn_weights(loop, generator)
            truth, eager = run(plain, torch.float64, drawn, weights), run(plain, dtype, drawn, weights)
            found = run(partial(fused, backend=backend, recompute=recompute), dtype, drawn, weights)
            comparisons.append(compare_results(found, eager, truth))
        require(pool(comparisons))


def problem_of(name: str) -> Problem:
    injection = "linear" if name == "huginn" else "diagonal"
    return Problem(RecursionProgram.urm(1, 1), (NetSpec(LOOPS[name][0], 1, injection=injection),))


# ---------------------------------------------------------------- depths and windows that change


def drawn_program(generator: torch.Generator) -> RecursionProgram:
    """Huginn's draw for one training step: a depth from a Poisson around a lognormal rate, the last 8 with gradient."""
    rate = torch.exp(torch.randn((), generator=generator) * 0.5 + torch.tensor(8.0).log() - 0.125)
    depth = int(torch.poisson(rate, generator=generator)) + 1
    return RecursionProgram.urm(depth, 1, window=min(8, depth))


@pytest.mark.skipif(BACKENDS["cpu"].available() is not None, reason="the engine was not built")
@pytest.mark.parametrize("by", ["argument", "attribute"])
def test_another_depth_and_window_every_step(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are packed once in all, and a program that was seen before is neither validated nor built again."""
    torch.manual_seed(0)
    net = Net(NetSpec(BlockSpec(32, 48, num_heads=2, norm_placement="sandwich_sum"), 1, injection="linear"))
    module = Recursion(RecursionProgram.urm(1, 1), [net], "cpu")
    s, x = torch.randn(2, 2, 5, 32)

    def step(program: RecursionProgram) -> list[Tensor]:
        net.zero_grad()
        if by == "argument":
            (out,) = module([s], x, program=program)
        else:
            module.program = program
            (out,) = module([s], x)
        out.square().sum().backward()
        return [out.detach(), *(p.grad for p in net.parameters())]

    module_of_engine: Any = packed_weights._cpu
    packed = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(module_of_engine, name)

        def PackedWeights(self, *arguments: Any) -> Any:
            packed.append(arguments)
            return module_of_engine.PackedWeights(*arguments)

    monkeypatch.setattr(packed_weights, "_cpu", Counting())
    generator = torch.Generator().manual_seed(0)
    programs = [drawn_program(generator) for _ in range(12)]
    assert len({program.key for program in programs}) > 5
    first = [step(program) for program in programs]
    assert len(packed) == 1

    def fail(*_: Any) -> None:
        raise AssertionError("built again")

    generator.manual_seed(0)
    again = [drawn_program(generator) for _ in range(12)]
    monkeypatch.setattr(RecursionProgram, "_validate", fail)
    monkeypatch.setattr(Problem, "__post_init__", fail)
    misses = engine._engine.cache_info().misses
    for program, expected in zip(again, first, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(step(program), expected, strict=True))
    assert engine._engine.cache_info().misses == misses
    assert len(packed) == 1
    monkeypatch.undo()
    for program, expected in zip(programs, first, strict=True):  # and each is what the reference makes of it
        (out,) = Recursion(program, [net], "reference")([s], x)
        torch.testing.assert_close(out.detach(), expected[0], rtol=1e-4, atol=1e-4)


def test_a_deeper_program_is_not_validated_update_by_update(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Update] = []
    monkeypatch.setattr(RecursionProgram, "_validate", lambda *given: seen.append(given[-1]))
    counts = []
    for depth in (9, 900):
        seen.clear()
        RecursionProgram.urm(depth, 1, window=8)
        counts.append(len(seen))
    assert counts[0] == counts[1]
