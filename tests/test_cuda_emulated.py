"""The CUDA kernel of the forward recursion, run in the SIMT emulator and compared with the reference.

The emulator reports races, missing waits, accesses outside of buffers and reads of memory that nobody wrote.  Bank
conflicts and bytes are counted by it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trmfast.kernels.persistent import persistent_traffic

import simt_recursion
from simt_recursion import (
    ATTENTION,
    FEW,
    LONG_MIXER,
    MIXER,
    Instance,
    Run,
    Schedule,
    build,
    listed_instances,
    run_emulated,
)
from trmfast.cases import Case, Inputs, make_case, make_inputs
from trmfast.problem import Problem
from trmfast.program import RecursionProgram, Update
from trmfast.reference import summed_input
from trmfast.testing import Comparison, Result, compare_results, pool, require, run_eager, run_truth

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler"),
]

HALVES = (torch.bfloat16, torch.float16)
SCALE = 0.4  # of weights: eager PyTorch keeps to the policy in every program
WIDE = [instance for instance in listed_instances() if instance.width_tiles == 8 and instance.token_tiles <= 2]
LONG = [instance for instance in listed_instances() if instance.width_tiles == 8 and instance.token_tiles in (0, 16)]
SCHEDULES = [Schedule("forward"), Schedule("reverse"), *(Schedule("random", seed) for seed in (1, 2, 3))]

# Two blocks of the grid share a sequence at 16 rows each.
PROGRAMS = [
    make_case("trm", length=20, num_layers=1),
    make_case("trm-mlp_t", length=20, token_mixer="mlp_t", intermediate_size=64),
    make_case("hrm", "hrm", length=18, window="one_step", num_layers=1),
    make_case("single_z", "single_z", length=17, num_layers=1),
    make_case("hier6", "hier6", H_cycles=1, L_cycles=6, num_layers=1, length=20),
    make_case("urm", "urm", length=20, num_layers=1),
]
OPTIONS = [
    make_case("grouped-heads", num_heads=4, num_kv_heads=2, length=20, num_layers=1),
    make_case("causal", causal=True, length=45, num_layers=1),
    make_case("no-rope", rope=False, num_layers=1),
    make_case("odd-sizes", batch=3, length=13, hidden_size=48, num_heads=3, intermediate_size=80),
    make_case("one-token", length=1),
    make_case("head-64", H_cycles=1, hidden_size=128, num_heads=2, length=40, num_layers=1, batch=1),
    make_case("head-128", H_cycles=1, hidden_size=128, num_heads=1, length=40, num_layers=1, batch=1),
    make_case("heads-wider-than-D", H_cycles=1, hidden_size=64, num_heads=16, num_kv_heads=8, num_layers=1, batch=1),
    make_case("mixer-odd", batch=3, length=33, hidden_size=48, token_mixer="mlp_t", intermediate_size=80),
    make_case("mixer-few-tokens", H_cycles=1, L_cycles=1, length=5, token_mixer="mlp_t", intermediate_size=64),
    make_case("mixer-two-strips", H_cycles=1, length=35, hidden_size=96, token_mixer="mlp_t", intermediate_size=64),
    make_case("mixer-long", "urm", H_cycles=1, L_cycles=1, batch=1, length=150, token_mixer="mlp_t", num_layers=1),
]

# Where bytes come from: several blocks a group, both sources of strips, grouped and wide heads, a triangle of keys.
TRAFFIC = [
    make_case("attention", H_cycles=2, L_cycles=3, length=33, batch=2, num_layers=2),
    make_case("causal-grouped", "hrm", length=45, num_heads=4, num_kv_heads=2, causal=True, num_layers=1),
    make_case("head-128-no-rope", H_cycles=1, hidden_size=128, num_heads=1, length=40, rope=False, num_layers=1),
    make_case("mlp_t", "hier6", H_cycles=1, length=35, hidden_size=96, token_mixer="mlp_t", intermediate_size=64),
    make_case("mlp_t-long", "urm", H_cycles=1, L_cycles=1, batch=1, length=150, token_mixer="mlp_t", num_layers=1),
]


def instance_for(case: Case) -> Instance:
    """The instance with the fewest rows that runs a small case."""
    if case.problem.seq_len is None:
        return ATTENTION
    return MIXER if case.problem.seq_len <= 128 else LONG_MIXER


def compare(inputs: Inputs, run: Run) -> list[Comparison]:
    """The final states against the truth, by the policy."""
    assert run.report["failed"] == 0
    names = inputs.problem.program.states
    fused = Result(dict(zip(names, run.states, strict=True)), {})
    return compare_results(fused, run_eager(inputs, backward=False), run_truth(inputs, backward=False))


@pytest.fixture(scope="session")
def small() -> ctypes.CDLL:
    """The harness with instances for small cases."""
    return build(FEW)


@pytest.fixture(scope="session")
def wide() -> ctypes.CDLL:
    """The harness with all instances."""
    return build()


@pytest.mark.representative(when=lambda case: case.name == "trm")
@pytest.mark.spread("case")
@pytest.mark.parametrize("case", PROGRAMS, ids=str)
def test_programs(small: ctypes.CDLL, case: Case) -> None:
    """Every program, in turn in bfloat16 and float16, several draws, each under another schedule."""
    dtype, draws = HALVES[PROGRAMS.index(case) % 2], []
    for seed, schedule in enumerate(SCHEDULES):
        inputs = make_inputs(case, dtype, seed, weight_scale=SCALE)
        draws.append(compare(inputs, run_emulated(small, inputs, instance_for(case), schedule)))
    require(pool(draws))


@pytest.mark.breadth
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_options(small: ctypes.CDLL, case: Case) -> None:
    draws = []
    for dtype, schedule in zip(HALVES, (Schedule("random", 7), Schedule("reverse")), strict=True):
        inputs = make_inputs(case, dtype, weight_scale=SCALE)
        draws.append(compare(inputs, run_emulated(small, inputs, instance_for(case), schedule)))
        require(draws[-1])


@pytest.mark.breadth
@pytest.mark.parametrize("mixer", ("attention", "mlp_t"))
def test_same_bits(small: ctypes.CDLL, wide: ctypes.CDLL, mixer: str) -> None:
    """States and saved inputs don't depend on the schedule, the size of the grid or the rows of a block."""
    case = make_case(
        "three", "hrm", H_cycles=1, batch=3, length=35, token_mixer=mixer, num_layers=2, intermediate_size=64
    )
    inputs = make_inputs(case, torch.bfloat16, weight_scale=SCALE)
    few, many = (ATTENTION, Instance(4, 3, 4)) if mixer == "attention" else (MIXER, Instance(4, 3, 4, 2, 4))
    expected = run_emulated(small, inputs, few)
    require(compare(inputs, expected))
    runs = {
        "reverse": run_emulated(small, inputs, few, Schedule("reverse")),
        "random": run_emulated(small, inputs, few, Schedule("random", 5)),
        "one group": run_emulated(small, inputs, few, groups=1),
        "two groups": run_emulated(small, inputs, few, groups=2),
        "more rows": run_emulated(wide, inputs, many),
        "other mma": run_emulated(small, inputs, few, truncate_mma=True),
    }
    require(compare(inputs, runs.pop("other mma")))
    for name, run in runs.items():
        for got, want in zip((*run.states, run.saved), (*expected.states, expected.saved), strict=True):
            assert torch.equal(got, want), name


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
@pytest.mark.parametrize("mixer", ("attention", "mlp_t"))
def test_a_bad_sequence_does_not_reach_the_others(small: ctypes.CDLL, mixer: str, bad: float) -> None:
    """One group of blocks takes all sequences through the same buffers."""
    case = make_case(
        "bad", H_cycles=1, batch=3, length=19, hidden_size=48, num_heads=3, token_mixer=mixer, num_layers=1
    )
    inputs = make_inputs(case, torch.bfloat16, weight_scale=SCALE)
    assert inputs.x is not None
    x = inputs.x.clone()
    x[1, 3, 5] = bad
    clean, spoilt = (run_emulated(small, one, instance_for(case), groups=1) for one in (inputs, replace(inputs, x=x)))
    require(compare(inputs, clean))
    for got, want in zip((*spoilt.states, spoilt.saved), (*clean.states, clean.saved), strict=True):
        assert torch.equal(got[..., ::2, :, :], want[..., ::2, :, :])
        assert not got[..., 1, :, :].isfinite().all()


