"""The CUDA engine as nvcc compiles it for sm_80: its PTX executed, launched by its own host code over a fake runtime.

The backend runs as on a GPU: trmfast/backends/cuda.py, the binding, csrc/cuda/launch.cu and the kernels are the real
ones; devices are the stand-in's (tests/standin), the runtime is tests/standin/cudart.cpp.  Rung 5b, without ptxas.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from ptx_tools import PtxError, Schedule
from standin import standin
from standin.driver import Driver, build
from trmfast import backends
from trmfast.backends import BACKENDS, cuda
from trmfast.backends.call import ForwardCall, Kept
from trmfast.cases import Case, Inputs, make_case, make_inputs
from trmfast.engine import block_fields
from trmfast.testing import Comparison, Result, compare_results, pool, require, run_eager, run_truth

pytestmark = [
    pytest.mark.breadth,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the stand-in takes its place"),
]

# With the fewest rows, so that two blocks share a sequence of more than 16 tokens.
INSTANCES = ((1, 8, 4, 0, 0), (1, 8, 4, 2, 4))
SCALE = 0.4  # of weights: eager PyTorch keeps to the policy in every program
SCHEDULES = (Schedule(), Schedule("reverse"), Schedule("random", 1), Schedule("random", 2))
SIZES: dict[str, Any] = {"hidden_size": 64, "num_heads": 2, "intermediate_size": 80, "num_layers": 1}
CASES = [
    make_case("trm", length=20, H_cycles=2, L_cycles=2, batch=3, **SIZES),
    make_case("trm-mlp_t", length=20, H_cycles=2, L_cycles=1, token_mixer="mlp_t", **SIZES),
    make_case("hrm-causal", "hrm", length=35, H_cycles=1, causal=True, **{**SIZES, "num_heads": 4, "num_kv_heads": 2}),
    make_case("odd-sizes", batch=2, length=13, H_cycles=1, **{**SIZES, "hidden_size": 48, "num_heads": 3}),
]
CACHES = ("_limits", "_device", "_block", "_prepare", "_resident_blocks", "_words", "_failed", "is_slower")


@pytest.fixture(scope="module")
def engine() -> Path:
    return build(INSTANCES)


@pytest.fixture
def driver(engine: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """One device of eight multiprocessors, and an engine without a memory of another."""

    def clear() -> None:
        for name in CACHES:
            getattr(cuda, name).cache_clear()
        backends.select.cache_clear()

    with standin(capability=(8, 0), multiprocessors=8) as runtime:
        found = Driver(runtime, engine)
        monkeypatch.setattr(cuda, "_cuda", found.module)
        clear()
        yield found
        clear()
        if found.error is not None:
            runtime.faults.clear()


def forward(driver: Driver, inputs: Inputs) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Final states and saved sums; an error of a kernel is raised as it was found."""
    given = [tensor.clone() for tensor in (*inputs.states, *inputs.weights)]
    call = ForwardCall(
        inputs.problem, inputs.states, inputs.x, inputs.weights, inputs.cos, inputs.sin, save=True, keep=Kept()
    )
    driver.error = None
    try:
        states, saved, _ = BACKENDS["cuda"].forward(call)
    except RuntimeError:
        if driver.error is not None:
            raise driver.error from None
        raise
    for before, after in zip(given, (*inputs.states, *inputs.weights), strict=True):
        assert torch.equal(before.cpu(), after.cpu()), "an input was written"
    assert int(cuda._failed(0)[0]) == 0, "blocks waited in vain for others"
    return [state.cpu() for state in states], saved.cpu()


def draw(case: Case, dtype: torch.dtype, seed: int = 0, device: str = "cuda:0") -> Inputs:
    return make_inputs(case, dtype, seed, device, SCALE)


def compare(driver: Driver, case: Case, dtype: torch.dtype, seed: int = 0) -> list[Comparison]:
    found, saved = forward(driver, draw(case, dtype, seed))
    assert saved.isfinite().all()
    inputs = draw(case, dtype, seed, "cpu")
    states = Result(dict(zip(case.problem.program.states, found, strict=True)), {})
    return compare_results(states, run_eager(inputs, backward=False), run_truth(inputs, backward=False))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_programs(driver: Driver, case: Case) -> None:
    """By the policy, each draw under another schedule and half of them with ``mma`` that rounds to zero."""
    dtype = (torch.bfloat16, torch.float16)[CASES.index(case) % 2]
    draws = []
    for seed, schedule in enumerate(SCHEDULES):
        driver.schedule, driver.truncate_mma = schedule, seed % 2 == 1
        draws.append(compare(driver, case, dtype, seed))
    require(pool(draws))
    assert sum("recursion_forward" in name for name in driver.launches) == len(SCHEDULES)


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_same_bits_under_every_schedule(driver: Driver, case: Case) -> None:
    found = []
    for schedule in SCHEDULES:
        driver.schedule = schedule
        states, saved = forward(driver, draw(case, torch.bfloat16))
        found.append([*states, saved])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# ---------------------------------------------------------------- planted faults of the kernels


def without(pattern: str, which: int, instead: str = "") -> Callable[[str], str]:
    """Replaces one match of a pattern in every kernel of the recursion."""

    def change(text: str) -> str:
        parts = re.split(r"(?=\.visible \.entry )", text)
        return "".join(part if "recursion_forward" not in part[:200] else one(part) for part in parts)

    def one(part: str) -> str:
        found = list(re.finditer(pattern, part))
        match = found[which]
        return part[: match.start()] + match.expand(instead) + part[match.end() :]

    return change


