"""The operator under torch.func, dual numbers, tracers, flop counter and profiler: right, or refused in one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, func
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import trmfast
from trmfast.backends import BACKENDS, cpu
from trmfast.benchmark.eager import EagerRecursion
from trmfast.cases import make_case, make_inputs
from trmfast.flops import backward_flops, forward_flops, window_flops

CASE = make_case("tiny", L_cycles=2, batch=2, length=3, hidden_size=8, num_heads=1, intermediate_size=16, num_layers=1)
# The reference backend differentiates through the operator by reverse mode, in float64.
INPUTS: Any = make_inputs(CASE, torch.float64)  # x and the tables are there

pytestmark = pytest.mark.filterwarnings("ignore:trmfast.recursion computes in plain PyTorch")


def call(x: Tensor, weights: Sequence[Tensor], backend: str = "auto") -> Tensor:
    """z_H, [B, L, D]."""
    program, nets = CASE.problem.program, CASE.problem.nets
    states = trmfast.recursion(program, nets, INPUTS.states, x, weights, INPUTS.cos, INPUTS.sin, backend=backend)
    return states[-1]


@pytest.fixture(params=[False, True], ids=["frozen", "trainable"])
def weights(request: pytest.FixtureRequest) -> list[Tensor]:
    return [weight.double().requires_grad_(request.param) for weight in INPUTS.weights]


@pytest.fixture(scope="module")
def jacobian() -> Tensor:
    """d z_H / d x, [B, L, D, B, L, D], row by row through the operator."""
    x = INPUTS.x.clone().requires_grad_()
    out = call(x, INPUTS.weights, "reference")
    rows = [torch.autograd.grad(out, x, row.view_as(out), retain_graph=True)[0] for row in torch.eye(out.numel()).to(x)]
    return torch.stack(rows).view(*out.shape, *x.shape)


def dual_numbers(f: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent))).tangent


@pytest.mark.parametrize(
    "derivative",
    [
        lambda f, x, v: func.jvp(f, (x,), (v,))[1],
        dual_numbers,
        lambda f, x, v: torch.tensordot(func.jacfwd(f)(x), v, 3),
        lambda f, x, v: torch.tensordot(func.jacrev(f)(x), v, 3),
    ],
    ids=["jvp", "dual numbers", "jacfwd", "jacrev"],
)
def test_derivative_along_a_tangent(derivative: Callable[..., Tensor], weights: list[Tensor], jacobian: Tensor) -> None:
    v = torch.randn_like(INPUTS.x)
    found = derivative(lambda x: call(x, weights), INPUTS.x, v)
    torch.testing.assert_close(found.detach(), torch.tensordot(jacobian, v, 3))


@pytest.mark.parametrize(
    "gradient",
    [
        lambda f, x, g: func.grad(lambda x: (f(x) * g).sum())(x),
        lambda f, x, g: func.vjp(f, x)[1](g)[0],
        lambda f, x, g: func.vmap(func.grad(lambda x: (f(x) * g).sum()))(x.expand(3, *x.shape))[1],
    ],
    ids=["grad", "vjp", "vmap of grad"],
)
def test_gradient(gradient: Callable[..., Tensor], weights: list[Tensor], jacobian: Tensor) -> None:
    g = torch.randn_like(INPUTS.x)
    found = gradient(lambda x: call(x, weights), INPUTS.x, g)
    torch.testing.assert_close(found.detach(), torch.tensordot(g, jacobian, 3))


def test_tangents_of_weights(weights: list[Tensor]) -> None:
    """Forward and reverse mode agree: <g, J v> = <J^T g, v>."""
    v, g = torch.randn_like(weights[0]), torch.randn_like(INPUTS.x)
    along = func.jvp(lambda w: call(INPUTS.x, [w, *weights[1:]]), (weights[0].detach(),), (v,))[1]
    trained = [weight.detach().requires_grad_() for weight in weights]
    (back,) = torch.autograd.grad(call(INPUTS.x, trained, "reference"), trained[0], g)
    torch.testing.assert_close((along * g).sum().detach(), (back * v).sum())


def test_vmap(weights: list[Tensor]) -> None:
    xs = torch.randn(3, *INPUTS.x.shape, dtype=torch.float64)
    one_by_one = torch.stack([call(x, weights, "reference") for x in xs])
    torch.testing.assert_close(func.vmap(lambda x: call(x, weights))(xs), one_by_one)


@pytest.mark.parametrize("how", ["is_grads_batched", "vmap"])
def test_batched_gradients(how: str, weights: list[Tensor]) -> None:
    x = INPUTS.x.clone().requires_grad_()
    out = call(x, weights, "reference")
    leaves = [x, *(weight for weight in weights if weight.requires_grad)]
    gs = torch.randn(3, *out.shape, dtype=torch.float64)

    def back(g: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, g, retain_graph=True, **options)

    found = back(gs, is_grads_batched=True) if how == "is_grads_batched" else func.vmap(back)(gs)
    for one, parts in zip(found, zip(*map(back, gs), strict=True), strict=True):
        assert torch.equal(one, torch.stack(parts))


def test_a_fused_backend_is_refused() -> None:
    x = INPUTS.x.float()
    with pytest.raises(ValueError, match=r"^backend: got 'cpu' inside a transform[^\n]*accepted are auto and[^\n]*$"):
        func.jvp(lambda x: call(x, INPUTS.weights, "cpu"), (x,), (x,))


def test_plain_pytorch_is_announced() -> None:
    with pytest.warns(UserWarning, match="in plain PyTorch"):
        func.vmap(lambda x: call(x, INPUTS.weights))(INPUTS.x[None])


def test_the_operator_itself_refuses_dual_numbers() -> None:
    problem = CASE.problem
    nets = [net.key for net in problem.nets]
    with forward_ad.dual_level():
        x = forward_ad.make_dual(INPUTS.x, torch.ones_like(INPUTS.x))
        with pytest.raises(RuntimeError, match=r"^trmfast::recursion: got a dual number[^\n]*$"):
            torch.ops.trmfast.recursion.default(
                *(INPUTS.states, x, INPUTS.weights, INPUTS.cos, INPUTS.sin, problem.program.key, nets),
                *("reference", False, True),
            )


# ---------------------------------------------------------------- tools


def test_flop_counter() -> None:
    """As many as it counts in eager PyTorch."""
    case = make_case("counted", length=12, batch=3)
    inputs: Any = make_inputs(case)
    problem = case.problem
    weights = [weight.requires_grad_() for weight in inputs.weights]
    x, states = inputs.x.requires_grad_(), [state.requires_grad_() for state in inputs.states]
    with FlopCounterMode(display=False) as counter:
        outputs = trmfast.recursion(problem.program, problem.nets, states, x, weights, inputs.cos, inputs.sin)
        forward = counter.get_total_flops()
        torch.autograd.backward(outputs, inputs.grad_states)
    assert forward == forward_flops(problem, 3, 12)
    assert counter.get_total_flops() == forward + 2 * window_flops(problem, 3, 12)

    model = EagerRecursion(problem, [weight.detach() for weight in weights], (inputs.cos, inputs.sin))
    # PyTorch does not count its fused attention on CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as eager:
        outputs = model(states, x)
        assert eager.get_total_flops() == forward
        torch.autograd.backward(outputs, inputs.grad_states)
    assert eager.get_total_flops() == counter.get_total_flops()
    frozen = backward_flops(problem, 3, 12, [False] * len(weights))
    assert window_flops(problem, 3, 12) < frozen < 2 * window_flops(problem, 3, 12)


class Module(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return call(x, INPUTS.weights)


REFUSED = r"trmfast.recursion: got a call under torch.jit.trace or an ONNX exporter, accepted are torch.compile and"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tracing_is_refused() -> None:
    with pytest.raises(RuntimeError, match=f"^{REFUSED}[^\n]*$"):
        torch.jit.trace(Module(), INPUTS.x)


def test_export_for_onnx_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the exporter on torch.export does before it looks for ONNX operators, here without its packages."""
    # Not strict, which PyTorch 2.6 is by default: it would refuse the tensors of this file that are no parameters.
    torch.export.export(Module(), (INPUTS.x,), strict=False)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(Exception, match=REFUSED):
        torch.export.export(Module(), (INPUTS.x,), strict=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
def test_onnx_exporters_refuse(dynamo: bool) -> None:
    pytest.importorskip("onnxscript" if dynamo else "onnx", reason="this exporter of PyTorch needs it")
    with pytest.raises(Exception, match=REFUSED):  # the exporter wraps it
        torch.onnx.export(Module(), (INPUTS.x,), "unused.onnx", dynamo=dynamo)


@pytest.mark.skipif(BACKENDS["cpu"].available() is not None, reason="the CPU engine is not built")
def test_profiler_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators by their names, and the engine's phases when asked for."""
    case = make_case("small", batch=3, length=5)
    inputs, program, nets = make_inputs(case), case.problem.program, case.problem.nets
    weights = [weight.requires_grad_() for weight in inputs.weights]

    def events() -> list[Any]:
        with profile(activities=[ProfilerActivity.CPU]) as record:
            states = trmfast.recursion(
                program, nets, inputs.states, inputs.x, weights, inputs.cos, inputs.sin, backend="cpu"
            )
            torch.autograd.backward(states, inputs.grad_states)
        return [event for event in record.events() if "rmfast" in event.name]

    plain = {event.name for event in events()} - {"autograd::engine::evaluate_function: TrmfastRecursionBackward"}
    operators = {"trmfast::recursion", "trmfast::recursion_backward"}
    assert plain == operators | {"TrmfastRecursion", "TrmfastRecursionBackward"}
    monkeypatch.setattr(cpu, "PROFILE", True)
    phases = [event for event in events() if event.name.startswith("trmfast::cpu: ")]
    assert len({event.name for event in phases}) > 15
    for event in phases:
        while event.name not in operators:
            event = event.cpu_parent