@pytest.mark.breadth
@pytest.mark.parametrize("case", (PROGRAMS[0], PROGRAMS[1], PROGRAMS[4]), ids=str)
def test_saved_inputs(small: ctypes.CDLL, case: Case) -> None:
    """What is saved for backward is, bit by bit, the reference's sum of the states before each update with gradient."""
    program = case.problem.program.with_window("all")
    inputs = replace(make_inputs(case, torch.bfloat16, weight_scale=SCALE), problem=Problem(program, case.problem.nets))
    saved = run_emulated(small, inputs, instance_for(case)).saved
    states = inputs.states
    for index, update in enumerate(program.updates):
        assert torch.equal(saved[index], summed_input(update, states, inputs.x)), index
        prefix = RecursionProgram(program.states, program.nets, program.updates[: index + 1], index + 1)
        part = replace(inputs, problem=Problem(prefix, case.problem.nets))
        states = run_emulated(small, part, instance_for(case)).states


def test_only_the_window_is_saved(small: ctypes.CDLL) -> None:
    case = make_case("window", H_cycles=2, L_cycles=1, num_layers=1)
    inputs = make_inputs(case, torch.bfloat16, weight_scale=SCALE)
    everything = replace(inputs, problem=Problem(case.problem.program.with_window("all"), case.problem.nets))
    last = run_emulated(small, inputs, ATTENTION).saved
    assert len(last) == 2
    assert torch.equal(last, run_emulated(small, everything, ATTENTION).saved[2:])


