"""Every backward kernel against autograd of the reference, and whole blocks, between guard zones of NaN.

The truth is float64 autograd of the same rounded inputs; a kernel may lose what the tolerance policy allows on top of
autograd in the compute dtype.  What a kernel takes from forward (norm outputs, row sums, rotated queries) is rounded as
forward kernels round it.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from trmfast.kernels.attention_backward import attention_backward_keys, attention_backward_queries
from trmfast.kernels.conv_swiglu_backward import (
    conv_gradient,
    conv_partials_shape,
    conv_swiglu_backward,
    gate_up_backward,
)
from trmfast.kernels.norm_backward import norm_backward
from trmfast.kernels.plan import Buffer, Launch, Tile
from trmfast.kernels.projection_backward import projection_backward
from trmfast.kernels.rows import Rows
from trmfast.kernels.swiglu_backward import swiglu_backward
from trmfast.kernels.weight_gradient import sum_splits, weight_gradient

import triton_guard
from triton_bounds import checked_run
from triton_draw import Tensors, buffer, buffers
from triton_formula import DTYPES, EPS, check, gradients, norm_factor
from trmfast.cases import rope_tables
from trmfast.reference import rms_norm, rotate, wide_dtype
from trmfast.spec import BlockSpec

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def addresses_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN shows what is read outside of a buffer only where it reaches a result; this shows the rest."""
    monkeypatch.setattr(triton_guard, "run", checked_run)


@pytest.mark.representative(when=lambda rows, dtype: dtype == torch.bfloat16 and rows == 39)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, width", [(39, 48), (1, 64), (33, 512)])
def test_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    def formula(t: Tensors) -> Tensors:
        s = t["s"].requires_grad_()
        return gradients(rms_norm(s, EPS), t["gradient"], out=s)

    def kernel(t: Tensors) -> tuple[Tensors, Sequence[Launch]]:
        gradient = t["gradient"].float()  # of the last norm of a net it is float32
        inputs = {"gradient": gradient, "y": rms_norm(t["s"], EPS), "rstd": norm_factor(t["s"], -1)}
        b = buffers(inputs)
        tile = Tile.of(BLOCK_M=16, BLOCK_N=64 if width <= 64 else 512)
        return inputs, [norm_backward(b["gradient"], Rows(b["y"], rstd=b["rstd"]), buffer("out", t["s"]), tile=tile)]

    check({"s": (rows, width), "gradient": (rows, width)}, dtype, formula, kernel)


def swiglu_formula(t: Tensors) -> Tensors:
    both = F.linear(t["h"], t["gate_up_weight"]).requires_grad_()
    gate, up = both.chunk(2, -1)
    act = F.silu(gate) * up
    found = gradients(F.linear(act, t["down_weight"]), t["gradient"], grad_gate_up=both)
    return {**found, "activation": act.detach()}


@pytest.mark.representative(when=lambda rows, dtype: dtype == torch.bfloat16 and rows == 39)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, width, inner", [(39, 48, 80), (1, 64, 32)])
def test_swiglu(rows: int, width: int, inner: int, dtype: torch.dtype) -> None:
    def kernel(t: Tensors) -> tuple[Tensors, Sequence[Launch]]:
        b = buffers(t)
        grad, act = Buffer("grad_gate_up", (rows, 2 * inner), dtype), Buffer("activation", (rows, inner), dtype)
        tile = Tile.of(BLOCK_M=32, BLOCK_N=32, BLOCK_K=32)
        launch = swiglu_backward(b["h"], b["gradient"], b["gate_up_weight"], b["down_weight"], grad, act, tile=tile)
        return t, [launch]

    shapes = {
        "h": (rows, width),
        "gradient": (rows, width),
        "gate_up_weight": (2 * inner, width),
        "down_weight": (width, inner),
    }
    check(shapes, dtype, swiglu_formula, kernel)


