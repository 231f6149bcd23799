"""The puzzle embedding and its optimizer."""

from __future__ import annotations

import copy
import os
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from trmfast.models import CastedSparseEmbedding, CastedSparseEmbeddingSignSGD_Distributed

LR, DECAY = 0.5, 0.2


def embedding(dtype: torch.dtype = torch.float32) -> CastedSparseEmbedding:
    module = CastedSparseEmbedding(6, 4, batch_size=3, init_std=0, cast_to=dtype)
    with torch.no_grad():
        module.weights.copy_(torch.arange(24.0).view(6, 4) / 7)
    return module


def optimizer(
    module: CastedSparseEmbedding, world_size: int = 1, lr: float | Tensor = LR
) -> CastedSparseEmbeddingSignSGD_Distributed:
    return CastedSparseEmbeddingSignSGD_Distributed(module.buffers(), world_size=world_size, lr=lr, weight_decay=DECAY)


def updated(table: Tensor, grads: dict[int, Tensor]) -> Tensor:
    """The table after one step, row by row."""
    table = table.clone()
    for row, grad in grads.items():
        table[row] = table[row] * (1 - LR * DECAY) - LR * grad.sign()
    return table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_training_and_evaluation(dtype: torch.dtype) -> None:
    module = embedding(dtype)
    ids = torch.tensor([4, 0, 4], dtype=torch.int32)
    rows = module(ids)
    assert rows.dtype == dtype
    assert torch.equal(rows, module.weights[[4, 0, 4]].to(dtype))
    rows.float().square().sum().backward()
    assert module.local_weights.grad is not None
    assert module.local_weights.grad.dtype == torch.float32
    torch.testing.assert_close(module.local_weights.grad, 2 * rows.float())
    module.eval()
    out = module(torch.tensor([5]))  # any batch size
    assert torch.equal(out, module.weights[5:6].to(dtype))
    assert not out.requires_grad


def test_state_dict_holds_the_table_only() -> None:
    module = embedding()
    assert {k: v.dtype for k, v in module.state_dict().items()} == {"weights": torch.float32}
    assert not list(module.parameters())
    assert [buffer.requires_grad for buffer in module.buffers()] == [False, True, False]
    other = copy.deepcopy(module)
    other(torch.tensor([1, 2, 3])).sum().backward()
    assert module.local_weights.grad is None
    assert (module.local_ids == 0).all()


def test_a_step_touches_the_batch_rows_only() -> None:
    module = embedding()
    before = module.weights.clone()
    sgd = optimizer(module)
    sgd.step()  # no gradient yet: nothing happens
    assert torch.equal(module.weights, before)
    grads = torch.tensor([[1.0, -1.0, 0.0, 2.0], [3.0, 3.0, -3.0, 0.0], [-4.0, 0.5, 0.0, 2.0]])
    (module(torch.tensor([4, 0, 4], dtype=torch.int32)) * grads).sum().backward()
    sgd.step()
    # Row 4 came twice: its gradients are summed before the sign is taken.
    expected = updated(before, {4: grads[0] + grads[2], 0: grads[1]})
    torch.testing.assert_close(module.weights, expected)
    sgd.zero_grad()
    assert module.local_weights.grad is None


def test_closure_and_tensor_learning_rate() -> None:
    module = embedding()
    before = module.weights.clone()
    sgd = CastedSparseEmbeddingSignSGD_Distributed(
        module.buffers(), world_size=1, lr=torch.tensor(LR), weight_decay=DECAY
    )

    def closure() -> Tensor:
        loss: Tensor = module(torch.tensor([1, 2, 3])).sum()
        loss.backward()
        return loss

    assert float(sgd.step(closure).detach()) == pytest.approx(float(before[1:4].sum()))
    torch.testing.assert_close(module.weights, updated(before, {row: torch.ones(4) for row in (1, 2, 3)}))


RANK_IDS = [[4, 0, 4], [5, 4, 1]]


def rank_grads(rank: int) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(rank))


def run_rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    module = embedding()
    sgd = optimizer(module, world_size=2)
    (module(torch.tensor(RANK_IDS[rank], dtype=torch.int32)) * rank_grads(rank)).sum().backward()
    sgd.step()
    torch.save(module.weights, folder / f"rank{rank}")
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may abort an interpreter that ends (pytorch/pytorch#190489)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
@pytest.mark.breadth
def test_two_ranks_agree_on_the_sum(tmp_path: Path) -> None:
    processes = [get_context("spawn").Process(target=run_rank, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    tables = [torch.load(tmp_path / f"rank{rank}") for rank in range(2)]
    sums: dict[int, Any] = {}
    for rank in range(2):
        for row, grad in zip(RANK_IDS[rank], rank_grads(rank), strict=True):
            sums[row] = sums.get(row, 0) + grad
    assert torch.equal(tables[0], tables[1])
    torch.testing.assert_close(tables[0], updated(embedding().weights, sums))


def test_wrong_arguments_say_so_in_one_line() -> None:
    module = embedding()
    with pytest.raises(ValueError, match=r"puzzle_identifiers: got shape \[1\], accepted in training is \[3\]"):
        module(torch.tensor([1]))
    with pytest.raises(ValueError, match=r"lr: got -1, accepted are numbers >= 0"):
        CastedSparseEmbeddingSignSGD_Distributed(module.buffers(), world_size=1, lr=-1)
    with pytest.raises(ValueError, match="weight_decay: got -1"):
        CastedSparseEmbeddingSignSGD_Distributed(module.buffers(), world_size=1, weight_decay=-1)
    with pytest.raises(ValueError, match="world_size: got 0"):
        CastedSparseEmbeddingSignSGD_Distributed(module.buffers(), world_size=0)
    with pytest.raises(ValueError, match=r"params: got shapes \[6, 4\], accepted are the 3 buffers"):
        CastedSparseEmbeddingSignSGD_Distributed([module.weights], world_size=1)