def test_unwritten_states_pass_through(small: ctypes.CDLL) -> None:
    case = make_case("pass", num_layers=1)
    updates = (Update(dst=1, sources=(1, 0), inject_x=True, net=0, grad=True),)
    program = RecursionProgram(("z_H", "z_L"), ("f",), updates, 1)
    inputs = replace(make_inputs(case, torch.float16), problem=Problem(program, case.problem.nets))
    run = run_emulated(small, inputs, ATTENTION)
    assert torch.equal(run.states[0], inputs.states[0])
    require(compare(inputs, run))


@pytest.mark.parametrize("case", (PROGRAMS[0], PROGRAMS[1]), ids=str)
def test_blocks_that_are_not_resident_together(small: ctypes.CDLL, case: Case) -> None:
    """Blocks that can never meet give up after the time-out, the launch ends and says how many they were."""
    inputs = make_inputs(case, torch.bfloat16)
    run = run_emulated(small, inputs, instance_for(case), resident_blocks=1, timeout_ns=10**6)
    assert run.report["group_blocks"] == 2
    assert run.report["failed"] >= 2


@pytest.mark.representative(when=lambda case: case.name == "mlp_t")
@pytest.mark.parametrize("case", TRAFFIC, ids=str)
def test_traffic(small: ctypes.CDLL, case: Case) -> None:
    """Bytes of weights, tables, exchange and states are those of the model in kernels/persistent.py, all of them."""
    inputs = make_inputs(case, torch.bfloat16, weight_scale=SCALE)
    run = run_emulated(small, inputs, instance_for(case))
    expected = persistent_traffic(case.problem, case.batch, case.length, run.grid, rope=case.rope)
    assert run.traffic == replace(expected, compulsory=0)
    assert run.report["traffic"]["weights"][0] >= 2 * case.batch * sum(map(torch.numel, inputs.weights))
    tensor = inputs.states[0].nbytes
    assert expected.compulsory == tensor * (2 * len(inputs.states) + 1 + case.problem.num_grad_updates)


