"""Plans: launch counts, buffers that are written before they are read, memory that is shared in time only, flags."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from trmfast.kernels.architectures import ARCHITECTURES, GPUS, TYPICAL
from trmfast.kernels.backward_plan import BackwardPlan, backward_plan
from trmfast.kernels.configurations import INTERPRETER, Configuration
from trmfast.kernels.forward_plan import Setting, forward_plan
from trmfast.kernels.plan import Buffer, Launch, Plan, Tile
from trmfast.kernels.roofline import launch_time, plan_time

from trmfast.cases import PUBLISHED, SMALL, Case, make_case
from trmfast.cli import main
from trmfast.flops import forward_flops, window_flops

H100 = Configuration("sm_90")
CASES = (*SMALL, *PUBLISHED)


def setting_of(case: Case, configuration: Configuration = H100, dtype: torch.dtype = torch.bfloat16) -> Setting:
    return Setting(case.problem, case.batch, case.length, dtype, case.rope, configuration)


def everything(setting: Setting) -> BackwardPlan:
    problem = setting.problem
    return backward_plan(setting, [True] * len(problem.program.states), problem.uses_x, [True] * problem.num_weights)


def check_written_before_read(plan: Plan) -> None:
    ready = {buffer.name: buffer.nbytes for buffer in (*plan.inputs, *plan.zeros)}
    pieces: dict[str, set[tuple[int, int]]] = {}
    for launch in plan:
        for buffer in launch.buffers(launch.reads):
            key = (buffer.offset, buffer.numel)
            assert buffer.name in ready or key in pieces.get(buffer.name, ()), f"{launch.kernel} reads {buffer.name}"
        for buffer in launch.buffers(launch.writes):
            pieces.setdefault(buffer.name, set()).add((buffer.offset, buffer.numel))
    for buffer in plan.outputs:
        assert buffer.name in ready or buffer.name in pieces, f"nobody writes {buffer.name}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_buffer_is_written_before_it_is_read(case: Case) -> None:
    setting = setting_of(case)
    for plan in (forward_plan(setting, True), forward_plan(setting, False), everything(setting).plan):
        check_written_before_read(plan)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_packed_buffers_that_live_together_do_not_overlap(case: Case) -> None:
    setting = setting_of(case)
    for plan in (forward_plan(setting, True), everything(setting).plan):
        packed = plan.packed()
        assert packed.scratch_bytes <= plan.scratch_bytes
        lives: dict[tuple[str, str, int, int], list[int]] = {}
        for before, after in zip(plan, packed, strict=True):
            index = plan.launches.index(before)
            names = [name for name, _ in before.arguments]
            for old, new in zip(before.buffers(names), after.buffers(names), strict=True):
                assert (old.shape, old.dtype) == (new.shape, new.dtype)
                if new.name.startswith("scratch"):
                    assert new.offset * new.dtype.itemsize % 256 == 0
                    key = (old.name, new.name, new.offset, new.offset + new.numel)
                    lives.setdefault(key, []).append(index)
        items = list(lives.items())
        for i, ((name, arena, first, end), uses) in enumerate(items):
            for (other, other_arena, other_first, other_end), other_uses in items[:i]:
                together = max(uses[0], other_uses[0]) <= min(uses[-1], other_uses[-1])
                overlap = arena == other_arena and max(first, other_first) < min(end, other_end)
                assert name == other or not (together and overlap), f"{name} and {other}"


MOST = {"trm-sudoku-att": ["qkv", "attention_projection", "swiglu"], "trm-sudoku-mlp": ["mlp_t", "swiglu"]}
LEAST = {
    "trm-sudoku-att": ["qkv", "attention", "projection", "gate_up", "projection"],
    "trm-sudoku-mlp": ["mlp_t", "gate_up", "projection"],
}


@pytest.mark.parametrize("fusion, expected", [("most", MOST), ("least", LEAST)], ids=["most", "least"])
@pytest.mark.parametrize("name", MOST)
def test_launches_of_a_block(name: str, fusion: str, expected: dict[str, list[str]]) -> None:
    case = next(case for case in PUBLISHED if case.name == name)
    plan = forward_plan(setting_of(case, Configuration("sm_90", fusion=fusion)), save=False)
    updates = len(case.problem.program.updates)
    found = [launch.kernel.split(".")[1].removesuffix("_kernel") for launch in plan]
    norms = [kernel for kernel in found if kernel.startswith("normed")]
    assert [kernel for kernel in found if kernel not in norms] == expected[name] * updates * 2
    # z_H + x is added up once in each of three cycles; the rest is normed and added up by first products.
    assert norms == ["normed_sum"] * 3 + (["normed_rows"] if fusion == "least" else [])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["trm-sudoku-att", "trm-arc-att", "trm-sudoku-mlp", "urm-arc"])
def test_four_launches_are_enough_for_any_block(name: str, architecture: str) -> None:
    case = next(case for case in PUBLISHED if case.name == name)
    blocks = len(case.problem.program.updates) * case.problem.nets[0].num_layers
    convolves = case.problem.nets[0].block.channel_mixer == "conv_swiglu"
    plan = forward_plan(setting_of(case, Configuration(architecture, fusion="most")), save=False)
    sums = sum(launch.kernel == "rows.normed_sum_kernel" for launch in plan)
    assert sums == (3 if name.startswith("trm") else 0)  # z_H + x of each cycle
    assert len(plan) - sums <= (4 if convolves else 3) * blocks


def test_the_model_decides_whether_the_channel_mixer_is_one_kernel() -> None:
    def last(architecture: str, batch: int) -> str:
        case = make_case("one", "urm", H_cycles=1, L_cycles=1, length=97, batch=batch, hidden_size=512, num_heads=8)
        plan = forward_plan(setting_of(case, Configuration(architecture)), save=False)
        return next(launch.kernel for launch in reversed(plan.launches) if not launch.kernel.startswith("rows."))

    # Few programs of a fused kernel would leave an A100 idle; with many its products are the limit either way.
    assert last("sm_80", 1) == "projection.projection_kernel"
    assert last("sm_80", 768) == "swiglu.swiglu_kernel"
    # The faster an architecture's tensor cores, the sooner 64 rows of weights are read too often from its cache.
    assert last("sm_90", 768) == "projection.projection_kernel"


def test_the_model_decides_who_norms() -> None:
    """Few rows would leave most of a GPU idle; wide ones fit no program; otherwise whole rows move less memory."""

    def tiles(architecture: str, batch: int, width: int = 512) -> set[int]:
        sizes = {"hidden_size": width, "num_heads": width // 64}
        case = make_case("one", H_cycles=1, L_cycles=1, length=97, batch=batch, **sizes)  # type: ignore[arg-type]
        plans = [forward_plan(setting_of(case, Configuration(architecture)), save=True)]
        plans.append(everything(setting_of(case, Configuration(architecture))).plan)
        for plan in plans:
            check_written_before_read(plan)
            assert not (width > 512 and any("attention_projection" in launch.kernel for launch in plan))
        squares = [dict(launch.arguments).get("squares") for plan in plans for launch in plan if launch.flops]
        return {buffer.shape[-1] if isinstance(buffer, Buffer) else 1 for buffer in squares}

    assert max(tiles("sm_80", 1)) == max(tiles("sm_90", 1)) == 16
    assert tiles("sm_80", 768) == {1}
    assert max(tiles("sm_80", 768, 1024)) == 8
    assert max(tiles("gfx942", 1, 2560)) == 40


@pytest.mark.parametrize("name, gain", [("trm-sudoku-att", 2.2), ("trm-sudoku-mlp", 2.0)])
def test_one_sudoku_is_not_limited_by_one_multiprocessor(name: str, gain: float) -> None:
    """Against programs that hold whole rows, by the model of time."""
    case = next(case for case in PUBLISHED if case.name == name)

    class Whole(Configuration):
        def choose(self, one: Sequence[Launch], two: Sequence[Launch]) -> Sequence[Launch]:
            return one if len(one) == len(two) else super().choose(one, two)

    gpu = GPUS["H100"]
    times = [plan_time(gpu, forward_plan(setting_of(case, kind("sm_90")), False)) for kind in (Whole, Configuration)]
    assert times[0] > gain * times[1]


@pytest.mark.parametrize("name, batch, before", [("trm-sudoku-att", 768, 122.16e-3), ("trm-arc-att", 192, 228.19e-3)])
def test_tiles_of_256_columns_shorten_training(name: str, batch: int, before: float) -> None:
    """On an H100, with recomputation; before: tiles of 128 x 128 and norms on whole rows, by the same model."""
    case = replace(next(case for case in PUBLISHED if case.name == name), batch=batch)
    setting = setting_of(case, Configuration("sm_90"))
    needs = [False] * len(case.problem.program.states), True, [True] * case.problem.num_weights
    launches = [*forward_plan(setting, save=True), *backward_plan(setting, *needs).plan]
    assert plan_time(GPUS["H100"], launches) < before / 1.12
    gradients = [dict(launch.constants) for launch in launches if "weight_gradient" in launch.kernel]
    assert {constants["BLOCK_N"] for constants in gradients} == {256}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_flops_are_those_of_the_recursion(case: Case) -> None:
    setting = setting_of(case)
    problem, batch, length = case.problem, case.batch, case.length
    assert forward_plan(setting, True).flops == forward_flops(problem, batch, length)
    backward = everything(setting).plan.flops
    # Twice the window for the gradients, once more for what is computed again, and gate, up and scores once more still.
    window = window_flops(problem, batch, length)
    assert 2.9 * window < backward < 4.6 * window


def test_saving_costs_a_store_and_no_launch() -> None:
    setting = setting_of(PUBLISHED[1])
    plain, saving = forward_plan(setting, False), forward_plan(setting, True)
    assert [launch.kernel for launch in plain] == [launch.kernel for launch in saving]
    assert "saved" not in plain.sizes()
    size, _ = saving.sizes()["saved"]
    assert size == 7 * 97 * 512


@pytest.mark.parametrize("case", [case for case in SMALL if case.name in ("trm", "trm-mlp_t", "hrm", "urm")], ids=str)
def test_what_is_not_asked_for_is_not_computed(case: Case) -> None:
    setting, problem = setting_of(case), case.problem
    states = len(problem.program.states)
    full = everything(setting)
    assert all(gradient is not None for gradient in full.grad_weights)

    frozen = backward_plan(setting, [True] * states, True, [False] * problem.num_weights)
    assert not any("weight_gradient" in launch.kernel or "conv_gradient" in launch.kernel for launch in frozen.plan)
    assert frozen.grad_x is not None
    assert not any(frozen.grad_weights)

    nothing = backward_plan(setting, [False] * states, False, [False] * problem.num_weights)
    assert len(nothing.plan) == 0

    one = [i == problem.num_weights - 1 for i in range(problem.num_weights)]
    last = backward_plan(setting, [False] * states, False, one)
    assert [gradient is not None for gradient in last.grad_weights] == one
    assert len(last.plan) < len(full.plan)
    for found in (frozen, last):
        check_written_before_read(found.plan)


def test_gradients_stop_at_updates_without_them() -> None:
    problem = make_case("trm", H_cycles=2, L_cycles=2, window="last_cycle").problem
    case = Case("trm", problem, 2, 12)
    found = everything(setting_of(case))
    # The first cycle writes both states, without gradients.
    assert found.grad_states == (None, None)
    assert found.grad_x is not None
    whole = everything(setting_of(Case("all", make_case("all", window="all").problem, 2, 12)))
    assert all(gradient is not None for gradient in whole.grad_states)


WIDE_HEADS = make_case("wide-heads", batch=1, length=97, hidden_size=512, num_heads=4)


@pytest.mark.representative(
    when=lambda architecture, dtype: architecture in ({"sm_90", "gfx942"} if dtype == torch.bfloat16 else {"sm_80"})
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", [*PUBLISHED, WIDE_HEADS], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_architecture_has_tiles_for_everything(case: Case, architecture: str, dtype: torch.dtype) -> None:
    setting = setting_of(case, Configuration(architecture), dtype)
    assert plan_time(GPUS[TYPICAL[architecture]], forward_plan(setting, True)) > 0
    assert plan_time(GPUS[TYPICAL[architecture]], everything(setting).plan) > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_token_mixers_without_room_for_a_sequence_go_in_tiles(architecture: str) -> None:
    def kernels(case: Case, dtype: torch.dtype) -> set[str]:
        plan = everything(setting_of(case, Configuration(architecture), dtype)).plan
        return {launch.kernel.split(".")[1].removesuffix("_kernel") for launch in plan}

    attention, mlp_t = (next(c for c in PUBLISHED if c.name == f"trm-sudoku-{name}") for name in ("att", "mlp"))
    assert "attention_backward_queries" not in kernels(attention, torch.bfloat16)
    assert "attention_backward_queries" in kernels(attention, torch.float32)
    assert "attention_backward_queries" in kernels(WIDE_HEADS, torch.bfloat16)
    assert "mlp_t_backward" in kernels(mlp_t, torch.bfloat16)
    assert "mlp_t_backward" not in kernels(mlp_t, torch.float32)


def test_more_than_2_31_elements() -> None:
    """Row numbers are 64-bit in the kernels; in the plan sizes are Python's."""
    case = replace(next(case for case in PUBLISHED if case.name == "trm-arc-att"), batch=4096)
    plan = forward_plan(setting_of(case), save=True)
    size, _ = plan.sizes()["saved"]
    assert size == 5 * 4096 * 916 * 512 > 2**31


