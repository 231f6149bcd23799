"""The list of updates of a program, run-length coded: a cycle that is repeated n times is kept once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, groupby, islice, repeat
from typing import TypeVar, overload

__all__ = ["Cycle", "Update", "Updates"]

T = TypeVar("T")


@dataclass(frozen=True)
class Update:
    """One application of a network: ``state[dst] <- net(sum(state[s] for s in sources) + (x if inject_x))``.

    Attributes:
        dst: index of the state that is overwritten.
        sources: indices of the states that are summed, in the order in which the plain PyTorch model adds them.
        inject_x: whether the input x is added to the sum.
        net: index of the network that is applied.
        grad: whether gradients flow through this update.  An update without them cuts the graph, as ``torch.no_grad``.
    """

    dst: int
    sources: tuple[int, ...]
    inject_x: bool
    net: int
    grad: bool


Cycle = tuple[tuple[Update, int], ...]
"""The updates of one cycle, each with its number of repetitions."""


class Updates(Sequence[Update]):
    """Updates in order of execution; immutable, hashable, and small where cycles repeat.

    Iterating costs no memory; an index costs the distinct updates of a cycle, so a loop over positions takes a tuple.
    Folding is canonical: equal lists of updates, cut into cycles of one length, are kept alike, so comparing and
    hashing look at what is kept and not at every update.

    Attributes:
        cycles: the distinct consecutive cycles, each with its number of repetitions.
    """

    __slots__ = ("_ends", "cycles")

    def __init__(self, cycles: Iterable[tuple[Cycle, int]]) -> None:
        """Folds cycles of one length.

        Args:
            cycles: cycles and how often each is repeated; equal neighbours are joined, in cycles too.
        """
        self.cycles: tuple[tuple[Cycle, int], ...] = _joined((_joined(runs), count) for runs, count in cycles)
        lengths = (sum(n for _, n in runs) * count for runs, count in self.cycles)
        self._ends = tuple(accumulate(lengths))

    @staticmethod
    def folded(updates: Sequence[Update], per_cycle: int) -> Updates:
        """A plain list, cut into cycles of ``per_cycle`` updates, which divides its length."""
        starts = range(0, len(updates), per_cycle)
        return Updates((tuple((u, 1) for u in updates[i : i + per_cycle]), 1) for i in starts)

    def are_cycles_of(self, length: int) -> bool:
        """Whether every cycle has this many updates."""
        return all(sum(n for _, n in runs) == length for runs, _ in self.cycles)

    def changed(self, change: Callable[[Update], Update]) -> Updates:
        """These updates, each changed in the same way."""
        return Updates((tuple((change(u), n) for u, n in runs), count) for runs, count in self.cycles)

    def cut(self, cycles: int) -> tuple[Updates, Updates]:
        """The updates before and after so many cycles, counted from the end."""
        front, back = list(self.cycles), []
        while cycles:
            runs, count = front.pop()
            taken = min(count, cycles)
            back.append((runs, taken))
            cycles -= taken
            if count > taken:
                front.append((runs, count - taken))
        return Updates(front), Updates(reversed(back))

    def with_last_of_each_state(self, change: Callable[[Update], Update]) -> Updates:
        """These updates, the last one of every state that is written changed."""
        seen: set[int] = set()
        back: list[tuple[Cycle, int]] = []
        for runs, count in reversed(self.cycles):
            last: list[tuple[Update, int]] = []
            before = len(seen)
            for update, n in reversed(runs):
                if update.dst in seen:
                    last.append((update, n))
                else:
                    seen.add(update.dst)
                    last += [(change(update), 1), (update, n - 1)]
            # In a repeated cycle, the last repetition holds all of the last updates.
            changed = len(seen) > before
            back += [(tuple(reversed(last)), int(changed)), (runs, count - changed)]
        return Updates(reversed(back))

    def counts(self) -> dict[Update, int]:
        """How often each distinct update occurs."""
        found: dict[Update, int] = {}
        for runs, count in self.cycles:
            for update, n in runs:
                found[update] = found.get(update, 0) + n * count
        return found

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Update]:
        for runs, count in self.cycles:
            for cycle in repeat(runs, count):
                yield from chain.from_iterable(repeat(update, n) for update, n in cycle)

    @overload
    def __getitem__(self, index: int) -> Update: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Update, ...]: ...

    def __getitem__(self, index: int | slice) -> Update | tuple[Update, ...]:
        positions = range(len(self))[index]
        if isinstance(positions, range):
            if positions.step == 1:
                return tuple(islice(self, positions.start, positions.stop))
            everything = tuple(self)
            return tuple(everything[i] for i in positions)
        segment = bisect_right(self._ends, positions)
        runs, _ = self.cycles[segment]
        lengths = tuple(accumulate(n for _, n in runs))
        start = self._ends[segment - 1] if segment else 0
        return runs[bisect_right(lengths, (positions - start) % lengths[-1])][0]

    def __eq__(self, other: object) -> bool:
        return self.cycles == other.cycles if isinstance(other, Updates) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.cycles)

    def __reduce__(self) -> tuple[type[Updates], tuple[tuple[tuple[Cycle, int], ...]]]:
        return Updates, (self.cycles,)

    def __repr__(self) -> str:
        return f"Updates({self.cycles!r})"


def _joined(items: Iterable[tuple[T, int]]) -> tuple[tuple[T, int], ...]:
    """Pairs of a value and a count, with equal neighbours added up and counts of 0 left out."""
    present = ((value, count) for value, count in items if count)
    return tuple((value, sum(n for _, n in group)) for value, group in groupby(present, key=lambda pair: pair[0]))
