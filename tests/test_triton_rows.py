"""Products that leave the norm to their readers: what they write, every reader, and whole programs of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton", reason="Triton is not installed")

from trmfast.kernels.attention_projection import attention_projection
from trmfast.kernels.conv_swiglu import conv_projection
from trmfast.kernels.mixer_mlp_t import mlp_t
from trmfast.kernels.norm_backward import norm_backward
from trmfast.kernels.plan import Buffer, Launch, Tile
from trmfast.kernels.projection import projection
from trmfast.kernels.qkv import qkv
from trmfast.kernels.rows import MOST_UNROLLED, Rows, normed_rows, normed_sum
from trmfast.kernels.swiglu import gate_up, swiglu
from trmfast.kernels.tiles import TILES

import triton_guard
from test_triton_backend import small
from test_triton_forward import check, norm_factor
from triton_bounds import checked_run
from triton_draw import Tensors, buffers
from triton_formula import EPS, gradients
from triton_formula import check as check_gradients
from triton_guard import DEVICE
from trmfast import reference
from trmfast.backends import triton as backend
from trmfast.cases import rope_tables
from trmfast.reference import rms_norm, rotate, wide_dtype
from trmfast.spec import BlockSpec
from trmfast.testing import check_case, require

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BATCH, LENGTH, WIDTH, INNER, PART = 2, 13, 40, 48, 16  # three parts of a row, the last one half empty
STATE = (BATCH, LENGTH, WIDTH)


@pytest.fixture(autouse=True)
def addresses_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN shows what is read outside of a buffer only where it reaches a result; this shows the rest."""
    monkeypatch.setattr(triton_guard, "run", checked_run)


def parts(s: Tensor, columns: int = PART) -> Tensor:
    """Sums of squares of parts of a row, in float32 or float64."""
    squares = F.pad(s.to(wide_dtype(s.dtype)).square(), (0, -s.shape[-1] % columns))
    return squares.unflatten(-1, (-1, columns)).sum(-1)


def test_every_sum_leaves_squares_of_the_same_tiles() -> None:
    """Forward sums other numbers of terms than backward, and backward finds what is kept by its shape."""
    for tiles in TILES["normed_sum"].values():
        assert len({dict(tile.blocks)["BLOCK_N"] for tile in tiles}) == 1


# ---------------------------------------------------------------- what a product writes


@pytest.mark.representative(when=lambda dtype: dtype == torch.bfloat16)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("convolves", [False, True], ids=["projection", "conv_projection"])
def test_columns(convolves: bool, dtype: torch.dtype) -> None:
    """The input of the norm, its squares, and the norm that ``normed_rows`` makes of them."""

    def formula(t: Tensors) -> Tensors:
        source = t["source"]
        if convolves:
            convolved = F.conv1d(F.pad(source.mT, (1, 0)), t["conv"], t["bias"], groups=INNER)
            source = F.silu(convolved).mT
        s = rms_norm(t["h"], EPS) + F.linear(source, t["weight"])
        return {"s": s, "y": rms_norm(s, EPS), "rstd": norm_factor(s)}

    def kernel(t: Tensors) -> tuple[Tensors, Sequence[Launch]]:
        inputs = {**t, "h_squares": parts(t["h"])}
        b = buffers(inputs)
        s, y = (Buffer(name, STATE, dtype) for name in ("s", "y"))
        squares, rstd = Buffer("squares", (BATCH, LENGTH, 3), torch.float32), Buffer("rstd", STATE[:2], torch.float32)
        build, *more = (conv_projection, b["conv"], b["bias"]) if convolves else (projection,)
        tile = Tile.of(BLOCK_M=16, BLOCK_N=PART, BLOCK_K=32)
        residual = Rows(b["h"], b["h_squares"], EPS)
        product = build(b["source"], *more, b["weight"], residual, s, eps=EPS, squares=squares, tile=tile)
        norm = normed_rows([Rows(s, squares, EPS)], [y], [rstd], tile=Tile.of(BLOCK_M=8, BLOCK_N=32))
        return inputs, [product, norm]

    shapes: dict[str, tuple[int, ...]] = {"h": STATE, "source": (BATCH, LENGTH, INNER), "weight": (WIDTH, INNER)}
    check(shapes | ({"conv": (INNER, 1, 2), "bias": (INNER,)} if convolves else {}), dtype, formula, kernel)


