"""The C++ core built with sanitizers, and the engine's own tests run on that build: ``pytest -m sanitizer``.

Python itself is not instrumented, so the run-time library is preloaded.  Allocations of torch and NumPy then
go through it too: a read or write past a tensor is found.  Fresh memory is filled with 0xff bytes, which are NaN in
every float type, so a value that nobody wrote shows in the results as well.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.sanitizer


@dataclass(frozen=True)
class Build:
    """An instrumented installation.

    Attributes:
        folder: holds the package trmfast; comes first on PYTHONPATH.
        environment: of the processes that use it.
        reports: the folder that the sanitizers write their reports to.
    """

    folder: Path
    environment: dict[str, str]
    reports: Path

    def run(self, *arguments: str, **environment: str) -> str:
        """Run Python away from the source tree, so that it finds this build; the output.  Fails on any report."""
        for old in self.reports.glob("report*"):
            old.unlink()
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.reports,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1500,
        )
        found = "\n".join(file.read_text(errors="replace") for file in self.reports.glob("report*"))
        assert not found, found
        assert done.returncode == 0, done.stdout[-20000:]
        return done.stdout

    def pytest(self, *arguments: str, **environment: str) -> str:
        config = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
        output = self.run("-m", "pytest", *config, *arguments, **environment)
        print(output[-3000:])
        return output


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None or "clang" in compiler:
        pytest.skip("the run-time libraries to preload are those of g++, which is not the compiler here")
    libraries = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        path = subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        if not Path(path).is_absolute():
            pytest.skip(f"{compiler} has no {name}")
        libraries.append(str(Path(path).resolve()))

    folder = tmp_path_factory.mktemp("instrumented")
    reports = tmp_path_factory.mktemp("reports")
    flags = {"TRMFAST_SANITIZE": "address,undefined", "TRMFAST_EMULATE_AMX": "1", "TRMFAST_REQUIRE_CPU": "1"}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-lib", str(folder)],
        cwd=ROOT,
        env={**os.environ, **flags},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-10000:]
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "LD_PRELOAD": " ".join(libraries),
        # Leaks are the business of test_memory.py: Python and torch keep much until they exit.
        "ASAN_OPTIONS": f"detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size={1 << 30}:log_path={reports}/report",
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={reports}/report",
        "OMP_NUM_THREADS": "2",
    }
    return Build(folder, environment, reports)


def test_the_instrumented_engine_is_the_one_tested(build: Build) -> None:
    code = "import trmfast._cpu as cpu, trmfast.build_info as b; print(cpu.__file__); print(b.build_info().sanitize)"
    file, sanitize = build.run("-c", code).split()
    assert Path(file).is_relative_to(build.folder)
    assert sanitize == "address,undefined"


def test_a_write_past_a_tensor_is_reported(build: Build) -> None:
    # Proof that the preloaded library watches torch's memory: without it a clean run would mean nothing.
    code = "import ctypes, torch; t = torch.zeros(1024); ctypes.memset(t.data_ptr() + 4096, 0, 1)"
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        build.run("-c", code)


def test_engine(build: Build) -> None:
    # Every target of the build that this machine runs, the emulated AMX tiles among them.
    output = build.pytest(str(ROOT / "tests" / "test_cpu_engine.py"))
    assert " passed" in output
