"""``trmfast bench --suite solve``: every way solves the same puzzles, and what is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trmfast
from model_cases import save_solver
from trmfast import runtime
from trmfast.benchmark import solve_worker
from trmfast.benchmark.solve import Task, puzzles_of, search_row
from trmfast.cli import main
from trmfast.solving import Confident, Never
from trmfast.solving.schedule import Row
from trmfast.sudoku import grid_of, is_solved
from trmfast.targets import extension

pytestmark = pytest.mark.skipif(extension is None, reason="no CPU engine, on which the runtime computes")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained model whose rows halt after different numbers of steps."""
    return save_solver(
        tmp_path_factory.mktemp("model") / "model.safetensors", puzzle_emb_ndim=0, puzzle_emb_len=0, halt_max_steps=4
    )


def test_puzzles_have_the_clues_that_were_asked_for() -> None:
    pairs = puzzles_of(4, (60, 62))
    assert all(60 <= (puzzle > 1).sum() <= 62 for puzzle in pairs[:, 0])
    assert all(is_solved(grid_of(puzzle), grid_of(solution)) for puzzle, solution in pairs)
    assert np.array_equal(puzzles_of(4, (60, 62)), pairs)


WAYS = ("eager", "fixed", "waiting", "leaving", "continuous")


@pytest.mark.representative(when=lambda kinds: kinds == WAYS)
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kinds", [WAYS, ("compile",)], ids=["ways", "compile"])
def test_every_way_gives_the_answers_of_its_rule(kinds: tuple[str, ...], model: str) -> None:
    """The fixed steps are the published evaluation; halting rows answer with what they halt with."""
    tokens = puzzles_of(7, (40, 60))[:, 0]
    loaded: Any = trmfast.load(model)
    at_first: list[float] = []
    list(
        trmfast.Solver(loaded, halt=Never(), max_steps=1).solve(
            tokens, on_step=lambda row: at_first.append(row.q_halt or 0.0)
        )
    )
    task = Task(model, 3, 1, float(np.median(at_first)), (0.5,), 1.0)  # some halt at once
    never, halting = (
        list(trmfast.Solver(loaded, halt=halt).solve(tokens)) for halt in (Never(), Confident(task.threshold))
    )
    assert len({result.steps for result in halting}) > 1
    for kind in kinds:
        published = kind in ("eager", "compile")
        prepare = solve_worker._published if published else solve_worker._solver
        answers = prepare(task.setup(kind))(tokens)
        expected = never if published or kind == "fixed" else halting
        right = [a == r.prediction.tolist() for a, r in zip(answers["predictions"], expected, strict=True)]
        # Eager PyTorch rounds otherwise, so a near tie may go the other way.
        assert sum(right) >= (6 if published else 7), kind
        if kind in ("leaving", "continuous"):
            assert answers["steps"] == [result.steps for result in expected]
        elif kind == "waiting":
            steps = [result.steps for result in halting]
            assert answers["steps"] == [max(steps[i // 3 * 3 : i // 3 * 3 + 3]) for i in range(7)]
        else:
            assert answers["steps"] == [4] * 7
        assert len(answers["latencies"]) == 7
        assert min(answers["latencies"]) > 0


def test_trajectories_are_counted_as_the_solver_counts_them(model: str) -> None:
    """One run of all trajectories tells what the solver does with fewer of them."""
    pairs = puzzles_of(5, (40, 60))
    search = solve_worker._searcher(Task(model, 8, 1, 0.0, (), 1.0).setup("search", trajectories=4, noise=0.5))
    groups = [
        [Row(i, k, steps, np.array(p, dtype=np.int32), q, halted) for k, (p, q, steps, halted) in enumerate(rows)]
        for i, rows in enumerate(search(pairs[:, 0])["rows"])
    ]
    for count in (2, 4):
        solver = trmfast.Solver(runtime.load(model), trajectories=count, noise=0.5)
        expected = list(solver.solve(pairs[:, 0]))
        answers = np.array([result.prediction for result in expected])
        row = search_row(0.5, [group[:count] for group in groups], answers, speed=100)
        assert row.exact == 1  # with the solver's own answers as solutions
        assert row.exact_any == 1
        assert row.steps == np.mean([result.total_steps for result in expected])
        assert row.puzzles_per_second == pytest.approx(100 / row.steps)
        assert search_row(0.5, [group[:count] for group in groups], pairs[:, 1], 100).exact_any == 0


@pytest.mark.representative(when=lambda words: bool(words))
@pytest.mark.parametrize("words", [[], ["--trajectories"]], ids=["ways", "trajectories"])
def test_the_suite(words: list[str], model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", model, "--puzzles", "3", "--clues", "60", "--batch", "2", "--threads", "1", "--sigma", "0.5"]
    options += ["--seconds", "1", "--no-compile", "--tiny", "--output", str(tmp_path), *words]
    assert main(["bench", "--suite", "solve", *options]) == 0
    printed = capsys.readouterr().out
    stem = "solve-trajectories" if words else "solve"
    record = json.loads((tmp_path / f"{stem}.json").read_text())
    assert (tmp_path / f"{stem}.png").stat().st_size > 10_000
    assert record["settings"]["clues"] == [60, 60]
    if words:
        assert [(row["sigma"], row["trajectories"]) for row in record["searches"]] == [
            (0, 1), (0.5, 1), (0.5, 4), (0.5, 16), (0.5, 64),
        ]  # fmt: skip
        return
    rows = {row["name"]: row for row in record["rows"]}
    assert {"eager", "fixed", "waiting", "leaving", "continuous", "trajectories"} <= rows.keys()
    assert ("int8" in rows) != any("int8: not available" in remark for remark in record["remarks"])
    assert all(len(row["times"]) >= 2 and row["puzzles"] == 3 for row in rows.values())
    # PyTorch is in the memory of the rival alone.
    assert rows["continuous"]["peak"] < 0.5 * rows["eager"]["peak"]
    assert rows["fixed"]["steps"] == rows["eager"]["steps"] == 4
    eager, ours = record["starts"]
    assert eager["title"] == "PyTorch eager, all steps"
    assert ours["peak"] < 80e6 < eager["peak"]
    assert {row["dtype"] for row in record["widths"]} >= {"fp32", "bf16"}
    assert "PyTorch eager, 4 steps" in printed
    assert "| trmfast, halting, continuous batching |" in (tmp_path / "solve.md").read_text()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--suite", "quick", "--puzzles", "3"], "--puzzles: an option of --suite solve alone"),
        (["--model", "sudoku-mlp"], "--model: an option of --suite solve alone"),
        (["--suite", "solve", "--quick"], "--quick: not an option of --suite solve"),
        (["--suite", "solve", "--puzzles", "0"], "--puzzles: got 0, accepted are integers >= 1"),
        (["--suite", "solve", "--clues", "9"], "--clues: got 9, accepted are 17 to 81"),
        (["--suite", "solve", "--sigma", "0"], "--sigma: got 0, accepted are numbers above 0"),
        (["--suite", "solve", "--threshold", "nan"], "--threshold: got nan, accepted are numbers"),
        (["--suite", "solve", "--model", "none"], "--model: got none, accepted are files that can be read"),
    ],
)
def test_bad_options(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", *words, "--output", str(tmp_path)])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"trmfast bench: {message}")
