"""TRM, HRM and variants against plain eager models, and what a PyTorch module has to withstand."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import trmfast
from model_cases import CASES, HRM_SUDOKU, MLP, SUDOKU, TINY, make, make_batch, make_plain
from trmfast.models import HRM, TRM, URM, ACTLossHead, ACTModel, Carry, TRMHier6, TRMSingleZ

pytestmark = pytest.mark.usefixtures("one_thread")

# ---------------------------------------------------------------- what is stored


@pytest.mark.parametrize(
    "cls, config, count",
    [(TRM, SUDOKU | MLP, 5_028_866), (TRM, SUDOKU, 6_828_034), (HRM, HRM_SUDOKU, 27_275_266)],
    ids=["trm-mlp_t", "trm", "hrm"],
)
def test_parameter_counts_of_the_published_sudoku_models(
    cls: type[ACTModel], config: dict[str, Any], count: int
) -> None:
    with torch.device("meta"):
        model = cls(config)
    assert sum(p.numel() for p in model.parameters()) == count
    assert all(p.dtype == torch.float32 for p in model.parameters())


def layer_keys(level: str, layers: int, mixer: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    block = {**mixer, "mlp.gate_up_proj.weight": (3072, 512), "mlp.down_proj.weight": (512, 1536)}
    return {f"inner.{level}.layers.{i}.{key}": shape for i in range(layers) for key, shape in block.items()}


def test_state_dicts_of_the_published_sudoku_models() -> None:
    common = {
        "inner.H_init": (512,),
        "inner.L_init": (512,),
        "inner.embed_tokens.embedding_weight": (11, 512),
        "inner.lm_head.weight": (11, 512),
        "inner.q_head.weight": (2, 512),
        "inner.q_head.bias": (2,),
        "inner.puzzle_emb.weights": (1, 512),
    }
    attention = {"self_attn.qkv_proj.weight": (1536, 512), "self_attn.o_proj.weight": (512, 512)}
    mixer = {"mlp_t.gate_up_proj.weight": (1024, 97), "mlp_t.down_proj.weight": (97, 512)}
    low = layer_keys("L_level", 2, attention)
    expected: list[tuple[type[ACTModel], dict[str, Any], dict[str, tuple[int, ...]]]] = [
        (TRM, SUDOKU, common | low),
        (TRM, SUDOKU | MLP, common | layer_keys("L_level", 2, mixer)),
        (TRM, SUDOKU | {"pos_encodings": "learned"}, common | low | {"inner.embed_pos.embedding_weight": (97, 512)}),
        (HRM, HRM_SUDOKU, common | layer_keys("H_level", 4, attention) | layer_keys("L_level", 4, attention)),
        (TRMSingleZ, SUDOKU, {k: v for k, v in (common | low).items() if k != "inner.H_init"}),
        (
            TRMHier6,
            SUDOKU,
            {k: v for k, v in (common | low).items() if k != "inner.L_init"}
            | {f"inner.L{k}_init": (512,) for k in range(1, 7)},
        ),
    ]
    for cls, config, keys in expected:
        with torch.device("meta"):
            state = cls(config).state_dict()
        assert {key: tuple(tensor.shape) for key, tensor in state.items()} == keys
        for key, tensor in state.items():
            assert tensor.dtype == (torch.bfloat16 if key.endswith("_init") else torch.float32), key


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = TRM(TINY | {"forward_dtype": "bfloat16", "hidden_size": 128, "num_heads": 2})
    inner = model.inner
    assert (inner.q_head.weight == 0).all()
    assert inner.q_head.bias is not None
    assert (inner.q_head.bias == -5).all()
    assert (model.puzzle_emb.weights == 0).all()
    assert float(inner.L_level.weights()[0].detach().std()) == pytest.approx(128**-0.5, rel=0.05)
    assert float(inner.embed_tokens.embedding_weight.detach().std()) == pytest.approx(128**-0.5, rel=0.15)
    assert not any("init" in name or "puzzle_emb" in name for name, _ in model.named_parameters())


def test_a_seed_draws_in_the_published_order() -> None:
    torch.manual_seed(7)
    model = TRM(TINY)
    torch.manual_seed(7)
    draw = trmfast.nn.trunc_normal_init_
    state = model.state_dict()
    width = TINY["hidden_size"]
    for key in ("embed_tokens.embedding_weight", "lm_head.weight"):
        assert torch.equal(state[f"inner.{key}"], draw(torch.empty(7, width), std=width**-0.5))
    draw(torch.empty(2, width), std=width**-0.5)  # the q head draws before it is set to zero
    for layer in range(2):
        for key in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            weight = state[f"inner.L_level.layers.{layer}.{key}.weight"]
            assert torch.equal(weight, draw(torch.empty_like(weight), std=weight.shape[1] ** -0.5))
    for key in ("H_init", "L_init"):
        assert torch.equal(state[f"inner.{key}"], draw(torch.empty(width), std=1.0))


# ---------------------------------------------------------------- one step against the eager model


def step_and_grads(model: Any, batch: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
    """Results of the last of several supervision steps, and the gradients of a random projection of its heads."""
    carry = model.initial_carry(batch)
    model.halt_exploration_prob, model.halt_max_steps = 1.0, 10**6
    for _ in range(steps):
        # Nobody halts: exploration holds every row back.
        carry, outputs = model(dataclasses.replace(carry, halted=carry.halted & (carry.steps == 0)), batch)
    q = torch.stack((outputs["q_halt_logits"], outputs["q_continue_logits"]), -1)
    puzzle = model.puzzle_emb.local_weights if model.config.puzzle_emb_ndim else None
    return with_grads(model, vars(carry.inner_carry), outputs["logits"], q, puzzle)


def with_grads(
    model: torch.nn.Module, states: dict[str, Tensor], logits: Tensor, q: Tensor, puzzle: Tensor | None
) -> dict[str, Tensor]:
    # Two numbers a row are too few to judge an error by, so q is judged together with the logits.
    heads = torch.cat((logits.flatten().to(torch.promote_types(logits.dtype, q.dtype)), q.flatten()))
    heads.backward(torch.randn(heads.shape, generator=torch.Generator().manual_seed(1)).to(heads.dtype))
    results = {**states, "heads": heads.detach()}
    for name, parameter in (*model.named_parameters(), ("puzzle", puzzle)):
        if parameter is not None:
            assert parameter.grad is not None, name
            results[f"grad {name}"] = parameter.grad
    return results


@pytest.mark.parametrize("name", CASES)
def test_float64_steps_are_those_of_the_eager_model(name: str) -> None:
    model, eager = make(name, forward_dtype="float64", backend="reference")
    batch = make_batch(3)
    ours, theirs = step_and_grads(model, batch, 2), step_and_grads(eager, batch, 2)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        # q and the gradients of the float32 parameters are float32.
        bound = 1e-12 if key.startswith("z") else 2e-6
        assert (value - theirs[key]).abs().max() <= bound * theirs[key].abs().max(), key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_as_exact_as_the_eager_model(name: str, dtype: str) -> None:
    # One short cycle with small weights: over more, rounding grows until a comparison proves nothing.
    short = {"H_cycles": 1, "L_cycles": 1, "batch_size": 8}
    model, eager = make(name, scale=0.5, forward_dtype=dtype, **short)
    truth = make_plain(name, **short, forward_dtype="float64")
    truth.load_state_dict(eager.state_dict(), strict=True)
    batch = make_batch(3, rows=8)
    exact, theirs = (by_module(step_and_grads(m, batch, 1)) for m in (truth, eager))
    for key, value in by_module(step_and_grads(model, batch, 1)).items():
        allowed = (theirs[key] - exact[key]).norm()
        assert allowed < 0.1 * exact[key].norm(), key
        assert (value - exact[key]).norm() <= 2 * allowed, key


def by_module(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of one module in one vector: alone, the smallest of them are mostly rounding."""
    grouped: dict[str, list[Tensor]] = {}
    for key, value in results.items():
        grouped.setdefault(".".join(key.split(".")[:2]), []).append(value.double().flatten())
    return {key: torch.cat(values) for key, values in grouped.items()}


