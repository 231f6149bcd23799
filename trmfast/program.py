"""The recursion as data: an immutable list of updates over a few states.

Every backend executes a :class:`RecursionProgram`; none of them knows which model it came from.  One update is

    dst <- net( sum of source states (+ x) )

and a model is a list of them (arXiv 2510.04871 for TRM, arXiv 2506.21734 for HRM).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import lru_cache

__all__ = ["GradientWindow", "RecursionProgram", "Update"]

# "one_step": the last update of every state.  "last_cycle", or an integer k: the last k cycles.  "all".  "none".
GradientWindow = str | int


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


@dataclass(frozen=True)
class RecursionProgram:
    """A validated, hashable recursion over named states.

    Attributes:
        states: names of the states, for example ``("z_H", "z_L")``.
        nets: names of the networks, for example ``("f",)``.
        updates: the updates, in order of execution.
        updates_per_cycle: length of one H cycle in updates; gradient windows of k cycles are counted in it.
        key: the program as one line of JSON, the form in which it crosses operator boundaries.

    Raises:
        ValueError: the updates name a state or a network that does not exist, there is no update, or a cycle does not
            divide the program.
    """

    states: tuple[str, ...]
    nets: tuple[str, ...]
    updates: tuple[Update, ...]
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
        for position, update in enumerate(self.updates):
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
        rows = [[u.dst, list(u.sources), int(u.inject_x), u.net, int(u.grad)] for u in self.updates]
        key = json.dumps([self.states, self.nets, self.updates_per_cycle, rows], separators=(",", ":"))
        object.__setattr__(self, "key", key)

    # ---------------------------------------------------------------- constructors, one a model

    @classmethod
    def trm(cls, H_cycles: int, L_cycles: int, window: GradientWindow = "last_cycle") -> RecursionProgram:
        """TRM: ``[z_L <- f(z_L + z_H + x)] * L_cycles, z_H <- f(z_H + z_L)``, H_cycles times (arXiv 2510.04871)."""
        low = Update(dst=1, sources=(1, 0), inject_x=True, net=0, grad=False)
        high = Update(dst=0, sources=(0, 1), inject_x=False, net=0, grad=False)
        return cls._cycles(("z_H", "z_L"), ("f",), (low,) * _count("L_cycles", L_cycles) + (high,), H_cycles, window)

    @classmethod
    def hrm(cls, H_cycles: int, L_cycles: int, window: GradientWindow = "one_step") -> RecursionProgram:
        """HRM: TRM's schedule with two networks, f_L and f_H; by default one-step gradients (arXiv 2506.21734)."""
        low = Update(dst=1, sources=(1, 0), inject_x=True, net=1, grad=False)
        high = Update(dst=0, sources=(0, 1), inject_x=False, net=0, grad=False)
        cycle = (low,) * _count("L_cycles", L_cycles) + (high,)
        return cls._cycles(("z_H", "z_L"), ("f_H", "f_L"), cycle, H_cycles, window)

    @classmethod
    def single_z(cls, H_cycles: int, L_cycles: int, window: GradientWindow = "last_cycle") -> RecursionProgram:
        """TRM with one state: ``[z <- f(z + x)] * L_cycles, z <- f(z)``, H_cycles times."""
        low = Update(dst=0, sources=(0,), inject_x=True, net=0, grad=False)
        high = Update(dst=0, sources=(0,), inject_x=False, net=0, grad=False)
        return cls._cycles(("z",), ("f",), (low,) * _count("L_cycles", L_cycles) + (high,), H_cycles, window)

    @classmethod
    def hier6(cls, H_cycles: int, L_cycles: int = 6, window: GradientWindow = "last_cycle") -> RecursionProgram:
        """TRM with six low states: step k of a cycle writes ``z_Lk <- f(sum z_L + z_H + x)``; L_cycles is at most 6."""
        if _count("L_cycles", L_cycles) > 6:
            raise ValueError(f"L_cycles: got {L_cycles}, accepted are 1 to 6 for the six states of hier6")
        lows = tuple(range(1, 7))
        cycle = tuple(Update(dst=1 + k, sources=(*lows, 0), inject_x=True, net=0, grad=False) for k in range(L_cycles))
        high = Update(dst=0, sources=(0, *lows), inject_x=False, net=0, grad=False)
        names = ("z_H", *(f"z_L{k}" for k in lows))
        return cls._cycles(names, ("f",), (*cycle, high), H_cycles, window)

    @classmethod
    def urm(cls, H_cycles: int, L_cycles: int, window: GradientWindow = "last_cycle") -> RecursionProgram:
        """URM: ``z <- f(z + x)``, L_cycles times a cycle, H_cycles cycles."""
        step = Update(dst=0, sources=(0,), inject_x=True, net=0, grad=False)
        return cls._cycles(("z",), ("f",), (step,) * _count("L_cycles", L_cycles), H_cycles, window)

    @classmethod
    def _cycles(
        cls,
        states: tuple[str, ...],
        nets: tuple[str, ...],
        cycle: tuple[Update, ...],
        H_cycles: int,
        window: GradientWindow,
    ) -> RecursionProgram:
        return cls(states, nets, cycle * _count("H_cycles", H_cycles), len(cycle)).with_window(window)

    # ---------------------------------------------------------------- views

    @property
    def num_cycles(self) -> int:
        """Number of cycles, H_cycles of the published models."""
        return len(self.updates) // self.updates_per_cycle

    @property
    def grad_updates(self) -> tuple[int, ...]:
        """Positions of the updates through which gradients flow."""
        return tuple(i for i, u in enumerate(self.updates) if u.grad)

    @property
    def uses_x(self) -> bool:
        """Whether any update injects x."""
        return any(u.inject_x for u in self.updates)

    def with_window(self, window: GradientWindow) -> RecursionProgram:
        """The same program with another gradient window.

        Args:
            window: ``"one_step"`` (the last update of every state, as HRM), ``"last_cycle"`` (as TRM), an integer k
                (the last k cycles), ``"all"`` or ``"none"``.
        """
        last = len(self.updates)
        if window == "one_step":
            last_of = {update.dst: i for i, update in enumerate(self.updates)}
            inside = set(last_of.values())
        elif window == "all":
            inside = set(range(last))
        elif window == "none":
            inside = set()
        else:
            cycles = 1 if window == "last_cycle" else window
            if isinstance(cycles, bool) or not isinstance(cycles, int) or not 1 <= cycles <= self.num_cycles:
                raise ValueError(
                    f"window: got {window!r}, accepted are 'one_step', 'last_cycle', 'all', 'none' "
                    f"or a number of cycles from 1 to {self.num_cycles}"
                )
            inside = set(range(last - cycles * self.updates_per_cycle, last))
        updates = tuple(replace(u, grad=i in inside) for i, u in enumerate(self.updates))
        return RecursionProgram(self.states, self.nets, updates, self.updates_per_cycle)

    @staticmethod
    @lru_cache(maxsize=256)
    def from_key(key: str) -> RecursionProgram:
        """The program that :attr:`key` describes."""
        states, nets, updates_per_cycle, rows = json.loads(key)
        updates = tuple(Update(d, tuple(s), bool(x), n, bool(g)) for d, s, x, n, g in rows)
        return RecursionProgram(tuple(states), tuple(nets), updates, updates_per_cycle)

    def table(self) -> str:
        """The program as a table for people, equal consecutive updates folded into one row."""
        rows = [("updates", "update", "gradient")]
        start = 0
        for i, update in enumerate(self.updates):
            if i + 1 < len(self.updates) and self.updates[i + 1] == update and (i + 1) % self.updates_per_cycle:
                continue
            terms = [self.states[s] for s in update.sources] + ["x"] * update.inject_x
            text = f"{self.states[update.dst]} <- {self.nets[update.net]}({' + '.join(terms)})"
            rows.append((f"{start}" if start == i else f"{start}..{i}", text, "yes" if update.grad else "no"))
            start = i + 1
        widths = [max(len(row[c]) for row in rows) for c in range(3)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: got {value!r}, accepted are integers from 1 up")
    return value
