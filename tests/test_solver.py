"""The solver: halting, continuous batching, trajectories, over models of trmfast and accelerated ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dropin_cases
import trmfast
from model_cases import TINY, make, make_batch
from trmfast.models import ACTLossHead, ACTModel
from trmfast.solving import Confident, Never, Puzzle, Result, Solver, Unchanged
from trmfast.solving.schedule import Row

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = ("trm", "trm-learned", "trm-bare", "trm-mlp_t", "trm-continue", "trm_singlez", "trm_hier6", "hrm")


def model_of(name: str, **extra: Any) -> ACTModel:
    """A tiny model that halts its puzzles after different numbers of steps."""
    model = make(name, scale=2.0, halt_max_steps=8, **extra)[0]
    with torch.no_grad():
        model.inner.q_head.weight.mul_(2)
        model.inner.q_head.bias.fill_(-0.5)  # type: ignore[union-attr]
    return model.eval()


def key(result: Result) -> tuple[Any, ...]:
    """Everything in a result, by its bits."""
    history = None if result.history is None else result.history.tobytes()
    fields = {**vars(result), "prediction": result.prediction.tobytes(), "history": history}
    return tuple(fields.values())


def published(model: Any, batch: dict[str, torch.Tensor], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The evaluation loop of the training scripts: predictions [steps, B, S] and halting logits [steps, B]."""
    predictions, logits = [], []
    with torch.inference_mode():
        carry = model.initial_carry(batch)
        for _ in range(steps):
            carry, outputs = model(carry, batch)
            predictions.append(outputs["logits"].argmax(-1).numpy())
            logits.append(outputs["q_halt_logits"].numpy())
    return np.stack(predictions), np.stack(logits)


# ---------------------------------------------------------------- the published evaluation


@pytest.mark.parametrize(
    "name, dtype", [*((name, "float32") for name in MODELS), ("trm", "bfloat16"), ("hrm", "bfloat16")]
)
def test_never_halting_is_the_published_evaluation(name: str, dtype: str) -> None:
    model = model_of(name, forward_dtype=dtype)
    batch = make_batch(3, rows=17)
    predictions, logits = published(model, batch, 8)
    results = list(Solver(model, halt=Never(), batch_size=17, history=True).solve(batch))
    assert [result.index for result in results] == list(range(17))
    for i, result in enumerate(results):
        assert result.history is not None
        np.testing.assert_array_equal(result.history, predictions[:, i])
        assert result.q_halt == logits[-1, i]
        assert (result.steps, result.halted, result.total_steps) == (8, False, 8)


@pytest.mark.parametrize("name", ["trm", "trm-mlp_t", "trm_singlez", "trm_hier6", "hrm", "baseline", "urm", "nano"])
def test_accelerated_models_are_solved_as_they_evaluate(name: str) -> None:
    model = trmfast.accelerate(dropin_cases.make(name, scale=2.0)).eval()
    batch = dropin_cases.make_batch(name, rows=17)
    predictions, logits = published(model, batch, 4)
    stream = {"inputs": batch[dropin_cases.inputs_of(name)], "puzzle_identifiers": batch["puzzle_identifiers"]}
    results = list(Solver(ACTLossHead(model, "stablemax_cross_entropy"), halt=Never(), batch_size=17).solve(stream))
    for i, result in enumerate(results):
        np.testing.assert_array_equal(result.prediction, predictions[-1, i])
        assert result.q_halt == logits[-1, i]


@pytest.mark.parametrize("name", ["trm", "trm-continue"])
def test_confident_rows_halt_at_their_first_positive_logit(name: str) -> None:
    model = model_of(name)
    batch = make_batch(3, rows=17)
    margins = []
    with torch.inference_mode():
        carry = model.initial_carry(batch)
        for _ in range(8):
            carry, outputs = model(carry, batch)
            less = outputs["q_continue_logits"] if name == "trm-continue" else 0
            margins.append(outputs["q_halt_logits"] - less)
    halts = torch.stack(margins) > 0
    expected = [int(row.int().argmax()) + 1 if row.any() else 8 for row in halts.T]
    assert len(set(expected)) > 2, "the model must halt at different steps for the test to mean something"
    results = list(Solver(model, batch_size=5).solve(batch))
    assert [result.steps for result in results] == expected
    assert [result.halted for result in results] == [bool(row.any()) for row in halts.T]


# ---------------------------------------------------------------- who shares the batch


