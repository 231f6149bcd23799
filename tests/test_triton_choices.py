"""Options of blocks beyond the puzzle models' in the Triton kernels: norms, gates, masks, heads, channel mixers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from trmfast.kernels.backward_plan import backward_plan
from trmfast.kernels.configurations import INTERPRETER, Configuration, Sizes
from trmfast.kernels.forward_plan import Setting, forward_plan
from trmfast.kernels.plan import Buffer, Launch, Plan, Tile
from trmfast.kernels.qkv import qkv

import triton_guard
from test_cpu_choices import grows
from test_injection import check_mixed
from test_triton_backend import guarded, values_of
from test_triton_plan import check_written_before_read, everything, setting_of
from triton_bounds import checked_run
from triton_draw import buffers, draw
from triton_guard import DEVICE, INTERPRETED, guarded_run
from triton_races import check_plan
from trmfast.backends import BACKENDS
from trmfast.backends import triton as backend
from trmfast.cases import CHOICES, LOOPED, Case, Inputs, make_case, make_inputs, rope_tables
from trmfast.flops import forward_flops, window_flops
from trmfast.reference import rotate
from trmfast.spec import BlockSpec
from trmfast.testing import check_case, require, run_truth

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES: dict[str, Any] = {
    "H_cycles": 1, "L_cycles": 1, "batch": 2, "length": 11, "hidden_size": 32, "intermediate_size": 48,
}  # fmt: skip
HRM_TEXT = {"norm_placement": "pre", "final_norm": True, "gate": "channel", "causal": True}


def small(name: str, model: str = "trm", **options: Any) -> Case:
    return make_case(name, model, **{**SIZES, **options})


# The blocks of looped language models, and options that these leave out.
CASES = (
    small("hrm_text", "hrm_text", window="all", segments=True, num_layers=1, **HRM_TEXT),
    small("ouro", "urm", norm_placement="sandwich", norm_weight=True, final_norm=True, causal=True),
    small(
        "huginn", "urm", norm_placement="sandwich_sum", norm_weight=True, qk_bias=True, rotation="interleaved",
        causal=True,
    ),
    small(
        "parcae", "urm", norm_placement="pre", norm_weight=True, qk_norm="plain", rotation="interleaved",
        channel_mixer="relu2", causal=True,
    ),
    small("pre-no-final-norm", norm_placement="pre", num_layers=1),
    small("post-weights", norm_weight=True, final_norm=True),
    small("pre-conv", "urm", norm_placement="pre", norm_weight=True, final_norm=True, channel_mixer="conv_swiglu"),
    small("final-norm-mlp_t", token_mixer="mlp_t", final_norm=True, channel_mixer="gelu"),
    small(
        "heads", "urm", qk_norm="learned", qk_bias=True, gate="head", num_heads=4, num_kv_heads=2, hidden_size=48,
        head_dim=12, attention_window=4,
    ),
    small("window-causal", "urm", attention_window=3, causal=True, norm_placement="sandwich"),
    small("linear", "hrm", injection="linear", norm_weight=True, final_norm=True, num_layers=1),
    small("linear-pre", "trm", injection="linear", norm_placement="pre", num_layers=1),
    small("diagonal", "trm", injection="diagonal"),
    small("diagonal-mlp_t", "single_z", injection="diagonal", token_mixer="mlp_t", H_cycles=2, window="all"),
    small("simple_gla", "urm", token_mixer="simple_gla", causal=True, num_heads=4, num_kv_heads=2),
    small(
        "simple_gla-segments", "urm", token_mixer="simple_gla", causal=True, segments=True, norm_placement="pre",
        norm_weight=True, final_norm=True, gate="channel", qk_norm="learned", qk_bias=True, num_layers=1,
    ),
    small("no-rope", "urm", rope=False, qk_norm="learned", qk_bias=True, gate="head", channel_mixer="gelu"),
)  # fmt: skip

PROGRAMS_HERE = {"hrm_text", "linear", "diagonal"}


@pytest.mark.representative(when=lambda case, dtype: case.name in PROGRAMS_HERE and dtype == torch.bfloat16)
@pytest.mark.spread("case", "dtype")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_programs(case: Case, dtype: torch.dtype) -> None:
    """Forward and all gradients, through the operator."""
    seeds = range(5 if dtype == torch.float32 else 2)
    require(check_case(case, dtype, "triton", seeds=seeds, device=DEVICE))


@pytest.mark.grid
@pytest.mark.spread("case", "dtype")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CHOICES, ids=str)
def test_the_list_of_choices(case: Case, dtype: torch.dtype) -> None:
    """All of trmfast.cases.CHOICES, as ``trmfast check`` draws them."""
    reason = BACKENDS["triton"].supports(case.problem, DEVICE, dtype, case.batch, case.length)
    assert reason is None
    if grows(case) and dtype == torch.bfloat16:
        pytest.skip(f"{case}: states beyond 1, so the policy judges no bfloat16; test_programs has fewer updates")
    seeds = range(5 if dtype == torch.float32 else 2)
    require(check_case(case, dtype, "triton", seeds=seeds, device=DEVICE))


@pytest.mark.skipif(not INTERPRETED, reason="the tensors are those of the CPU")
def test_networks_with_injections_of_their_own() -> None:
    check_mixed("triton")


# ---------------------------------------------------------------- plans in small tiles


class Tiles(Configuration):
    """The smallest tiles of a GPU: several of a row, of a head, of a sequence."""

    def launch(self, kernel: str, sizes: Sizes, build: Callable[[Tile], Launch]) -> Launch:
        return build(self.tiles(kernel, sizes)[-1])


def values(inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    found = values_of(inputs, dtype)
    return found if inputs.segments is None else {**found, "segments": inputs.segments}


TILED = (
    small("hrm_text", "urm", segments=True, batch=1, length=37, hidden_size=40, num_heads=2, num_layers=1, **HRM_TEXT),
    small("ouro", "urm", norm_placement="sandwich", norm_weight=True, final_norm=True, batch=1, length=37,
          hidden_size=136, num_heads=2, num_layers=1, attention_window=9),
    small("heads", "urm", qk_norm="learned", qk_bias=True, gate="head", num_heads=2, num_kv_heads=1, length=19,
          hidden_size=48, head_dim=12, num_layers=1, rotation="interleaved", attention_window=7, causal=True,
          norm_placement="sandwich", norm_weight=True, final_norm=True),
    small("huginn", "urm", norm_placement="sandwich_sum", norm_weight=True, channel_mixer="gelu", length=21,
          hidden_size=72, num_heads=3, num_layers=1),
    small("linear", "trm", injection="linear", length=21, hidden_size=72, num_heads=3, num_layers=1),
    small("diagonal", "trm", injection="diagonal", norm_placement="pre", length=21, hidden_size=72, num_heads=3,
          num_layers=1),
    small("simple_gla", "urm", token_mixer="simple_gla", causal=True, segments=True, gate="head", num_heads=4,
          num_kv_heads=2, length=75, hidden_size=40, head_dim=10, num_layers=1),
    small("two layers", "urm", segments=True, length=70, hidden_size=96, num_heads=3, norm_weight=True, **HRM_TEXT),
)  # fmt: skip


@pytest.fixture
def addresses_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN shows what is read outside of a buffer only where it reaches a result; this shows the rest."""
    monkeypatch.setattr(triton_guard, "run", checked_run)


