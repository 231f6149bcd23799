"""Every choice of a block on the CPU engine: the policy on every target, random combinations, bits, NaN, wide rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from random import Random
from statistics import median
from typing import Any

import pytest
import torch

from trmfast.backends import BACKENDS
from trmfast.backends import cpu as engine
from trmfast.cases import CHOICES, Case, make_case, make_inputs
from trmfast.targets import TARGETS
from trmfast.testing import (
    Comparison,
    Draw,
    MeaninglessComparisonError,
    check_draws,
    compare_results,
    default_weight_scale,
    draw_case,
    require,
    run_eager,
    run_fused,
)

_reason = BACKENDS["cpu"].available()
pytestmark = pytest.mark.skipif(_reason is not None, reason=f"backend cpu: {_reason}")

DTYPES = [torch.float32, torch.bfloat16]
THREADS = (1, 3)
# Several choices in one block each: all of a token's ways through the norms, with and without weights.
TOGETHER = {"hrm_text", "ouro", "huginn", "parcae"}


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@lru_cache(maxsize=1)
def _drawn(case: Case, dtype: torch.dtype) -> list[Draw]:
    return draw_case(case, dtype, seeds=range(3))


def grows(case: Case) -> bool:
    """Whether no norm ends a network: after a few updates states are so large that the policy judges no bfloat16."""
    net = case.problem.nets[0]
    return net.block.norm_placement in ("pre", "sandwich") and not net.final_norm


def on_target(target: str, dtype: torch.dtype) -> Any:
    """Forces a target; skips where it cannot run or does not compute in a dtype itself."""
    reason = engine.targets().get(target, f"{target} is not in this build")
    if reason is not None:
        pytest.skip(reason)
    with engine.force_target(target):
        if engine.target_for(dtype) != target:
            pytest.skip(f"{target} has no products of {dtype}")
    return engine.force_target(target)


# The target varies fastest, so that all of them share the draws.
@pytest.mark.representative(when=lambda case: case.name in TOGETHER)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CHOICES, ids=str)
@pytest.mark.usefixtures("one_thread")  # which takes both sequences together
def test_every_target(case: Case, dtype: torch.dtype, target: str) -> None:
    if grows(case) and dtype == torch.bfloat16:
        pytest.skip(f"{case}: states beyond 1; test_random_combinations judges one update of such networks")
    with on_target(target, dtype):
        require(check_draws(_drawn(case, dtype), "cpu"))


def random_case(random: Random) -> Case:
    """Choices drawn independently, at sizes around those of vectors and panels."""
    kv_heads, group = random.choice([1, 2]), random.choice([1, 2])
    mixer = random.choices(["attention", "simple_gla", "mlp_t"], [6, 3, 1])[0]
    attends, linear = mixer != "mlp_t", mixer == "simple_gla"
    options: dict[str, Any] = {
        "channel_mixer": random.choice(["swiglu", "swiglu", "conv_swiglu", "relu2", "gelu"]),
        "final_norm": random.random() < 0.5,
        "hidden_size": random.choice([24, 32, 40, 64]),
        "intermediate_size": random.choice([17, 32, 48]),
        # A norm over two positions, as mlp_t has it, is ill-conditioned: a single draw would decide.
        "length": max(random.choice([2, 5, 13, 33, 49]), 2 if attends else 5),
        "num_layers": random.choice([1, 2]),
        "batch": random.choice([1, 2, 3]),
        "token_mixer": mixer,
    }
    if attends:
        options |= {
            "num_heads": kv_heads * group,
            "num_kv_heads": kv_heads,
            "head_dim": random.choice([10, 16, 34, 48]),
            "norm_placement": random.choice(["post", "pre", "pre", "sandwich", "sandwich_sum"]),
            "norm_weight": random.random() < 0.5,
            "rotation": random.choice(["half", "interleaved"]),
            "qk_norm": random.choice(["none", "none", "plain", "learned"]),
            "qk_bias": random.random() < 0.3,
            "gate": random.choice(["none", "channel", "head"]),
            "attention_window": random.choice([0] if linear else [0, 0, 2, 7, 40]),
            "causal": linear or random.random() < 0.5,
            "rope": random.random() < 0.8,
        }
        if options["causal"] and not options["attention_window"]:
            options["segments"] = random.random() < 0.5
    model = random.choice(["trm", "hrm"])
    options["injection"] = random.choice(["add", "diagonal", "linear"])
    name = ",".join(f"{name}={value}" for name, value in options.items())
    if options.get("norm_placement") in ("pre", "sandwich") and not options["final_norm"]:
        model, options["num_layers"] = "urm", 1  # one update
    return make_case(name, model, H_cycles=1, L_cycles=1, window="all", **options)


def comparable(case: Case, dtype: torch.dtype, count: int = 5, first: int = 0) -> list[Draw]:
    """Draws, from seed ``first`` on, that eager PyTorch is close enough to the truth to judge.

    Norms and softmax over two elements make some draws ill-conditioned, whatever the scale of the weights.
    """
    found = []
    for scale in (default_weight_scale(dtype), 0.25, 0.1, 0.05):
        for seed in range(first, first + 3 * count + 1):
            (draw,) = draw_case(case, dtype, seeds=[seed], weight_scale=scale)
            try:
                compare_results(draw.eager, draw.eager, draw.truth)
            except MeaninglessComparisonError as error:
                reason = error
            else:
                found.append(draw)
            if len(found) == count:
                return found
    raise reason


def require_most(case: Case, dtype: torch.dtype, draws: list[Draw], backend: str = "cpu", others: int = 20) -> None:
    """The policy for the mean of the draws; where that is outside, for the median of so many others.

    In one of fifty random cases a single draw decides the mean: norms of sums that are close to zero, or in simple_gla
    the one score of a first token, which a softmax would have made 1.
    """
    if all(comparison.passed for comparison in check_draws(draws, backend)):
        return
    more = comparable(case, dtype, others, first=100)
    found = [compare_results(run_fused(draw.inputs, backend), draw.eager, draw.truth) for draw in more]
    parts = ("error", "eager", "rounding")
    require(
        [
            Comparison(tensor[0].name, *(median(getattr(c, part) for c in tensor) for part in parts))
            for tensor in zip(*found, strict=True)
        ]
    )


def check_random(seed: int) -> None:
    """The policy, and the same bits for other threads and with kept activations."""
    random = Random(seed)
    case = random_case(random)
    for dtype in DTYPES:
        draws = comparable(case, dtype)
        require_most(case, dtype, draws)
        expected = None
        for threads in THREADS:
            torch.set_num_threads(threads)
            for recompute in (True, False):
                got = run_fused(draws[0].inputs, "cpu", recompute=recompute)
                results = {**got.outputs, **got.gradients}
                expected = expected or results
                for name, tensor in results.items():
                    assert torch.equal(tensor, expected[name]), (seed, case.name, threads, recompute, name)


@pytest.mark.parametrize("seed", range(8))
def test_random_combinations(seed: int) -> None:
    check_random(seed)


@pytest.mark.grid
@pytest.mark.representative(when=lambda seed: seed < 60, rest="product")
@pytest.mark.parametrize("seed", range(8, 300))
def test_three_hundred_random_combinations(seed: int) -> None:
    check_random(seed)


# Widths whose rows are padded, so that products read beyond the last channel.
PADDED = tuple(
    make_case(f"{injection}-{width}", hidden_size=width, injection=injection, H_cycles=1, num_layers=1, length=9)
    for injection in ("diagonal", "linear")
    for width in (24, 44)
)


@pytest.mark.parametrize("case", [*CHOICES, *PADDED], ids=str)
def test_nan_in_a_sequence_stays_there(case: Case) -> None:
    """Also in the memory that the next call uses, where a norm, a gate, a mask or an injection leaves gaps."""
    inputs = make_inputs(case, torch.bfloat16, weight_scale=0.5)
    clean = run_fused(inputs, "cpu")
    sick = make_inputs(case, torch.bfloat16, weight_scale=0.5)
    for tensor in (*sick.states, *sick.grad_states):
        tensor[0, 0] = float("nan")
    poisoned, again = run_fused(sick, "cpu", recompute=False), run_fused(inputs, "cpu")
    for name, tensor in {**clean.outputs, **clean.gradients}.items():
        assert torch.equal({**again.outputs, **again.gradients}[name], tensor), name
        if tensor.shape == inputs.states[0].shape:
            assert torch.equal({**poisoned.outputs, **poisoned.gradients}[name][1:], tensor[1:]), name


@pytest.mark.parametrize(
    "options",
    [{"gate": "channel"}, {"gate": "head"}, {"injection": "diagonal"}, {"injection": "linear"}],
    ids=str,
)
def test_no_sequences(options: dict[str, Any]) -> None:
    inputs = make_inputs(make_case("none", batch=0, norm_placement="pre", final_norm=True, num_layers=1, **options))
    for result in (run_eager(inputs), run_fused(inputs, "cpu")):
        assert all(z.shape == (0, 12, 64) for z in result.outputs.values())
        assert not any(gradient.any() for gradient in result.gradients.values())


@pytest.mark.parametrize(
    "case",
    [
        make_case("pre", norm_placement="pre", norm_weight=True),
        make_case("ouro", norm_placement="sandwich", norm_weight=True, final_norm=True),
    ],
    ids=str,
)
def test_gradients_of_norm_weights_alone(case: Case) -> None:
    """They need those of the products behind the norms, which were not asked for."""
    inputs = make_inputs(case)
    problem = case.problem
    norms = [i for i, name in enumerate(problem.weight_names) if "norm" in name]
    every = run_fused(inputs, "cpu").gradients
    weights = [weight.clone().requires_grad_(i in norms) for i, weight in enumerate(inputs.weights)]
    from trmfast import recursion

    out = recursion(problem.program, problem.nets, inputs.states, inputs.x, weights, inputs.cos, inputs.sin, "cpu")
    found = torch.autograd.grad(out, [weights[i] for i in norms], inputs.grad_states)
    assert norms
    for i, gradient in zip(norms, found, strict=True):
        assert torch.equal(gradient, every[f"grad {problem.weight_names[i]}"]), problem.weight_names[i]


@pytest.mark.parametrize(
    "width, options",
    [
        pytest.param(width, options, marks=[] if width == 640 else [pytest.mark.grid], id=f"{width}-{name}")
        for width in (640, 768, 1024, 1536, 2560)
        for name, options in {
            "hrm-text": {"norm_placement": "pre", "gate": "channel", "causal": True},
            "ouro": {"norm_placement": "sandwich", "norm_weight": True, "causal": True},
        }.items()
    ],
)
def test_wide_rows(width: int, options: dict[str, Any]) -> None:
    case = make_case(
        "wide",
        "urm",
        H_cycles=1,
        L_cycles=1,
        num_layers=1,
        hidden_size=width,
        num_heads=width // 128,
        intermediate_size=width // 2,
        length=7,
        final_norm=True,
        **options,
    )
    require(check_draws(draw_case(case, torch.bfloat16, seeds=range(1)), "cpu"))
