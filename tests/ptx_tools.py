"""The executor of PTX on a CPU (tests/ptx), built and called through ctypes.

It runs a kernel's PTX a warp at a time.  Its rules, each a :class:`PtxError` that names the line: every access lies in
a buffer of the launch and is aligned; shared memory is read after it was written; bytes of a ``cp.async`` are touched
after its thread waited; between two barriers no thread touches what another one writes; no two blocks touch the same
bytes unless both read; instructions of a whole warp are executed by all of it.  Memory and registers start as NaN.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

import cuda_tools

__all__ = ["Counts", "Kernels", "Piece", "PtxError", "Schedule", "opcodes"]

PTX = cuda_tools.ROOT / "tests" / "ptx"
FLAGS = ("-std=c++17", "-O2", "-ftree-vectorize", "-fPIC", "-Wall", "-Wextra")
ORDERS = ("forward", "reverse", "random")
MESSAGE_BYTES = 1 << 12


class PtxError(Exception):
    """What the PTX or the running kernel did wrong, and where."""


class Schedule(NamedTuple):
    """The order of blocks and warps: ``"forward"``, ``"reverse"``, both as far as each can run, or ``"random"``."""

    order: str = "forward"
    seed: int = 0


class Piece(NamedTuple):
    """A part of a contiguous tensor that a launch may use, in elements."""

    name: str
    tensor: Tensor
    offset: int
    numel: int
    writable: bool


class Counts(NamedTuple):
    """What a launch executed: operations of warps, and blocks."""

    operations: int
    blocks: int


class _Piece(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("whole", ctypes.c_void_p),
        *((name, ctypes.c_uint64) for name in ("whole_bytes", "offset", "bytes", "bias", "address")),
        ("writable", ctypes.c_int32),
        ("writes", ctypes.c_uint32),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("params", ctypes.c_char_p),
        ("param_bytes", ctypes.c_uint32),
        ("pieces", ctypes.POINTER(_Piece)),
        ("num_pieces", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in ("order", "blocks_share", "truncate_mma")),
        ("resident_blocks", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("seed", "operations", "blocks")),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The executor, compiled on first use; without a C++ compiler the test is skipped."""
    compiler, version = cuda_tools.host_compiler()
    headers, sources = sorted(PTX.glob("*.h")), sorted(PTX.glob("*.cpp"))

    def build(source: Path) -> Path:
        key = cuda_tools.digest(version, *FLAGS, files=[source, *headers])
        return cuda_tools.make(cuda_tools.CACHE / f"ptx-{source.stem}-{key}.o", [compiler, *FLAGS, "-c", str(source)])

    with ThreadPoolExecutor(2) as pool:
        objects = list(map(str, pool.map(build, sources)))
    path = cuda_tools.make(cuda_tools.CACHE / f"ptx-{cuda_tools.digest(*objects)}.so", [compiler, "-shared", *objects])
    found = ctypes.CDLL(str(path))
    found.ptx_load.restype = ctypes.c_void_p
    found.ptx_free.argtypes = [ctypes.c_void_p]
    found.ptx_base.argtypes = [ctypes.c_uint32, ctypes.c_uint64]
    found.ptx_base.restype = ctypes.c_uint64
    found.ptx_kernels.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32]
    found.ptx_run.argtypes = [
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.POINTER(_Launch),
        ctypes.c_char_p,
        ctypes.c_int32,
    ]
    return found


def opcodes() -> set[str]:
    """Every opcode that the executor knows."""
    text = ctypes.create_string_buffer(1 << 18)
    library().ptx_opcodes(text, len(text))
    return set(text.value.decode().split())


class Kernels:
    """The kernels of a PTX module.

    Attributes:
        param_bytes: size of the block of parameters by kernel.

    Raises:
        PtxError: the text holds what the executor does not know.
    """

    def __init__(self, text: str) -> None:
        message = ctypes.create_string_buffer(MESSAGE_BYTES)
        self._library = library()
        self._handle = self._library.ptx_load(text.encode(), message, len(message))
        if not self._handle:
            raise PtxError(message.value.decode())
        text_of_kernels = ctypes.create_string_buffer(1 << 16)
        self._library.ptx_kernels(self._handle, text_of_kernels, len(text_of_kernels))
        rows = (line.split() for line in text_of_kernels.value.decode().splitlines())
        self.param_bytes = {name: int(size) for name, size in rows}

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.ptx_free(self._handle)

    @staticmethod
    def address(index: int, piece: Piece) -> int:
        """The address of the piece at an index, with its alignment if its tensor lies at a multiple of 256 bytes."""
        return int(library().ptx_base(index, _bias(piece)))

    def run(
        self,
        kernel: str,
        grid: Sequence[int],
        threads: int,
        params: bytes,
        pieces: Sequence[Piece],
        schedule: Schedule = Schedule(),  # noqa: B008
        *,
        shared_bytes: int = 0,
        resident_blocks: int = 1,
        blocks_share: bool = False,
        truncate_mma: bool = False,
        addresses: Sequence[int] | None = None,
        written: list[bool] | None = None,
    ) -> Counts:
        """One launch.

        Args:
            kernel: its name.
            grid: blocks along each axis.
            threads: of a block.
            params: the block of parameters.
            pieces: what it may read and write; their addresses are those of :meth:`address`.
            schedule: the order.
            shared_bytes: dynamic shared memory of a block.
            resident_blocks: how many blocks run at a time.
            blocks_share: whether blocks may touch what others write, if a release and an acquire order it.
            truncate_mma: whether ``mma`` rounds its sums to zero, twice.
            addresses: of the pieces, instead of those of :meth:`address`.
            written: if it is a list, whether each piece was written is added to it.

        Raises:
            PtxError: the kernel broke a rule.
        """
        array = (_Piece * max(1, len(pieces)))(
            *(
                _Piece(
                    p.name.encode(),
                    p.tensor.data_ptr(),
                    p.tensor.numel() * p.tensor.itemsize,
                    p.offset * p.tensor.itemsize,
                    p.numel * p.tensor.itemsize,
                    _bias(p),
                    0 if addresses is None else addresses[i],
                    p.writable,
                    0,
                )
                for i, p in enumerate(pieces)
            )
        )
        launch = _Launch(
            (ctypes.c_uint32 * 3)(*grid, *[1] * (3 - len(grid))),
            threads,
            shared_bytes,
            params,
            len(params),
            array,
            len(pieces),
            ORDERS.index(schedule.order),
            blocks_share,
            truncate_mma,
            resident_blocks,
            schedule.seed,
        )
        message = ctypes.create_string_buffer(MESSAGE_BYTES)
        if self._library.ptx_run(self._handle, kernel.encode(), ctypes.byref(launch), message, len(message)):
            raise PtxError(message.value.decode())
        if written is not None:
            written += [piece.writes > 0 for piece in array[: len(pieces)]]
        return Counts(launch.operations, launch.blocks)


def _bias(piece: Piece) -> int:
    return piece.offset * piece.tensor.itemsize % 256
