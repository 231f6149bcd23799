"""Every instruction of the PTX executor that works lane by lane, against a definition of its own."""

from __future__ import annotations

import numpy as np
import pytest

from ptx_definitions import CASES, Case, draw, halves, pair
from ptx_text import LANES, evaluate
from ptx_tools import PtxError

pytestmark = pytest.mark.breadth  # half a minute of compilation


def check(found: np.ndarray, expected: np.ndarray, error: float) -> None:
    """Equal bits; floats within a relative error, and NaN wherever NaN is due."""
    if expected.dtype.kind == "f":
        got, wanted = found.view(expected.dtype).astype(np.float64), expected.astype(np.float64)
        assert np.array_equal(np.isnan(got), np.isnan(wanted))
        with np.errstate(invalid="ignore"):
            close = (got == wanted) | (np.abs(got - wanted) <= error * np.abs(wanted)) | np.isnan(wanted)
        assert close.all(), (got[~close], wanted[~close])
        zero = (wanted == 0) & (got == 0)
        assert np.array_equal(np.signbit(got[zero]), np.signbit(wanted[zero]))
    else:
        assert np.array_equal(found, expected.view(found.dtype) if expected.dtype != found.dtype else expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_instruction(case: Case) -> None:
    for _ in range(3):
        operands = []
        for kind in case.kinds.split():
            half = {"pair": "bf16", "pair16": "f16"}.get(kind)
            operands.append(draw(kind) if half is None else pair(draw(half), draw(half)))
        if case.opcode.startswith(("div.s", "div.u", "rem.")):
            operands[1][operands[1] == 0] = 7
        if case.opcode.startswith(("min.f", "max.f")):
            operands[0][operands[0] == 0] = 2  # numpy does not say which of 0 and -0 is larger
        with np.errstate(all="ignore"):
            expected = np.asarray(case.define(*operands))
            if expected.dtype.kind == "f" and case.form[0] == "r":
                expected = expected.astype(np.float32)
        check(evaluate(case.opcode, case.form, operands)[0], expected, case.error)


def test_zeros_have_an_order() -> None:
    zero, minus = np.zeros(LANES, np.float32), np.full(LANES, -0.0, np.float32)
    for a, b in ((zero, minus), (minus, zero)):
        assert not evaluate("max.f32", "r=rr", [a, b])[0].any()
        assert (evaluate("min.f32", "r=rr", [a, b])[0] == 0x80000000).all()


def test_pairs() -> None:
    low, high, word = draw("u16"), draw("u16"), draw("u32")
    assert np.array_equal(evaluate("mov.b32", "r=hh", [low, high], (1, 2))[0], pair(low, high))
    for found, expected in zip(evaluate("mov.b32", "hh=r", [word], (2, 1)), halves(word), strict=True):
        assert np.array_equal(found, expected)
    wide = word.astype(np.uint64) | draw("u32").astype(np.uint64) << np.uint64(32)
    low32, high32 = (wide & np.uint64(0xFFFFFFFF)).astype(np.uint32), (wide >> np.uint64(32)).astype(np.uint32)
    assert np.array_equal(evaluate("mov.b64", "d=rr", [low32, high32], (1, 2))[0], wide)
    assert [a.tolist() for a in evaluate("mov.b64", "rr=d", [wide], (2, 1))] == [low32.tolist(), high32.tolist()]


@pytest.mark.parametrize("opcode", ["div.s32", "div.u32", "div.s64", "rem.s32", "rem.u32"])
def test_division_by_zero(opcode: str) -> None:
    values = draw("u" + opcode[-2:])
    with pytest.raises(PtxError, match=f"{opcode}.*lane 0 divides by zero"):
        evaluate(opcode, "d=dd" if opcode.endswith("64") else "r=rr", [values, np.zeros_like(values)])
