"""Recursions over networks that are not trmfast's: results, gradients, memory, and what a drop-in has to survive."""

from __future__ import annotations

import copy
import io
import pickle
import random
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from HRM import HRM, HRM_ACT
from tiny_recursive_model import MLPMixer1D, TinyRecursiveModel
from tiny_recursive_model.trm_dense_loss import TinyRecursiveModel as DenseTinyRecursiveModel
from torch import Tensor, nn
from x_transformers import Encoder  # type: ignore[import-untyped]

import trmfast
from trmfast import BlockSpec, NetSpec, RecursionProgram, foreign
from trmfast.nn import Net, Recursion, RotaryEmbedding
from trmfast.recompute import recomputed
from trmfast.reference import summed_input
from trmfast.testing import compare, require

pytestmark = pytest.mark.usefixtures("one_thread")

DIM, LENGTH, TOKENS, ROWS = 32, 8, 10, 3


def network(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, 64), nn.GELU(), nn.Dropout(dropout), nn.Linear(64, DIM), nn.LayerNorm(DIM))


def encoder() -> dict[str, Any]:
    return {"dim": DIM, "depth": 1, "heads": 2, "attn_dim_head": 16, "use_rmsnorm": True, "rotary_pos_emb": True}


def mixer(dropout: float = 0.0) -> nn.Module:
    made: nn.Module = MLPMixer1D(dim=DIM, depth=2, seq_len=LENGTH, dropout=dropout)
    return made


# The models of both packages, with every kind of network that they bring.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "trm-mixer": lambda: TinyRecursiveModel(dim=DIM, num_tokens=TOKENS, network=mixer()),
    "trm-encoder": lambda: TinyRecursiveModel(dim=DIM, num_tokens=TOKENS, network=Encoder(**encoder())),
    "trm-dense": lambda: DenseTinyRecursiveModel(dim=DIM, num_tokens=TOKENS, network=mixer(), recurrent_grad_depth=2),
    "hrm": lambda: HRM([encoder(), encoder()], dim=DIM, num_tokens=TOKENS),
    "hrm-3": lambda: HRM([encoder(), encoder(), encoder()], dim=DIM, num_tokens=TOKENS, reasoning_steps=1),
    "hrm-act": lambda: HRM_ACT([encoder(), encoder()], dim=DIM, num_tokens=TOKENS, max_reasoning_steps=3),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    halt = getattr(model, "to_halt_pred", None)
    if halt is not None:
        nn.init.normal_(halt[1].weight, std=0.1)  # zero as made, so that no gradient would reach it from there
    return model


def puzzle(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, TOKENS, (2, ROWS, LENGTH), generator=generator)
    return tokens[0], tokens[1]


def step(model: nn.Module, seed: int = 0) -> Tensor:
    """The loss of one training step, with the same draws whenever it is called."""
    seq, labels = puzzle(seed)
    random.seed(seed)
    torch.manual_seed(seed)
    states = model.get_initial() if hasattr(model, "get_initial") else ()  # type: ignore[operator]
    loss: Tensor = model(seq, *states, labels=labels)[0]
    return loss


def outputs(model: nn.Module) -> list[Tensor]:
    """Everything that the model returns without labels, and what it predicts."""
    seq, _ = puzzle()
    random.seed(0)
    if hasattr(model, "predict"):
        found = [*model(seq, *model.get_initial()), *model.predict(seq, max_deep_refinement_steps=2)]  # type: ignore[operator]
    else:
        logits, hiddens, *rest = model(seq)
        found = [logits, *hiddens, *rest]
    return [tensor.detach() for tensor in found]


def gradients(model: nn.Module, seed: int = 0) -> dict[str, Tensor | None]:
    model.zero_grad()
    step(model, seed).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def same(a: Mapping[Any, Tensor | None], b: Mapping[Any, Tensor | None]) -> bool:
    return a.keys() == b.keys() and all(
        (g is None) == (b[name] is None) and (g is None or torch.equal(g, b[name]))  # type: ignore[arg-type]
        for name, g in a.items()
    )


def saved_bytes(model: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps after forward: every storage once, without parameters and buffers."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in known)


def swap(model: nn.Module) -> nn.Module:
    found = foreign.recognise(model)
    assert found is not None
    found.swap()
    return model


# ---------------------------------------------------------------- both packages as they are


@pytest.mark.parametrize("name", MODELS)
def test_packages_outputs_gradients_and_memory(name: str) -> None:
    """Bitwise the same outputs, loss and gradients, from a fraction of the memory; undone bitwise."""
    plain, model = make(name), make(name)
    keys = list(model.state_dict())
    before = outputs(plain)
    much = saved_bytes(plain, lambda: step(plain))
    grads = gradients(plain)
    assert any(g is not None and g.any() for g in grads.values())
    swap(model)
    assert list(model.state_dict()) == keys
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), before, strict=True))
    assert saved_bytes(model, lambda: step(model)) < much / 4
    assert torch.equal(step(model), step(plain))
    assert same(gradients(model), grads)
    assert foreign.undo(model) == len(foreign.recognise(model).parts)  # type: ignore[union-attr]
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert saved_bytes(model, lambda: step(model)) == much
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), before, strict=True))
    assert foreign.undo(model) == 0