def test_state_dicts_load_both_ways() -> None:
    model, eager = make("trm")
    other = TRM(TINY)
    other.load_state_dict(eager.state_dict(), strict=True)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])


# ---------------------------------------------------------------- run-time settings and errors


def test_cycles_window_and_backend_change_at_run_time() -> None:
    model, eager = make("trm")
    batch = make_batch(1)
    carry = model.initial_carry(batch)
    model.H_cycles, model.L_cycles = 3, 1
    eager.config.H_cycles, eager.config.L_cycles = 3, 1
    expected = eager(eager.initial_carry(batch), batch)[1]["logits"]
    torch.testing.assert_close(model(carry, batch)[1]["logits"], expected, rtol=1e-4, atol=1e-5)
    model.window, model.backend = "all", "reference"
    logits = model(carry, batch)[1]["logits"]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    model.window = "none"
    model(carry, batch)[1]["logits"].sum().backward()
    assert model.inner.L_level.weights()[0].grad is None
    assert model.inner.lm_head.weight.grad is not None
    with pytest.raises(ValueError, match="H_cycles: got 0"):
        model.H_cycles = 0
    with pytest.raises(ValueError, match="backend: got 'quick', accepted are auto"):
        model.backend = "quick"
    assert (model.H_cycles, model.L_cycles, model.window, model.backend) == (3, 1, "none", "reference")


