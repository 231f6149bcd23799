"""The command ``trmfast solve``, and the rules of Sudoku it judges by."""

from __future__ import annotations

import io
import json
import os
import pty
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import trmfast
from model_cases import SOLVER, make, save_solver
from trmfast import runtime
from trmfast.cli import main
from trmfast.data import model_names
from trmfast.models import TRM
from trmfast.sudoku import conflict, grid_of, is_solved, parse, tokens
from trmfast.sudoku_puzzles import sudoku_puzzle
from trmfast.targets import extension

pytestmark = pytest.mark.skipif(extension is None, reason="no CPU engine, on which the runtime computes")

BOARD = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
SOLUTION = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained model whose Q head says after how many steps it stops."""
    return save_solver(tmp_path_factory.mktemp("model") / "model.safetensors")


@pytest.fixture(scope="module")
def solver_of_one(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that knows one puzzle by heart: 81 cells in 128 dimensions leave its head a solution."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    torch.manual_seed(0)
    made = TRM(SOLVER | {"hidden_size": 128}).eval()
    inner = made.inner
    inputs, labels = (torch.from_numpy(tokens(parse(line)))[None] for line in (BOARD, SOLUTION))
    with torch.no_grad():
        carry = inner.reset_carry(torch.ones(1, dtype=torch.bool), inner.empty_carry(1))
        z = inner(carry, {"inputs": inputs, "puzzle_identifiers": torch.zeros(1, dtype=torch.int32)})[0].z_H[0, 1:]
        targets = torch.nn.functional.one_hot(labels[0].long(), 11).float()
        inner.lm_head.weight.copy_(torch.linalg.lstsq(z, targets, driver="gelsd").solution.T)
        inner.q_head.bias.fill_(3)  # type: ignore[union-attr]
    trmfast.save(made, path)
    return str(path)


def solve(capsys: pytest.CaptureFixture[str], *words: str, status: int = 1) -> list[dict[str, Any]]:
    assert main(["solve", *words]) == status
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["solve", *words])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("trmfast solve: ")
    assert error.count("\n") == 1
    return error.removeprefix("trmfast solve: ")


# ---------------------------------------------------------------- rules


def test_boards_are_parsed_and_judged_by_the_rules() -> None:
    puzzle, answer = parse(BOARD), parse(SOLUTION)
    assert parse(BOARD.replace(".", "0")) == puzzle
    assert grid_of(tokens(answer)) == answer
    assert is_solved(puzzle, answer)
    assert not is_solved(puzzle, puzzle)
    assert not is_solved(parse("9" + "." * 80), answer)  # a clue was changed
    swapped = list(answer)
    swapped[0], swapped[2] = swapped[2], swapped[0]
    assert conflict(swapped) == "4 in column 1"
    assert not is_solved([0] * 81, swapped)
    generator = random.Random(3)
    for _ in range(3):
        assert is_solved(*sudoku_puzzle(generator, 40))


@pytest.mark.parametrize(
    "line, message",
    [
        (BOARD[:-1], "got 80 characters, accepted are 81"),
        (BOARD + ".", "got 82 characters, accepted are 81"),
        (BOARD[:5] + "x" + BOARD[6:], "got 'x' at character 6, accepted are the digits, and 0 or . for an empty cell"),
        (BOARD[:5] + "²" + BOARD[6:], "got '²' at character 6, accepted are the digits, and 0 or . for an empty cell"),
        ("55" + "." * 79, "got two clues 5 in row 1, so there is no solution"),
        ("7" + "." * 79 + "7", ""),
        ("." * 8 + "7" + "." * 71 + "7", "got two clues 7 in column 9, so there is no solution"),
        ("." * 30 + "7" + "." * 29 + "7" + "." * 20, ""),
        ("." * 30 + "7" + "." * 9 + "7" + "." * 40, "got two clues 7 in the box of row 4, column 4, so there is"),
    ],
)
def test_boards_that_are_none(line: str, message: str) -> None:
    if not message:
        assert parse(line)
        return
    with pytest.raises(ValueError) as caught:
        parse(line)
    assert str(caught.value).startswith(message)


# ---------------------------------------------------------------- the command


def test_a_puzzle_that_the_model_knows(solver_of_one: str, capsys: pytest.CaptureFixture[str]) -> None:
    (record,) = solve(capsys, "--model", solver_of_one, BOARD, status=0)
    assert record["answer"] == SOLUTION
    assert (record["solved"], record["halted"], record["steps"]) == (True, True, 1)
    assert record["confidence"] > 0.9
    assert record["milliseconds"] > 0
    both = solve(capsys, "--model", solver_of_one, BOARD, "." * 81)
    assert [row["puzzle"] for row in both] == [BOARD, "." * 81]
    assert both[0]["solved"]


def test_boards_from_everywhere(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    random_ones = solve(capsys, "--model", model, "--random", "5", "--clues", "40", "--seed", "3", "--batch", "2")
    boards = [row["puzzle"] for row in random_ones]
    assert len(set(boards)) == 5
    assert {81 - board.count(".") for board in boards} == {40}

    def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{name: value for name, value in row.items() if name != "milliseconds"} for row in rows]

    expected = without_time(random_ones)
    assert without_time(solve(capsys, "--model", model, *boards)) == expected
    file = tmp_path / "boards.txt"
    file.write_text("\n".join(boards) + "\n\n")
    assert without_time(solve(capsys, "--model", model, "--file", str(file), "--threads", "1")) == expected
    monkeypatch.setattr("sys.stdin", io.StringIO(file.read_text()))
    assert without_time(solve(capsys, "--model", model)) == expected


@pytest.mark.parametrize("name", ["sudoku-attention", "sudoku-mlp"])
def test_the_models_that_come_with_trmfast(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Random puzzles have as many clues as those that it was trained on."""
    assert model_names() == ["sudoku-attention", "sudoku-mlp"]
    notes = runtime.load(name).notes
    main(["solve", "--model", name, "--random", "24"])
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {81 - row["puzzle"].count(".") for row in records} <= {
        *range(notes["fewest_clues"], notes["most_clues"] + 1)
    }
    assert len({row["puzzle"].count(".") for row in records}) > 5
    # The notes say what it solves; 24 puzzles are too few for more.
    assert sum(row["solved"] for row in records) > 24 * (notes["held_out_exact_halting"] - 0.25)


