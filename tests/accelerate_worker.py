"""One of two processes: gradients of accelerated models under DDP, FSDP2 and a manual all_reduce; parts of our own
classes under FSDP2.

Started by test_accelerate_distributed.py through torchrun.  Prints one line for each combination that has given the
gradients of the plain model in a single process, and fails at the first that has not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import trmfast
from dropin_cases import TINY, inner_of, make, make_batch, same, step
from dropin_models import ACTLossHead

ROWS = 4


def endless(name: str, **extra: Any) -> Any:
    """A model whose rows go on whatever random numbers the halting draws, which are others for half of the rows."""
    model = make(name, **extra)
    with torch.no_grad():
        inner_of(model).q_head.bias.copy_(torch.tensor([-40.0, -20.0]))
    return model


def gradients(model: Any, head: Any, batch: dict[str, Tensor], factor: float = 1.0) -> dict[str, Tensor]:
    """Gradients after two supervision steps, the second one differentiated."""
    carry = model.initial_carry(batch)
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        carry, loss, _ = head(carry, batch)
        (loss * factor).backward()
    found = {}
    for key, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is not None:
            found[key] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
    return found


def sharded_whole(model: Any) -> None:
    fully_shard(model)


def sharded_blocks(model: Any) -> None:
    """As large models are sharded: every block on its own, then the networks, then what is left."""
    inner = inner_of(model)
    for net in (child for child in inner.children() if isinstance(child, nn.ModuleList) or hasattr(child, "layers")):
        for block in getattr(net, "layers", net):
            fully_shard(block)
        if not isinstance(net, nn.ModuleList):
            fully_shard(net)
    fully_shard(model)


def shards(prepare: Callable[[Any], None]) -> Callable[[Any, dict[str, Tensor]], dict[str, Tensor]]:
    def run(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        head = ACTLossHead(trmfast.accelerate(model))
        prepare(model)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        return gradients(model, head, batch, dist.get_world_size())

    return run


def data_parallel(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    head = DistributedDataParallel(ACTLossHead(trmfast.accelerate(model)))
    return gradients(model, head, batch, dist.get_world_size())


def accelerated_data_parallel(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    head = trmfast.accelerate(DistributedDataParallel(ACTLossHead(model)))
    return gradients(model, head, batch, dist.get_world_size())


def manual(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    found = gradients(model, ACTLossHead(trmfast.accelerate(model)), batch)
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
    return {key: p.grad for key, p in model.named_parameters() if key in found and p.grad is not None}


MODES = {
    "all_reduce": manual,
    "ddp": data_parallel,
    "accelerate after ddp": accelerated_data_parallel,
    "fsdp2 whole": shards(sharded_whole),
    "fsdp2 blocks": shards(sharded_blocks),
}


def compare(name: str, mode: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys(), (name, mode, found.keys() ^ expected.keys())
    for key, grad in found.items():
        error = (grad - expected[key]).abs().max() / expected[key].abs().max()
        assert error < 1e-4, (name, mode, key, error.item())
    if dist.get_rank() == 0:
        print(f"same gradients: {name}, {mode}", flush=True)


def restored_after_sharding(rank: int) -> None:
    """restore() under fully_shard gives the plain model's results bit for bit."""
    batch = {key: value[2 * rank : 2 * rank + 2] for key, value in make_batch("trm", rows=ROWS).items()}
    plain, model = make("trm", batch_size=2), trmfast.accelerate(make("trm", batch_size=2))
    cls = type(inner_of(plain))
    for sharded in (plain, model):
        fully_shard(sharded.inner)
        fully_shard(sharded)
    trmfast.restore(model)
    assert isinstance(model.inner, cls)
    assert same(states(model, batch), states(plain, batch))
    with pytest.raises(trmfast.UnsupportedModelError, match="accelerate before fully_shard"):
        trmfast.accelerate(plain)


def states(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return step(model, batch)


def mixed_precision(rank: int) -> None:
    """fully_shard casts parameters and inputs; the model computes in what it is given."""
    batch = {key: value[2 * rank : 2 * rank + 2] for key, value in make_batch("trm", rows=ROWS).items()}
    model = trmfast.accelerate(make("trm", scale=0.5, batch_size=2))
    expected = states(model, batch)["heads"]
    for block in model.inner.L_level.layers:
        fully_shard(block, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    fully_shard(model)
    got = states(model, batch)["heads"]
    assert 0 < (got - expected).norm() < 0.05 * expected.norm()


BARE = {"puzzle_emb_ndim": 0, "puzzle_emb_len": 0}
OWN = TINY | {"L_cycles": 3} | BARE
OWN_PARTS: dict[str, Callable[[Any], list[nn.Module]]] = {
    "whole": lambda model: [model],
    "network": lambda model: [model.inner.L_level],
    "block": lambda model: [model.inner.L_level.layers[0]],
    "MLP": lambda model: [model.inner.L_level.layers[1].mlp],
    "weight": lambda model: [model.inner.L_level.layers[0].mlp.down_proj],
    "heads": lambda model: [model.inner.lm_head, model.inner.q_head],
    "MLP, network, whole": lambda model: [model.inner.L_level.layers[0].mlp, model.inner.L_level, model],
}


def parts_of_own_classes(rank: int) -> None:
    """fully_shard of any module of trmfast.TRM gives the gradients of one process; other shards are refused."""
    whole = make_batch("trm", rows=ROWS)
    half = {key: value[2 * rank : 2 * rank + 2] for key, value in whole.items()}
    torch.manual_seed(0)
    plain = trmfast.TRM(OWN)
    plain.load_state_dict(endless("trm", **BARE).state_dict())
    expected = gradients(plain, ACTLossHead(plain), whole)
    for part, modules in OWN_PARTS.items():
        model: Any = trmfast.TRM(OWN | {"batch_size": 2})
        model.load_state_dict(plain.state_dict())
        for module in modules(model):
            fully_shard(module)
        found = gradients(model, ACTLossHead(model), half, dist.get_world_size())
        for key, parameter in model.named_parameters():
            if key in found and not isinstance(parameter, DTensor):
                dist.all_reduce(found[key])
                found[key] /= dist.get_world_size()
        compare("trmfast.TRM", part, found, expected)

    model = trmfast.TRM(OWN | {"batch_size": 2})
    linear = model.inner.L_level.layers[0].mlp.down_proj
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), init_device_mesh("cpu", (2,)), [Shard(0)]))
    with pytest.raises(TypeError, match=r"^weights\[3\]: got DTensor, accepted are Tensor, and DTensor only by fully"):
        gradients(model, ACTLossHead(model), half)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for name in ("trm", "hrm", "urm"):
        batch = make_batch(name, rows=ROWS)
        single = endless(name)
        expected = gradients(single, ACTLossHead(single), batch)
        half = {key: value[2 * rank : 2 * rank + 2] for key, value in batch.items()}
        for mode, run in MODES.items():
            compare(name, mode, run(endless(name, batch_size=2), half), expected)
    restored_after_sharding(rank)
    mixed_precision(rank)
    parts_of_own_classes(rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # Sharded models still hold their groups, and gloo's threads abort an interpreter that ends with one
    # (pytorch/pytorch#190489).
    sys.stdout.flush()
    os._exit(0)
