"""Definitions of PTX instructions in numpy, Python's integers and exact fractions, and operands to try them on."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import floor, isfinite, log2
from typing import Any, NamedTuple

import numpy as np

from ptx_text import LANES

__all__ = ["CASES", "RANDOM", "Case", "draw", "halves", "pair", "to_bf16", "to_f16"]

RANDOM = np.random.default_rng(11)
EDGES = {
    "u16": [0, 1, 2, 0x7FFF, 0x8000, 0xFFFF],
    "u32": [0, 1, 2, 31, 32, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF],
    "u64": [0, 1, 2, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1],
}
# Ties between two float32, what rounds to the smallest, the largest and to infinity, and what is too small.
DOUBLES = [
    *(1 + 2.0**-24, 1 + 3 * 2.0**-24, 2.0**-150, 3 * 2.0**-150, -(2.0**-149), 1e-300, 5e-324, 1e300, -1e300),
    *(float(np.finfo(np.float32).max), float(np.finfo(np.float32).max) * (1 + 2.0**-25), 2.0**128 - 2.0**103),
]
FLOATS = [0.0, -0.0, 1.0, -1.0, 1.5, float("inf"), float("-inf"), float("nan"), 1e-40, 3e38, 1e-20, -1e-20]


def draw(kind: str) -> np.ndarray:
    """32 numbers: edges in random order, and random bits."""
    if kind == "p":
        return RANDOM.integers(0, 2, LANES).astype(bool)
    if kind == "f32":
        values = (RANDOM.standard_normal(LANES) * 4.0 ** RANDOM.integers(-8, 8, LANES)).astype(np.float32)
        values[: len(FLOATS)] = FLOATS
        return RANDOM.permutation(values)
    if kind == "f64":
        values = RANDOM.standard_normal(LANES) * 4.0 ** RANDOM.integers(-8, 8, LANES)
        edges = np.array([*FLOATS, *DOUBLES])
        values[: LANES // 2] = RANDOM.choice(edges, LANES // 2, replace=False)
        return RANDOM.permutation(values)
    if kind in ("bf16", "f16"):
        numbers = RANDOM.standard_normal(LANES).astype(np.float32)
        return to_bf16(numbers) if kind == "bf16" else numbers.astype(np.float16).view(np.uint16)
    if kind in ("shift", "small"):
        return RANDOM.integers(0, 40 if kind == "shift" else 32, LANES).astype(np.uint32)
    unsigned = "u" + kind[1:]
    values = RANDOM.integers(0, 2 ** int(kind[1:]), LANES, dtype=f"u{int(kind[1:]) // 8}")
    values[: len(EDGES[unsigned])] = EDGES[unsigned]
    return RANDOM.permutation(values).view(np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}"))


def nearest(x: Fraction, bits: int, least: int) -> Fraction:
    """x in a binary format of so many bits and a least exponent, to nearest even."""
    if x == 0:
        return x
    exponent = floor(log2(abs(x)))
    exponent += (abs(x) >= Fraction(2) ** (exponent + 1)) - (abs(x) < Fraction(2) ** exponent)
    unit = Fraction(2) ** (max(exponent, least) - bits + 1)
    return round(x / unit) * unit


def to_bf16(x: np.ndarray) -> np.ndarray:
    rounded = np.array([float(nearest(Fraction(float(v)), 8, -126)) if isfinite(v) else v for v in x], np.float32)
    found = (rounded.view(np.uint32) >> 16).astype(np.uint16)
    found[np.isnan(x)] = 0x7FFF
    return np.where((x == 0) & np.signbit(x), 0x8000, found).astype(np.uint16)


def to_f16(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        found = x.astype(np.float16).view(np.uint16)
    found[np.isnan(x)] = 0x7FFF
    return found


def from_bf16(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32)


def from_f16(x: np.ndarray) -> np.ndarray:
    return x.view(np.float16).astype(np.float32)


def halves(x: np.ndarray) -> list[np.ndarray]:
    return [(x & 0xFFFF).astype(np.uint16), (x >> 16).astype(np.uint16)]


def pair(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(np.uint32) | high.astype(np.uint32) << 16


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray, *, bits: int) -> np.ndarray:
    """a b + c with one rounding; what is not finite by float64."""
    with np.errstate(all="ignore"):
        plain = a.astype(np.float64) * b + c
    return np.array(
        [
            np.copysign(float(nearest(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)), bits, -126)), p)
            if isfinite(p) and abs(p) < 3e38 and p != 0
            else np.float32(p)
            for x, y, z, p in zip(a, b, c, plain, strict=True)
        ],
        np.float32,
    )


def fused_bf16(*operands: np.ndarray) -> np.ndarray:
    return to_bf16(fused(*map(from_bf16, operands), bits=8))


def sum_f16(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    parts = zip(halves(a), halves(b), strict=True)
    return pair(*(to_f16((from_f16(x).astype(np.float64) + from_f16(y)).astype(np.float32)) for x, y in parts))


def each(function: Callable[..., int], bits: int = 32) -> Callable[..., np.ndarray]:
    """A definition over Python's integers, lane by lane."""

    def over(*operands: np.ndarray) -> np.ndarray:
        values = [function(*map(int, lane)) % 2**bits for lane in zip(*operands, strict=True)]
        return np.array(values, f"u{bits // 8}")

    return over