@pytest.mark.representative(when=lambda pad, dtype: dtype == torch.bfloat16 and pad == 3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pad", [0, 3])
def test_swiglu_over_the_sequence(pad: int, dtype: torch.dtype) -> None:
    batch, length, width, inner = 2, 45, 48, 40

    def formula(t: Tensors) -> Tensors:
        found = swiglu_formula({**t, "h": t["h"].mT, "gradient": t["gradient"].mT})
        return {name: value.mT for name, value in found.items()}

    def kernel(t: Tensors) -> tuple[Tensors, Sequence[Launch]]:
        inputs = {**t, "gate_up_weight": F.pad(t["gate_up_weight"], (0, pad))}
        b = buffers(inputs)
        grad = Buffer("grad_gate_up", (batch, 2 * inner, width), dtype)
        act = Buffer("activation", (batch, inner, width), dtype)
        launch = swiglu_backward(
            b["h"], b["gradient"], b["gate_up_weight"], b["down_weight"], grad, act,
            tile=Tile.of(BLOCK_M=32, BLOCK_N=32, BLOCK_K=16), transposed=True,
        )  # fmt: skip
        return inputs, [launch]

    shapes = {
        "h": (batch, length, width),
        "gradient": (batch, length, width),
        "gate_up_weight": (2 * inner, length),
        "down_weight": (length, inner),
    }
    check(shapes, dtype, formula, kernel)


@pytest.mark.representative(when=lambda rows, dtype: dtype == torch.bfloat16 and rows == 39)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, width, depth", [(39, 48, 80), (1, 64, 32)])
def test_projection_and_norm(rows: int, width: int, depth: int, dtype: torch.dtype) -> None:
    def formula(t: Tensors) -> Tensors:
        s = t["s"].requires_grad_()
        y = rms_norm(s, EPS)
        z = torch.cat([y, F.linear(y, t["weight"])], -1)
        return gradients(z, torch.cat([t["residual"], t["gradient"]], -1), out=s)

    def kernel(t: Tensors) -> tuple[Tensors, Sequence[Launch]]:
        inputs = {
            "gradient": t["gradient"],
            "weight": t["weight"],
            "residual": t["residual"],
            "y": rms_norm(t["s"], EPS),
            "rstd": norm_factor(t["s"], -1),
        }
        b = buffers(inputs)
        launch = projection_backward(
            b["gradient"], b["weight"], buffer("out", t["s"]), residual=b["residual"], norm_output=b["y"],
            rstd=b["rstd"], tile=Tile.of(BLOCK_M=16, BLOCK_N=64, BLOCK_K=32),
        )  # fmt: skip
        return inputs, [launch]

    shapes = {"s": (rows, width), "residual": (rows, width), "gradient": (rows, depth), "weight": (depth, width)}
    check(shapes, dtype, formula, kernel)


@pytest.mark.representative(when=lambda dtype: dtype == torch.bfloat16)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_projection_into_gradients_of_states(transposed: bool, dtype: torch.dtype) -> None:
    """Targets of every kind: added to, overwritten, and the compute dtype."""
    batch, length, width, depth = 2, 21, 48, 80
    shape = (batch, length, width)

    def formula(t: Tensors) -> Tensors:
        product = t["residual"] + (t["weight"].mT @ t["gradient"] if transposed else t["gradient"] @ t["weight"])
        wide = product.to(wide_dtype(product.dtype))
        return {"out": product, "over": wide, **{f"add{i}": wide + t[f"add{i}"] for i in range(7)}}

    def kernel(t: Tensors) -> tuple[Tensors, Sequence[Launch]]:
        inputs = {name: value.float() if name.startswith("add") else value for name, value in t.items()}
        b = buffers(inputs)
        targets = [(b[f"add{i}"], True) for i in range(7)]
        launch = projection_backward(
            b["gradient"], b["weight"], Buffer("out", shape, dtype), residual=b["residual"],
            targets=[*targets[:4], (Buffer("over", shape, torch.float32), False), *targets[4:]],
            transposed=transposed, width=length if transposed else 0,
            tile=Tile.of(BLOCK_M=32, BLOCK_N=32, BLOCK_K=32),
        )  # fmt: skip
        return inputs, [launch]

    shapes: dict[str, tuple[int, ...]] = {"residual": shape, **{f"add{i}": shape for i in range(7)}}
    if transposed:
        shapes.update(gradient=(batch, depth, width), weight=(depth, length))
    else:
        shapes.update(gradient=(batch, length, depth), weight=(depth, width))
    check(shapes, dtype, formula, kernel)


ATTENTIONS = {
    "one tile": (BlockSpec(64, 64, num_heads=2), 13, True, 16),
    "tiles": (BlockSpec(64, 64, num_heads=2), 45, True, 16),
    "causal, one tile": (BlockSpec(64, 64, num_heads=2, causal=True), 29, True, 32),
    "causal, tiles": (BlockSpec(64, 64, num_heads=2, causal=True), 45, True, 32),
    "grouped, one tile": (BlockSpec(64, 64, num_heads=4, num_kv_heads=2), 20, True, 32),
    "grouped, tiles": (BlockSpec(64, 64, num_heads=4, num_kv_heads=1, causal=True), 37, True, 16),
    "head_dim 24, no rotation": (BlockSpec(48, 64, num_heads=2), 20, False, 16),
    "head_dim 24": (BlockSpec(48, 64, num_heads=2), 20, True, 16),
    "head_dim 64": (BlockSpec(64, 64, num_heads=1), 97, True, 128),
    "one token": (BlockSpec(64, 64, num_heads=2), 1, True, 16),
}


@pytest.mark.representative(when=lambda name, dtype: dtype == torch.bfloat16 and name in {"one tile", "causal, tiles"})
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name: str, dtype: torch.dtype) -> None:
    block, length, rope, keys = ATTENTIONS[name]
    batch, heads, kv_heads = 2, block.num_heads, block.num_kv_heads
    columns = (heads + 2 * kv_heads) * block.head_dim
    cos, sin = rope_tables(length, block.head_dim)

    def rotated(qkv: Tensor) -> Tensor:
        q, k, v = qkv.view(batch, length, -1, block.head_dim).split((heads, kv_heads, kv_heads), 2)
        if rope:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return torch.cat((q, k, v), 2)

    def attend(qkv: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (t.transpose(1, 2) for t in rotated(qkv).split((heads, kv_heads, kv_heads), 2))
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=block.causal).transpose(1, 2)
        scores = q.float() @ k.float().mT * block.head_dim**-0.5
        if block.causal:
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        return out.reshape(batch, length, -1), scores.logsumexp(-1)

    def formula(t: Tensors) -> Tensors:
        qkv = t["qkv"].requires_grad_()
        return gradients(attend(qkv)[0], t["gradient"], grad_qkv=qkv)

    def kernel(t: Tensors) -> tuple[Tensors, Sequence[Launch]]:
        mixed, lse = attend(t["qkv"])
        inputs = {
            "qkv": rotated(t["qkv"]).reshape(batch, length, columns),
            "mixed": mixed,
            "gradient": t["gradient"],
            "lse": lse,
        }
        if rope:
            inputs.update(cos=cos, sin=sin)
        b = buffers(inputs)
        qkv, gradient, out = b["qkv"], b["gradient"], Buffer("grad_qkv", b["qkv"].shape, dtype)
        delta = Buffer("delta", tuple(lse.shape), torch.float32)
        tables = {"cos": b.get("cos"), "sin": b.get("sin")}
        # Larger ones in one stage, so that float32 fits too.
        tile = Tile.of(BLOCK_M=16, BLOCK_N=keys) if length < 64 else Tile.of(8, 1, BLOCK_M=32, BLOCK_N=keys)
        if keys >= length:
            names = {"qkv", "gradient", "cos", "sin"}
            inputs = {name: value for name, value in inputs.items() if name in names}
            return inputs, [attention_backward_keys(block, qkv, gradient, out, **tables, tile=tile)]
        tables.update(lse=b["lse"], delta=delta)
        return inputs, [
            attention_backward_queries(block, qkv, b["mixed"], gradient, out, **tables, tile=tile),
            attention_backward_keys(block, qkv, gradient, out, **tables, tile=tile),
        ]

    shapes = {"qkv": (batch, length, columns), "gradient": (batch, length, heads * block.head_dim)}
    check(shapes, dtype, formula, kernel)


