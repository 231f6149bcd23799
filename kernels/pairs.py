"""Products whose columns belong together in pairs: gate and up of a SwiGLU, the two halves of a rotated head.

Both columns of a pair come out of one product, and the weight rows are taken in an order that keeps a pair within one
thread: a group of rows of the first half, then the same group of the second half.  With groups of 8, bit 3 of a column
(or row) number tells the halves apart.  In the accumulator of mma and wgmma instructions that bit numbers registers,
not lanes, along columns and rows alike, so parting the halves moves no data, and each half is an accumulator again.

A product that another product follows takes single columns in turn (``CHAINED``).  Triton arranges the warps of such a
chain so that no work is duplicated, but a transposition, which larger groups need, hides the chain from it: compiled
for sm_80, every exponential was then computed four times.  The price is a few shuffles.
"""

import triton
import triton.language as tl

__all__ = ["CHAINED", "GROUP", "group_of", "pair_of", "part_columns", "part_rows"]

GROUP = tl.constexpr(8)
CHAINED = tl.constexpr(1)


def group_of(half: int) -> int:
    """The size of the groups for heads of two halves of this size: 8, or the largest power of two that divides it."""
    return min(8, half & -half)


@triton.jit
def pair_of(position, GROUP: tl.constexpr):
    """Of a column of the product: the number of its pair, and which half it is (0 or 1)."""
    return position // (2 * GROUP) * GROUP + position % GROUP, position // GROUP % 2


@triton.jit
def part_columns(product, GROUP: tl.constexpr):
    """The two halves [M, P] of a product [M, 2P]."""
    M: tl.constexpr = product.shape[0]
    N: tl.constexpr = product.shape[1]
    if GROUP == 1:
        return tl.split(tl.reshape(product, (M, N // 2, 2)))
    groups = tl.reshape(product, (M, N // (2 * GROUP), 2, GROUP))
    first, second = tl.split(tl.permute(groups, (0, 1, 3, 2)))
    return tl.reshape(first, (M, N // 2)), tl.reshape(second, (M, N // 2))


@triton.jit
def part_rows(product, GROUP: tl.constexpr):
    """The two halves [P, N] of a product [2P, N]."""
    M: tl.constexpr = product.shape[0]
    N: tl.constexpr = product.shape[1]
    groups = tl.reshape(product, (M // (2 * GROUP), 2, GROUP, N))
    first, second = tl.split(tl.permute(groups, (0, 2, 3, 1)))
    return tl.reshape(first, (M // 2, N)), tl.reshape(second, (M // 2, N))