def test_notes_are_not_trusted(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "odd.safetensors"
    trmfast.save(trmfast.load(model), path, notes={"fewest_clues": "many", "most_clues": 1e9})
    assert [81 - row["puzzle"].count(".") for row in solve(capsys, "--model", str(path), "--random", "2")] == [30, 30]


def test_options_reach_the_solver(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", model, "--random", "3", "--clues", "50")
    assert [row["steps"] for row in solve(capsys, *words, "--threshold", "-1000000")] == [1, 1, 1]
    never = solve(capsys, *words, "--threshold", "inf", "--max-steps", "9")
    assert [(row["steps"], row["halted"]) for row in never] == [(9, False)] * 3
    noisy = [solve(capsys, *words, "--trajectories", "3", "--noise", "1", "--batch", batch) for batch in ("1", "32")]
    for one, many in zip(*noisy, strict=True):
        assert one["answer"] == many["answer"]
    assert solve(capsys, *words, "--dtype", "bf16", "--choose", "q")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--threshold", "high", BOARD], "argument --threshold: invalid float value: 'high'"),
        (["--threshold", "nan", BOARD], "--threshold: got nan, accepted are numbers"),
        (["--trajectories", "0", BOARD], "--trajectories: got 0, accepted are integers >= 1"),
        (
            ["--trajectories", "4", BOARD],
            "--noise: got 0 with 4 trajectories, which would be equal; accepted are above",
        ),
        (["--noise", "-1", BOARD], "--noise: got -1, accepted are numbers >= 0"),
        (["--max-steps", "2000", BOARD], "--max-steps: got 2000, accepted are integers from 1 to 1024"),
        (["--batch", "0", BOARD], "--batch: got 0, accepted are integers >= 1"),
        (["--threads", "0", BOARD], "--threads: got 0, accepted are 1 to "),
        (["--clues", "0", "--random", "1"], "--clues: got 0, accepted are 17 to 81"),
        (["--clues", "16", "--random", "1"], "--clues: got 16, accepted are 17 to 81"),
        (["--random", "0"], "--random: got 0, accepted are 1 up"),
        (["--random", "1", BOARD], "--random: got both BOARD and it, accepted is one of them"),
        (["--file", "none.txt"], "--file: got none.txt, accepted are text files: No such file or directory"),
        (["--model", "none.safetensors", BOARD], "--model: got none.safetensors, accepted are files that can be read"),
        ([BOARD[1:]], "BOARD, line 1: got 80 characters, accepted are 81"),
        ([""], "BOARD: got no board, accepted are lines of 81 characters"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, "--model", model, *words).startswith(message)


def test_models_that_do_not_play_sudoku(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trmfast.save(make("trm")[0], tmp_path / "other.safetensors")
    message = refusal(capsys, "--model", str(tmp_path / "other.safetensors"), BOARD)
    assert message.startswith("--model: got a model of 6 tokens and 7 ids, accepted are those of Sudoku, of 81 tokens")


def test_a_stream_that_goes_wrong_leaves_the_results_before_it(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{BOARD}\n\n{BOARD}\n{BOARD[:9]}\n{BOARD}\n"))
    with pytest.raises(SystemExit):
        main(["solve", "--model", model])
    out, err = capsys.readouterr()
    assert [json.loads(line)["puzzle"] for line in out.splitlines()] == [BOARD, BOARD]
    assert err.startswith("trmfast solve: standard input, line 4: got 9 characters, accepted are 81 (see ")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert refusal(capsys, "--model", model).startswith("standard input: got no board, accepted are lines of 81")


def test_a_terminal_shows_every_step(solver_of_one: str) -> None:
    code = f"import sys; from trmfast.cli import main; sys.exit(main({['solve', '--model', solver_of_one, BOARD]!r}))"
    check = "; import atexit; atexit.register(lambda: print('torch' in sys.modules))"
    parent, child = pty.openpty()
    done = subprocess.Popen(
        [sys.executable, "-c", code.replace("; sys.exit", check + "; sys.exit")],
        stdout=child,
        stderr=child,
        stdin=child,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
    )
    os.close(child)
    shown = b""
    while True:
        try:
            read = os.read(parent, 4096)
        except OSError:  # the other end is closed
            break
        if not read:
            break
        shown += read
    os.close(parent)
    assert done.wait(60) == 0, shown.decode()
    text = shown.decode()
    assert "solved" in text
    assert "step 1" in text
    assert "1 step, " in text
    assert "████" in text
    assert text.rstrip().endswith("False"), "PyTorch was imported"


def test_a_frame_marks_what_changed() -> None:
    from trmfast.cli.board import frame

    puzzle, answer = parse(BOARD), parse(SOLUTION)
    before = list(answer)
    before[2] = 9
    text = frame(puzzle, answer, before, "step 2", 0.5)
    assert text.plain.splitlines()[0] == "5 3 4 | 6 7 8 | 9 1 2"
    assert text.plain.splitlines()[3] == "------+-------+------"
    assert text.plain.splitlines()[-1] == "████████████░░░░░░░░░░░░  50%  step 2"
    marked = [span for span in text.spans if span.style == "black on yellow"]
    assert [text.plain[span.start : span.end] for span in marked] == ["4"]