def bit_field(a: int, position: int, length: int, signed: bool) -> int:
    position, length = position & 255, length & 255
    field = a >> position & (1 << length) - 1
    return field - (1 << length) if signed and length and field >> (length - 1) else field


def insert(a: int, b: int, position: int, length: int) -> int:
    position, length = position & 255, length & 255
    mask = ((1 << length) - 1) << position & 0xFFFFFFFF
    return b & ~mask | a << position & mask


def permute(a: int, b: int, selector: int) -> int:
    given = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    chosen = [selector >> 4 * i & 15 for i in range(4)]
    return int.from_bytes(bytes((255 if given[c & 7] > 127 else 0) if c > 7 else given[c] for c in chosen), "little")


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def exactly(function: Callable[..., Any], bits: int, least: int) -> Callable[..., np.ndarray]:
    """A definition over fractions, rounded once to a binary format; what is zero or not finite by float64."""

    def over(*operands: np.ndarray) -> np.ndarray:
        limit = (2 - Fraction(1, 2 ** (bits - 1))) * Fraction(2) ** (1 - least)
        found = np.asarray(function(*(x.astype(np.float64) for x in operands)))
        for lane, plain in enumerate(found):
            if isfinite(plain) and plain != 0:
                exact = nearest(function(*(Fraction(float(x[lane])) for x in operands)), bits, least)
                found[lane] = np.copysign(float(exact) if abs(exact) <= limit else np.inf, plain)
        return found.astype(np.float32) if bits == 24 else found

    return over


def on_halves(function: Callable[..., Any]) -> Callable[..., np.ndarray]:
    """:func:`exactly` over the bits of half-precision numbers, one or two a register."""
    rounded = exactly(function, 11, -14)

    def over(*operands: np.ndarray) -> np.ndarray:
        if operands[0].dtype == np.uint32:
            return pair(*map(over, *map(halves, operands)))
        return to_f16(rounded(*map(from_f16, operands)))

    return over


def flush(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x)


class Case(NamedTuple):
    """An instruction: its form, kinds of operands, definition, and the relative error that is allowed."""

    opcode: str
    form: str
    kinds: str
    define: Callable[..., Any]
    error: float = 0

    def __str__(self) -> str:
        return self.opcode