@pytest.mark.parametrize(
    "name, dtype", [("trm", "float32"), ("trm", "bfloat16"), ("trm-mlp_t", "float32"), ("hrm", "bfloat16")]
)
def test_a_result_does_not_depend_on_who_shares_the_batch(name: str, dtype: str) -> None:
    model = model_of(name, forward_dtype=dtype)
    batch = make_batch(5, rows=19)
    puzzles = [Puzzle(x, int(i)) for x, i in zip(batch["inputs"], batch["puzzle_identifiers"], strict=True)]
    alone = [key(next(Solver(model, history=True).solve([puzzle])))[1:] for puzzle in puzzles]
    assert len({row[1] for row in alone}) > 1  # steps
    for size in (2, 7, 32):
        assert [key(r)[1:] for r in Solver(model, batch_size=size, history=True).solve(puzzles)] == alone
    order = np.random.default_rng(0).permutation(19)
    shuffled = [key(r)[1:] for r in Solver(model, batch_size=4, history=True).solve([puzzles[i] for i in order])]
    assert shuffled == [alone[i] for i in order]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_sudoku_sized_row_does_not_depend_on_the_batch(threads: int) -> None:
    config = {"seq_len": 81, "puzzle_emb_len": 16, "hidden_size": 64, "num_heads": 2, "vocab_size": 11}
    torch.set_num_threads(threads)  # the fixture sets it back
    for dtype in ("float32", "bfloat16"):
        model = model_of("trm", **config, forward_dtype=dtype)
        batch = make_batch(2, rows=5, config=TINY | config)
        results = [[key(r) for r in Solver(model, batch_size=b).solve(batch)] for b in (1, 2, 3, 5)]
        assert results[0] == results[1] == results[2] == results[3]


def test_a_halted_row_is_replaced_before_the_next_step() -> None:
    model = model_of("trm")
    batch = make_batch(5, rows=19)
    steps = [result.steps for result in Solver(model).solve(batch)]
    seen: list[tuple[int, int]] = []
    list(Solver(model, batch_size=4).solve(batch, on_step=lambda row: seen.append((row.index, row.steps))))
    # The same loop over numbers: four places, each free when its puzzle has taken its steps.
    waiting = list(range(19))
    places: list[list[int]] = []
    expected: list[tuple[int, int]] = []
    while waiting or places:
        while waiting and len(places) < 4:
            places.append([waiting.pop(0), 0])
        for place in places:
            place[1] += 1
            expected.append((place[0], place[1]))
        places = [place for place in places if place[1] < steps[place[0]]]
    assert seen == expected


def test_results_come_in_order_or_as_they_finish() -> None:
    model = model_of("trm")
    batch = make_batch(5, rows=19)
    ordered = [key(r) for r in Solver(model, batch_size=4).solve(batch)]
    finished = list(Solver(model, batch_size=4).solve(batch, in_order=False))
    assert [r.index for r in finished] != list(range(19))
    assert [key(r) for r in sorted(finished, key=lambda r: r.index)] == ordered


def test_the_stream_is_read_as_rows_become_free() -> None:
    model = model_of("trm")
    inputs = make_batch(5, rows=19)["inputs"]
    read = []

    def stream() -> Iterator[Any]:
        for i in range(1 << 60):
            read.append(i)
            yield inputs[i % 19]

    results = Solver(model, batch_size=3).solve(stream())
    first = [next(results) for _ in range(5)]
    assert [r.index for r in first] == list(range(5))
    assert len(read) <= 5 + 3 * 8


# ---------------------------------------------------------------- rules


def test_unchanged_halts_when_the_prediction_repeats() -> None:
    model = model_of("trm")
    batch = make_batch(3, rows=17)
    predictions, _ = published(model, batch, 8)
    for result in Solver(model, halt=Unchanged(2)).solve(batch):
        mine = predictions[:, result.index]
        same = [step > 0 and bool((mine[step] == mine[step - 1]).all()) for step in range(8)]
        expected = next((step + 1 for step in range(1, 8) if same[step] and same[step - 1]), 8)
        assert result.steps == expected


def test_a_puzzle_has_its_own_fewest_and_most_steps() -> None:
    model = model_of("trm")
    inputs = make_batch(3, rows=4)["inputs"]
    puzzles = [Puzzle(inputs[0], 0, 6, 6), Puzzle(inputs[1], 0, None, 1), Puzzle(inputs[2], 0, 40, 50), inputs[3]]
    results = list(Solver(model, halt=Confident(-1e9), min_steps=2).solve(puzzles))
    assert [r.steps for r in results] == [6, 1, 40, 2]
    model.H_cycles = model.L_cycles = 1
    deep = next(Solver(model, halt=Never(), max_steps=1024).solve(inputs[:1]))
    assert deep.steps == 1024


