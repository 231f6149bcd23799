"""The Triton backend: every program against the float64 reference, in the interpreter or on a GPU; what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from trmfast.kernels.backward_plan import backward_plan
from trmfast.kernels.forward_plan import Setting, forward_plan, weight_buffers
from trmfast.kernels.plan import Plan, Tile
from trmfast.kernels.rows import Rows, normed_rows

from triton_guard import DEVICE, INTERPRETED, guarded_run
from trmfast import backends, recursion
from trmfast.backends import BACKENDS, select
from trmfast.backends import triton as backend
from trmfast.cases import Case, Inputs, make_case, make_inputs
from trmfast.problem import Problem
from trmfast.program import RecursionProgram
from trmfast.spec import BlockSpec, NetSpec
from trmfast.testing import check_case, require, run_fused, run_truth

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)


def small(name: str, model: str = "trm", **options: Any) -> Case:
    """A case that the interpreter runs in about a second."""
    sizes: dict[str, Any] = {"H_cycles": 1, "L_cycles": 2, "num_layers": 1, "hidden_size": 32, "intermediate_size": 48}
    return make_case(name, model, **{**sizes, **options})


CASES = (
    small("trm", H_cycles=2, L_cycles=1, num_layers=2),
    small("trm-mlp_t", token_mixer="mlp_t", num_layers=2),
    small("hrm", "hrm"),
    small("single_z", "single_z"),
    small("hier6", "hier6", L_cycles=6),
    small("urm", "urm", channel_mixer="conv_swiglu", num_layers=2),
    small("mlp_t-and-conv", token_mixer="mlp_t", channel_mixer="conv_swiglu"),
    small("grouped-heads-causal", num_heads=4, num_kv_heads=2, causal=True, rope=False, hidden_size=64),
    small("odd-sizes", batch=3, length=13, hidden_size=48, num_heads=3, intermediate_size=80),
    small("one-token", length=1, batch=1),
    small("one-token-mlp_t", length=1, batch=3, token_mixer="mlp_t"),
    small("L81", length=81, batch=1),
    small("L82", length=82, batch=1, L_cycles=1),
    small("L97", length=97, batch=3, L_cycles=1),
    small("L97-mlp_t", length=97, batch=1, token_mixer="mlp_t"),
    small("L150-causal", length=150, batch=1, L_cycles=1, causal=True),
    small("L150-mlp_t", length=150, batch=2, L_cycles=1, token_mixer="mlp_t"),
    small("window-all", H_cycles=2, L_cycles=1, window="all"),
)

IN_FLOAT32 = {"trm-mlp_t", "odd-sizes", "one-token-mlp_t"}
IN_A_HALF = {case.name for case in CASES} - {"L81", "hier6", "window-all"}


def parity() -> list[Any]:
    """One of the halves in turn, and float32 of each token mixer; what else there is is marked ``grid``."""
    found = []
    for i, case in enumerate(CASES):
        for dtype in DTYPES:
            # A norm over one token makes it 1 or -1: what is left of its gradient lies below the rounding of 16 bits.
            if case.name == "one-token-mlp_t" and dtype != torch.float32:
                continue
            half = case.name in IN_A_HALF and dtype == HALF[i % 2]
            chosen = case.name in IN_FLOAT32 if dtype == torch.float32 else half
            found.append(pytest.param(case, dtype, marks=[] if chosen else [pytest.mark.grid]))
    return found


@pytest.mark.representative(when=lambda case, dtype: dtype != torch.float32 and case.name == "hrm")
@pytest.mark.spread("case", "dtype")
@pytest.mark.parametrize("case, dtype", parity(), ids=str)
@pytest.mark.usefixtures("one_thread")
def test_every_program(case: Case, dtype: torch.dtype) -> None:
    # Of one draw the largest error is luck, and in float32 whole programs amplify it: the mean of five, as elsewhere.
    seeds = range(5 if dtype == torch.float32 else 2)
    require(check_case(case, dtype, "triton", seeds=seeds, device=DEVICE))


TRUE_SIZE = {"attention": torch.bfloat16, "mlp_t": torch.float32}


@pytest.mark.breadth
@pytest.mark.representative(when=lambda mixer, dtype: dtype == TRUE_SIZE[mixer], rest="grid")
@pytest.mark.spread("mixer", "dtype")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mixer", ["attention", "mlp_t"])
@pytest.mark.usefixtures("one_thread")
def test_a_block_of_true_size(mixer: str, dtype: torch.dtype) -> None:
    case = make_case(
        f"block-{mixer}", "single_z", H_cycles=1, L_cycles=1, window="one_step", batch=1, length=97, hidden_size=512,
        num_heads=8, num_layers=1, token_mixer=mixer,
    )  # fmt: skip
    program = RecursionProgram(case.problem.program.states, ("f",), case.problem.program.updates[-1:], 1)
    case = replace(case, problem=Problem(program, case.problem.nets))
    require(check_case(case, dtype, "triton", seeds=range(1), device=DEVICE, weight_scale=1.0))


# ---------------------------------------------------------------- guard zones


def values_of(inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the forward plan takes, by the names of its buffers."""
    found = {f"states.{s}": state for s, state in enumerate(inputs.states)}
    if inputs.x is not None:
        found["x"] = inputs.x
    for buffer, weight in zip(weight_buffers(inputs.problem, dtype), inputs.weights, strict=True):
        found[buffer.name] = torch.zeros(buffer.shape, dtype=dtype, device=DEVICE)
        found[buffer.name][..., : weight.shape[-1]] = weight
    if inputs.cos is not None and inputs.sin is not None:
        length = inputs.states[0].shape[1]
        found.update(cos=inputs.cos[:length], sin=inputs.sin[:length])
    return found