def arithmetic() -> list[Case]:
    found = []
    for kind, letter in (("s32", "r"), ("u32", "r"), ("s64", "d"), ("u64", "d")):
        bits, form, kinds = int(kind[1:]), f"{letter}={2 * letter}", f"{kind} {kind}"
        found += [
            Case(f"add.{kind}", form, kinds, each(lambda a, b: a + b, bits)),
            Case(f"sub.{kind}", form, kinds, each(lambda a, b: a - b, bits)),
            Case(f"mul.lo.{kind}", form, kinds, each(lambda a, b: a * b, bits)),
            Case(f"mad.lo.{kind}", f"{form}{letter}", f"{kinds} {kind}", each(lambda a, b, c: a * b + c, bits)),
        ]
    for kind in ("s32", "u32"):
        found += [
            Case(f"mul.hi.{kind}", "r=rr", f"{kind} {kind}", each(lambda a, b: a * b >> 32)),
            Case(f"mul.wide.{kind}", "d=rr", f"{kind} {kind}", each(lambda a, b: a * b, 64)),
            Case(f"mad.wide.{kind}", "d=rrd", f"{kind} {kind} {kind[0]}64", each(lambda a, b, c: a * b + c, 64)),
            Case(f"min.{kind}", "r=rr", f"{kind} {kind}", each(min)),
            Case(f"max.{kind}", "r=rr", f"{kind} {kind}", each(max)),
            Case(f"div.{kind}", "r=rr", f"{kind} {kind}", each(lambda a, b: quotient(a, b or 7))),
            Case(f"rem.{kind}", "r=rr", f"{kind} {kind}", each(lambda a, b: a - quotient(a, b or 7) * (b or 7))),
        ]
    found += [
        Case("add.s16", "h=hh", "s16 s16", each(lambda a, b: a + b, 16)),
        Case("sub.s16", "h=hh", "s16 s16", each(lambda a, b: a - b, 16)),
        Case("mul.lo.s16", "h=hh", "s16 s16", each(lambda a, b: a * b, 16)),
        Case("mad.lo.s16", "h=hhh", "s16 s16 s16", each(lambda a, b, c: a * b + c, 16)),
        Case("mad.wide.u16", "r=hhr", "u16 u16 u32", each(lambda a, b, c: a * b + c)),
        Case("mul.hi.u16", "h=hh", "u16 u16", each(lambda a, b: a * b >> 16, 16)),
        Case("mul.wide.u16", "r=hh", "u16 u16", each(lambda a, b: a * b)),
        Case("mul.wide.s16", "r=hh", "s16 s16", each(lambda a, b: a * b)),
        Case("div.s64", "d=dd", "s64 s64", each(lambda a, b: quotient(a, b or 7), 64)),
        Case("neg.s32", "r=r", "s32", each(lambda a: -a)),
        Case("neg.s64", "d=d", "s64", each(lambda a: -a, 64)),
        Case("abs.s32", "r=r", "s32", each(abs)),
        Case("not.b32", "r=r", "u32", each(lambda a: ~a)),
        Case("popc.b32", "r=r", "u32", each(lambda a: f"{a:b}".count("1"))),
        Case("not.b64", "d=d", "u64", each(lambda a: ~a, 64)),
        Case("bfe.u32", "r=rrr", "u32 shift shift", each(lambda a, p, n: bit_field(a, p, n, False))),
        Case("bfe.s32", "r=rrr", "s32 shift shift", each(lambda a, p, n: bit_field(a, p, n, True))),
        Case("bfi.b32", "r=rrrr", "u32 u32 shift shift", each(insert)),
        Case("prmt.b32", "r=rrr", "u32 u32 u32", each(permute)),
        Case("shf.l.wrap.b32", "r=rrr", "u32 u32 u32", each(lambda a, b, c: (b << 32 | a) << (c & 31) >> 32)),
    ]
    for bits, letter in ((16, "h"), (32, "r"), (64, "d")):
        kinds, form = f"u{bits} u{bits}", f"{letter}={2 * letter}"
        found += [
            Case(f"and.b{bits}", form, kinds, each(lambda a, b: a & b, bits)),
            Case(f"or.b{bits}", form, kinds, each(lambda a, b: a | b, bits)),
            Case(f"xor.b{bits}", form, kinds, each(lambda a, b: a ^ b, bits)),
            Case(f"shl.b{bits}", f"{letter}={letter}r", f"u{bits} shift", each(lambda a, b: a << b, bits)),
            Case(f"shr.u{bits}", f"{letter}={letter}r", f"u{bits} shift", each(lambda a, b: a >> b, bits)),
            Case(f"shr.b{bits}", f"{letter}={letter}r", f"u{bits} shift", each(lambda a, b: a >> b, bits)),
            Case(f"shr.s{bits}", f"{letter}={letter}r", f"s{bits} shift", each(lambda a, b: a >> b, bits)),
        ]
    return found


COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def predicates() -> list[Case]:
    found = []
    for kind in ("s16", "u16", "b16", "s32", "u32", "b32", "s64", "u64", "b64"):
        letter = {"16": "h", "32": "r", "64": "d"}[kind[1:]]
        drawn = kind.replace("b", "u")
        names = ("eq", "ne") if kind[0] == "b" else COMPARE
        found += [Case(f"setp.{n}.{kind}", f"p={2 * letter}", f"{drawn} {drawn}", COMPARE[n]) for n in names]
    on_floats: dict[str, Callable[..., Any]] = {n: COMPARE[n] for n in ("eq", "lt", "le", "gt", "ge")}
    on_floats |= {"neu": np.not_equal, "ltu": lambda a, b: (a < b) | np.isnan(a) | np.isnan(b)}
    found += [Case(f"setp.{n}.f32", "p=rr", "f32 f32", compare) for n, compare in on_floats.items()]
    logic = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    found += [Case(f"{n}.pred", "p=pp", "p p", function) for n, function in logic.items()]
    found += [Case("not.pred", "p=p", "p", np.logical_not), Case("mov.pred", "p=p", "p", lambda a: a)]
    for kind in ("b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64"):
        letter, drawn = {"16": "h", "32": "r", "64": "d"}[kind[1:]], "u" + kind[1:]
        found.append(Case(f"mov.{kind}", f"{letter}={letter}", drawn, lambda a: a))
        found.append(
            Case(f"selp.{kind}", f"{letter}={2 * letter}p", f"{drawn} {drawn} p", lambda a, b, p: np.where(p, a, b))
        )
    return found


