"""float32 sums of many steps beside a residual that is larger than they are: it must not round every one of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton", reason="Triton is not installed")

from trmfast.kernels.attention_projection import attention_projection
from trmfast.kernels.conv_swiglu import conv_projection
from trmfast.kernels.mixer_mlp_t import mlp_t
from trmfast.kernels.mixer_mlp_t_backward import mlp_t_backward
from trmfast.kernels.plan import Buffer, Launch, Tile
from trmfast.kernels.projection import projection
from trmfast.kernels.projection_backward import projection_backward
from trmfast.kernels.swiglu import swiglu

from triton_draw import Tensors, buffers, draw
from triton_guard import guarded_run
from trmfast import reference
from trmfast.reference import rms_norm
from trmfast.spec import BlockSpec
from trmfast.testing import compare, pool, require

EPS = 1e-5
STEP = 16  # of a product: 64 steps an inner width
ROWS, WIDTH, INNER = 16, 32, 64 * STEP

pytestmark = pytest.mark.usefixtures("one_thread")

Shapes = dict[str, tuple[int, ...]]
Formula = Callable[[Tensors], Tensor]
Build = Callable[[dict[str, Buffer], Buffer], Launch]


def _projection() -> tuple[Shapes, Formula, Build]:
    def formula(t: Tensors) -> Tensor:
        return rms_norm(t["residual"] + F.linear(t["source"], t["last_weight"]), EPS)

    def build(b: dict[str, Buffer], out: Buffer) -> Launch:
        tile = Tile.of(BLOCK_M=16, BLOCK_N=WIDTH, BLOCK_K=STEP)
        return projection(b["source"], b["last_weight"], b["residual"], out, eps=EPS, tile=tile)

    shapes: Shapes = {"source": (ROWS, INNER), "last_weight": (WIDTH, INNER), "residual": (ROWS, WIDTH)}
    return shapes, formula, build


def _swiglu() -> tuple[Shapes, Formula, Build]:
    def formula(t: Tensors) -> Tensor:
        return rms_norm(t["h1"] + reference.swiglu(t["h1"], t["up_weight"], t["last_weight"]), EPS)

    def build(b: dict[str, Buffer], out: Buffer) -> Launch:
        tile = Tile.of(BLOCK_M=16, BLOCK_I=STEP, BLOCK_K=WIDTH)
        return swiglu(b["h1"], b["up_weight"], b["last_weight"], out, eps=EPS, tile=tile)

    shapes: Shapes = {"h1": (ROWS, WIDTH), "up_weight": (2 * INNER, WIDTH), "last_weight": (WIDTH, INNER)}
    return shapes, formula, build


def _conv_projection() -> tuple[Shapes, Formula, Build]:
    def formula(t: Tensors) -> Tensor:
        before = F.pad(t["act"], (0, 0, 1, 0))[:, :-1]
        conv = t["conv"][:, 0]
        mixed = t["bias"] + before * conv[:, 0] + t["act"] * conv[:, 1]
        return rms_norm(t["residual"] + F.linear(F.silu(mixed), t["last_weight"]), EPS)

    def build(b: dict[str, Buffer], out: Buffer) -> Launch:
        tile = Tile.of(BLOCK_M=16, BLOCK_N=WIDTH, BLOCK_K=STEP)
        inputs = (b["act"], b["conv"], b["bias"], b["last_weight"], b["residual"])
        return conv_projection(*inputs, out, eps=EPS, tile=tile)

    shapes = {
        "act": (1, ROWS, INNER),
        "conv": (INNER, 1, 2),
        "bias": (INNER,),
        "last_weight": (WIDTH, INNER),
        "residual": (1, ROWS, WIDTH),
    }
    return shapes, formula, build


def _attention_projection() -> tuple[Shapes, Formula, Build]:
    heads = INNER // STEP
    block = BlockSpec(WIDTH, 16, num_heads=heads, head_dim=STEP)

    def formula(t: Tensors) -> Tensor:
        q, k, v = t["qkv"].view(1, ROWS, 3, heads, STEP).transpose(1, 3).unbind(2)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, ROWS, -1)
        return rms_norm(t["residual"] + F.linear(mixed, t["last_weight"]), EPS)

    def build(b: dict[str, Buffer], out: Buffer) -> Launch:
        tile = Tile.of(BLOCK_M=16, BLOCK_N=16)
        return attention_projection(block, b["qkv"], b["last_weight"], b["residual"], out, eps=EPS, tile=tile)

    columns = heads * STEP
    shapes = {"qkv": (1, ROWS, 3 * columns), "last_weight": (WIDTH, columns), "residual": (1, ROWS, WIDTH)}
    return shapes, formula, build


def _mlp_t() -> tuple[Shapes, Formula, Build]:
    def formula(t: Tensors) -> Tensor:
        h = t["h"].mT
        return rms_norm(h + reference.swiglu(h, t["up_weight"], t["last_weight"]), EPS).mT

    def build(b: dict[str, Buffer], out: Buffer) -> Launch:
        tile = Tile.of(BLOCK_C=32, BLOCK_I=STEP)
        return mlp_t([b["h"]], b["up_weight"], b["last_weight"], out, eps=EPS, tile=tile)

    shapes = {"h": (1, ROWS, WIDTH), "up_weight": (2 * INNER, ROWS), "last_weight": (ROWS, INNER)}
    return shapes, formula, build


def _projection_backward() -> tuple[Shapes, Formula, Build]:
    def formula(t: Tensors) -> Tensor:
        return t["residual"] + t["gradient"] @ t["last_weight"]

    def build(b: dict[str, Buffer], out: Buffer) -> Launch:
        tile = Tile.of(BLOCK_M=16, BLOCK_N=32, BLOCK_K=STEP)
        return projection_backward(b["gradient"], b["last_weight"], out, residual=b["residual"], tile=tile)

    shapes: Shapes = {"gradient": (ROWS, INNER), "last_weight": (INNER, WIDTH), "residual": (ROWS, WIDTH)}
    return shapes, formula, build


def _mlp_t_backward() -> tuple[Shapes, Formula, Build]:
    def formula(t: Tensors) -> Tensor:
        y, g, r = t["y"], t["gradient"], t["rstd"][:, None]
        grad_s = r * (g - y * (g * y).mean(1, keepdim=True))
        h = t["h"].mT.detach().requires_grad_()
        mixed = reference.swiglu(h, t["up_weight"], t["last_weight"])
        (grad_h,) = torch.autograd.grad(mixed, h, grad_s.mT)
        return grad_s + grad_h.mT

    def build(b: dict[str, Buffer], out: Buffer) -> Launch:
        tile = Tile.of(BLOCK_N=32, BLOCK_I=STEP)
        inputs = (b["h"], b["gradient"], b["y"], b["rstd"], b["up_weight"], b["last_weight"])
        return mlp_t_backward(*inputs, None, out, tile=tile)

    state = (1, ROWS, WIDTH)
    shapes: Shapes = {"h": state, "gradient": state, "y": state, "rstd": (1, WIDTH)}
    return {**shapes, "up_weight": (2 * INNER, ROWS), "last_weight": (ROWS, INNER)}, formula, build


CASES = {
    "projection": _projection,
    "swiglu": _swiglu,
    "conv_projection": _conv_projection,
    "attention_projection": _attention_projection,
    "mlp_t": _mlp_t,
    "projection_backward": _projection_backward,
    "mlp_t_backward": _mlp_t_backward,
}


@pytest.mark.representative(when=lambda name: name in {"projection", "mlp_t", "projection_backward"})
@pytest.mark.parametrize("name", CASES)
def test_a_large_residual_costs_one_rounding(name: str) -> None:
    """What is added to the residual is much smaller, so eager loses one rounding, and a sum that begins with it 64."""
    shapes, formula, build = CASES[name]()
    draws = []
    for seed in range(3):
        inputs = draw(shapes, torch.float32, seed)
        inputs["last_weight"] /= 64
        truth, eager = (formula({k: t.to(d) for k, t in inputs.items()}) for d in (torch.float64, torch.float32))
        launch = build(buffers(inputs), Buffer("out", tuple(truth.shape), torch.float32))
        found = guarded_run([launch], inputs)["out"].cpu()
        draws.append([compare(name, found, eager, truth, is_gradient=True)])
    require(pool(draws))
