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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from trmfast.targets import extension, target_of, targets

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

    def run(self, *arguments: str) -> str:
        """Runs Python away from the source tree, so that it finds this build; its output.  Fails on any report."""
        for old in self.reports.glob("report*"):
            old.unlink()
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.reports,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1800,
        )
        found = "\n".join(file.read_text(errors="replace") for file in self.reports.glob("report*"))
        assert not found, found
        assert done.returncode == 0, done.stdout[-20000:]
        return done.stdout


@dataclass(frozen=True)
class Sanitizer:
    """How to build with a sanitizer and for which targets, what to preload and with which options."""

    flags: str
    libraries: tuple[str, ...]
    options: dict[str, str]
    targets: Callable[[], Iterable[str]]


ADDRESS = Sanitizer(
    "address,undefined",
    ("libasan.so", "libubsan.so", "libstdc++.so"),
    {
        # Leaks are the business of test_memory.py: Python and torch keep much until they exit.
        "ASAN_OPTIONS": f"detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size={1 << 30}:log_path=report",
        "UBSAN_OPTIONS": "print_stacktrace=1:log_path=report",
    },
    lambda: ("amx_emulated", *(target for target, reason in targets().items() if reason is None)),
)
# torch and its OpenMP are not instrumented: what their threads do among themselves cannot be judged, nor how they wait.
THREAD = Sanitizer(
    "thread",
    ("libtsan.so",),
    {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:log_path=report", "TRMFAST_CPU_THREADS": "own"},
    # All targets divide the work alike: the best of each dtype, and portable.
    lambda: {"portable", *map(target_of, ("f32", "bf16"))},
)


def make_build(sanitizer: Sanitizer, tmp_path_factory: pytest.TempPathFactory) -> Build:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None or "clang" in compiler:
        pytest.skip("the run-time libraries to preload are those of g++, which is not the compiler here")
    libraries = []
    for name in sanitizer.libraries:
        path = subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        if not Path(path).is_absolute():
            pytest.skip(f"{compiler} has no {name}")
        libraries.append(str(Path(path).resolve()))

    folder = tmp_path_factory.mktemp("instrumented")
    flags = {"TRMFAST_SANITIZE": sanitizer.flags, "TRMFAST_REQUIRE_CPU": "1", "TRMFAST_EMULATE_AMX": "1"}
    if extension is not None:
        flags["TRMFAST_CPU_TARGETS"] = " ".join(sanitizer.targets())
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
        **sanitizer.options,
        "PYTHONPATH": str(folder),
        "LD_PRELOAD": " ".join(libraries),
        "OMP_WAIT_POLICY": "PASSIVE",  # torch's own threads must not spin beside the engine's
    }
    return Build(folder, environment, tmp_path_factory.mktemp("reports"))


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return make_build(ADDRESS, tmp_path_factory)


