"""python -m tests.fuzz: random problems and damaged files, for a time."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time

from trmfast.backends import cpu

from .checks import CHECKS
from .pool import Outcome, run_jobs
from .worker import Failure, Job

EXAMPLES = """\
examples:
  python -m tests.fuzz --seconds 60 --seed 1         60 seconds on all cores
  python -m tests.fuzz --seconds 28800               a night, with the seed of the day
  python -m tests.fuzz --seed 1 --number 4711        that problem or file alone
  python -m tests.fuzz --targets portable avx2 --files 0
"""


def main() -> int:
    """Runs the fuzzer; 1 if anything failed."""
    options = _options()
    start = time.time()
    common = Job(
        options.seed,
        until=start + options.seconds,
        problems=options.problems,
        files=options.files,
        targets=tuple(options.targets or ()),
        checks=tuple(options.checks or ()),
    )
    if options.number is not None:
        jobs = [Job(**{**vars(common), "start": options.number, "most": 1})]
    else:
        jobs = [Job(**{**vars(common), "start": i, "step": options.jobs}) for i in range(options.jobs)]
    print(f"seed {options.seed}, {options.seconds:g} s, {len(jobs)} processes", flush=True)
    outcome = run_jobs(jobs, _tell)
    _summary(outcome, time.time() - start)
    return 1 if outcome.failures else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    today = int(datetime.date.today().strftime("%Y%m%d"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--seconds", type=float, default=60, help="how long (default: 60)")
    parser.add_argument("--seed", type=int, default=today, help="of all numbers (default: the date, %(default)s)")
    parser.add_argument("--jobs", type=int, default=cores, help="processes (default: the cores, %(default)s)")
    parser.add_argument("--targets", nargs="+", help="instruction sets (default: all that run here)")
    parser.add_argument("--checks", nargs="+", choices=CHECKS, metavar="CHECK", help="of " + ", ".join(CHECKS))
    parser.add_argument("--problems", type=int, default=4, help="of so many problems and files together (default: 4)")
    parser.add_argument("--files", type=int, default=1, help="so many are damaged files (default: 1)")
    parser.add_argument("--number", type=int, help="only this problem or file of the seed")
    options = parser.parse_args()
    if options.problems < 0 or options.files < 0 or options.problems + options.files < 1 or options.jobs < 1:
        parser.error("--problems, --files, --jobs: accepted are counts, at least one of them of work")
    here = [target for target, reason in cpu.targets().items() if reason is None]
    if options.problems and not here:
        parser.error("--problems: there is no CPU engine here, accepted is 0")
    for target in options.targets or ():
        if target not in here:
            parser.error(f"--targets: got {target!r}, accepted are {', '.join(here)}")
    return options


def _tell(failure: Failure) -> None:
    print(f"\nFAILED {failure.kind}\n  {failure.text}\n{failure.test}", flush=True)


def _summary(outcome: Outcome, seconds: float) -> None:
    counts = outcome.counts
    runs = ", ".join(f"{target} {n:,}" for target, n in sorted(counts.runs.items()))
    checks = ", ".join(f"{check} {n:,}" for check, n in sorted(counts.checks.items()))
    print(f"\n{counts.problems:,} problems ({runs}), {counts.files:,} damaged files in {seconds:.0f} s")
    print(f"checks: {checks}")
    judged = counts.tally.tensors - counts.tally.unjudged
    print(f"{judged:,} tensors judged; of {counts.tally.unjudged:,} more eager PyTorch is too far off for a verdict")
    if outcome.failures:
        print(f"{sum(outcome.seen.values()):,} failures of {len(outcome.failures)} kinds:")
        for kind, n in outcome.seen.most_common():
            print(f"  {n:6,}  {kind}")


if __name__ == "__main__":
    sys.exit(main())
