"""The command line, in this process and, as users run it, in one of its own."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import trmfast
from trmfast import targets
from trmfast.backends.call import ForwardCall
from trmfast.backends.cpu import CpuBackend
from trmfast.backends.reference import ReferenceBackend
from trmfast.backends.triton import TritonBackend
from trmfast.benchmark.report import load
from trmfast.cli import machine, main


def run(*words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", "trmfast", *words], capture_output=True, text=True)
    assert done.returncode == status, f"{words} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


def printed(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    """What a command prints in this process, which has PyTorch already."""
    assert main(list(words)) == status
    return capsys.readouterr().out


def test_version() -> None:
    assert run("--version").stdout.strip() == f"trmfast {trmfast.__version__}"


def test_a_closed_pipe_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "trmfast", "info"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == ""


@pytest.mark.parametrize("command", ["info", "check", "bench", "convert"])
def test_help_shows_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: trmfast {command}" in text
    assert f"  trmfast {command}" in text.split("examples:")[1]


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], "COMMAND"),
        (["fly"], "fly"),
        (["info", "--program", "trm:3"], "--program: got 'trm:3'"),
        (["info", "--program", "trm:0,6"], "H_cycles: got 0"),
        (["info", "--program", "trm:3,6,9"], "window: got 9"),
        (["info", "--batch", "4"], "--batch: got 4 without --plan, accepted only with --plan"),
        (["info", "--gpu", "H100"], "--gpu: got H100 without --plan"),
        (["info", "--recompute", "1GB"], "--recompute: got 1GB without --plan"),
        (["info", "--plan", "trm", "--recompute", "x"], "--recompute: got 'x', accepted are True, False, a number of"),
        (["bench", "--recompute", "1 cow"], "--recompute: got '1 cow', accepted are True, False, a number of bytes"),
        (["info", "--program", "trm:3,6", "--dtype", "float32"], "--dtype: got float32 without --plan"),
        (["info", "--plan", "trm", "--program", "trm:3,6"], "--program: got trm:3,6 with --plan, accepted is one of"),
        (["check", "--problem", "nothing"], "--problem: got 'nothing'"),
        (["check", "--backend", "nobody"], "--backend: got 'nobody'"),
        (["check", "--threads", "0"], "--threads: got 0"),
        (["bench", "--config", "chess"], "--config: got 'chess'"),
        (["bench", "--batch", "0"], "--batch: got 0"),
        (["bench", "--batch", "some"], "--batch"),
        (["bench", "--seconds", "0"], "--seconds: got 0"),
        (["bench", "--output", "/dev/null/x"], "--output"),
        (["bench", "--compare", "a.json"], "--compare: a.json: not a suite.json or bench.json"),
    ],
)
def test_bad_options_are_one_line(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1, lines
    assert expected in lines[0]


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command refuses its options with."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    return err


@pytest.mark.parametrize("threads", [0, 3])
def test_bench_takes_no_more_threads_than_cores(
    threads: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    line = f"trmfast bench: --threads: got {threads}, accepted are 1 to 2, the cores of this process ("
    words = ["bench", "--threads", str(threads), "--output", str(tmp_path / "results")]
    assert refusal(words, capsys).startswith(line)
    assert not list(tmp_path.iterdir())
    monkeypatch.delattr(os, "sched_getaffinity")
    assert machine.cores_of_process() == 8


@pytest.mark.skipif(CpuBackend().available() is not None, reason="no CPU engine, whose targets are chosen")
@pytest.mark.parametrize("command", [["info"], ["check"], ["bench"], ["convert", "a.pt", "b.safetensors"]])
@pytest.mark.parametrize(
    "target, expected",
    [
        ("foo", "got 'foo', accepted are portable ("),
        ("amx", "got 'amx', but the processor lacks AMX-TILE or AMX-BF16; accepted are portable ("),
    ],
)
def test_a_target_that_does_not_run_here_is_one_line(
    target: str,
    expected: str,
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = {"amx": "amx: the processor lacks AMX-TILE or AMX-BF16", "portable": None}
    monkeypatch.setattr(targets, "_forced", target)
    monkeypatch.setattr(targets, "targets", lambda: found)
    targets._target_of.cache_clear()
    assert refusal(command, capsys).startswith(f"trmfast {command[0]}: TRMFAST_CPU_ISA: {expected}")


@pytest.mark.breadth
@pytest.mark.skipif(CpuBackend().available() is not None, reason="no CPU engine, whose targets are chosen")
def test_an_unknown_target_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRMFAST_CPU_ISA", "foo")
    done = run("info", status=2)
    assert done.stdout == ""
    assert done.stderr.startswith("trmfast info: TRMFAST_CPU_ISA: got 'foo', accepted are ")
    assert len(done.stderr.splitlines()) == 1


def test_without_triton_a_plan_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "`pip install -c constraints.txt -e '.[triton]'`" in refusal(["info", "--plan", "trm"], capsys)


def test_check_refuses_a_backend_that_does_not_work_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(TritonBackend, "available", lambda _: "no GPU")
    line = "trmfast check: --backend: triton does not work here: no GPU ("
    assert refusal(["check", "--backend", "reference", "--backend", "triton"], capsys).startswith(line)


def test_nothing_checked_is_no_pass(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ReferenceBackend, "supports", lambda *_: "it rests")
    assert main(["check", "--problem", "trm", "--backend", "reference", "--json"]) == 1
    out, err = capsys.readouterr()
    assert err == "trmfast check: nothing was checked on reference\n"
    record = json.loads(out)
    assert not record["passed"]
    assert record["skipped"] == [{"what": "trm on reference", "reason": "it rests"}]


@pytest.mark.breadth
def test_bad_option_of_a_process() -> None:
    done = run("bench", "--config", "chess", status=2)
    assert done.stdout == ""
    assert done.stderr.startswith("trmfast bench: --config: got 'chess', accepted are arc, ")
    assert len(done.stderr.splitlines()) == 1


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(printed(capsys, "info", "--json"))
    assert record["machine"]["logical_cpus"] >= 1
    assert record["versions"]["trmfast"] == trmfast.__version__
    backends = {backend["name"]: backend for backend in record["backends"]}
    assert backends["reference"]["available"]
    for backend in backends.values():
        assert backend["available"] == (backend["reason"] is None)
    for target in record["targets"]:
        assert target["reason"] or target["chosen_for"]
        assert target["supported"] or not target["chosen_for"]
    chosen = sorted(dtype for target in record["targets"] for dtype in target["chosen_for"])
    assert chosen == (["bfloat16", "float32", "int8"] if backends["cpu"]["available"] else [])
    text = printed(capsys, "info")
    for heading in ("Machine", "Versions", "Targets of the CPU engine", "Backends"):
        assert heading in text


def test_info_program(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "info", "--program", "hrm:2,2")
    assert text.strip() == trmfast.RecursionProgram.hrm(2, 2).table()
    record = json.loads(printed(capsys, "info", "--program", "trm:3,6,all", "--json"))
    assert len(record["updates"]) == 21
    assert all(update["grad"] for update in record["updates"])


@pytest.mark.usefixtures("one_thread")
def test_check(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("check", "--quick", "--problem", "trm", "one-token", "--threads", "1", "--json")
    record = json.loads(printed(capsys, *words))
    assert record["passed"]
    assert {(row["problem"], row["dtype"]) for row in record["parity"] if row["backend"] == "reference"} == {
        (problem, dtype) for problem in ("trm", "one-token") for dtype in ("float32", "bfloat16")
    }
    for row in record["parity"]:
        assert row["error"] <= row["limit"]
        assert row["tensors"] > 8


@pytest.mark.breadth
def test_check_gradients_and_table() -> None:
    text = run("check", "--quick", "--backend", "reference", "--threads", "1").stdout
    for name in ("trm", "trm-mlp_t", "hrm", "single_z", "hier6", "urm"):
        assert any(line.split()[:2] == [name, "yes"] for line in text.splitlines()), name
    assert "checks passed" in text


@pytest.mark.usefixtures("one_thread")
def test_check_fails_on_a_wrong_backend(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A backend whose output is slightly off turns the exit status to 1."""
    forward = ReferenceBackend.forward

    def wrong(self: ReferenceBackend, call: ForwardCall) -> Any:
        out, *kept = forward(self, call)
        return [t + 0.01 if t.dtype.itemsize == 4 else t for t in out], *kept

    monkeypatch.setattr(ReferenceBackend, "forward", wrong)
    words = ("check", "--problem", "trm", "--backend", "reference", "--threads", "1", "--json")
    record = json.loads(printed(capsys, *words, status=1))
    assert not record["passed"]
    assert {row["dtype"]: row["passed"] for row in record["parity"]} == {"float32": False, "bfloat16": True}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One run of all configurations at width 64, without torch.compile."""
    folder = tmp_path_factory.mktemp("bench")
    done = run("bench", "--quick", "--tiny", "--threads", "1", "--batch", "2", "--output", str(folder), "--json")
    return json.loads(done.stdout), folder


@pytest.mark.breadth
def test_bench_record(bench: tuple[dict[str, Any], Path]) -> None:
    record, _ = bench
    results = {(r["config"], r["step"], r["implementation"]): r for r in record["results"]}
    assert {config for config, _, _ in results} == {"arc", "sudoku", "sudoku-mlp", "hrm-sudoku"}
    assert len(results) == 4 * 2 * 2
    for (_, step, implementation), r in results.items():
        assert r["seconds"] > 0
        assert r["low"] <= r["seconds"] <= r["high"]
        assert r["gflops"] == pytest.approx(r["gflop"] / r["seconds"])
        assert 0 < r["error"] < 0.1
        assert (r["saved"] is None) == (step == "forward")
        if implementation == "eager":
            assert r["ratio"] == 1
    assert record["passed"]
    assert {r["verdict"] for r in record["results"] if r["implementation"] == "trmfast"} == {"pass"}
    assert record["settings"]["threads"] == 1


@pytest.mark.breadth
def test_bench_files(bench: tuple[dict[str, Any], Path]) -> None:
    record, folder = bench
    assert json.loads((folder / "bench.json").read_text()) == record
    report = load(folder / "bench.json")
    assert json.loads(json.dumps(report.record())) == record
    for row, result in zip(report.rows, record["results"], strict=True):
        assert (row.case, row.step, row.implementation) == tuple(
            result[key] for key in ("config", "step", "implementation")
        )
        assert len(row.times) == len(row.peaks) == result["repeats"] >= 2
    with (folder / "bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(record["results"])
    assert float(rows[0]["seconds"]) == record["results"][0]["seconds"]
    table = (folder / "bench.md").read_text().splitlines()
    assert len([line for line in table if line.startswith(("| TRM", "| HRM"))]) == 8
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.breadth
def test_bench_markdown_is_the_file(tmp_path: Path) -> None:
    options = ["--quick", "--tiny", "--threads", "1", "--config", "sudoku", "--batch", "1", "--output", str(tmp_path)]
    assert run("bench", *options, "--markdown").stdout == (tmp_path / "bench.md").read_text()


@pytest.mark.breadth
def test_bench_recompute(tmp_path: Path) -> None:
    """Training with other budgets is checked, timed and counted beside the default."""
    options = ["--quick", "--tiny", "--threads", "1", "--config", "sudoku", "--batch", "1", "--output", str(tmp_path)]
    record = json.loads(run("bench", *options, "--recompute", "True", "False", "--json").stdout)
    assert record["settings"]["recompute"] == ["True", "False"]
    results = {(r["step"], r["implementation"]): r for r in record["results"]}
    assert len(results) == 6
    names = ("recompute=False", "recompute=True", "trmfast", "eager")
    kept, recomputed, fused, eager = (results["training", name] for name in names)
    assert kept["verdict"] == "pass"
    assert kept["error"] == recomputed["error"] == fused["error"]
    assert kept["ratio"] == pytest.approx(eager["seconds"] / kept["seconds"])
    if CpuBackend().available() is None:  # the reference has nothing else to keep
        assert recomputed["saved"] * 10 < kept["saved"] < eager["saved"]
    table = (tmp_path / "bench.md").read_text()
    assert [line.split("|")[2].strip() for line in table.splitlines() if line.startswith("| TRM")] == [
        "forward",
        "training",
        "training, recompute=True",
        "training, recompute=False",
    ]
