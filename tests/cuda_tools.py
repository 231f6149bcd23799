"""Builds CUDA sources twice: with the host compiler on the SIMT emulator (tests/simt), and with nvcc.

Results are kept under build/simt, named by a hash of everything they depend on.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.offline.cuda import find_cuobjdump, find_nvcc

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"
SIMT = ROOT / "tests" / "simt"
CACHE = ROOT / "build" / "simt"
EMULATOR = [SIMT / f"{name}.cpp" for name in ("access", "collectives", "fiber", "machine", "memory")]
INCLUDES = [f"-I{CUDA}", f"-I{ROOT / 'tests'}", f"-I{SIMT}"]

VARIANTS = {
    "plain": ("-O2",),
    "ucontext": ("-O2", "-DTRMFAST_SIMT_UCONTEXT"),
    "sanitized": ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
}


def skip_or_fail(reason: str, required_by: str) -> None:
    """A missing tool is a skip; with the environment variable `required_by` set to 1 it is a failure."""
    if os.environ.get(required_by) == "1":
        pytest.fail(f"{required_by}=1: {reason}")
    pytest.skip(reason)


def digest(*parts: str, files: Sequence[Path] = ()) -> str:
    """Names a build by everything it depends on."""
    found = hashlib.sha256("\0".join(parts).encode())
    for file in files:
        found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:16]


def _headers(of_emulator: bool = False) -> list[Path]:
    """What a source may include; the emulator includes nothing of the kernels but the primitives."""
    kernels = CUDA.glob("primitives*.cuh") if of_emulator else [*CUDA.glob("*.h"), *CUDA.glob("*.cuh")]
    return sorted([*kernels, *SIMT.glob("*.h"), *SIMT.glob("*.cuh")])


def make(output: Path, command: Sequence[str]) -> Path:
    """Runs the command, which writes the file appended to it, unless the file is there; a warning is an error.

    A process that finds another at it (``pytest -n``) waits for the other's file.
    """
    if output.exists():
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.with_suffix(f"{output.suffix}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if output.exists():
            return output
        with tempfile.TemporaryDirectory(dir=output.parent) as folder:
            made = Path(folder) / output.name
            done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr + done.stdout
            assert "warning" not in done.stderr, done.stderr
            os.replace(made, output)
    return output


@functools.cache
def host_compiler() -> tuple[str, str]:
    """The C++ compiler and its version; skips the test where there is none."""
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["g++", "clang++"]:
        path = shutil.which(name)
        if path is not None:
            return path, subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    pytest.skip("no C++ compiler on this machine")


def build_emulated(
    sources: Sequence[Path], *, variant: str = "plain", options: Sequence[str] = (), shared: bool = False
) -> Path:
    """A program, or a shared library, of the sources and the emulator.

    Args:
        sources: .cpp files that include kernels and simt.h; they find csrc/cuda, tests and tests/simt.
        variant: a key of VARIANTS.
        options: of the compiler, for the sources alone; the emulator's objects serve every library of a variant.
    """
    compiler, version = host_compiler()
    flags = ["-std=c++17", "-fPIC", "-Wall", "-Wextra", *VARIANTS[variant]]
    objects = []
    for source in [*EMULATOR, *sources]:
        own = list(options) if source in sources else []
        key = digest(version, *flags, *own, str(source), files=[source, *_headers(source in EMULATOR)])
        command = [compiler, *flags, *own, *INCLUDES, "-c", str(source)]
        objects.append(make(CACHE / f"{source.stem}-{variant}-{key}.o", command))
    name = f"{Path(sources[0]).stem}-{digest(str(shared), *map(str, objects))}{'.so' if shared else ''}"
    link = [compiler, *VARIANTS[variant], *(["-shared"] if shared else []), *map(str, objects)]
    return make(CACHE / name, link)


def nvcc() -> str:
    """The path of nvcc.  Without it or cuobjdump the test is skipped, or fails if TRMFAST_REQUIRE_NVCC=1."""
    found = find_nvcc()
    if found is None or find_cuobjdump() is None:
        skip_or_fail(f"no {'nvcc' if found is None else 'cuobjdump'} on this machine", "TRMFAST_REQUIRE_NVCC")
    assert found is not None
    return found


def build_device(source: Path, architecture: int, defines: Sequence[str] = ()) -> Path:
    """The cubin of a .cu file for sm_<architecture>; spills and warnings are errors."""
    compiler = nvcc()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    flags = ["-std=c++17", f"-arch=sm_{architecture}", "-Xcompiler=-Wall,-Wextra", "-Xptxas=-warn-spills", "-cubin"]
    flags += ["--Werror=all-warnings", *[f"-D{define}" for define in defines], *INCLUDES]
    key = digest(version, *flags, str(source), files=[source, *_headers()])
    return make(CACHE / f"{source.stem}-sm_{architecture}-{key}.cubin", [compiler, *flags, str(source)])