def floats() -> list[Case]:
    f64 = np.float64
    found = []
    for rounding in ("", ".rn"):
        found += [
            Case(f"add{rounding}.f32", "r=rr", "f32 f32", np.add),
            Case(f"sub{rounding}.f32", "r=rr", "f32 f32", np.subtract),
            Case(f"mul{rounding}.f32", "r=rr", "f32 f32", np.multiply),
        ]
    return [
        *found,
        Case("fma.rn.f32", "r=rrr", "f32 f32 f32", lambda a, b, c: fused(a, b, c, bits=24)),
        Case("fma.rn.ftz.f32", "r=rrr", "f32 f32 f32", lambda a, b, c: flush(fused(*map(flush, (a, b, c)), bits=24))),
        Case("fma.rn.bf16", "h=hhh", "bf16 bf16 bf16", fused_bf16),
        Case("fma.rn.bf16x2", "r=rrr", "pair pair pair", lambda *p: pair(*map(fused_bf16, *map(halves, p)))),
        Case("add.f16x2", "r=rr", "pair16 pair16", sum_f16),
        Case("mul.f16", "h=hh", "u16 u16", on_halves(lambda a, b: a * b)),
        Case("mul.f16x2", "r=rr", "u32 u32", on_halves(lambda a, b: a * b)),
        Case("fma.rn.f16x2", "r=rrr", "u32 u32 u32", on_halves(lambda a, b, c: a * b + c)),
        Case("div.full.f32", "r=rr", "f32 f32", np.divide),
        Case("div.rn.f32", "r=rr", "f32 f32", np.divide),
        Case("neg.f32", "r=r", "f32", np.negative),
        Case("abs.f32", "r=r", "f32", np.abs),
        Case("abs.ftz.f32", "r=r", "f32", lambda a: np.abs(flush(a))),
        Case("min.f32", "r=rr", "f32 f32", np.fmin),
        Case("max.f32", "r=rr", "f32 f32", np.fmax),
        Case("ex2.approx.f32", "r=r", "f32", lambda a: np.exp2(f64(a)), 2**-23),
        Case("ex2.approx.ftz.f32", "r=r", "f32", lambda a: flush(np.exp2(f64(flush(a))).astype(np.float32)), 2**-23),
        Case("rcp.approx.ftz.f32", "r=r", "f32", lambda a: flush((1 / f64(flush(a))).astype(np.float32)), 2**-23),
        Case("rsqrt.approx.f32", "r=r", "f32", lambda a: 1 / np.sqrt(f64(a)), 2**-23),
        Case("rsqrt.approx.ftz.f32", "r=r", "f32", lambda a: 1 / np.sqrt(f64(flush(a))), 2**-23),
        Case("tanh.approx.f32", "r=r", "f32", lambda a: np.tanh(f64(a)), 2**-23),
        Case("selp.f64", "d=ddp", "u64 u64 p", lambda a, b, p: np.where(p, a, b)),
        Case("add.f64", "d=dd", "f64 f64", exactly(lambda a, b: a + b, 53, -1022)),
        Case("sub.f64", "d=dd", "f64 f64", exactly(lambda a, b: a - b, 53, -1022)),
        Case("cvt.f64.f32", "d=r", "f32", lambda a: a.astype(np.float64)),
        Case("cvt.rn.f32.f64", "r=d", "f64", exactly(lambda a: a, 24, -126)),
        Case("cvt.f32.bf16", "r=h", "bf16", from_bf16),
        Case("cvt.f32.f16", "r=h", "f16", from_f16),
        Case("cvt.rn.bf16.f32", "h=r", "f32", to_bf16),
        Case("cvt.rn.f16.f32", "h=r", "f32", to_f16),
        Case("cvt.rn.bf16x2.f32", "r=rr", "f32 f32", lambda high, low: pair(to_bf16(low), to_bf16(high))),
        Case("cvt.rn.f16x2.f32", "r=rr", "f32 f32", lambda high, low: pair(to_f16(low), to_f16(high))),
        Case("cvt.rn.f32.s32", "r=r", "s32", lambda a: a.astype(np.float32)),
        Case("cvt.rn.f32.u32", "r=r", "u32", lambda a: a.astype(np.float32)),
        Case("cvt.u16.u32", "h=r", "u32", each(lambda a: a, 16)),
        Case("cvt.u32.u16", "r=h", "u16", each(lambda a: a)),
        Case("cvt.s16.s8", "h=h", "u16", each(lambda a: ((int(a) & 0xFF) ^ 0x80) - 0x80, 16)),
        Case("cvt.s32.s8", "r=r", "u32", each(lambda a: ((a & 0xFF) ^ 0x80) - 0x80)),
        Case("cvt.u64.u16", "d=h", "u16", each(lambda a: a, 64)),
        Case("cvt.s32.s16", "r=h", "s16", each(lambda a: a)),
        Case("cvt.u32.u64", "r=d", "u64", each(lambda a: a)),
        Case("cvt.u64.u32", "d=r", "u32", each(lambda a: a, 64)),
        Case("cvt.s64.s32", "d=r", "s32", each(lambda a: a, 64)),
    ]


CASES = [*arithmetic(), *predicates(), *floats()]
