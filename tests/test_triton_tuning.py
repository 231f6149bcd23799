"""Choosing tiles by a timer: the winner is taken, kept in a file, and forgotten when anything that matters changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from trmfast.kernels import tuning
from trmfast.kernels.configurations import Configuration
from trmfast.kernels.forward_plan import Setting, forward_plan
from trmfast.kernels.plan import Buffer, Launch, Tile
from trmfast.kernels.tuning import Tuner, cache_file

from trmfast.cases import make_case


def launch(size: int, block: int) -> Launch:
    source = Buffer("a", (size,), torch.float32)
    return Launch.of("none.none", (1,), {"a": source}, reads="a", writes=(), constants={}, tile=Tile.of(BLOCK=block))


class Timer:
    """Says that larger blocks, or with ``sign`` -1 smaller ones, take longer, and counts what it is asked."""

    def __init__(self, sign: int = 1) -> None:
        self.sign, self.asked = sign, 0

    def __call__(self, launch: Launch) -> float:
        self.asked += 1
        return float(self.sign * sum(value for name, value in launch.constants if name.startswith("BLOCK")))


def test_the_fastest_wins_and_is_remembered(tmp_path: Path) -> None:
    file, timer = tmp_path / "cache" / "tuning.json", Timer()
    choices = [launch(64, block) for block in (32, 16, 64)]
    assert Tuner(file, "GPU", timer).fastest(choices) is choices[1]
    assert timer.asked == 3
    # Another process with another opinion reads the file.
    assert Tuner(file, "GPU", Timer(-1)).fastest(choices) is choices[1]
    assert timer.asked == 3
    assert [path.name for path in file.parent.iterdir()] == ["tuning.json"]


def test_a_process_does_not_change_its_mind(tmp_path: Path) -> None:
    """Backward reads what forward left in its tiles, whatever other processes find meanwhile."""
    file, choices = tmp_path / "tuning.json", [launch(64, block) for block in (32, 16)]
    tuner = Tuner(file, "GPU", Timer())
    assert tuner.fastest(choices) is choices[1]
    file.unlink()
    assert Tuner(file, "GPU", Timer(-1)).fastest(choices) is choices[0]
    assert tuner.fastest(choices) is choices[1]


@pytest.mark.parametrize("change", ["device", "shape", "source", "choices"])
def test_what_changes_is_timed_again(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, choices = tmp_path / "tuning.json", [launch(64, block) for block in (32, 16)]
    Tuner(file, "GPU", Timer()).fastest(choices)
    device = "GPU"
    if change == "device":
        device = "another GPU"
    elif change == "shape":
        choices = [launch(128, block) for block in (32, 16)]
    elif change == "source":
        monkeypatch.setattr(tuning, "_source", lambda: "other text")
    else:
        choices = [replace(choice, num_warps=8) for choice in choices]
    timer = Timer(-1)
    assert Tuner(file, device, timer).fastest(choices) is choices[0]
    assert timer.asked == 2


@pytest.mark.parametrize("content", ["", "[1, 2]", "{broken", '{"key": 1}'])
def test_a_broken_file_is_replaced(content: str, tmp_path: Path) -> None:
    file, choices = tmp_path / "tuning.json", [launch(64, block) for block in (32, 16)]
    file.write_text(content)
    assert Tuner(file, "GPU", Timer()).fastest(choices) is choices[1]
    assert Tuner(file, "GPU", Timer(-1)).fastest(choices) is choices[1]


def test_optional_results_make_no_difference(tmp_path: Path) -> None:
    """Backward runs forward again with more results, and needs the same tiles for the same bits."""

    def with_result(choice: Launch) -> Launch:
        more = ("more", Buffer("more", (64,), torch.float32))
        return replace(choice, arguments=(*choice.arguments, more), writes=("more",))

    tuner, choices = Tuner(tmp_path / "tuning.json", "GPU", Timer()), [launch(64, block) for block in (32, 16)]
    assert tuner.fastest(choices) is choices[1]
    tuner.timer = Timer(-1)
    more = [with_result(choice) for choice in choices]
    assert tuner.fastest(more) is more[1]


def test_nothing_is_timed_where_there_is_no_choice(tmp_path: Path) -> None:
    timer, only = Timer(), launch(64, 32)
    assert Tuner(tmp_path / "tuning.json", "GPU", timer).fastest([only]) is only
    assert timer.asked == 0


def test_plans_take_the_tiles_that_were_fastest(tmp_path: Path) -> None:
    case = make_case("tuned", "urm", H_cycles=1, L_cycles=1, hidden_size=512, num_heads=8, length=97, batch=768)

    def tiles(tuner: Tuner | None) -> list[int]:
        configuration = Configuration("sm_80", tuner=tuner)
        setting = Setting(case.problem, case.batch, case.length, torch.bfloat16, case.rope, configuration)
        return [dict(made.constants)["BLOCK_M"] for made in forward_plan(setting, False)]

    small = tiles(Tuner(tmp_path / "small.json", "GPU", Timer()))
    large = tiles(Tuner(tmp_path / "large.json", "GPU", Timer(-1)))
    assert sum(small) < sum(large)
    assert tiles(None)[0] == 128


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TRMFAST_TUNING_CACHE", raising=False)
    assert cache_file() == tmp_path / "trmfast" / "tuning.json"
    monkeypatch.setenv("TRMFAST_TUNING_CACHE", str(tmp_path / "here.json"))
    assert cache_file() == tmp_path / "here.json"
