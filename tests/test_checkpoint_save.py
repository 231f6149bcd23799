"""Saving: links, folders, and what is left behind when it ends early."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import trmfast
from checkpoint_cases import make, same, steps
from trmfast import runtime


def test_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match=r"^path: got .*m\.safetensors, accepted are files that can be written"):
        trmfast.save(make("trm"), tmp_path / "m.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_and_its_target_is_written(exists: bool, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    target, link = tmp_path / "data" / "real", tmp_path / "m.safetensors"
    if exists:
        target.write_bytes(b"old")
    link.symlink_to("data/real")
    trmfast.save(make("trm"), link)
    assert os.readlink(link) == "data/real"
    assert same(trmfast.load(target), make("trm"))
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["data", "m.safetensors", "real"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError])
def test_nothing_is_left_of_an_error(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: Callable[..., None] = safetensors.torch.save_file

    def broken(*arguments: Any, **options: Any) -> None:
        whole(*arguments, **options)
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", broken)
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(error):
        trmfast.save(make("trm"), path)
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]
    assert path.read_bytes() == b"old"


@pytest.mark.breadth
def test_nothing_is_left_of_a_terminated_process(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import safetensors.torch, trmfast
from checkpoint_cases import make
whole = safetensors.torch.save_file
def slow(*arguments, **options):
    whole(*arguments, **options)
    os.kill(os.getpid(), signal.SIGTERM)
    sum(range(1000))
safetensors.torch.save_file = slow
trmfast.save(make("trm"), {str(tmp_path / "m.safetensors")!r})
print("went on")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.glob("*.part"))


# ---------------------------------------------------------------- rounded weights, and notes


def test_rounded_weights_load_as_float32(tmp_path: Path) -> None:
    """Computing in bfloat16 rounds the weights anyway: the same bits come out."""
    model = make("trm", forward_dtype="bfloat16")
    trmfast.save(model, tmp_path / "whole.safetensors")
    trmfast.save(model, tmp_path / "half.safetensors", dtype=torch.bfloat16)
    whole, half = (trmfast.load(tmp_path / f"{name}.safetensors") for name in ("whole", "half"))
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    for (name, ours), theirs in zip(half.state_dict().items(), whole.state_dict().values(), strict=True):
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs.bfloat16().to(theirs.dtype)), name
    assert torch.equal(steps(half)[0], steps(whole)[0])


def test_notes_are_kept_for_those_who_ask(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    notes = {"recipe": "by heart", "exact": 0.5, "puzzles": 3, "more": None}
    trmfast.save(make("trm"), path, notes=notes)
    assert runtime.load(path).notes == notes
    assert same(trmfast.load(path), make("trm"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": torch.float64}, "dtype: got torch.float64, accepted are torch.float32, torch.bfloat16"),
        ({"notes": {"exact": [1]}}, "notes: got [1] as 'exact', accepted are words, numbers, truth values and None"),
        ({"notes": {1: 1}}, "notes: got 1 as 1, accepted are words, numbers, truth values and None"),
        ({"notes": {"long": 65536 * "a"}}, "notes: got metadata of 6"),
    ],
)
def test_what_cannot_be_noted(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        trmfast.save(make("trm"), tmp_path / "m.safetensors", **options)
    assert str(caught.value).startswith(message)
    assert not list(tmp_path.iterdir())


def test_a_name_is_that_of_a_model_of_trmfast_unless_a_file_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert runtime.load("sudoku-mlp").seq_len == 81
    packaged: Any = trmfast.load("sudoku-mlp")
    assert packaged.model.config.seq_len == 81
    trmfast.save(make("trm"), "m.safetensors")
    os.rename("m.safetensors", "sudoku-mlp")
    assert same(trmfast.load("sudoku-mlp"), make("trm"))
