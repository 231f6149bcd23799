"""TRM, its variants, HRM and the transformer baseline, each with its loop written out."""

from __future__ import annotations

import math
from dataclasses import dataclass
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
    RotaryEmbedding,
    SwiGLU,
    Tables,
    rms_norm,
)

Step = tuple[Any, Tensor, tuple[Tensor, Tensor]]


@dataclass
class InnerCarry:
    z_H: Tensor
    z_L: Tensor


@dataclass
class SingleCarry:
    z_L: Tensor


@dataclass
class SixCarry:
    z_H: Tensor
    z_L1: Tensor
    z_L2: Tensor
    z_L3: Tensor
    z_L4: Tensor
    z_L5: Tensor
    z_L6: Tensor


@dataclass
class BaselineCarry:
    z_H: Tensor


@dataclass
class Carry:
    inner_carry: Any
    steps: Tensor
    halted: Tensor
    current_data: dict[str, Tensor]


class Block(nn.Module):
    def __init__(self, config: Any, length: int) -> None:
        super().__init__()
        self.config = config
        if config.mlp_t:
            self.mlp_t = SwiGLU(length, config.expansion)
        else:
            self.self_attn = Attention(config.hidden_size, config.num_heads)
        self.mlp = SwiGLU(config.hidden_size, config.expansion)
        self.norm_eps = config.rms_norm_eps

    def forward(self, cos_sin: Tables | None, hidden_states: Tensor) -> Tensor:
        if self.config.mlp_t:
            across = hidden_states.transpose(1, 2)
            hidden_states = rms_norm(across + self.mlp_t(across), self.norm_eps).transpose(1, 2)
        else:
            mixed = self.self_attn(cos_sin=cos_sin, hidden_states=hidden_states)
            hidden_states = rms_norm(hidden_states + mixed, self.norm_eps)
        return rms_norm(hidden_states + self.mlp(hidden_states), self.norm_eps)


class Level(nn.Module):
    def __init__(self, layers: list[Block]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden_states: Tensor, input_injection: Tensor | None = None, **kwargs: Any) -> Tensor:
        if input_injection is not None:
            hidden_states = hidden_states + input_injection
        for layer in self.layers:
            hidden_states = layer(hidden_states=hidden_states, **kwargs)
        return hidden_states


