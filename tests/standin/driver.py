"""The CUDA engine itself on the stand-in: its host code over a CUDA runtime without a driver, its kernels as PTX.

csrc/cuda is compiled by nvcc for sm_80 and linked to ``cudart.cpp``; a launch becomes work of the stream it was given,
and tests/ptx executes its PTX over the blocks of memory to which its parameters point.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import cuda_tools
from ptx_tools import Counts, Kernels, Piece, Schedule
from standin.memory import Block, HazardError
from standin.runtime import Runtime

__all__ = ["Driver", "build"]

RUNTIME = Path(__file__).with_name("cudart.cpp")
ELEMENTS = ("bf16", "fp16")
INVALID_VALUE, LAUNCH_FAILURE = 1, 719
WORD = 8


class _Launch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char_p),
        *((name, ctypes.c_uint32) for name in ("grid", "threads", "cooperative")),
        *((name, ctypes.c_uint64) for name in ("shared_bytes", "stream")),
        ("params", ctypes.c_void_p),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.POINTER(_Launch))


class _Device(ctypes.Structure):
    _fields_ = [
        ("launch", _Callback),
        *((name, ctypes.c_int32) for name in ("major", "minor", "shared_bytes", "multiprocessors", "resident")),
    ]


def build(instances: Sequence[tuple[int, ...]]) -> Path:
    """The extension with some instances of the kernel (csrc/cuda/instances.h), for sm_80 as PTX alone.

    Without nvcc the test is skipped, or fails if TRMFAST_REQUIRE_NVCC=1.
    """
    import pybind11

    nvcc, (compiler, host) = cuda_tools.nvcc(), cuda_tools.host_compiler()
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    listed = " ".join(f"X({', '.join(map(str, one))})" for one in instances)
    texts = {file.name: file.read_text() for file in cuda_tools.CUDA.iterdir() if file.is_file()}
    texts["instances.h"] = f"#pragma once\n#define TRMFAST_INSTANCES(X) {listed}\n"
    copy = cuda_tools.CACHE / f"cuda-{cuda_tools.digest(*(part for item in sorted(texts.items()) for part in item))}"
    copy.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (copy / name).write_text(text)
    common = ["-std=c++17", "-O2", "-DNDEBUG", f"-I{copy}"]
    code = ["-gencode=arch=compute_80,code=compute_80", "--no-compress", "-Xcompiler=-fPIC", f"-ccbin={compiler}"]
    toolkit = _toolkit(nvcc)
    headers = [
        *("-isystem", str(toolkit / "include"), "-isystem", pybind11.get_include()),
        *("-isystem", sysconfig.get_paths()["include"]),
    ]
    key = cuda_tools.digest(version, host, *common, *code, files=[RUNTIME])

    def device(element: str) -> Path:
        words = [nvcc, *common, *code, f"-DTRMFAST_ELEMENT={element}", "-c", str(copy / "launch.cu")]
        return cuda_tools.make(cuda_tools.CACHE / f"launch_{element}-{key}.o", words)

    def plain(file: Path) -> Path:
        words = [compiler, *common, "-fPIC", '-DTRMFAST_ARCHITECTURES="sm_80"', *headers, "-c", str(file)]
        return cuda_tools.make(cuda_tools.CACHE / f"{file.stem}-{key}.o", words)

    with ThreadPoolExecutor(2) as pool:
        objects = [*pool.map(device, ELEMENTS), *pool.map(plain, (copy / "module.cpp", RUNTIME))]
    return cuda_tools.make(cuda_tools.CACHE / f"_cuda-{key}.so", [compiler, "-shared", *map(str, objects)])


@functools.cache
def _toolkit(nvcc: str) -> Path:
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    top = next(line.split("TOP=", 1)[1] for line in dry.splitlines() if "TOP=" in line)
    return Path(top).resolve()


@functools.cache
def _load(path: Path) -> tuple[ModuleType, ctypes.CDLL]:
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    library = ctypes.CDLL(str(path))
    library.standin_ptx.restype = ctypes.c_char_p
    return module, library


class Driver:
    """Runs the launches of an extension on a stand-in.

    Args:
        runtime: the stand-in.
        path: of :func:`build`.

    Attributes:
        module: in the place of ``trmfast._cuda``.
        schedule, truncate_mma: as :meth:`Kernels.run` takes them.
        one_by_one: whether blocks of cooperative launches run as those of any launch, one after the other.
        launches: names of the kernels that ran.
        counts: what was executed.
        error: what a kernel did wrong; the launch then fails.
    """

    def __init__(self, runtime: Runtime, path: Path) -> None:
        self.runtime, self.schedule, self.truncate_mma = runtime, Schedule(), False
        self.module, self._library = _load(path)
        self.one_by_one = False
        self.launches: list[str] = []
        self.counts = Counts(0, 0)
        self.error: Exception | None = None
        self._callback = _Callback(self._launch)
        self.set_device()
        self._texts = [self._library.standin_ptx(i).decode() for i in range(self._library.standin_modules())]
        assert all(text.lstrip().startswith(("//", ".version")) for text in self._texts), "no PTX in the fat binary"
        self._kernels = [_loaded(text) for text in self._texts]

    def set_device(self, shared_bytes: int = 163 << 10, multiprocessors: int = 8) -> None:
        """What the runtime says of the device, on each of whose multiprocessors one block runs."""
        self._device = _Device(self._callback, *self.runtime.capability, shared_bytes, multiprocessors, 1)
        self._library.standin_set_device(ctypes.byref(self._device))

    def plant(self, change: Any) -> int:
        """Changes the PTX; returns how many modules that changed."""
        changed = [change(text) for text in self._texts]
        self._kernels = [_loaded(text) for text in changed]
        return sum(a != b for a, b in zip(changed, self._texts, strict=True))

    def fail_next(self, function: str) -> None:
        """Makes the next call of a function of the runtime fail."""
        self._library.standin_fail_next(function.encode())

    @property
    def last_error(self) -> int:
        """What ``cudaGetLastError`` would give."""
        return int(self._library.standin_last_error())

    def _launch(self, request: Any) -> int:
        launch = request.contents
        try:
            self._run(launch)
        except Exception as error:  # must not pass through C++: the caller raises it again
            self.error = self.error or error
            return LAUNCH_FAILURE
        return 0

    def _run(self, launch: Any) -> None:
        name = launch.kernel.decode()
        kernels = next(k for k in self._kernels if name in k.param_bytes)
        params = ctypes.string_at(launch.params, kernels.param_bytes[name])
        stream = self.runtime.streams.get(launch.stream)
        if stream is None:
            raise HazardError(f"{launch.stream} is no stream")
        if stream.device_index != self.runtime.current_device():
            raise HazardError(f"{name}: launched on {stream}, cuda:{self.runtime.current_device()} is current")
        blocks = self._blocks(params)
        pieces = [_piece(f"buffer {i}", block.begin, block.size, block.storage) for i, block in enumerate(blocks)]
        pinned = [word for word in _words(params) if word in self.runtime.pinned]
        pieces += [_host_piece(address) for address in dict.fromkeys(pinned)]
        at = [block.begin for block in blocks] + list(dict.fromkeys(pinned))

        def work() -> list[bool]:
            written: list[bool] = []
            counts = kernels.run(
                *(name, (launch.grid,), launch.threads, params, pieces, self.schedule),
                shared_bytes=launch.shared_bytes,
                resident_blocks=launch.grid if launch.cooperative and not self.one_by_one else 1,
                blocks_share=True,
                truncate_mma=self.truncate_mma,
                addresses=at,
                written=written,
            )
            self.counts = Counts(*(a + b for a, b in zip(self.counts, counts, strict=True)))
            self.launches.append(name)
            return written

        stream.advance()
        if stream.capture is not None:
            stream.capture.add(work, [(block, True, True) for block in blocks])
            return
        written = work()
        for block, writes in zip(blocks, written, strict=False):
            block.touch(stream, read=not writes, write=writes)

    def _blocks(self, params: bytes) -> list[Block]:
        """The blocks of memory to which words of the parameters point."""
        found: dict[int, Block] = {}
        for word in _words(params):
            try:
                block = self.runtime.memory.at(word)
            except HazardError:
                continue
            if block.device != self.runtime.current_device():
                raise HazardError(f"a kernel uses {block}, cuda:{self.runtime.current_device()} is current")
            found[block.begin] = block
        return list(found.values())


@functools.cache
def _loaded(text: str) -> Kernels:
    return Kernels(text)


def _words(params: bytes) -> list[int]:
    return [int.from_bytes(params[i : i + WORD], "little") for i in range(0, len(params) - WORD + 1, WORD)]


def _piece(name: str, begin: int, size: int, storage: torch.UntypedStorage) -> Piece:
    whole: Tensor = torch.empty(0, dtype=torch.uint8).set_(storage)
    assert whole.data_ptr() == begin
    return Piece(name, whole, 0, size, True)


def _host_piece(address: int) -> Piece:
    """A word of pinned memory."""
    array = (ctypes.c_uint8 * 4).from_address(address)
    return Piece("pinned", torch.frombuffer(array, dtype=torch.uint8), 0, 4, True)