def guarded(plan: Plan, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    used = {buffer.name for launch in plan for buffer in launch.buffers((*launch.reads, *launch.writes))}
    zeros = {buffer.name: torch.zeros(buffer.shape, dtype=buffer.dtype, device=DEVICE) for buffer in plan.zeros}
    return guarded_run(plan, {name: value for name, value in {**values, **zeros}.items() if name in used})


# Every case with one of the two plans in turn; with the other one it is marked ``grid``.
GUARDED = [
    pytest.param(case, fusion, marks=[] if fusion == ("least", "most")[i % 2] else [pytest.mark.grid])
    for i, case in enumerate(CASES)
    for fusion in ("most", "least")
    if case.length < 20 or case.name in ("L97", "L150-causal", "L150-mlp_t")
]


@pytest.mark.representative(when=lambda case, fusion: fusion == "most" and case.name == "trm-mlp_t")
@pytest.mark.spread("case", "fusion")
@pytest.mark.parametrize("case, fusion", GUARDED, ids=str)
@pytest.mark.usefixtures("one_thread")
def test_nothing_is_read_or_written_out_of_bounds(case: Case, fusion: str) -> None:
    problem, dtype = case.problem, torch.float32
    inputs = make_inputs(case, dtype, device=DEVICE)
    configuration = replace(backend._configuration(DEVICE), fusion=fusion)
    setting = Setting(problem, case.batch, case.length, dtype, case.rope, configuration)
    values = values_of(inputs, dtype)
    forward = guarded(forward_plan(setting, save=True), values)
    backward = backward_plan(setting, [True] * len(inputs.states), problem.uses_x, [True] * problem.num_weights)
    values.update({f"grad.{s}": gradient.clone() for s, gradient in enumerate(inputs.grad_states)})
    found = guarded(backward.plan, {**values, "saved": forward["saved"]})
    truth = run_truth(inputs)
    for s, name in enumerate(problem.program.states):
        torch.testing.assert_close(forward[f"out.{s}"].double(), truth.outputs[name], rtol=0, atol=1e-3)
    for name, gradient in zip(problem.weight_names, backward.grad_weights, strict=True):
        expected = truth.gradients[f"grad {name}"]
        assert gradient is not None
        scale = float(expected.abs().max())
        torch.testing.assert_close(found[gradient.name].double(), expected, rtol=0, atol=1e-2 * scale)


# ---------------------------------------------------------------- what backward recomputes, and what is asked for


@pytest.mark.parametrize("fusion", ["most", "least"])
@pytest.mark.usefixtures("one_thread")
def test_backward_recomputes_the_same_bits(fusion: str) -> None:
    """The forward plan that saves, and the part of the backward plan that runs forward again, agree in every bit."""
    case = small("recompute", "urm", L_cycles=2, channel_mixer="swiglu")
    inputs, dtype = make_inputs(case, torch.bfloat16, device=DEVICE), torch.bfloat16
    configuration = replace(backend._configuration(DEVICE), fusion=fusion)
    setting = Setting(case.problem, case.batch, case.length, dtype, case.rope, configuration)
    values = values_of(inputs, dtype)
    forward = guarded(forward_plan(setting, save=True), values)
    plan = backward_plan(setting, [False], False, [True] * case.problem.num_weights).plan
    # The last update comes first; its block's output is the final state.
    output = next(launch for launch in plan if launch.kernel.startswith("norm_backward"))
    last = output.buffers(["normed"])[0]
    values.update({"grad.0": inputs.grad_states[0].float(), "saved": forward["saved"]})
    launches = plan.launches[: plan.launches.index(output)]
    squares = output.buffers(["squares"])
    assert bool(squares) == (fusion == "least")
    if squares:  # whoever reads the sum applies its norm
        rows, last = Rows(last, squares[0], case.problem.nets[0].block.rms_norm_eps), replace(last, name="again")
        launches += (normed_rows([rows], [last], tile=Tile.of(BLOCK_M=16, BLOCK_N=64)),)
    again = guarded(Plan(launches), values)[last.name]
    assert torch.equal(again.view(torch.int16), forward["out.0"].view(torch.int16))


@pytest.mark.representative(when=lambda frozen: frozen == "weights")
@pytest.mark.parametrize("frozen", ["weights", "states and x", "all but one weight"])
@pytest.mark.usefixtures("one_thread")
def test_needs_flags(frozen: str) -> None:
    case = small("needs", num_layers=2, L_cycles=1)
    inputs = make_inputs(case, torch.float32, device=DEVICE, weight_scale=0.7)
    truth = run_truth(inputs)
    states = [state.clone().requires_grad_(frozen == "weights") for state in inputs.states]
    assert inputs.x is not None
    x = inputs.x.clone().requires_grad_(frozen == "weights")
    weights = [weight.clone() for weight in inputs.weights]
    chosen = {"weights": [], "states and x": range(len(weights)), "all but one weight": [4]}[frozen]
    for i in chosen:
        weights[i].requires_grad_()
    problem = case.problem
    out = recursion(problem.program, problem.nets, states, x, weights, inputs.cos, inputs.sin, "triton")
    torch.autograd.backward(out, inputs.grad_states)
    pairs = [(weights[i].grad, truth.gradients[f"grad {problem.weight_names[i]}"]) for i in chosen]
    if frozen == "weights":
        pairs = [(x.grad, truth.gradients["grad x"])]
        pairs += [(s.grad, truth.gradients[f"grad {n}"]) for s, n in zip(states, problem.program.states, strict=True)]
    assert pairs
    for found, expected in pairs:
        assert found is not None
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.usefixtures("one_thread")
def test_inputs_are_left_alone() -> None:
    case = small("inputs", num_layers=1, L_cycles=1)
    inputs = make_inputs(case, torch.float32, device=DEVICE)
    before = [t.clone() for t in (*inputs.states, *inputs.weights, *inputs.grad_states)]
    run_fused(inputs, "triton")
    for old, new in zip(before, (*inputs.states, *inputs.weights, *inputs.grad_states), strict=True):
        assert torch.equal(old, new)


# ---------------------------------------------------------------- refusals


@pytest.fixture
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backends, "_told", set())
    select.cache_clear()
    yield
    select.cache_clear()


