"""Forward and backward plans as Triton compiles them for sm_80: their PTX, executed, against the float64 reference.

Whole recursions run through the Triton backend with real launches: PTX instead of the interpreter.  Products of float32
are also TF32; then eager PyTorch rounds its operands as ``mma`` reads them.  Planted faults show what is found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed")

from trmfast.kernels import plan as kernel_plan
from trmfast.kernels.backward_plan import backward_plan
from trmfast.kernels.configurations import Configuration, Sizes
from trmfast.kernels.forward_plan import Setting, forward_plan
from trmfast.kernels.plan import Launch, Tile

from ptx_plans import ARCHITECTURE, Executor, Recorded
from ptx_tools import PtxError, Schedule
from test_triton_backend import CASES, small
from trmfast.backends import triton as backend
from trmfast.benchmark.suites import GPU_BATCHES
from trmfast.cases import PUBLISHED, Case, make_case
from trmfast.problem import Problem
from trmfast.program import RecursionProgram
from trmfast.testing import (
    compare_results,
    default_weight_scale,
    make_inputs,
    pool,
    require,
    run_eager,
    run_fused,
    run_truth,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not backend.interprets(), reason="plans run on the GPU here"),
]

MODES = {
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
}
SCHEDULES = (Schedule(), Schedule("reverse"), Schedule("random", 1), Schedule("random", 2))


@pytest.fixture(scope="module")
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    """One for all tests: it keeps what it compiled.  Says in the end what it executed."""
    with Executor() as made:
        yield made
    request.config.get_terminal_writer().line(f"\n{made}")


@pytest.fixture
def run_case(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a case as PTX under a schedule and compares it with the truth by the policy."""
    setting = backend._setting

    def run(
        case: Case,
        mode: str,
        fusion: str,
        schedule: Schedule,
        *,
        seeds: int = 2,
        scale: float | None = None,
        tile: int | None = None,
        recompute: bool = True,
    ) -> None:
        dtype, tf32 = MODES[mode]
        configuration = Configuration(ARCHITECTURE, fusion=fusion)
        if tile is not None:
            configuration = OneTile(ARCHITECTURE, fusion=fusion, index=tile)
        monkeypatch.setattr(backend, "_configuration", lambda _: configuration)
        monkeypatch.setattr(backend, "_setting", lambda *values: replace(setting(*values), tf32=tf32))
        monkeypatch.setattr(kernel_plan, "run", executor.run)
        executor.schedule = schedule
        # Half of the runs round products to zero, which a device may do.
        executor.truncate_mma = schedule.order != "forward"
        weight_scale = default_weight_scale(dtype) if scale is None else scale
        found = []
        for seed in range(5 if mode == "float32" else seeds):
            inputs = make_inputs(case, dtype, seed, weight_scale=weight_scale)
            with Tf32Products() if tf32 else nullcontext():
                eager = run_eager(inputs)
            found.append(compare_results(run_fused(inputs, "triton", recompute=recompute), eager, run_truth(inputs)))
        require(pool(found))

    return run


class Tf32Products(TorchDispatchMode):
    """Matrix products of float32 lose the low 13 bits of their operands, which ``mma`` ignores."""

    PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm)

    def __enter__(self) -> Tf32Products:
        self._stack = ExitStack()
        self._stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in self.PRODUCTS:
            args = (*args[:-2], *(cut(value) for value in args[-2:]))
        return func(*args, **(kwargs or {}))


