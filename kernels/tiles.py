"""The tiles of each kernel on each GPU: the one table, from which configurations.py picks.

Each tile compiles for each GPU that it is listed for without spills, and fits the shared memory:
``python -m benchmarks.offline.triton`` and tests/test_triton_offline.py check it.
"""

from __future__ import annotations

from trmfast.kernels.plan import Tile

__all__ = ["HALF_ROW", "INTERPRETED", "LENGTH", "ROW", "TILES", "WIDEST_ROW", "most_parts"]

ROW = -1
"""A tile size that holds a whole row of D elements: a power of two, at least 16."""
LENGTH = -2
"""A tile size that holds a whole sequence."""
HALF_ROW = -3
"""Half of ROW, at least 16."""
WIDEST_ROW = 512
"""The widest rows that a product's program holds in its accumulators."""

INTERPRETED: dict[str, Tile] = {
    "qkv": Tile.of(BLOCK_M=128, BLOCK_N=256, BLOCK_K=128),
    "qkv_sum": Tile.of(BLOCK_M=128, BLOCK_N=256, BLOCK_K=128),
    "qkv_padded": Tile.of(BLOCK_M=128, BLOCK_N=256, BLOCK_K=128),
    "qkv_normed": Tile.of(BLOCK_M=128, BLOCK_N=256, BLOCK_K=128),
    "qkv_normed_padded": Tile.of(BLOCK_M=128, BLOCK_N=256, BLOCK_K=128),
    "qkv_many": Tile.of(BLOCK_M=128, BLOCK_N=256, BLOCK_K=128),
    "attention": Tile.of(BLOCK_M=128, BLOCK_N=LENGTH),
    "attention_long": Tile.of(BLOCK_M=128, BLOCK_N=128),
    "attention_ranged": Tile.of(BLOCK_M=128, BLOCK_N=128),
    "attention_wide": Tile.of(BLOCK_M=128, BLOCK_N=128),
    "attention_projection": Tile.of(BLOCK_M=128, BLOCK_N=128),
    "sum_decays": Tile.of(BLOCK_L=128),
    "simple_gla": Tile.of(BLOCK_M=128, BLOCK_N=128),
    "simple_gla_wide": Tile.of(BLOCK_M=128, BLOCK_N=128),
    "projection": Tile.of(BLOCK_M=128, BLOCK_N=ROW, BLOCK_K=128),
    "projection_columns": Tile.of(BLOCK_M=128, BLOCK_N=HALF_ROW, BLOCK_K=128),
    "swiglu": Tile.of(BLOCK_M=128, BLOCK_I=128, BLOCK_K=128),
    "swiglu_rows": Tile.of(BLOCK_M=128, BLOCK_I=128, BLOCK_K=128),
    "gate_up": Tile.of(BLOCK_M=128, BLOCK_I=128, BLOCK_K=128),
    "conv_projection": Tile.of(BLOCK_M=128, BLOCK_N=ROW, BLOCK_K=128),
    "conv_projection_columns": Tile.of(BLOCK_M=128, BLOCK_N=HALF_ROW, BLOCK_K=128),
    "normed_sum": Tile.of(BLOCK_M=128, BLOCK_N=HALF_ROW),
    "normed_rows": Tile.of(BLOCK_M=128, BLOCK_N=HALF_ROW),
    "mlp_t": Tile.of(BLOCK_C=64, BLOCK_I=128),
    "gate_up_t": Tile.of(BLOCK_I=128, BLOCK_C=64, BLOCK_K=128),
    "down_t": Tile.of(BLOCK_L=128, BLOCK_C=64, BLOCK_K=128),
    "fold": Tile.of(BLOCK_M=128, BLOCK_N=128),
    "unfold": Tile.of(BLOCK_M=128, BLOCK_N=128),
    "column_sums": Tile.of(BLOCK_M=128, BLOCK_N=128),
    "gate_backward": Tile.of(BLOCK_M=128),
    "head_norm": Tile.of(BLOCK_M=128),
    "head_norm_backward": Tile.of(BLOCK_M=128),
    "norm_backward": Tile.of(BLOCK_M=128, BLOCK_N=ROW),
    "norm_backward_targets": Tile.of(BLOCK_M=128, BLOCK_N=ROW),
    "norm_backward_wide": Tile.of(BLOCK_M=128, BLOCK_N=ROW),
    "swiglu_backward": Tile.of(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128),
    "swiglu_backward_t": Tile.of(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128),
    "projection_backward": Tile.of(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128),
    "projection_backward_targets": Tile.of(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128),
    "projection_backward_norm": Tile.of(BLOCK_M=128, BLOCK_N=ROW, BLOCK_K=128),
    "projection_backward_t": Tile.of(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128),
    "attention_backward": Tile.of(BLOCK_M=128, BLOCK_N=LENGTH),
    "attention_backward_ranged": Tile.of(BLOCK_M=128, BLOCK_N=LENGTH),
    "attention_backward_keys": Tile.of(BLOCK_M=128, BLOCK_N=128),
    "attention_backward_keys_ranged": Tile.of(BLOCK_M=128, BLOCK_N=128),
    "attention_backward_queries": Tile.of(BLOCK_M=128, BLOCK_N=128),
    "attention_backward_queries_ranged": Tile.of(BLOCK_M=128, BLOCK_N=128),
    "attention_backward_keys_wide": Tile.of(BLOCK_M=128, BLOCK_N=128),
    "attention_backward_queries_wide": Tile.of(BLOCK_M=128, BLOCK_N=128),
    "simple_gla_backward_keys": Tile.of(BLOCK_M=128, BLOCK_N=128),
    "simple_gla_backward_queries": Tile.of(BLOCK_M=128, BLOCK_N=128),
    "simple_gla_backward_keys_wide": Tile.of(BLOCK_M=128, BLOCK_N=128),
    "simple_gla_backward_queries_wide": Tile.of(BLOCK_M=128, BLOCK_N=128),
    "decays_backward": Tile.of(BLOCK_L=128),
    "weight_gradient": Tile.of(BLOCK_M=128, BLOCK_N=256, BLOCK_K=128),
    "weight_gradient_t": Tile.of(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128),
    "sum_splits": Tile.of(BLOCK_N=1024),
    "conv_swiglu_backward": Tile.of(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128),
    "gate_up_backward": Tile.of(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128),
    "conv_gradient": Tile.of(BLOCK_M=16, BLOCK_N=256),
    "mlp_t_backward": Tile.of(BLOCK_N=64, BLOCK_I=128),
    "mlp_t_weight_gradient": Tile.of(BLOCK_N=64, BLOCK_I=128),
    "mlp_t_norm_backward": Tile.of(BLOCK_M=128, BLOCK_N=64),
}


