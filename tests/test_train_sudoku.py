"""docs/examples/train_sudoku.py: the split, resuming after a kill, data parallel training."""

from __future__ import annotations

import csv
import os
import shutil
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
from trmfast import runtime
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
def puzzles(example: ModuleType) -> dict[str, np.ndarray]:
    """What `whole` is trained and tested with."""
    clues = OFTEN["fewest-clues"], OFTEN["most-clues"]
    return {
        name: example.sudoku_data.make(SIZES[size], 0, name == "test", clues, lambda: None)
        for name, size in (("train", "puzzles"), ("test", "test-puzzles"))
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    subprocess.run([*COMMAND, str(folder), "--steps", "12", *SMALL], check=True, env=ENVIRONMENT)
    return folder


def test_no_test_puzzle_is_a_training_puzzle_in_disguise(puzzles: dict[str, np.ndarray]) -> None:
    classes = {name: {solution_class(pair[1]) for pair in pairs} for name, pairs in puzzles.items()}
    assert len(classes["train"]) == 32
    assert len(classes["test"]) == 8
    assert not classes["train"] & classes["test"]


@pytest.mark.breadth
def test_what_a_training_leaves(whole: Path, puzzles: dict[str, np.ndarray]) -> None:
    with np.load(whole / "puzzles.npz") as kept:
        assert kept.keys() == puzzles.keys()
        assert all(np.array_equal(kept[name], pairs) for name, pairs in puzzles.items())
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


@pytest.mark.breadth
def test_another_recipe_does_not_go_on_from_a_checkpoint(whole: Path, example: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"--lr: got 0\.5, accepted is 0\.001, with which .*checkpoint\.pt began"):
        example.main([str(whole), "--steps", "15", *SMALL, "--lr", "0.5"])


@pytest.mark.breadth
def test_export_makes_one_small_file(
    whole: Path, example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import export_sudoku  # type: ignore[import-not-found]

    monkeypatch.setattr(export_sudoku, "CALIBRATION", 8)
    file = tmp_path / "sudoku.safetensors"
    export_sudoku.main([str(whole), str(file)])
    assert file.stat().st_size < 0.6 * (whole / "model.safetensors").stat().st_size
    notes = runtime.load(file).notes
    assert (notes["fewest_clues"], notes["most_clues"], notes["optimizer_steps"]) == (60, 70, 12)
    assert (notes["held_out_puzzles"], notes["training_puzzles"]) == (8, 32)
    assert 0 <= notes["held_out_exact"] <= 1
    words = notes["recipe"].split()
    assert words[:3] == ["python", "docs/examples/train_sudoku.py", "runs/sudoku"]
    # The recipe is the command: it parses to the options of the training.
    options = vars(example.parse(words[2:]))
    given = vars(example.parse([str(whole), "--steps", "12", *SMALL]))
    assert {name: options[name] for name in options if name != "folder"} == {
        name: given[name] for name in given if name != "folder"
    }
    exported, averaged = (trmfast.load(path).state_dict() for path in (file, whole / "model.safetensors"))
    assert all(torch.equal(value, averaged[name].bfloat16().to(value.dtype)) for name, value in exported.items())


def test_attention_starts_shallow_and_fixed(
    puzzles: dict[str, np.ndarray], example: ModuleType, tmp_path: Path
) -> None:
    words = [str(tmp_path), "--mixer", "attention", *SMALL, "--H-cycles", "2", "--shallow-steps", "2"]
    words += ["--fixed-attention", "1", "--weight-decay", "0"]
    training = example.Training(example.parse(words), puzzles)
    inner = training.head.model.inner

    def start() -> list[torch.Tensor]:
        products = [layer.self_attn.qkv_proj.weight.detach().chunk(3) for layer in inner.L_level.layers]
        return [inner.embed_pos.embedding_weight.detach().clone(), *(torch.cat(qkv[:2]) for qkv in products)]

    seen = [start()]
    for _ in range(4):
        inputs = training.carry.current_data["inputs"].clone()
        training.advance()
        seen.append(start())
        shallow = training.step <= 2
        assert (inner.H_cycles, inner.L_cycles) == ((1, 1) if shallow else (2, 1))
        # In the first steps and the first of the whole recursion every puzzle is new.
        assert torch.equal(inputs, training.carry.current_data["inputs"]) == (training.step == 4)
    for before, first, second in zip(seen[0], seen[1], seen[2], strict=True):
        assert torch.equal(before, first)
        assert not torch.equal(first, second)


@pytest.mark.representative(when=lambda mixer: mixer == "mlp_t")
@pytest.mark.parametrize("mixer", ["mlp_t", "attention"])
def test_eager_training_starts_where_trmfast_starts(
    mixer: str, puzzles: dict[str, np.ndarray], example: ModuleType, tmp_path: Path
) -> None:
    """Same weights, same puzzles, and in float32 nearly the same losses."""
    words = [str(tmp_path), "--mixer", mixer, "--steps", "3", *SMALL, "--dtype", "float32"]
    losses = []
    for more in ([], ["--eager"]):
        training = example.Training(example.parse([*words, *more]), puzzles)
        losses.append([training.advance()["lm_loss"] for _ in range(3)])
    assert type(training.head.model).__name__ == "EagerTRM"
    assert type(training.averaged().model).__name__ == "TRM"
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


@pytest.mark.breadth
@pytest.mark.usefixtures("example")
def test_two_trainings_in_one_chart(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import compare_sudoku  # type: ignore[import-not-found]

    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(whole / "log.csv", other)
    compare_sudoku.main([str(whole), str(other), "--chart", str(tmp_path / "both.png")])
    assert (tmp_path / "both.png").stat().st_size > 10_000
    first, reached, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{whole.name}: 12 steps, ")
    assert "held-out puzzles solved after" in reached
    assert [line.replace("other", whole.name) for line in rest] == [first, reached]


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
