"""A model of the time of the CUDA engine's one launch (csrc/cuda), to compare with that of a plan of Triton launches.

Like roofline.py it is a model: nothing in it was measured.  A group of blocks takes one sequence through all layers of
all updates, and a layer takes as long as the slowest of

* the block's products, at one multiprocessor's rate for ``mma.sync``,
* its loads, through one multiprocessor's port: every block streams all weights of the layer, and reads the keys and
  values of its sequence,
* the loads of all resident blocks together, from the shared cache,

and a barrier of the group.  One block cannot draw weights faster than its port lets them through, so a narrow network
or a GPU with slow launches is what this engine is for; at width 512 tiles over all tokens spread one pass over the
weights across all multiprocessors.
"""

from __future__ import annotations

from math import ceil

from trmfast.kernels.architectures import Gpu
from trmfast.kernels.roofline import CACHE, GAP, MEMORY, TENSOR

from trmfast.problem import Problem

__all__ = ["BARRIER", "MMA_SYNC", "persistent_time"]

BARRIER = 1.5e-6
"""Seconds of one barrier over the blocks of a group, through counters in the shared cache."""
MMA_SYNC = {"sm_90": 0.62, "sm_100": 0.25}
"""What ``mma.sync`` reaches of the tensor cores' rate where newer instructions are faster."""


def persistent_time(
    gpu: Gpu, problem: Problem, batch: int, length: int, *, groups: int, group_blocks: int, rows: int, packed: int
) -> float:
    """Seconds of a forward pass.

    Args:
        gpu: the GPU.
        problem: program and networks; of equal blocks.
        batch, length: B and L.
        groups, group_blocks: of the grid.
        rows: tokens of a block of the grid.
        packed: elements of the packed weights of one layer, two bytes each.
    """
    block = problem.nets[0].block
    layers = sum(problem.nets[update.net].num_layers for update in problem.program.updates)
    head_width = block.num_heads * block.head_dim if block.token_mixer == "attention" else 0
    kv_width = block.num_kv_heads * block.head_dim if block.token_mixer == "attention" else block.hidden_size
    products = 2 * rows * packed + 4 * rows * length * head_width
    loads = 2 * (packed + 2 * length * kv_width)
    rate = gpu.tensor_flops / gpu.multiprocessors * TENSOR * MMA_SYNC.get(gpu.architecture, 1.0)
    resident = min(batch, groups) * group_blocks
    barriers = 0 if group_blocks == 1 else 1 if block.token_mixer == "attention" else 2
    layer = max(
        products / rate,
        loads / (gpu.port_bandwidth * CACHE),
        resident * loads / (gpu.cache_bandwidth * CACHE),
    )
    rounds = ceil(batch / groups)
    stored = sum(net.num_layers for net in problem.nets)
    packing = stored * (GAP + 6 * packed / (gpu.memory_bandwidth * MEMORY))
    return rounds * layers * (layer + barriers * BARRIER) + packing + GAP