def check_small_tiles(case: Case) -> None:
    """Every buffer is poisoned and lies between zones of NaN; float32, whose tiles are the smallest."""
    problem, dtype = case.problem, torch.float32
    inputs = make_inputs(case, dtype, weight_scale=0.7)
    setting = Setting(problem, case.batch, case.length, dtype, case.rope, Tiles("sm_80"))
    given = values(inputs, dtype)
    forward = guarded(forward_plan(setting, save=True), given)
    backward = backward_plan(setting, [True] * len(inputs.states), problem.uses_x, [True] * problem.num_weights)
    given.update({f"grad.{s}": gradient.clone() for s, gradient in enumerate(inputs.grad_states)})
    found = guarded(backward.plan, {**given, "saved": forward["saved"]})
    truth = run_truth(inputs)
    for s, name in enumerate(problem.program.states):
        torch.testing.assert_close(forward[f"out.{s}"].double(), truth.outputs[name], rtol=0, atol=1e-3)
    results = dict(zip(problem.weight_names, backward.grad_weights, strict=True))
    results.update(zip(problem.program.states, backward.grad_states, strict=True))
    for name, gradient in results.items():
        expected = truth.gradients[f"grad {name}"]
        assert gradient is not None or not expected.any()
        if gradient is not None:
            scale = float(expected.abs().max())
            torch.testing.assert_close(found[gradient.name].double(), expected, rtol=0, atol=1e-3 * scale, msg=name)


