"""``first_gpu`` rehearsed on the stand-in for the CUDA runtime: steps, budget, resuming, report, documentation."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import update_docs
from standin import Runtime, standin
from trmfast.backends import cuda as cuda_backend
from trmfast.benchmark import first_gpu, first_gpu_steps, gpu, launches, suites
from trmfast.benchmark.first_gpu_report import markdown
from trmfast.benchmark.first_gpu_steps import Options, Step, run_command, steps
from trmfast.cases import make_case

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the stand-in takes its place"),
]

FIRST = "trm-sudoku-att, B=8"
NCU = """#!/bin/sh
echo '==PROF== Connected'
echo '"ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum"'
echo '"","","byte","byte"'
echo '"0","qkv_kernel","1,000","24"'
echo '"1","another","5","5"'
"""
SANITIZER = """#!/bin/sh
echo "========= COMPUTE-SANITIZER $2"
echo "========= ERROR SUMMARY: {count} errors"
exit {status}
"""
TINY: dict[str, Any] = {
    "H_cycles": 1, "L_cycles": 1, "num_layers": 1, "batch": 1, "length": 9, "hidden_size": 32, "intermediate_size": 48
}  # fmt: skip
TEST = "import pytest\n@pytest.mark.gpu\ndef test_something(): assert {value}\n"


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts programs on the path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def put(name: str, text: str) -> None:
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)

    return put


WITHOUT_NUMBERS = ["environment", *(f"{kind} {FIRST}" for kind in ("model", "bytes")), "sanitizer memcheck"]
NUMBERS = ["small", *(f"{kind} {FIRST}" for kind in ("speed", "engines"))]
REST = [f"tiles {FIRST}", "tests test_cuda_some.py"]


@pytest.fixture(
    params=[
        pytest.param((False, WITHOUT_NUMBERS), id="without numbers"),
        pytest.param((False, [*NUMBERS, *REST]), marks=pytest.mark.breadth, id="wrong numbers"),
        pytest.param((True, NUMBERS), marks=pytest.mark.breadth, id="right numbers"),
    ]
)
def rehearsed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[bool, list[str]]]:
    """Whether the kernels of the stand-in compute, or follow a formula; and steps, of problems small enough for it."""
    monkeypatch.setattr(gpu, "PEAK_SIZE", 32)
    monkeypatch.setattr(launches, "REPEATS", 2)
    monkeypatch.setattr(launches, "REPLAYS", 1)
    monkeypatch.setattr(first_gpu_steps, "ROUND_SECONDS", 0.0)
    monkeypatch.setattr(first_gpu_steps, "SMALL", (make_case("trm", **TINY),))
    monkeypatch.setattr(suites, "_tiny", lambda case: make_case(case.name, **TINY))
    monkeypatch.setattr(cuda_backend, "_cuda", None)  # built or not
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    with standin(interpreted=request.param[0]):
        yield request.param


def chosen(*names: str) -> first_gpu.Call:
    """Runs these steps in this process."""

    def call(step: Step, options: Options, limit: float) -> dict[str, Any]:
        assert limit > 0
        return step.run(options) if step.name in names else {"status": "pass", "summary": "not rehearsed"}

    return call


def record_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "first_gpu.json").read_text())
    return found


def test_rehearsal(
    rehearsed: tuple[bool, list[str]],
    tools: Callable[[str, str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each kind of step; kernels that compute pass, and those of the formula are seen to be wrong."""
    computes, names = rehearsed
    tools("ncu", NCU)
    tools("compute-sanitizer", SANITIZER.format(count=0, status=0))
    monkeypatch.setenv("TRMFAST_TUNING_CACHE", str(tmp_path / "tuning.json"))
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_cuda_some.py").write_text(TEST.format(value=True))
    words = ["--output", str(tmp_path / "out"), "--tiny", "--tests", str(folder)]
    status = first_gpu.main(words, chosen(*names))
    found = record_of(tmp_path / "out")["steps"]
    assert list(found) == [step.name for step in steps(Options(tmp_path, folder))]
    wrong = [name for name in names if found[name]["status"] != "pass"]
    expected = ["small", f"speed {FIRST}"] if "small" in names and not computes else []
    assert wrong == expected, {name: found[name] for name in wrong}
    assert status == (1 if expected else 0)
    text = capsys.readouterr().out
    assert (tmp_path / "out" / "first_gpu.md").read_text().strip() in text
    for name in names:
        if name.split()[0] in CHECKS:
            heading, check = CHECKS[name.split()[0]]
            assert heading in text
            check(found[name])
    assert (tmp_path / "tuning.json").exists() == (f"tiles {FIRST}" in names)


