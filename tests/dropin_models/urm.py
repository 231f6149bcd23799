"""URM: one state, a list of blocks without a module around it, one carry for everything."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropin_models.layers import (
    Attention,
    CastedEmbedding,
    CastedLinear,
    CastedSparseEmbedding,
    ConvSwiGLU,
    RotaryEmbedding,
    Tables,
    rms_norm,
)


@dataclass
class URMCarry:
    current_hidden: Tensor
    steps: Tensor | None = None
    halted: Tensor | None = None
    current_data: dict[str, Tensor] | None = None


class URMBlock(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.self_attn = Attention(config.hidden_size, config.num_heads)
        self.mlp = ConvSwiGLU(config.hidden_size, config.expansion, getattr(torch, config.forward_dtype))
        self.norm_eps = config.rms_norm_eps

    def forward(self, cos_sin: Tables, hidden_states: Tensor) -> Tensor:
        mixed = self.self_attn(cos_sin=cos_sin, hidden_states=hidden_states)
        hidden_states = rms_norm(hidden_states + mixed, self.norm_eps)
        return rms_norm(hidden_states + self.mlp(hidden_states), self.norm_eps)


class URMInner(nn.Module):
    init_hidden: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.forward_dtype = getattr(torch, config.forward_dtype)
        D = config.hidden_size
        self.embed_scale = math.sqrt(D)
        self.embed_tokens = CastedEmbedding(config.vocab_size, D, 1 / self.embed_scale, self.forward_dtype)
        self.lm_head = CastedLinear(D, config.vocab_size)
        self.q_head = CastedLinear(D, 2, bias=True)
        self.puzzle_emb_len = math.ceil(config.puzzle_emb_ndim / D)
        if config.puzzle_emb_ndim:
            self.puzzle_emb = CastedSparseEmbedding(
                config.num_puzzle_identifiers, config.puzzle_emb_ndim, config.batch_size, self.forward_dtype
            )
        self.rotary_emb = RotaryEmbedding(D // config.num_heads, config.seq_len + self.puzzle_emb_len)
        self.layers = nn.ModuleList(URMBlock(config) for _ in range(config.num_layers))
        self.register_buffer("init_hidden", torch.randn(D, dtype=self.forward_dtype))

    def _input_embeddings(self, tokens: Tensor, puzzle_identifiers: Tensor) -> Tensor:
        embedding = self.embed_tokens(tokens.to(torch.int32))
        if self.config.puzzle_emb_ndim:
            puzzle = self.puzzle_emb(puzzle_identifiers)
            puzzle = F.pad(puzzle, (0, self.puzzle_emb_len * self.config.hidden_size - puzzle.shape[-1]))
            embedding = torch.cat((puzzle.view(-1, self.puzzle_emb_len, self.config.hidden_size), embedding), dim=-2)
        return self.embed_scale * embedding

    def empty_carry(self, batch_size: int) -> URMCarry:
        shape = (batch_size, self.config.seq_len + self.puzzle_emb_len, self.config.hidden_size)
        return URMCarry(torch.empty(shape, dtype=self.forward_dtype))

    def reset_carry(self, reset_flag: Tensor, carry: URMCarry) -> URMCarry:
        hidden = torch.where(reset_flag.view(-1, 1, 1), self.init_hidden, carry.current_hidden)
        return replace(carry, current_hidden=hidden)

    def _cycle(self, hidden_states: Tensor, x: Tensor, info: dict[str, Any]) -> Tensor:
        for _ in range(self.config.L_cycles):
            hidden_states = hidden_states + x
            for layer in self.layers:
                hidden_states = layer(hidden_states=hidden_states, **info)
        return hidden_states

    def forward(self, carry: URMCarry, batch: dict[str, Tensor]) -> tuple[URMCarry, Tensor, tuple[Tensor, Tensor]]:
        info = {"cos_sin": self.rotary_emb()}
        x = self._input_embeddings(batch["inputs"], batch["puzzle_identifiers"])
        hidden = carry.current_hidden
        with torch.no_grad():
            for _ in range(self.config.H_cycles - 1):
                hidden = self._cycle(hidden, x, info)
        hidden = self._cycle(hidden, x, info)
        q = self.q_head(hidden[:, 0]).to(torch.float32)
        logits = self.lm_head(hidden)[:, self.puzzle_emb_len :]
        return replace(carry, current_hidden=hidden.detach()), logits, (q[..., 0], q[..., 1])


class URM(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.inner = URMInner(self.config)

    @property
    def puzzle_emb(self) -> CastedSparseEmbedding:
        return self.inner.puzzle_emb

    def initial_carry(self, batch: dict[str, Tensor]) -> URMCarry:
        rows = batch["inputs"].shape[0]
        return URMCarry(
            self.inner.empty_carry(rows).current_hidden,
            torch.zeros(rows, dtype=torch.int32),
            torch.ones(rows, dtype=torch.bool),
            {key: torch.empty_like(value) for key, value in batch.items()},
        )

    def forward(self, carry: Any, batch: dict[str, Tensor]) -> tuple[URMCarry, dict[str, Tensor]]:
        halted = carry.halted
        new = self.inner.reset_carry(halted, carry)
        steps = torch.where(halted, 0, carry.steps)
        data = {
            key: torch.where(halted.view(-1, *(1,) * (batch[key].ndim - 1)), batch[key], old)
            for key, old in carry.current_data.items()
        }
        new, logits, (q_halt, q_continue) = self.inner(new, data)
        with torch.no_grad():
            steps = steps + 1
            halted = steps >= self.config.loops
            if self.training and self.config.loops > 1:
                halted = halted | (q_halt > 0)
                least = (torch.rand_like(q_halt) < 0.1) * torch.randint_like(steps, low=2, high=self.config.loops + 1)
                halted = halted & (steps >= least)
        outputs = {"logits": logits, "q_halt_logits": q_halt, "q_continue_logits": q_continue}
        return URMCarry(new.current_hidden, steps, halted, data), outputs
