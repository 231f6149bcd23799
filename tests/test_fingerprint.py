"""The fingerprint by which the CPU engine knows weights again: every change shows, whatever the number of threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trmfast.backends import BACKENDS, cpu

_reason = BACKENDS["cpu"].available()
pytestmark = pytest.mark.skipif(_reason is not None, reason=f"backend cpu: {_reason}")

CHUNK = 1 << 16
# Around the lanes (128 bytes) and the chunks of the hash, and tails that fill neither.
SIZES = [0, 1, 7, 8, 127, 128, 129, 1000, CHUNK - 1, CHUNK, CHUNK + 1, 9 * CHUNK + 133]


def fingerprint(*arrays: Tensor, threads: int = 1) -> int:
    assert cpu._cpu is not None
    found: int = cpu._cpu.fingerprint([a.data_ptr() for a in arrays], [a.nbytes for a in arrays], threads)
    return found


def draw(size: int) -> Tensor:
    return torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("size", SIZES)
def test_every_bit_counts(size: int) -> None:
    array = draw(size)
    before = fingerprint(array)
    step = max(1, size // 97)
    for at in {*range(0, size, step), *range(max(0, size - 9), size)}:
        for bit in (0, 7):
            array[at] ^= 1 << bit
            assert fingerprint(array) != before, f"bit {bit} of byte {at}"
            array[at] ^= 1 << bit
    assert fingerprint(array) == before


@pytest.mark.parametrize("size", SIZES)
def test_threads_do_not_matter(size: int) -> None:
    arrays = draw(size), draw(3 * CHUNK + 5)
    assert len({fingerprint(*arrays, threads=threads) for threads in (1, 2, 3, 7)}) == 1


def test_order_and_borders_count() -> None:
    one, two = draw(256), draw(512)
    found = {fingerprint(one, two), fingerprint(two, one), fingerprint(torch.cat([one, two])), fingerprint(one)}
    assert len(found) == 4


def test_zeros_of_different_lengths_differ() -> None:
    found = {fingerprint(torch.zeros(size, dtype=torch.uint8)) for size in SIZES}
    assert len(found) == len(SIZES)


def test_swapped_words_differ() -> None:
    """Words that trade places, in one lane and across lanes."""
    words = torch.arange(1, 65, dtype=torch.int64)
    before = fingerprint(words)
    for i, j in ((0, 1), (0, 8), (0, 16), (3, 35), (62, 63)):
        swapped = words.clone()
        swapped[i], swapped[j] = words[j], words[i]
        assert fingerprint(swapped) != before
