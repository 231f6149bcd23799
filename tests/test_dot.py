"""The C++ tests of the matrix product micro-kernels, the SIMD header and bf16, for each instruction set.

Targets that this machine does not run are compiled all the same. AMX runs under emulation everywhere, AArch64 under
qemu where that and a cross compiler are installed.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

import aarch64

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests" / "cpp" / "test_dot.cpp"
ISA = ROOT / "csrc" / "cpu" / "isa.cpp"

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
EMULATE_AMX = "-DTRMFAST_EMULATE_AMX"
TARGETS = {
    "portable": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": AVX512_BF16,
    "amx": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"],
    "amx_emulated": [*AVX2, EMULATE_AMX],
    "amx_emulated_portable": [EMULATE_AMX],
    "aarch64": [],
}
RUNS_ON = {"amx_emulated": "avx2", "amx_emulated_portable": "portable"}  # otherwise the target of the same name
SANITIZED = ["portable", "avx2", "avx512_bf16", "amx_emulated_portable"]
SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
WARNINGS = ["-Wall", "-Wextra", "-Werror"]

NAMES = re.findall(r'^    \{"(\w+)", \w+\},$', SOURCE.read_text(), re.MULTILINE)
ONLY_EMULATED = {name for name in NAMES if name.startswith(("fault_", "configures_", "emulation_"))}
FAULTS = {
    "fault_unconfigured": "without a configuration",
    "fault_released": "without a configuration",
    "fault_too_many_rows": "more than 16 rows",
    "fault_too_many_columns": "more than 64 bytes",
    "fault_shapes_differ": "rows of the destination",
    "fault_depths_differ": "depths of the operands",
    "fault_same_tile_twice": "must differ",
}
CASES = [
    (target, name)
    for target in TARGETS
    for name in NAMES
    if EMULATE_AMX in TARGETS[target] or name not in ONLY_EMULATED
]


def host_compiler() -> str | None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    return compiler if compiler and shutil.which(compiler) else None


def compile_dot(target: str, optimize: list[str], folder: Path) -> tuple[Path | None, str]:
    """The test executable and the reason why it cannot run here, or no executable and the reason why there is none."""
    link = ["-pthread"]
    if target == "aarch64":
        missing = aarch64.missing_reason()
        if missing is not None:
            return None, missing
        compiler = aarch64.COMPILER
        link += aarch64.LINK
    else:
        found = host_compiler()
        if found is None:
            return None, "no C++ compiler on this machine"
        compiler = found
        if TARGETS[target] and platform.machine() != "x86_64":
            return None, f"{target} is for x86-64"
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    command = [compiler, *optimize, str(probe), "-o", str(folder / "probe")]
    if subprocess.run(command, capture_output=True).returncode != 0:
        return None, f"{compiler} has no run-time library for {' '.join(optimize)}"
    output = folder / "test_dot"
    define = f"-DTRMFAST_NAMESPACE={target}_test"
    flags = [*optimize, *TARGETS[target], define, *link]
    if target == "amx":
        flags += [str(ISA)]  # asks for the tile registers
    done = subprocess.run(
        [compiler, "-std=c++17", *WARNINGS, *flags, str(SOURCE), "-o", str(output)], capture_output=True, text=True
    )
    if done.returncode != 0:
        return None, done.stderr
    return output, "" if target == "aarch64" else missing_reason(RUNS_ON.get(target, target), folder, compiler)


def missing_reason(target: str, folder: Path, compiler: str) -> str:
    """What csrc/cpu/isa says of the target on this machine; empty if it runs."""
    probe = folder / "probe.cpp"
    probe.write_text(
        f'#include "{ISA.with_suffix(".h")}"\n#include <cstdio>\n'
        f'int main() {{ const char* reason = trmfast::missing_reason("{target}"); std::puts(reason ? reason : ""); }}\n'
    )
    command = [compiler, "-std=c++17", str(probe), str(ISA), "-o", str(folder / "probe")]
    subprocess.run(command, check=True, capture_output=True)
    return subprocess.run([str(folder / "probe")], check=True, capture_output=True, text=True).stdout.strip()


class Executables:
    """Compiles each variant once, when it is first asked for."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self.factory = factory
        self.built: dict[tuple[str, str], tuple[Path | None, str]] = {}

    def run(self, target: str, name: str, optimize: list[str]) -> subprocess.CompletedProcess[str]:
        key = (target, " ".join(optimize))
        if key not in self.built:
            self.built[key] = compile_dot(target, optimize, self.factory.mktemp(target))
        executable, reason = self.built[key]
        assert "error:" not in reason, reason
        if reason:
            pytest.skip(reason)
        command = [aarch64.QEMU, str(executable)] if target == "aarch64" else [str(executable)]
        return subprocess.run([*command, name], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="session")
def executables(tmp_path_factory: pytest.TempPathFactory) -> Executables:
    return Executables(tmp_path_factory)


def check(done: subprocess.CompletedProcess[str], name: str) -> None:
    if name in FAULTS:
        assert done.returncode == -signal.SIGABRT, f"exit {done.returncode}\n{done.stdout}{done.stderr}"
        assert FAULTS[name] in done.stderr
    else:
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}{done.stderr}"


@pytest.mark.representative(when=lambda target: target == "avx2")
@pytest.mark.parametrize(("target", "name"), CASES)
def test_dot(executables: Executables, target: str, name: str) -> None:
    check(executables.run(target, name, ["-O2"]), name)


@pytest.mark.sanitizer
@pytest.mark.parametrize(("target", "name"), [(target, name) for target, name in CASES if target in SANITIZED])
def test_dot_under_sanitizers(executables: Executables, target: str, name: str) -> None:
    done = executables.run(target, name, SANITIZE)
    assert "Sanitizer" not in done.stderr, done.stderr
    check(done, name)


def test_every_fault_is_checked() -> None:
    assert set(FAULTS) == {name for name in NAMES if name.startswith("fault_")}
