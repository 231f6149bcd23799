"""Every forward Triton kernel against the reference, between guard zones of NaN, and the blocks that they make up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from trmfast.kernels.attention import attention
from trmfast.kernels.configurations import INTERPRETER, Configuration, Sizes
from trmfast.kernels.conv_swiglu import conv_projection
from trmfast.kernels.mixer_mlp_t import LONGEST, down_t, gate_up_t, mlp_t, padded_length
from trmfast.kernels.plan import Buffer, Launch, Tile
from trmfast.kernels.projection import block_width, projection
from trmfast.kernels.qkv import qkv
from trmfast.kernels.swiglu import gate_up, swiglu

import triton_guard
from triton_bounds import checked_run
from triton_draw import Tensors, buffers, draw
from triton_formula import DRAWS, DTYPES, EPS
from triton_guard import DEVICE, INTERPRETED, guarded_run
from trmfast import reference
from trmfast.backends import triton as backend
from trmfast.cases import rope_tables
from trmfast.flops import block_flops
from trmfast.reference import rms_norm, rotate, run_block, wide_dtype
from trmfast.spec import BlockSpec
from trmfast.testing import compare, pool, require

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def addresses_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN shows what is read outside of a buffer only where it reaches a result; this shows the rest."""
    monkeypatch.setattr(triton_guard, "run", checked_run)


# From tensors in some dtype to the results that are compared; in that dtype, float32 or float64.
Formula = Callable[[Tensors], Tensors]
# From tensors in the compute dtype to what the launches take and the launches.
Kernel = Callable[[Tensors], tuple[Tensors, Sequence[Launch]]]


def check(
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    formula: Formula,
    kernel: Kernel,
    exact: Sequence[str] = (),
) -> None:
    """Requires of several draws that results are as near to the truth as the policy asks; some equal to eager's."""
    draws = []
    for seed in range(DRAWS):
        drawn = draw(shapes, dtype, seed)
        truth, eager = (formula({k: t.to(d) for k, t in drawn.items()}) for d in (torch.float64, dtype))
        found = guarded_run(*reversed(kernel(drawn)))
        for name in exact:
            assert torch.equal(found[name].cpu(), eager[name]), f"{name} is not rounded as the reference rounds"
        comparisons = []
        for name in truth:
            fused, expected, true = (measured(name, t[name].cpu()) for t in (found, eager, truth))
            # Norm factors are not of order 1, as states are.
            comparisons.append(compare(name, fused, expected.to(fused.dtype), true, is_gradient=name == "rstd"))
        draws.append(comparisons)
    require(pool(draws))


def summed(t: Tensors, terms: int) -> Tensor:
    h = t[f"x{terms - 1}"]
    for i in reversed(range(terms - 1)):
        h = t[f"x{i}"] + h
    return h


def norm_factor(h: Tensor, eps: float = EPS) -> Tensor:
    """What backward needs of a norm over the last axis, float32 in eager PyTorch."""
    return torch.rsqrt(h.to(wide_dtype(h.dtype)).square().mean(-1) + eps)


def measured(name: str, tensor: Tensor) -> Tensor:
    """What is compared: norm factors as their reciprocals, whose errors are those of h however small it is."""
    return tensor.reciprocal() if name == "rstd" else tensor


# ---------------------------------------------------------------- kernels


