"""Every backend against the float64 reference, outputs and all gradients, by the tolerance policy."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch

from trmfast.cases import SMALL, Case, make_case
from trmfast.testing import Draw, check_case, check_draws, draw_case, require

Need = Callable[[Case, torch.dtype], None]
DTYPES = [torch.float32, torch.bfloat16]


@lru_cache(maxsize=1)
def _drawn(case: Case, dtype: torch.dtype, seeds: range) -> list[Draw]:
    return draw_case(case, dtype, seeds=seeds)


# The backend varies fastest, here and below, so that all of them share the draws.
@pytest.mark.representative(
    when=lambda case, dtype, backend: (
        case.name in {"trm", "trm-mlp_t"} or (dtype == torch.bfloat16 and backend == "cpu")
    )
)
@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small(case: Case, dtype: torch.dtype, backend: str, need_support: Need) -> None:
    need_support(case, dtype)
    require(check_draws(_drawn(case, dtype, range(5)), backend))


LENGTHS, WIDTHS, BATCHES, HEADS = (81, 82, 97, 901, 916), (64, 128, 512), (1, 2, 3, 8), (2, 4, 8)


def _shape(mixer: str, length: int, width: int, batch: int, heads: int) -> Case:
    name = f"{mixer}-L{length}-D{width}-B{batch}" + f"-heads{heads}" * (mixer == "attention")
    return make_case(
        name,
        H_cycles=1,
        L_cycles=1,
        batch=batch,
        length=length,
        hidden_size=width,
        num_heads=heads,
        num_layers=1,
        token_mixer=mixer,
    )


def _sample() -> list[Case]:
    """Every length with every width, batches and head counts spread over them, for both token mixers."""
    cases = []
    for i, length in enumerate(LENGTHS):
        for j, width in enumerate(WIDTHS):
            batch = BATCHES[(i - j + 2) % 4] if length < 900 else 1
            cases += [_shape(mixer, length, width, batch, HEADS[(i + 2 * j) % 3]) for mixer in ("attention", "mlp_t")]
    return cases


def _every_shape() -> list[Any]:
    """The whole product of sizes; .ci/run leaves out what is marked: every pair of sizes is in the rest as well."""
    cases: list[Any] = []
    sizes = itertools.product(enumerate(LENGTHS), enumerate(WIDTHS), enumerate(BATCHES))
    for (i, length), (j, width), (k, batch) in sizes:
        paired = j == (i + k) % len(WIDTHS)  # the largest of all three sizes do not meet
        marks = [] if paired else [pytest.mark.product]
        cases.append(pytest.param(_shape("mlp_t", length, width, batch, 2), marks=marks))
        for n, heads in enumerate(HEADS):
            marks = [] if paired and n == (i + 2 * k) % len(HEADS) else [pytest.mark.product]
            cases.append(pytest.param(_shape("attention", length, width, batch, heads), marks=marks))
    return cases


def _elements(case: Case) -> int:
    return case.batch * case.length * case.problem.nets[0].block.hidden_size


def _seeds(case: Case) -> range:
    """Large tensors need one draw: the largest of a hundred thousand errors varies little."""
    return range(1 if _elements(case) > 40_000 else 3)


# What the interpreter of Triton runs in .ci/run, a quarter of a minute each; test_every_shape runs the rest.
INTERPRETED = {("attention", 97, 64): torch.bfloat16, ("mlp_t", 97, 64): torch.float32}


def _interpreted(case: Case, dtype: torch.dtype) -> bool:
    block = case.problem.nets[0].block
    return INTERPRETED.get((block.token_mixer, case.length, block.hidden_size)) == dtype


def _sample_of_backends() -> list[Any]:
    """Every backend on every case of the sample; Triton's interpreter on some, on all in test_every_shape."""
    sample = itertools.product(_sample(), DTYPES, ["reference", "cpu", "triton"])
    return [
        pytest.param(case, dtype, backend, id=f"{case}-{dtype}-{backend}")
        for case, dtype, backend in sample
        if backend != "triton" or _interpreted(case, dtype)
    ]


@pytest.fixture
def interpreter_in_one_thread(request: pytest.FixtureRequest, backend: str) -> None:
    if backend == "triton":
        request.getfixturevalue("one_thread")


@pytest.mark.usefixtures("interpreter_in_one_thread")
@pytest.mark.spread("case", "dtype")
@pytest.mark.representative(when=lambda case, backend: backend != "triton" and _elements(case) < 20_000)
@pytest.mark.representative(
    when=lambda case, backend: backend == "triton" or _elements(case) < 20_000, rest="grid product"
)  # test_every_shape has every pair of large sizes
@pytest.mark.parametrize("case, dtype, backend", _sample_of_backends(), indirect=["backend"])
def test_shapes(case: Case, dtype: torch.dtype, backend: str, need_support: Need) -> None:
    need_support(case, dtype)
    require(check_draws(_drawn(case, dtype, _seeds(case)), backend))


@pytest.mark.grid
@pytest.mark.usefixtures("interpreter_in_one_thread")
@pytest.mark.spread("case", "dtype", "backend")
@pytest.mark.parametrize("backend", ["cpu", "triton"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", _every_shape(), ids=str)
def test_every_shape(case: Case, dtype: torch.dtype, backend: str, need_support: Need) -> None:
    need_support(case, dtype)
    require(check_draws(_drawn(case, dtype, _seeds(case)), backend))


@pytest.mark.representative(when=lambda mixer, backend: backend == "cpu" and mixer == "mlp_t")
@pytest.mark.parametrize("mixer", ["attention", "mlp_t"])
def test_a_whole_published_program_in_float32(mixer: str, backend: str, need_support: Need) -> None:
    case = make_case("sudoku", H_cycles=3, L_cycles=6, batch=1, length=97, hidden_size=128, token_mixer=mixer)
    need_support(case, torch.float32)
    # The weights as a model has them at initialisation: in float32 the whole program is comparable.
    require(check_case(case, torch.float32, backend, weight_scale=1.0))
