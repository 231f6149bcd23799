"""Solves Sudoku puzzles with a trained model, without PyTorch: on a terminal the board is drawn as the model thinks,
in a pipe each puzzle is one line of JSON."""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trmfast.cli.console import UsageError
from trmfast.data import model_names
from trmfast.solving import Confident, Result, Solver
from trmfast.solving.schedule import Row
from trmfast.solving.solver import CHOICES
from trmfast.sudoku import CELLS, Grid, conflict, grid_of, is_solved, parse, tokens
from trmfast.sudoku_puzzles import sudoku_puzzle

if TYPE_CHECKING:
    from trmfast.runtime import Model

__all__ = ["EXAMPLES", "MODEL", "add_arguments", "clues_of", "naming_options", "run", "sudoku_model", "threshold_of"]

DTYPES = {"bf16": "bfloat16", "fp32": "float32", "int8": "int8"}
VOCABULARY = 11
MODEL = "sudoku-mlp"
FEWEST_CLUES = 17  # no puzzle with fewer has one solution
CLUES = 30  # of a random puzzle, for a model that does not say what it was trained on

EXAMPLES = """\
examples:
  trmfast solve 53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79
  trmfast solve --file puzzles.txt > answers.jsonl
  trmfast solve --random 20 --clues 40
  trmfast solve --model m.safetensors --random 5 --trajectories 16 --noise 0.3

A board is a line of 81 characters, row by row: digits, with 0 or . for an empty cell.  The exit status is 1 if a puzzle
was not solved by the rules of Sudoku.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("boards", nargs="*", metavar="BOARD", help="boards; by default the lines of standard input")
    add("--file", type=Path, metavar="FILE", help="a file with one board a line")
    add("--random", type=int, metavar="N", help="N random puzzles that have one solution")
    add("--clues", type=int, metavar="N", help="clues of a random puzzle (default: as the model was trained, or 30)")
    add("--seed", type=int, default=0, metavar="N", help="seed of random puzzles and of the noise (default: 0)")
    add(
        "--model",
        default=MODEL,
        metavar="FILE",
        help=f"a file of trmfast.save or trmfast convert, or of the models that come with trmfast: "
        f"{', '.join(model_names())} (default: {MODEL})",
    )
    add("--dtype", choices=list(DTYPES), help="compute dtype (default: the model's)")
    add("--threshold", type=float, metavar="T", help="halt when the Q head's logit is above T (default: the model's)")
    add("--max-steps", type=int, metavar="N", help="most supervision steps of a puzzle (default: the model's)")
    add("--trajectories", type=int, default=1, metavar="K", help="noisy copies of each puzzle (default: 1)")
    add("--noise", type=float, default=0.0, metavar="SIGMA", help="standard deviation of the noise on the latent state")
    add("--choose", choices=CHOICES, default="first", help="which trajectory answers (default: the first to halt)")
    add("--threads", type=int, metavar="N", help="threads (default: one a core)")
    add("--batch", type=int, default=32, metavar="N", help="rows that step together in a pipe (default: 32)")


def run(arguments: argparse.Namespace) -> int:
    """Solves; 0 if all puzzles were solved, 1 otherwise."""
    watched = sys.stdout.isatty()
    solver, notes = _solver(arguments, arguments.trajectories if watched else arguments.batch)
    boards = _boards(arguments, notes)
    return (_draw if watched else _write)(solver, boards)


# ---------------------------------------------------------------- what is solved


def _boards(arguments: argparse.Namespace, notes: Mapping[str, Any]) -> Iterator[Grid]:
    """The boards, parsed one by one as they are asked for.

    Args:
        notes: of the model, which say what random puzzles it was trained on.
    """
    given = [name for name in ("boards", "file", "random") if getattr(arguments, name) not in ([], None)]
    if len(given) > 1:
        names = {"boards": "BOARD", "file": "--file", "random": "--random"}
        raise UsageError(f"{names[given[1]]}: got both {names[given[0]]} and it, accepted is one of them")
    if arguments.random is not None:
        _in_range("--random", arguments.random, 1, None)
        clues = clues_of(arguments.clues, notes)
        generator = random.Random(arguments.seed)
        return (sudoku_puzzle(generator, generator.randint(*clues))[0] for _ in range(arguments.random))
    if arguments.boards:
        return _parsed(arguments.boards, "BOARD")
    if arguments.file is not None:
        try:
            return _parsed(arguments.file.read_text().splitlines(), str(arguments.file))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"--file: got {arguments.file}, accepted are text files: {reason}") from error
    if sys.stdin.isatty():
        raise UsageError("BOARD: got none, accepted are boards, --file, --random, or lines on standard input")
    return _parsed(sys.stdin, "standard input")


def clues_of(given: int | None, notes: Mapping[str, Any]) -> tuple[int, int]:
    """The fewest and most clues of a random puzzle."""
    if given is not None:
        _in_range("--clues", given, FEWEST_CLUES, CELLS)
        return given, given
    fewest, most = notes.get("fewest_clues"), notes.get("most_clues")
    if type(fewest) is int and type(most) is int and FEWEST_CLUES <= fewest <= most <= CELLS:
        return fewest, most
    return CLUES, CLUES


def _parsed(lines: Iterable[str], source: str) -> Iterator[Grid]:
    empty = True
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        empty = False
        try:
            yield parse(line.strip())
        except ValueError as error:
            raise UsageError(f"{source}, line {number}: {error}") from error
    if empty:
        raise UsageError(f"{source}: got no board, accepted are lines of {CELLS} characters")


# ---------------------------------------------------------------- the solver


def _solver(arguments: argparse.Namespace, batch: int) -> tuple[Solver, dict[str, Any]]:
    """The solver, and the notes of its model."""
    model = sudoku_model(arguments.model, DTYPES.get(arguments.dtype), arguments.threads)
    with naming_options():
        solver = Solver(
            model,
            halt=Confident(threshold_of(arguments.threshold, model.notes)),
            max_steps=arguments.max_steps,
            batch_size=batch,
            trajectories=arguments.trajectories,
            noise=arguments.noise,
            choose=arguments.choose,
            seed=arguments.seed,
        )
    return solver, model.notes


def sudoku_model(path: str, dtype: str | None, threads: int | None) -> Model:
    """The model of a file, or of a name.

    Raises:
        UsageError: there is none that plays Sudoku.
    """
    from trmfast import runtime

    with naming_options():
        if threads is not None:
            _in_range("--threads", threads, 1, runtime.cores())
        model = runtime.load(path, dtype, threads)
        if (model.seq_len, model.vocab_size) != (CELLS, VOCABULARY):
            got = f"a model of {model.seq_len} tokens and {model.vocab_size} ids"
            raise ValueError(f"path: got {got}, accepted are those of Sudoku, of {CELLS} tokens and {VOCABULARY} ids")
    return model


def threshold_of(given: float | None, notes: Mapping[str, Any]) -> float:
    """The logit above which a row halts: the one that was asked for, the model's own, or 0."""
    trained = notes.get("threshold", 0.0)
    return given if given is not None else float(trained) if isinstance(trained, (int, float)) else 0.0