@pytest.mark.representative(when=lambda width, dtype: dtype == torch.bfloat16 and width in {48, 40})
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, width, length, terms, rope, tile",
    [
        (3, 3, 16, 48, 13, 3, True, Tile.of(BLOCK_M=16, BLOCK_N=64, BLOCK_K=32)),
        (4, 2, 32, 64, 21, 1, True, Tile.of(BLOCK_M=32, BLOCK_N=128, BLOCK_K=64)),
        (2, 1, 24, 40, 9, 2, True, Tile.of(BLOCK_M=32, BLOCK_N=32, BLOCK_K=16)),
        (2, 2, 10, 20, 7, 8, True, Tile.of(BLOCK_M=16, BLOCK_N=32, BLOCK_K=16)),
        (2, 2, 15, 30, 5, 4, False, Tile.of(BLOCK_M=16, BLOCK_N=64, BLOCK_K=32)),
        (2, 2, 16, 32, 1, 1, True, Tile.of(BLOCK_M=16, BLOCK_N=32, BLOCK_K=32)),
    ],
)
def test_qkv(
    heads: int,
    kv_heads: int,
    head_dim: int,
    width: int,
    length: int,
    terms: int,
    rope: bool,
    tile: Tile,
    dtype: torch.dtype,
) -> None:
    batch, columns = 2, (heads + 2 * kv_heads) * head_dim
    block = BlockSpec(width, 16, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    tables = dict(zip(("cos", "sin"), rope_tables(length, head_dim), strict=True)) if rope else {}

    def formula(t: Tensors) -> Tensors:
        total = summed(t, terms)
        out = F.linear(total, t["weight"]).view(batch, length, -1, head_dim)
        if rope:
            q_and_k, v = out.split((heads + kv_heads, kv_heads), 2)
            out = torch.cat([rotate(q_and_k, tables["cos"], tables["sin"]), v], 2)
        return {"out": out.reshape(batch, length, columns), "total": total}

    def kernel(t: Tensors) -> tuple[Tensors, Sequence[Launch]]:
        inputs = {**t, **tables}
        b = buffers(inputs)
        total, out = (Buffer(n, (batch, length, w), dtype) for n, w in (("total", width), ("out", columns)))
        sources = [b[f"x{i}"] for i in range(terms)]
        return inputs, [
            qkv(block, sources, b["weight"], out, cos=b.get("cos"), sin=b.get("sin"), total=total, tile=tile)
        ]

    shapes: dict[str, tuple[int, ...]] = {f"x{i}": (batch, length, width) for i in range(terms)}
    check({**shapes, "weight": (columns, width)}, dtype, formula, kernel, exact=["total"])


@pytest.mark.representative(when=lambda length, causal, dtype: dtype == torch.bfloat16 and length == 45 and causal)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, length, queries, keys",
    [
        (4, 2, 16, 13, 8, 16),
        (2, 2, 32, 45, 32, 16),
        (2, 1, 24, 21, 8, 8),
        (1, 1, 64, 97, 64, 32),
        (2, 2, 16, 1, 16, 16),
    ],
)
def test_attention(
    heads: int, kv_heads: int, head_dim: int, length: int, queries: int, keys: int, causal: bool, dtype: torch.dtype
) -> None:
    batch, width = 2, heads * head_dim
    block = BlockSpec(width, 16, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, causal=causal)

    def formula(t: Tensors) -> Tensors:
        split = t["qkv"].view(batch, length, -1, head_dim).transpose(1, 2).split((heads, kv_heads, kv_heads), 1)
        q, k, v = (s.repeat_interleave(heads // s.shape[1], 1) for s in split)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        scores = (q @ k.mT).to(wide_dtype(q.dtype)) * head_dim**-0.5
        if causal:
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        return {"out": out.transpose(1, 2).reshape(batch, length, width), "lse": scores.logsumexp(-1)}

    def kernel(t: Tensors) -> tuple[Tensors, Sequence[Launch]]:
        out, lse = Buffer("out", (batch, length, width), dtype), Buffer("lse", (batch, heads, length), torch.float32)
        tile = Tile.of(BLOCK_M=queries, BLOCK_N=keys)
        return t, [attention(block, buffers(t)["qkv"], out, lse=lse, tile=tile)]

    check({"qkv": (batch, length, (heads + 2 * kv_heads) * head_dim)}, dtype, formula, kernel)


@pytest.mark.representative(when=lambda rows, dtype: dtype == torch.bfloat16 and rows == 39)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, width, depth", [(39, 48, 80), (16, 64, 32), (1, 20, 12)])
def test_projection(rows: int, width: int, depth: int, dtype: torch.dtype) -> None:
    def formula(t: Tensors) -> Tensors:
        h = t["residual"] + F.linear(t["source"], t["weight"])
        return {"out": rms_norm(h, EPS), "rstd": norm_factor(h)}

    def kernel(t: Tensors) -> tuple[Tensors, Sequence[Launch]]:
        b = buffers(t)
        out, rstd = Buffer("out", (rows, width), dtype), Buffer("rstd", (rows,), torch.float32)
        tile = Tile.of(BLOCK_M=16, BLOCK_N=64, BLOCK_K=32)
        return t, [projection(b["source"], b["weight"], b["residual"], out, eps=EPS, rstd=rstd, tile=tile)]

    check({"source": (rows, depth), "weight": (width, depth), "residual": (rows, width)}, dtype, formula, kernel)


@pytest.mark.representative(when=lambda rows, dtype: dtype == torch.bfloat16 and rows == 39)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fused", [True, False], ids=["one kernel", "two kernels"])
@pytest.mark.parametrize("rows, width, inner", [(39, 48, 80), (1, 64, 32), (5, 20, 24)])
def test_swiglu(rows: int, width: int, inner: int, fused: bool, dtype: torch.dtype) -> None:
    def formula(t: Tensors) -> Tensors:
        h = t["h1"] + reference.swiglu(t["h1"], t["up_weight"], t["down_weight"])
        found = {"out": rms_norm(h, EPS), "rstd": norm_factor(h)}
        return found if fused else {**found, "gates": F.linear(t["h1"], t["up_weight"])}

    def kernel(t: Tensors) -> tuple[Tensors, Sequence[Launch]]:
        b = buffers(t)
        out, rstd = Buffer("out", (rows, width), dtype), Buffer("rstd", (rows,), torch.float32)
        if fused:
            tile = Tile.of(BLOCK_M=16, BLOCK_I=32, BLOCK_K=32)
            return t, [swiglu(b["h1"], b["up_weight"], b["down_weight"], out, eps=EPS, rstd=rstd, tile=tile)]
        act, gates = Buffer("act", (rows, inner), dtype), Buffer("gates", (rows, 2 * inner), dtype)
        whole = Tile.of(BLOCK_M=16, BLOCK_N=64, BLOCK_K=32)
        return t, [
            gate_up(b["h1"], b["up_weight"], act, gates=gates, tile=Tile.of(BLOCK_M=16, BLOCK_I=32, BLOCK_K=32)),
            projection(act, b["down_weight"], b["h1"], out, eps=EPS, rstd=rstd, tile=whole),
        ]

    shapes = {"h1": (rows, width), "up_weight": (2 * inner, width), "down_weight": (width, inner)}
    check(shapes, dtype, formula, kernel)


@pytest.mark.representative(when=lambda taps, dtype: dtype == torch.bfloat16 and taps == 2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch, length, taps", [(3, 7, 2), (2, 21, 3), (5, 1, 2), (2, 3, 4), (1, 5, 1)])
def test_conv_swiglu(batch: int, length: int, taps: int, dtype: torch.dtype) -> None:
    """Tiles of 16 rows lie across the ends of sequences."""
    width, inner = 48, 80

    def formula(t: Tensors) -> Tensors:
        added = reference.conv_swiglu(t["h1"], t["up_weight"], t["conv"], t["bias"], t["down_weight"])
        h = t["h1"] + added
        return {"out": rms_norm(h, EPS), "rstd": norm_factor(h)}

    def kernel(t: Tensors) -> tuple[Tensors, Sequence[Launch]]:
        b = buffers(t)
        act = Buffer("act", (batch, length, inner), dtype)
        out, rstd = Buffer("out", (batch, length, width), dtype), Buffer("rstd", (batch, length), torch.float32)
        return t, [
            gate_up(b["h1"], b["up_weight"], act, tile=Tile.of(BLOCK_M=16, BLOCK_I=32, BLOCK_K=16)),
            conv_projection(
                act, b["conv"], b["bias"], b["down_weight"], b["h1"], out, eps=EPS, rstd=rstd,
                tile=Tile.of(BLOCK_M=16, BLOCK_N=64, BLOCK_K=32),
            ),
        ]  # fmt: skip

    shapes = {
        "h1": (batch, length, width),
        "up_weight": (2 * inner, width),
        "conv": (inner, 1, taps),
        "bias": (inner,),
        "down_weight": (width, inner),
    }
    check(shapes, dtype, formula, kernel)


@pytest.mark.representative(
    when=lambda length, rows, padded, dtype: dtype == torch.bfloat16 and length == 13 and padded == (rows is None)
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["as it is", "padded"])
@pytest.mark.parametrize(
    "length, inner, terms, rows",  # rows of a tile of down_t, or None for the whole mixer in one kernel
    [(13, 40, 3, None), (13, 40, 1, 16), (45, 24, 2, None), (45, 24, 3, 16), (1, 16, 2, None), (1, 16, 2, 16)],
)
def test_mlp_t(length: int, inner: int, terms: int, rows: int | None, padded: bool, dtype: torch.dtype) -> None:
    batch, width = 2, 48
    # With the usual eps the norm of a single element is its sign, and errors are those of elements near zero: luck.
    eps = 1.0 if length == 1 else EPS

    def formula(t: Tensors) -> Tensors:
        total = summed(t, terms)
        h = total.mT + reference.swiglu(total.mT, t["up_weight"], t["down_weight"])
        found = {"out": rms_norm(h, eps).mT, "rstd": norm_factor(h, eps), "total": total}
        return found if rows is None else {**found, "gates": F.linear(total.mT, t["up_weight"]).mT}

    def kernel(t: Tensors) -> tuple[Tensors, Sequence[Launch]]:
        padding = padded_length(length) - length if padded else 0
        inputs = {**t, "up_weight": F.pad(t["up_weight"], (0, padding))}
        b = buffers(inputs)
        sources = [b[f"x{i}"] for i in range(terms)]
        total, out = (Buffer(name, (batch, length, width), dtype) for name in ("total", "out"))
        rstd = Buffer("rstd", (batch, width), torch.float32)
        up, down = b["up_weight"], b["down_weight"]
        if rows is None:
            tile = Tile.of(BLOCK_C=32, BLOCK_I=16)
            return inputs, [mlp_t(sources, up, down, out, eps=eps, total=total, rstd=rstd, tile=tile)]
        act, gates = (Buffer(name, (batch, n * inner, width), dtype) for name, n in (("act", 1), ("gates", 2)))
        wide, deep = Tile.of(BLOCK_I=32, BLOCK_C=32, BLOCK_K=16), Tile.of(BLOCK_L=rows, BLOCK_C=32, BLOCK_K=32)
        return inputs, [
            gate_up_t(sources, up, act, total=total, gates=gates, tile=wide),
            down_t(act, down, total, out, eps=eps, rstd=rstd, tile=deep),
        ]

    shapes: dict[str, tuple[int, ...]] = {f"x{i}": (batch, length, width) for i in range(terms)}
    shapes |= {"up_weight": (2 * inner, length), "down_weight": (length, inner)}
    check(shapes, dtype, formula, kernel, exact=["total"])


# ---------------------------------------------------------------- blocks


# The tiles of published sizes: on a GPU its own, because those of the interpreter take more shared memory than it has.
WHOLE = Configuration(INTERPRETER) if INTERPRETED else backend._configuration(DEVICE)


def block_launches(block: BlockSpec, b: dict[str, Buffer], published: bool) -> list[Launch]:
    """The launches of one block with one input ``h`` and output ``out``, in small tiles or those of published sizes."""
    shape, dtype = b["h"].shape, b["h"].dtype
    batch, length, width = shape
    inner, eps = block.intermediate_size, block.rms_norm_eps
    mid, out = Buffer("mid", shape, dtype), Buffer("out", shape, dtype)
    act = Buffer("act", (batch, length, inner), dtype)
    sizes = Sizes(width, length, dtype, block.head_dim)

    def tile(kernel: str, **small: int) -> Tile:
        blocks = {f"BLOCK_{name}": size for name, size in small.items()}
        return WHOLE.tiles(kernel, sizes)[0] if published else Tile.of(**blocks)

    rows = {"M": 16, "N": block_width(width), "K": 32}
    launches = []
    if block.token_mixer == "attention":
        queries = block.num_heads * block.head_dim
        qkv_out = Buffer("qkv", (batch, length, b["w0"].shape[0]), dtype)
        mixed = Buffer("mixed", (batch, length, queries), dtype)
        tables = {"cos": b["cos"], "sin": b["sin"]}
        launches += [
            qkv(block, [b["h"]], b["w0"], qkv_out, **tables, tile=tile("qkv", M=16, N=32, K=32)),
            attention(block, qkv_out, mixed, tile=tile("attention", M=16, N=32)),
            projection(mixed, b["w1"], b["h"], mid, eps=eps, tile=tile("projection", **rows)),
        ]
    else:
        launches.append(mlp_t([b["h"]], b["w0"], b["w1"], mid, eps=eps, tile=tile("mlp_t", C=16, I=16)))
    if block.channel_mixer == "conv_swiglu":
        launches.append(gate_up(mid, b["w2"], act, tile=tile("gate_up", M=16, I=32, K=32)))
        launches.append(
            conv_projection(act, b["w3"], b["w4"], b["w5"], mid, out, eps=eps, tile=tile("conv_projection", **rows))
        )
    elif not published or WHOLE.offers("swiglu", sizes):
        launches.append(swiglu(mid, b["w2"], b["w3"], out, eps=eps, tile=tile("swiglu", M=16, I=16, K=32)))
    else:
        launches.append(gate_up(mid, b["w2"], act, tile=tile("gate_up")))
        launches.append(projection(act, b["w3"], mid, out, eps=eps, tile=tile("projection")))
    return launches


BLOCKS = {
    "attention": BlockSpec(48, 80, num_heads=3),
    "causal-grouped": BlockSpec(64, 80, num_heads=4, num_kv_heads=2, causal=True),
    "mlp_t": BlockSpec(48, 80, "mlp_t", seq_len=13, seq_intermediate_size=40),
    "urm": BlockSpec(48, 80, channel_mixer="conv_swiglu", num_heads=3),
    "attention-512": BlockSpec(512, 1536, num_heads=8),
    "mlp_t-512": BlockSpec(512, 1536, "mlp_t", seq_len=97, seq_intermediate_size=512),
}


@pytest.mark.breadth
@pytest.mark.representative(
    when=lambda name, dtype: "512" not in name or (name == "attention-512" and dtype == torch.bfloat16), rest="grid"
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_block(name: str, dtype: torch.dtype) -> None:
    """Whole blocks, and two of the published size."""
    block = BLOCKS[name]
    published = block.hidden_size == 512
    batch, length = (1, 97) if published else (3, 13)
    cos, sin = rope_tables(length, block.head_dim or 2)

    def formula(t: Tensors) -> Tensors:
        weights = [t[f"w{i}"] for i in range(len(block.weight_shapes))]
        return {"out": run_block(block, t["h"], weights, cos, sin)}

    def kernel(t: Tensors) -> tuple[Tensors, Sequence[Launch]]:
        inputs = {**t, "cos": cos, "sin": sin} if block.token_mixer == "attention" else dict(t)
        launches = block_launches(block, buffers(inputs), published)
        assert sum(launch.flops for launch in launches) == batch * block_flops(block, length)
        return inputs, launches

    def scaled(t: Tensors) -> Tensors:
        return {k: v * (v.shape[-1] ** -0.5 if k[0] == "w" and v.dim() == 2 else 1) for k, v in t.items()}

    shapes: dict[str, tuple[int, ...]] = {"h": (batch, length, block.hidden_size)}
    shapes |= {f"w{i}": shape for i, shape in enumerate(block.weight_shapes.values())}
    check(shapes, dtype, lambda t: formula(scaled(t)), lambda t: kernel(scaled(t)))


# ---------------------------------------------------------------- builders


def test_builders_refuse_what_kernels_cannot_do() -> None:
    block = BlockSpec(48, 80, num_heads=3, head_dim=15)
    h, weight = Buffer("h", (2, 129, 48), torch.float32), Buffer("weight", (135, 48), torch.float32)
    out, table = Buffer("out", (2, 129, 135), torch.float32), Buffer("table", (129, 15), torch.float32)
    tile = Tile.of(BLOCK_M=16, BLOCK_N=32, BLOCK_K=16)
    with pytest.raises(ValueError, match="head_dim: got 15 with cos and sin, accepted are even numbers"):
        qkv(block, [h], weight, out, cos=table, sin=table, tile=tile)
    for terms in ([], [h] * 9):
        with pytest.raises(ValueError, match=f"terms: got {len(terms)}, accepted are 1 to 8"):
            qkv(block, terms, weight, out, tile=tile)
    up, down = Buffer("up", (32, 192), torch.float32), Buffer("down", (129, 16), torch.float32)
    with pytest.raises(ValueError, match=f"terms: got length 129, accepted are lengths up to {LONGEST}"):
        mlp_t([h], up, down, h, eps=EPS, tile=Tile.of(BLOCK_C=16, BLOCK_I=16))


def test_padded_rows_allow_loads_of_16_bytes_without_masks() -> None:
    assert [padded_length(length) for length in (1, 12, 81, 97, 128, 129, 916)] == [16, 16, 128, 128, 128, 192, 960]