def test_the_model_stays_as_it_is() -> None:
    model = model_of("trm").train()
    model.inner.embed_tokens.eval()
    modes = [module.training for module in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = [key(r) for r in Solver(model).solve(make_batch(3))]
    assert [module.training for module in model.modules()] == modes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert trained == [key(r) for r in Solver(model.eval()).solve(make_batch(3))]


# ---------------------------------------------------------------- trajectories


@pytest.mark.parametrize(
    "name, choose", [("trm", "first"), ("trm", "q"), ("trm", "majority"), ("trm_singlez", "first")]
)
def test_trajectories_depend_on_the_seed_and_not_on_the_batch(name: str, choose: str) -> None:
    model = model_of(name)
    batch = make_batch(5, rows=5)

    def solve(size: int, seed: int = 0) -> list[tuple[Any, ...]]:
        solver = Solver(model, batch_size=size, trajectories=4, noise=0.5, choose=choose, seed=seed, history=True)
        return [key(result) for result in solver.solve(batch)]

    results = [solve(size) for size in (1, 3, 20)]
    assert results[0] == results[1] == results[2]
    assert solve(3, seed=1) != results[0]


@pytest.mark.parametrize("choose", ["first", "q", "majority"])
def test_the_chosen_trajectory(choose: str) -> None:
    model = model_of("trm")
    batch = make_batch(5, rows=6)
    rows: dict[tuple[int, int], Row] = {}

    def remember(row: Row) -> None:
        rows[row.index, row.trajectory] = row

    # All trajectories to their end, whatever is chosen below.
    list(Solver(model, trajectories=5, noise=0.5, choose="q").solve(batch, on_step=remember))
    chosen = []
    for result in Solver(model, trajectories=5, noise=0.5, choose=choose).solve(batch):
        mine = [rows[result.index, k] for k in range(5)]
        if choose == "first" and any(row.halted for row in mine):
            fewest = min(row.steps for row in mine if row.halted)
            mine = [row for row in mine if row.halted and row.steps == fewest]
        if choose == "majority":
            votes = Counter(row.prediction.tobytes() for row in mine)
            mine = [row for row in mine if votes[row.prediction.tobytes()] == max(votes.values())]
        best = max(mine, key=lambda row: row.q_halt or 0.0)
        assert (result.trajectory, result.steps, result.q_halt) == (best.trajectory, best.steps, best.q_halt)
        np.testing.assert_array_equal(result.prediction, best.prediction)
        chosen.append(result.trajectory)
    assert len(set(chosen)) > 1


def test_siblings_of_the_first_to_halt_leave() -> None:
    model = model_of("trm")
    batch = make_batch(5, rows=6)
    spent = {
        choose: sum(r.total_steps for r in Solver(model, trajectories=5, noise=0.5, choose=choose).solve(batch))
        for choose in ("first", "q")
    }
    assert spent["first"] < spent["q"]
    seen: Counter[int] = Counter()
    solver = Solver(model, trajectories=5, noise=0.5)
    results = list(solver.solve(batch, on_step=lambda row: seen.update([row.index])))
    assert [seen[r.index] for r in results] == [r.total_steps for r in results]


def test_noise_is_added_to_the_latent_before_each_step() -> None:
    from trmfast.solving.noise import gaussian

    model = model_of("trm")
    batch = make_batch(5, rows=2)
    ids = batch["puzzle_identifiers"]
    inner = model.inner
    with torch.inference_mode():
        carry = inner.reset_carry(torch.ones(2, dtype=torch.bool), inner.empty_carry(2))
        for step in range(3):
            noise = np.stack([gaussian(7, puzzle, 0, step, (1, 9, 32), 0.25)[0] for puzzle in range(2)])
            carry.z_L = carry.z_L + torch.from_numpy(noise)
            carry, logits, (q, _) = inner(carry, {"inputs": batch["inputs"], "puzzle_identifiers": ids})
    results = list(Solver(model, halt=Never(), max_steps=3, noise=0.25, seed=7).solve(batch))
    for i, result in enumerate(results):
        np.testing.assert_array_equal(result.prediction, logits[i].argmax(-1).numpy())
        assert result.q_halt == pytest.approx(float(q[i]), rel=1e-6)  # two rows: the Q head rounds in another order
    assert 0.2 < gaussian(7, 0, 0, 0, (1, 9, 32), 0.25).std() < 0.3


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"trajectories": 0}, ValueError, "trajectories: got 0, accepted are integers >= 1"),
        ({"noise": -0.1}, ValueError, "noise: got -0.1, accepted are numbers >= 0"),
        ({"noise": float("nan")}, ValueError, "noise: got nan, accepted are numbers >= 0"),
        ({"noise": "much"}, TypeError, "noise: got 'much', accepted are numbers >= 0"),
        ({"trajectories": 4}, ValueError, "noise: got 0 with 4 trajectories, which would be equal; accepted are above"),
        ({"max_steps": 0}, ValueError, "max_steps: got 0, accepted are integers from 1 to 1024"),
        ({"max_steps": 1025}, ValueError, "max_steps: got 1025, accepted are integers from 1 to 1024"),
        ({"min_steps": 9}, ValueError, "min_steps: got 9, accepted are integers from 1 to 8"),
        ({"max_steps": 2.5}, TypeError, "max_steps: got 2.5, accepted are integers from 1 to 1024"),
        ({"batch_size": 0}, ValueError, "batch_size: got 0, accepted are integers >= 1"),
        ({"choose": "best"}, ValueError, "choose: got 'best', accepted are first, q, majority"),
        ({"halt": "q"}, TypeError, "halt: got 'q', accepted are Confident, Unchanged and Never"),
        ({"seed": -1}, ValueError, "seed: got -1, accepted are integers from 0 to 9223372036854775807"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        Solver(model_of("trm"), **options)
    assert str(caught.value).startswith(message)


def test_rules_out_of_range() -> None:
    with pytest.raises(TypeError, match=r"^threshold: got 'high', accepted are numbers$"):
        Confident("high")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^threshold: got nan, accepted are numbers$"):
        Confident(float("nan"))
    with pytest.raises(ValueError, match=r"^steps: got 0, accepted are integers >= 1$"):
        Unchanged(0)


@pytest.mark.parametrize(
    "puzzles, error, message",
    [
        ([], ValueError, "puzzles: got an empty stream, accepted are streams of at least one puzzle"),
        (np.zeros((0, 6), dtype=np.int32), ValueError, "puzzles: got an empty stream, accepted are"),
        (np.zeros(6, dtype=np.int32), ValueError, "puzzles: got shape [6], accepted are [N, S], N puzzles of S"),
        ([np.zeros(5, dtype=np.int32)], ValueError, "puzzles[0]: got shape [5], accepted is [6]"),
        ([[0, 1, 2, 3, 4, 7]], ValueError, "puzzles[0]: got token 7 at 5, accepted are 0 to 6"),
        ([[0, 1, 2, 3, 4, -1]], ValueError, "puzzles[0]: got token -1 at 5, accepted are 0 to 6"),
        ([np.zeros(6)], ValueError, "puzzles[0]: got float64 tokens, accepted are integers"),
        ([Puzzle([0] * 6, 5)], ValueError, "puzzles[0].identifier: got 5, accepted are integers from 0 to 4"),
        (
            [Puzzle([0] * 6, 0, 1, 1025)],
            ValueError,
            "puzzles[0].max_steps: got 1025, accepted are integers from 1 to 1024",
        ),
        ([Puzzle([0] * 6, 0, 3, 2)], ValueError, "puzzles[0].min_steps: got 3, accepted are integers from 1 to 2"),
        ("123", TypeError, "puzzles: got str, accepted are arrays [N, S], batches with inputs, and iterables"),
        ({"labels": 1}, ValueError, "puzzles: got no inputs among labels, required is inputs"),
    ],
)
def test_puzzles_that_the_model_does_not_take(puzzles: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        list(Solver(model_of("trm")).solve(puzzles))
    assert str(caught.value).startswith(message)


def test_models_that_cannot_be_solved_with() -> None:
    with pytest.raises(TypeError, match=r"^model: got int, accepted are models of trmfast\.models"):
        Solver(3)
    with pytest.raises(ValueError, match=r"^model: got Linear with 0 fused recursions, accepted are"):
        Solver(nn.Linear(2, 2))
    model = model_of("trm")
    model.inner.q_head = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"^model: got TRM without a q_head, accepted are models with one$"):
        Solver(model)


@pytest.mark.parametrize("in_order", [True, False])
def test_a_stream_that_fails_leaves_the_results_before_it(in_order: bool) -> None:
    model = model_of("trm")
    inputs = make_batch(5, rows=7)["inputs"]

    def stream() -> Iterator[Any]:
        yield from inputs
        raise OSError("the line went dead")

    def gather(puzzles: Any) -> None:
        for result in Solver(model, batch_size=3).solve(puzzles, in_order=in_order):
            results.append(key(result))

    expected = [key(r) for r in Solver(model).solve(inputs)]
    for puzzles, error, message in (
        (stream(), OSError, "the line went dead"),
        ([*inputs, [0, 1]], ValueError, "puzzles[7]: got shape [2], accepted is [6]"),
    ):
        results: list[tuple[Any, ...]] = []
        with pytest.raises(error) as caught:
            gather(puzzles)
        assert str(caught.value) == message
        assert sorted(results) == expected