def test_wrong_batches_say_so_in_one_line() -> None:
    model = TRM(TINY)
    batch = make_batch(0)
    with pytest.raises(ValueError, match=r"inputs: got shape \[3, 5\], accepted is \[batch, 6\]"):
        model.initial_carry(batch | {"inputs": batch["inputs"][:, :5]})
    with pytest.raises(ValueError, match="batch: got no puzzle_identifiers"):
        model.initial_carry({"inputs": batch["inputs"]})
    carry = model.initial_carry(batch)
    with pytest.raises(ValueError, match=r"^batch: got no labels, required are inputs, puzzle_identifiers, labels$"):
        model(carry, {key: batch[key] for key in ("inputs", "puzzle_identifiers")})
    small = make_batch(0, rows=1)
    with pytest.raises(ValueError, match=r"batch\['inputs'\]: got shape \[1, 6\], accepted is \[3, 6\]"):
        model(carry, small)
    with pytest.raises(ValueError, match=r"puzzle_identifiers: got shape \[1\], accepted in training is \[3\]"):
        model(model.initial_carry(small), small)
    model.eval()
    for rows in (1, 0):
        other = make_batch(0, rows=rows)
        assert model(model.initial_carry(other), other)[1]["logits"].shape == (rows, 6, 7)


@pytest.mark.parametrize("at", ["initial_carry", "forward"])
def test_ids_that_are_not_integers_are_refused(at: str) -> None:
    model = TRM(TINY)
    batch = make_batch(0)
    carry = model.initial_carry(batch)

    def run(**change: Any) -> None:
        (model.initial_carry if at == "initial_carry" else lambda b: model(carry, b))(batch | change)

    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        name = str(dtype).removeprefix("torch.")
        with pytest.raises(ValueError, match=rf"^batch\['inputs'\].dtype: got {name}, accepted are integers, as int32"):
            run(inputs=batch["inputs"].to(dtype))
    for dtype in (torch.float32, torch.uint8):
        name = str(dtype).removeprefix("torch.")
        with pytest.raises(
            ValueError, match=rf"^batch\['puzzle_identifiers'\].dtype: got {name}, accepted are int32 and int64$"
        ):
            run(puzzle_identifiers=batch["puzzle_identifiers"].to(dtype))
    with pytest.raises(TypeError, match=r"^batch\['inputs'\]: got ndarray, accepted are Tensor$"):
        run(inputs=batch["inputs"].numpy())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_every_integer_dtype_of_inputs_gives_the_same(dtype: torch.dtype) -> None:
    model, _ = make("trm")
    batch = make_batch(1)
    narrow = batch | {"inputs": batch["inputs"].to(dtype)}
    found, expected = (model(model.initial_carry(b), b)[1]["logits"] for b in (narrow, batch))
    assert torch.equal(found, expected)


def test_a_carry_of_something_else_is_refused() -> None:
    model, batch = TRM(TINY), make_batch(0)
    carry = model.initial_carry(batch)
    others: list[Any] = [None, {}, carry.inner_carry]
    for wrong in others:
        got = type(wrong).__name__
        with pytest.raises(TypeError, match=f"^carry: got {got}, accepted is Carry, from initial_carry$"):
            model(wrong, batch)
    with pytest.raises(
        TypeError, match=r"^carry.inner_carry: got InnerCarry, accepted is Hier6InnerCarry, from initial_carry$"
    ):
        TRMHier6(TINY)(carry, batch)
    with pytest.raises(TypeError, match=r"^carry: got NoneType, accepted is URMCarry, from initial_carry$"):
        URM(TINY)(None, batch)