@pytest.mark.parametrize("name", ["trm-mixer", "hrm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packages_within_the_tolerance_policy(name: str, dtype: torch.dtype) -> None:
    """Against the same model in float64, the swapped model loses no more than the policy allows."""
    truth = make(name).double()
    truth_loss = step(truth).detach()
    truth_grads = gradients(truth)
    losses, grads = {}, {}
    for kind in ("eager", "fused"):
        model = make(name).to(dtype)
        model.load_state_dict({k: v.to(dtype) for k, v in truth.state_dict().items()})
        if kind == "fused":
            swap(model)
        losses[kind] = step(model).detach()
        grads[kind] = gradients(model)
    relative = (loss / truth_loss for loss in losses.values())  # the loss is a sum over rows, the policy wants order 1
    eager, fused = (value.to(dtype) for value in relative)
    found = [compare("loss", fused, eager, torch.ones_like(truth_loss))]
    for key, t in truth_grads.items():
        e, f = grads["eager"][key], grads["fused"][key]
        if t is None or e is None or f is None:
            assert t is e is f is None, key
        elif (
            not t.numel() or t.abs().max() < 1e-12
        ):  # a bias that the next norm takes away: zero but for rounding, which has no scale
            assert torch.equal(e, f)
        elif dtype == torch.float32 or key.startswith("to_"):
            found.append(compare(key, f, e, t, is_gradient=True))
    require(found)


@pytest.mark.parametrize("name", ["trm-mixer", "trm-dense", "hrm", "hrm-act"])
def test_thirty_training_steps(name: str) -> None:
    """Deep supervision with carried states and AdamW: the same losses, step for step."""

    def train(model: nn.Module) -> list[float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        states: Any = None
        for i in range(30):
            if i % 3 == 0:  # a new puzzle, carried over three steps
                seq, labels = puzzle(i)
                states = model.get_initial() if hasattr(model, "get_initial") else None  # type: ignore[operator]
            random.seed(i)
            if hasattr(model, "get_initial"):
                loss, _, *states = model(seq, *states, labels=labels)
                states = states[:2]
            else:
                loss, states, *_ = model(seq, states, labels=labels)
                states = tuple(states)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    plain = train(make(name))
    assert len(set(plain)) == 30
    assert train(swap(make(name))) == plain


@pytest.mark.parametrize("name", ["trm-encoder", "hrm"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "assign", "p.data", "twice"])
def test_what_a_drop_in_survives(name: str, how: str) -> None:
    """The copy is as swapped as the original, computes with its own parameters, and can be undone alone."""
    plain, model = make(name), swap(make(name))
    copied = model
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    elif how == "twice":
        swap(model)
    with torch.no_grad():
        values = {key: value * 0.9 for key, value in plain.state_dict().items()}
    plain.load_state_dict(values)
    if how == "p.data":
        for key, parameter in copied.named_parameters():
            parameter.data = values[key].clone()
        for key, buffer in copied.named_buffers():
            if key in values:
                buffer.copy_(values[key])
    else:
        copied.load_state_dict({key: value.clone() for key, value in values.items()}, assign=how == "assign")
    if how in ("deepcopy", "pickle", "torch.save"):
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
    assert torch.equal(step(copied), step(plain))
    assert same(gradients(copied), gradients(plain))
    assert saved_bytes(copied, lambda: step(copied)) < saved_bytes(plain, lambda: step(plain)) / 4
    assert foreign.undo(copied) > 0
    assert saved_bytes(copied, lambda: step(copied)) == saved_bytes(plain, lambda: step(plain))
    assert torch.equal(step(copied), step(plain))


def test_dropout_draws_the_same_again() -> None:
    grads = []
    for swapped in (False, True):
        torch.manual_seed(0)
        model = TinyRecursiveModel(dim=DIM, num_tokens=TOKENS, network=mixer(dropout=0.3))
        grads.append(gradients(swap(model) if swapped else model))
    assert same(*grads)


def test_autocast() -> None:
    plain, model = make("trm-mixer"), swap(make("trm-mixer"))
    with torch.autocast("cpu", torch.bfloat16):
        losses = [step(plain), step(model)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    assert same(*({k: p.grad for k, p in m.named_parameters()} for m in (plain, model)))


def test_recognised_inside_wrappers() -> None:
    model = make("trm-mixer")
    wrapped = nn.ModuleDict({"ema": torch.compile(model, backend="eager")})  # type: ignore[dict-item]
    found = foreign.recognise(wrapped)
    assert found is not None
    assert found.owner is model
    assert (found.kind, found.name, list(found.parts)) == ("TinyRecursiveModel", "ema._orig_mod", ["network"])
    for other in (nn.Linear(2, 2), network(), Recursion(RecursionProgram.trm(1, 1), [network()])):
        assert foreign.recognise(other) is None


@pytest.mark.parametrize("name", MODELS)
def test_accelerate_and_restore(name: str) -> None:
    """The one call, and back."""
    plain, model = make(name), make(name)
    assert trmfast.accelerate(model) is model
    assert trmfast.accelerate(model) is model
    assert same(gradients(model), gradients(plain))
    assert saved_bytes(model, lambda: step(model)) < saved_bytes(plain, lambda: step(plain)) / 4
    copied = trmfast.restore(copy.deepcopy(model))
    assert not any("forward" in module.__dict__ for module in copied.modules())
    assert saved_bytes(model, lambda: step(model)) < saved_bytes(copied, lambda: step(copied)) / 4
    assert trmfast.restore(model) is model
    assert torch.equal(step(model), step(plain))


def test_accelerate_refuses() -> None:
    model = make("trm-mixer")
    with pytest.raises(ValueError, match=r"^backend: got 'cpu', accepted is 'auto', the networks are TinyRecursive"):
        trmfast.accelerate(model, backend="cpu")
    both = nn.ModuleDict({"model": model, "ema": copy.deepcopy(model)})
    with pytest.raises(trmfast.UnsupportedModelError, match="several modules hold a recursion: model, ema; accelerate"):
        trmfast.accelerate(both)
    model.network = nn.Sequential(network(), nn.BatchNorm1d(LENGTH))
    with pytest.raises(trmfast.UnsupportedModelError, match="network: BatchNorm1d at 1 keeps running statistics"):
        trmfast.accelerate(model)
    assert foreign.undo(both) == 0


def test_compiled() -> None:
    torch.manual_seed(0)
    sizes = {"num_refinement_blocks": 2, "num_latent_refinements": 1}
    plain = TinyRecursiveModel(dim=DIM, num_tokens=TOKENS, network=network(), **sizes)
    model = torch.compile(swap(copy.deepcopy(plain)), backend="aot_eager")
    assert isinstance(model, nn.Module)
    torch.testing.assert_close(step(model), step(plain))
    found, wanted = gradients(model), gradients(plain)
    for name, grad in wanted.items():
        torch.testing.assert_close(found[f"_orig_mod.{name}"], grad, msg=name)
    torch.compiler.reset()


@pytest.mark.parametrize(
    "layer, reason",
    [
        (nn.BatchNorm1d(LENGTH), "BatchNorm1d at 1 keeps running statistics"),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(DIM, DIM)), "spectral norm at 1.parametrizations.weight.0"),
        (nn.utils.spectral_norm(nn.Linear(DIM, DIM)), "spectral norm at 1 keeps"),
    ],
    ids=["batch-norm", "spectral", "old-spectral"],
)
def test_networks_that_count_their_calls_are_refused(layer: nn.Module, reason: str) -> None:
    net = nn.Sequential(nn.Linear(DIM, DIM), layer)
    model = TinyRecursiveModel(dim=DIM, num_tokens=TOKENS, network=net)
    found = foreign.recognise(model)
    assert found is not None
    assert [line.startswith(f"network: {reason}") for line in found.refusals()] == [True]
    with pytest.raises(ValueError, match=f"^network: {reason}"):
        found.swap()
    assert foreign.undo(model) == 0
    with pytest.raises(ValueError, match=f"^module: {reason}"):
        foreign.recompute(net)
    with pytest.raises(ValueError, match=rf"^nets\[0\]: {reason}.*accepted with recompute=False$"):
        Recursion(RecursionProgram.trm(1, 1), [net])
    Recursion(RecursionProgram.trm(1, 1), [net], recompute=False)


# ---------------------------------------------------------------- trmfast.nn.Recursion


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
    recursion = Recursion(program, [net])
    with pytest.raises(ValueError, match=r"^nets: got 1, accepted are 2"):
        recursion([x, x], x, program=RecursionProgram.hrm(1, 1))
    with pytest.raises(ValueError, match=r"^states: got 1, accepted are 2 \(z_H, z_L\)$"):
        recursion([x], x)
    with pytest.raises(ValueError, match=r"^x: got None"):
        recursion([x, x])
    with pytest.raises(ValueError, match=r"^cos_sin: got tables, accepted is None"):
        recursion([x, x], x, (x, x))


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