def test_attention_needs_row_sums_for_several_tiles() -> None:
    block, dtype = BlockSpec(64, 64, num_heads=2), torch.float32
    qkv, mixed, lse = (
        Buffer("qkv", (1, 33, 192), dtype),
        Buffer("mixed", (1, 33, 64), dtype),
        Buffer("lse", (66,), dtype),
    )
    tile = Tile.of(BLOCK_M=16, BLOCK_N=32)
    with pytest.raises(ValueError, match="lse: got None with BLOCK_N 32, accepted if BLOCK_N is at least 33"):
        attention_backward_keys(block, qkv, mixed, qkv, tile=tile)
    with pytest.raises(ValueError, match="delta: got None with BLOCK_N 32, accepted if BLOCK_N is at least 33"):
        attention_backward_keys(block, qkv, mixed, qkv, lse=lse, tile=tile)


@pytest.mark.representative(when=lambda dtype: dtype == torch.bfloat16)
@pytest.mark.parametrize("columns", [32, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_gradients(columns: int, dtype: torch.dtype) -> None:
    """Four weights in one launch, added to what is there, one of them in splits that are summed afterwards.

    A tile of more than 128 columns is added in halves.
    """
    rows, sizes = 75, [(80, 48), (16, 150), (48, 80), (33, 50)]

    def formula(t: Tensors) -> Tensors:
        found = {}
        for i in range(4):
            weight = t[f"total{i}"].requires_grad_()
            product = gradients(F.linear(t[f"x{i}"], weight), t[f"g{i}"], total=weight)["total"]
            found[f"total{i}"] = product.to(wide_dtype(product.dtype))
        # What was there before: 0 for the first three, parts of 1 and 2 for the last.
        found["sum"] = found.pop("total3") + 3.0
        return found

    def kernel(t: Tensors) -> tuple[Tensors, Sequence[Launch]]:
        inputs = {name: value for name, value in t.items() if not name.startswith("total")}
        inputs.update({f"total{i}": torch.zeros(sizes[i]) for i in range(3)})
        inputs["total3"] = torch.stack([torch.full(sizes[3], 1.0), torch.full(sizes[3], 2.0)])
        b = buffers(inputs)
        products = [(b[f"g{i}"], b[f"x{i}"], b[f"total{i}"]) for i in range(4)]
        launch = weight_gradient(products, tile=Tile.of(BLOCK_M=32, BLOCK_N=columns, BLOCK_K=16))
        total = sum_splits(b["total3"], Buffer("sum", sizes[3], torch.float32), tile=Tile.of(BLOCK_N=1024))
        return inputs, [launch, total]

    shapes: dict[str, tuple[int, ...]] = {}
    for i, (out, inner) in enumerate(sizes):
        shapes.update({f"g{i}": (rows, out), f"x{i}": (rows, inner), f"total{i}": (out, inner)})
    check(shapes, dtype, formula, kernel)


@pytest.mark.representative(when=lambda dtype: dtype == torch.bfloat16)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_gradients_over_the_sequence(dtype: torch.dtype) -> None:
    batch, width, sizes = 3, 48, [(80, 21), (21, 40)]

    def formula(t: Tensors) -> Tensors:
        found = {}
        for i in range(2):
            weight = t[f"weight{i}"].requires_grad_()
            product = gradients(F.linear(t[f"x{i}"].mT, weight), t[f"g{i}"].mT, sum=weight)["sum"]
            found[f"sum{i}"] = product.to(wide_dtype(product.dtype))
        return found

    def kernel(t: Tensors) -> tuple[Tensors, Sequence[Launch]]:
        inputs = {name: value for name, value in t.items() if not name.startswith("weight")}
        inputs.update({f"total{i}": torch.zeros(3 - i, *size) for i, size in enumerate(sizes)})
        b = buffers(inputs)
        products = [(b[f"g{i}"], b[f"x{i}"], b[f"total{i}"]) for i in range(2)]
        launch = weight_gradient(products, tile=Tile.of(BLOCK_M=32, BLOCK_N=32, BLOCK_K=32), transposed=True)
        sums = [
            sum_splits(b[f"total{i}"], Buffer(f"sum{i}", size, torch.float32), tile=Tile.of(BLOCK_N=1024))
            for i, size in enumerate(sizes)
        ]
        return inputs, [launch, *sums]

    shapes: dict[str, tuple[int, ...]] = {}
    for i, (out, inner) in enumerate(sizes):
        shapes.update({f"g{i}": (batch, out, width), f"x{i}": (batch, inner, width), f"weight{i}": (out, inner)})
    check(shapes, dtype, formula, kernel)


@pytest.mark.representative(when=lambda taps, dtype: dtype == torch.bfloat16 and taps == 2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("taps", [2, 3])
def test_conv_swiglu(taps: int, dtype: torch.dtype) -> None:
    """The whole channel mixer up to the gradients of gate and up, taps and bias; sequences do not mix."""
    batch, length, width, inner = 3, 13, 48, 80

    def formula(t: Tensors) -> Tensors:
        wide = wide_dtype(t["h"].dtype)
        both = F.linear(t["h"], t["gate_up_weight"]).requires_grad_()
        conv, bias = t["conv"].requires_grad_(), t["bias"].requires_grad_()
        gate, up = both.chunk(2, -1)
        padded = F.pad((F.silu(gate) * up).to(wide), (0, 0, taps // 2, taps // 2))
        c = bias.to(wide)
        for tap in range(taps):
            c = c + padded[:, tap : tap + length] * conv.to(wide)[:, 0, tap]
        z = F.silu(c.to(t["h"].dtype))
        out = F.linear(z, t["down_weight"])
        found = gradients(out, t["gradient"], grad_gate_up=both, total_conv=conv, total_bias=bias)
        return {**found, "z": z.detach()}

    def kernel(t: Tensors) -> tuple[Tensors, Sequence[Launch]]:
        gate, up = F.linear(t["h"], t["gate_up_weight"]).float().chunk(2, -1)
        inputs = {
            **t,
            "activation": (F.silu(gate) * up).to(dtype),
            "total_conv": torch.zeros(inner, 1, taps),
            "total_bias": torch.zeros(inner),
        }
        b = buffers(inputs)
        tile = Tile.of(BLOCK_M=16, BLOCK_N=32, BLOCK_K=32)
        grad_conv, z = (Buffer(name, (batch, length, inner), dtype) for name in ("grad_conv", "z"))
        grad_gate_up = Buffer("grad_gate_up", (batch, length, 2 * inner), dtype)
        partials = Buffer("partials", conv_partials_shape(batch * length, inner, taps, tile), torch.float32)
        return inputs, [
            conv_swiglu_backward(
                b["gradient"],
                b["down_weight"],
                b["activation"],
                b["conv"],
                b["bias"],
                grad_conv,
                z,
                partials,
                tile=tile,
            ),
            gate_up_backward(b["h"], b["gate_up_weight"], grad_conv, b["conv"], grad_gate_up, tile=tile),
            conv_gradient(partials, b["total_conv"], b["total_bias"], tile=Tile.of(BLOCK_M=2, BLOCK_N=32)),
        ]

    shapes = {
        "h": (batch, length, width),
        "gradient": (batch, length, width),
        "gate_up_weight": (2 * inner, width),
        "down_weight": (width, inner),
        "conv": (inner, 1, taps),
        "bias": (inner,),
    }
    check(shapes, dtype, formula, kernel)