def _tile(num_warps: int, num_stages: int, **blocks: int) -> Tile:
    return Tile.of(num_warps, num_stages, **{f"BLOCK_{name}": size for name, size in blocks.items()})


_BIG = "16-bit sm_80 sm_90 sm_100"  # more than 160 KB of shared memory
_HOPPER = "16-bit sm_90 sm_100"
_AMD = "16-bit gfx942"
_WIDE = (_tile(8, 3, M=128, N=256, K=64), _tile(8, 3, M=128, N=128, K=64))

# By kernel, then by size of the compute dtype, alone or with the architectures that differ.  Large tiles first.
TILES: dict[str, dict[str, tuple[Tile, ...]]] = {
    "qkv": {
        "16-bit": (_tile(8, 3, M=128, N=128, K=64), _tile(4, 3, M=64, N=64, K=64), _tile(4, 3, M=32, N=64, K=64)),
        _HOPPER: (*_WIDE, _tile(4, 3, M=64, N=64, K=64), _tile(4, 3, M=32, N=64, K=64)),
        _AMD: (_tile(8, 3, M=128, N=128, K=32), _tile(4, 3, M=64, N=64, K=64), _tile(4, 3, M=32, N=64, K=64)),
        "32-bit": (_tile(4, 2, M=64, N=64, K=16), _tile(4, 2, M=32, N=64, K=16)),
    },
    # Two terms or more: the sum is recomputed for each column tile, and every term takes shared memory.
    "qkv_sum": {
        "16-bit": (_tile(8, 3, M=128, N=128, K=32), _tile(4, 3, M=64, N=64, K=32), _tile(4, 3, M=32, N=64, K=32)),
        _HOPPER: (
            *(_tile(8, 3, M=128, N=256, K=32), _tile(8, 3, M=128, N=128, K=32)),
            *(_tile(4, 3, M=64, N=64, K=32), _tile(4, 3, M=32, N=64, K=32)),
        ),
        "32-bit": (_tile(4, 2, M=64, N=64, K=16), _tile(4, 2, M=32, N=64, K=16)),
    },
    # Up to three terms, where rotated pairs are neighbours, or a gate of one value a head or decays are padded to whole
    # heads: both take registers.
    "qkv_padded": {
        "16-bit": (_tile(8, 3, M=128, N=128, K=32), _tile(4, 3, M=64, N=64, K=32), _tile(4, 3, M=32, N=64, K=32)),
        "32-bit": (_tile(4, 2, M=64, N=64, K=16), _tile(4, 2, M=32, N=64, K=16)),
    },
    # Terms that it norms, whose factors take registers.
    "qkv_normed": {
        "16-bit": (_tile(4, 3, M=64, N=64, K=32), _tile(4, 3, M=32, N=64, K=32)),
        _HOPPER: (
            *(_tile(8, 2, M=128, N=256, K=64), _tile(8, 3, M=128, N=128, K=32)),
            *(_tile(4, 3, M=64, N=64, K=32), _tile(4, 3, M=32, N=64, K=32)),
        ),
        "32-bit": (_tile(4, 2, M=64, N=64, K=16), _tile(4, 2, M=32, N=64, K=16)),
    },
    "qkv_normed_padded": {
        "16-bit": (_tile(4, 3, M=64, N=64, K=32), _tile(4, 3, M=32, N=64, K=32)),
        _HOPPER: (_tile(8, 3, M=128, N=128, K=32), _tile(4, 3, M=64, N=64, K=32), _tile(4, 3, M=32, N=64, K=32)),
        "32-bit": (_tile(4, 2, M=64, N=64, K=16), _tile(4, 2, M=32, N=64, K=16)),
    },
    # More than three terms: the six low states of hier6.
    "qkv_many": {
        "16-bit": (_tile(4, 2, M=64, N=64, K=32), _tile(4, 2, M=32, N=64, K=32)),
        "32-bit": (_tile(4, 2, M=32, N=32, K=16),),
        "32-bit gfx942": (_tile(4, 2, M=32, N=32, K=32),),
    },
    "attention": {
        "16-bit": (_tile(8, 2, M=LENGTH, N=LENGTH), _tile(4, 2, M=64, N=LENGTH)),
        "32-bit": (_tile(4, 2, M=32, N=16),),
    },
    "attention_long": {
        "16-bit": (_tile(8, 3, M=128, N=64), _tile(4, 3, M=64, N=64)),
        "32-bit": (_tile(4, 2, M=32, N=16),),
    },
    # With a window or segments, whose ranges take registers.
    "attention_ranged": {
        "16-bit": (_tile(8, 3, M=128, N=64), _tile(4, 3, M=64, N=64)),
        _AMD: (_tile(8, 2, M=128, N=32), _tile(4, 2, M=64, N=32)),
        "32-bit": (_tile(4, 2, M=32, N=16),),
    },
    # Heads of 65 to 128.
    "attention_wide": {
        "16-bit": (_tile(8, 2, M=128, N=64), _tile(4, 2, M=64, N=32)),
        _AMD: (_tile(8, 2, M=128, N=32), _tile(4, 2, M=64, N=32)),
        "32-bit": (_tile(4, 2, M=16, N=16),),
    },
    "attention_projection": {
        "16-bit": (_tile(8, 2, M=32, N=64),),
        _HOPPER: (_tile(8, 2, M=64, N=64),),
        _AMD: (_tile(8, 1, M=64, N=32),),
    },
    "sum_decays": {"16-bit": (_tile(4, 1, L=128),), "32-bit": (_tile(4, 1, L=128),)},
    "simple_gla": {
        "16-bit": (_tile(8, 3, M=128, N=64), _tile(4, 3, M=64, N=64)),
        _AMD: (_tile(4, 3, M=64, N=64),),
        "32-bit": (_tile(4, 2, M=32, N=16),),
    },
    # Heads of 65 to 128.
    "simple_gla_wide": {
        "16-bit": (_tile(8, 2, M=128, N=64), _tile(4, 2, M=64, N=32)),
        _AMD: (_tile(4, 2, M=64, N=32),),
        "32-bit": (_tile(4, 2, M=16, N=16),),
    },
    "projection": {
        "16-bit": (_tile(8, 3, M=64, N=ROW, K=32), _tile(4, 2, M=16, N=ROW, K=64)),
        _HOPPER: (_tile(8, 2, M=64, N=ROW, K=64), _tile(4, 2, M=16, N=ROW, K=64)),
        "16-bit sm_120": (_tile(8, 2, M=64, N=ROW, K=32), _tile(4, 2, M=16, N=ROW, K=64)),
        _AMD: (_tile(8, 2, M=64, N=ROW, K=32), _tile(4, 2, M=16, N=ROW, K=32)),
        "32-bit": (_tile(8, 1, M=16, N=ROW, K=16),),
    },
    # Its readers apply the norm (rows.py).
    "projection_columns": {
        "16-bit": (_tile(8, 3, M=128, N=128, K=64), _tile(4, 3, M=64, N=64, K=64), _tile(4, 3, M=32, N=32, K=64)),
        _HOPPER: (*_WIDE, _tile(4, 3, M=64, N=64, K=64), _tile(4, 3, M=32, N=32, K=64)),
        "16-bit sm_120": (
            *(_tile(8, 3, M=128, N=128, K=32), _tile(4, 3, M=64, N=64, K=64), _tile(4, 2, M=32, N=32, K=64)),
        ),
        _AMD: (_tile(8, 3, M=128, N=128, K=32), _tile(4, 3, M=64, N=64, K=64), _tile(4, 3, M=32, N=32, K=64)),
        "32-bit": (_tile(8, 2, M=64, N=64, K=16), _tile(4, 2, M=32, N=32, K=16)),
    },
    "swiglu": {
        "16-bit": (_tile(8, 3, M=64, I=32, K=64), _tile(8, 3, M=32, I=32, K=64)),
    },
    # It norms its rows (rows.py), and the larger tile spills on sm_120.
    "swiglu_rows": {
        "16-bit": (_tile(8, 3, M=32, I=32, K=64),),
        "16-bit sm_80 sm_90 gfx942": (_tile(8, 3, M=64, I=32, K=64), _tile(8, 3, M=32, I=32, K=64)),
    },
    "gate_up": {
        "16-bit": (_tile(8, 3, M=128, I=64, K=64), _tile(4, 3, M=64, I=32, K=64)),
        _BIG: (_tile(8, 3, M=128, I=128, K=64), _tile(8, 3, M=128, I=64, K=64), _tile(4, 3, M=64, I=32, K=64)),
        _AMD: (_tile(8, 3, M=128, I=64, K=32), _tile(4, 3, M=64, I=32, K=64)),
        "32-bit": (_tile(8, 2, M=64, I=32, K=16),),
        "32-bit gfx942": (_tile(8, 2, M=64, I=32, K=32),),
    },
    "conv_projection": {
        "16-bit": (_tile(8, 2, M=32, N=ROW, K=32),),
        _HOPPER: (_tile(8, 2, M=64, N=ROW, K=32), _tile(8, 2, M=32, N=ROW, K=32)),
        _AMD: (_tile(8, 2, M=64, N=ROW, K=32),),
        "32-bit": (_tile(8, 1, M=16, N=ROW, K=16),),
    },
    "conv_projection_columns": {
        "16-bit": (_tile(8, 2, M=64, N=128, K=32), _tile(4, 2, M=32, N=32, K=32)),
        _AMD: (_tile(8, 2, M=64, N=128, K=32), _tile(4, 2, M=32, N=32, K=64)),
        "32-bit": (_tile(8, 2, M=64, N=64, K=16), _tile(4, 2, M=32, N=32, K=16)),
    },
    # One tile: forward and backward sum different numbers of terms, and must leave squares of the same tiles.
    "normed_sum": {
        "16-bit": (_tile(4, 1, M=8, N=128),),
        _AMD: (_tile(4, 1, M=16, N=128),),
        "32-bit": (_tile(4, 1, M=4, N=128),),
    },
    "normed_rows": {"16-bit": (_tile(4, 1, M=8, N=128),), "32-bit": (_tile(4, 1, M=4, N=128),)},
    "fold": {
        "16-bit": (_tile(4, 1, M=8, N=128),),
        _AMD: (_tile(4, 1, M=16, N=128),),
        "32-bit": (_tile(4, 1, M=4, N=128),),
        "32-bit gfx942": (_tile(4, 1, M=8, N=128),),
    },
    "unfold": {
        "16-bit": (_tile(4, 1, M=32, N=64),),
        "32-bit": (_tile(4, 1, M=32, N=64),),
        "32-bit sm_100": (_tile(4, 1, M=16, N=64),),
    },
    "column_sums": {"16-bit": (_tile(4, 1, M=32, N=64),), "32-bit": (_tile(4, 1, M=32, N=64),)},
    "gate_backward": {"16-bit": (_tile(4, 1, M=32),), "32-bit": (_tile(4, 1, M=16),)},
    "head_norm": {"16-bit": (_tile(4, 1, M=32),), "32-bit": (_tile(4, 1, M=16),)},
    "head_norm_backward": {"16-bit": (_tile(4, 1, M=32),), "32-bit": (_tile(4, 1, M=16),)},
    "mlp_t": {
        "16-bit": (_tile(8, 2, C=128, I=64), _tile(4, 2, C=64, I=32)),
        _AMD: (_tile(8, 2, C=128, I=32), _tile(4, 2, C=64, I=32)),
        "32-bit": (_tile(8, 2, C=16, I=16),),
    },
    "gate_up_t": {
        "16-bit": (_tile(8, 3, I=64, C=128, K=32), _tile(4, 3, I=32, C=64, K=32)),
        _HOPPER: (_tile(8, 3, I=128, C=128, K=32), _tile(8, 3, I=64, C=128, K=32), _tile(4, 3, I=32, C=64, K=32)),
        "16-bit sm_120": (_tile(8, 3, I=64, C=128, K=32), _tile(4, 2, I=32, C=64, K=32)),
        "32-bit": (_tile(8, 2, I=32, C=64, K=16),),
        "32-bit gfx942": (_tile(8, 2, I=32, C=64, K=32),),
    },
    "down_t": {
        "16-bit": (_tile(8, 3, L=128, C=128, K=64), _tile(4, 3, L=128, C=64, K=64)),
        "32-bit": (_tile(8, 2, L=64, C=64, K=16),),
    },
    "norm_backward": {"16-bit": (_tile(4, 1, M=4, N=ROW),), "32-bit": (_tile(4, 1, M=4, N=ROW),)},
    "norm_backward_targets": {
        "16-bit": (_tile(4, 1, M=2, N=ROW),),
        _AMD: (_tile(4, 1, M=4, N=ROW),),
        "32-bit": (_tile(4, 1, M=2, N=ROW),),
    },
    "norm_backward_wide": {
        "16-bit": (_tile(4, 1, M=1, N=ROW),),
        _AMD: (_tile(4, 1, M=2, N=ROW),),
        "32-bit": (_tile(4, 1, M=1, N=ROW),),
    },
    "swiglu_backward": {
        "16-bit": (_tile(8, 3, M=128, N=64, K=32), _tile(4, 3, M=64, N=32, K=64)),
        "16-bit sm_80": (_tile(8, 3, M=128, N=64, K=64), _tile(4, 3, M=64, N=32, K=64)),
        _HOPPER: (_tile(8, 4, M=128, N=128, K=32), _tile(8, 3, M=128, N=64, K=64), _tile(4, 3, M=64, N=32, K=64)),
        "32-bit": (_tile(8, 2, M=64, N=64, K=16), _tile(4, 2, M=64, N=32, K=32)),
        "32-bit gfx942": (_tile(8, 2, M=64, N=64, K=32), _tile(4, 2, M=64, N=32, K=32)),
    },
    "swiglu_backward_t": {
        "16-bit": (_tile(8, 3, M=128, N=64, K=32), _tile(4, 2, M=64, N=32, K=32)),
        _BIG: (_tile(8, 3, M=128, N=64, K=64), _tile(4, 2, M=64, N=32, K=32)),
        "32-bit": (_tile(8, 2, M=64, N=64, K=16), _tile(4, 2, M=64, N=32, K=32)),
        "32-bit gfx942": (_tile(8, 2, M=64, N=64, K=32), _tile(4, 2, M=64, N=32, K=32)),
    },
    "projection_backward": {
        "16-bit": (_tile(8, 3, M=128, N=128, K=64), _tile(4, 3, M=64, N=64, K=64), _tile(4, 3, M=32, N=64, K=64)),
        _HOPPER: (*_WIDE, _tile(4, 3, M=64, N=64, K=64), _tile(4, 3, M=32, N=64, K=64)),
        "16-bit sm_120": (
            _tile(8, 3, M=128, N=128, K=64),
            _tile(4, 3, M=64, N=64, K=64),
            _tile(4, 3, M=32, N=64, K=32),
        ),
        "32-bit": (_tile(8, 2, M=64, N=128, K=16), _tile(4, 2, M=64, N=64, K=16)),
    },
    # With state gradients accumulated in the epilogue.
    "projection_backward_targets": {
        "16-bit": (_tile(8, 3, M=64, N=128, K=64), _tile(4, 3, M=64, N=64, K=64), _tile(4, 3, M=32, N=64, K=64)),
        "16-bit sm_100": (_tile(4, 3, M=64, N=64, K=64), _tile(4, 3, M=32, N=64, K=64)),
        "16-bit sm_120": (_tile(8, 3, M=64, N=128, K=64), _tile(4, 3, M=64, N=64, K=64), _tile(4, 2, M=32, N=64, K=32)),
        "32-bit": (_tile(8, 2, M=64, N=128, K=16), _tile(4, 2, M=64, N=64, K=16)),
    },
    "projection_backward_t": {
        "16-bit": (_tile(8, 3, M=128, N=64, K=64), _tile(4, 2, M=64, N=64, K=32)),
        "32-bit": (_tile(4, 2, M=64, N=64, K=32),),
    },
    "projection_backward_norm": {
        "16-bit": (_tile(8, 2, M=32, N=ROW, K=32),),
        _AMD: (_tile(8, 2, M=64, N=ROW, K=32), _tile(8, 2, M=32, N=ROW, K=32)),
        "32-bit": (_tile(8, 2, M=16, N=ROW, K=16),),
    },
    "attention_backward": {
        "16-bit": (_tile(8, 1, M=32, N=LENGTH),),
        "16-bit sm_90": (_tile(8, 1, M=64, N=LENGTH),),
        _AMD: (_tile(4, 1, M=32, N=LENGTH),),
    },
    # With a window or segments, whose ranges take registers.
    "attention_backward_ranged": {
        "16-bit": (_tile(8, 1, M=32, N=LENGTH),),
        "16-bit sm_90": (_tile(8, 1, M=64, N=LENGTH),),
        _AMD: (_tile(8, 1, M=16, N=LENGTH),),
    },
    "attention_backward_keys": {
        "16-bit": (_tile(8, 2, M=64, N=128), _tile(4, 1, M=32, N=64)),
        "16-bit sm_120 gfx942": (_tile(8, 2, M=32, N=128), _tile(4, 1, M=32, N=64)),
        "32-bit": (_tile(4, 1, M=16, N=64),),
    },
    "attention_backward_keys_ranged": {
        "16-bit": (_tile(8, 2, M=32, N=128), _tile(4, 1, M=32, N=64)),
        _AMD: (_tile(8, 1, M=32, N=128), _tile(8, 1, M=32, N=64)),
        "32-bit": (_tile(4, 1, M=16, N=64),),
    },
    "attention_backward_queries": {
        "16-bit": (_tile(8, 2, M=128, N=64), _tile(4, 2, M=64, N=64)),
        "32-bit": (_tile(4, 1, M=32, N=16),),
    },
    "attention_backward_queries_ranged": {
        "16-bit": (_tile(8, 2, M=128, N=64), _tile(4, 2, M=64, N=64)),
        _AMD: (_tile(8, 1, M=128, N=32), _tile(4, 2, M=64, N=32)),
        "32-bit": (_tile(4, 1, M=32, N=16),),
    },
    # Heads of 65 to 128.
    "attention_backward_keys_wide": {
        "16-bit": (_tile(8, 1, M=32, N=64),),
        _AMD: (_tile(8, 1, M=16, N=128),),
        "32-bit": (_tile(4, 1, M=16, N=16),),
    },
    "attention_backward_queries_wide": {
        "16-bit": (_tile(8, 1, M=64, N=32),),
        "32-bit": (_tile(4, 2, M=16, N=16),),
    },
    "simple_gla_backward_keys": {
        "16-bit": (_tile(8, 2, M=32, N=128), _tile(4, 1, M=32, N=64)),
        _AMD: (_tile(4, 1, M=32, N=32),),
        "32-bit": (_tile(4, 1, M=16, N=32),),
    },
    "simple_gla_backward_queries": {
        "16-bit": (_tile(8, 2, M=128, N=64), _tile(4, 2, M=64, N=64)),
        _AMD: (_tile(4, 1, M=64, N=32),),
        "32-bit": (_tile(4, 1, M=32, N=16),),
    },
    # Heads of 65 to 128.
    "simple_gla_backward_keys_wide": {
        "16-bit": (_tile(8, 1, M=32, N=64),),
        "16-bit sm_100": (_tile(4, 1, M=32, N=32),),
        _AMD: (_tile(8, 1, M=16, N=128),),
        "32-bit": (_tile(4, 1, M=16, N=16),),
    },
    "simple_gla_backward_queries_wide": {
        "16-bit": (_tile(8, 1, M=64, N=32),),
        "32-bit": (_tile(4, 2, M=16, N=16),),
    },
    "decays_backward": {"16-bit": (_tile(4, 1, L=128),), "32-bit": (_tile(4, 1, L=128),)},
    "weight_gradient": {
        "16-bit": (_tile(8, 3, M=128, N=128, K=64), _tile(4, 3, M=64, N=64, K=64)),
        _HOPPER: (*_WIDE, _tile(4, 3, M=64, N=64, K=64)),
        "16-bit sm_80 sm_86 sm_89": (_tile(8, 3, M=128, N=128, K=64), _tile(8, 3, M=64, N=64, K=64)),
        "16-bit sm_120": (_tile(8, 3, M=128, N=128, K=64), _tile(4, 3, M=64, N=64, K=32)),
        "32-bit": (_tile(8, 2, M=64, N=64, K=32),),
    },
    "weight_gradient_t": {
        "16-bit": (_tile(8, 3, M=128, N=128, K=64), _tile(4, 2, M=64, N=64, K=32)),
        _HOPPER: (*_WIDE, _tile(4, 2, M=64, N=64, K=32)),
        "32-bit": (_tile(4, 2, M=64, N=64, K=32),),
    },
    "sum_splits": {"16-bit": (_tile(4, 1, N=1024),), "32-bit": (_tile(4, 1, N=1024),)},
    "conv_swiglu_backward": {
        "16-bit": (_tile(8, 3, M=128, N=64, K=64), _tile(8, 2, M=128, N=64, K=32)),
        "32-bit": (_tile(4, 2, M=64, N=64, K=32),),
    },
    "gate_up_backward": {
        "16-bit": (_tile(8, 3, M=128, N=64, K=64), _tile(8, 2, M=128, N=64, K=32)),
        "32-bit": (_tile(4, 2, M=64, N=32, K=32),),
    },
    "conv_gradient": {"16-bit": (_tile(4, 1, M=32, N=64),), "32-bit": (_tile(4, 1, M=32, N=64),)},
    "mlp_t_backward": {
        "16-bit": (_tile(8, 2, N=128, I=32), _tile(4, 2, N=32, I=32)),
        _AMD: (_tile(4, 2, N=64, I=32), _tile(4, 2, N=32, I=32)),
    },
    "mlp_t_weight_gradient": {"16-bit": (_tile(8, 1, N=128, I=32),), _AMD: (_tile(4, 1, N=64, I=32),)},
    "mlp_t_norm_backward": {"16-bit": (_tile(4, 1, M=32, N=64),), "32-bit": (_tile(4, 1, M=32, N=64),)},
}
"""What every kernel may use."""


def most_parts(width: int) -> int:
    """The most tiles in which a kernel writes sums of squares of rows of so many elements, on any GPU."""
    kernels = (table for name, table in TILES.items() if name.endswith("_columns") or name == "normed_sum")
    tiles = (tile for table in kernels for tiles in table.values() for tile in tiles)
    narrowest = min(dict(tile.blocks)["BLOCK_N"] for tile in tiles)
    return max(2, -(-width // narrowest))  # 2 in the interpreter