@pytest.mark.parametrize("columns", [PART, 1], ids=["few parts", "more than are unrolled"])
def test_norms_in_place(columns: int) -> None:
    """The last part of a plan: two states of different parts, where they are."""
    assert MOST_UNROLLED.value < WIDTH

    def formula(t: Tensors) -> Tensors:
        return {name: rms_norm(t[name], EPS) for name in ("a", "b")}

    def kernel(t: Tensors) -> tuple[Tensors, Sequence[Launch]]:
        whole = t["b"].float().square().sum(-1, keepdim=True)
        inputs = {**t, "a_squares": parts(t["a"], columns), "b_squares": whole}
        found = buffers(inputs)
        rows = [Rows(found[name], found[f"{name}_squares"], EPS) for name in ("a", "b")]
        return inputs, [normed_rows(rows, [row.values for row in rows], tile=Tile.of(BLOCK_M=8, BLOCK_N=32))]

    check({"a": STATE, "b": STATE}, torch.bfloat16, formula, kernel)


@pytest.mark.representative(when=lambda dtype, columns: dtype == torch.bfloat16 and columns == PART)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [PART, 1], ids=["few parts", "more than are unrolled"])
def test_the_gradient_of_a_norm_from_its_input(columns: int, dtype: torch.dtype) -> None:
    def formula(t: Tensors) -> Tensors:
        s = t["s"].requires_grad_()
        return gradients(rms_norm(s, EPS), t["gradient"], out=s)

    def kernel(t: Tensors) -> tuple[Tensors, Sequence[Launch]]:
        inputs = {"s": t["s"], "gradient": t["gradient"].float(), "squares": parts(t["s"], columns).float()}
        b = buffers(inputs)
        rows, tile = Rows(b["s"], b["squares"], EPS), Tile.of(BLOCK_M=8, BLOCK_N=64)
        return inputs, [norm_backward(b["gradient"], rows, Buffer("out", STATE, dtype), tile=tile)]

    check_gradients({"s": STATE, "gradient": STATE}, dtype, formula, kernel)


# ---------------------------------------------------------------- readers

HEADS = BlockSpec(WIDTH, 16, num_heads=2, num_kv_heads=1, head_dim=24)
COLUMNS = (HEADS.num_heads + 2 * HEADS.num_kv_heads) * HEADS.head_dim
COS, SIN = rope_tables(LENGTH, HEADS.head_dim)
# From tensors, and from buffers, the rows that the launch norms and its output.
Formula = Callable[[Tensors, Tensor], Tensor]
Build = Callable[[dict[str, Buffer], Rows, Buffer], Launch]
Reader = tuple[dict[str, tuple[int, ...]], Formula, Build]


def _qkv() -> Reader:
    def formula(t: Tensors, h: Tensor) -> Tensor:
        out = F.linear(h, t["weight"]).view(BATCH, LENGTH, -1, HEADS.head_dim)
        q_and_k, v = out.split((3, 1), 2)
        return torch.cat([rotate(q_and_k, COS, SIN), v], 2).reshape(BATCH, LENGTH, COLUMNS)

    def build(b: dict[str, Buffer], h: Rows, out: Buffer) -> Launch:
        tile = Tile.of(BLOCK_M=16, BLOCK_N=32, BLOCK_K=16)
        return qkv(HEADS, [h], b["weight"], out, cos=b["cos"], sin=b["sin"], tile=tile)

    return {"weight": (COLUMNS, WIDTH)}, formula, build


def _attention_projection() -> Reader:
    block = BlockSpec(WIDTH, 16, num_heads=2, head_dim=16)

    def formula(t: Tensors, h: Tensor) -> Tensor:
        q, k, v = t["qkv"].view(BATCH, LENGTH, 3, 2, 16).transpose(1, 3).unbind(2)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(BATCH, LENGTH, -1)
        return rms_norm(h + F.linear(mixed, t["weight"]), EPS)

    def build(b: dict[str, Buffer], h: Rows, out: Buffer) -> Launch:
        return attention_projection(
            block, b["qkv"], b["weight"], h, out, eps=EPS, tile=Tile.of(BLOCK_M=8, BLOCK_N=16)
        )  # fmt: skip

    return {"qkv": (BATCH, LENGTH, 96), "weight": (WIDTH, 32)}, formula, build


def _projection() -> Reader:
    def formula(t: Tensors, h: Tensor) -> Tensor:
        return rms_norm(h + F.linear(t["source"], t["weight"]), EPS)

    def build(b: dict[str, Buffer], h: Rows, out: Buffer) -> Launch:
        tile = Tile.of(BLOCK_M=16, BLOCK_N=64, BLOCK_K=16)
        return projection(b["source"], b["weight"], h, out, eps=EPS, tile=tile)

    return {"source": (BATCH, LENGTH, INNER), "weight": (WIDTH, INNER)}, formula, build