@contextmanager
def naming_options() -> Iterator[None]:
    """Errors name the option in place of the argument."""
    try:
        yield
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        argument, colon, rest = " ".join(str(error).split()).partition(":")
        names = {"path": "--model", "halt": "--model", "dtype": "--dtype", "max_steps": "--max-steps"}
        names |= {"batch_size": "--batch"} | {n: f"--{n}" for n in ("threshold", "trajectories", "noise", "seed")}
        raise UsageError(names.get(argument, argument) + colon + rest) from error


def _in_range(name: str, value: int, least: int, most: int | None) -> None:
    if value < least or (most is not None and value > most):
        accepted = f"{least} up" if most is None else f"{least} to {most}"
        raise UsageError(f"{name}: got {value}, accepted are {accepted}")


class _Watch:
    """Solves boards and knows how long each took, from its entry into the batch to its last supervision step."""

    def __init__(self, solver: Solver) -> None:
        self.solver = solver
        self.boards: dict[int, Grid] = {}
        self.began: dict[int, float] = {}
        self.ended: dict[int, float] = {}

    def solve(self, boards: Iterable[Grid], on_step: Callable[[Row], None] | None = None) -> Iterator[dict[str, Any]]:
        """A record a board."""

        def entering() -> Iterator[Any]:
            for index, board in enumerate(boards):
                self.boards[index], self.began[index] = board, time.perf_counter()
                yield tokens(board)

        def stepped(row: Row) -> None:
            self.ended[row.index] = time.perf_counter()
            if on_step is not None:
                on_step(row)

        for result in self.solver.solve(entering(), on_step=stepped):
            yield self._record(result)

    def _record(self, result: Result) -> dict[str, Any]:
        board = self.boards.pop(result.index)
        seconds = self.ended.pop(result.index) - self.began.pop(result.index)
        answer = grid_of(result.prediction)
        return {
            "puzzle": _line(board),
            "answer": _line(answer),
            "solved": is_solved(board, answer),
            "steps": result.steps,
            "halted": result.halted,
            "confidence": None if result.confidence is None else round(result.confidence, 6),
            "milliseconds": round(1000 * seconds, 3),
        }


def _line(grid: Grid) -> str:
    return "".join(str(digit) if digit else "." for digit in grid)


# ---------------------------------------------------------------- what is shown


def _write(solver: Solver, boards: Iterator[Grid]) -> int:
    """One line of JSON a puzzle."""
    solved = True
    for record in _Watch(solver).solve(boards):
        print(json.dumps(record), flush=True)
        solved = solved and record["solved"]
    return 0 if solved else 1


def _draw(solver: Solver, boards: Iterator[Grid]) -> int:
    """One board after the other, a frame a supervision step if rich is installed."""
    drawing = importlib.util.find_spec("rich") is not None
    if not drawing:
        print("boards are not drawn: `pip install rich` brings that", file=sys.stderr)
    count = solved = 0
    for board in boards:
        if drawing:
            from trmfast.cli.board import Board

            with Board(board) as picture:
                (record,) = _Watch(solver).solve([board], picture.step)
                picture.finish(parse(record["answer"], check=False), _verdict(record), record["confidence"])
        else:
            (record,) = _Watch(solver).solve([board])
            print(f"{record['answer']}  {_verdict(record)}")
        count += 1
        solved += record["solved"]
    if count > 1:
        print(f"{solved} of {count} solved")
    return 0 if solved == count else 1


def _verdict(record: dict[str, Any]) -> str:
    """Whether the rules of Sudoku are kept, and what it took."""
    effort = f"{record['steps']} step{'s' if record['steps'] > 1 else ''}, {record['milliseconds']:.0f} ms"
    if record["solved"]:
        return f"solved: {effort}"
    answer = parse(record["answer"], check=False)
    found = conflict(answer)
    reason = f"two {found}" if found else "empty cells" if 0 in answer else "a clue was changed"
    return f"not solved, {reason}: {effort}"
