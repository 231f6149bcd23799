"""No two programs of a launch touch the same memory unless both read it; and the checker finds those that do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl
from trmfast.kernels.backward_plan import backward_plan
from trmfast.kernels.configurations import Configuration, Sizes
from trmfast.kernels.forward_plan import Setting, forward_plan
from trmfast.kernels.plan import Buffer, Launch, Plan, Tile

from triton_guard import INTERPRETED
from triton_races import check_plan, races_of
from trmfast.cases import Case, make_case

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not INTERPRETED, reason="a GPU runs the kernels: only the interpreter shows accesses"),
]

HERE = Path(__file__).resolve().parent


class Pick(Configuration):
    """The smallest tiles of a GPU or the largest, whatever the model of time says: many programs, or partial ones."""

    largest = False

    def launch(self, kernel: str, sizes: Sizes, build: Callable[[Tile], Launch]) -> Launch:
        return build(self.tiles(kernel, sizes)[0 if self.largest else -1])


class Large(Pick):
    largest = True


def small(name: str, model: str = "trm", **options: Any) -> Case:
    sizes: dict[str, Any] = {"H_cycles": 1, "L_cycles": 1, "hidden_size": 32, "intermediate_size": 48, "batch": 2}
    return make_case(name, model, **{**sizes, "num_layers": 1, **options})


# The first four, with the GPUs and dtypes below, launch every kernel that all of them launch.
CASES = (
    small("trm", length=40),
    small("mlp_t-150", token_mixer="mlp_t", length=150),
    small("urm", "urm", channel_mixer="conv_swiglu", length=24),
    small("mlp_t", token_mixer="mlp_t", length=20),
    small("hrm", "hrm", length=40),
    small("single_z", "single_z", length=21),
    small("hier6", "hier6", L_cycles=6, length=17),
    small("gqa-causal", hidden_size=64, num_heads=4, num_kv_heads=2, causal=True, rope=False, length=150),
    small("odd", length=13, hidden_size=48, num_heads=3, intermediate_size=80, batch=3),
    small("mlp_t-conv", token_mixer="mlp_t", channel_mixer="conv_swiglu", length=33),
    small("wide-head", hidden_size=160, num_heads=2, length=70),
    small("window-all", H_cycles=2, window="all", length=33),
    small("columns", hidden_size=96, num_layers=2, length=13),
)
GPUS = (("sm_80", torch.float32), ("sm_120", torch.float16), ("gfx942", torch.bfloat16), ("sm_90", torch.bfloat16))


def plans(case: Case, configuration: Configuration, dtype: torch.dtype) -> list[Plan]:
    problem = case.problem
    setting = Setting(problem, case.batch, case.length, dtype, case.rope, configuration)
    needs = [True] * len(problem.program.states), problem.uses_x, [True] * problem.num_weights
    return [forward_plan(setting, True).packed(), backward_plan(setting, *needs).plan.packed()]


def check(case: Case, kind: type[Pick], architecture: str, dtype: torch.dtype, fusion: str) -> None:
    for plan in plans(case, kind(architecture, fusion=fusion), dtype):
        races, programs = check_plan(plan)
        assert not races, "\n".join(map(str, races))
        assert programs > len(plan) / 4


@pytest.mark.representative(when=lambda case: case.name == "mlp_t")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_programs_do_not_meet(case: Case) -> None:
    """Each case on one GPU with its smallest tiles."""
    number = CASES.index(case)
    check(case, Pick, *GPUS[number % len(GPUS)], fusion="most" if number % 4 > 1 else "least")


@pytest.mark.grid
@pytest.mark.parametrize("kind", [Pick, Large])
@pytest.mark.parametrize("fusion", ["most", "least"])
@pytest.mark.parametrize("architecture, dtype", GPUS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_programs_do_not_meet_anywhere(
    case: Case, architecture: str, dtype: torch.dtype, fusion: str, kind: type[Pick]
) -> None:
    check(case, kind, architecture, dtype, fusion)


# ---------------------------------------------------------------- planted races


@triton.jit
def step(x, y, STEP: tl.constexpr, N: tl.constexpr, BACK: tl.constexpr, BARRIER: tl.constexpr):  # type: ignore[no-untyped-def]
    """``y = 2 x`` in tiles of N, STEP apart; with BACK it reads what it wrote and doubles it again."""
    at = tl.program_id(0) * STEP + tl.arange(0, N)
    tl.store(y + at, tl.load(x + at) * 2)
    if BARRIER:
        tl.debug_barrier()
    if BACK:
        tl.store(y + at, tl.load(y + at) * 2)


@triton.jit
def shift(x, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """In place, each program reads one element of the next one's tile."""
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(x + at, tl.load(x + at + 1))


@triton.jit
def count(x, y, N: tl.constexpr, READ: tl.constexpr):  # type: ignore[no-untyped-def]
    """All programs add to one tile; with READ they also read it."""
    at = tl.arange(0, N)
    tl.atomic_add(y + at, tl.load(x + at))
    if READ:
        tl.store(x + tl.program_id(0) * N + at, tl.load(y + at))


@pytest.fixture(autouse=True)
def kernels_here(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("trmfast.kernels.planted")
    module.step, module.shift, module.count = step, shift, count  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trmfast.kernels.planted", module)


def planted(function: str, **constants: Any) -> Launch:
    buffers = {name: Buffer(name, (65,), torch.float32) for name in ("x", "y")}
    if function == "shift":
        del buffers["y"]
    return Launch.of(
        f"planted.{function}", (4,), buffers, reads=buffers, writes=buffers, constants=constants, tile=Tile.of()
    )


def found(launch: Launch) -> list[tuple[str, str]]:
    tensors = {name: torch.arange(65.0) for name in ("x", "y")}
    races = races_of(launch, tensors, HERE)
    assert all(race.lines[0].startswith("test_triton_races.py:") for race in races)
    return [(race.what, race.buffer) for race in races]


BACK = "a store is read back without a barrier in"


@pytest.mark.parametrize(
    "launch, expected",
    [
        (planted("step", STEP=16, N=16, BACK=False, BARRIER=False), []),
        (planted("step", STEP=16, N=16, BACK=True, BARRIER=True), []),
        (planted("step", STEP=16, N=16, BACK=True, BARRIER=False), [(BACK, "y")]),
        (planted("step", STEP=15, N=16, BACK=False, BARRIER=False), [("one program writes, another one writes", "y")]),
        (planted("shift", N=16), [("one program writes, another one reads", "x")]),
        (planted("count", N=16, READ=False), []),
        (planted("count", N=16, READ=True), [(BACK, "y"), ("one program adds, another one reads", "y")]),
    ],
    ids=["apart", "barrier", "read back", "overlap", "neighbour", "adds", "adds and reads"],
)
def test_planted_races(launch: Launch, expected: list[tuple[str, str]]) -> None:
    assert [race for race in found(launch) if race[1] != "x" or launch.kernel.endswith("shift")] == expected


def test_what_is_not_declared_is_found() -> None:
    launch = replace(planted("step", STEP=16, N=16, BACK=False, BARRIER=False), reads=(), writes=("x",))
    assert found(launch) == [("reads without declaring it", "x"), ("writes without declaring it", "y")]


def test_an_order_that_matters_is_found() -> None:
    x, y = (Buffer(name, (65,), torch.float32) for name in ("x", "y"))
    plan = Plan((planted("shift", N=16),), (x,), (y,))
    with pytest.raises(AssertionError, match=r"planted.shift: programs in another order give other bits of x"):
        check_plan(plan)
    assert np.prod(plan.launches[0].grid) == 4
