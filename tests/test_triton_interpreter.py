"""Where Triton's interpreter differs from a device, and that the kernels keep clear of it."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl
from torch.nn import functional as F
from trmfast.kernels.dot import dot, narrow
from trmfast.kernels.plan import Buffer, Launch, Tile

from triton_draw import Tensors, buffers, draw
from triton_guard import INTERPRETED, guarded_run

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not INTERPRETED, reason="Triton compiles here, and the traps are the interpreter's"),
]


@triton.jit
def plain(a, b, product, rounded, SIZE: tl.constexpr, TRAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """A product and a conversion as one would write them, or as the kernels do."""
    index = tl.arange(0, SIZE)
    at = index[:, None] * SIZE + index[None, :]
    left, right = tl.load(a + at), tl.load(b + at)
    zero = tl.zeros((SIZE, SIZE), tl.float32)
    if TRAP:
        tl.store(product + at, tl.dot(left, right, zero))
        tl.store(rounded + at, (left.to(tl.float32) * 1.01).to(tl.bfloat16))
    else:
        tl.store(product + at, dot(left, right, zero, "ieee"))
        tl.store(rounded + at, narrow(left.to(tl.float32) * 1.01, tl.bfloat16))


def test_the_traps_of_the_interpreter_exist_and_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("trmfast.kernels.here")
    module.plain = plain  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trmfast.kernels.here", module)
    tensors = draw({"a": (16, 16), "b": (16, 16)}, torch.bfloat16)
    shape = (16, 16)
    product = tensors["a"].float() @ tensors["b"].float()
    rounded = (tensors["a"].float() * torch.tensor(1.01)).to(torch.bfloat16)

    def results(trap: bool) -> Tensors:
        out = {"product": Buffer("product", shape, torch.float32), "rounded": Buffer("rounded", shape, torch.bfloat16)}
        launch = Launch.of(
            "here.plain",
            (1,),
            {**buffers(tensors), **out},
            reads=("a", "b"),
            writes=("product", "rounded"),
            constants={"SIZE": 16, "TRAP": trap},
            tile=Tile.of(),
        )
        return guarded_run([launch], tensors)

    closed, trap = results(False), results(True)
    torch.testing.assert_close(closed["product"], product)
    assert torch.equal(closed["rounded"], rounded)
    assert (trap["product"] - product).abs().min() > 1e6, "tl.dot of bfloat16 is right now: dot can go"
    assert (trap["rounded"] != rounded).sum() > 64, "conversion to bfloat16 rounds now: narrow can go"


def test_rounding_of_every_kind_of_number() -> None:
    """Ties, carries into the exponent, infinities and NaN round as PyTorch rounds them."""
    bits = torch.arange(0x3F7F0000, 0x3F830000, 0x101, dtype=torch.int32)
    ties = torch.arange(0x3FFE8000, 0x40038000, 0x8000, dtype=torch.int32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, -1.9999, 65504.0])
    values = torch.cat([bits.view(torch.float32), -ties.view(torch.float32), special])
    size = triton.next_power_of_2(len(values))
    values = F.pad(values, (0, size - len(values)))
    found = torch.empty(size, dtype=torch.bfloat16)
    convert[(1,)](values, found, size)
    torch.testing.assert_close(found, values.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


@triton.jit
def convert(source, target, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.arange(0, SIZE)
    tl.store(target + index, narrow(tl.load(source + index), target.dtype.element_ty))
