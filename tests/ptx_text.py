"""Small kernels in PTX for the tests of the executor: one instruction between loads and stores, or any body."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ptx_tools import Kernels, Piece, Schedule

__all__ = ["evaluate", "run_body"]

LANES = 32
_TYPES = {"h": "b16", "r": "b32", "d": "b64", "p": "pred"}

# %t is the thread; %in and %out are the buffers, %ini and %outi their elements of 4 bytes of the thread in the grid.
_KERNEL = """
.version 8.7
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(.param .u64 .ptr .global .align 1 first, .param .u64 .ptr .global .align 1 second)
{{
    .reg .pred %p<40>;
    .reg .b16 %h<40>;
    .reg .b32 %r<60>;
    .reg .b64 %d<40>;
    .reg .b32 %t, %block, %threads, %shared;
    .reg .b64 %in, %out, %ini, %outi, %at;
    mov.u32 %t, %tid.x;
    mov.u32 %block, %ctaid.x;
    mov.u32 %threads, %ntid.x;
    mov.b32 %shared, memory;
    ld.param.b64 %in, [first];
    ld.param.b64 %out, [second];
    mad.lo.s32 %r59, %block, %threads, %t;
    mul.wide.u32 %at, %r59, 4;
    add.s64 %ini, %in, %at;
    add.s64 %outi, %out, %at;
{body}
    ret;
}}
"""


def run_body(
    body: str,
    source: np.ndarray,
    *,
    threads: int = LANES,
    blocks: int = 1,
    size: int | None = None,
    shared_bytes: int = 0,
    schedule: Schedule = Schedule(),  # noqa: B008
    **options: Any,
) -> np.ndarray:
    """The 32-bit numbers that a kernel of this body writes to ``%out``.

    Args:
        body: statements, between those of _KERNEL.
        source: what it finds at ``%in``.
        threads, blocks: of the launch.
        size: numbers at ``%out``, by default one a thread; they start as NaN.
        shared_bytes, schedule, options: as :meth:`Kernels.run` takes them.
    """
    given = torch.from_numpy(np.ascontiguousarray(source).view(np.uint8).copy())
    found = torch.full((threads * blocks if size is None else size,), float("nan"))
    pieces = [Piece("in", given, 0, given.numel(), False), Piece("out", found, 0, found.numel(), True)]
    params = b"".join(Kernels.address(i, piece).to_bytes(8, "little") for i, piece in enumerate(pieces))
    kernels = Kernels(_KERNEL.format(body=body))
    kernels.run("kernel", (blocks,), threads, params, pieces, schedule, shared_bytes=shared_bytes, **options)
    return found.numpy().view(np.uint32)


def evaluate(
    opcode: str, form: str, operands: Sequence[np.ndarray | str], groups: Sequence[int] = (), **options: Any
) -> list[np.ndarray]:
    """What one instruction makes of operands, one of each for every lane of a warp.

    Args:
        opcode: the instruction.
        form: its results and operands: p h r d are predicates and registers of 16, 32 and 64 bits.
        operands: an array of 32 numbers each, or text that stands in the instruction.
        groups: how many registers stand in each pair of braces; by default none do.
        options: as :meth:`Kernels.run` takes them.

    Returns:
        One array of unsigned numbers for each result, of booleans for a predicate.
    """
    results, kinds = form.split("=")
    body, names = [], []
    source = np.zeros((len(operands), LANES), np.uint64)
    for i, (kind, value) in enumerate(zip(kinds, operands, strict=True)):
        if isinstance(value, str):
            names.append(value)
            continue
        size = value.dtype.itemsize
        source[i] = value.astype(np.uint16) if kind == "p" else value.view(f"u{size}")
        names.append(f"%{kind}{i + 1}")
        where = f"[%d38+{256 * i}]"
        if kind == "p":
            body += [f"ld.global.b16 %h{i + 1}, {where};", f"setp.ne.b16 %p{i + 1}, %h{i + 1}, 0;"]
        else:
            body.append(f"ld.global.{_TYPES[kind]} %{kind}{i + 1}, {where};")
    made = [f"%{kind}{30 + i}" for i, kind in enumerate(results)]
    listed = made + names
    if opcode.startswith("shfl") and len(made) == 2:
        listed = [f"{made[0]}|{made[1]}", *names]
    elif groups:
        grouped = []
        for count in groups:
            grouped.append("{" + ", ".join(listed[:count]) + "}" if count > 1 else listed[0])
            listed = listed[count:]
        listed = grouped
    body.append(f"{opcode} {', '.join(listed)};")
    for i, (kind, name) in enumerate(zip(results, made, strict=True)):
        if kind == "p":
            body.append(f"selp.b32 %r{30 + i}, 1, 0, {name};")
            kind, name = "r", f"%r{30 + i}"
        body.append(f"st.global.{_TYPES[kind]} [%d39+{256 * i}], {name};")
    begin = ["mul.wide.u32 %d37, %t, 8;", "add.s64 %d38, %in, %d37;", "add.s64 %d39, %out, %d37;"]
    found = (
        run_body("\n".join(begin + body), source, size=64 * len(results), **options).view(np.uint64).reshape(-1, LANES)
    )
    types = {"p": np.bool_, "h": np.uint16, "r": np.uint32, "d": np.uint64}
    # What lies above a narrow result is what was there before.
    return [
        (row & (2 ** (8 * np.dtype(types[kind]).itemsize) - 1 if kind != "d" else 2**64 - 1)).astype(types[kind])
        for kind, row in zip(results, found, strict=True)
    ]


def opcode_family(opcode: str) -> str:
    """Loads, stores and atomics by what they do, without hints, scope and order; anything else by its name."""
    access = re.fullmatch(r"(ld|st)\.(shared|global|param)(?:\.[\w:]+)??(\.v[24])?\.([busf])(8|16|32|64)", opcode)
    if access:
        return f"{access[1]}.{access[2]}{access[3] or ''}.{access[5]}"
    atomic = re.fullmatch(r"(atom|red)\.(?:\w+\.)*?(\w+)\.([usfb]32)", opcode)
    return f"{atomic[1]}.{atomic[2]}.{atomic[3]}" if atomic else opcode
