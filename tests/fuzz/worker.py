"""The worker process: examines trials and files until the time is up, minimises failures, reports."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .checks import Tally
from .damage import FileTrial, draw_file
from .draw import draw_checks, draw_trial, draw_variant, generator
from .files import examine_file
from .judge import Finding, examine
from .minimise import minimise
from .trial import Trial
from .variant import Variant

__all__ = ["Counts", "Failure", "Job", "work"]


@dataclass(frozen=True)
class Job:
    """What one worker does.

    Attributes:
        seed: of all numbers.
        start, step: it takes the numbers start, start + step, ...
        until: the end, by ``time.time()``.
        problems, files: the ratio of problems to files.
        targets: instruction sets; all that run here if empty.
        checks: these alone; the policy and two others in turn if empty.
        most: the most numbers it takes, None for as many as the time allows.
        minimise_seconds: how long a failure may be made simpler; the time goes on beyond the end for it.
    """

    seed: int
    start: int = 0
    step: int = 1
    until: float = 0.0
    problems: int = 4
    files: int = 1
    targets: tuple[str, ...] = ()
    checks: tuple[str, ...] = ()
    most: int | None = None
    minimise_seconds: float = 15.0


@dataclass
class Counts:
    """The counts of work done.

    Attributes:
        problems: distinct trials.
        runs: of them, by target.
        checks: by name.
        files: damaged files.
        tally: tensors compared.
    """

    problems: int = 0
    runs: Counter[str] = field(default_factory=Counter)
    checks: Counter[str] = field(default_factory=Counter)
    files: int = 0
    tally: Tally = field(default_factory=Tally)

    def add(self, other: Counts) -> None:
        """Adds what another worker did."""
        self.problems += other.problems
        self.runs += other.runs
        self.checks += other.checks
        self.files += other.files
        self.tally.tensors += other.tally.tensors
        self.tally.unjudged += other.tally.unjudged


@dataclass(frozen=True)
class Failure:
    """One failure.

    Attributes:
        kind: what failures of one cause have in common; only the first of a kind is minimised.
        number: of the trial or file, under the seed.
        text: what is wrong, in words.
        test: a test case, or "" where it was not minimised.
    """

    kind: str
    number: int
    text: str
    test: str = ""


Report = Callable[[str, Any], None]


def work(job: Job, report: Report) -> None:
    """Examines numbers in turn; reports ``("at", description)`` before each, every ``Failure``, and ``Counts``."""
    torch.set_num_threads(1)
    told: set[str] = set()
    number, done = job.start, 0
    while time.time() < job.until and (job.most is None or done < job.most):
        counts = Counts()
        share = job.files / (job.problems + job.files)
        if generator(job.seed, "kind", number).random() >= share:
            _problem(job, number, counts, told, report)
        else:
            _file(job, number, counts, told, report)
        report("counts", counts)
        number, done = number + job.step, done + 1


# ---------------------------------------------------------------- problems


def _problem(job: Job, number: int, counts: Counts, told: set[str], report: Report) -> None:
    rng = generator(job.seed, "problem", number)
    trial = draw_trial(rng)
    variant = draw_variant(rng, trial, list(job.targets))
    if variant is None:
        return
    counts.problems = 1
    checks = list(job.checks) or draw_checks(rng)
    report("at", (number, _test(job.seed, number, trial, variant, checks)))
    counts.runs[variant.target] += 1
    counts.checks.update(checks)
    for finding in examine(trial, variant, checks, counts.tally):
        report("failure", _failure(job, number, trial, variant, finding, told))


def _failure(job: Job, number: int, trial: Trial, variant: Variant, finding: Finding, told: set[str]) -> Failure:
    kind = _kind(trial, finding)
    if kind in told:
        return Failure(kind, number, str(finding))
    told.add(kind)

    def fails(simpler: Trial, simpler_variant: Variant) -> bool:
        return any(_kind(simpler, found) == kind for found in examine(simpler, simpler_variant, [finding.check]))

    trial, variant = minimise(trial, variant, fails, job.minimise_seconds)
    left = examine(trial, variant, [finding.check])
    return Failure(kind, number, str((left or [finding])[0]), _test(job.seed, number, trial, variant, [finding.check]))


def _kind(trial: Trial, finding: Finding) -> str:
    """The check, the dtype, the token mixer, and the kind of the first tensor that is wrong."""
    name, _, rest = finding.wrong[0].partition(": ")
    group = "weights" if "." in name else "states and x" if name.startswith("grad") else "outputs"
    if name.startswith("raised "):
        group = f"{name}: {re.sub(r'[^a-zA-Z ].*', '', rest)}"
    elif "not finite" in rest:
        group += ", not finite"
    return f"{finding.check}, {group}, {trial.dtype}, {trial.token_mixer}"


def _test(seed: int, number: int, trial: Trial, variant: Variant, checks: list[str]) -> str:
    return (
        f"def test_problem_{number}_of_seed_{seed}() -> None:\n"
        f"    trial = {trial!r}\n"
        f"    assert examine(trial, {variant!r}, {checks!r}) == []\n"
    )


# ---------------------------------------------------------------- files


def _file(job: Job, number: int, counts: Counts, told: set[str], report: Report) -> None:
    trial = draw_file(generator(job.seed, "file", number))
    counts.files = 1
    report("at", (number, _file_test(job.seed, number, trial)))
    wrong = examine_file(trial)
    for text in wrong:
        kind = _file_kind(text)
        if kind in told:
            report("failure", Failure(kind, number, text))
            continue
        told.add(kind)
        smaller = _fewer_edits(trial, kind)
        report("failure", Failure(kind, number, text, _file_test(job.seed, number, smaller)))


def _fewer_edits(trial: FileTrial, kind: str) -> FileTrial:
    for i in reversed(range(len(trial.edits))):
        smaller = replace(trial, edits=trial.edits[:i] + trial.edits[i + 1 :])
        if any(_file_kind(text) == kind for text in examine_file(smaller)):
            trial = smaller
    return trial


def _file_kind(text: str) -> str:
    """The function, the error and where it was raised, without what came."""
    raised = re.match(r"\w+: raises \w+ in \S+ [^\s:,]+", text)
    return raised[0] if raised else re.sub(r" (?=\d).*", "", text)


def _file_test(seed: int, number: int, trial: FileTrial) -> str:
    return f"def test_file_{number}_of_seed_{seed}() -> None:\n    assert examine_file({trial!r}) == []\n"
