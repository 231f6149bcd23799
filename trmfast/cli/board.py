"""A Sudoku board on a terminal, frame by frame as a model thinks.  Needs rich."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from trmfast.solving.schedule import Row
from trmfast.sudoku import Grid, grid_of

__all__ = ["Board", "frame"]

BAR = 24


def frame(puzzle: Grid, answer: Grid, before: Grid | None, status: str, confidence: float | None) -> Text:
    """One picture: clues bold, cells that changed since the frame before marked, a bar of confidence below.

    Args:
        puzzle: the clues.
        answer: the digits of this frame, 0 for none.
        before: those of the frame before; None for the first.
        status: what stands beside the bar.
        confidence: 0 to 1; None without a bar.
    """
    text = Text()
    for r in range(9):
        if r in (3, 6):
            text.append("------+-------+------\n", style="dim")
        for c in range(9):
            cell = 9 * r + c
            if c in (3, 6):
                text.append("| ", style="dim")
            digit = str(answer[cell] or puzzle[cell] or ".")
            if puzzle[cell]:
                # A model may overwrite a clue: show the error.
                style = "bold" if answer[cell] in (0, puzzle[cell]) else "bold red"
            elif before is not None and before[cell] != answer[cell]:
                style = "black on yellow"
            else:
                style = "cyan"
            text.append(digit, style=style)
            text.append("\n" if c == 8 else " ")
    if confidence is not None:
        full = round(BAR * confidence)
        text.append("█" * full, style="green").append("░" * (BAR - full), style="dim").append(f" {confidence:4.0%}  ")
    return text.append(status)


class Board:
    """Draws a puzzle after every supervision step; of several trajectories the one that is most confident."""

    def __init__(self, puzzle: Grid, console: Console | None = None) -> None:
        self.puzzle = puzzle
        self.best = (0, 0.0)
        self.before: Grid | None = None
        self.now: Grid = list(puzzle)
        # Nothing is drawn between two steps, so that every step is one frame.
        self.live = Live(frame(puzzle, puzzle, None, "", None), console=console, auto_refresh=False)

    def __enter__(self) -> Board:
        self.live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def step(self, row: Row) -> None:
        """Draws a row after its step, unless a better one has drawn the same step."""
        rank = (row.steps, row.q_halt if row.q_halt is not None else 0.0)
        if rank < self.best:
            return
        if rank[0] > self.best[0]:
            self.before = self.now
        self.best, self.now = rank, grid_of(row.prediction)
        self._draw(f"step {row.steps}", row.confidence)

    def finish(self, answer: Grid, status: str, confidence: float | None) -> None:
        """Draws the answer, which stays on the terminal."""
        self.before, self.now = None, answer
        self._draw(status, confidence)

    def _draw(self, status: str, confidence: float | None) -> None:
        self.live.update(frame(self.puzzle, self.now, self.before, status, confidence), refresh=True)
