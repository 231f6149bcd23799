"""The CPU engine's results do not depend on threads, on the budget, or on when the store of backward is full."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
import torch

from budgets import budget_with_outputs, budget_with_pairs
from trmfast.backends import BACKENDS
from trmfast.backends import cpu as engine
from trmfast.cases import Case, make_case, make_inputs
from trmfast.problem import Problem
from trmfast.program import RecursionProgram, Update
from trmfast.spec import INJECTIONS, BlockSpec, NetSpec
from trmfast.testing import check_case, require, run_fused

_reason = BACKENDS["cpu"].available()
pytestmark = pytest.mark.skipif(_reason is not None, reason=f"backend cpu: {_reason}")

THREADS = (1, 2, 3, 5)
TARGETS = [name for name, reason in engine.targets().items() if reason is None and not name.endswith("vnni")]


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random_program(random: Random) -> RecursionProgram:
    states, nets = random.randint(1, 3), random.randint(1, 2)
    updates = []
    for _ in range(random.randint(2, 7)):
        sources = tuple(random.sample(range(states), random.choice([0, *range(1, states + 1)])))
        inject = not sources or random.random() < 0.5
        updates.append(Update(random.randrange(states), sources, inject, random.randrange(nets), random.random() < 0.8))
    return RecursionProgram(
        tuple(f"z{s}" for s in range(states)), tuple(f"f{n}" for n in range(nets)), tuple(updates), len(updates)
    )


def random_case(random: Random) -> Case:
    program = random_program(random)
    length, mixer = random.choice([1, 2, 7, 16, 33, 97]), random.choice(["attention", "simple_gla", "mlp_t"])
    attends = mixer != "mlp_t"
    choices: dict[str, Any] = {
        "num_kv_heads": random.choice([0, 1]),
        "norm_placement": random.choice(["post", "pre", "sandwich", "sandwich_sum"]),
        "norm_weight": random.random() < 0.5,
        "qk_norm": random.choice(["none", "plain", "learned"]),
        "qk_bias": random.random() < 0.3,
        "gate": random.choice(["none", "channel", "head"]),
    }
    block = BlockSpec(
        hidden_size=2 * (heads := random.choice([1, 2, 3])) * random.choice([4, 7, 8, 16]),
        intermediate_size=random.choice([5, 16, 40, 96]),
        token_mixer=mixer,
        channel_mixer=random.choice(["swiglu", "conv_swiglu"]),
        num_heads=heads if attends else 0,
        causal=mixer == "simple_gla" or (attends and random.random() < 0.3),
        seq_len=0 if attends else length,
        seq_intermediate_size=0 if attends else random.choice([3, 32, 70]),
        **(choices if attends and random.random() < 0.7 else {}),
    )
    layers, final = random.randint(1, 2), random.random() < 0.5
    nets = (NetSpec(block, layers, final, random.choice(INJECTIONS)) for _ in program.nets)
    problem = Problem(program, tuple(nets))
    return Case(program.key, problem, random.choice([1, 2, 5, 7]), length, attends)


def check_same_bits(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = Random(seed)
    inputs = make_inputs(case := random_case(random), random.choice([torch.float32, torch.bfloat16]), seed)
    store = random.choice([1, 1 << 18, 1 << 20, 36 << 20])
    monkeypatch.setattr(engine, "store_bytes", lambda _: store)
    with engine.force_target(random.choice(TARGETS)):
        sizes = case, inputs.states[0].dtype
        pairs, less = random.randint(0, case.problem.num_grad_updates * case.batch), random.choice([0, 1])
        outputs = max(0, budget_with_outputs(*sizes, pairs) - less)
        budget = budget_with_pairs(*sizes, pairs) - less if pairs else 0
        expected = None
        for threads in THREADS:
            torch.set_num_threads(threads)
            for recompute in (True, outputs, budget, False):
                got = run_fused(inputs, "cpu", recompute=recompute)
                results = {**got.outputs, **got.gradients}
                expected = expected or results
                for name, tensor in results.items():
                    assert torch.equal(tensor, expected[name]), (seed, case.name, threads, recompute, name)


@pytest.mark.parametrize("seed", range(6))
def test_random_programs(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_same_bits(seed, monkeypatch)


@pytest.mark.grid
@pytest.mark.parametrize("seed", range(200))
def test_two_hundred_random_programs(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_same_bits(seed, monkeypatch)


@pytest.mark.representative(when=lambda options: options["length"] < 100)
@pytest.mark.parametrize(
    "options",
    [
        {"length": 128},
        {
            "length": 600,
            "hidden_size": 32,
            "batch": 2,
            "intermediate_size": 32,
            "H_cycles": 1,
        },  # two chunks of a sequence
        {"length": 40, "hidden_size": 48, "num_heads": 3, "token_mixer": "mlp_t"},
        {"length": 41, "hidden_size": 48, "num_heads": 3, "token_mixer": "simple_gla", "causal": True},
        {"length": 37, "hidden_size": 48, "num_heads": 3, "channel_mixer": "conv_swiglu"},
        {"length": 4, "hidden_size": 64, "num_heads": 2, "qk_norm": "learned", "batch": 40},
        {"length": 37, "hidden_size": 48, "num_heads": 3, "injection": "linear"},
        {"length": 40, "hidden_size": 48, "num_heads": 3, "token_mixer": "mlp_t", "injection": "diagonal"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_stores_that_fill(options: dict[str, object], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of rounds changes with threads and recomputation; the sums do not."""
    case = make_case("fills", **{"H_cycles": 2, "window": "all", "batch": 5, "num_layers": 1, **options})  # type: ignore[arg-type]
    inputs = make_inputs(case, dtype, weight_scale=0.5)
    monkeypatch.setattr(engine, "store_bytes", lambda _: 1 << 19)
    expected = None
    for threads in THREADS:
        torch.set_num_threads(threads)
        for recompute in (True, "150kB", False):
            got = run_fused(inputs, "cpu", recompute=recompute).gradients
            expected = expected or got
            for name, tensor in got.items():
                assert torch.equal(tensor, expected[name]), (threads, recompute, name)
    require(check_case(case, dtype, "cpu"))
