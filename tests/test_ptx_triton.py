"""Forward and backward plans as Triton compiles them for sm_80: their PTX, executed, against the float64 reference.

Whole recursions run through the Triton backend with real launches: PTX instead of the interpreter (ptx_runs.py).
Planted faults show what is found.  Options of blocks are in test_ptx_choices.py.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from trmfast.kernels.backward_plan import backward_plan
from trmfast.kernels.configurations import Configuration
from trmfast.kernels.forward_plan import Setting, forward_plan

from ptx_plans import ARCHITECTURE, Executor, Recorded
from ptx_runs import BARRIER, MODES, SCHEDULES, OneTile, one_update, record, required_barriers, run_case, without
from ptx_tools import PtxError, Schedule
from test_triton_backend import CASES, small
from trmfast.backends import triton as backend
from trmfast.benchmark.suites import GPU_BATCHES
from trmfast.cases import PUBLISHED, Case, make_case

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not backend.interprets(), reason="plans run on the GPU here"),
]

# Each kind of kernel, in each mode, under each kind of schedule.
SAMPLE = [
    ("trm", "bf16", "most", SCHEDULES[0]),
    ("trm-mlp_t", "bf16", "most", SCHEDULES[1]),
    ("urm", "bf16", "most", SCHEDULES[2]),
    ("odd-sizes", "bf16", "least", SCHEDULES[1]),
    ("L150-causal", "bf16", "least", SCHEDULES[3]),
    ("L150-mlp_t", "bf16", "most", SCHEDULES[2]),
    ("odd-sizes", "fp16", "most", SCHEDULES[2]),
    ("trm", "tf32", "most", SCHEDULES[3]),
    ("trm-mlp_t", "float32", "most", SCHEDULES[1]),
]


@pytest.mark.breadth
@pytest.mark.parametrize("name, mode, fusion, schedule", SAMPLE, ids=str)
def test_sample(executor: Executor, name: str, mode: str, fusion: str, schedule: Schedule) -> None:
    run_case(executor, next(case for case in CASES if case.name == name), mode, fusion, schedule)


@pytest.mark.breadth
@pytest.mark.parametrize("fusion", ["most", "least"])
def test_kept_activations(executor: Executor, fusion: str) -> None:
    """Backward finds what forward kept in place of computing it again."""
    run_case(executor, small("kept", "hrm", window="all"), "bf16", fusion, SCHEDULES[1], recompute=False)


@pytest.mark.grid
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("fusion", ["most", "least"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_program(executor: Executor, case: Case, mode: str, fusion: str, schedule: Schedule) -> None:
    if case.name == "one-token-mlp_t" and mode not in ("float32",):
        pytest.skip("a norm over one token leaves a gradient below the rounding of 16 bits")
    run_case(executor, case, mode, fusion, schedule)


# ---- kernels of published problems


def one_block(name: str, length: int, **options: Any) -> Case:
    """One update of a block."""
    sizes = {"hidden_size": 512, "num_heads": 8, **options}
    case = make_case(
        name, "single_z", H_cycles=1, L_cycles=1, window="one_step", batch=1, length=length, num_layers=1, **sizes
    )
    return one_update(case, -1)


BLOCKS = [
    one_block("attention", 97),
    one_block("mlp_t", 97, token_mixer="mlp_t"),
    one_block("convolution", 97, channel_mixer="conv_swiglu"),
    one_block("wide-heads", 97, num_heads=4),
    one_block("attention-916", 916),
    one_block("mlp_t-916", 916, token_mixer="mlp_t"),
    # Sums of three terms, two of which four updates share, and a block whose gradient another block takes.
    make_case("trm-cycle", H_cycles=1, L_cycles=4, batch=1, length=97, hidden_size=512, num_heads=8),
]
LARGEST, MIDDLE, SMALLEST = 0, 1, 2
FUSIONS = ("most", "least")


@pytest.mark.grid
@pytest.mark.parametrize(
    "tile, schedule", [(LARGEST, SCHEDULES[1]), (MIDDLE, SCHEDULES[2]), (SMALLEST, SCHEDULES[1])], ids=str
)
@pytest.mark.parametrize("mode", ["bf16", "tf32"])
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_published_blocks(
    executor: Executor, case: Case, fusion: str, mode: str, tile: int, schedule: Schedule
) -> None:
    """Blocks of the published widths with each tile of their kernels, whichever the model of time takes at a batch.

    Not with each pair of tiles of a kernel and of the one that reads its results.
    """
    scale = 1.0 if len(case.problem.program.updates) == 1 else None
    run_case(executor, case, mode, fusion, schedule, seeds=1, scale=scale, tile=tile)


def tiles_of(case: Case, batch: int, configuration: Configuration) -> set[tuple[Any, ...]]:
    """Kernels with the tiles that the plans of a problem take in bfloat16, forward and backward."""
    problem = case.problem
    setting = Setting(problem, batch, case.length, torch.bfloat16, case.rope, configuration)
    needs = [True] * len(problem.program.states), problem.uses_x, [True] * problem.num_weights
    found = set()
    for launch in (*forward_plan(setting, True), *backward_plan(setting, *needs).plan):
        blocks = tuple(constant for constant in launch.constants if constant[0].startswith("BLOCK_"))
        found.add((launch.kernel, blocks, launch.num_warps, launch.num_stages))
    return found


@pytest.mark.breadth
def test_published_blocks_have_every_kernel_and_tile_of_published_plans() -> None:
    """What a published problem launches on an A100, at each batch that is measured."""
    grid, published = set(), set()
    for case, fusion, index in product(BLOCKS, FUSIONS, (LARGEST, MIDDLE, SMALLEST)):
        grid |= tiles_of(case, case.batch, OneTile(ARCHITECTURE, fusion=fusion, index=index))
    for case in PUBLISHED:
        for batch in GPU_BATCHES[case.name]:
            published |= tiles_of(case, batch, Configuration(ARCHITECTURE))
    assert len(published) > 40
    assert published <= grid, "\n".join(map(str, published - grid))


# ---- planted faults


WAIT = r"cp\.async\.wait_group\s+(\d+);"
ANOTHER = "another thread (read|wrote) there since the last barrier|nobody wrote there"
# What is planted, in which kernel, and what is said; None: results differ.
PLANTED: dict[str, tuple[str, Callable[[str], str], str | None]] = {
    "a barrier before a load": ("attention_kernel", lambda t: without(t, BARRIER, 0), ANOTHER),
    "a barrier after a load": ("attention_kernel", lambda t: without(t, BARRIER, 1), ANOTHER),
    "a barrier of a reduction": ("projection_kernel", lambda t: without(t, BARRIER, -2), ANOTHER),
    "no wait": ("gate_up_kernel", lambda t: without(t, WAIT, 0), "a cp.async is on its way"),
    "a wait for one group less": (
        "gate_up_kernel",
        lambda t: without(t, WAIT, 0, "cp.async.wait_group 9;"),
        "a cp.async is on its way",
    ),
    "a wait behind its barrier": (
        "gate_up_kernel",
        lambda t: without(t, WAIT + r"([^@]*?)" + BARRIER, 0, r"\2 bar.sync 0; cp.async.wait_group \1;"),
        f"{ANOTHER}|a cp.async is on its way",
    ),
    "a lane map of mma": (
        "projection_kernel",
        lambda t: without(t, r"(mma[^;]*?\}, \{ )(%r\d+), (%r\d+)(, %r\d+, %r\d+ \})", 0, r"\1\3, \2\4"),
        None,
    ),
    "a lane map of ldmatrix": (
        "projection_kernel",
        lambda t: without(t, r"(ldmatrix[^{]*\{%r\d+, )(%r\d+), (%r\d+)", 0, r"\1\3, \2"),
        None,
    ),
    "a shuffle": ("attention_kernel", lambda t: t.replace(", 2, 31, -1", ", 1, 31, -1"), None),
    "an off-by-one mask": (
        "gate_up_kernel",
        lambda t: t.replace("setp.lt.s32", "setp.le.s32"),
        r": bytes \d+ to \d+ of",
    ),
    "a wrong mask of keys": (
        "attention_kernel",
        lambda t: without(t, r"setp\.lt\.s32(?=[^;]*;\s*(setp[^;]*;\s*)*(\.loc.*\s*)*selp\.f32)", 1, "setp.le.s32"),
        None,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def recorded(executor: Executor) -> dict[str, Recorded]:
    return record(executor, small("planted", length=13, hidden_size=64, num_heads=2))


@pytest.mark.breadth
@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_found(executor: Executor, recorded: dict[str, Recorded], name: str) -> None:
    kernel, plant, message = PLANTED[name]
    launch = recorded[kernel]
    right, wrong = launch.compiled.ptx, plant(launch.compiled.ptx)
    assert wrong != right
    for schedule in SCHEDULES:
        before = executor.again(launch, right, schedule)
        if message is not None:
            with pytest.raises(PtxError, match=message):
                executor.again(launch, wrong, schedule)
        else:
            after = executor.again(launch, wrong, schedule)
            worst = max(float((before[n] - after[n]).abs().nan_to_num(torch.inf).max()) for n in before)
            assert worst > 0.05, "the results are the same"


@pytest.mark.grid
def test_every_barrier_matters_or_is_doubled(executor: Executor, recorded: dict[str, Recorded]) -> None:
    """Each barrier of each kernel is left out in turn."""
    lines = []
    for name, launch in recorded.items():
        found, count = required_barriers(executor, launch)
        lines.append(f"{name}: {len(found)} of {count} barriers")
        assert found or count == 0
    print("\n".join(lines))
