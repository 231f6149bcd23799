"""Converts a checkpoint (a .pt of the training scripts of TRM or HRM, safetensors, a Lightning checkpoint of nano-trm)
to safetensors with the class and the configuration of the model, which trmfast.load opens without further options."""

from __future__ import annotations

import argparse
import json
import os
import warnings
from pathlib import Path
from typing import Any

from trmfast.cli.console import UsageError, print_json, print_table

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
examples:
  trmfast convert step_65100 sudoku.safetensors --set seq_len=81      all_config.yaml lies beside the checkpoint
  trmfast convert trm.pt trm.safetensors --config arch.yaml --set H_cycles=3 L_cycles=6
  trmfast convert in.safetensors out.safetensors --set num_puzzle_identifiers=1000

Sizes, layers and mixers follow from the tensors; an error names every other key that is needed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("input", type=Path, metavar="IN", help="the checkpoint")
    parser.add_argument("output", type=Path, metavar="OUT", help="the file to write, which ends in .safetensors")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML or JSON with configuration keys")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="configuration keys, before the file's",
    )
    parser.add_argument(
        "--partial",
        action="store_true",
        help="continue despite missing and unexpected tensors; missing ones are random",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Converts; always 0."""
    from trmfast.checkpoint import read, save

    options = dict(_option(text) for text in arguments.set)
    taken = {"path", "config", "strict"} & options.keys()
    if taken:
        raise UsageError(f"--set: got {taken.pop()!r}, accepted are configuration keys")
    _check_output(arguments.input, arguments.output)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the report lists what is missing
            found = read(arguments.input, arguments.config, strict=not arguments.partial, **options)
    except (OSError, TypeError, ValueError) as error:
        raise _usage_error(error, {"path": "IN", "config": "--config"}) from error
    try:
        save(found.model, arguments.output)
    except (OSError, TypeError, ValueError) as error:
        raise _usage_error(error, {"path": "OUT"}) from error
    state = found.model.state_dict()
    model = getattr(found.model, "model", found.model)
    record: dict[str, Any] = {
        "input": os.fspath(arguments.input),
        "form": found.form,
        "output": os.fspath(arguments.output),
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in found.model.parameters()),
        "tensors": len(state),
        "config": vars(model.config),
        "told_by_the_tensors": sorted(found.told),
        "missing": found.missing,
        "unexpected": found.unexpected,
    }
    if arguments.json:
        print_json(record)
        return 0
    told = set(found.told)
    rows = [[name, str(value), "tensors" if name in told else ""] for name, value in record["config"].items()]
    title = f"{record['model']}: {record['parameters']:,} parameters, {record['tensors']} tensors; {found.form}"
    print_table(title, ("key", "value", "told by"), rows)
    for kind in ("missing", "unexpected"):
        if record[kind]:
            print(f"{kind}: {', '.join(record[kind])}")
    print(f"\n{arguments.output}")
    return 0


def _check_output(source: Path, output: Path) -> None:
    if output.suffix != ".safetensors":
        raise UsageError(f"OUT: got {output}, accepted are files that end in .safetensors")
    if source.exists() and output.exists() and output.samefile(source):
        raise UsageError(f"OUT: got {output}, accepted are other files than IN")


def _usage_error(error: Exception, names: dict[str, str]) -> UsageError:
    """The error in one line, with arguments of load and save under their names on the command line."""
    text = " ".join(str(error).split())
    argument, colon, rest = text.partition(":")
    return UsageError(names.get(argument, argument) + colon + rest)


def _option(text: str) -> tuple[str, Any]:
    """KEY=VALUE; the value is parsed as JSON if possible, otherwise kept as a string."""
    key, sign, value = text.partition("=")
    if not sign or not key.isidentifier():
        raise UsageError(f"--set: got {text!r}, accepted are KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, {"True": True, "False": False}.get(value, value)