def _gate_up() -> Reader:
    def formula(t: Tensors, h: Tensor) -> Tensor:
        gate, up = F.linear(h, t["weight"]).chunk(2, -1)
        return F.silu(gate) * up

    def build(b: dict[str, Buffer], h: Rows, out: Buffer) -> Launch:
        return gate_up(h, b["weight"], out, tile=Tile.of(BLOCK_M=16, BLOCK_I=32, BLOCK_K=16))

    return {"weight": (2 * INNER, WIDTH)}, formula, build


def _swiglu() -> Reader:
    def formula(t: Tensors, h: Tensor) -> Tensor:
        return rms_norm(h + reference.swiglu(h, t["up_weight"], t["down_weight"]), EPS)

    def build(b: dict[str, Buffer], h: Rows, out: Buffer) -> Launch:
        tile = Tile.of(BLOCK_M=16, BLOCK_I=16, BLOCK_K=16)
        return swiglu(h, b["up_weight"], b["down_weight"], out, eps=EPS, tile=tile)

    return {"up_weight": (2 * INNER, WIDTH), "down_weight": (WIDTH, INNER)}, formula, build


def _mlp_t() -> Reader:
    def formula(t: Tensors, h: Tensor) -> Tensor:
        return rms_norm(h.mT + reference.swiglu(h.mT, t["up_weight"], t["down_weight"]), EPS).mT

    def build(b: dict[str, Buffer], h: Rows, out: Buffer) -> Launch:
        return mlp_t([h], b["up_weight"], b["down_weight"], out, eps=EPS, tile=Tile.of(BLOCK_C=32, BLOCK_I=16))

    return {"up_weight": (2 * INNER, LENGTH), "down_weight": (LENGTH, INNER)}, formula, build


def _normed_sum() -> Reader:
    def formula(t: Tensors, h: Tensor) -> Tensor:
        return t["z"] + (h + t["x"])

    def build(b: dict[str, Buffer], h: Rows, out: Buffer) -> Launch:
        return normed_sum([b["z"], h, b["x"]], out, tile=Tile.of(BLOCK_M=8, BLOCK_N=32))

    return {"z": STATE, "x": STATE}, formula, build


READERS = {
    "qkv": _qkv,
    "attention_projection": _attention_projection,
    "projection": _projection,
    "gate_up": _gate_up,
    "swiglu": _swiglu,
    "mlp_t": _mlp_t,
    "normed_sum": _normed_sum,
}


@pytest.mark.representative(when=lambda dtype: dtype == torch.bfloat16)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", READERS)
def test_readers_norm(name: str, dtype: torch.dtype) -> None:
    """Every kernel that reads rows which are not normed yet."""
    shapes, formula, build = READERS[name]()
    widths = {"qkv": COLUMNS, "gate_up": INNER}

    def kernel(t: Tensors) -> tuple[Tensors, Sequence[Launch]]:
        inputs = {**t, "squares": parts(t["h"])} | ({"cos": COS, "sin": SIN} if name == "qkv" else {})
        b = buffers(inputs)
        out = Buffer("out", (BATCH, LENGTH, widths.get(name, WIDTH)), dtype)
        return inputs, [build(b, Rows(b["h"], b["squares"], EPS), out)]

    check({"h": STATE, **shapes}, dtype, lambda t: {"out": formula(t, rms_norm(t["h"], EPS))}, kernel)


@pytest.mark.representative(when=lambda dtype: dtype == torch.bfloat16)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", ["qkv", "mlp_t"])
def test_first_products_add_up_norms(name: str, count: int, dtype: torch.dtype) -> None:
    """The input of an update, some of it normed at its loads, and its sum beside the product."""
    shapes, product, _ = READERS[name]()

    def formula(t: Tensors) -> Tensors:
        h = rms_norm(t["h"], EPS)
        total = rms_norm(t["z"], EPS) + (h + t["x"]) if count == 3 else h
        return {"total": total, "out": product(t, total)}

    def kernel(t: Tensors) -> tuple[Tensors, Sequence[Launch]]:
        inputs = {**t, "h_squares": parts(t["h"])} | ({"cos": COS, "sin": SIN} if name == "qkv" else {})
        if count == 3:
            inputs["z_squares"] = t["z"].float().square().sum(-1, keepdim=True)
        b = buffers(inputs)
        terms, total = [Rows(b["h"], b["h_squares"], EPS)], Buffer("total", STATE, dtype)
        if count == 3:
            terms = [Rows(b["z"], b["z_squares"], EPS), *terms, Rows(b["x"])]
        if name == "qkv":
            out, tile = Buffer("out", (BATCH, LENGTH, COLUMNS), dtype), Tile.of(BLOCK_M=16, BLOCK_N=32, BLOCK_K=16)
            return inputs, [qkv(HEADS, terms, b["weight"], out, cos=b["cos"], sin=b["sin"], total=total, tile=tile)]
        out, tile = Buffer("out", STATE, dtype), Tile.of(BLOCK_C=32, BLOCK_I=16)
        return inputs, [mlp_t(terms, b["up_weight"], b["down_weight"], out, eps=EPS, total=total, tile=tile)]

    check({"h": STATE} | ({"z": STATE, "x": STATE} if count == 3 else {}) | shapes, dtype, formula, kernel)