def test_occupancy() -> None:
    a100 = ARCHITECTURES["sm_80"]
    assert a100.occupancy(registers=32, num_warps=4, shared=0) == 64
    assert a100.occupancy(registers=255, num_warps=8, shared=0) == 8
    assert a100.occupancy(registers=128, num_warps=4, shared=80 * 1024) == 8
    mi300x = ARCHITECTURES["gfx942"]
    assert mi300x.occupancy(registers=128, num_warps=4, shared=0) == 16
    assert mi300x.occupancy(registers=512, num_warps=4, shared=33 * 1024) == 4


def test_the_model_of_time_is_the_slowest_roof() -> None:
    a, b, c = (Buffer(name, (4096, 4096), torch.bfloat16) for name in "abc")

    def launch(flops: int, programs: int, special: int = 0) -> Launch:
        arguments = {"a": a, "b": b, "c": c}
        return Launch.of(
            "none.none",
            (programs,),
            arguments,
            reads=("a", "b"),
            writes=("c",),
            constants={},
            tile=Tile.of(),
            flops=flops,
            special=special,
        )

    gpu = GPUS["H100"]
    memory = launch_time(gpu, launch(0, 10_000))
    assert memory == pytest.approx(3 * 4096 * 4096 * 2 / (3352e9 * 0.85))
    assert launch_time(gpu, launch(10**13, 132 * 100)) == pytest.approx(10**13 / (989.4e12 * 0.75), rel=1e-6)
    assert launch_time(gpu, launch(0, 132, 10**12)) == pytest.approx(10**12 / (132 * 16 * 1.755e9))
    # One program has one multiprocessor.
    assert launch_time(gpu, launch(10**13, 1)) == pytest.approx(132 * 10**13 / (989.4e12 * 0.75), rel=1e-6)


def test_info_prints_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--plan", "trm-sudoku-att", "--batch", "768", "--gpu", "A100"]) == 0
    printed = capsys.readouterr().out
    assert "swiglu" in printed
    assert "MB of scratch" in printed
    assert main(["info", "--plan", "trm-sudoku-att", "--batch", "768", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    # One more for z_H + x in each of three cycles, and one for the norms of the results.
    assert record["forward"]["launches"] == 4 * 42 + 3 + 1
    assert record["backward"]["scratch_bytes"] > 0


@pytest.mark.parametrize(
    "options, message",
    [
        (["--plan", "chess"], "--plan: got 'chess', accepted are"),
        (["--plan", "trm", "--gpu", "abacus"], "--gpu: got 'abacus', accepted are A100"),
        (["--plan", "trm", "--dtype", "int8"], "--dtype: got 'int8', accepted are bfloat16"),
        (["--plan", "trm", "--batch", "0"], "--batch: got 0, accepted are numbers >= 1"),
    ],
)
def test_info_refuses(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["info", *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_tiles_of_the_interpreter_are_not_of_a_gpu() -> None:
    with pytest.raises(KeyError):
        _ = Configuration(INTERPRETER).gpu