@pytest.fixture(scope="module")
def thread(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return make_build(THREAD, tmp_path_factory)


# Every target with every small case, forward and backward.  Parity is judged by the tests of the plain build; here a
# result only has to be finite, which it is not where it depends on memory that nobody wrote.
SWEEP = """
import sys, torch
from trmfast.backends import BACKENDS, cpu
from trmfast.build_info import build_info
from trmfast.cases import SMALL, find_case, make_case, make_inputs
from trmfast.ops import recursion
from trmfast.testing import run_fused

assert build_info().sanitize == sys.argv[1], build_info()
# Every way through norms, gates and masks, several in a case.
choices = ("hrm_text", "ouro", "huginn", "parcae", "gate-head", "qk_norm-weights")
emulated_too = ("window-causal", "gelu", "diagonal", "linear-mlp_t", "linear", "simple_gla-segments")
cases = (*SMALL, *map(find_case, (*choices, *emulated_too)))
emulated = [c for c in (*SMALL, *map(find_case, emulated_too)) if not sys.argv[2:] or c.name in sys.argv[2:]]
published = make_case("published", H_cycles=1, L_cycles=1, length=97, num_layers=1, hidden_size=512, num_heads=8)
# Sequences together, tiles of 32 rows and a rest, and a depth in parts.
deep = make_case("deep", H_cycles=1, L_cycles=1, batch=2, length=37, num_layers=1, intermediate_size=544)
ran = [target for target, reason in cpu.targets().items() if reason is None]
turn = 0
for target in ran:
    slow = target == "amx_emulated"
    turn += 1
    # A minute at the published width where nothing is a vector.
    of_target = emulated if slow else cases if target == "portable" else (*cases, published)
    for case in (*of_target, deep):
        for dtype in cpu.ELEMENTS:
            if BACKENDS["cpu"].supports(case.problem, torch.device("cpu"), dtype, case.batch, case.length):
                continue
            with cpu.force_target(target):
                if cpu.target_for(dtype) != target:
                    continue
                # A case has one thread on one target and three on the next; a race needs more than one.
                turn += 1
                alone = case is deep or (turn % 2 and not slow)
                threads = 1 if alone and build_info().sanitize != "thread" else 3
                torch.set_num_threads(threads)
                result = run_fused(make_inputs(case, dtype), "cpu")
            for name, value in (*result.outputs.items(), *result.gradients.items()):
                assert value.isfinite().all(), (target, case.name, dtype, threads, name)
        i = make_inputs(case, torch.bfloat16)
        with cpu.force_target(target):
            refused = BACKENDS["cpu"].supports(case.problem, torch.device("cpu"), torch.int8, case.batch, case.length)
            if cpu.target_for(torch.int8) == target and not refused:
                for z in recursion(
                    i.problem.program, i.problem.nets, i.states, i.x, i.weights, i.cos, i.sin, "cpu", dtype="int8"
                ):
                    assert z.isfinite().all(), (target, case.name, "int8")
print("swept", *ran)
"""


@pytest.mark.xdist_group("address")
def test_a_write_past_a_tensor_is_reported(address: Build) -> None:
    # Proof that the preloaded library watches torch's memory: without it a clean run would mean nothing.
    code = "import ctypes, torch; t = torch.zeros(1024); ctypes.memset(t.data_ptr() + 4096, 0, 1)"
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        address.run("-c", code)


@pytest.mark.xdist_group("thread")
def test_a_race_in_a_library_is_reported(thread: Build, tmp_path: Path) -> None:
    # The same proof for the thread sanitizer.
    source = tmp_path / "race.cpp"
    source.write_text(
        "#include <thread>\nint value;\n"
        'extern "C" int race() { std::thread other([] { value = 1; }); value = 2; other.join(); return value; }\n'
    )
    library = tmp_path / "race.so"
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, "-g", "-shared", "-fPIC", "-fsanitize=thread", source, "-o", library], check=True)
    with pytest.raises(AssertionError, match="data race"):
        thread.run("-c", f"import torch, trmfast, ctypes; ctypes.CDLL({str(library)!r}).race()")


# What emulated tiles do differently; the other cases are of programs and windows, and take five minutes.
EMULATED = (
    *("trm", "trm-mlp_t", "urm", "odd-sizes", "causal", "grouped-heads", "window-causal", "gelu"),
    *("linear", "simple_gla-segments"),
)


@pytest.mark.xdist_group("address")
@pytest.mark.representative(when=lambda emulated: bool(emulated), rest="grid product")
@pytest.mark.parametrize("emulated", [EMULATED, ()], ids=["few emulated", "all"])
def test_every_target_reads_and_writes_only_its_memory(address: Build, emulated: tuple[str, ...]) -> None:
    print(address.run("-c", SWEEP, ADDRESS.flags, *emulated))


@pytest.mark.xdist_group("thread")
def test_the_engines_threads_do_not_race(thread: Build) -> None:
    print(thread.run("-c", SWEEP, THREAD.flags))


@pytest.mark.xdist_group("address")
def test_threads_processes_and_packed_weights(address: Build) -> None:
    # Without `pythonpath`, which would put the plain build of the source tree first.
    config = ["-c", str(ROOT / "pyproject.toml"), "-o", "pythonpath=", "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    tests = [str(ROOT / "tests" / f"test_cpu_{name}.py") for name in ("engine", "threads")]
    # The children of a busy process hang in the sanitizer's own allocator, whose locks they find taken.
    output = address.run(
        "-m", "pytest", *config, *tests, "-m", "not product", "-k", "not test_every_target and not busy_process"
    )
    assert " passed" in output
    assert "amx_emulated is not in this build" not in output, "these tests ran on another build"
    print(output[-2000:])