def cut(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.float32:
        return tensor
    return (tensor.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


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
def test_sample(run_case: Callable[..., None], name: str, mode: str, fusion: str, schedule: Schedule) -> None:
    run_case(next(case for case in CASES if case.name == name), mode, fusion, schedule)


@pytest.mark.breadth
@pytest.mark.parametrize("fusion", ["most", "least"])
def test_kept_activations(run_case: Callable[..., None], fusion: str) -> None:
    """Backward finds what forward kept in place of computing it again."""
    run_case(small("kept", "hrm", window="all"), "bf16", fusion, SCHEDULES[1], recompute=False)


@pytest.mark.grid
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("fusion", ["most", "least"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_program(run_case: Callable[..., None], case: Case, mode: str, fusion: str, schedule: Schedule) -> None:
    if case.name == "one-token-mlp_t" and mode not in ("float32",):
        pytest.skip("a norm over one token leaves a gradient below the rounding of 16 bits")
    run_case(case, mode, fusion, schedule)


# ---- kernels of published problems


@dataclass(frozen=True)
class OneTile(Configuration):
    """Takes the tile of an index, or the last, wherever the model of time would choose one."""

    index: int = 0

    def launch(self, kernel: str, sizes: Sizes, build: Callable[[Tile], Launch]) -> Launch:
        tiles = self.tiles(kernel, sizes)
        return build(tiles[min(self.index, len(tiles) - 1)])


def one_block(name: str, length: int, **options: Any) -> Case:
    """One update of a block."""
    sizes = {"hidden_size": 512, "num_heads": 8, **options}
    case = make_case(
        name, "single_z", H_cycles=1, L_cycles=1, window="one_step", batch=1, length=length, num_layers=1, **sizes
    )
    program = RecursionProgram(case.problem.program.states, ("f",), case.problem.program.updates[-1:], 1)
    return replace(case, problem=Problem(program, case.problem.nets))


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
    run_case: Callable[..., None], case: Case, fusion: str, mode: str, tile: int, schedule: Schedule
) -> None:
    """Blocks of the published widths with each tile of their kernels, whichever the model of time takes at a batch.

    Not with each pair of tiles of a kernel and of the one that reads its results.
    """
    scale = 1.0 if len(case.problem.program.updates) == 1 else None
    run_case(case, mode, fusion, schedule, seeds=1, scale=scale, tile=tile)


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


def without(text: str, pattern: str, which: int, instead: str = "") -> str:
    """The text with one match of a pattern replaced."""
    found = list(re.finditer(pattern, text))[which]
    return text[: found.start()] + found.expand(instead) + text[found.end() :]


BARRIER, WAIT = r"bar\.sync\s+0;", r"cp\.async\.wait_group\s+(\d+);"
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
    """The first launch of each kernel of a forward plan, with what it found in memory."""
    patch = pytest.MonkeyPatch()
    patch.setattr(backend, "_configuration", lambda _: replace(Configuration(ARCHITECTURE), fusion="least"))
    patch.setattr(kernel_plan, "run", executor.run)
    case = small("planted", length=13, hidden_size=64, num_heads=2)
    executor.schedule, executor.recorded = SCHEDULES[0], []
    run_fused(make_inputs(case, torch.bfloat16), "triton", backward=False)
    patch.undo()
    found, executor.recorded = executor.recorded, None
    return {record.compiled.name: record for record in reversed(found)}


@pytest.mark.breadth
@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_found(executor: Executor, recorded: dict[str, Recorded], name: str) -> None:
    kernel, plant, message = PLANTED[name]
    record = recorded[kernel]
    right, wrong = record.compiled.ptx, plant(record.compiled.ptx)
    assert wrong != right
    for schedule in SCHEDULES:
        before = executor.again(record, right, schedule)
        if message is not None:
            with pytest.raises(PtxError, match=message):
                executor.again(record, wrong, schedule)
        else:
            after = executor.again(record, wrong, schedule)
            worst = max(float((before[n] - after[n]).abs().nan_to_num(torch.inf).max()) for n in before)
            assert worst > 0.05, "the results are the same"


@pytest.mark.grid
def test_every_barrier_matters_or_is_doubled(executor: Executor, recorded: dict[str, Recorded]) -> None:
    """Each barrier of each kernel is left out in turn."""
    lines = []
    for name, record in recorded.items():
        count = len(re.findall(BARRIER, record.compiled.ptx))
        found = 0
        for i in range(count):
            try:
                executor.again(record, without(record.compiled.ptx, BARRIER, i), SCHEDULES[1])
            except PtxError:
                found += 1
        lines.append(f"{name}: {found} of {count} barriers")
        assert found > 0 or count == 0
    print("\n".join(lines))
