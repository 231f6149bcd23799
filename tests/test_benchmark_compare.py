"""``trmfast bench --compare``: a slowdown of a fifth is caught, noise is not."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trmfast.backends.cpu import CpuBackend
from trmfast.benchmark import turns
from trmfast.benchmark.compare import LIMIT, compare_rows
from trmfast.benchmark.measure import Row, measure_works
from trmfast.benchmark.recursions import prepare_work
from trmfast.benchmark.report import Report
from trmfast.benchmark.rivals import Eager
from trmfast.benchmark.suites import Work
from trmfast.cases import make_case
from trmfast.cli import main

SLOWDOWN = 1.2


def rows(
    generator: np.random.Generator, fused: float = 0.2, noise: float = 0.04, rounds: int = 5, machine: float = 1.0
) -> list[Row]:
    """A made-up run: lognormal noise of every time, a common factor for each round and for the whole machine."""
    clock = machine * generator.lognormal(0, 0.1, rounds)
    base: dict[str, Any] = dict.fromkeys((field.name for field in fields(Row)), 0.0)
    for name in ("implementation", "seconds", "times"):
        del base[name]
    base.update(case="trm", dtype="bf16", step="forward", batch=8, length=97, gflop=100.0, saved=None, verdict="pass")
    base["peaks"] = tuple(1000 / (clock * generator.lognormal(0, noise, rounds)))
    found = []
    for name, seconds in (("eager", 0.4), ("compile", 0.35), ("trmfast", fused)):
        times = tuple(seconds * clock * generator.lognormal(0, noise, rounds))
        found.append(Row(implementation=name, seconds=float(np.median(times)), times=times, **base))
    return found


@pytest.mark.parametrize("machine", [0.7, 1.0, 1.5])
def test_made_up_runs(machine: float) -> None:
    """Of 60 pairs of runs on machines of different speed: every slowdown is seen, hardly any unchanged run is."""
    generator = np.random.default_rng(1)
    flagged = {1.0: 0, SLOWDOWN: 0}
    for factor in flagged:
        for _ in range(60):
            (change,) = compare_rows(
                rows(generator, noise=0.02), rows(generator, 0.2 * factor, noise=0.02, machine=machine)
            )
            flagged[factor] += change.regressed
            assert change.low <= change.change <= change.high
            assert {ratio.reference for ratio in change.ratios} == {"eager", "compile", "peak"}
    assert flagged[1.0] == 0
    assert flagged[SLOWDOWN] == 60


def slowed(row: Row, factor: float) -> Row:
    return replace(row, times=tuple(factor * t for t in row.times))


def test_rivals_decide_nothing_alone_and_have_a_veto() -> None:
    generator = np.random.default_rng(2)
    old, (eager, compiled, fused) = rows(generator, noise=0.01), rows(generator, noise=0.01)
    (change,) = compare_rows(old, [slowed(eager, 0.5), slowed(compiled, 0.5), fused])
    assert change.rivals < 0.6
    assert not change.slower
    # A slowdown is seen though a neighbour has slowed the rivals, but not where it is the neighbour's.
    for factor, slower in ((1.1, True), (1.3, False)):
        (change,) = compare_rows(old, [slowed(eager, factor), slowed(compiled, factor), slowed(fused, SLOWDOWN)])
        assert change.slower == slower
    (change,) = compare_rows([old[2]], [slowed(fused, SLOWDOWN)])
    assert change.slower


def test_models_are_compared_with_rivals_alone() -> None:
    """Training that keeps activations is trmfast too: its time says nothing of a rival's."""
    generator = np.random.default_rng(5)
    old = rows(generator)
    old.append(replace(old[2], implementation="recompute=False"))
    (change,) = compare_rows(old, old)
    assert {ratio.reference for ratio in change.ratios} == {"eager", "compile", "peak"}


