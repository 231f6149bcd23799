"""Recursion over networks that are not trmfast's: results, gradients and memory."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import trmfast
from foreign_cases import (
    DIM,
    LENGTH,
    ROWS,
    make,
    network,
    puzzle,
    same,
    saved_bytes,
)
from trmfast import BlockSpec, NetSpec, RecursionProgram
from trmfast.nn import Net, Recursion, RotaryEmbedding
from trmfast.recompute import recomputed
from trmfast.reference import summed_input

pytestmark = pytest.mark.usefixtures("one_thread")


def plain_loop(program: RecursionProgram, nets: list[nn.Module], states: list[Tensor], x: Tensor) -> list[Tensor]:
    current = list(states)
    for update in program.updates:
        with torch.set_grad_enabled(update.grad):
            current[update.dst] = nets[update.net](summed_input(update, current, x))
    return current


PROGRAMS = [
    RecursionProgram.trm(2, 3),
    RecursionProgram.trm(2, 2, "all"),
    RecursionProgram.hrm(2, 2),
    RecursionProgram.single_z(3, 2, 2),
    RecursionProgram.hier6(2, 3),
    RecursionProgram.urm(2, 3, "one_step"),
]


@pytest.mark.parametrize("program", PROGRAMS, ids=["trm", "trm-all", "hrm", "single_z", "hier6", "urm"])
@pytest.mark.parametrize("recompute", [True, False])
def test_foreign_recursion_is_the_plain_loop(program: RecursionProgram, recompute: bool) -> None:
    torch.manual_seed(0)
    nets = [network() for _ in program.nets]
    recursion = Recursion(program, nets, recompute=recompute)
    states = [torch.randn(ROWS, LENGTH, DIM) for _ in program.states]
    x = torch.randn(ROWS, LENGTH, DIM)
    results = []
    for run in (lambda s, x: plain_loop(program, nets, s, x), recursion):
        leaves = [t.clone().requires_grad_() for t in (*states, x)]
        outs = run(leaves[:-1], leaves[-1])
        weighted = sum((out * (i + 1)).square().mean() for i, out in enumerate(outs) if out.requires_grad)
        assert isinstance(weighted, Tensor)
        found = torch.autograd.grad(weighted, [*leaves, *recursion.parameters()], allow_unused=True)
        results.append(([out.detach() for out in outs], dict(enumerate(found))))
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    assert same(results[0][1], results[1][1])


def test_foreign_recursion_keeps_one_tensor_for_each_update_with_gradient() -> None:
    program = RecursionProgram.trm(3, 4)
    recursion = Recursion(program, [network()])
    state = torch.zeros(ROWS, LENGTH, DIM)
    x = torch.randn(ROWS, LENGTH, DIM)
    kept = saved_bytes(recursion, lambda: recursion([state, state], x)[0])
    assert kept - len(program.grad_updates) * state.nbytes < 64  # scalars of the checkpoint


def test_one_fused_and_one_foreign_network() -> None:
    """A Net beside another network runs in plain PyTorch, with its RoPE tables."""
    torch.manual_seed(0)
    program = RecursionProgram.hrm(2, 2)
    fused, other = Net(NetSpec(BlockSpec(DIM, 48, num_heads=2), 1)), network()
    tables = RotaryEmbedding(16, LENGTH, 1e4)()
    recursion = Recursion(program, [fused, other])
    states = list(torch.randn(2, ROWS, LENGTH, DIM))
    x = torch.randn(ROWS, LENGTH, DIM)
    outs = recursion(states, x, tables)

    class WithTables(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            out: Tensor = fused(h, tables)
            return out

    expected = plain_loop(program, [WithTables(), other], states, x)
    assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))
    parameters = list(recursion.parameters())
    grads, wanted = (torch.autograd.grad(out[0].sum() + out[1].sum(), parameters) for out in (outs, expected))
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))


def test_recursion_over_a_package_network() -> None:
    """tiny-recursive-model's loop is the program trm(T, n), up to the order of two additions."""
    model = make("trm-mixer").double()
    seq, _ = puzzle()
    inputs, _ = model.embed_inputs_with_registers(seq)  # type: ignore[operator]
    initial = model.get_initial()  # type: ignore[operator]
    expected = model.deep_refinement(inputs, *initial)  # type: ignore[operator]
    recursion = Recursion(RecursionProgram.trm(3, 6), [model.network])  # type: ignore[list-item]
    for a, b in zip(recursion(initial, inputs), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_program_of_a_call_and_training_in_a_curriculum() -> None:
    recursion = Recursion(RecursionProgram.trm(1, 1), [network()])
    x = torch.randn(ROWS, LENGTH, DIM)
    state = torch.zeros_like(x)
    deep = RecursionProgram.trm(2, 3)
    a, b = recursion([state, state], x, program=deep), Recursion(deep, list(recursion.nets))([state, state], x)
    assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))
    assert not torch.equal(a[0], recursion([state, state], x)[0])


