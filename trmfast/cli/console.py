"""Output of the commands: tables, and a progress bar on terminals if rich is installed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

__all__ = ["Progress", "UsageError", "print_json", "print_table", "progress", "table_text"]


class UsageError(Exception):
    """A request that cannot be met; the message is one line that names the option."""


def print_json(record: object) -> None:
    """Prints a record as the only thing on standard output."""
    print(json.dumps(record, indent=1))


def table_text(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in plain text; a column is aligned to the right if all its cells start with a digit or a sign."""
    widths = [max(len(line[c]) for line in (columns, *rows)) for c in range(len(columns))]
    right = [bool(rows) and all(row[c][:1] in "0123456789-+." for row in rows if row[c]) for c in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = (cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(cells, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([line(columns), "  ".join("-" * w for w in widths), *(line(row) for row in rows)])


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[int] = ()) -> None:
    """Prints a table on standard output.

    Args:
        title: the line above it.
        columns: the headings.
        rows: the cells.
        marked: indices of rows to set off, in colour on a terminal.
    """
    lines = table_text(columns, rows).splitlines()
    if sys.stdout.isatty():
        lines[0] = f"\033[1m{lines[0]}\033[0m"
        for index in marked:
            lines[index + 2] = f"\033[31m{lines[index + 2]}\033[0m"
    print(f"\n{title}", *lines, sep="\n")


class Progress:
    """A bar on standard error, or nothing.

    Attributes:
        bar: rich's progress display, or None.
    """

    def __init__(self, bar: Any, total: int) -> None:
        self.bar = bar
        self.task = None if bar is None else bar.add_task("", total=total)

    def step(self, text: str, advance: int = 1) -> None:
        """Shows the current task and advances the bar by ``advance`` steps."""
        if self.bar is not None:
            self.bar.update(self.task, advance=advance, description=text)


@contextmanager
def progress(total: int) -> Iterator[Progress]:
    """A bar of ``total`` steps if standard error is a terminal and rich is installed."""
    if not sys.stderr.isatty():
        yield Progress(None, total)
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar
    except ModuleNotFoundError:
        print("no progress bar: `pip install rich` adds one", file=sys.stderr)
        yield Progress(None, total)
        return
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        yield Progress(bar, total)
