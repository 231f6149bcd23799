"""Every backend against the float64 reference, outputs and all gradients, by the tolerance policy."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch

from trmfast.backends import BACKENDS
from trmfast.cases import SMALL, Case, Inputs, make_case, make_inputs
from trmfast.testing import Result, check_case, compare_results, require, run_eager, run_fused, run_truth

Need = Callable[[Case, torch.dtype], None]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small(case: Case, dtype: torch.dtype, backend: str, need_support: Need) -> None:
    need_support(case, dtype)
    require(check_case(case, dtype, backend))


def _grid() -> list[Case]:
    """Every length with every width, batches and head counts spread over them, for both token mixers."""
    cases = []
    for i, length in enumerate((81, 82, 97, 901, 916)):
        for j, width in enumerate((64, 128, 512)):
            batch = (1, 2, 3, 8)[(i + j) % 4] if length < 900 else 1
            heads = (2, 4, 8)[(i + 2 * j) % 3]
            for mixer in ("attention", "mlp_t"):
                cases.append(
                    make_case(
                        f"{mixer}-L{length}-D{width}-B{batch}" + f"-heads{heads}" * (mixer == "attention"),
                        H_cycles=1,
                        L_cycles=1,
                        batch=batch,
                        length=length,
                        hidden_size=width,
                        num_heads=heads,
                        num_layers=1,
                        token_mixer=mixer,
                    )
                )
    return cases


@lru_cache(maxsize=1)
def _expected(case: Case, dtype: torch.dtype) -> tuple[Inputs, Result, Result]:
    inputs = make_inputs(case, dtype)
    return inputs, run_eager(inputs), run_truth(inputs)


# The backend varies fastest, so that all of them share one computation of what is expected.
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", _grid(), ids=str)
def test_shapes(case: Case, dtype: torch.dtype, backend: str, need_support: Need) -> None:
    need_support(case, dtype)
    inputs, eager, truth = _expected(case, dtype)
    require(compare_results(run_fused(inputs, backend), eager, truth))


@pytest.mark.parametrize("mixer", ["attention", "mlp_t"])
def test_a_whole_published_program_in_float32(mixer: str, backend: str, need_support: Need) -> None:
    case = make_case("sudoku", H_cycles=3, L_cycles=6, batch=1, length=97, hidden_size=128, token_mixer=mixer)
    need_support(case, torch.float32)
    require(check_case(case, torch.float32, backend))