def test_nothing_is_kept_without_gradients() -> None:
    recursion = Recursion(RecursionProgram.trm(2, 2), [network()])
    x = torch.randn(ROWS, LENGTH, DIM)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            z_H, z_L = recursion([torch.zeros_like(x)] * 2, x)
        assert not z_H.requires_grad
        assert not z_L.requires_grad
    frozen = Recursion(RecursionProgram.trm(2, 2), [network().requires_grad_(False)])
    assert not frozen([torch.zeros_like(x)] * 2, x)[0].requires_grad


def test_compiled_foreign_recursion() -> None:
    torch.manual_seed(0)
    recursion = Recursion(RecursionProgram.trm(2, 2), [network()])
    x = torch.randn(ROWS, LENGTH, DIM)
    compiled = torch.compile(recursion, backend="aot_eager", fullgraph=True)
    grads = []
    for run in (recursion, compiled):
        loss = run([torch.zeros_like(x)] * 2, x)[0].square().sum()
        grads.append(torch.autograd.grad(loss, list(recursion.parameters())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    torch.compiler.reset()


def test_parameters_changed_between_forward_and_backward() -> None:
    recursion = Recursion(RecursionProgram.trm(1, 1), [network()])
    net = recursion.nets[0]
    assert isinstance(net, nn.Sequential)
    x = torch.randn(ROWS, LENGTH, DIM)
    loss = recursion([torch.zeros_like(x)] * 2, x)[0].sum()
    with torch.no_grad():
        net[0].weight.mul_(2)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match=r"^0\.weight: was written to between forward and backward"):
        loss.backward()
    other = {"nets.0.0.weight": torch.zeros(64, DIM, requires_grad=True)}
    loss = torch.func.functional_call(recursion, other, ([torch.zeros_like(x)] * 2, x))[0].sum()
    with pytest.raises(RuntimeError, match=r"^0\.weight: got another tensor than in forward"):
        loss.backward()


def test_bad_arguments_are_one_line() -> None:
    program = RecursionProgram.trm(1, 1)
    net, x = network(), torch.zeros(1, 2, DIM)
    with pytest.raises(TypeError, match=r"^nets\[0\]: got function, accepted are torch\.nn\.Module$"):
        Recursion(program, [lambda h: h])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"^nets: got 1, accepted are 2 \(f_H, f_L\)$"):
        Recursion(RecursionProgram.hrm(1, 1), [net])
    with pytest.raises(ValueError, match=r"^backend: got 'cpu', accepted is 'auto', nets\[0\] is not a"):
        Recursion(program, [net], backend="cpu")
    with pytest.raises(TypeError, match=r"^program: got int, accepted are RecursionProgram$"):
        Recursion(5, [net])  # type: ignore[arg-type]
    recursion = Recursion(program, [net])
    with pytest.raises(ValueError, match=r"^nets: got 1, accepted are 2"):
        recursion([x, x], x, program=RecursionProgram.hrm(1, 1))
    with pytest.raises(ValueError, match=r"^states: got 1, accepted are 2 \(z_H, z_L\)$"):
        recursion([x], x)
    with pytest.raises(ValueError, match=r"^x: got None"):
        recursion([x, x])
    with pytest.raises(ValueError, match=r"^cos_sin: got tables, accepted is None"):
        recursion([x, x], x, (x, x))


def test_a_frozen_network_made_in_inference_mode() -> None:
    """Its parameters count no writes, and work where a plain call works."""
    with torch.inference_mode():
        net = network().requires_grad_(False)
    x = torch.randn(ROWS, LENGTH, DIM)
    states = [torch.zeros_like(x)] * 2
    program = RecursionProgram.trm(1, 1)
    out, wanted = Recursion(program, [net])(states, x), Recursion(program, [net], recompute=False)(states, x)
    assert all(torch.equal(a, b) for a, b in zip(out, wanted, strict=True))


def test_fused_networks_stay_fused() -> None:
    """Networks of trmfast alone still run as the operator, bitwise."""
    torch.manual_seed(0)
    program = RecursionProgram.trm(2, 2)
    net = Net(NetSpec(BlockSpec(DIM, 48, num_heads=2), 1))
    states, x = list(torch.randn(2, ROWS, LENGTH, DIM)), torch.randn(ROWS, LENGTH, DIM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a machine without the CPU engine says so
        outs = Recursion(program, [net])(states, x)
        expected = trmfast.recursion(program, [net.spec], states, x, net.weights())
    assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))
    assert outs[0].grad_fn is not None
    assert "recursion" in type(outs[0].grad_fn).__name__.lower()


def test_recomputed_passes_structures_through() -> None:
    """Nested arguments, keywords and several results; what is kept is each tensor once."""
    linear = nn.Linear(DIM, DIM)
    a, b = torch.randn(2, ROWS, DIM, requires_grad=True)

    def function(pair: tuple[Tensor, str], *, scale: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        assert pair[1] == "name"
        h = linear(pair[0]).relu()
        return h, {"scaled": h * scale["by"]}

    def run() -> Tensor:
        h, more = recomputed(linear, function, (a, "name"), scale={"by": b})
        total: Tensor = h.sum() + more["scaled"].sum()
        return total

    found = torch.autograd.grad(run(), [a, b, *linear.parameters()])
    h, more = function((a, "name"), scale={"by": b})
    wanted = torch.autograd.grad(h.sum() + more["scaled"].sum(), [a, b, *linear.parameters()])
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
