"""The choice of a backend: order of preference, refusals with their reason, one warning for each reason."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from trmfast import Problem, backends, recursion
from trmfast.backends import BACKENDS, ForwardCall, select
from trmfast.backends.reference import ReferenceBackend
from trmfast.cases import make_case, make_inputs

CASE = make_case("small", H_cycles=1, L_cycles=1, length=5, hidden_size=32, num_layers=1, intermediate_size=16)
CPU = torch.device("cpu")


class Fake(ReferenceBackend):
    """A backend that gives the reasons it is told to."""

    name = "fake"
    device_types: tuple[str, ...] = ("cpu",)

    def __init__(self, unavailable: str | None = None, unsupported: str | None = None) -> None:
        self.unavailable, self.unsupported = unavailable, unsupported
        self.calls = 0

    def available(self) -> str | None:
        return self.unavailable

    def supports(self, *_: Any) -> str | None:
        return self.unsupported

    def forward(self, call: ForwardCall) -> tuple[list[Tensor], Tensor, Tensor]:
        self.calls += 1
        return super().forward(call)


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backends, "_told", set())
    select.cache_clear()
    yield
    select.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, *chosen: Any) -> None:
    monkeypatch.setattr(backends, "BACKENDS", {b.name: b for b in (*chosen, ReferenceBackend())})


def choose(name: str = "auto", problem: Problem = CASE.problem, device: torch.device = CPU) -> str:
    return select(name, problem, device, torch.float32, 2, 5).name


def test_the_first_that_takes_the_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()
    install(monkeypatch, fake)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose() == "fake"
        assert choose("reference") == "reference"
    inputs = make_inputs(CASE)
    recursion(CASE.problem.program, CASE.problem.nets, inputs.states, inputs.x, inputs.weights, inputs.cos, inputs.sin)
    assert fake.calls == 1


@pytest.mark.parametrize("reasons", [("not built", None), (None, "odd widths are not taken")])
def test_a_refusal_is_told_once(reasons: tuple[str | None, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Fake(*reasons))
    reason = reasons[0] or reasons[1]
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for length in (5, 6, 7):
            assert select("auto", CASE.problem, CPU, torch.float32, 2, length).name == "reference"
    assert [str(warning.message) for warning in record] == [f"trmfast: backend fake is not used: {reason}"]
    message = (
        f"which does not work here: {reason}; accepted are auto, reference"
        if reasons[0]
        else f"accepted are auto or a backend that takes this problem: {reason}"
    )
    with pytest.raises(ValueError, match=f"^backend: got 'fake', {message}$"):
        choose("fake")


def test_every_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Fake("first reason"))
    with pytest.warns(UserWarning, match="first reason"):
        choose()
    install(monkeypatch, Fake("second reason"))
    select.cache_clear()
    with pytest.warns(UserWarning, match="second reason"):
        choose()


def test_a_backend_of_another_device_is_passed_over_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Fake("never asked"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(device=torch.device("meta")) == "reference"


def test_what_is_not_there_is_told_before_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Fake())
    with pytest.raises(ValueError, match=r"^backend: got 'fake', .*: it runs on cpu, not on meta$"):
        choose("fake", device=torch.device("meta"))
    install(monkeypatch, Fake("not built"))
    select.cache_clear()
    with pytest.raises(ValueError, match=r"^backend: got 'fake', which does not work here: not built; accepted are"):
        choose("fake", device=torch.device("meta"))


def test_unknown_backend() -> None:
    accepted = ", ".join(["auto", *BACKENDS])
    with pytest.raises(ValueError, match=f"^backend: got 'nvidia', accepted are {accepted}$"):
        choose("nvidia")


def test_protocol_of_every_backend() -> None:
    for name, backend in BACKENDS.items():
        assert backend.name == name
        assert backend.available() is None or "\n" not in str(backend.available())
    assert list(BACKENDS)[-1] == "reference"
    assert BACKENDS["reference"].available() is None
