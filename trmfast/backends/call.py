"""The arguments of one call of a backend, forward and backward.

Named tuples rather than frozen dataclasses, which take three times as long to make: 1 us of the 30 of a small call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from trmfast.problem import Problem

__all__ = ["BackwardCall", "ForwardCall", "Kept"]


class Kept(NamedTuple):
    """What forward keeps of the (update, sequence) pairs of the gradient window.

    Backward takes the last update first, and the sequences of an update in their order; pairs are counted in that
    order.  Numbers may be symbolic.

    Attributes:
        pairs: how many of the first ones have all activations kept.
        outputs: how many of the next ones have the outputs of their blocks kept.
        nbytes: what that takes.
    """

    pairs: int = 0
    outputs: int = 0
    nbytes: int = 0


class ForwardCall(NamedTuple):
    """What ``Backend.forward`` runs.

    Attributes:
        problem: the program and its nets.
        states: S tensors [B, L, D] of the compute dtype, contiguous, of at least one element.
        x: [B, L, D] like the states, or None if no update injects it.
        weights: net by net, as the caller holds them: any float dtype and strides, so that a cache can recognise them.
        cos, sin: contiguous RoPE tables [L, head_dim], float32 (float64 if the compute dtype is); None if no net
            attends, or for no rotation.
        save: whether a backward pass will follow.
        keep: what to keep for backward.
        segments: int32 [B, L, 2], contiguous, where a network reads them, else None, see :func:`trmfast.recursion`.
        int8: whether the operands of products by weights are int8; the compute dtype is bfloat16 then, and ``save``
            False.
    """

    problem: Problem
    states: Sequence[Tensor]
    x: Tensor | None
    weights: Sequence[Tensor]
    cos: Tensor | None
    sin: Tensor | None
    save: bool
    keep: Kept
    int8: bool = False
    segments: Tensor | None = None


class BackwardCall(NamedTuple):
    """What ``Backend.backward`` differentiates.

    Attributes:
        problem, weights, cos, sin, segments: as in :class:`ForwardCall`.
        grad_states: S gradients [B, L, D] of the final states, contiguous, in the compute dtype.
        saved: [G, B, L, D], the summed inputs of the updates with ``grad`` that are not wholly kept, from forward;
            where an injection has a weight the sums of the sources, and without sources what the backend likes.
        kept: uint8 [keep.nbytes], what forward kept, and ``keep``: what that is.
        needs_states, needs_x, needs_weights: which gradients are wanted.
        x: as in :class:`ForwardCall` where :attr:`Problem.backward_reads_x`, else None.
    """

    problem: Problem
    grad_states: Sequence[Tensor]
    saved: Tensor
    kept: Tensor
    keep: Kept
    weights: Sequence[Tensor]
    cos: Tensor | None
    sin: Tensor | None
    needs_states: Sequence[bool]
    needs_x: bool
    needs_weights: Sequence[bool]
    segments: Tensor | None = None
    x: Tensor | None = None
