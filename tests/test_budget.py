"""The memory budget of training: what a setting means, what it keeps, and that it changes no bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from budgets import budget_with_outputs, budget_with_pairs
from trmfast import recursion
from trmfast.backends import BACKENDS, what_fits
from trmfast.backends import cpu as engine
from trmfast.benchmark.memory import saved_bytes
from trmfast.budget import DEFAULT, EVERYTHING, Recompute, budget_of, recompute_of
from trmfast.cases import Case, Inputs, make_case, make_inputs
from trmfast.models import TRM
from trmfast.nn import Recursion
from trmfast.testing import run_fused

_reason = BACKENDS["cpu"].available()
needs_engine = pytest.mark.skipif(_reason is not None, reason=f"backend cpu: {_reason}")

CASES = [
    make_case("trm", batch=3, length=13),
    make_case("one-sequence", batch=1, length=130, num_layers=1),  # a team of threads to a sequence
    make_case("hrm-all", "hrm", batch=5, length=9, window="all", num_layers=1),
    make_case("hier6", "hier6", H_cycles=1, L_cycles=6, batch=2, window="all", num_layers=1),
    make_case("urm-2-cycles", "urm", H_cycles=3, L_cycles=2, window=2, batch=3, length=7, channel_mixer="conv_swiglu"),
    make_case("mlp_t", batch=3, length=11, hidden_size=48, intermediate_size=24, token_mixer="mlp_t"),
    # The outputs of the last layer are needed for the final norm, not needed at all, and have weights of their norms.
    make_case("pre-final", batch=3, length=6, norm_placement="pre", norm_weight=True, final_norm=True),
    make_case("pre", batch=2, length=9, norm_placement="pre", hidden_size=40, num_heads=5),
    make_case("sandwich", "hrm", batch=3, length=5, norm_placement="sandwich", norm_weight=True, window="all"),
]


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------- settings

SIZES: list[tuple[Recompute, int]] = [
    (True, 0),
    (False, EVERYTHING),
    (0, 0),
    (1, 1),
    (123456, 123456),
    (2**80, EVERYTHING),
    ("256MB", 256_000_000),
    ("256MiB", 256 << 20),
    ("1GB", 10**9),
    ("1.5 gb", 1_500_000_000),
    ("12kB", 12_000),
    ("3KiB", 3072),
    ("0B", 0),
    ("999999999999GB", EVERYTHING),
    (DEFAULT, budget_of(str(DEFAULT).lower())),
]


@pytest.mark.parametrize("setting, found", SIZES, ids=repr)
def test_a_setting_is_a_number_of_bytes(setting: Recompute, found: int) -> None:
    assert budget_of(setting) == found
    assert budget_of(recompute_of(str(setting))) == found


@pytest.mark.parametrize(
    "setting",
    ["x", "", "256", "MB", "-1MB", "1e3MB", "1TB", "256 M B", "1..5MB", "1 000MB", "٣MB", "1" * 30 + "MB", -1, "true"],
)
def test_what_is_no_size(setting: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^recompute: got .*, accepted are True, False, a number of bytes or a size"
    ) as e:
        budget_of(setting)
    assert "\n" not in str(e.value)
    assert repr(setting) in str(e.value)


def test_a_long_one_is_cut() -> None:
    with pytest.raises(ValueError, match=r"^recompute: got 'xxx+\.\.\.x+', accepted are") as e:
        budget_of("x" * 5000)
    assert len(str(e.value)) < 250


REFUSALS: list[tuple[Any, type[Exception]]] = [
    ("a lot", ValueError),
    (-1, ValueError),
    (2.5, TypeError),
    (None, TypeError),
]


@pytest.mark.parametrize("setting, kind", REFUSALS, ids=repr)
def test_everything_that_takes_it_refuses_alike(setting: Any, kind: type[Exception]) -> None:
    case = make_case("trm")
    inputs, problem = make_inputs(case), case.problem
    config: dict[str, Any] = {
        "batch_size": 1,
        "seq_len": 9,
        "num_puzzle_identifiers": 1,
        "vocab_size": 4,
        "H_cycles": 1,
        "L_cycles": 1,
    }
    config |= {"L_layers": 1, "hidden_size": 32, "expansion": 2, "num_heads": 2, "pos_encodings": "rope"}
    config |= {"halt_max_steps": 1, "halt_exploration_prob": 0.0}
    calls: list[Callable[[], object]] = [
        lambda: recursion(problem.program, problem.nets, inputs.states, inputs.x, inputs.weights, recompute=setting),
        lambda: Recursion(problem.program, [torch.nn.Identity()], recompute=setting),
        lambda: TRM({**config, "recompute": setting}),
    ]
    for call in calls:
        with pytest.raises(kind, match=r"^recompute: got .*, accepted are True, False, a number of bytes or a size"):
            call()


# ---------------------------------------------------------------- what is kept


def run(inputs: Inputs, budget: int) -> tuple[list[Tensor], Tensor, Tensor]:
    problem = inputs.problem
    nets = [net.key for net in problem.nets]
    return cast(
        tuple[list[Tensor], Tensor, Tensor],
        torch.ops.trmfast.recursion.default(
            *(list(inputs.states), inputs.x, list(inputs.weights), inputs.cos, inputs.sin),
            *(problem.program.key, nets, "cpu", True, budget),
        ),
    )


def size_of(case: Case, pairs: int, outputs: int) -> int:
    if pairs:
        return budget_with_pairs(case, torch.bfloat16, pairs)
    return budget_with_outputs(case, torch.bfloat16, outputs)


@needs_engine
def test_what_fits_is_kept() -> None:
    """The bytes stay within the budget, and what is kept is not saved too."""
    case = make_case("trm", batch=3, length=13)
    inputs, updates = make_inputs(case, torch.bfloat16), 3
    assert case.problem.num_grad_updates == updates
    steps = [(0, n) for n in range(10)] + [(n, 9 - n) for n in range(1, 10)]
    sizes = {step: size_of(case, *step) for step in steps}
    assert list(sizes.values()) == sorted(set(sizes.values()))
    budgets = [(size, step) for step, size in sizes.items()]
    budgets += [(sizes[after] - 1, step) for step, after in pairwise(steps)]
    for budget, (pairs, outputs) in [*budgets, (EVERYTHING, (9, 0))]:
        found = what_fits(BACKENDS["cpu"], case.problem, torch.bfloat16, case.batch, case.length, budget)
        assert found == (pairs, outputs, sizes[pairs, outputs])
        assert what_fits(BACKENDS["cpu"], case.problem, torch.bfloat16, 3, case.length, found.nbytes) == found
        _, saved, kept = run(inputs, budget)
        assert kept.shape == (found.nbytes,)
        assert kept.untyped_storage().nbytes() == found.nbytes <= budget
        assert saved.shape == (updates - pairs // 3, 3, 13, 64)
        weights = [weight.clone().requires_grad_() for weight in inputs.weights]

        def forward(weights: list[Tensor] = weights, budget: int = budget) -> object:
            problem = inputs.problem
            arguments = (inputs.states, inputs.x, weights, inputs.cos, inputs.sin, "cpu", budget)
            return recursion(problem.program, problem.nets, *arguments)

        tables = [table for table in (inputs.cos, inputs.sin) if table is not None]
        assert saved_bytes(forward, weights, tables) == kept.nbytes + saved.nbytes


@needs_engine
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_bit_depends_on_the_budget(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.float32 if case.length % 2 else torch.bfloat16
    inputs = make_inputs(case, dtype, weight_scale=0.5)
    pairs = case.problem.num_grad_updates * case.batch
    budgets = [0, *(budget_with_outputs(case, dtype, n) for n in (1, pairs // 2 + 1))]
    budgets += [budget_with_pairs(case, dtype, n) for n in (0, 1, pairs // 2 + 1, pairs - 1, pairs)]
    expected: dict[int, dict[str, Tensor]] = {}
    for store in (1 << 18, 36 << 20):  # filled many times, and once; sums may differ between the two
        monkeypatch.setattr(engine, "store_bytes", lambda _, store=store: store)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for budget in budgets:
                got = run_fused(inputs, "cpu", recompute=budget)
                results = {**got.outputs, **got.gradients}
                for name, tensor in expected.setdefault(store, results).items():
                    assert torch.equal(tensor, results[name]), (store, threads, budgets.index(budget), name)


@needs_engine
def test_kept_of_another_layout_is_refused() -> None:
    case = make_case("trm", batch=2, length=5)
    inputs = make_inputs(case)
    _, saved, kept = run(inputs, EVERYTHING)
    weights, problem = list(inputs.weights), case.problem
    rest = (problem.program.key, [net.key for net in problem.nets], "cpu", [True] * 2, True, [True] * len(weights))
    backward = torch.ops.trmfast.recursion_backward.default
    grads, tables = list(inputs.grad_states), (inputs.cos, inputs.sin)
    with pytest.raises(ValueError, match=rf"^kept: got {len(kept) - 64} bytes, accepted is what forward kept, such as"):
        backward(grads, saved, kept[64:].contiguous(), weights, *tables, *rest)
    for other in (kept.float(), kept[:0]):
        with pytest.raises(ValueError, match=r"^(kept|saved): got ") as e:
            backward(grads, saved, other, weights, *tables, *rest)
        assert "\n" not in str(e.value)
    _, inputs_alone, nothing = run(inputs, 0)
    again = inputs_alone.repeat(1, 100, 1, 1)
    for other in (again, inputs_alone[:, :0], inputs_alone[:, :, :2], inputs_alone[0], inputs_alone.bfloat16()):
        with pytest.raises(ValueError, match=r"^saved: got \[.*\] of torch.*, accepted are inputs of \[2, 5, 64\] of"):
            backward(grads, other, nothing, weights, *tables, *rest)
    strided = kept.repeat_interleave(2)[::2]
    for a, b in zip(*(backward(grads, saved, k, weights, *tables, *rest) for k in (kept, strided)), strict=True):
        assert torch.equal(a, b)
    part = budget_with_pairs(case, torch.float32, 4)
    with pytest.raises(ValueError, match=r"^saved: got 0 inputs, accepted are 1, one for each grad update not wholly"):
        backward(grads, saved, kept[:part].contiguous(), weights, *tables, *rest)


@needs_engine
@pytest.mark.parametrize("pairs", [True, False], ids=["pairs and outputs", "outputs"])
def test_compiled_once_for_all_batch_sizes(pairs: bool) -> None:
    """How many updates are kept depends on the batch, which stays symbolic; none or one saved would be a new graph."""
    from torch._dynamo.testing import CompileCounterWithBackend

    case = make_case("trm", batch=5, length=5, num_layers=1, L_cycles=4)
    inputs = make_inputs(case)
    small = make_case("trm", batch=2, length=5, num_layers=1, L_cycles=4)
    budget = budget_with_pairs(small, torch.float32, 7) if pairs else budget_with_outputs(small, torch.float32, 12)
    weights = [weight.requires_grad_() for weight in inputs.weights]

    def loss(z_H: Tensor, z_L: Tensor, x: Tensor) -> Tensor:
        arguments = ((z_H, z_L), x, weights, inputs.cos, inputs.sin, "cpu", budget)
        return recursion(case.problem.program, case.problem.nets, *arguments)[0].square().sum()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    assert inputs.x is not None
    for batch in (2, 3, 5):
        tensors = [tensor[:batch].clone() for tensor in (*inputs.states, inputs.x)]
        found = [torch.autograd.grad(function(*tensors), weights) for function in (compiled, loss)]
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1


def test_the_default_is_a_size() -> None:
    assert isinstance(DEFAULT, str)
    assert 0 < budget_of(DEFAULT) < EVERYTHING
