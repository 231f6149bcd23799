"""A float32 embedding table read in the compute dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmfast.nn import trunc_normal_init_

__all__ = ["CastedEmbedding"]


class CastedEmbedding(nn.Module):
    """Embedding with a float32 table ``embedding_weight`` [num_embeddings, embedding_dim] and output in ``cast_to``.

    The rows are cast after the look-up: the same values as a look-up in a cast table, but the gradients of the tokens
    that share a row are summed in float32.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, init_std: float, cast_to: torch.dtype) -> None:
        super().__init__()
        self.cast_to = cast_to
        self.embedding_weight = nn.Parameter(
            trunc_normal_init_(torch.empty(num_embeddings, embedding_dim), std=init_std)
        )

    def forward(self, ids: Tensor) -> Tensor:
        """ids: integers [...]; returns [..., embedding_dim]."""
        return F.embedding(ids, self.embedding_weight).to(self.cast_to)
