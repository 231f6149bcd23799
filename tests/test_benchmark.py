"""The suites of ``trmfast bench``: what they run is right, complete, counted and written down."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trmfast.backends.cpu import CpuBackend
from trmfast.benchmark import recursions, rivals
from trmfast.benchmark.charts import minimal_bytes, write_charts
from trmfast.benchmark.memory import peak_bytes, saved_bytes
from trmfast.benchmark.recursions import measure_work
from trmfast.benchmark.report import load
from trmfast.benchmark.rivals import RIVALS, Eager, Fused, is_ours, missing
from trmfast.benchmark.scaling import fit_powers, measure_sweeps
from trmfast.benchmark.suites import SUITES, TITLES, Work
from trmfast.benchmark.turns import take_turns
from trmfast.budget import DEFAULT, budget_of
from trmfast.cases import LOOPED, MEASURED, PUBLISHED, find_case, make_case, make_inputs
from trmfast.cli import main
from trmfast.testing import check_case, compare, pool, require, run_eager, run_truth

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("problem", ["hrm", "urm", "trm-mlp_t"])
@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_engines_compute_the_recursion(name: str, problem: str, dtype: torch.dtype) -> None:
    reason = missing(name, dtype)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    draws = []
    for seed in range(2):
        inputs = make_inputs(find_case(problem), dtype, seed, weight_scale=0.5)
        eager, truth = run_eager(inputs, backward=False), run_truth(inputs, backward=False)
        out = dict(zip(truth.outputs, RIVALS[name](inputs, 1).forward(), strict=True))
        draws.append([compare(key, out[key].to(dtype), eager.outputs[key], t) for key, t in truth.outputs.items()])
    require(pool(draws))


@pytest.mark.breadth
def test_compilers_compute_the_recursion(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: compile_(f, backend="aot_eager", dynamic=False))
    inputs = make_inputs(find_case("hrm"), torch.bfloat16, weight_scale=0.5)
    eager, truth = run_eager(inputs), run_truth(inputs)
    for name in ("compile", "max-autotune"):
        out = dict(zip(truth.outputs, RIVALS[name](inputs, 1).forward(), strict=True))
        require([compare(key, out[key], eager.outputs[key], t) for key, t in truth.outputs.items()])
    torch.compiler.reset()


@pytest.mark.parametrize("name", [case.name for case in MEASURED])
def test_measured_cases_keep_the_policy(name: str) -> None:
    """At the sizes that are measured, one layer and one cycle of them."""
    case = find_case(name)
    block = case.problem.nets[0].block
    short = make_case(
        name,
        "urm" if name.startswith("block") else "trm",
        H_cycles=1,
        L_cycles=1,
        batch=1,
        length=case.length,
        hidden_size=block.hidden_size,
        num_heads=block.num_heads or 1,
        num_layers=1,
        token_mixer=block.token_mixer,
        channel_mixer=block.channel_mixer,
    )
    require(check_case(short, torch.float32, "auto", seeds=range(1), backward=case.length < 900))


def test_suites_are_of_the_problem_list() -> None:
    known = {case.name: case for case in (*PUBLISHED, *MEASURED, *LOOPED)}
    for suite in SUITES.values():
        for work in suite.works:
            assert work.case.problem == known[work.case.name].problem
            assert work.case.length == known[work.case.name].length
            assert {name for name in work.rivals if not is_ours(name)} < set(RIVALS)
        assert len({(str(work), work.steps) for work in suite.works}) == len(suite.works)
    full = {work.case.name for work in SUITES["full"].works}
    assert full == {case.name for case in (*PUBLISHED, *MEASURED)}
    assert set(known) == set(TITLES)
    assert {work.case.batch for work in SUITES["full"].works} == {1, 8, 64}


# ---------------------------------------------------------------- what is counted


def test_turns_are_shared() -> None:
    calls: list[str] = []
    runs: dict[str, Callable[[], object]] = {name: partial(calls.append, name) for name in "ab"}
    timing = take_turns(runs, torch.float32, 4)
    assert [len(times) for times in timing.times.values()] == [4, 4]
    assert len(timing.peaks) == 4
    assert min(timing.peaks) > 0
    order = "".join(c for c, before in zip(calls, [*calls[1:], ""], strict=True) if c != before)
    assert order[2:] == "abbaabba".replace("bb", "b").replace("aa", "a")


def test_counting_saved_bytes_frees_the_graph() -> None:
    """Also where an operation keeps its own output."""
    weight, results = torch.randn(8, requires_grad=True), []

    def run() -> Tensor:
        result = weight.exp()
        results.append(weakref.ref(result))
        return result

    saved_bytes(run, [])
    assert results[0]() is None


def test_saved_bytes_are_those_of_autograd() -> None:
    w = torch.ones(3, 3, requires_grad=True)
    x = torch.ones(5, 3)

    def run() -> torch.Tensor:
        h = x @ w  # keeps x
        return (h.exp() * h.detach()).sum()  # keeps exp(h), and h

    assert saved_bytes(run, [w]) == 3 * x.nbytes


def test_fused_keeps_one_sum_an_update() -> None:
    case = find_case("trm")
    inputs = make_inputs(case, torch.bfloat16)
    runner = Fused(inputs, 1)
    runner.recompute = True
    tables = sum(t.nbytes for t in (inputs.cos, inputs.sin) if t is not None)
    updates = len(case.problem.program.grad_updates)
    assert saved_bytes(runner.outputs, runner.weights) == updates * inputs.states[0].nbytes + tables


def test_peak_bytes_see_an_allocation() -> None:
    size = 64 << 20
    found = peak_bytes(lambda: torch.ones(size, dtype=torch.uint8))
    if found is None:
        pytest.skip("this system does not tell the high-water mark of resident memory")
    assert abs(found - size) < size / 8


def test_minimal_bytes() -> None:
    case = make_case("one", "urm", H_cycles=1, L_cycles=3, batch=2, length=5)
    weights = sum(torch.Size(shape).numel() for shape in case.problem.weight_shapes)
    assert minimal_bytes(case.problem, 2, 5, 2) == 2 * 3 * (weights + 2 * 5 * 64 * 3)


def test_fit_finds_the_fixed_part() -> None:
    x = [1, 2, 4, 8, 100]
    fit = fit_powers(x, [3 + 0.5 * n for n in x], (0, 1))
    assert fit.coefficients == pytest.approx((3, 0.5))
    assert fit.fixed_share[0] == pytest.approx(3 / 3.5)
    assert fit.worst == pytest.approx(0, abs=1e-9)
    fit = fit_powers(x, [7 + 2e-3 * n + 3e-6 * n * n for n in x], (0, 1, 2))
    assert fit.coefficients == pytest.approx((7, 2e-3, 3e-6))
    # A negative fixed cost makes no sense: the term goes.
    fit = fit_powers(x, [2 * n - 0.5 for n in x], (0, 1))
    assert fit.coefficients[0] == 0
    assert fit.worst > 0


@pytest.mark.breadth
@pytest.mark.usefixtures("one_thread")
def test_sweeps() -> None:
    sweeps = measure_sweeps(lambda _: None, tiny=True)
    assert {(s.name, s.step) for s in sweeps} == {
        ("batch", "forward"),
        ("batch", "training"),
        ("length", "forward"),
        ("depth", "forward"),
    }
    for sweep in sweeps:
        assert len(sweep.seconds) == len(sweep.x) == len(sweep.seconds_per_update)
        assert all(
            low <= seconds <= high for low, seconds, high in zip(sweep.low, sweep.seconds, sweep.high, strict=True)
        )
        assert min(sweep.fit.coefficients) >= 0
        counts = sweep.x if sweep.name == "depth" else [7] * len(sweep.x)
        assert sweep.seconds_per_update == [s / n for s, n in zip(sweep.seconds, counts, strict=True)]


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    threads = torch.get_num_threads()
    assert main(["bench", "--suite", "blocks", "--tiny", "--threads", "1", "--output", str(folder)]) == 0
    torch.set_num_threads(threads)
    return folder


@pytest.mark.breadth
def test_record(suite: Path) -> None:
    record = json.loads((suite / "suite.json").read_text())
    assert record["settings"] == {"suite": "blocks", "threads": 1, "tiny": True, "device": "cpu"}
    assert record["machine"]["logical_cpus"] >= 1
    assert {"trmfast", "torch", "openvino", "onnxruntime"} <= record["versions"].keys()
    assert "commit" in record
    assert len(record["rows"]) == 4 * 2 * 2
    report = load(suite / "suite.json")
    assert json.loads(json.dumps(report.record())) == record
    for row in report.rows:
        assert row.low <= row.seconds <= row.high
        assert row.gflops == pytest.approx(row.gflop / row.seconds)
        assert row.samples_per_second == pytest.approx(row.batch / row.seconds)
        assert row.steps_per_second == pytest.approx(1 / row.seconds)
        assert 0 < row.share < 1
        assert (row.saved is None) == (row.step == "forward")
        assert 0 < row.error < 0.1
        assert row.verdict == "pass"
    for group in report.groups():
        eager, fused = group
        assert eager.ratio == 1
        assert fused.ratio == pytest.approx(eager.seconds / fused.seconds)
        assert len(eager.times) == len(fused.times) == len(fused.peaks) >= 3
        if fused.saved is not None and eager.saved is not None:
            assert 0 < fused.saved < budget_of(DEFAULT)  # all of so small a window, with its padding


@pytest.mark.breadth
def test_files(suite: Path) -> None:
    with (suite / "suite.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    assert "times" not in rows[0]
    table = (suite / "suite.md").read_text()
    assert table.count("| one block") == 8 + 4
    for name in ("speed", "memory", "roofline"):
        assert (suite / f"suite-{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.breadth
def test_charts_of_a_whole_record(suite: Path, tmp_path: Path) -> None:
    record = json.loads((suite / "suite.json").read_text())
    record["settings"]["tiny"] = False
    fit = {"powers": [0, 1], "coefficients": [1e-3, 1e-3], "fixed_share": [0.5, 0.1], "worst": 0.1}
    what = {"name": "depth", "step": "forward", "implementation": "trmfast", "hidden_size": 512, "batch": 2}
    times = {"x": [7, 70], "seconds": [0.01, 0.1], "low": [0.01, 0.1], "high": [0.02, 0.2]}
    sweep = {**what, "length": 97, "updates": 7, **times, "per": "a run", "fit": fit}
    record["sweeps"] = [sweep, {**sweep, "name": "batch", "per": "one update"}]
    (tmp_path / "suite.json").write_text(json.dumps(record))
    report = load(tmp_path / "suite.json")
    names = write_charts(tmp_path, report)
    assert names == ["suite-speed.png", "suite-roofline.png", "suite-memory.png", "suite-scaling.png"]
    report.write(tmp_path)
    assert json.loads((tmp_path / "suite.json").read_text())["sweeps"] == record["sweeps"]
    assert "1e+03 + 1e+03 n µs for a run" in (tmp_path / "suite.md").read_text()


@pytest.mark.breadth
@pytest.mark.usefixtures("one_thread")
def test_a_missing_rival_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "find_spec", lambda name: None if name == "openvino" else find_spec(name))
    work = Work(find_case("trm"), torch.bfloat16, ("forward",), ("eager", "openvino", "onnxruntime"))
    rows, remarks = measure_work(work, 0.1, lambda _: None)
    assert [row.implementation for row in rows] == ["eager", "trmfast"]
    assert "openvino not installed, `pip install 'trmfast[rivals]'` installs it" in remarks[0]
    assert remarks[1].startswith("trm, B=2, L=12, bf16: no ONNX Runtime: ")


@pytest.mark.usefixtures("one_thread")
def test_a_broken_rival_is_named_and_a_wrong_one_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Eager):
        title = "torch.compile"

        def forward(self, program: Any = None) -> Any:
            raise RuntimeError("no compiler\nat all")

    class Wrong(Fused):
        def forward(self, program: Any = None) -> Any:
            return [2 * z for z in super().forward(program)]

    monkeypatch.setitem(RIVALS, "compile", Broken)
    monkeypatch.setitem(RIVALS, "trmfast", Wrong)
    work = Work(find_case("trm"), torch.bfloat16, ("forward",), ("eager", "compile"))
    rows, remarks = measure_work(work, 0.1, lambda _: None)
    assert remarks == ["trm, B=2, L=12, bf16: no torch.compile: RuntimeError: no compiler"]
    assert [row.implementation for row in rows] == ["eager", "trmfast"]
    assert rows[0].verdict == "pass"
    assert rows[1].verdict.startswith("fail: z_H: error")


@pytest.mark.breadth
def test_micro_benchmarks_run() -> None:
    reason = CpuBackend().available()
    if reason is not None:
        pytest.skip(f"backend cpu: {reason}")
    options = ["--benchmark-only", "--benchmark-max-time=0.01", "--benchmark-min-rounds=1"]
    chosen = ["-k", "bf16 and 97 and (norm or pack or (threads1 and conv))"]
    command = [sys.executable, "-m", "pytest", str(ROOT / "benchmarks"), *options, *chosen]
    # pytest-benchmark refuses to measure where these say that tests run side by side.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"(\d+) passed", done.stdout)
    assert found is not None
    assert int(found.group(1)) >= 10, done.stdout
    assert "share of the matrix peak" in done.stdout


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--suite", "everything"], "everything"),
        (["--suite", "quick", "--batch", "3"], "--batch: not an option of --suite"),
        (["--compare", "a.json"], "--compare: a.json: not a suite.json"),
        (["--compare", "a.json", "b.json", "--suite", "quick"], "--compare: got two files with --suite"),
        (["--compare", "a.json", "b.json", "c.json"], "--compare: got 3 files"),
        (["--compare", "a.json", "b.json"], "--compare: a.json: not a suite.json"),
    ],
)
def test_bad_options(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", *words])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert expected in lines[0]


@pytest.mark.breadth
@pytest.mark.usefixtures("one_thread")
def test_less_is_judged_where_eager_is_far_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large weights let rounding errors grow: over the whole program there is no verdict, over its end there is."""
    monkeypatch.setattr(recursions, "WEIGHT_SCALE", 1.0)
    work = Work(make_case("far", H_cycles=4, L_cycles=6, length=64), torch.bfloat16, ("forward",), ("eager",))
    rows, _ = measure_work(work, 0.0, lambda _: None)
    assert {row.checked_updates for row in rows} <= {1, 2}
    assert {row.verdict for row in rows} == {"pass"}
