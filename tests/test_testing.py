"""The tolerance policy itself: it passes what it should, fails what it should, and refuses to prove nothing."""

from __future__ import annotations

import pytest
import torch

from trmfast.cases import SMALL, make_case, make_inputs
from trmfast.testing import (
    Comparison,
    MeaninglessComparisonError,
    Result,
    check_case,
    compare,
    compare_results,
    pool,
    require,
    run_eager,
    run_truth,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = make_case("tiny", H_cycles=1, L_cycles=1, hidden_size=16, intermediate_size=16, num_layers=1, length=5)


def test_the_bound_is_twice_eager_and_half_a_unit_in_the_last_place() -> None:
    truth = torch.tensor([1.0, -3.0 - 2.0**-9], dtype=torch.float64)
    eager = torch.tensor([1.0078125, -3.0], dtype=torch.bfloat16)
    comparison = compare("t", eager, eager, truth)
    assert comparison.eager == 0.0078125
    assert comparison.rounding == 2.0**-9
    assert comparison.bound == 2 * 0.0078125 + 2.0**-9
    assert comparison.passed
    off = torch.tensor([1.03125, -3.0], dtype=torch.bfloat16)
    assert not compare("t", off, eager, truth).passed


def test_nan_never_passes() -> None:
    truth = torch.ones(3, dtype=torch.float64)
    good, bad = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    assert not compare("t", bad, good, truth).passed
    with pytest.raises(AssertionError, match="t: error nan exceeds"):
        require([compare("t", bad, good, truth)])
    with pytest.raises(MeaninglessComparisonError):
        compare("t", good, bad, truth)


def test_an_eager_error_of_a_tenth_is_refused() -> None:
    truth = torch.ones(3, dtype=torch.float64)
    with pytest.raises(MeaninglessComparisonError, match="run fewer cycles or scale the weights down"):
        compare("t", torch.ones(3), torch.ones(3) * 1.11, truth)
    # A gradient is judged relative to its own scale.
    assert compare("t", 50 * torch.ones(3), 50.5 * torch.ones(3), 50 * truth, is_gradient=True).passed
    with pytest.raises(MeaninglessComparisonError):
        compare("t", torch.ones(3) * 1e-3, torch.ones(3) * 1.2e-3, truth * 1e-3, is_gradient=True)


def test_a_gradient_that_is_zero_has_to_be_exactly_zero() -> None:
    truth, zero = torch.zeros(3, dtype=torch.float64), torch.zeros(3)
    assert compare("t", zero, zero, truth, is_gradient=True).passed
    assert not compare("t", zero + 1e-30, zero, truth, is_gradient=True).passed


def test_float64_is_refused() -> None:
    with pytest.raises(MeaninglessComparisonError, match="gradcheck"):
        check_case(TINY, torch.float64, "reference")


def test_shapes_and_dtypes_have_to_agree() -> None:
    with pytest.raises(ValueError, match=r"^t: got \[2\] torch.float32 and \[3\]"):
        compare("t", torch.ones(2), torch.ones(3), torch.ones(3).double())
    with pytest.raises(ValueError, match=r"^t: got"):
        compare("t", torch.ones(3), torch.ones(3).bfloat16(), torch.ones(3).double())


def test_draws_are_pooled_by_their_means() -> None:
    first = [Comparison("a", 0.3, 0.1, 0.0), Comparison("b", 0.1, 0.1, 0.0)]
    second = [Comparison("a", 0.1, 0.3, 0.02), Comparison("b", float("nan"), 0.3, 0.0)]
    a, b = pool([first, second])
    assert (a.error, a.eager, a.rounding) == pytest.approx((0.2, 0.2, 0.01))
    assert not b.passed
    good, wrong = Comparison("d", 1e-6, 1e-6, 0.0), Comparison("d", 1e-5, 1e-6, 0.0)
    assert not pool([[good], [good], [wrong], [good], [good]])[0].passed
    with pytest.raises(ValueError, match="zip"):
        pool([first, second[:1]])


def test_comparing_nothing_fails() -> None:
    with pytest.raises(AssertionError, match="nothing was compared"):
        require([])
    require([Comparison("t", 0.1, 0.05, 0.0)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_policy_catches_a_small_fault(dtype: torch.dtype) -> None:
    """One weight out of hundreds off by 2 % in the third digit, or a gradient of one tensor off by a percent."""
    inputs = make_inputs(TINY, dtype)
    eager, truth = run_eager(inputs), run_truth(inputs)
    assert all(comparison.passed for comparison in compare_results(eager, eager, truth))
    for name in truth.gradients:
        if not truth.gradients[name].any():
            continue
        worse = {**eager.gradients, name: eager.gradients[name] * 1.1}
        failed = [c.name for c in compare_results(Result(eager.outputs, worse), eager, truth) if not c.passed]
        assert failed == [name]


def test_every_small_case_has_a_name_of_its_own() -> None:
    assert len({case.name for case in SMALL}) == len(SMALL)


def test_inputs_are_the_same_numbers_in_every_dtype() -> None:
    exact, rounded = make_inputs(TINY, torch.float32), make_inputs(TINY, torch.bfloat16)
    for a, b in zip(exact.states, rounded.states, strict=True):
        assert torch.equal(a.bfloat16(), b)
    for a, b in zip(exact.weights, rounded.weights, strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a, b)
    other = make_inputs(TINY, seed=1)
    assert not torch.equal(exact.states[0], other.states[0])
