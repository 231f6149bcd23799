"""Programs: the schedules of the published models, gradient windows, validation and the forms a program is kept in."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest

from trmfast import RecursionProgram, Update

ALL = [
    RecursionProgram.trm(3, 6),
    RecursionProgram.hrm(2, 2),
    RecursionProgram.single_z(2, 3),
    RecursionProgram.hier6(2),
    RecursionProgram.urm(2, 6),
]


def steps(program: RecursionProgram) -> list[str]:
    """Each update as text, for example ``z_L=f(z_L+z_H+x)``."""
    lines = []
    for update in program.updates:
        terms = [program.states[s] for s in update.sources] + ["x"] * update.inject_x
        lines.append(f"{program.states[update.dst]}={program.nets[update.net]}({'+'.join(terms)})")
    return lines


def test_trm() -> None:
    assert steps(RecursionProgram.trm(3, 2)) == ["z_L=f(z_L+z_H+x)", "z_L=f(z_L+z_H+x)", "z_H=f(z_H+z_L)"] * 3


def test_hrm() -> None:
    assert steps(RecursionProgram.hrm(2, 2)) == ["z_L=f_L(z_L+z_H+x)", "z_L=f_L(z_L+z_H+x)", "z_H=f_H(z_H+z_L)"] * 2


def test_single_z() -> None:
    assert steps(RecursionProgram.single_z(2, 2)) == ["z=f(z+x)", "z=f(z+x)", "z=f(z)"] * 2


def test_hier6() -> None:
    lows = "z_L1+z_L2+z_L3+z_L4+z_L5+z_L6"
    cycle = [f"z_L{k}=f({lows}+z_H+x)" for k in range(1, 5)] + [f"z_H=f(z_H+{lows})"]
    assert steps(RecursionProgram.hier6(2, 4)) == cycle * 2


def test_urm() -> None:
    assert steps(RecursionProgram.urm(2, 3)) == ["z=f(z+x)"] * 6


@pytest.mark.parametrize(
    "window,expected",
    [
        ("none", ()),
        ("one_step", (7, 8)),
        ("last_cycle", (6, 7, 8)),
        (1, (6, 7, 8)),
        (2, (3, 4, 5, 6, 7, 8)),
        (3, tuple(range(9))),
        ("all", tuple(range(9))),
    ],
)
def test_windows(window: str | int, expected: tuple[int, ...]) -> None:
    assert RecursionProgram.trm(3, 2, window).grad_updates == expected
    assert RecursionProgram.trm(3, 2).with_window(window).grad_updates == expected


@pytest.mark.parametrize("program", ALL, ids=lambda program: program.nets[0])
def test_last_updates(program: RecursionProgram) -> None:
    count = len(program.updates)
    assert program.last(count) is program
    assert steps(program.last(2)) == steps(program)[-2:]
    assert program.last(2).num_cycles == 1


def test_default_windows_are_the_published_ones() -> None:
    assert RecursionProgram.trm(3, 6).grad_updates == tuple(range(14, 21))
    assert RecursionProgram.hrm(2, 2).grad_updates == (4, 5)


@pytest.mark.parametrize("window", [0, 4, -1, True, "last", 1.0])
def test_bad_window(window: object) -> None:
    with pytest.raises(ValueError, match=r"^window: got .*, accepted are .* from 1 to 3$"):
        RecursionProgram.trm(3, 2, window)  # type: ignore[arg-type]


@pytest.mark.parametrize("program", ALL, ids=lambda p: f"{p.states[0]}-{len(p.updates)}")
def test_key_copy_and_pickle(program: RecursionProgram) -> None:
    for other in (
        RecursionProgram.from_key(program.key),
        copy.deepcopy(program),
        pickle.loads(pickle.dumps(program)),
    ):
        assert other == program
        assert hash(other) == hash(program)
        assert other.key == program.key
    assert "\n" not in program.key


def test_programs_that_differ_are_unequal() -> None:
    assert len({*ALL, RecursionProgram.trm(3, 5), RecursionProgram.trm(3, 6, "all")}) == len(ALL) + 2


@pytest.mark.parametrize("window", ["none", "one_step", "last_cycle", 2, "all"])
def test_folded_and_listed_programs_are_one(window: str | int) -> None:
    for make in (RecursionProgram.trm, RecursionProgram.hrm, RecursionProgram.hier6, RecursionProgram.urm):
        program = make(4, 3, window)
        updates = list(program.updates)
        listed = RecursionProgram(program.states, program.nets, updates, program.updates_per_cycle)
        assert (listed, hash(listed), listed.key) == (program, hash(program), program.key)
        whole = RecursionProgram(program.states, program.nets, program.updates, len(updates))
        assert whole == RecursionProgram(program.states, program.nets, updates, len(updates))
        for form in (program, whole):
            assert [form.updates[i] for i in range(-len(updates), len(updates))] == updates * 2
            assert list(reversed(form.updates)) == updates[::-1]
            for part in (slice(3, -2), slice(-2, None), slice(None, None, -3), slice(9, 3)):
                assert form.updates[part] == tuple(updates[part])
            assert form.num_grad_updates == len(form.grad_updates)
            assert form.counts() == {update: updates.count(update) for update in updates}
            with pytest.raises(IndexError):
                form.updates[len(updates)]


@pytest.mark.parametrize("window", ["none", "one_step", "last_cycle", 7, "all"])
@pytest.mark.parametrize("cycles", [(10**6, 6), (2, 10**6), (10**9, 10**6)])
def test_a_long_program_costs_what_a_short_one_does(cycles: tuple[int, int], window: str | int) -> None:
    if window == 7 and cycles[0] < 7:
        window = 2
    program = RecursionProgram.trm(*cycles, window)
    other = RecursionProgram.from_key(program.key)
    assert (other, hash(other)) == (program, hash(program))
    assert len(program.updates) == cycles[0] * (cycles[1] + 1)
    assert len(program.key) < 300
    assert len(str(program).splitlines()) < 30
    assert program.uses_x
    cycle = cycles[1] + 1
    counted = window * cycle if isinstance(window, int) else 0
    expected = {"none": 0, "one_step": 2, "last_cycle": cycle, "all": len(program.updates)}
    assert program.num_grad_updates == expected.get(str(window), counted)


def test_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ALL[0].states = ("z",)  # type: ignore[misc]


def test_table() -> None:
    lines = str(RecursionProgram.trm(2, 3)).splitlines()
    assert [line.split() for line in lines[2:]] == [
        ["0..2", "z_L", "<-", "f(z_L", "+", "z_H", "+", "x)", "no"],
        ["3", "z_H", "<-", "f(z_H", "+", "z_L)", "no"],
        ["4..6", "z_L", "<-", "f(z_L", "+", "z_H", "+", "x)", "yes"],
        ["7", "z_H", "<-", "f(z_H", "+", "z_L)", "yes"],
    ]


GOOD = Update(dst=0, sources=(0,), inject_x=True, net=0, grad=True)


@pytest.mark.parametrize(
    "states,nets,updates,per_cycle,message",
    [
        ((), ("f",), (GOOD,), 1, "states: got none"),
        (("z",), ("f",), (), 1, "updates: got none"),
        (("z",), ("f",), (GOOD, GOOD, GOOD), 2, "updates_per_cycle: got 2, accepted are the divisors of 3 updates"),
        (("z",), ("f",), (GOOD,), 0, "updates_per_cycle: got 0"),
        (("z",), ("f",), (dataclasses.replace(GOOD, dst=1),), 1, r"updates\[0\].dst: got 1, accepted are 0 to 0 \(z\)"),
        (("z",), ("f",), (dataclasses.replace(GOOD, dst=-1),), 1, r"updates\[0\].dst: got -1"),
        (("z",), ("f",), (GOOD, dataclasses.replace(GOOD, sources=(0, 3))), 1, r"updates\[1\].sources: got 3"),
        (("z",), ("f",), (dataclasses.replace(GOOD, net=1),), 1, r"updates\[0\].net: got 1, accepted are 0 to 0 \(f\)"),
        (("z",), ("f",), (dataclasses.replace(GOOD, sources=(), inject_x=False),), 1, "reads no state and no x"),
    ],
)
def test_bad_program(
    states: tuple[str, ...], nets: tuple[str, ...], updates: tuple[Update, ...], per_cycle: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        RecursionProgram(states, nets, updates, per_cycle)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cycles", [(0, 1), (1, 0), (-1, 1), (True, 1), (1.0, 1), ("2", 1)])
def test_bad_cycles(cycles: tuple[int, int]) -> None:
    for make in (RecursionProgram.trm, RecursionProgram.hrm, RecursionProgram.single_z, RecursionProgram.urm):
        with pytest.raises(ValueError, match=r"^[HL]_cycles: got .*, accepted are integers >= 1$"):
            make(*cycles)


def test_hier6_has_six_low_states() -> None:
    with pytest.raises(ValueError, match="L_cycles: got 7, accepted are 1 to 6"):
        RecursionProgram.hier6(1, 7)


def test_programs_of_looped_language_models() -> None:
    """HRM-Text adds no x; Ouro writes every step to a state of its own."""
    text = RecursionProgram.hrm_text(2, 3)
    assert [(u.dst, u.sources, u.inject_x, u.net) for u in text.updates[:4]] == [(1, (1, 0), False, 1)] * 3 + [
        (0, (0, 1), False, 0)
    ]
    assert not text.uses_x
    looped = RecursionProgram.looped(3)
    assert looped.states == ("z_1", "z_2", "z_3")
    assert [(u.dst, u.sources) for u in looped.updates] == [(0, (0,)), (1, (0,)), (2, (1,))]
    assert all(u.grad for u in looped.updates)
    assert [u.grad for u in RecursionProgram.looped(3, window=1).updates] == [False, False, True]


def test_a_window_counted_by_state() -> None:
    """HRM-Text at five steps: both updates of z_H and the last three of z_L, over two cycles of three and one."""
    program = RecursionProgram.hrm_text(2, 3).with_last((2, 3))
    assert program.grad_updates == (3, 4, 5, 6, 7)
    assert RecursionProgram.hrm_text(2, 3).with_last((1, 1)).grad_updates == (6, 7)
    assert RecursionProgram.from_key(program.key) == program
    with pytest.raises(ValueError, match=r"^counts: got 1 numbers, accepted are one for each of z_H, z_L$"):
        program.with_last([1])
