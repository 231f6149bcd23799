"""The bytes that the CUDA engine's one launch (csrc/cuda) moves, and a model of its time to compare with Triton's.

The bytes are exact: tests/test_cuda_emulated.py counts the same in the emulator.  The time is a model like that of
roofline.py: nothing in it was measured.  A group of blocks takes one sequence through all layers of all updates, and a
layer takes as long as the slowest of

* a block's products, at one multiprocessor's rate for ``mma.sync``,
* its loads, through one multiprocessor's port: every block streams all weights of the layer (for ``mlp_t``, those over
  tokens once for each of its strips of channels), and reads the keys and values of its sequence,
* the loads of all resident blocks together, from the shared cache,

and the barriers of the group.  A block cannot load weights faster than its port allows, so this engine is for narrow
networks and for GPUs with slow launches.  At width 512, Triton's tiles over all tokens spread one pass over the weights
across all multiprocessors.  The choice among the engine's instances (csrc/cuda/launch_shape.h) uses the same constants.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from trmfast.kernels.architectures import Gpu
from trmfast.kernels.roofline import CACHE, GAP, MEMORY, TENSOR

from trmfast.problem import Problem

__all__ = [
    "BARRIER",
    "GAIN",
    "MMA_SYNC",
    "Grid",
    "Traffic",
    "cache_blocks",
    "persistent_time",
    "persistent_traffic",
    "stream_rows",
]

BARRIER = 1.5e-6
"""Seconds of one barrier over the blocks of a group, through counters in the shared cache."""
MMA_SYNC = {"sm_90": 0.62, "sm_100": 0.25}
"""What ``mma.sync`` reaches of the tensor cores' rate where newer instructions are faster."""

GAIN = 1.1
"""``backend="auto"`` takes the engine if it is modelled this many times faster than Triton's launches: neither model
resolves a few percent."""


@dataclass(frozen=True)
class Grid:
    """How the engine runs a problem, as csrc/cuda/launch_shape.h decides.

    Attributes:
        groups, group_blocks: groups of the grid, and blocks in each.
        rows: tokens of a block.
        channels: of a strip (mlp_t).
        packed: elements of the packed weights of one layer, two bytes each.
        token_packed: how many of them belong to the SwiGLU over tokens (mlp_t).
        head_width: channels of a head with its padding (attention).
    """

    groups: int
    group_blocks: int
    rows: int
    channels: int
    packed: int
    token_packed: int
    head_width: int


@dataclass(frozen=True)
class Traffic:
    """Bytes that the blocks of one launch load from and store to global memory, that is, mostly the shared cache.

    Attributes:
        weights: packed weights.
        tables: cosines and sines.
        exchange: keys and values, or rows and strips, between the blocks of a group.
        states: states and x, and what is saved for backward.
        compulsory: the part of ``states`` that no kernel avoids: states and x in, states and the gradient window out.
    """

    weights: int
    tables: int
    exchange: int
    states: int
    compulsory: int

    @property
    def activations(self) -> int:
        """Exchange and states."""
        return self.exchange + self.states


def persistent_traffic(
    problem: Problem, batch: int, length: int, grid: Grid, *, save: bool = True, rope: bool = True
) -> Traffic:
    """Bytes of a forward pass.

    Args:
        problem: program and networks; of equal blocks.
        batch, length: B and L.
        grid: how it is run.
        save: whether the gradient window is written.
        rope: whether queries and keys are rotated.
    """
    block, program = problem.nets[0].block, problem.program
    layers = _layers(problem)
    tensor = 2 * batch * length * block.hidden_size
    if block.token_mixer == "attention":
        padded = grid.group_blocks * grid.rows
        keys = 2 * grid.head_width * 2 * block.num_kv_heads * padded
        exchange = keys + sum(_key_loads(problem, length, grid, rank) for rank in range(grid.group_blocks))
        tables = 8 * padded * (block.num_heads + block.num_kv_heads) * block.head_dim if rope else 0
        weights = grid.group_blocks * grid.packed
    else:
        exchange, tables = 4 * 2 * length * block.hidden_size, 0
        strips = ceil(block.hidden_size / grid.channels)
        weights = strips * grid.token_packed + grid.group_blocks * (grid.packed - grid.token_packed)
    written = {update.dst for update in program.counts()}
    passed = len(program.states) - len(written)
    operands = sum(len(update.sources) + update.inject_x + 1 for update in program.updates)
    saved = problem.num_grad_updates if save else 0
    return Traffic(
        weights=batch * layers * 2 * weights,
        tables=batch * layers * tables,
        exchange=batch * layers * exchange,
        states=tensor * (operands + 2 * passed + saved),
        compulsory=tensor * (2 * len(program.states) + problem.uses_x + saved),
    )