def test_faster_and_memory() -> None:
    generator = np.random.default_rng(3)
    old, new = rows(generator, noise=0.01), rows(generator, 0.15, noise=0.01)
    (change,) = compare_rows(old, new)
    assert change.faster
    assert not change.regressed
    old, new = ([replace(row, saved=saved) for row in old] for saved in (1000, 1100))
    (change,) = compare_rows(old, new)
    assert change.regressed
    assert change.verdict == "keeps more"


# ---------------------------------------------------------------- measured


class VirtualTime:
    """A clock that moves by the cost of what runs, with noise from a seed: the machine has no say in the outcome."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.engine = 0.02  # of a call of the CPU engine; eager takes twice that
        self.generator = np.random.default_rng(6)
        engine, eager = CpuBackend.forward, Eager.recur

        def run_engine(*arguments: Any) -> Any:
            self.spend(self.engine)
            return engine(*arguments)

        def run_eager(*arguments: Any) -> Any:
            self.spend(0.04)
            return eager(*arguments)

        monkeypatch.setattr(CpuBackend, "forward", run_engine)
        monkeypatch.setattr(Eager, "recur", run_eager)
        monkeypatch.setattr(turns, "clock", lambda: self.now)
        monkeypatch.setattr(turns, "dtype_peak", lambda _: 100 * self.noise())

    def noise(self) -> float:
        return float(self.generator.lognormal(0, 0.02))

    def spend(self, seconds: float) -> None:
        self.now += seconds * self.noise()


@pytest.mark.breadth
@pytest.mark.usefixtures("one_thread")
def test_planted_slowdown_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured as the command does it, on a virtual clock: all of the engine's time is in its row."""
    reason = CpuBackend().available()
    if reason is not None:
        pytest.skip(f"backend cpu: {reason}")
    time = VirtualTime(monkeypatch)
    prepared = prepare_work(Work(make_case("planted"), torch.bfloat16, ("forward",), ("eager",)), lambda _: None)

    def measured() -> list[Row]:
        return measure_works([prepared], 0.0, lambda _: None, fewest=5, visit_seconds=0.0)

    old = measured()
    (same,) = compare_rows(old, measured())
    assert not same.regressed
    time.engine *= SLOWDOWN
    (change,) = compare_rows(old, measured())
    assert change.slower
    assert change.change == pytest.approx(1 / SLOWDOWN, rel=0.05)


@pytest.mark.usefixtures("one_thread")
def test_two_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = tmp_path / "suite.json"
    facts: dict[str, Any] = {"machine": {}, "versions": {"torch": "2"}, "commit": "c"}
    facts["settings"] = {"suite": "quick", "threads": 1, "tiny": True}
    found = [replace(row, step=step) for step in ("forward", "training") for row in rows(np.random.default_rng(4))]
    Report("a machine", facts, {"memory": 1e10, "cache": 1e11}, tuple(found), (), (), 1.0).write(tmp_path)
    assert main(["bench", "--compare", str(suite), str(suite)]) == 0
    out = capsys.readouterr().out
    assert "the largest change is 0.0%" in out
    record = json.loads(suite.read_text())
    for row in record["rows"]:
        if row["implementation"] == "trmfast" and row["step"] == "training":
            row["times"] = [SLOWDOWN / (1 - LIMIT) * t for t in row["times"]]
    slower = tmp_path / "slower.json"
    slower.write_text(json.dumps(record))
    assert main(["bench", "--compare", str(suite), str(slower)]) == 1
    out, err = capsys.readouterr()
    assert "slower" in err
    assert "forward" not in err
    del record["settings"]["suite"]
    models = tmp_path / "bench.json"
    models.write_text(json.dumps(record))
    assert main(["bench", "--compare", str(models), str(models)]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["bench", "--compare", str(models), str(suite)])
    assert "--compare: one run is of models, the other of a suite" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:  # what it would print is no JSON
        main(["bench", "--compare", str(suite), str(slower), "--json"])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "--json: not an option of --compare" in err