def check_races(case: Case, dtype: torch.dtype) -> None:
    """No program of a launch touches what another one writes."""
    setting = setting_of(case, Tiles("sm_90"), dtype)
    for plan in (forward_plan(setting, True).packed(), everything(setting).plan.packed()):
        races, programs = check_plan(plan)
        assert not races, "\n".join(map(str, races))
        assert programs > len(plan) / 4


@pytest.mark.skipif(not INTERPRETED, reason="a GPU runs its own tiles: test_programs")
@pytest.mark.representative(when=lambda case: case.name in {"hrm_text", "heads", "linear", "diagonal", "simple_gla"})
@pytest.mark.parametrize("case", TILED, ids=str)
@pytest.mark.usefixtures("addresses_are_checked")
def test_small_tiles_between_guard_zones(case: Case) -> None:
    check_small_tiles(case)


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter shows accesses")
@pytest.mark.representative(when=lambda case, dtype: case.name == "hrm_text" and dtype == torch.bfloat16)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", TILED, ids=str)
def test_programs_do_not_meet(case: Case, dtype: torch.dtype) -> None:
    check_races(case, dtype)


@pytest.mark.parametrize("layout", ["channel", "head"])
@pytest.mark.parametrize("rotation", ["half", "interleaved"])
@pytest.mark.parametrize("heads, head_dim", [(5, 12), (4, 20)])
def test_gates_beside_rotated_heads(layout: str, rotation: str, heads: int, head_dim: int) -> None:
    """Column tiles that hold the end of the gate and the first pairs of a head.

    With heads of 20, what fills the gate up to a whole head needs a column tile more than the product has.
    """
    block = BlockSpec(24, 8, num_heads=heads, num_kv_heads=1, head_dim=head_dim, gate=layout, rotation=rotation)
    gate, biased = block.gate_rows, (heads + 1) * head_dim
    rows = gate + biased + head_dim
    shape = {"h": (2, 9, 24), "weight": (rows, 24), "bias": (biased,)}
    cos, sin = rope_tables(9, head_dim, rotation=rotation)
    drawn = draw(shape, torch.float32)
    given = {**drawn, "cos": cos, "sin": sin}
    b = buffers(given)
    out = Buffer("out", (2, 9, rows), torch.float32)
    tables = {"bias": b["bias"], "cos": b["cos"], "sin": b["sin"]}
    tile = Tile.of(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16)
    found = guarded_run([qkv(block, [b["h"]], b["weight"], out, **tables, tile=tile)], given)["out"]
    expected = drawn["h"].double() @ drawn["weight"].double().T
    expected[..., gate : gate + biased] += drawn["bias"]
    turned = expected[..., gate : gate + biased].unflatten(-1, (heads + 1, head_dim))
    expected[..., gate : gate + biased] = rotate(turned, cos, sin, rotation).flatten(-2)
    torch.testing.assert_close(found.double().cpu(), expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- plans


@pytest.mark.parametrize("case", [*CASES, *LOOPED], ids=str)
def test_plans(case: Case) -> None:
    """Every buffer is written before it is read, and the products are those of the recursion."""
    setting, problem = setting_of(case), case.problem
    backward = everything(setting)
    for plan in (forward_plan(setting, True), forward_plan(setting, False), backward.plan):
        check_written_before_read(plan)
    assert forward_plan(setting, True).flops == forward_flops(problem, case.batch, case.length)
    window = window_flops(problem, case.batch, case.length)
    assert 2.7 * window < backward.plan.flops < 4.6 * window
    assert all(gradient is not None for gradient in backward.grad_weights)


def test_norms_ahead_of_mixers_take_no_launches() -> None:
    """Products leave squares, the products behind them scale rows."""
    (case,) = LOOPED
    plan = forward_plan(setting_of(case), save=False)
    found = [launch.kernel.split(".")[1].removesuffix("_kernel") for launch in plan]
    block = ["qkv", "attention", "projection", "gate_up", "projection"]
    layers = case.problem.nets[0].num_layers
    assert found == ["normed_sum", *block * layers, "normed_rows"]


def test_gradients_that_are_not_asked_for() -> None:
    sandwich = {"norm_placement": "sandwich_sum", "norm_weight": True, "qk_bias": True, "num_layers": 1}
    case = small("huginn", "urm", **sandwich)
    setting, problem = setting_of(case), case.problem

    def plan(*names: str) -> Plan:
        needs = [any(name.endswith(wanted) for wanted in names) for name in problem.weight_names]
        found = backward_plan(setting, [False], False, needs)
        assert [gradient is not None for gradient in found.grad_weights] == needs
        check_written_before_read(found.plan)
        return found.plan

    kernels = [{launch.kernel for launch in plan(name)} for name in ("norm1.weight", "norm4.weight", "qk_bias")]
    assert "norm_weights.unfold_kernel" in kernels[0]
    assert "norm_weights.column_sums_kernel" not in kernels[0]
    assert not {"norm_weights.unfold_kernel", "attention_backward.attention_backward_keys_kernel"} & kernels[1]
    assert "weight_gradient.weight_gradient_kernel" not in kernels[2]
    assert len(plan("norm4.weight")) < len(plan("norm1.weight")) < len(plan("weight", "bias"))


@pytest.mark.breadth
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[4]], ids=str)
def test_backward_recomputes_the_same_bits(case: Case) -> None:
    """The states of a forward plan that saves, and those that its backward plan computes again."""
    dtype, problem = torch.bfloat16, case.problem
    inputs = make_inputs(case, dtype, device=DEVICE)
    configuration = Configuration(INTERPRETER) if INTERPRETED else backend._configuration(DEVICE)
    setting = Setting(problem, case.batch, case.length, dtype, case.rope, configuration)
    given = values(inputs, dtype)
    forward = guarded(forward_plan(setting, save=True), given)
    plan = everything(setting).plan
    given.update({f"grad.{s}": g.float() for s, g in enumerate(inputs.grad_states)})
    # The last update comes first; its network ends ahead of what reads the gradient.
    first = next(i for i, launch in enumerate(plan) if any("grad." in b.name for b in launch.buffers(launch.reads)))
    computed = [launch for launch in plan.launches[:first] if launch.kernel != "rows.normed_rows_kernel"]
    again = guarded(Plan(tuple(computed)), {**given, "saved": forward["saved"]})
    (name,) = {buffer.name for buffer in computed[-1].buffers(["out"])}
    plain = Plan(forward_plan(setting, save=True).launches)
    ends = [launch for launch in plain if not launch.kernel.startswith("rows.normed_rows")]
    raw = guarded(Plan(tuple(ends)), given)[ends[-1].buffers(["out"])[0].name]
    assert torch.equal(again[name].view(torch.int16), raw.view(torch.int16))
