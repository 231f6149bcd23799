"""The guard zones find what they are there to find, and bfloat16 products are products in the interpreter too."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl
from trmfast.kernels.dot import dot
from trmfast.kernels.plan import Buffer, Launch, Tile

from triton_guard import DEVICE, guarded_run


@triton.jit
def copy(source, target, size, READ: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.arange(0, BLOCK)
    value = tl.load(source + index + READ, mask=index < size)
    tl.store(target + index + WRITE, value, mask=index < size)


@triton.jit
def product(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):  # type: ignore[no-untyped-def]
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + m[:, None] * K + k[None, :])
    right = tl.load(b + k[:, None] * N + n[None, :])
    total = dot(left, right, tl.zeros((M, N), tl.float32), "ieee")
    tl.store(c + m[:, None] * N + n[None, :], total)


@pytest.fixture(autouse=True)
def kernels_here(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("trmfast.kernels.here")
    module.copy, module.product = copy, product  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trmfast.kernels.here", module)


def launch(size: int = 5, read: int = 0, write: int = 0, written: int | None = None) -> Launch:
    source, target = Buffer("source", (size,), torch.float32), Buffer("target", (size,), torch.float32)
    return Launch.of(
        "here.copy",
        (1,),
        {"source": source, "target": target, "size": size if written is None else written},
        reads=["source"],
        writes=["target"],
        constants={"READ": read, "WRITE": write},
        tile=Tile.of(BLOCK=8),
    )


SOURCE = {"source": torch.arange(5.0)}


def test_a_correct_kernel_passes() -> None:
    assert guarded_run([launch()], SOURCE)["target"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "wrong, message",
    [
        (launch(read=1), r"target\[5\]: 1 of 5 elements are NaN"),
        (launch(read=-2), r"target\[5\]: 2 of 5 elements are NaN"),
        (launch(write=1), "target: something was written after it"),
        (launch(write=-1), "target: something was written before it"),
        (launch(written=4), r"target\[5\]: 1 of 5 elements are NaN"),
    ],
    ids=["reads after", "reads before", "writes after", "writes before", "leaves out"],
)
def test_a_wrong_kernel_is_found(wrong: Launch, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        guarded_run([wrong], SOURCE)


def test_a_write_to_what_is_only_read_is_found() -> None:
    good = launch()
    swapped = Launch(**{**vars(good), "reads": ("target",), "writes": ("source",)})
    with pytest.raises(AssertionError, match="target: is only read, and was written"):
        guarded_run([swapped], SOURCE)


def test_pieces_of_a_buffer() -> None:
    whole = Buffer("source", (3, 5), torch.float32)
    target = Buffer("target", (3, 5), torch.float32)
    values = torch.randn(3, 5)
    launches = [
        Launch(**{**vars(launch()), "arguments": (("source", whole[i]), ("target", target[i]), ("size", 5))})
        for i in (0, 2, 1)
    ]
    found = guarded_run(launches, {"source": values})
    assert torch.equal(found["target"].view(3, 5).cpu(), values)


def test_bfloat16_products() -> None:
    """Triton's own product of bfloat16 is wrong in its interpreter; the kernels' is not."""
    a, b = torch.randn(2, 16, 16).to(torch.bfloat16)
    made = Launch.of(
        "here.product",
        (1,),
        {
            "a": Buffer("a", a.shape, a.dtype),
            "b": Buffer("b", b.shape, b.dtype),
            "c": Buffer("c", (16, 16), torch.float32),
        },
        reads=["a", "b"],
        writes=["c"],
        constants={"M": 16, "N": 16, "K": 16},
        tile=Tile.of(),
    )
    found = guarded_run([made], {"a": a, "b": b})["c"]
    torch.testing.assert_close(found, (a.float() @ b.float()).to(DEVICE))
