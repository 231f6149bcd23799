"""The recognised recursive models, as data: the names of their parts and the program of their loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from trmfast.program import RecursionProgram

__all__ = ["FAMILIES", "Family", "program_of"]


@dataclass(frozen=True)
class Family:
    """The names in a model's inner module, the one that holds embeddings, networks and heads.

    Attributes:
        program: the program for the values of ``cycles``.
        nets: attributes of the networks, in the order of the program's nets; ``"layers"`` is a bare list of blocks.
        states: fields of the carry, in the order of the program's states; the heads read the first.
        inits: the inner module's own buffers, the initial states.
        cycles: attributes of the settings that the loop reads at every call.
        method: the method that runs one supervision step.
        settings: attribute that holds the settings.
        rope: attribute of the rotary embedding, if the model has one.
        inputs: key of the tokens in a batch.
        q_continue: whether the step returns ``(q_halt, q_continue)``, or ``q_halt`` alone.
    """

    program: Callable[..., RecursionProgram]
    nets: tuple[str, ...]
    states: tuple[str, ...]
    inits: tuple[str, ...]
    cycles: tuple[str, ...] = ("H_cycles", "L_cycles")
    method: str = "forward"
    settings: str = "config"
    rope: str = "rotary_emb"
    inputs: str = "inputs"
    q_continue: bool = True


def _single_pass() -> RecursionProgram:
    return RecursionProgram.urm(1, 1)


_LOWS = tuple(range(1, 7))

FAMILIES: dict[str, Family] = {
    "TRM": Family(RecursionProgram.trm, ("L_level",), ("z_H", "z_L"), ("H_init", "L_init")),
    "single-z TRM": Family(RecursionProgram.single_z, ("L_level",), ("z_L",), ("L_init",)),
    "hier6 TRM": Family(
        RecursionProgram.hier6,
        ("L_level",),
        ("z_H", *(f"z_L{k}" for k in _LOWS)),
        ("H_init", *(f"L{k}_init" for k in _LOWS)),
    ),
    "HRM": Family(RecursionProgram.hrm, ("H_level", "L_level"), ("z_H", "z_L"), ("H_init", "L_init")),
    "transformer baseline": Family(_single_pass, ("H_level",), ("z_H",), ("H_init",), cycles=()),
    "URM": Family(RecursionProgram.urm, ("layers",), ("current_hidden",), ("init_hidden",)),
    "nano-trm": Family(
        RecursionProgram.trm,
        ("lenet",),
        ("z_H", "z_L"),
        ("z_H_init", "z_L_init"),
        method="inner_forward",
        settings="hparams",
        rope="pos_embedding",
        inputs="input",
        q_continue=False,
    ),
}
"""Every family by the name that people use for it."""


@lru_cache(maxsize=256)
def program_of(name: str, *cycles: int) -> RecursionProgram:
    """The program of a family at the given cycles."""
    return FAMILIES[name].program(*cycles)