def problem_of(hidden_size: int = 32, num_heads: int = 2, states: int = 1) -> Problem:
    block = BlockSpec(hidden_size=hidden_size, intermediate_size=32, num_heads=num_heads)
    names = tuple(f"z{i}" for i in range(states))
    updates = RecursionProgram.single_z(1, 1).updates[:1]
    updates = (replace(updates[0], sources=tuple(range(states))),)
    return Problem(RecursionProgram(names, ("f",), updates, 1), (NetSpec(block, 1),))


@pytest.mark.parametrize(
    "problem, dtype, batch, reason",
    [
        (problem_of(), torch.float64, 1, "it computes in float32, bfloat16, float16, not in float64"),
        (problem_of(8192, 64), torch.float32, 1, "it takes widths up to 4096, not 8192"),
        (problem_of(512, 2), torch.float32, 1, "it takes head_dim up to 128, not 256"),
        (problem_of(states=8), torch.float32, 1, "it adds up to 8 tensors in an update, not 9"),
        (problem_of(), torch.float32, 1 << 20, r"it takes up to 65535 sequences and 2\^31 tokens, not 1048576 of 5"),
    ],
    ids=["dtype", "width", "head_dim", "terms", "sequences"],
)
@pytest.mark.usefixtures("fresh_choice")
def test_refusals(problem: Problem, dtype: torch.dtype, batch: int, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^backend: got 'triton', accepted are .*: {reason}$"):
        select("triton", problem, DEVICE, dtype, batch, 5)


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not on meta$"):
        select("triton", problem_of(), torch.device("meta"), torch.float32, 1, 5)


@pytest.mark.skipif(not INTERPRETED, reason="Triton does not interpret: a GPU is used")
@pytest.mark.usefixtures("fresh_choice")
def test_the_interpreter_is_used_only_by_name(recwarn: pytest.WarningsRecorder) -> None:
    cpu = torch.device("cpu")
    assert BACKENDS["triton"].available() is None
    for dtype in (torch.float32, torch.float16, torch.float64):
        assert select("auto", problem_of(), cpu, dtype, 1, 5).name in ("cpu", "reference")
    assert select("triton", problem_of(), cpu, torch.float16, 1, 5).name == "triton"
    assert not [w for w in recwarn if "triton" in str(w.message)]


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "interprets", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert BACKENDS["triton"].available() == "no GPU: torch.cuda.is_available() is False"


@pytest.mark.parametrize(
    "version, reason",
    [("3.3.1", "Triton 3.3.1 is too old: it needs 3.4 or newer, which PyTorch 2.8 brings"), ("3.10.0", None)],
)
def test_old_triton(version: str, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    backend._triton_problem.cache_clear()
    try:
        assert backend._triton_problem() == reason
    finally:
        backend._triton_problem.cache_clear()


@pytest.mark.parametrize(
    "capability, architecture",
    [((7, 5), None), ((8, 0), "sm_80"), ((8, 7), "sm_86"), ((8, 9), "sm_89"), ((9, 0), "sm_90"), ((10, 3), "sm_100"),
     ((12, 1), "sm_120")],
)  # fmt: skip
def test_architectures(capability: tuple[int, int], architecture: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    backend._architecture.cache_clear()
    try:
        assert backend._architecture(0) == (architecture, f"sm_{capability[0]}{capability[1]}")
    finally:
        backend._architecture.cache_clear()


def test_trmfast_works_without_triton(tmp_path: Any) -> None:
    """Importing, choosing and running need no Triton; asking for it names what is missing."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "sys.modules['triton'] = None\n"
    )
    code = (
        "import torch, trmfast\n"
        "from trmfast.backends import BACKENDS, select\n"
        "print(BACKENDS['triton'].available())\n"
        "from trmfast.cli import main\n"
        "main(['info', '--plan', 'trm'])\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.stdout == "Triton is not installed: `pip install trmfast[triton]` installs it on Linux\n"
    assert done.returncode == 2
    assert "--plan: needs Triton" in done.stderr
