"""Plans of Triton launches as PTX for sm_80, compiled without a GPU and executed on this CPU (tests/ptx_tools.py)."""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

from torch import Tensor
from trmfast.kernels.plan import Buffer, Launch, resolve

from benchmarks.offline.triton import Job, specialise
from ptx_tools import Kernels, Piece, Schedule

__all__ = ["ARCHITECTURE", "Executor", "LaunchPtx", "Recorded"]

ARCHITECTURE = "sm_80"
_FORMATS = {"i32": "i", "i64": "q", "fp32": "f"}


@dataclass(frozen=True)
class LaunchPtx:
    """A launch as PTX.

    Attributes:
        ptx: the text.
        name: of the kernel in it.
        threads, shared_bytes: of a block.
        signature: types of the arguments by name, as Triton gives them.
    """

    ptx: str
    name: str
    threads: int
    shared_bytes: int
    signature: Mapping[str, Any]


def compile_launch(launch: Launch) -> LaunchPtx:
    """Compiles in this process, in which Triton must not interpret, what Triton would compile when it launches."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = resolve(launch.kernel)
    signature, constants, attributes = specialise(launch, function.params, amd=False)
    made = triton.compile(
        ASTSource(function, signature, constants, attributes),
        target=GPUTarget("cuda", 80, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )
    metadata = made.metadata
    assert metadata.global_scratch_size == metadata.profile_scratch_size == 0, "a kernel that needs scratch memory"
    return LaunchPtx(made.asm["ptx"], metadata.name, 32 * metadata.num_warps, metadata.shared, signature)


@dataclass(frozen=True)
class Recorded:
    """A launch with the tensors that it uses, as it found them."""

    launch: Launch
    compiled: LaunchPtx
    tensors: Mapping[str, Tensor]


@dataclass
class Executor:
    """Compiles and runs launches; use as a context.

    Attributes:
        schedule: the order in which blocks and warps run.
        truncate_mma: whether products round to zero.
        recorded: if it is a list, launches are added to it before they run.
        operations, blocks: what was executed so far.
        launches: how often each kernel ran, by its name.
        programs: the distinct programs that ran.
    """

    schedule: Schedule = field(default_factory=Schedule)
    truncate_mma: bool = False
    recorded: list[Recorded] | None = None
    operations: int = 0
    blocks: int = 0
    launches: Counter[str] = field(default_factory=Counter)
    programs: set[tuple[Any, ...]] = field(default_factory=set)
    _compiled: dict[tuple[Any, ...], LaunchPtx] = field(default_factory=dict)
    _loaded: dict[str, Kernels] = field(default_factory=dict)
    _pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def compile(self, launches: Iterable[Launch]) -> None:
        """Compiles those that are not, in processes of their own: this one may interpret."""
        missing: dict[tuple[Any, ...], Launch] = {}
        for launch in launches:
            key = Job(launch, "", ARCHITECTURE).key
            if key not in self._compiled:
                missing.setdefault(key, launch)
        if not missing:
            return
        interpret = os.environ.pop("TRITON_INTERPRET", None)
        try:
            if self._pool is None:
                self._pool = ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn"))
            self._compiled.update(zip(missing, self._pool.map(compile_launch, missing.values()), strict=True))
        finally:
            if interpret is not None:
                os.environ["TRITON_INTERPRET"] = interpret

    def run(self, launches: Iterable[Launch], tensors: Mapping[str, Tensor]) -> None:
        """As :func:`trmfast.kernels.plan.run`."""
        launches = list(launches)
        self.compile(launches)
        for launch in launches:
            key = Job(launch, "", ARCHITECTURE).key
            compiled = self._compiled[key]
            if self.recorded is not None:
                used = {buffer.name for buffer in launch.buffers((*launch.reads, *launch.writes))}
                self.recorded.append(Recorded(launch, compiled, {name: tensors[name].clone() for name in used}))
            self._launch(launch, compiled, compiled.ptx, tensors)
            self.launches[compiled.name] += 1
            self.programs.add(key)

    def again(self, record: Recorded, text: str, schedule: Schedule) -> dict[str, Tensor]:
        """Runs a recorded launch once more, with other PTX; returns what it writes, by the names of its arguments."""
        self.schedule = schedule
        tensors = {name: tensor.clone() for name, tensor in record.tensors.items()}
        self._launch(record.launch, record.compiled, text, tensors)
        written = {name: buffers for name in record.launch.writes for buffers in record.launch.buffers([name])}
        return {name: buffer.of(tensors[buffer.name]).float() for name, buffer in written.items()}

    def _launch(self, launch: Launch, compiled: LaunchPtx, text: str, tensors: Mapping[str, Tensor]) -> None:
        if text not in self._loaded:
            self._loaded[text] = Kernels(text)
        params, pieces = pack(launch, compiled, tensors)
        counts = self._loaded[text].run(
            compiled.name,
            launch.grid,
            compiled.threads,
            params,
            pieces,
            self.schedule,
            shared_bytes=compiled.shared_bytes,
            truncate_mma=self.truncate_mma,
        )
        self.operations += counts.operations
        self.blocks += counts.blocks

    def __str__(self) -> str:
        return (
            f"PTX executed: {len(self.programs)} programs of {len(self.launches)} kernels, "
            f"{self.launches.total()} launches, {self.blocks} blocks, {self.operations} instructions of warps"
        )


def pack(launch: Launch, compiled: LaunchPtx, tensors: Mapping[str, Tensor]) -> tuple[bytes, list[Piece]]:
    """The block of parameters, and the buffers that it points to: no more than the launch says that it uses."""
    params = b""
    pieces: list[Piece] = []
    arguments = dict(launch.arguments)

    def add(name: str, kind: Any, value: Any) -> None:
        nonlocal params
        if isinstance(kind, tuple):
            for one_kind, one in zip(kind, value, strict=True):
                add(name, one_kind, one)
        elif kind.startswith("*"):
            assert isinstance(value, Buffer)
            tensor = tensors[value.name]
            piece = Piece(f"{name} ({value.name})", tensor, value.offset, value.numel, name in launch.writes)
            assert piece.writable or name in launch.reads, f"{launch.kernel}: {name} is neither read nor written"
            append("Q", Kernels.address(len(pieces), piece))
            pieces.append(piece)
        elif kind != "constexpr":
            append(_FORMATS[kind], value)

    def append(form: str, value: Any) -> None:
        nonlocal params
        params += b"\0" * (-len(params) % struct.calcsize(form)) + struct.pack(form, value)

    for name, kind in compiled.signature.items():
        add(name, kind, arguments.get(name))
    append("Q", 0)  # scratch memory, of which no kernel has any
    append("Q", 0)
    return params, pieces
