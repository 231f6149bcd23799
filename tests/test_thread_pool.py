"""The C++ tests of the thread pool, the barrier and the detection of instruction sets: plain, sanitized, on AArch64."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import aarch64

pytestmark = pytest.mark.breadth  # a quarter of a minute of compilation

ROOT = Path(__file__).resolve().parent.parent
CPU = ROOT / "csrc" / "cpu"
SOURCES = [ROOT / "tests" / "cpp" / "test_thread_pool.cpp", CPU / "thread_pool.cpp", CPU / "isa.cpp"]
TESTS = re.findall(r'^    \{"(\w+)", \w+\},$', SOURCES[0].read_text(), re.MULTILINE)

VARIANTS = {
    "plain": ["-O2"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
    "address": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "openmp": ["-O2", "-fopenmp", "-DTRMFAST_TEST_OPENMP"],
    "aarch64": ["-O2", *aarch64.LINK],
}


def fits(variant: str, name: str) -> bool:
    """Whether a variant has a test."""
    if name == "fork_while_busy":  # the sanitizers' own allocators keep their locks in the child and hang there
        return variant in ("plain", "openmp")
    if name == "fork_while_idle":  # qemu 7.2 aborts in the child of a process with threads
        return variant != "aarch64"
    if name == "affinity_follows_the_caller":  # OpenMP's threads have their own
        return variant != "openmp"
    return variant == "openmp" or not name.startswith("openmp")


Executables = Callable[[str], Path | str]
CASES = [(variant, name) for variant in VARIANTS for name in TESTS if fits(variant, name)]


def compile_tests(variant: str, folder: Path) -> Path | str:
    """The test executable, or the reason why this machine cannot build or start it."""
    flags, cross = VARIANTS[variant], variant == "aarch64"
    if cross:
        reason = aarch64.missing_reason()
        if reason is not None:
            return reason
        compiler: str | None = aarch64.COMPILER
    else:
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or shutil.which(compiler) is None:
        return "no C++ compiler on this machine"
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    if subprocess.run([compiler, *flags, str(probe), "-o", str(folder / "probe")], capture_output=True).returncode != 0:
        return f"{compiler} has no run-time library for {flags}"
    if not cross and subprocess.run([str(folder / "probe")], capture_output=True).returncode != 0:
        return f"a program built with {flags} does not start on this machine"
    output = folder / "test_thread_pool"
    warnings = ["-Wall", "-Wextra", "-Werror"]
    command = [compiler, "-std=c++17", "-pthread", *warnings, *flags, *map(str, SOURCES), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="session")
def executables(tmp_path_factory: pytest.TempPathFactory) -> Executables:
    """Compiles each variant once, when it is first asked for."""
    return functools.cache(lambda variant: compile_tests(variant, tmp_path_factory.mktemp(variant)))


def run(executables: Executables, variant: str, name: str) -> str:
    executable = executables(variant)
    if isinstance(executable, str):
        pytest.skip(executable)
    # die_after_fork: the children of the fork tests start threads, which is what is being tested.
    environment = {**os.environ, "TSAN_OPTIONS": "die_after_fork=0:exitcode=66", "ASAN_OPTIONS": "detect_leaks=0"}
    start = [aarch64.QEMU] if variant == "aarch64" else []
    done = subprocess.run([*start, str(executable), name], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}{done.stderr}"
    assert "Sanitizer" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize(("variant", "name"), CASES)
def test_thread_pool(executables: Executables, variant: str, name: str) -> None:
    run(executables, variant, name)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the comparison is with Linux's /proc/cpuinfo")
def test_instruction_sets_match_the_kernels_list(executables: Executables) -> None:
    if platform.machine() != "x86_64":
        expected = {"portable"}
    else:
        line = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
        have = set(line.split(":")[1].split())
        needs = {
            "avx2": {"avx2", "fma", "f16c"},
            "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
        }
        needs["avx_vnni"] = needs["avx2"] | {"avx_vnni"}
        needs["avx512_vnni"] = needs["avx512"] | {"avx512_vnni"}
        needs["avx512_bf16"] = needs["avx512_vnni"] | {"avx512_bf16"}
        needs["amx"] = needs["avx512_bf16"] | {"amx_tile", "amx_bf16", "amx_int8"}
        expected = {"portable"} | {target for target, flags in needs.items() if flags <= have}
    assert set(run(executables, "plain", "instruction_sets").split()) == expected