def persistent_time(gpu: Gpu, problem: Problem, batch: int, length: int, grid: Grid) -> float:
    """Seconds of a forward pass.

    Args:
        gpu: the GPU.
        problem: program and networks; of equal blocks.
        batch, length: B and L.
        grid: how it is run.
    """
    block = problem.nets[0].block
    if block.token_mixer == "attention":
        barriers = 1
        # The last block of a group sees the most keys.
        loads = 2 * grid.packed + _key_loads(problem, length, grid, grid.group_blocks - 1)
        loads += 8 * grid.rows * (block.num_heads + block.num_kv_heads) * block.head_dim
        products = 2 * grid.rows * grid.packed + 4 * grid.rows * length * block.num_heads * grid.head_width
    else:
        barriers = 2
        strips = ceil(ceil(block.hidden_size / grid.channels) / grid.group_blocks)
        over_channels = grid.packed - grid.token_packed
        loads = 2 * (strips * grid.token_packed + over_channels)
        loads += 2 * (strips * grid.channels * length + grid.rows * block.hidden_size)
        products = 2 * (strips * grid.channels * grid.token_packed + grid.rows * over_channels)
    rate = _product_rate(gpu)
    resident = min(batch, grid.groups) * grid.group_blocks
    layer = max(
        products / rate,
        loads / (gpu.port_bandwidth * CACHE),
        resident * loads / (gpu.cache_bandwidth * CACHE),
    )
    if grid.group_blocks > 1:
        layer += barriers * BARRIER
    stored = sum(net.num_layers for net in problem.nets)
    packing = stored * (GAP + 6 * grid.packed / (gpu.memory_bandwidth * MEMORY))
    return ceil(batch / grid.groups) * _layers(problem) * layer + packing + GAP


def stream_rows(gpu: Gpu) -> int:
    """Rows of a block whose products take as long as its two-byte weights take through a multiprocessor's port."""
    return round(_product_rate(gpu) / (gpu.port_bandwidth * CACHE))


def cache_blocks(gpu: Gpu) -> int:
    """Blocks that saturate the shared cache."""
    return round(gpu.cache_bandwidth / gpu.port_bandwidth)


def _product_rate(gpu: Gpu) -> float:
    """FLOP/s of one multiprocessor with ``mma.sync``."""
    return gpu.tensor_flops / gpu.multiprocessors * TENSOR * MMA_SYNC.get(gpu.architecture, 1.0)


def _layers(problem: Problem) -> int:
    """Applications of a layer in the program."""
    return sum(problem.nets[update.net].num_layers for update in problem.program.updates)


def _key_loads(problem: Problem, length: int, grid: Grid, rank: int) -> int:
    """Bytes of keys and values that a block of a group loads in a layer.

    A warp takes 32 rows of a head, or 16 of a wide one, and loads all keys and values that they see, 16 at a time; the
    last keys once more than it needs them.
    """
    block = problem.nets[0].block
    rows = 16 if grid.head_width == 128 else min(32, grid.rows)
    steps = 0
    for part in range(grid.rows // rows):
        seen = min(length, rank * grid.rows + (part + 1) * rows) if block.causal else length
        steps += 2 * ceil(seen / 16) + 1
    return block.num_heads * steps * 16 * grid.head_width * 2
