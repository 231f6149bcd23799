"""Backward of products that apply a norm: they take rows without it, and leave gradients times its factors.

With z = r p, p the product of rows s that are not normed and r their factors, what a kernel makes of grad z is grad p =
r grad z.  The truth is float64 autograd, as in test_triton_backward.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from trmfast.kernels.attention_backward import attention_backward_keys, attention_backward_queries
from trmfast.kernels.configurations import TILES
from trmfast.kernels.norm_backward import norm_backward
from trmfast.kernels.plan import Buffer, Launch, Tile
from trmfast.kernels.projection_backward import projection_backward
from trmfast.kernels.rows import Rows

import triton_guard
from triton_bounds import checked_run
from triton_draw import Tensors, buffer, buffers
from triton_formula import DTYPES, EPS, check, gradients
from triton_guard import DEVICE, INTERPRETED
from trmfast.backends import triton as backend
from trmfast.cases import make_case, make_inputs, rope_tables
from trmfast.reference import rms_norm, rotate, wide_dtype
from trmfast.spec import BlockSpec
from trmfast.testing import compare, require, run_eager, run_fused, run_truth

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def addresses_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_guard, "run", checked_run)


def factors(s: Tensor) -> Tensor:
    return torch.rsqrt(s.to(wide_dtype(s.dtype)).square().mean(-1, keepdim=True) + EPS)


def squares_of(s: Tensor, parts: int) -> Tensor:
    """Sums of squares of equal parts of each row."""
    return s.float().square().reshape(*s.shape[:-1], parts, -1).sum(-1)


@pytest.mark.representative(when=lambda rows, dtype: dtype == torch.bfloat16 and rows == 39)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, width, parts", [(39, 48, 1), (1, 64, 2), (33, 512, 4)])
def test_norm(rows: int, width: int, parts: int, dtype: torch.dtype) -> None:
    """The gradient of a norm from its input, whose gradient is not scaled."""

    def formula(t: Tensors) -> Tensors:
        s = t["s"].requires_grad_()
        return gradients(rms_norm(s, EPS), t["gradient"], out=s)

    def kernel(t: Tensors) -> tuple[Tensors, Sequence[Launch]]:
        inputs = {"gradient": t["gradient"].float(), "s": t["s"], "squares": squares_of(t["s"], parts)}
        b = buffers(inputs)
        tile = Tile.of(BLOCK_M=16, BLOCK_N=64 if width <= 64 else 512)
        return inputs, [norm_backward(b["gradient"], Rows(b["s"], b["squares"], EPS), buffer("out", t["s"]), tile=tile)]

    check({"s": (rows, width), "gradient": (rows, width)}, dtype, formula, kernel)


@pytest.mark.representative(when=lambda dtype: dtype == torch.bfloat16)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bypass", ["scaled", "added behind"])
@pytest.mark.parametrize("rows, width, depth", [(39, 48, 80), (1, 64, 32)])
def test_projection_and_norm(rows: int, width: int, depth: int, bypass: str, dtype: torch.dtype) -> None:
    """From the gradient of a product that applied a norm to that of the norm's input, with what bypasses the product,
    or both.
    """

    def formula(t: Tensors) -> Tensors:
        s = t["s"].requires_grad_()
        y = rms_norm(s, EPS)
        z = torch.cat([y if bypass == "scaled" else s, F.linear(y, t["weight"])], -1)
        return gradients(z, torch.cat([t["residual"], t["gradient"]], -1), out=s)

    def kernel(t: Tensors) -> tuple[Tensors, Sequence[Launch]]:
        scaled = (t["gradient"] * factors(t["s"])).to(dtype)
        names = ("s", "residual", "weight")
        inputs = {**{name: t[name] for name in names}, "gradient": scaled, "squares": squares_of(t["s"], 2)}
        b = buffers(inputs)
        normed, between = Rows(b["s"], b["squares"], EPS), Buffer("between", (rows, width), dtype)
        ahead = {"residual": b["residual"], "scale": normed} if bypass == "scaled" else {}
        behind = {} if bypass == "scaled" else {"residual": b["residual"]}
        tile = Tile.of(BLOCK_M=16, BLOCK_N=16, BLOCK_K=32)
        return inputs, [
            projection_backward(b["gradient"], b["weight"], between, **ahead, tile=tile),
            norm_backward(
                between, normed, buffer("out", t["s"]), scaled=True, **behind, tile=Tile.of(BLOCK_M=16, BLOCK_N=64)
            ),
        ]

    shapes = {"s": (rows, width), "residual": (rows, width), "gradient": (rows, depth), "weight": (depth, width)}
    check(shapes, dtype, formula, kernel)


ATTENTIONS = {
    "one tile": (BlockSpec(64, 64, num_heads=4, num_kv_heads=2), 20, 32),
    "tiles": (BlockSpec(64, 64, num_heads=2, causal=True), 45, 16),
}


@pytest.mark.representative(when=lambda dtype: dtype == torch.bfloat16)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name: str, dtype: torch.dtype) -> None:
    block, length, keys = ATTENTIONS[name]
    batch, heads, kv_heads = 2, block.num_heads, block.num_kv_heads
    columns = (heads + 2 * kv_heads) * block.head_dim
    cos, sin = rope_tables(length, block.head_dim)

    def attend(product: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = (product * factors(s)).to(product.dtype).view(batch, length, -1, block.head_dim)
        q, k, v = qkv.split((heads, kv_heads, kv_heads), 2)
        rotated = torch.cat((rotate(q, cos, sin), rotate(k, cos, sin), v), 2)
        q, k, v = (t.transpose(1, 2) for t in rotated.split((heads, kv_heads, kv_heads), 2))
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=block.causal).transpose(1, 2)
        scores = q.float() @ k.float().mT * block.head_dim**-0.5
        if block.causal:
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        return rotated.reshape(batch, length, columns), out.reshape(batch, length, -1), scores.logsumexp(-1)

    def formula(t: Tensors) -> Tensors:
        product = t["product"].requires_grad_()
        return gradients(attend(product, t["s"])[1], t["gradient"], grad_qkv=product)

    def kernel(t: Tensors) -> tuple[Tensors, Sequence[Launch]]:
        qkv, mixed, lse = attend(t["product"], t["s"])
        inputs = {"qkv": qkv, "gradient": t["gradient"], "squares": squares_of(t["s"], 4), "cos": cos, "sin": sin}
        if keys < length:
            inputs.update(mixed=mixed, lse=lse)
        b = buffers(inputs)
        out = Buffer("grad_qkv", (batch, length, columns), dtype)
        normed = Rows(Buffer("s", tuple(t["s"].shape), dtype), b["squares"], EPS)
        options = {"cos": b["cos"], "sin": b["sin"], "scale": normed, "tile": Tile.of(BLOCK_M=16, BLOCK_N=keys)}
        if keys >= length:
            return inputs, [attention_backward_keys(block, b["qkv"], b["gradient"], out, **options)]
        options.update(lse=b["lse"], delta=Buffer("delta", tuple(lse.shape), torch.float32))
        return inputs, [
            attention_backward_queries(block, b["qkv"], b["mixed"], b["gradient"], out, **options),
            attention_backward_keys(block, b["qkv"], b["gradient"], out, **options),
        ]

    shapes = {
        "s": (batch, length, block.hidden_size),
        "product": (batch, length, columns),
        "gradient": (batch, length, heads * block.head_dim),
    }
    check(shapes, dtype, formula, kernel)


@pytest.mark.skipif(not INTERPRETED, reason="the configuration is the interpreter's")
def test_small_gradients_of_large_rows_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaled by the factors of rows of 300, they would be subnormal."""
    readers_norm = replace(backend._configuration(DEVICE), fusion="least")
    monkeypatch.setattr(backend, "_configuration", lambda _: readers_norm)
    case = make_case(
        "large", "urm", H_cycles=1, L_cycles=1, length=11, hidden_size=32, batch=2, intermediate_size=48, num_layers=1,
        window="all", norm_placement="pre",
    )  # fmt: skip
    inputs = make_inputs(case, torch.float16, weight_scale=0.7)
    large = tuple(300 * state for state in inputs.states)
    small = tuple(1e-3 * gradient for gradient in inputs.grad_states)
    inputs = replace(inputs, states=large, grad_states=small)
    truth, eager, found = run_truth(inputs), run_eager(inputs), run_fused(inputs, "triton")
    names = [name for name in truth.gradients if "qkv" in name or "gate_up" in name]
    assert len(names) == 2
    require(
        [
            compare(name, found.gradients[name], eager.gradients[name], truth.gradients[name], is_gradient=True)
            for name in names
        ]
    )


def test_what_means_nothing_is_refused() -> None:
    def state(name: str) -> Buffer:
        return Buffer(name, (2, 16, 16), torch.float32)

    def weight(name: str, rows: int) -> Buffer:
        return Buffer(name, (rows, 16), torch.float32)

    normed, raw = Rows(state("y"), rstd=state("rstd")), Rows(state("s"), state("squares"), EPS)
    gradient, out, tile = state("gradient"), state("out"), Tile.of(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16)
    with pytest.raises(ValueError, match=r"^scaled: got True for rows without squares, accepted is False$"):
        norm_backward(gradient, normed, out, scaled=True, tile=tile)
    expected = "got rows with squares and transposed, accepted are rows without$"
    with pytest.raises(ValueError, match=f"^scale: {expected}"):
        projection_backward(gradient, weight("w", 16), out, transposed=True, scale=raw, tile=tile)


def test_every_sum_leaves_squares_of_the_same_tiles() -> None:
    """Forward sums other numbers of terms than backward, and backward finds its squares by their shape."""
    for tiles in TILES["normed_sum"].values():
        assert len({dict(tile.blocks)["BLOCK_N"] for tile in tiles}) == 1
