"""Makes a failing trial simpler for as long as it fails.

Not hypothesis, whose engine shrinks well: it ends at the first failures of a test, its searches are bound by examples
and not by time, and number i of a seed depends on what ran before.  Moving the fields of a trial towards their defaults
is enough for a problem that is a dozen numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import TypeVar

from .trial import Program, Trial, make_program
from .variant import Variant

__all__ = ["minimise"]

T = TypeVar("T", Trial, Variant)


def minimise(
    trial: Trial, variant: Variant, fails: Callable[[Trial, Variant], bool], seconds: float
) -> tuple[Trial, Variant]:
    """The simplest trial and variant that were found in the time; ``fails`` is true of them."""
    until = time.monotonic() + seconds
    found = True
    while found:
        found = False
        for simpler_trial, simpler_variant in _simpler(trial, variant):
            if time.monotonic() > until:
                return trial, variant
            try:
                simpler_trial.case  # noqa: B018 (raises)
            except ValueError:
                continue
            if fails(simpler_trial, simpler_variant):
                trial, variant, found = simpler_trial, simpler_variant, True
                break
    return trial, variant


def _simpler(trial: Trial, variant: Variant) -> Iterator[tuple[Trial, Variant]]:
    for program in _programs(trial.program):
        yield replace(trial, program=program), variant
    for changed in _fields(variant):
        yield trial, changed
    for simpler in _fields(trial):
        yield simpler, variant


def _fields(plain: T) -> Iterator[T]:
    """One field at its default, or a smaller number, or a shorter tuple: an order without a way back."""
    for field in fields(plain):
        value, default = getattr(plain, field.name), field.default
        if field.name == "program" or value == default:
            continue
        yield replace(plain, **{field.name: default})  # type: ignore[arg-type]
        if type(value) is int and value > 1 and field.name != "seed":
            for smaller in dict.fromkeys((1, value // 2, value - 1)):
                yield replace(plain, **{field.name: smaller})  # type: ignore[arg-type]
        if isinstance(value, tuple):
            for i in range(len(value)):
                yield replace(plain, **{field.name: value[:i] + value[i + 1 :]})  # type: ignore[arg-type]


def _programs(program: Program) -> Iterator[Program]:
    """Fewer cycles; the updates in place of a constructor; fewer states, updates, sources and injections."""
    if isinstance(program[0], str):
        name, H_cycles, L_cycles, window = program
        if program != ("urm", 1, 1, "all"):
            yield ("urm", 1, 1, "all")
        for fewer in ((name, H_cycles - 1, L_cycles, window), (name, H_cycles, L_cycles - 1, window)):
            if min(fewer[1:3]) >= 1:
                yield fewer
        if window != "all":
            yield (name, H_cycles, L_cycles, "all")
        updates = make_program(program).updates
        if name != "urm" and len(updates) < 20:
            yield tuple((u.dst, u.sources, u.inject_x, u.net, u.grad) for u in updates)
        return
    yield ("urm", 1, 1, "all")
    used = sorted({state for dst, sources, *_ in program for state in (dst, *sources)})
    if used != list(range(len(used))):
        yield tuple((used.index(dst), tuple(map(used.index, sources)), *rest) for dst, sources, *rest in program)
    for i, (dst, sources, inject, net, grad) in enumerate(program):
        if len(program) > 1:
            yield program[:i] + program[i + 1 :]
        for j in range(len(sources)):
            if len(sources) > 1 or inject:
                yield (*program[:i], (dst, sources[:j] + sources[j + 1 :], inject, net, grad), *program[i + 1 :])
        if inject and sources:
            yield (*program[:i], (dst, sources, False, net, grad), *program[i + 1 :])
        if net:
            yield (*program[:i], (dst, sources, inject, 0, grad), *program[i + 1 :])