def test_builders_refuse_squares_that_do_not_fit() -> None:
    t = {"source": (26, INNER), "weight": (WIDTH, INNER), "h": (26, WIDTH), "out": (26, WIDTH)}
    b = {name: Buffer(name, shape, torch.float32) for name, shape in t.items()}
    three, rstd = Buffer("three", (26, 3), torch.float32), Buffer("rstd", (26,), torch.float32)

    def build(part: int, **options: Any) -> Launch:
        tile = Tile.of(BLOCK_M=16, BLOCK_N=part, BLOCK_K=16)
        return projection(b["source"], b["weight"], b["h"], b["out"], eps=EPS, tile=tile, **options)

    with pytest.raises(ValueError, match="squares: got None for 3 column tiles, accepted is 3"):
        build(16)
    with pytest.raises(ValueError, match="squares: got 3 for 2 column tiles, accepted is 2"):
        build(32, squares=three)
    with pytest.raises(ValueError, match="squares: got 3 for 1 column tiles, accepted is None"):
        build(64, squares=three)
    with pytest.raises(ValueError, match="rstd: got a buffer with squares, accepted is None"):
        build(16, squares=three, rstd=rstd)
    with pytest.raises(ValueError, match="sources: got 9, accepted are 1 to 8"):
        normed_rows([Rows(b["h"], three, EPS)] * 9, [b["out"]] * 9, tile=Tile.of(BLOCK_M=16, BLOCK_N=32))


# ---------------------------------------------------------------- whole programs


@pytest.mark.breadth
@pytest.mark.representative(when=lambda name, dtype: dtype == torch.bfloat16 and name in {"trm", "mlp_t"}, rest="grid")
@pytest.mark.spread("name", "dtype")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name, options",
    [
        ("trm", {"num_layers": 2}),
        ("mlp_t", {"token_mixer": "mlp_t", "num_layers": 2}),
        ("urm", {"model": "urm", "channel_mixer": "conv_swiglu", "num_layers": 2}),
        ("hrm", {"model": "hrm"}),
        ("five inner updates", {"L_cycles": 5, "H_cycles": 2}),
        ("long mlp_t", {"token_mixer": "mlp_t", "num_layers": 2, "length": 133, "batch": 1, "L_cycles": 1}),
        ("five blocks", {"model": "urm", "num_layers": 5, "L_cycles": 1}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_programs(name: str, options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of recursions in which every product leaves its norm to the readers."""
    configuration = replace(backend._configuration(DEVICE), fusion="least")
    monkeypatch.setattr(backend, "_configuration", lambda _: configuration)
    case = small(name, **options)
    kernels = {launch.kernel for launch in backend._forward_plan(backend.forward_setting(
        case.problem, DEVICE, dtype, case.batch, case.length), False)}  # fmt: skip
    assert "rows.normed_rows_kernel" in kernels
    seeds = range(5 if dtype == torch.float32 else 2)
    require(check_case(case, dtype, "triton", seeds=seeds, device=DEVICE))


@pytest.mark.breadth
@pytest.mark.representative(when=lambda width, dtype: width == 640 and dtype == torch.float16, rest="grid")
@pytest.mark.spread("width", "dtype")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mixer", ["attention", "mlp_t", "conv_swiglu"])
@pytest.mark.parametrize("width", [640, 768, 1024, 1536, 2560])
def test_wide_rows(width: int, mixer: str, dtype: torch.dtype) -> None:
    """Widths that no program holds in its accumulators."""
    mixers = {"conv_swiglu": {"channel_mixer": mixer}, "mlp_t": {"token_mixer": mixer}}.get(mixer, {})
    heads = {} if mixer == "mlp_t" else {"num_heads": width // 128, "num_kv_heads": 1}
    case = small("wide", "urm", hidden_size=width, length=5, batch=1, L_cycles=1, **heads, **mixers)
    # Five draws: the largest error of one is luck.
    require(check_case(case, dtype, "triton", device=DEVICE))