class Inner(nn.Module):
    carry: type
    inits: tuple[str, ...]
    levels: tuple[str, ...] = ("L_level",)

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.forward_dtype = getattr(torch, config.forward_dtype)
        D = config.hidden_size
        self.embed_scale = math.sqrt(D)
        self.embed_tokens = CastedEmbedding(config.vocab_size, D, 1 / self.embed_scale, self.forward_dtype)
        self.lm_head = CastedLinear(D, config.vocab_size)
        self.q_head = CastedLinear(D, 2, bias=True)
        self.puzzle_emb_len = config.puzzle_emb_len
        length = config.seq_len + self.puzzle_emb_len
        if config.puzzle_emb_ndim:
            self.puzzle_emb = CastedSparseEmbedding(
                config.num_puzzle_identifiers, config.puzzle_emb_ndim, config.batch_size, self.forward_dtype
            )
        if config.pos_encodings == "rope":
            self.rotary_emb = RotaryEmbedding(D // config.num_heads, length)
        elif config.pos_encodings == "learned":
            self.embed_pos = CastedEmbedding(length, D, 1 / self.embed_scale, self.forward_dtype)
        for level in self.levels:
            depth = config.H_layers if level == "H_level" else config.L_layers
            setattr(self, level, Level([Block(config, length) for _ in range(depth)]))
        for name in self.inits:
            self.register_buffer(name, torch.randn(D, dtype=self.forward_dtype))
        with torch.no_grad():
            self.q_head.weight.mul_(0.1)

    def _input_embeddings(self, tokens: Tensor, puzzle_identifiers: Tensor) -> Tensor:
        embedding = self.embed_tokens(tokens.to(torch.int32))
        if self.config.puzzle_emb_ndim:
            puzzle = self.puzzle_emb(puzzle_identifiers)
            puzzle = F.pad(puzzle, (0, self.puzzle_emb_len * self.config.hidden_size - puzzle.shape[-1]))
            puzzle = puzzle.view(-1, self.puzzle_emb_len, self.config.hidden_size)
            embedding = torch.cat((puzzle, embedding), dim=-2)
        if self.config.pos_encodings == "learned":
            embedding = 0.707106781 * (embedding + self.embed_pos.embedding_weight.to(self.forward_dtype))
        return self.embed_scale * embedding

    def empty_carry(self, batch_size: int) -> Any:
        shape = (batch_size, self.config.seq_len + self.puzzle_emb_len, self.config.hidden_size)
        return self.carry(*(torch.empty(shape, dtype=self.forward_dtype) for _ in self.inits))

    def reset_carry(self, reset_flag: Tensor, carry: Any) -> Any:
        states = {}
        for name in self.inits:
            field = f"z_{name.removesuffix('_init')}"
            states[field] = torch.where(reset_flag.view(-1, 1, 1), getattr(self, name), getattr(carry, field))
        return self.carry(**states)

    def _start(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        tables = self.rotary_emb() if hasattr(self, "rotary_emb") else None
        return self._input_embeddings(batch["inputs"], batch["puzzle_identifiers"]), {"cos_sin": tables}

    def _finish(self, z: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q = self.q_head(z[:, 0]).to(torch.float32)
        return self.lm_head(z)[:, self.puzzle_emb_len :], (q[..., 0], q[..., 1])


class TRMInner(Inner):
    carry = InnerCarry
    inits = ("H_init", "L_init")
    L_level: Level

    def forward(self, carry: InnerCarry, batch: dict[str, Tensor]) -> Step:
        x, info = self._start(batch)
        z_H, z_L = carry.z_H, carry.z_L
        with torch.no_grad():
            for _ in range(self.config.H_cycles - 1):
                for _ in range(self.config.L_cycles):
                    z_L = self.L_level(z_L, z_H + x, **info)
                z_H = self.L_level(z_H, z_L, **info)
        for _ in range(self.config.L_cycles):
            z_L = self.L_level(z_L, z_H + x, **info)
        z_H = self.L_level(z_H, z_L, **info)
        return InnerCarry(z_H=z_H.detach(), z_L=z_L.detach()), *self._finish(z_H)


class SingleZInner(Inner):
    carry = SingleCarry
    inits = ("L_init",)
    L_level: Level

    def forward(self, carry: SingleCarry, batch: dict[str, Tensor]) -> Step:
        x, info = self._start(batch)
        z = carry.z_L
        with torch.no_grad():
            for _ in range(self.config.H_cycles - 1):
                for _ in range(self.config.L_cycles):
                    z = self.L_level(z + x, **info)
                z = self.L_level(z, **info)
        for _ in range(self.config.L_cycles):
            z = self.L_level(z + x, **info)
        z = self.L_level(z, **info)
        return SingleCarry(z_L=z.detach()), *self._finish(z)


class Hier6Inner(Inner):
    carry = SixCarry
    inits = ("H_init", *(f"L{k}_init" for k in range(1, 7)))
    L_level: Level

    def forward(self, carry: SixCarry, batch: dict[str, Tensor]) -> Step:
        x, info = self._start(batch)
        z_H = carry.z_H
        z = [carry.z_L1, carry.z_L2, carry.z_L3, carry.z_L4, carry.z_L5, carry.z_L6]
        for cycle in range(self.config.H_cycles):
            with torch.set_grad_enabled(torch.is_grad_enabled() and cycle == self.config.H_cycles - 1):
                for step in range(self.config.L_cycles):
                    total = z[0] + z[1] + z[2] + z[3] + z[4] + z[5]
                    z[step] = self.L_level(total, z_H + x, **info)
                total = z[0] + z[1] + z[2] + z[3] + z[4] + z[5]
                z_H = self.L_level(z_H, total, **info)
        return SixCarry(z_H.detach(), *(low.detach() for low in z)), *self._finish(z_H)


class HRMInner(Inner):
    carry = InnerCarry
    inits = ("H_init", "L_init")
    levels = ("H_level", "L_level")
    H_level: Level
    L_level: Level

    def forward(self, carry: InnerCarry, batch: dict[str, Tensor]) -> Step:
        x, info = self._start(batch)
        H, L = self.config.H_cycles, self.config.L_cycles
        with torch.no_grad():
            z_H, z_L = carry.z_H, carry.z_L
            for h in range(H):
                for low in range(L):
                    if (h, low) != (H - 1, L - 1):
                        z_L = self.L_level(z_L, z_H + x, **info)
                if h != H - 1:
                    z_H = self.H_level(z_H, z_L, **info)
        z_L = self.L_level(z_L, z_H + x, **info)
        z_H = self.H_level(z_H, z_L, **info)
        return InnerCarry(z_H=z_H.detach(), z_L=z_L.detach()), *self._finish(z_H)


class BaselineInner(Inner):
    carry = BaselineCarry
    inits = ("H_init",)
    levels = ("H_level",)
    H_level: Level

    def forward(self, carry: BaselineCarry, batch: dict[str, Tensor]) -> Step:
        x, info = self._start(batch)
        z_H = self.H_level(carry.z_H, x, **info)
        return BaselineCarry(z_H=z_H.detach()), *self._finish(z_H)


class ACTModel(nn.Module):
    """Feeds puzzles into halted rows and decides who halts."""

    inner_type: type[Inner]

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.inner = self.inner_type(self.config)

    @property
    def puzzle_emb(self) -> CastedSparseEmbedding:
        return self.inner.puzzle_emb

    def initial_carry(self, batch: dict[str, Tensor]) -> Carry:
        rows = batch["inputs"].shape[0]
        return Carry(
            self.inner.empty_carry(rows),
            torch.zeros(rows, dtype=torch.int32),
            torch.ones(rows, dtype=torch.bool),
            {key: torch.empty_like(value) for key, value in batch.items()},
        )

    def halts(self, q_halt: Tensor, q_continue: Tensor) -> Tensor:
        return q_halt > 0

    def lookahead(self, carry: Any, data: dict[str, Tensor], last: Tensor) -> dict[str, Tensor]:
        return {}

    def forward(self, carry: Carry, batch: dict[str, Tensor]) -> tuple[Carry, dict[str, Tensor]]:
        halted = carry.halted
        states = self.inner.reset_carry(halted, carry.inner_carry)
        steps = torch.where(halted, 0, carry.steps)
        data = {
            key: torch.where(halted.view(-1, *(1,) * (batch[key].ndim - 1)), batch[key], old)
            for key, old in carry.current_data.items()
        }
        states, logits, (q_halt, q_continue) = self.inner(states, data)
        outputs = {"logits": logits, "q_halt_logits": q_halt, "q_continue_logits": q_continue}
        with torch.no_grad():
            steps = steps + 1
            last = steps >= self.config.halt_max_steps
            halted = last
            if self.training and self.config.halt_max_steps > 1:
                halted = halted | self.halts(q_halt, q_continue)
                explore = torch.rand_like(q_halt) < self.config.halt_exploration_prob
                least = explore * torch.randint_like(steps, low=2, high=self.config.halt_max_steps + 1)
                halted = halted & (steps >= least)
                outputs |= self.lookahead(states, data, last)
        return Carry(states, steps, halted, data), outputs


class TRM(ACTModel):
    inner_type = TRMInner


class SingleZ(ACTModel):
    inner_type = SingleZInner


class Hier6(ACTModel):
    inner_type = Hier6Inner


class HRM(ACTModel):
    """Q-learning: a second forward of the inner module gives the target of q_continue."""

    inner_type = HRMInner

    def halts(self, q_halt: Tensor, q_continue: Tensor) -> Tensor:
        return q_halt > q_continue

    def lookahead(self, carry: Any, data: dict[str, Tensor], last: Tensor) -> dict[str, Tensor]:
        next_halt, next_continue = self.inner(carry, data)[-1]
        value = torch.where(last, next_halt, torch.maximum(next_halt, next_continue))
        return {"target_q_continue": torch.sigmoid(value)}


class Baseline(ACTModel):
    inner_type = BaselineInner

    def halts(self, q_halt: Tensor, q_continue: Tensor) -> Tensor:
        return q_halt > q_continue
