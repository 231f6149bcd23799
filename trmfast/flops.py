"""Floating-point operations of a recursion: matrix products and attention, two for every multiply-add.

The published convention: norms, activations, embeddings and heads are not counted, a training step is its forward
passes plus twice the gradient window, and what backward recomputes is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence

from trmfast.problem import Problem
from trmfast.program import Update
from trmfast.spec import BlockSpec, NetSpec

__all__ = ["backward_flops", "block_flops", "forward_flops", "window_flops"]


def block_flops(block: BlockSpec, length: int) -> int:
    """Of one block on one sequence of ``length`` tokens."""
    return _weight_flops(block, length) + _attention_flops(block, length)


def _attention_flops(block: BlockSpec, length: int) -> int:
    """FLOPs of the products without a weight: queries with keys, and what becomes of that with values."""
    if not block.attends:
        return 0
    return 4 * block.attention_pairs(length) * block.num_heads * block.head_dim


def _weight_flops(block: BlockSpec, length: int) -> int:
    macs = 0
    if block.attends:
        query, kv = block.num_heads * block.head_dim, block.num_kv_heads * block.head_dim
        macs += length * block.hidden_size * (block.rows_ahead + 2 * query + 2 * kv)
    else:
        macs += 3 * block.hidden_size * block.seq_len * block.seq_intermediate_size
    products = 2 if block.channel_mixer in ("relu2", "gelu") else 3
    macs += products * length * block.hidden_size * block.intermediate_size
    if block.channel_mixer == "conv_swiglu":
        macs += length * block.intermediate_size * block.conv_kernel
    return 2 * macs


def _injection_flops(net: NetSpec, update: Update, length: int) -> int:
    """Of the product of a linear injection; a diagonal one counts as little as a norm's weight."""
    return 2 * length * net.block.hidden_size**2 if net.injection == "linear" and update.sources else 0


def forward_flops(problem: Problem, batch: int, length: int) -> int:
    """Of the whole program."""
    return _updates(problem, batch, length, grad_only=False)


def window_flops(problem: Problem, batch: int, length: int) -> int:
    """Of one forward pass through the gradient window."""
    return _updates(problem, batch, length, grad_only=True)


def backward_flops(problem: Problem, batch: int, length: int, needs_weights: Sequence[bool]) -> int:
    """Of the backward pass: gradients of all activations in the window, and of the weights of networks that train.

    Args:
        needs_weights: whether each weight needs a gradient.
    """
    total = 0
    for update, count in problem.program.counts().items():
        if update.grad:
            net = problem.nets[update.net]
            trained = any(needs_weights[problem.weight_slices[update.net]])
            products = net.num_layers * _weight_flops(net.block, length) + _injection_flops(net, update, length)
            attention = 2 * net.num_layers * _attention_flops(net.block, length)
            total += count * (products * (2 if trained else 1) + attention)
    return batch * total


def _updates(problem: Problem, batch: int, length: int, grad_only: bool) -> int:
    total = 0
    for update, count in problem.program.counts().items():
        if update.grad or not grad_only:
            net = problem.nets[update.net]
            total += count * (net.num_layers * block_flops(net.block, length) + _injection_flops(net, update, length))
    return batch * total
