"""docs/examples/train_sudoku.py: the split, resuming after a kill, data parallel training."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import trmfast
from trmfast.sudoku_puzzles import solution_class

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
COMMAND = [sys.executable, str(EXAMPLES / "train_sudoku.py")]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SIZES = {"hidden": 32, "batch": 8, "H-cycles": 1, "L-cycles": 1, "puzzles": 32, "test-puzzles": 8, "warmup": 2}
OFTEN = {"log-every": 3, "test-every": 6, "fewest-clues": 60, "most-clues": 70}
SMALL = [f"--{name}={value}" for name, value in (SIZES | OFTEN).items()]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    sys.path.insert(0, str(EXAMPLES))
    try:
        import train_sudoku  # type: ignore[import-not-found]

        yield train_sudoku
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    subprocess.run([*COMMAND, str(folder), "--steps", "12", *SMALL], check=True, env=ENVIRONMENT)
    return folder


def test_no_test_puzzle_is_a_training_puzzle_in_disguise(whole: Path) -> None:
    with np.load(whole / "puzzles.npz") as puzzles:
        classes = {name: {solution_class(pair[1]) for pair in puzzles[name]} for name in puzzles}
    assert len(classes["train"]) == 32
    assert len(classes["test"]) == 8
    assert not classes["train"] & classes["test"]


def test_what_a_training_leaves(whole: Path) -> None:
    with (whole / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [3, 6, 9, 12]
    assert [row["test_exact"] != "" for row in rows] == [False, True, False, True]
    assert all(np.isfinite(float(row["loss"])) for row in rows)
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert (whole / "loss.png").stat().st_size > 10_000
    model = trmfast.load(whole / "model.safetensors")
    assert sum(p.numel() for p in model.parameters()) > 0
    assert not list(whole.glob("*.part"))


KILLED_WHILE_IT_WRITES = """
import os, runpy, signal, sys
replace, written = os.replace, []
def replace_once(part, path):
    if str(path).endswith("checkpoint.pt"):
        if written:
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(path)
    replace(part, path)
os.replace = replace_once
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.breadth
def test_a_killed_training_ends_with_the_same_weights(whole: Path, tmp_path: Path) -> None:
    command = [*COMMAND, str(tmp_path), "--steps", "12", *SMALL]
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_IT_WRITES, *command[1:]], env=ENVIRONMENT)
    assert killed.returncode == -signal.SIGKILL
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=False)["step"] == 3
    assert (tmp_path / "checkpoint.pt.part").exists()
    subprocess.run(command, check=True, env=ENVIRONMENT)
    ours = torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    theirs = torch.load(whole / "checkpoint.pt", weights_only=False)
    assert ours["step"] == theirs["step"] == 12
    for part in ("head", "average"):
        assert all(torch.equal(value, theirs[part][name]) for name, value in ours[part].items())
    assert (tmp_path / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_another_recipe_does_not_go_on_from_a_checkpoint(whole: Path, example: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"--lr: got 0\.5, accepted is 0\.001, with which .*checkpoint\.pt began"):
        example.main([str(whole), "--steps", "15", *SMALL, "--lr", "0.5"])


@pytest.mark.breadth
def test_two_processes_train_one_model(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [*COMMAND[1:], str(tmp_path), "--steps", "3", *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-2000:]
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    assert content["step"] == 3
    first, second = (carry[3]["labels"] for carry in content["carry"])
    assert not torch.equal(first, second)
