"""HRM-Text: names, initial weights, windows, packed prefix-LM rows, against the published loop written out."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trmfast.models import HRMText
from trmfast.testing import compare, pool, require

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG: dict[str, Any] = {
    "max_seq_len": 40,
    "n_layers": 4,
    "half_layers": True,
    "hidden_size": 32,
    "num_heads": 4,
    "expansion": 4,
    "attn_type": "prefixlm",
    "init_type": "lecun_normal",
    "norm_type": "pre",
    "norm_eps": 1e-6,
    "pos_emb_type": "rope",
    "rope_theta": 10000.0,
    "H_cycles": 2,
    "L_cycles": 3,
    "bp_warmup_ratio": 0.2,
    "bp_max_steps": 5,
    "vocab_size": 11,  # of the head, which reads the same dict
}
PREFIXES, RESPONSES = (3, 5, 1), (4, 2, 6)  # three packed sequences, 21 tokens, and a tail of 3
TOKENS = 24


def make(**changes: Any) -> HRMText:
    torch.manual_seed(0)
    return HRMText({**CONFIG, "backend": "reference", **changes})


def packed() -> dict[str, Any]:
    """The description of a row as upstream's loader makes it, padded with zeros to the number of tokens."""
    lengths = [p + r for p, r in zip(PREFIXES, RESPONSES, strict=True)]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.cat([torch.arange(n) for n in lengths])

    def padded(values: Any) -> Tensor:
        values = torch.as_tensor(values)
        return F.pad(values, (0, TOKENS - len(values))).to(torch.int32)

    return {
        "position_ids": padded(positions),
        "prefix_lens": padded(PREFIXES),
        "causal_lens": padded(RESPONSES),
        "cu_seqlens": padded(ends),
        "total_seqlen": torch.tensor(sum(lengths)),
        "numseqs": torch.tensor(len(lengths)),
    }


# ---------------------------------------------------------------- the published loop, for one sequence


def published_net(state: dict[str, Tensor], net: str, h: Tensor, prefix: int, model: HRMText) -> Tensor:
    """h: [L, D] of one sequence whose first tokens are the prefix."""
    config = model.config
    length, D, heads = len(h), config.hidden_size, config.num_heads
    d = D // heads
    seen = torch.ones(length, length).tril().bool()
    seen[:prefix, :prefix] = True
    angles = torch.outer(torch.arange(length), config.rope_theta ** (-torch.arange(0, d, 2) / d))
    cos, sin = (f(angles).repeat(1, 2)[:, None].to(h.dtype) for f in (torch.cos, torch.sin))

    def normed(h: Tensor) -> Tensor:
        return F.rms_norm(h, (D,), eps=config.norm_eps)

    def turned(q: Tensor) -> Tensor:
        low, high = q.chunk(2, -1)
        return q * cos + torch.cat((-high, low), -1) * sin

    def attend(h: Tensor, prefix_of: str) -> Tensor:
        gate, q, k, v = (h @ state[f"{prefix_of}.attn.gqkv_proj.weight"].T).view(length, 4, heads, d).unbind(1)
        q, k, v = (t.transpose(0, 1) for t in (turned(q), turned(k), v))
        scores = (q @ k.transpose(1, 2) / d**0.5).masked_fill(~seen, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1)
        return (torch.sigmoid(gate) * mixed).flatten(1) @ state[f"{prefix_of}.attn.o_proj.weight"].T

    def mlp(h: Tensor, prefix_of: str) -> Tensor:
        gate, up = (h @ state[f"{prefix_of}.mlp.gate_up_proj.weight"].T).chunk(2, -1)
        return (F.silu(gate) * up) @ state[f"{prefix_of}.mlp.down_proj.weight"].T

    for i in range(config.depth):
        layer = f"{net}.core.layers.{i}"
        if config.norm_type == "pre":
            h = h + attend(normed(h), layer)
            h = h + mlp(normed(h), layer)
        else:
            h = normed(h + attend(h, layer))
            h = normed(h + mlp(h, layer))
    return normed(h) if config.norm_type == "pre" else h


def published(model: HRMText, state: dict[str, Tensor], x: Tensor, prefix: int, bp_steps: int) -> Tensor:
    H, L = model.H_cycles, model.L_cycles
    H_steps = min(H, bp_steps - 1)
    z_H, z_L = x, model.zL_init.to(x.dtype)
    for i in range(H):
        for k in range(i * L, (i + 1) * L):
            with torch.set_grad_enabled(k >= H * L - (bp_steps - H_steps)):
                z_L = published_net(state, "L_level", z_L + z_H, prefix, model)
        with torch.set_grad_enabled(i >= H - H_steps):
            z_H = published_net(state, "H_level", z_H + z_L, prefix, model)
    return z_H


