"""The fuzzer finds what it is made for: faults planted behind the CPU engine, and functions that take a file badly."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import trmfast
from fuzz import files
from fuzz.damage import FORMS, MODELS, FileTrial, file_bytes
from fuzz.draw import draw_trial, generator
from fuzz.files import examine_file
from fuzz.judge import examine
from fuzz.pool import run_jobs
from fuzz.trial import Trial
from fuzz.variant import Variant
from fuzz.worker import Counts, Failure, Job, work
from trmfast.backends import BACKENDS, packed_weights
from trmfast.backends.cpu import CpuBackend

_reason = BACKENDS["cpu"].available()
needs_engine = pytest.mark.skipif(_reason is not None, reason=f"backend cpu: {_reason}")
pytestmark = pytest.mark.usefixtures("one_thread")

Plant = Callable[[pytest.MonkeyPatch], None]


def _forward(change: Callable[[Any, Any], None]) -> Plant:
    """A fault that changes the call or the results of the engine's forward pass, in place."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        right = CpuBackend.forward

        def wrong(self: CpuBackend, call: Any) -> Any:
            result = right(self, call)
            change(call, result[0])
            return result

        monkeypatch.setattr(CpuBackend, "forward", wrong)

    return plant


def _backward(change: Callable[[Any, Any], None]) -> Plant:
    """The same of the backward pass; results are the gradients of states, of x and of weights."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        right = CpuBackend.backward

        def wrong(self: CpuBackend, call: Any) -> Any:
            result = right(self, call)
            change(call, result)
            return result

        monkeypatch.setattr(CpuBackend, "backward", wrong)

    return plant


def _last_row(_: Any, out: list[torch.Tensor]) -> None:
    if out[0].shape[1] % 4 == 1:
        out[0][:, -1] *= 1.01


def _unwritten(_: Any, out: list[torch.Tensor]) -> None:
    out[-1].view(-1)[-1] = torch.empty(1)[0]


def _padding(call: Any, out: list[torch.Tensor]) -> None:
    if out[0].shape[2] % 8:
        out[0] += 0 * call.states[0].sum()


def _batch(_: Any, out: list[torch.Tensor]) -> None:
    out[0] *= 1 + 0.01 * (len(out[0]) - 1)


def _writes_the_caller(call: Any, _: list[torch.Tensor]) -> None:
    call.states[0].view(-1)[0] += 1


def _thread_order(_: Any, gradients: Any) -> None:
    if torch.get_num_threads() > 1 and gradients[2][0] is not None:
        gradients[2][0].view(-1)[0] += 1e-3


def _kept(call: Any, gradients: Any) -> None:
    if call.kept.numel() and gradients[1] is not None:
        gradients[1] *= 1.001


def _dropped(call: Any, gradients: Any) -> None:
    if gradients[1] is not None and sum(update.inject_x for update in call.problem.program.updates) > 1:
        gradients[1] *= 0.5


def _wants(call: Any, gradients: Any) -> None:
    if not all((call.needs_x, *call.needs_weights)) and gradients[0][0] is not None:
        gradients[0][0].view(-1)[0] += 1


def _stale_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_weights, "_cpu", _Constant(packed_weights._cpu))


class _Constant:
    """The extension with a fingerprint that sees nothing."""

    def __init__(self, extension: Any) -> None:
        self._extension = extension

    def __getattr__(self, name: str) -> Any:
        return (lambda *_: 1) if name == "fingerprint" else getattr(self._extension, name)


PLANTS: dict[str, tuple[str, Plant]] = {
    "a wrong last row": ("policy", _forward(_last_row)),
    "an element that nobody writes": ("policy", _forward(_unwritten)),
    "a read of another sequence": ("nan", _forward(_padding)),
    "sequences that share": ("alone", _forward(_batch)),
    "a tensor of the caller": ("untouched", _forward(_writes_the_caller)),
    "an order that depends on threads": ("threads", _backward(_thread_order)),
    "kept activations": ("recompute", _backward(_kept)),
    "a dropped addition": ("policy", _backward(_dropped)),
    "a gradient nobody asked for": ("needs", _backward(_wants)),
    "stale packs": ("packs", _stale_packs),
}


def _found(job: Job) -> tuple[list[Failure], Counts]:
    failures: list[Failure] = []
    counts = Counts()

    def report(kind: str, content: Any) -> None:
        if kind == "failure":
            failures.append(content)
        elif kind == "counts":
            counts.add(content)

    work(job, report)
    return failures, counts


def _job(**options: Any) -> Job:
    common = {"seed": 3, "until": time.time() + 100, "files": 0, "targets": ("portable",), "minimise_seconds": 0.0}
    return Job(**{**common, **options})


@needs_engine
@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_fault_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check, plant = PLANTS[name]
    plant(monkeypatch)
    found: list[Failure] = []
    for number in range(60):
        found, _ = _found(_job(start=number, most=1, checks=(check,)))
        if found:
            break
    assert [failure.kind.partition(",")[0] for failure in found[:1]] == [check]


@needs_engine
def test_the_engine_as_it_is_passes() -> None:
    failures, counts = _found(_job(most=12))
    assert failures == []
    assert counts.problems == 12
    assert counts.tally.tensors > 4 * counts.tally.unjudged


@needs_engine
def test_a_failure_is_minimised_and_printed_as_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as planted:
        _forward(_last_row)(planted)
        trials = (draw_trial(generator(3, "problem", i)) for i in range(100))
        start = next(i for i, trial in enumerate(trials) if trial.length % 4 == 1 and trial.dtype == "float32")
        failures, _ = _found(_job(start=start, most=1, minimise_seconds=600.0))
        test = next(failure.test for failure in failures if failure.test)
        names: dict[str, Any] = {"Trial": Trial, "Variant": Variant, "examine": examine}
        exec(test, names)
        case = next(value for key, value in names.items() if key.startswith("test_"))
        with pytest.raises(AssertionError):
            case()
    assert "num_layers" not in test
    assert len(test) < 400
    case()  # without the fault


def _dies(job: Job, pipe: Any) -> None:
    pipe.send(("at", (job.start, "def test_of_what_it_was_at() -> None: ...")))
    os._exit(3)


@pytest.mark.breadth
def test_a_worker_that_dies_is_a_failure_of_what_it_was_at() -> None:
    told: list[Failure] = []
    outcome = run_jobs([Job(seed=0, start=7, most=1)], told.append, serve=_dies)
    assert list(outcome.failures.values()) == told
    assert [(failure.kind, failure.number) for failure in told] == [("the process died with 3", 7)]
    assert told[0].test.startswith("def test_of_what_it_was_at")


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("form", FORMS)
def test_files_without_damage_load(form: str, tmp_path: Any) -> None:
    for model in MODELS:
        trial = FileTrial(model, form)
        path = tmp_path / ("m.safetensors" if "safetensors" in form else "m.pt")
        path.write_bytes(file_bytes(trial))
        trmfast.load(path, **trial.options)
        assert examine_file(trial) == []


def _loader(behave: Callable[[], Any]) -> Callable[..., Any]:
    def load(*_: Any, **__: Any) -> Any:
        """A loader.

        Raises:
            ValueError: always.
        """
        return behave()

    return load


def _raises(error: Exception) -> Any:
    raise error


def _for_ever() -> Any:
    while True:
        pass


@pytest.mark.parametrize(
    "behave, expected",
    [
        (
            lambda: _raises(KeyError("config")),
            "load: raises KeyError in test_fuzz.py _raises, which it does not list: 'config'",
        ),
        (lambda: _raises(ValueError("two\nlines")), "load: ValueError of 2 lines, 9 characters: two lines"),
        (_for_ever, "load: takes more than 0.2 s"),
        (lambda: torch.zeros(2**30), "load: raises RuntimeError in test_fuzz.py <lambda>, which it does not list: "),
    ],
    ids=["another error", "two lines", "for ever", "memory"],
)
def test_a_loader_that_takes_a_file_badly(
    behave: Callable[[], Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CPU_SECONDS", 0.2)
    monkeypatch.setattr(trmfast, "load", _loader(behave), raising=False)
    found = examine_file(FileTrial(edits=(("option", "colour", "word"),)))
    assert len(found) == 1
    assert found[0].startswith(expected)
