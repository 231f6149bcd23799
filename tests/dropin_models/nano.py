"""nano-trm: TRM in one module under other names, with a q head of one output and RoPE in two dimensions."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropin_models.layers import (
    CastedEmbedding,
    CastedLinear,
    CastedSparseEmbedding,
    RotaryEmbedding,
    RotaryEmbedding2D,
)
from dropin_models.recursive import Block, Carry, InnerCarry, Level


class NanoTRM(nn.Module):
    z_H_init: Tensor
    z_L_init: Tensor

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self._hparams = SimpleNamespace(**config)
        hp = self._hparams
        self.forward_dtype = getattr(torch, hp.forward_dtype)
        D = hp.hidden_size
        self.embed_scale = math.sqrt(D)
        self.input_embedding = CastedEmbedding(hp.vocab_size, D, 1 / self.embed_scale, self.forward_dtype)
        self.puzzle_emb_len = hp.puzzle_emb_len if hp.puzzle_emb_ndim else 0
        if hp.pos_encodings == "2d":
            side = math.isqrt(hp.seq_len)
            self.pos_embedding: nn.Module = RotaryEmbedding2D(D // hp.num_heads, self.puzzle_emb_len, side)
        elif hp.pos_encodings == "rope":
            self.pos_embedding = RotaryEmbedding(D // hp.num_heads, hp.seq_len + self.puzzle_emb_len)
        length = hp.seq_len + self.puzzle_emb_len
        self.lenet = Level([Block(hp, length) for _ in range(hp.L_layers)])
        self.lm_head = CastedLinear(D, hp.vocab_size)
        self.q_head = CastedLinear(D, 1, bias=True)
        self.carry: Any = None
        self.register_buffer("z_H_init", torch.randn(D, dtype=self.forward_dtype))
        self.register_buffer("z_L_init", torch.randn(D, dtype=self.forward_dtype))
        self.puzzle_emb = None
        if hp.puzzle_emb_ndim:
            self.puzzle_emb = CastedSparseEmbedding(
                hp.num_puzzle_identifiers, hp.puzzle_emb_ndim, hp.batch_size, self.forward_dtype
            )

    @property
    def hparams(self) -> Any:
        """As in Lightning, where the settings cannot be assigned."""
        return self._hparams

    def _input_embeddings(self, tokens: Tensor, puzzle_identifiers: Tensor) -> Tensor:
        embedding = self.input_embedding(tokens.to(torch.int32))
        if self.puzzle_emb is not None:
            puzzle = self.puzzle_emb(puzzle_identifiers)
            puzzle = F.pad(puzzle, (0, self.puzzle_emb_len * self.hparams.hidden_size - puzzle.shape[-1]))
            embedding = torch.cat((puzzle.view(-1, self.puzzle_emb_len, self.hparams.hidden_size), embedding), dim=-2)
        return self.embed_scale * embedding

    def empty_carry(self, batch_size: int, device: torch.device) -> InnerCarry:
        shape = (batch_size, self.hparams.seq_len + self.puzzle_emb_len, self.hparams.hidden_size)
        return InnerCarry(*(torch.empty(shape, dtype=self.forward_dtype, device=device) for _ in range(2)))

    def reset_carry(self, reset_flag: Tensor, carry: InnerCarry) -> InnerCarry:
        flag = reset_flag.view(-1, 1, 1)
        return InnerCarry(torch.where(flag, self.z_H_init, carry.z_H), torch.where(flag, self.z_L_init, carry.z_L))

    def initial_carry(self, batch: dict[str, Tensor]) -> Carry:
        rows, device = batch["input"].shape[0], batch["input"].device
        return Carry(
            self.empty_carry(rows, device),
            torch.zeros(rows, dtype=torch.int32, device=device),
            torch.ones(rows, dtype=torch.bool, device=device),
            {key: torch.empty_like(value) for key, value in batch.items()},
        )

    def inner_forward(self, carry: InnerCarry, batch: dict[str, Tensor]) -> tuple[InnerCarry, Tensor, Tensor]:
        info: dict[str, Any] = {"cos_sin": self.pos_embedding() if hasattr(self, "pos_embedding") else None}
        x = self._input_embeddings(batch["input"], batch["puzzle_identifiers"])
        z_H, z_L = carry.z_H, carry.z_L
        with torch.no_grad():
            for _ in range(self.hparams.H_cycles - 1):
                for _ in range(self.hparams.L_cycles):
                    z_L = self.lenet(z_L, z_H + x, **info)
                z_H = self.lenet(z_H, z_L, **info)
        for _ in range(self.hparams.L_cycles):
            z_L = self.lenet(z_L, z_H + x, **info)
        z_H = self.lenet(z_H, z_L, **info)
        q = self.q_head(z_H[:, 0]).to(torch.float32)
        return InnerCarry(z_H.detach(), z_L.detach()), self.lm_head(z_H)[:, self.puzzle_emb_len :], q[..., 0]

    def forward(self, carry: Carry, batch: dict[str, Tensor]) -> tuple[Carry, dict[str, Tensor]]:
        halted = carry.halted
        states = self.reset_carry(halted, carry.inner_carry)
        steps = torch.where(halted, 0, carry.steps)
        data = {
            key: torch.where(halted.view(-1, *(1,) * (batch[key].ndim - 1)), batch[key], old)
            for key, old in carry.current_data.items()
        }
        states, logits, q_halt = self.inner_forward(states, data)
        with torch.no_grad():
            steps = steps + 1
            most = self.hparams.halt_max_steps
            halted = steps >= most
            if self.training and most > 1:
                halted = halted | (q_halt > 0)
                explore = torch.rand_like(q_halt) < self.hparams.halt_exploration_prob
                halted = halted & (steps >= explore * torch.randint_like(steps, low=2, high=most + 1))
        return Carry(states, steps, halted, data), {"logits": logits, "q_halt_logits": q_halt}