def case_for(instance: Instance, length: int, width: int = 0, **options: Any) -> Case:
    """One update of one block that an instance runs, of the smallest width that it is made for."""
    if not width:
        width = 320 if instance.width_tiles == 8 and instance.token_tiles <= 2 else 64
    mixer = "mlp_t" if instance.token_tiles else "attention"
    sizes: dict[str, Any] = {"hidden_size": width, "num_heads": width // 64, "token_mixer": mixer, **options}
    return make_case(f"{mixer}-{length}", "urm", H_cycles=1, L_cycles=1, batch=1, length=length, num_layers=1, **sizes)


def check_one_block(library: ctypes.CDLL, case: Case, instance: Instance, dtype: torch.dtype) -> Run:
    """A block against the reference; no bank conflict of ldmatrix; bytes as in the model."""
    inputs = make_inputs(case, dtype)
    run = run_emulated(library, inputs, instance, Schedule("random", 3))
    require(compare(inputs, run))
    assert inputs.x is not None
    assert torch.equal(run.saved[0], inputs.states[0] + inputs.x)
    assert run.report["group_blocks"] == -(-case.length // (16 * instance.row_tiles))
    count, wavefronts, ideal = run.report["ldmatrix"]
    assert count > 0
    assert wavefronts == ideal, "bank conflicts of ldmatrix"
    expected = persistent_traffic(case.problem, case.batch, case.length, run.grid)
    assert run.traffic == replace(expected, compulsory=0)
    return run


@pytest.mark.breadth
@pytest.mark.spread("instance")
@pytest.mark.parametrize("instance", listed_instances(), ids=str)
def test_every_instance(wide: ctypes.CDLL, instance: Instance) -> None:
    """Two blocks of the grid for a sequence, the second with few rows; long sequences of mlp_t fill more."""
    length = 150 if instance.token_tiles > 2 else 16 * instance.row_tiles + 5
    dtype = HALVES[instance.row_tiles // 2 % 2]
    check_one_block(wide, case_for(instance, length, intermediate_size=192), instance, dtype)


@pytest.mark.breadth
@pytest.mark.parametrize(
    "instance, length, dtype",
    [
        (Instance(4, 3, 4), 916, torch.bfloat16),
        (Instance(4, 4, 8), 901, torch.float16),
        (Instance(4, 4, 8, 16, 2), 916, torch.bfloat16),
        (Instance(2, 4, 8, 16, 1), 901, torch.float16),
    ],
    ids=str,
)
def test_long_sequences(wide: ctypes.CDLL, instance: Instance, length: int, dtype: torch.dtype) -> None:
    """The published lengths of ARC, whose groups of 15 blocks, or 29, meet at barriers."""
    check_one_block(wide, case_for(instance, length, intermediate_size=256), instance, dtype)


@pytest.mark.breadth
@pytest.mark.parametrize("instance", [Instance(4, 4, 8), Instance(4, 4, 8, 2, 4)], ids=str)
def test_full_width(wide: ctypes.CDLL, instance: Instance) -> None:
    """A block of the published width at L = 97: inner width 1536, 8 heads or a SwiGLU of 512 over the tokens."""
    run = check_one_block(wide, case_for(instance, 97, 512), instance, torch.bfloat16)
    assert run.report["conflicts"] == {}


@pytest.mark.grid
@pytest.mark.representative(when=lambda instance, dtype: dtype == HALVES[WIDE.index(instance) % 2], rest="product")
@pytest.mark.spread("instance", "dtype")
@pytest.mark.parametrize("dtype", HALVES, ids=("bf16", "fp16"))
@pytest.mark.parametrize("instance", WIDE, ids=str)
def test_full_width_of_every_instance(wide: ctypes.CDLL, instance: Instance, dtype: torch.dtype) -> None:
    run = check_one_block(wide, case_for(instance, 97, 512), instance, dtype)
    assert run.report["conflicts"] == {}


@pytest.mark.grid
@pytest.mark.representative(when=lambda instance: instance in LONG[::4], rest="product")
@pytest.mark.spread("instance")
@pytest.mark.parametrize("instance", LONG, ids=str)
def test_long_sequences_of_every_instance(wide: ctypes.CDLL, instance: Instance) -> None:
    """Attention of the published width at L = 916 or 901; mlp_t of half that, its inner width over tokens 2560."""
    length = 901 if instance.stages == 8 else 916
    width = 256 if instance.token_tiles else 512
    check_one_block(wide, case_for(instance, length, width), instance, torch.bfloat16)


@pytest.mark.sanitizer
def test_sanitizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of small cases, with kernels and emulator under the address and undefined-behaviour sanitizers."""
    monkeypatch.setenv("TRMFAST_SIMT_VARIANT", "sanitized")
    simt_recursion.compile_harness(
        FEW
    )  # here: with the sanitizer preloaded, as below, the compiler itself would be slow
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "CXX": "g++",
        "OMP_NUM_THREADS": "1",
    }
    tests = "test_options or test_blocks_that or test_unwritten"
    options = ["-q", "-p", "no:cacheprovider", "-k", tests, "-m", ""]
    command = [sys.executable, "-m", "pytest", *options, str(Path(__file__))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, (done.stdout + done.stderr)[-20000:]