def results(
    model: HRMText, dtype: torch.dtype, bp_steps: int, fused: bool, drawn: torch.dtype = torch.float32, seed: int = 1
) -> dict[str, Tensor]:
    """z_H of the packed sequences, and the gradients of x and of all weights; x is drawn in the dtype ``drawn``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (TOKENS, model.hidden_size)
    x, g = (torch.randn(shape, generator=generator).to(drawn).to(dtype) for _ in range(2))
    x.requires_grad_()
    named = dict(model.named_parameters())
    state = {name: p.detach().to(torch.promote_types(dtype, p.dtype)).requires_grad_() for name, p in named.items()}
    total = sum(PREFIXES) + sum(RESPONSES)
    if fused:
        out = torch.func.functional_call(model, state, (None, x), {"bp_steps": bp_steps, **packed()})[1][:total]
    else:
        cast = {name: p.to(dtype) for name, p in state.items()}
        parts, start = [], 0
        for p, r in zip(PREFIXES, RESPONSES, strict=True):
            parts.append(published(model, cast, x[start : start + p + r], p, bp_steps))
            start += p + r
        out = torch.cat(parts)
    leaves = {"x": x, **state}
    grads = torch.autograd.grad(out, list(leaves.values()), g[:total], allow_unused=True, materialize_grads=True)
    return {"z_H": out.detach(), **{f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}}


@pytest.mark.parametrize("bp_steps", [2, 3, 4, 5])
def test_the_published_loop(bp_steps: int) -> None:
    model = make()
    ours, theirs = (results(model, torch.float64, bp_steps, fused) for fused in (True, False))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-9, msg=name)
    assert bool(theirs["grad x"].any()) is (bp_steps > 2)  # at 2, the embedding's gradient is zero


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", [{}, {"norm_type": "post"}, {"init_type": "megatron"}], ids=str)
def test_within_policy(dtype: torch.dtype, changes: dict[str, Any]) -> None:
    model = make(**changes, H_cycles=1, L_cycles=2, n_layers=2)
    draws = []
    for seed in range(5):
        ours, eager, truth = (
            results(model, d, 3, fused, dtype, seed)
            for d, fused in ((dtype, True), (dtype, False), (torch.float64, False))
        )
        draws.append([compare(n, ours[n], eager[n], t, is_gradient=n.startswith("grad")) for n, t in truth.items()])
    require(pool(draws))


def test_names_are_the_published_ones() -> None:
    model = make(hidden_size=64, num_heads=2)
    block = {
        "attn.gqkv_proj": (256, 64),
        "attn.o_proj": (64, 64),
        "mlp.gate_up_proj": (512, 64),
        "mlp.down_proj": (64, 256),
    }
    expected = {
        f"{level}_level.core.layers.{i}.{name}.weight": shape
        for level in "HL"
        for i in range(2)
        for name, shape in block.items()
    }
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == {**expected, "zL_init": (64,)}
    assert model.zL_init.dtype == torch.bfloat16
    assert not [name for name, _ in model.named_parameters() if name == "zL_init"]
    assert model.head_hint["in"] == {"dim": 64, "init_std": 1 / 8}


PUBLISHED = {  # width, heads, blocks of both networks, millions of parameters of the recursion
    "B": (1024, 8, 12, 167),
    "L": (1280, 10, 24, 527),
    "XL": (1536, 12, 32, 981),
    "XXL": (1792, 14, 72, 3039),
    "XXL_wide": (2560, 20, 32, 2747),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(size: str) -> None:
    width, heads, layers, millions = PUBLISHED[size]
    with torch.device("meta"):
        model = HRMText({**CONFIG, "hidden_size": width, "num_heads": heads, "n_layers": layers})
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_initial_weights() -> None:
    """Normal numbers of which none is beyond three deviations, with the deviation of their fan in, each drawn once."""
    model = make(hidden_size=256, n_layers=2)
    for name, weight in model.named_parameters():
        std = 256**-0.5 if "down_proj" not in name else 768**-0.5
        assert weight.std().item() == pytest.approx(std, rel=0.02), name
        assert weight.abs().max().item() <= 3 * 1.0148 * std
    assert model.zL_init.float().std().item() == pytest.approx(1, rel=0.2)
    torch.manual_seed(0)
    first = torch.empty(4 * 256, 256).normal_().fmod_(3.0) * (1.014762601732121 / 16)
    torch.testing.assert_close(model.get_parameter("H_level.core.layers.0.attn.gqkv_proj.weight"), first, msg="draws")


def test_window_warms_up() -> None:
    model = make()
    steps = [model.compute_train_extra_args(SimpleNamespace(step=s, total_steps=1000))["bp_steps"] for s in range(301)]
    assert [steps.index(n) for n in (2, 3, 4, 5)] == [0, 67, 134, 200]
    assert steps[-1] == 5
    assert make(bp_warmup_ratio=0).compute_train_extra_args(SimpleNamespace(step=0, total_steps=9)) == {"bp_steps": 5}


def test_rows_of_one_sequence() -> None:
    """[B, L, D] is B sequences without a prefix; so is a row [T, D] without a description."""
    model = make()
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(3))
    both = model(None, x)[1]
    for row, z in zip(x, both, strict=True):
        torch.testing.assert_close(model(None, row)[1], z)
        torch.testing.assert_close(published(model, model.state_dict(), row, 0, 2), z, rtol=1e-4, atol=1e-4)


def test_causal_attention_ignores_prefixes() -> None:
    x = torch.randn(TOKENS, 32, generator=torch.Generator().manual_seed(3))
    description = packed()
    causal = make(attn_type="causal")(None, x, **description)[1]
    none = make()(None, x, **{**description, "prefix_lens": torch.zeros(TOKENS, dtype=torch.int32)})[1]
    assert torch.equal(causal, none)
    assert not torch.equal(causal, make()(None, x, **description)[1])


def test_wrapped_tensors_and_compile() -> None:
    """The training script wraps the description of a row, and compiles the whole step."""
    model = make()
    x = torch.randn(TOKENS, 32, generator=torch.Generator().manual_seed(3))
    expected = model(None, x, **packed())[1]
    wrapped = {name: SimpleNamespace(value=value) for name, value in packed().items()}
    assert torch.equal(model(None, x, **wrapped)[1], expected)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(None, x, **packed())[1], expected)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_layers": 3}, "n_layers: got 3, accepted are even numbers with half_layers"),
        ({"norm_type": "both"}, "norm_type: got 'both', accepted are pre or post"),
        ({"attn_type": "full"}, "attn_type: got 'full', accepted are prefixlm or causal"),
        ({"bp_min_steps": 1}, "bp_min_steps: got 1, accepted are integers >= 2"),
        ({"H_override": {"expansion": 2}}, "H_override: got {'expansion': 2}, accepted is {}, both networks are alike"),
        ({"num_heads": 5}, "num_heads: got 5, accepted are the divisors of hidden_size 32"),
        ({"rope_theta": None}, "rope_theta: got 0.0, accepted are positive numbers with rope"),
    ],
)
def test_configurations_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make(**changes)


def test_calls_that_are_refused() -> None:
    model, x = make(), torch.randn(TOKENS, 32)
    with pytest.raises(ValueError, match=r"^cache: got one, accepted is None, HRMText has no incremental decoding$"):
        model(None, x, cache={})
    with pytest.raises(ValueError, match=r"^bp_steps: got 1, accepted are integers >= 2$"):
        model(None, x, bp_steps=1)
    with pytest.raises(ValueError, match=r"^x.shape: got three dimensions with packed sequences"):
        model(None, x[None], **packed())
    with pytest.raises(NotImplementedError, match=r"^create_cache: HRMText has no incremental decoding"):
        model.create_cache()


def test_a_hooked_part_is_noticed() -> None:
    model, x = make(), torch.randn(TOKENS, 32)
    model(None, x)
    model.get_submodule("H_level.core.layers.1.attn.o_proj").register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"^H_level\.core\.layers\.1\.attn\.o_proj: has forward hooks"):
        model(None, x)


@pytest.mark.parametrize("bp_steps", [2, 3])
def test_an_embedding_outside_the_window_has_no_gradient(bp_steps: int) -> None:
    """None and not zeros, with which an optimizer would decay the weights and count a step."""
    model, x = make(), torch.randn(5, 32, requires_grad=True)
    model(None, x, bp_steps=bp_steps)[1].sum().backward()
    assert (x.grad is None) is (bp_steps == 2)
