"""The CPU engine in threads and processes: any number of threads, several callers, children of a fork."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trmfast.backends import BACKENDS
from trmfast.backends import cpu as engine
from trmfast.cases import Case, Inputs, make_case, make_inputs
from trmfast.testing import check_case, require, run_fused

_reason = BACKENDS["cpu"].available()
pytestmark = pytest.mark.skipif(_reason is not None, reason=f"backend cpu: {_reason}")

DTYPES = [torch.float32, torch.bfloat16]
ATTENTION = make_case("attention", batch=5, length=23, intermediate_size=96)
MLP_T = make_case("mlp_t", batch=5, length=23, intermediate_size=96, token_mixer="mlp_t")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def states(inputs: Inputs) -> list[Tensor]:
    return list(run_fused(inputs, "cpu", backward=False).outputs.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [ATTENTION, MLP_T], ids=str)
def test_any_number_of_threads_gives_the_same_bits(
    case: Case, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    for batch in (1, 2, 5):
        inputs = make_inputs(
            make_case(
                case.name,
                batch=batch,
                length=23,
                intermediate_size=96,
                token_mixer=case.problem.nets[0].block.token_mixer,
            ),
            dtype,
        )
        threads(1)
        expected = run_fused(inputs, "cpu")
        for count in (2, 3, 4, 7):
            threads(count)
            got = run_fused(inputs, "cpu")
            for name in expected.outputs:
                assert torch.equal(got.outputs[name], expected.outputs[name]), (name, batch, count)
            for name in expected.gradients:
                assert torch.equal(got.gradients[name], expected.gradients[name]), (name, batch, count)


@pytest.mark.breadth
def test_a_small_store_only_changes_the_order_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    for case in (ATTENTION, MLP_T):
        for store in (1, 400_000, 1_500_000):
            monkeypatch.setattr(engine, "store_bytes", lambda _, store=store: store)
            require(check_case(case, torch.float32, "cpu"))


def test_several_python_threads_at_once() -> None:
    cases = [make_case(f"thread-{i}", batch=i + 1, length=9 + i, num_layers=1) for i in range(4)]
    inputs = [make_inputs(case, torch.float32, seed=i) for i, case in enumerate(cases)]
    expected = [run_fused(one, "cpu") for one in inputs]
    failures: list[str] = []

    def work(i: int) -> None:
        for _ in range(10):
            got = run_fused(inputs[i], "cpu")
            for name, value in {**got.outputs, **got.gradients}.items():
                if not torch.equal(value, {**expected[i].outputs, **expected[i].gradients}[name]):
                    failures.append(f"{i} {name}")

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


# Objects of the extension come and go in several threads: kept activations, whose memory is made without the GIL, and
# shapes, which are made with it.  In a process of its own, because a broken registry of objects takes the process down.
OBJECTS_IN_THREADS = """
import sys, threading, time
from trmfast.backends.cpu import _cpu
sys.setswitchinterval(1e-5)
shape = dict(width=64, inner=64, attention=True, heads=1, kv_heads=1, head_dim=64, causal=False, seq_len=0,
             seq_inner=0, conv_taps=0, eps=1e-5)
stop = time.monotonic() + 1
def keep():
    n = 0
    while time.monotonic() < stop:
        _cpu.KeptActivations((8 << 20) * (1 + n % 3 * 4))
        n += 1
def describe():
    while time.monotonic() < stop:
        [_cpu.BlockShape(**shape) for _ in range(200)]
threads = [threading.Thread(target=work) for work in (keep, keep, keep, describe)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print("done")
"""


@pytest.mark.breadth
def test_objects_of_the_extension_in_several_threads() -> None:
    done = subprocess.run([sys.executable, "-c", OBJECTS_IN_THREADS], capture_output=True, text=True, timeout=120)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.breadth
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_children_of_a_busy_process_find_no_lock_taken() -> None:
    inputs = make_inputs(make_case("small", batch=1, length=5, num_layers=1), torch.float32)
    expected = states(inputs)[0]
    stop = threading.Event()

    def keep_the_pools_busy() -> None:
        while not stop.is_set():
            engine._keep(1 << 16)
            engine.release_memory()

    worker = threading.Thread(target=keep_the_pools_busy)
    worker.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                signal.alarm(60)  # rather than wait for ever
                engine._keep(1 << 16)
                os._exit(0 if torch.equal(states(inputs)[0], expected) else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        worker.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_computes_too(threads: Callable[[int], None]) -> None:
    threads(2)
    inputs = make_inputs(ATTENTION, torch.float32)
    expected = states(inputs)  # the pool's workers run in the parent and do not exist in the child
    child = os.fork()
    if child == 0:
        same = all(torch.equal(a, b) for a, b in zip(states(inputs), expected, strict=True))
        os._exit(0 if same else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert all(torch.equal(a, b) for a, b in zip(states(inputs), expected, strict=True))


# Prints whose threads the engine says it runs on, how many of its own there are, and a hash of a training step.
OTHER_THREADS = """
import hashlib, pathlib, torch
from trmfast.backends.cpu import thread_source
from trmfast.cases import make_case, make_inputs
from trmfast.testing import run_fused
torch.set_num_threads(2)
found = run_fused(make_inputs(make_case("attention", batch=3, length=23), torch.bfloat16), "cpu")
parts = [value.float().numpy().tobytes() for value in {**found.outputs, **found.gradients}.values()]
names = [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
print(thread_source(), names.count("trmfast"), hashlib.sha256(b"".join(parts)).hexdigest())
"""


def run_other_threads(**environment: str) -> tuple[str, int, str]:
    done = subprocess.run(
        [sys.executable, "-c", OTHER_THREADS], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    source, count, digest = done.stdout.split()
    return source, int(count), digest


@pytest.mark.breadth
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in Linux's /proc")
@pytest.mark.skipif(engine.thread_source() == "own", reason="this PyTorch has no OpenMP, or TRMFAST_CPU_THREADS=own")
def test_the_threads_are_pytorchs_or_its_own() -> None:
    source, count, bits = run_other_threads()
    assert (source, count) == ("pytorch", 0)
    assert run_other_threads(TRMFAST_CPU_THREADS="own") == ("own", 1, bits)
    # OpenMP may not start a second thread here, so the engine must.
    assert run_other_threads(OMP_THREAD_LIMIT="1") == ("pytorch", 1, bits)


@pytest.mark.breadth
def test_an_unknown_source_of_threads_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import trmfast.backends.cpu"],
        env={**os.environ, "TRMFAST_CPU_THREADS": "openmp"},
        capture_output=True,
        text=True,
    )
    assert "ValueError: TRMFAST_CPU_THREADS: got 'openmp', accepted are pytorch, own" in done.stderr
