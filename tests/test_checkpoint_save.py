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

import trmfast
from checkpoint_cases import make, same


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
