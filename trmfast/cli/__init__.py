"""The command ``trmfast``: info, check, bench, convert and solve."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from trmfast.cli.console import UsageError
from trmfast.version import __version__

__all__ = ["main"]

# Each is a module with `add_arguments(parser)` and `run(arguments) -> exit status`, imported when its command is named.
COMMANDS: dict[str, str] = {
    "info": "what this machine and this installation can do",
    "check": "gradients, and parity of every backend that works here with the reference",
    "bench": "eager PyTorch, torch.compile and trmfast on real ARC-AGI tasks and Sudoku puzzles",
    "convert": "a checkpoint of the published training scripts as safetensors that describe themselves",
    "solve": "Sudoku puzzles with a trained model, without PyTorch",
}

EXAMPLES = """\
examples:
  trmfast info                      processor, instruction sets, backends and why one is off
  trmfast check                     exit status 1 if any result is outside the tolerance policy
  trmfast bench                     the published configurations, under five minutes on two cores
  trmfast convert step_65100 sudoku.safetensors --config all_config.yaml --set seq_len=81
  trmfast solve --model sudoku.safetensors --random 20
  trmfast bench --help              the options of a command
"""


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line and shows its examples as they are written."""

    def __init__(self, **options: object) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: the command line without the program's name, by default that of the process.

    Returns:
        The exit status: 0 if all went well, 1 if a check failed; bad options exit with 2.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog="trmfast", description="Recursive reasoning models as one fused operation.", epilog=EXAMPLES)
    parser.add_argument("--version", action="version", version=f"trmfast {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    named = next((word for word in words if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        module = import_module(f"trmfast.cli.{name}") if name == named else None
        command = commands.add_parser(name, help=summary, description=module.__doc__ if module else None)
        if module is not None:
            command.epilog = module.EXAMPLES
            module.add_arguments(command)
            command.set_defaults(run=module.run, parser=command)
    chosen = parser.parse_args(words)
    chosen_parser: Parser = chosen.parser
    try:
        _check_forced_target()
        status = int(chosen.run(chosen))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader of a pipe has left (`trmfast info | head`); discard what Python would flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except UsageError as error:
        chosen_parser.error(str(error))
    except KeyboardInterrupt:
        print(f"{chosen_parser.prog}: interrupted", file=sys.stderr)
        return 130


def _check_forced_target() -> None:
    """Refuses a TRMFAST_CPU_ISA that this machine cannot run, before any command starts."""
    from trmfast.targets import extension, target_of

    if extension is not None:
        try:
            target_of("f32")
        except ValueError as error:
            raise UsageError(str(error)) from error
