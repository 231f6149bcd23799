"""The recursion as data: an immutable list of updates over a few states.

Every backend executes a :class:`RecursionProgram`; none of them knows which model it came from.  One update is

    dst <- net( sum of source states (+ x) )

and a model is a list of them (arXiv 2510.04871 for TRM, arXiv 2506.21734 for HRM).
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from trmfast.updates import Cycle, Update, Updates

__all__ = ["GradientWindow", "RecursionProgram", "Update"]

# "one_step": the last update of every state.  "last_cycle", or an integer k: the last k cycles.  "all".  "none".
GradientWindow = str | int


@dataclass(frozen=True)
class RecursionProgram:
    """A validated, hashable recursion over named states.

    Attributes:
        states: names of the states, for example ``("z_H", "z_L")``.
        nets: names of the networks, for example ``("f",)``.
        updates: the updates, in order of execution; a sequence that keeps a repeated cycle once.  Any sequence is
            accepted; the same updates and ``updates_per_cycle`` make the same program, however they were given.
        updates_per_cycle: length of one H cycle in updates; gradient windows of k cycles are counted in it.
        key: the program as one line of JSON, the form in which it crosses operator boundaries.

    Raises:
        ValueError: the updates name a state or a network that does not exist, there is no update, or a cycle does not
            divide the program.
    """

    states: tuple[str, ...]
    nets: tuple[str, ...]
    updates: Sequence[Update]
    updates_per_cycle: int
    key: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.states:
            raise ValueError("states: got none, a program needs at least one state")
        if not self.updates:
            raise ValueError("updates: got none, a program needs at least one update")
        if self.updates_per_cycle < 1 or len(self.updates) % self.updates_per_cycle:
            raise ValueError(
                f"updates_per_cycle: got {self.updates_per_cycle}, "
                f"accepted are the divisors of {len(self.updates)} updates"
            )
        if not isinstance(self.updates, Updates) or not self.updates.are_cycles_of(self.updates_per_cycle):
            object.__setattr__(self, "updates", Updates.folded(tuple(self.updates), self.updates_per_cycle))
        position = 0
        rows = []
        for runs, repeats in self._runs:
            start = position
            for update, count in runs:
                self._validate(position, update)
                position += count
            position = start + repeats * self.updates_per_cycle
            rows.append([repeats, [[n, u.dst, u.sources, int(u.inject_x), u.net, int(u.grad)] for u, n in runs]])
        key = json.dumps([self.states, self.nets, self.updates_per_cycle, rows], separators=(",", ":"))
        object.__setattr__(self, "key", key)

    @property
    def _runs(self) -> tuple[tuple[Cycle, int], ...]:
        assert isinstance(self.updates, Updates)
        return self.updates.cycles

    def _validate(self, position: int, update: Update) -> None:
        for name, index, names in (
            ("dst", update.dst, self.states),
            ("net", update.net, self.nets),
            *(("sources", s, self.states) for s in update.sources),
        ):
            if not 0 <= index < len(names):
                accepted = f"0 to {len(names) - 1} ({', '.join(names)})"
                raise ValueError(f"updates[{position}].{name}: got {index}, accepted are {accepted}")
        if not update.sources and not update.inject_x:
            raise ValueError(f"updates[{position}]: reads no state and no x, an update needs at least one of them")

    # ---------------------------------------------------------------- constructors, one per model

    @classmethod
    def trm(cls, H_cycles: int, L_cycles: int, window: GradientWindow = "last_cycle") -> RecursionProgram:
        """TRM: ``[z_L <- f(z_L + z_H + x)] * L_cycles, z_H <- f(z_H + z_L)``, H_cycles times (arXiv 2510.04871)."""
        low = Update(dst=1, sources=(1, 0), inject_x=True, net=0, grad=False)
        high = Update(dst=0, sources=(0, 1), inject_x=False, net=0, grad=False)
        return cls._cycles(("z_H", "z_L"), ("f",), ((low, _count("L_cycles", L_cycles)), (high, 1)), H_cycles, window)

    @classmethod
    def hrm(cls, H_cycles: int, L_cycles: int, window: GradientWindow = "one_step") -> RecursionProgram:
        """HRM: TRM's schedule with two networks, f_L and f_H; by default one-step gradients (arXiv 2506.21734)."""
        low = Update(dst=1, sources=(1, 0), inject_x=True, net=1, grad=False)
        high = Update(dst=0, sources=(0, 1), inject_x=False, net=0, grad=False)
        cycle = ((low, _count("L_cycles", L_cycles)), (high, 1))
        return cls._cycles(("z_H", "z_L"), ("f_H", "f_L"), cycle, H_cycles, window)

    @classmethod
    def single_z(cls, H_cycles: int, L_cycles: int, window: GradientWindow = "last_cycle") -> RecursionProgram:
        """TRM with one state: ``[z <- f(z + x)] * L_cycles, z <- f(z)``, H_cycles times."""
        low = Update(dst=0, sources=(0,), inject_x=True, net=0, grad=False)
        high = Update(dst=0, sources=(0,), inject_x=False, net=0, grad=False)
        return cls._cycles(("z",), ("f",), ((low, _count("L_cycles", L_cycles)), (high, 1)), H_cycles, window)

    @classmethod
    def hier6(cls, H_cycles: int, L_cycles: int = 6, window: GradientWindow = "last_cycle") -> RecursionProgram:
        """TRM with six low states: step k of a cycle writes ``z_Lk <- f(sum z_L + z_H + x)``; L_cycles is at most 6."""
        if _count("L_cycles", L_cycles) > 6:
            raise ValueError(f"L_cycles: got {L_cycles}, accepted are 1 to 6 for the six states of hier6")
        lows = tuple(range(1, 7))
        steps = (Update(dst=1 + k, sources=(*lows, 0), inject_x=True, net=0, grad=False) for k in range(L_cycles))
        high = Update(dst=0, sources=(0, *lows), inject_x=False, net=0, grad=False)
        names = ("z_H", *(f"z_L{k}" for k in lows))
        return cls._cycles(names, ("f",), (*((step, 1) for step in steps), (high, 1)), H_cycles, window)

    @classmethod
    def urm(cls, H_cycles: int, L_cycles: int, window: GradientWindow = "last_cycle") -> RecursionProgram:
        """URM: ``z <- f(z + x)``, L_cycles times per cycle, H_cycles cycles."""
        step = Update(dst=0, sources=(0,), inject_x=True, net=0, grad=False)
        return cls._cycles(("z",), ("f",), ((step, _count("L_cycles", L_cycles)),), H_cycles, window)

    @classmethod
    def hrm_text(cls, H_cycles: int, L_cycles: int, window: GradientWindow = "all") -> RecursionProgram:
        """HRM-Text: HRM's schedule without x, which enters as the first z_H: ``z_L <- f_L(z_L + z_H)``."""
        low = Update(dst=1, sources=(1, 0), inject_x=False, net=1, grad=False)
        high = Update(dst=0, sources=(0, 1), inject_x=False, net=0, grad=False)
        cycle = ((low, _count("L_cycles", L_cycles)), (high, 1))
        return cls._cycles(("z_H", "z_L"), ("f_H", "f_L"), cycle, H_cycles, window)

    @classmethod
    def looped(cls, steps: int, window: GradientWindow = "all") -> RecursionProgram:
        """A looped transformer, Ouro (arXiv 2510.25741): ``z_1 <- f(z_1), z_2 <- f(z_1), z_3 <- f(z_2)`` and so on.

        Every step keeps its state, which a head may read; the incoming values of all states but z_1 are not read.
        """
        updates = [Update(k, (max(k - 1, 0),), False, 0, False) for k in range(_count("steps", steps))]
        return cls(tuple(f"z_{k + 1}" for k in range(steps)), ("f",), updates, 1).with_window(window)

    @classmethod
    def _cycles(
        cls,
        states: tuple[str, ...],
        nets: tuple[str, ...],
        cycle: Cycle,
        H_cycles: int,
        window: GradientWindow,
    ) -> RecursionProgram:
        updates = Updates([(cycle, _count("H_cycles", H_cycles))])
        return cls(states, nets, updates, sum(count for _, count in cycle)).with_window(window)

    # ---------------------------------------------------------------- views

    @property
    def num_cycles(self) -> int:
        """Number of cycles, H_cycles of the published models."""
        return len(self.updates) // self.updates_per_cycle

    @property
    def grad_updates(self) -> tuple[int, ...]:
        """Positions of the updates through which gradients flow; :attr:`num_grad_updates` counts them for less."""
        return tuple(i for i, u in enumerate(self.updates) if u.grad)

    @property
    def num_grad_updates(self) -> int:
        """Number of updates through which gradients flow."""
        return sum(count for update, count in self.counts().items() if update.grad)

    @property
    def uses_x(self) -> bool:
        """Whether any update injects x."""
        return any(u.inject_x for u in self.counts())

    def counts(self) -> dict[Update, int]:
        """How often each distinct update occurs, at the cost of what is kept, not of the program's length."""
        assert isinstance(self.updates, Updates)
        return self.updates.counts()

    def with_window(self, window: GradientWindow) -> RecursionProgram:
        """The same program with another gradient window.

        Args:
            window: ``"one_step"`` (the last update of every state, as HRM), ``"last_cycle"`` (as TRM), an integer k
                (the last k cycles), ``"all"`` or ``"none"``.
        """
        assert isinstance(self.updates, Updates)
        if window == "all":
            cycles = self.num_cycles
        elif window in ("one_step", "none"):
            cycles = 0
        else:
            cycles = 1 if window == "last_cycle" else window  # type: ignore[assignment]
            if isinstance(cycles, bool) or not isinstance(cycles, int) or not 1 <= cycles <= self.num_cycles:
                raise ValueError(
                    f"window: got {reprlib.repr(window)}, accepted are 'one_step', 'last_cycle', 'all', 'none' "
                    f"or a number of cycles from 1 to {self.num_cycles}"
                )
        front, back = self.updates.cut(cycles)
        front = front.changed(lambda u: replace(u, grad=False))
        back = back.changed(lambda u: replace(u, grad=True))
        if window == "one_step":
            front = front.with_last_of_each_state(lambda u: replace(u, grad=True))
        updates = Updates((*front.cycles, *back.cycles))
        return RecursionProgram(self.states, self.nets, updates, self.updates_per_cycle)

    def with_last(self, counts: Sequence[int]) -> RecursionProgram:
        """The same program with gradients through the last ``counts[s]`` updates of every state s (HRM-Text)."""
        if len(counts) != len(self.states):
            accepted = f"one for each of {', '.join(self.states)}"
            raise ValueError(f"counts: got {len(counts)} numbers, accepted are {accepted}")
        left = list(counts)
        updates = []
        for update in reversed(tuple(self.updates)):
            updates.append(replace(update, grad=left[update.dst] > 0))
            left[update.dst] -= 1
        return RecursionProgram(self.states, self.nets, updates[::-1], self.updates_per_cycle)

    def last(self, count: int) -> RecursionProgram:
        """The last updates of the program, as one cycle; the program itself if it has no more than ``count``."""
        if count >= len(self.updates):
            return self
        return RecursionProgram(self.states, self.nets, self.updates[-count:], count)

    @staticmethod
    @lru_cache(maxsize=256)
    def from_key(key: str) -> RecursionProgram:
        """The program that :attr:`key` describes."""
        states, nets, updates_per_cycle, rows = json.loads(key)
        updates = Updates(
            (tuple((Update(d, tuple(s), bool(x), f, bool(g)), n) for n, d, s, x, f, g in runs), repeats)
            for repeats, runs in rows
        )
        return RecursionProgram(tuple(states), tuple(nets), updates, updates_per_cycle)

    def table(self) -> str:
        """The program as a table for people; equal consecutive updates, and cycles beyond eight alike, are one row."""
        rows = [("updates", "update", "gradient")]
        start = 0
        for runs, repeats in self._runs:
            shown = repeats if repeats <= 8 else 1
            for _ in range(shown):
                for update, count in runs:
                    terms = [self.states[s] for s in update.sources] + ["x"] * update.inject_x
                    text = f"{self.states[update.dst]} <- {self.nets[update.net]}({' + '.join(terms)})"
                    rows.append((_span(start, count), text, "yes" if update.grad else "no"))
                    start += count
            if repeats > shown:
                more = (repeats - shown) * self.updates_per_cycle
                rows.append((_span(start, more), f"the same cycle, {repeats - shown} times more", ""))
                start += more
        widths = [max(len(row[c]) for row in rows) for c in range(3)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def _span(start: int, count: int) -> str:
    return f"{start}" if count == 1 else f"{start}..{start + count - 1}"


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: got {value!r}, accepted are integers >= 1")
    return value
