"""Forward kernels over tensors of more than 2^31 elements, by construction: memory that is mapped but not touched."""

from __future__ import annotations

import mmap
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from trmfast.kernels.attention import attention
from trmfast.kernels.conv_swiglu import conv_projection
from trmfast.kernels.mixer_mlp_t import down_t, gate_up_t, mlp_t
from trmfast.kernels.plan import Buffer, Launch, Tile, run
from trmfast.kernels.projection import projection
from trmfast.kernels.qkv import qkv
from trmfast.kernels.swiglu import gate_up, swiglu

from triton_draw import buffers, draw
from triton_guard import INTERPRETED, guarded_run
from trmfast.cases import rope_tables
from trmfast.spec import BlockSpec

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = 1e-5
LENGTH, WIDTH, INNER = 16, 32, 16


def launch_over(name: str, batch: int, small: dict[str, Buffer]) -> Launch:
    """A launch whose last program makes the whole last sequence of ``out``."""

    def tokens(buffer: str, columns: int) -> Buffer:
        return Buffer(buffer, (batch, LENGTH, columns), torch.float16)

    block = BlockSpec(WIDTH, INNER, num_heads=1, head_dim=16)
    h, y, act, out = tokens("h", WIDTH), tokens("y", WIDTH), tokens("act", INNER), tokens("out", WIDTH)
    act_t = Buffer("act", (batch, INNER, WIDTH), torch.float16)
    out_t = Buffer("out", (batch, INNER, WIDTH), torch.float16)
    rows = Tile.of(BLOCK_M=16, BLOCK_N=WIDTH, BLOCK_K=16)
    inner = Tile.of(BLOCK_M=16, BLOCK_I=16, BLOCK_K=16)
    channels = Tile.of(BLOCK_C=32, BLOCK_I=16)
    up, down = small["up"], small["down"]
    if name == "qkv":
        tile = Tile.of(BLOCK_M=16, BLOCK_N=64, BLOCK_K=16)
        tables = {"cos": small["cos"], "sin": small["sin"]}
        return qkv(block, [h, y], small["qkv"], tokens("out", 48), total=tokens("total", WIDTH), tile=tile, **tables)
    if name == "attention":
        return attention(block, tokens("act", 48), tokens("out", 16), tile=Tile.of(BLOCK_M=16, BLOCK_N=16))
    if name == "projection":
        return projection(act, down, h, out, eps=EPS, tile=rows)
    if name == "swiglu":
        return swiglu(h, up, down, out, eps=EPS, tile=inner)
    if name == "gate_up":
        return gate_up(h, up, tokens("out", INNER), gates=tokens("gates", 2 * INNER), tile=inner)
    if name == "conv_projection":
        return conv_projection(act, small["conv"], small["bias"], down, h, out, eps=EPS, tile=rows)
    if name == "mlp_t":
        return mlp_t([h, y], small["up_t"], small["down_t"], out, eps=EPS, total=tokens("total", WIDTH), tile=channels)
    if name == "gate_up_t":
        gates = Buffer("gates", (batch, 2 * INNER, WIDTH), torch.float16)
        tile = Tile.of(BLOCK_I=16, BLOCK_C=32, BLOCK_K=16)
        return gate_up_t([h, y], small["up_t"], out_t, total=tokens("total", WIDTH), gates=gates, tile=tile)
    return down_t(act_t, small["down_t"], h, out, eps=EPS, tile=Tile.of(BLOCK_L=8, BLOCK_C=32, BLOCK_K=16))


def untouched(elements: int) -> Tensor:
    """float16 in memory that is mapped and not used before it is touched, as is as much as 2^31 elements before it."""
    size = 2 * (2**31 + elements)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
    return torch.frombuffer(memory, dtype=torch.float16)[2**31 :]


@pytest.mark.skipif(not INTERPRETED, reason="runs a single program, which only the interpreter can")
@pytest.mark.parametrize(
    "name",
    ["qkv", "attention", "projection", "swiglu", "gate_up", "conv_projection", "mlp_t", "gate_up_t", "down_t"],
)
def test_offsets_beyond_32_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last sequence of tensors of more than 2^31 elements comes out as it does alone."""
    from triton.runtime import interpreter

    shapes: dict[str, tuple[int, ...]]
    shapes = {"up": (2 * INNER, WIDTH), "down": (WIDTH, INNER), "up_t": (2 * INNER, LENGTH), "down_t": (LENGTH, INNER)}
    shapes |= {"qkv": (48, WIDTH), "conv": (INNER, 1, 2), "bias": (INNER,)}
    weights = draw(shapes, torch.float16) | dict(zip(("cos", "sin"), rope_tables(LENGTH, 16), strict=True))
    alone = launch_over(name, 1, buffers(weights))
    read = {buffer.name: buffer for buffer in alone.buffers(alone.reads)}
    states = draw({n: buffer.shape for n, buffer in read.items() if n not in weights}, torch.float16, 1)
    expected = guarded_run([alone], {n: {**weights, **states}[n] for n in read})

    batch = 2**31 // (LENGTH * 16) + 2  # the narrowest tensor has 16 columns
    huge = launch_over(name, batch, buffers(weights))
    tensors = {n: weights[n].contiguous() for n in read if n in weights}
    for buffer in huge.buffers((*huge.reads, *huge.writes)):
        if buffer.name not in weights:
            assert buffer.numel > 2**31
            tensors[buffer.name] = untouched(buffer.numel)
            if buffer.name in states:
                tensors[buffer.name].view(buffer.shape)[-1] = states[buffer.name]
    last = interpreter.TensorHandle(np.array([huge.grid[0] - 1], dtype=np.int32), tl.int32)
    monkeypatch.setattr(interpreter.interpreter_builder, "create_get_program_id", lambda _: last)
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)  # it would copy all
    run([replace(huge, grid=(1,))], tensors)
    for buffer in huge.buffers(huge.writes):
        found = tensors[buffer.name].view(buffer.shape)[-1]
        assert torch.equal(found, expected[buffer.name].view(found.shape)), buffer.name
