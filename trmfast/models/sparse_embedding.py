"""The puzzle embedding: a table of which each batch touches a few rows, and the sign-SGD optimizer for those rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from trmfast.layers import trunc_normal_init_

__all__ = ["CastedSparseEmbedding", "CastedSparseEmbeddingSignSGD_Distributed"]


class CastedSparseEmbedding(nn.Module):
    """An embedding table whose gradient exists only for the rows of the current batch.

    The table is a buffer, so that optimizers, weight decay and weight averages leave it alone.  In training the rows of
    the batch are copied to ``local_weights``, a leaf that takes the gradient.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: width of a row.
        batch_size: rows of every training batch.
        init_std: standard deviation of the initial table; 0 for zeros.
        cast_to: dtype of the output; table and gradient are float32.
    """

    weights: Tensor
    local_weights: Tensor
    local_ids: Tensor

    def __init__(
        self, num_embeddings: int, embedding_dim: int, batch_size: int, init_std: float, cast_to: torch.dtype
    ) -> None:
        super().__init__()
        self.cast_to = cast_to
        table = trunc_normal_init_(torch.empty(num_embeddings, embedding_dim), std=init_std)
        self.register_buffer("weights", table)
        local = torch.zeros(batch_size, embedding_dim, requires_grad=True)
        self.register_buffer("local_weights", local, persistent=False)
        self.register_buffer("local_ids", torch.zeros(batch_size, dtype=torch.int32), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Rows ``inputs`` (integers [B]) of the table, [B, embedding_dim] in ``cast_to``; in training with gradient.

        Raises:
            ValueError: a training batch of another size than ``batch_size``.
        """
        if not self.training:
            return self.weights[inputs].to(self.cast_to)
        if inputs.shape != self.local_ids.shape:
            raise ValueError(
                f"puzzle_identifiers: got shape {list(inputs.shape)}, "
                f"accepted in training is [{self.local_ids.shape[0]}], the config's batch_size"
            )
        with torch.no_grad():
            self.local_weights.copy_(self.weights[inputs])
            self.local_ids.copy_(inputs)
        return self.local_weights.to(self.cast_to)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CastedSparseEmbedding:
        # nn.Module would replace the leaf by fn(local_weights), which is none.  Tensors keep their identity where they
        # can, as parameters do, so that an optimizer built before stays valid.
        with torch.no_grad():
            for name, old in self._buffers.items():
                assert old is not None
                new = fn(old.detach())
                grad = None if old.grad is None else fn(old.grad)
                if torch._has_compatible_shallow_copy_type(old, new):
                    # A gradient must have the type of its tensor at all times.
                    old.grad = None
                    old.data = new
                    old.grad = grad
                    continue
                moved = new.detach().requires_grad_(old.requires_grad)
                moved.grad = grad
                self._buffers[name] = moved
                _leave(old)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        before = self.weights
        super()._load_from_state_dict(*args, **kwargs)
        if self.weights is before:
            return
        _leave(before)
        # load_state_dict(assign=True) gives a model on meta only its table; create the other buffers beside it.
        if self.local_weights.is_meta and not self.weights.is_meta:
            for name in ("local_weights", "local_ids"):
                old = self._buffers[name]
                assert old is not None
                made = torch.zeros_like(old, device=self.weights.device, requires_grad=old.requires_grad)
                self._buffers[name] = made
                _leave(old)


class CastedSparseEmbeddingSignSGD_Distributed(Optimizer):  # noqa: N801 (upstream's name)
    """Sign-SGD with decoupled weight decay on the rows that the last batch touched, over all ranks.

    A row's gradients are summed over the batches of all ranks, then
    ``row = row * (1 - lr * weight_decay) - lr * sign(sum)``: what Adam does to a rarely touched row.

    Args:
        params: the buffers of one :class:`CastedSparseEmbedding`, as from ``puzzle_emb.buffers()``.
        world_size: number of ranks; above 1 ``torch.distributed`` must be initialised.
        lr: learning rate.
        weight_decay: decay of the touched rows.

    Raises:
        ValueError: a negative rate or decay, or params that are not the three buffers of one embedding.
    """

    def __init__(self, params: Any, world_size: int, lr: float | Tensor = 1e-3, weight_decay: float = 1e-2) -> None:
        if not lr >= 0:
            raise ValueError(f"lr: got {lr}, accepted are numbers >= 0")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay: got {weight_decay}, accepted are numbers >= 0")
        if world_size < 1:
            raise ValueError(f"world_size: got {world_size}, accepted are integers >= 1")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "world_size": world_size})
        for group in self.param_groups:
            _buffers(group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the touched rows; does nothing without a gradient.

        Args:
            closure: recomputes the loss, with gradients, before the update.

        Raises:
            RuntimeError: the embedding has new buffers, for example after a move from the meta device.

        Returns:
            The result of ``closure``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            table, local, ids = _buffers(group["params"])
            if any(hasattr(buffer, "_trmfast_left") for buffer in (table, local, ids)):
                raise RuntimeError("params: the embedding's buffers were replaced, build the optimizer after the move")
            if local.grad is None:
                continue
            grad = _gather(local.grad, group["world_size"])
            rows, where = _gather(ids, group["world_size"]).unique(return_inverse=True)
            total = grad.new_zeros(rows.shape[0], grad.shape[1]).index_add_(0, where, grad)
            lr, decay = group["lr"], group["weight_decay"]
            table[rows] = table[rows] * (1.0 - lr * decay) - lr * total.sign()
        return loss


def _leave(buffer: Tensor) -> None:
    """Marks a replaced buffer, for the optimizer that still holds it."""
    buffer._trmfast_left = True  # type: ignore[attr-defined]


def _buffers(params: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(table [N, E], local rows with gradient [B, E], their ids [B])."""
    local = [p for p in params if p.requires_grad]
    ids = [p for p in params if not p.requires_grad and p.ndim == 1]
    table = [p for p in params if not p.requires_grad and p.ndim == 2]
    if len(params) != 3 or not (len(local) == len(ids) == len(table) == 1):
        shapes = ", ".join(str(list(p.shape)) for p in params)
        raise ValueError(f"params: got shapes {shapes}, accepted are the 3 buffers of one CastedSparseEmbedding")
    return table[0], local[0], ids[0]


def _gather(local: Tensor, world_size: int) -> Tensor:
    """``local`` of every rank, one after the other along dim 0."""
    if world_size == 1:
        return local
    gathered = local.new_empty(world_size * local.shape[0], *local.shape[1:])
    dist.all_gather(list(gathered.chunk(world_size)), local.contiguous())
    return gathered