def check_speed(found: dict[str, Any]) -> None:
    rows = {(row["step"], row["implementation"]): row for row in found["rows"]}
    assert {name for _, name in rows} == {"eager", "compile", "trmfast", "recompute=False"}
    assert ("forward", "recompute=False") not in rows
    assert all(row["seconds"] > 0 and row["peak"] > 0 for row in rows.values()), rows
    assert rows["training", "trmfast"]["saved"] < rows["training", "eager"]["saved"]
    model = found["modelled"]
    assert model["training"]["seconds"] >= model["recompute=False"]["seconds"] > model["forward"]["seconds"] > 0


def check_engines(found: dict[str, Any]) -> None:
    triton, cuda = found["rows"]
    assert triton["seconds"] > 0
    assert cuda["reason"].startswith("the engine was not built")


def check_model(found: dict[str, Any]) -> None:
    assert {"qkv", "weight_gradient"} <= {row["kernel"] for row in found["rows"]}
    assert all(row["seconds"] > 0 and row["modelled"] > 0 for row in found["rows"])
    assert found["host seconds"] > 0
    assert f"the host takes {found['host seconds'] * 1e6:.1f} us to launch a kernel" in found["remarks"][0]


def check_tiles(found: dict[str, Any]) -> None:
    for row in found["rows"]:
        assert len(row["seconds"]) == len(row["tiles"]) > 1
        assert min(row["seconds"]) == row["seconds"][row["fastest"]]


def check_bytes(found: dict[str, Any]) -> None:
    (row,) = found["rows"]
    assert (row["kernel"], row["launches"], row["bytes"]) == ("qkv_kernel", 1, 1024)
    assert row["counted"] > 1024


CHECKS: dict[str, tuple[str, Callable[[dict[str, Any]], None]]] = {
    "speed": ("Published problems", check_speed),
    "engines": ("Backends, forward", check_engines),
    "model": ("Kernels in a CUDA graph", check_model),
    "tiles": ("Tiles: the model's choice", check_tiles),
    "bytes": ("Memory traffic", check_bytes),
    "sanitizer": ("ERROR SUMMARY: 0 errors", lambda _: None),
    "tests": ("1 passed", lambda _: None),
}


def test_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "gpu.md").write_text("before\n<!-- measured -->\nnothing\n<!-- /measured -->\nafter\n")
    known = {"gpu": "some GPU", "torch": "2", "triton": "3", "trmfast": "0", "source": "abc"}
    steps_ = {"small": {"title": "Small", "status": "pass", "rows": [{"backend": "b", "case": "c", "verdict": "pass"}]}}
    (tmp_path / "first_gpu.json").write_text(json.dumps({"identity": known, "steps": steps_}))
    monkeypatch.setattr(update_docs, "DOCS", docs)
    update_docs.main(tmp_path)
    text = (docs / "gpu.md").read_text()
    assert text.startswith("before\n<!-- measured -->\nsome GPU; PyTorch 2")
    assert text.endswith("<!-- /measured -->\nafter\n")
    assert "| b | c | pass |" in text


