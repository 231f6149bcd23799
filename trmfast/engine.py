"""A problem in the form that the C++ engines take.  Imports no PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trmfast.program import RecursionProgram
from trmfast.spec import BlockSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["address", "block_fields", "choice_fields", "int8_refusal", "update_rows"]

DEEPEST_INT8 = 66_000  # 255 * 127 * depth stays below 2^31


def block_fields(block: BlockSpec) -> dict[str, Any]:
    """The fields of an engine's BlockShape."""
    return {
        "width": block.hidden_size,
        "inner": block.intermediate_size,
        "attention": block.attends,
        "heads": block.num_heads,
        "kv_heads": block.num_kv_heads,
        "head_dim": block.head_dim,
        "causal": block.causal,
        "seq_len": block.seq_len,
        "seq_inner": block.seq_intermediate_size,
        "conv_taps": block.conv_kernel if block.channel_mixer == "conv_swiglu" else 0,
        "eps": block.rms_norm_eps,
    }


def choice_fields(block: BlockSpec) -> dict[str, Any]:
    """The further fields of the CPU engine's BlockShape; without them it is TRM's and HRM's block."""
    placement = block.norm_placement
    return {
        "input_norm": placement != "post",
        "branch_norm": placement == "sandwich",
        "sum_norm": placement in ("post", "sandwich_sum"),
        "norm_weight": block.norm_weight,
        "interleaved": block.rotation == "interleaved",
        "qk_norm": block.qk_norm != "none",
        "qk_norm_weight": block.qk_norm == "learned",
        "qk_bias": block.qk_bias,
        "gate": ("none", "channel", "head").index(block.gate),
        "decay": block.token_mixer == "simple_gla",
        "window": block.attention_window,
        "activation": {"relu2": 1, "gelu": 2}.get(block.channel_mixer, 0),
    }


def int8_refusal(block: BlockSpec) -> str | None:
    """None, or why an engine does not multiply a block's weights in int8."""
    channels = max(block.hidden_size, block.intermediate_size, block.num_heads * block.head_dim)
    deepest = max(channels, block.seq_len, block.seq_intermediate_size)
    return None if deepest <= DEEPEST_INT8 else f"it sums up to {DEEPEST_INT8} int8 products, not {deepest}"


def update_rows(program: RecursionProgram) -> list[tuple[int, list[int], bool, int, bool]]:
    """The updates of a program: dst, sources, inject_x, net and grad of each."""
    rows = {u: (u.dst, list(u.sources), u.inject_x, u.net, u.grad) for u in program.counts()}
    return [rows[u] for u in program.updates]


def address(tensor: Tensor | None) -> int:
    """The address of a tensor's data, 0 without one."""
    return 0 if tensor is None else tensor.data_ptr()