BARRIER = r"\n[^\n]*bar(?:rier)?\.sync\s+0[^\n]*;"
ANOTHER = "another thread (read|wrote) there since the last barrier|nobody wrote there"
BLOCKS = "another block of this launch (read|wrote) there"
RELEASE = r"red\.release\.gpu\.global\.add\.u32"
PLANTED: dict[str, tuple[Callable[[str], str], str]] = {
    "a barrier after the sums": (without(BARRIER, 1), ANOTHER),
    "a barrier of the last norm": (without(BARRIER, -1), ANOTHER),
    "no wait for weights": (without(r"cp\.async\.wait_group \d+;", 0), "a cp.async is on its way"),
    "a wait for one group less": (
        without(r"cp\.async\.wait_group \d+;", 0, "cp.async.wait_group 7;"),
        "a cp.async is on its way",
    ),
    "a relaxed arrival": (without(RELEASE, 0, "red.relaxed.gpu.global.add.u32"), BLOCKS),
    "a relaxed wait": (without(r"ld\.acquire\.gpu\.global\.u32", 0, "ld.global.u32"), f"{BLOCKS}|{ANOTHER}"),
    "a shared store 16 bytes off": (
        without(r"(st\.shared\.v4\.u32 \[%r\d+)\]", 0, r"\1+8]"),
        "16 bytes at an address that is 8 off",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_found(driver: Driver, name: str) -> None:
    change, message = PLANTED[name]
    assert driver.plant(change) == 2
    for schedule in SCHEDULES:
        driver.schedule = schedule
        with pytest.raises(PtxError, match=message):
            forward(driver, draw(CASES[0], torch.bfloat16))


@pytest.mark.parametrize(
    "pattern, instead",
    [
        (r"(mma[^;]*?\}, \{)(%r\d+), (%r\d+)(, %r\d+, %r\d+\})", r"\1\3, \2\4"),
        (r"(ldmatrix[^{]*\{%r\d+, )(%r\d+), (%r\d+)", r"\1\3, \2"),
    ],
    ids=["mma", "ldmatrix"],
)
def test_wrong_lane_maps_are_found(driver: Driver, pattern: str, instead: str) -> None:
    assert driver.plant(without(pattern, 0, instead)) == 2
    with pytest.raises(AssertionError, match="outside the policy"):
        require(compare(driver, CASES[0], torch.bfloat16))


# ---------------------------------------------------------------- the host code


def test_errors_of_the_runtime(driver: Driver) -> None:
    """Each has its text, and none is left for the next caller of the runtime."""
    inputs = draw(CASES[0], torch.bfloat16)
    for function, message in (
        ("cudaFuncSetAttribute", "trmfast CUDA: shared memory: invalid argument"),
        ("launch", "trmfast CUDA: packing weights: too many resources requested for launch"),
    ):
        driver.fail_next(function)
        with pytest.raises(RuntimeError, match=message):
            forward(driver, inputs)
        assert driver.last_error == 0
    cuda._limits.cache_clear()
    driver.fail_next("cudaDeviceGetAttribute")
    with pytest.raises(RuntimeError, match="device attributes: invalid device ordinal"):
        forward(driver, inputs)
    driver.fail_next("cudaGetDeviceCount")
    assert BACKENDS["cuda"].available() == "CUDA driver version is insufficient for CUDA runtime version"
    assert driver.last_error == 0
    assert BACKENDS["cuda"].available() is None
    forward(driver, inputs)


def test_occupancy(driver: Driver) -> None:
    case = CASES[0]

    def supports() -> str | None:
        return BACKENDS["cuda"].supports(case.problem, torch.device("cuda"), torch.bfloat16, case.batch, case.length)

    assert supports() is None
    cuda._resident_blocks.cache_clear()
    driver.fail_next("occupancy")
    with pytest.raises(RuntimeError, match="trmfast CUDA: occupancy: unknown error"):
        supports()


def test_a_grid_that_does_not_fit_is_refused(driver: Driver) -> None:
    """By the runtime: the engine had planned for a larger device."""
    inputs = draw(CASES[0], torch.bfloat16)
    forward(driver, inputs)
    driver.set_device(multiprocessors=5)
    with pytest.raises(RuntimeError, match="launching the recursion: too many blocks in cooperative launch"):
        forward(driver, inputs)
    driver.set_device(shared_bytes=48 << 10)
    with pytest.raises(RuntimeError, match="shared memory: invalid argument"):
        forward(driver, inputs)
    assert driver.last_error == 0


def test_blocks_that_are_not_resident_together_are_reported(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launch without the cooperative attribute may do."""
    monkeypatch.setattr(cuda, "TIMEOUT_NS", 20_000)
    driver.one_by_one = True
    with pytest.raises(AssertionError, match="blocks waited in vain for others"):
        forward(driver, draw(CASES[0], torch.bfloat16))
    with pytest.raises(RuntimeError, match=r"trmfast CUDA: \d blocks waited more than"):
        forward(driver, draw(CASES[0], torch.bfloat16))


def test_two_engines_in_one_process(driver: Driver, engine: Path, tmp_path: Path) -> None:
    """As that of the stand-in and a built one: each has classes of its own."""
    spec = importlib.util.spec_from_file_location("another._cuda", shutil.copy(engine, tmp_path / "_cuda.so"))
    assert spec is not None
    assert spec.loader is not None
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    fields = block_fields(CASES[0].problem.nets[0].block)
    one, two = (module.BlockShape(**fields) for module in (driver.module, other))
    assert one.packed_elements == two.packed_elements
    assert type(one) is not type(two)


def test_a_buffer_that_is_too_small(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        "standin.tensors.DeviceTensor.new_empty",
        lambda self, size, **options: empty(self, size - 64 if isinstance(size, int) else size, **options),
        raising=False,
    )
    with pytest.raises(PtxError, match=r"buffer \d+: bytes \d+ to \d+ of \d+"):
        forward(driver, draw(CASES[0], torch.bfloat16))