ROWS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "small": (
        [{"backend": "triton", "case": "a", "verdict": verdict} for verdict in ("pass: 9", "fail: 1", "refused: wide")],
        "1 of 2 programs within the tolerance",
    ),
    "engines": (
        [
            {"backend": "triton", "case": "trm-sudoku-att", "batch": 8, "seconds": 2e-3, "modelled": 1e-3},
            {"backend": "cuda", "case": "trm-sudoku-att", "batch": 8, "reason": "too wide", "modelled": None},
        ],
        "triton 2 ms, cuda does not run",
    ),
    "model": (
        [
            {
                "kernel": "qkv",
                "tile": "M64",
                "launches": 1,
                "programs": 2,
                "bytes": 9,
                "flops": 9,
                "seconds": seconds,
                "modelled": 1e-6,
            }
            for seconds in (1e-6, 4e-6, 5e-7)
        ],
        "measured over modelled: 0.5 to 4, median 1",
    ),
    "tiles": (
        [
            {"kernel": "qkv", "tiles": ["M64", "M32"], "seconds": [3e-6, 2e-6], "of the model": m, "fastest": 1}
            for m in (0, 1)
        ],
        "the model's tile is the fastest for 1 of 2, the fastest gains up to 1.50x",
    ),
    "bytes": (
        [{"kernel": "qkv", "launches": 1, "bytes": 3, "counted": 2}],
        "measured over counted: 1.5 to 1.5, median 1.5",
    ),
}


@pytest.mark.parametrize("kind", ROWS)
def test_what_a_step_found_is_said_in_its_line(kind: str) -> None:
    rows, said = ROWS[kind]
    known = {"gpu": "some GPU", "torch": "2", "triton": "3", "trmfast": "0", "source": "abc"}
    one = {"title": "A step", "status": "pass", "seconds": 3.0, "rows": rows}
    assert f"| A step | pass | 3 | {said} |" in markdown({"identity": known, "steps": {f"{kind} x": one}})


# ---------------------------------------------------------------- budget, resuming, processes


@pytest.fixture
def cuda() -> Iterator[Runtime]:
    with standin() as runtime:
        yield runtime


class Clock:
    """Steps take what they say, and one of them ten times that."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slow: str = "") -> None:
        self.now, self.slow, self.ran = 0.0, slow, list[str]()
        monkeypatch.setattr("trmfast.benchmark.first_gpu.time.monotonic", lambda: self.now)

    def __call__(self, step: Step, options: Options, limit: float) -> dict[str, Any]:
        took = step.seconds * (10 if step.name == self.slow else 1)
        self.now += min(took, limit)
        self.ran.append(step.name)
        return (
            {"status": "pass"} if took <= limit else {"status": "error", "reason": f"did not end within {limit:.0f} s"}
        )


@pytest.mark.usefixtures("cuda")
def test_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing ends later; what was left out is named, and the next call runs it and nothing twice."""
    words = ["--output", str(tmp_path)]
    clock = Clock(monkeypatch)
    assert first_gpu.main([*words, "--minutes", "10"], clock) == 0
    assert clock.now <= 600
    record = record_of(tmp_path)
    skipped = [name for name, one in record["steps"].items() if one["status"] == "skip"]
    assert skipped
    printed = capsys.readouterr().out
    assert all(f"{name}: skip: takes about" in printed for name in skipped)
    table, _, late = (tmp_path / "first_gpu.md").read_text().partition("Not run for lack of time")
    assert all(record["steps"][name]["title"] in late for name in skipped)
    assert not any(f"| {record['steps'][name]['title']} |" in table for name in skipped)
    assert first_gpu.main(words, again := Clock(monkeypatch)) == 0
    assert again.ran == skipped
    assert {one["status"] for one in record_of(tmp_path)["steps"].values()} == {"pass"}


