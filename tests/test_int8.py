"""int8 inference: the engine's arithmetic bit for bit, on every instruction set, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

import trmfast
from model_cases import make_batch
from test_solver import model_of
from trmfast.backends import BACKENDS
from trmfast.backends import cpu as engine
from trmfast.cases import Case, Inputs, make_case, make_inputs
from trmfast.int8 import int8_linear, quantize, quantize_weight
from trmfast.models import ACTModel
from trmfast.ops import recursion
from trmfast.reference import run_program
from trmfast.solving import Solver
from trmfast.testing import Result, carry_fidelity, compare_results, require, run_truth

_cpu: Any = engine._cpu
needs_engine = pytest.mark.skipif(_cpu is None, reason="the CPU engine was not built")
TARGETS = [
    target
    for target, reason in engine.targets().items()
    if reason is None and (target, "i8") in set(_cpu.compiled_pairs())
]


def product(target: str, x: Tensor, weight: Tensor, left: bool) -> dict[str, Tensor]:
    """One product of a target: x [rows, K], weight [columns, K]; sums and result are [rows, columns]."""
    (rows, depth), columns = x.shape, weight.shape[0]
    held = x.T.contiguous() if left else x.contiguous()
    shape = (columns, rows) if left else (rows, columns)
    out = {
        "q": torch.full((rows, depth), 99, dtype=torch.int8),
        "scale": torch.full((rows,), torch.nan),
        "q_weight": torch.full((columns, depth), 99, dtype=torch.int8),
        "scale_weight": torch.full((columns,), torch.nan),
        "sums": torch.full(shape, 99, dtype=torch.int32),
        "result": torch.full(shape, torch.nan),
    }
    addresses = [tensor.data_ptr() for tensor in out.values()]
    _cpu.int8_product(target, held.data_ptr(), weight.data_ptr(), (rows, columns, depth), left, addresses)
    if left:
        out["sums"], out["result"] = out["sums"].T, out["result"].T
    return out


def hard_rows(rows: int, depth: int, generator: torch.Generator) -> Tensor:
    """Random rows; the first ones are all at the largest magnitude, zero, tiny, huge, with one outlier."""
    x = torch.randn(rows, depth, generator=generator)
    special = (torch.ones(depth), -torch.ones(depth), torch.zeros(depth), x[0] * 2.0**-120, x[0] * 2.0**125)
    for row, values in zip(x, special, strict=False):
        row.copy_(values)
    if rows > len(special):
        x[len(special), 0] = 300
    return x


SIZES = [(1, 1, 1), (3, 33, 5), (29, 70, 97), (14, 32, 128), (47, 31, 259)]


@needs_engine
@pytest.mark.parametrize("left", [False, True], ids=["rows", "left"])
@pytest.mark.parametrize("target", TARGETS)
def test_sums_are_those_of_the_reference(target: str, left: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, columns, depth in SIZES:
        x = hard_rows(rows, depth, generator).bfloat16()
        weight = hard_rows(columns, depth, generator)
        found = product(target, x, weight, left)
        q, scale = quantize(x)
        q_weight, scale_weight = quantize_weight(weight)
        sums = q.int() @ q_weight.int().T
        assert sums.abs().max() > 127 * 127 * depth * 0.99  # the first row times the first column is as large as can be
        expected = {"q": q, "scale": scale[:, 0], "q_weight": q_weight, "scale_weight": scale_weight, "sums": sums}
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (name, rows, columns, depth)
        exact = sums.float() * (scale * scale_weight)
        assert torch.equal(found["result"], exact)
        assert torch.equal(exact.bfloat16(), int8_linear(x, weight))


@needs_engine
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_becomes_nan_alone(target: str, value: float) -> None:
    x, weight = torch.randn(20, 40).bfloat16(), torch.randn(36, 40)
    x[3, 7] = value
    weight[35, 39] = value
    clean = torch.ones(20, 36, dtype=torch.bool)
    clean[3], clean[:, 35] = False, False
    for left in (False, True):
        result = product(target, x, weight, left)["result"]
        assert torch.equal(result.isnan(), ~clean)
        assert torch.equal(int8_linear(x, weight).isnan(), ~clean)
        assert torch.equal(result[clean].bfloat16(), int8_linear(x, weight)[clean])


def test_the_inverse_of_a_scale_is_rounded_once() -> None:
    """127 / (255 / 128) lies within 2^-18 below a number of 16 bits: an error of one unit is cut to that."""
    _, scale = quantize(torch.tensor([[255 / 128]]).bfloat16())
    assert scale.item() == torch.tensor(63 + 766 / 1024).reciprocal().item()


def test_quantising_is_within_half_a_step() -> None:
    x = torch.randn(50, 300).bfloat16()
    q, scale = quantize(x)
    assert q.abs().amax(-1).eq(127).all()
    # The cut of 127 / max to 16 bits moves the scale by up to 2^-15.
    assert ((q * scale - x.float()).abs() <= scale * (0.5 + 2**-16)).all()
    q, scale = quantize_weight(x.float())
    assert ((q * scale[:, None] - x.float()).abs() <= scale[:, None] * (0.5 + 2**-16)).all()


# ---------------------------------------------------------------- recursions

CASES = [
    make_case("attention", H_cycles=1, L_cycles=2, batch=3, length=13, hidden_size=48, num_heads=3),
    make_case("mlp_t", H_cycles=1, L_cycles=2, batch=3, length=13, hidden_size=40, token_mixer="mlp_t"),
    make_case("odd", H_cycles=1, L_cycles=1, length=35, hidden_size=70, num_heads=5, intermediate_size=37, causal=True),
    make_case(
        "odd-mlp_t", H_cycles=1, L_cycles=1, length=35, hidden_size=33, intermediate_size=37, token_mixer="mlp_t"
    ),
    make_case("conv", "urm", H_cycles=1, L_cycles=2, channel_mixer="conv_swiglu", conv_kernel=3, intermediate_size=80),
    make_case("grouped", H_cycles=1, L_cycles=1, num_heads=4, num_kv_heads=2, length=101, batch=1),
    make_case("deep", length=37, H_cycles=1, L_cycles=1, intermediate_size=1100),
    make_case("one-token", length=1, H_cycles=1, L_cycles=1),
]


def run_int8(inputs: Inputs, backend: str) -> Result:
    i = inputs
    out = recursion(i.problem.program, i.problem.nets, i.states, i.x, i.weights, i.cos, i.sin, backend, dtype="int8")
    return Result(dict(zip(i.problem.program.states, out, strict=True)), {})


def run_emulated(inputs: Inputs) -> Result:
    """The reference with int8 products: what "eager" is in the tolerance policy."""
    out = run_program(inputs.problem, inputs.states, inputs.x, inputs.weights, inputs.cos, inputs.sin, int8=True)
    return Result(dict(zip(inputs.problem.program.states, out, strict=True)), {})


@needs_engine
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_recursion_is_that_of_the_reference(case: Case, target: str) -> None:
    inputs = make_inputs(case, torch.bfloat16, weight_scale=0.5)
    with engine.force_target(target):
        assert engine.target_for(torch.int8) == target
        fused = run_int8(inputs, "cpu")
    emulated = run_emulated(inputs)
    require(compare_results(fused, emulated, run_truth(inputs, backward=False)))
    for name, z in fused.outputs.items():
        # Closer to the emulation than that is to the truth: the same operands but for a few that round the other way.
        assert (z.double() - emulated.outputs[name].double()).square().mean().sqrt() < 2e-2


def test_the_reference_backend_emulates() -> None:
    inputs = make_inputs(CASES[0], torch.bfloat16)
    fused, emulated = run_int8(inputs, "reference"), run_emulated(inputs)
    for name, z in fused.outputs.items():
        assert torch.equal(z, emulated.outputs[name])


def test_states_of_another_dtype_are_cast() -> None:
    for dtype in (torch.float32, torch.float64):
        inputs = make_inputs(CASES[0], dtype)
        found, expected = run_int8(inputs, "auto"), run_int8(make_inputs(CASES[0], torch.bfloat16), "auto")
        for name, z in found.outputs.items():
            assert z.dtype == torch.bfloat16
            assert torch.equal(z, expected.outputs[name])


@pytest.fixture
def same_threads_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_engine
@pytest.mark.usefixtures("same_threads_afterwards")
@pytest.mark.parametrize("case", CASES[:7], ids=str)
def test_results_depend_neither_on_threads_nor_on_the_batch(case: Case) -> None:
    inputs = make_inputs(case, torch.bfloat16)
    torch.set_num_threads(1)
    expected = run_int8(inputs, "cpu").outputs
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        for name, z in run_int8(inputs, "cpu").outputs.items():
            assert torch.equal(z, expected[name]), threads
    torch.set_num_threads(1)
    last = Inputs(
        inputs.problem,
        tuple(state[-1:] for state in inputs.states),
        None if inputs.x is None else inputs.x[-1:],
        *(inputs.weights, inputs.cos, inputs.sin, ()),
    )
    for name, z in run_int8(last, "cpu").outputs.items():
        assert torch.equal(z, expected[name][-1:])


@needs_engine
def test_a_nan_stays_in_its_sequence() -> None:
    for case in CASES[:2]:
        inputs = make_inputs(case, torch.bfloat16)
        clean = run_int8(inputs, "cpu").outputs
        inputs.states[0][1, 2, 3] = torch.nan
        for name, z in run_int8(inputs, "cpu").outputs.items():
            assert z[1].isnan().any()
            assert torch.equal(z[::2], clean[name][::2])
        again = make_inputs(case, torch.bfloat16)
        for name, z in run_int8(again, "cpu").outputs.items():
            assert torch.equal(z, clean[name])


@needs_engine
def test_changed_weights_are_packed_again() -> None:
    inputs = make_inputs(CASES[0], torch.bfloat16)
    before = run_int8(inputs, "cpu").outputs["z_H"]
    inputs.weights[0].data.mul_(-1)
    after = run_int8(inputs, "cpu").outputs["z_H"]
    assert not torch.equal(before, after)
    inputs.weights[0].data.mul_(-1)
    assert torch.equal(run_int8(inputs, "cpu").outputs["z_H"], before)


# ---------------------------------------------------------------- modules, models, refusals


def test_the_module_computes_in_int8() -> None:
    inputs = make_inputs(CASES[1], torch.bfloat16)
    nets = [trmfast.nn.Net(spec) for spec in inputs.problem.nets]
    module = trmfast.nn.Recursion(inputs.problem.program, nets, dtype="int8")
    with torch.no_grad():
        for own, weight in zip([w for net in nets for w in net.weights()], inputs.weights, strict=True):
            own.copy_(weight)
        out = module(inputs.states, inputs.x)
    for z, expected in zip(out, run_int8(inputs, "auto").outputs.values(), strict=True):
        assert torch.equal(z, expected)
    with pytest.raises(ValueError, match=r"^dtype: got 'int8' where gradients are wanted"):
        module(inputs.states, inputs.x)


def test_refusals() -> None:
    inputs = make_inputs(CASES[0], torch.bfloat16)
    with pytest.raises(ValueError, match=r"^dtype: got 'int4', accepted are 'int8' and None"):
        recursion(inputs.problem.program, inputs.problem.nets, inputs.states, inputs.x, inputs.weights, dtype="int4")
    with pytest.raises(ValueError, match=r"^dtype: got 'int4', accepted are 'int8' and None$"):
        trmfast.nn.Recursion(inputs.problem.program, [trmfast.nn.Net(s) for s in inputs.problem.nets], dtype="int4")
    program = trmfast.RecursionProgram.urm(1, 1)
    with pytest.raises(ValueError, match=r"^dtype: got 'int8', accepted is None, nets\[0\] is not a trmfast.nn.Net$"):
        trmfast.nn.Recursion(program, [torch.nn.Identity()], dtype="int8")
    with pytest.raises(ValueError, match=r"^dtype: got 'int4', accepted are 'int8' and None, for the model's own$"):
        Solver(model_of("trm-bare"), dtype="int4")
    with torch.autograd.forward_ad.dual_level(), pytest.raises(ValueError, match=r"^dtype: got 'int8' in a transform"):
        run_int8(inputs, "auto")


def int8_of(model: ACTModel) -> ACTModel:
    twin = type(model)({**asdict(model.config), "forward_dtype": "int8"})
    twin.load_state_dict(model.state_dict())
    return twin.eval()


@pytest.mark.usefixtures("one_thread")
def test_a_model_trains_in_another_dtype() -> None:
    model = int8_of(model_of("trm-bare", forward_dtype="bfloat16")).train()
    batch = make_batch(3, rows=2)
    with pytest.raises(ValueError, match=r"^dtype: got 'int8' where gradients are wanted, accepted in inference"):
        model(model.initial_carry(batch), batch)


def test_sums_that_might_overflow_are_refused() -> None:
    case = make_case("deep", intermediate_size=66_001)
    backend, place = BACKENDS["cpu"], (torch.device("cpu"), torch.int8, 2, 12)
    assert backend.supports(case.problem, *place) == "it sums up to 66000 int8 products, not 66001"
    assert backend.supports(make_case("least", intermediate_size=66_000).problem, *place) is None


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["trm", "trm-mlp_t"])
def test_the_solver_computes_in_int8(name: str) -> None:
    """``dtype`` of the solver and a model that is int8 itself are one thing; bfloat16 is another."""
    model, batch = model_of(name, forward_dtype="bfloat16"), make_batch(3, rows=6)
    itself = int8_of(model)
    asked = list(Solver(model, dtype="int8").solve(batch))
    own = list(Solver(itself).solve(batch))
    assert [r.q_halt for r in asked] == [r.q_halt for r in own]
    wide = list(Solver(model).solve(batch))
    assert [r.q_halt for r in wide] != [r.q_halt for r in own]
    assert model.inner.product_dtype is None


@pytest.mark.usefixtures("one_thread")
def test_fidelity_is_the_cosine_to_the_float32_path() -> None:
    model, batch = model_of("trm", forward_dtype="bfloat16"), make_batch(3, rows=4)
    with torch.no_grad():
        for weight in model.inner.L_level.weights():
            weight.mul_(0.3)  # a random network amplifies errors, a trained one forgets them
    steps = carry_fidelity(model, batch, dtype="int8", steps=3)
    assert len(steps) == 3
    for step in steps:
        assert set(step) == {"z_H", "z_L"}
        assert all(0.99 < cosine < 1 for cosine in step.values())
    same = carry_fidelity(model, batch, dtype="float32", steps=2)
    assert all(cosine == pytest.approx(1, abs=1e-6) for step in same for cosine in step.values())
    narrow = carry_fidelity(model, batch, dtype="bfloat16", steps=3)
    assert narrow[0]["z_H"] > steps[0]["z_H"]
    assert model.config.forward_dtype == "bfloat16"  # the model itself is as it was