def test_a_carry_of_other_classes_with_the_same_fields_is_taken() -> None:
    model, batch = TRM(TINY), make_batch(0)
    carry = model.initial_carry(batch)
    other = SimpleNamespace(**vars(carry) | {"inner_carry": SimpleNamespace(**vars(carry.inner_carry))})
    assert torch.equal(model(other, batch)[1]["logits"], model(carry, batch)[1]["logits"])


# ---------------------------------------------------------------- as a PyTorch module


@pytest.mark.breadth
@pytest.mark.parametrize("name", ["trm", "hrm"])
def test_compiles_whole_with_its_loss(name: str) -> None:
    model, _ = make(name)
    head = ACTLossHead(model, "stablemax_cross_entropy")
    torch._dynamo.reset()
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    batch = make_batch(1)
    carry = head.initial_carry(batch)
    for seed in range(2):
        results = []
        for run in (head, compiled):
            torch.manual_seed(seed)
            new_carry, loss, metrics, _, finished = run(return_keys=["logits"], carry=carry, batch=batch)
            loss.backward()
            results.append((new_carry, loss.detach(), metrics, finished, [p.grad for p in head.parameters()]))
            head.zero_grad(set_to_none=True)
        torch.testing.assert_close(results[1][1:], results[0][1:])
        torch.testing.assert_close(vars(results[1][0].inner_carry), vars(results[0][0].inner_carry))
        carry = results[0][0]
    model.L_cycles = 3
    expected = head(return_keys=[], carry=carry, batch=batch)[1]
    torch.testing.assert_close(compiled(return_keys=[], carry=carry, batch=batch)[1], expected)


@pytest.mark.filterwarnings("ignore:A model attribute `inner.puzzle_emb.local_weights`")
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_exports(strict: bool) -> None:
    model, _ = make("trm")
    model.eval()
    batch = make_batch(1)
    carry = model.initial_carry(batch)
    program = torch.export.export(model, (carry, batch), strict=strict)
    calls = [node for node in program.graph.nodes if node.target is torch.ops.trmfast.recursion.default]
    assert len(calls) == 1
    exported_carry, exported = program.module()(carry, batch)
    expected_carry, expected = model(carry, batch)
    torch.testing.assert_close(exported, expected)
    torch.testing.assert_close(exported_carry.inner_carry.z_H, expected_carry.inner_carry.z_H)


def test_copies_follow_their_own_weights() -> None:
    model, _ = make("trm")
    batch = make_batch(1)
    model(model.initial_carry(batch), batch)[1]["logits"].sum().backward()
    model.eval()

    def logits(m: ACTModel) -> Tensor:
        with torch.inference_mode():
            return m(m.initial_carry(batch), batch)[1]["logits"].clone()

    expected = logits(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies: list[ACTModel] = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    assigned = TRM(TINY).eval()
    assigned.load_state_dict(model.state_dict(), assign=True)
    with torch.no_grad():
        changed = TRM(TINY).eval()
        logits(changed)
        for p, q in zip(changed.parameters(), model.parameters(), strict=True):
            p.data.copy_(q)  # as an average of weights does
        for a, b in zip(changed.buffers(), model.buffers(), strict=True):
            a.copy_(b)
    for other in (*copies, assigned, changed):
        assert torch.equal(logits(other), expected)
    with torch.no_grad():
        copies[0].inner.L_level.weights()[0].mul_(1.5)
    assert not torch.equal(logits(copies[0]), expected)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", ["trm", "trm-mlp_t", "hrm"])
def test_training_reduces_the_loss(name: str) -> None:
    cls, _, differs, _ = CASES[name]
    torch.manual_seed(0)
    model = cls(TINY | differs)
    head = ACTLossHead(model, "stablemax_cross_entropy")
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    batch = make_batch(1)
    batch["labels"] = batch["inputs"]
    carry: Carry = head.initial_carry(batch)
    losses = []
    for _ in range(40):
        carry, loss, metrics, _, _ = head(return_keys=[], carry=carry, batch=batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(metrics["lm_loss"]))
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]