@pytest.mark.usefixtures("cuda")
def test_a_slow_step_is_ended_and_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, slow="small")
    assert first_gpu.main(["--output", str(tmp_path), "--minutes", "10"], clock) == 1
    assert clock.now <= 600
    assert record_of(tmp_path)["steps"]["small"]["reason"].startswith("did not end within")
    first_gpu.main(["--output", str(tmp_path)], again := Clock(monkeypatch))
    assert "small" in again.ran


@pytest.mark.usefixtures("cuda")
def test_every_result_is_kept_when_the_run_ends_early(tmp_path: Path) -> None:
    def call(step: Step, *_: Any) -> dict[str, Any]:
        if step.name == "small":
            raise KeyboardInterrupt
        return {"status": "fail", "reason": "as planted"}

    with pytest.raises(KeyboardInterrupt):
        first_gpu.main(["--output", str(tmp_path)], call)
    assert record_of(tmp_path)["steps"]["environment"]["status"] == "fail"


@pytest.mark.usefixtures("cuda")
def test_results_of_another_machine_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "first_gpu.json").write_text(json.dumps({"identity": {"gpu": "another"}, "steps": {}}))
    assert first_gpu.main(["--output", str(tmp_path)], chosen()) == 2
    assert "first_gpu.json is of another; accepted is another folder" in capsys.readouterr().err


def test_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert first_gpu.main(["--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "first_gpu: no GPU: torch.cuda.is_available() is False\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.breadth
def test_without_a_gpu_in_a_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trmfast.benchmark.first_gpu", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "first_gpu: no GPU: torch.cuda.is_available() is False\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.breadth
@pytest.mark.usefixtures("cuda")
def test_a_step_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Here it finds no GPU; its last words are the reason."""
    step = steps(Options(tmp_path))[0]
    found = first_gpu._in_a_process(step, Options(tmp_path), 60)
    assert found == {"status": "error", "reason": "ended with 2: first_gpu: no GPU: torch.cuda.is_available() is False"}


def test_a_command_that_hangs_is_ended_with_what_it_started() -> None:
    done = run_command(["sh", "-c", "echo begun; sleep 60 & sleep 60"], 0.3)
    assert done.status is None
    assert done.output == "begun\n"


@pytest.mark.parametrize("status, result", [(0, "pass"), (86, "fail")])
def test_sanitizer(status: int, result: str, tools: Callable[[str, str], None], tmp_path: Path) -> None:
    tools("compute-sanitizer", SANITIZER.format(count=status, status=status))
    found = first_gpu_steps.sanitizer("racecheck", Options(tmp_path))
    assert found["status"] == result
    assert f"ERROR SUMMARY: {status} errors" in str(found)


def test_missing_tools(tools: Callable[[str, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(first_gpu_steps, "_tool", lambda _: None)
        check_without_tools(tmp_path)
    work = suites.SUITES["gpu"].works[0]
    tools("ncu", "#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM'\nexit 1\n")
    assert first_gpu_steps.moved(work, Options(tmp_path))["reason"] == "ncu does not count here: ERR_NVGPUCTRPERM"


def check_without_tools(tmp_path: Path) -> None:
    assert first_gpu_steps.sanitizer("memcheck", Options(tmp_path))["reason"].startswith("no compute-sanitizer")
    work = suites.SUITES["gpu"].works[0]
    assert first_gpu_steps.moved(work, Options(tmp_path))["reason"].startswith("no ncu")


@pytest.mark.breadth
@pytest.mark.parametrize("value, result", [(True, "pass"), (False, "fail")])
def test_tests(value: bool, result: str, tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    file = tmp_path / "test_cuda_some.py"
    file.write_text(TEST.format(value=value))
    found = first_gpu_steps.run_tests(file, Options(tmp_path))
    assert found["status"] == result
    assert len(found["failed"]) == (0 if value else 1)
    assert value or "test_cuda_some.py::test_something" in found["failed"][0]
    file.write_text("def test_something(): pass\n")
    assert first_gpu_steps.run_tests(file, Options(tmp_path))["status"] == "skip"
