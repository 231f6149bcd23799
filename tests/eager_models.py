"""TRM and HRM in plain eager PyTorch, written from the published description alone: what the models are compared with.

Nothing of trmfast is used here.  Parameters carry the published names, so that a state_dict loads in both directions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    def __init__(self, width_in: int, width_out: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width_out, width_in))
        self.bias = nn.Parameter(torch.empty(width_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        out = x @ self.weight.to(x.dtype).T
        return out if self.bias is None else out + self.bias.to(x.dtype)


class Table(nn.Module):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_weight = nn.Parameter(torch.empty(rows, width))


class Puzzles(nn.Module):
    weights: Tensor

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.register_buffer("weights", torch.empty(rows, width))


class SwiGLU(nn.Module):
    def __init__(self, width: int, expansion: float) -> None:
        super().__init__()
        self.inter = math.ceil(round(expansion * width * 2 / 3) / 256) * 256
        self.gate_up_proj = Linear(width, 2 * self.inter)
        self.down_proj = Linear(self.inter, width)

    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up_proj(x)
        gate, up = both[..., : self.inter], both[..., self.inter :]
        return self.down_proj(F.silu(gate) * up)


def norm(x: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + eps)).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.qkv_proj = Linear(width, 3 * heads * self.head_dim)
        self.o_proj = Linear(heads * self.head_dim, width)

    def forward(self, x: Tensor, angles: Tensor | None) -> Tensor:
        rows, length, _ = x.shape
        q, k, v = self.qkv_proj(x).view(rows, length, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        if angles is not None:
            q, k = self.rotate(q, angles), self.rotate(k, angles)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(self.head_dim)).softmax(-1)
        return self.o_proj((scores @ v).transpose(1, 2).reshape(rows, length, -1))

    def rotate(self, q: Tensor, angles: Tensor) -> Tensor:
        wide = q.to(torch.promote_types(q.dtype, torch.float32))
        first, second = wide[..., : self.head_dim // 2], wide[..., self.head_dim // 2 :]
        cos, sin = angles.cos().to(wide.dtype), angles.sin().to(wide.dtype)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(q.dtype)


class Block(nn.Module):
    def __init__(self, config: dict[str, Any], length: int) -> None:
        super().__init__()
        self.eps = config.get("rms_norm_eps", 1e-5)
        if config.get("mlp_t", False):
            self.mlp_t = SwiGLU(length, config["expansion"])
        else:
            self.self_attn = Attention(config["hidden_size"], config["num_heads"])
        self.mlp = SwiGLU(config["hidden_size"], config["expansion"])

    def forward(self, h: Tensor, angles: Tensor | None) -> Tensor:
        if hasattr(self, "mlp_t"):
            t = h.transpose(1, 2)
            h = norm(t + self.mlp_t(t), self.eps).transpose(1, 2)
        else:
            h = norm(h + self.self_attn(h, angles), self.eps)
        return norm(h + self.mlp(h), self.eps)


class Level(nn.Module):
    def __init__(self, config: dict[str, Any], depth: int, length: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config, length) for _ in range(depth))

    def forward(self, h: Tensor, angles: Tensor | None) -> Tensor:
        for layer in self.layers:
            h = layer(h, angles)
        return h


class EagerInner(nn.Module):
    """``kind`` is trm, trm_singlez, trm_hier6 or hrm; ``prefix`` the number of puzzle tokens."""

    def __init__(self, kind: str, config: dict[str, Any], prefix: int) -> None:
        super().__init__()
        self.kind, self.config, self.prefix = kind, config, prefix
        D, length = config["hidden_size"], config["seq_len"] + prefix
        self.dtype = getattr(torch, config["forward_dtype"])
        self.embed_tokens = Table(config["vocab_size"], D)
        self.lm_head = Linear(D, config["vocab_size"])
        self.q_head = Linear(D, 2, bias=True)
        if config["puzzle_emb_ndim"]:
            self.puzzle_emb = Puzzles(config["num_puzzle_identifiers"], config["puzzle_emb_ndim"])
        if config["pos_encodings"] == "learned":
            self.embed_pos = Table(length, D)
        if kind == "hrm":
            self.H_level = Level(config, config["H_layers"], length)
        self.L_level = Level(config, config["L_layers"], length)
        for name in self.inits():
            self.register_buffer(name, torch.empty(D, dtype=self.dtype))

    def inits(self) -> list[str]:
        names = {"trm_singlez": ["L_init"], "trm_hier6": ["H_init"] + [f"L{k}_init" for k in range(1, 7)]}
        return names.get(self.kind, ["H_init", "L_init"])

    def initial_states(self, rows: int) -> list[Tensor]:
        length = self.config["seq_len"] + self.prefix
        return [getattr(self, name).expand(rows, length, -1) for name in self.inits()]

    def angles(self) -> Tensor | None:
        if self.config["pos_encodings"] != "rope":
            return None
        width = self.config["hidden_size"] // self.config["num_heads"]
        inverse = 1.0 / (
            self.config.get("rope_theta", 10000.0) ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
        )
        return torch.outer(torch.arange(self.config["seq_len"] + self.prefix, dtype=torch.float32), inverse)

    def embed(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The input x, and the rows of the puzzle table as a leaf that takes a gradient."""
        D = self.config["hidden_size"]
        x = self.embed_tokens.embedding_weight.to(self.dtype)[batch["inputs"].long()]
        puzzle = None
        if self.config["puzzle_emb_ndim"]:
            puzzle = self.puzzle_emb.weights[batch["puzzle_identifiers"].long()].clone().requires_grad_()
            padding = torch.zeros(len(puzzle), self.prefix * D - puzzle.shape[1], dtype=self.dtype)
            tokens = torch.cat((puzzle.to(self.dtype), padding), 1).reshape(-1, self.prefix, D)
            x = torch.cat((tokens, x), 1)
        if self.config["pos_encodings"] == "learned":
            x = 0.707106781 * (x + self.embed_pos.embedding_weight.to(self.dtype))
        return math.sqrt(D) * x, puzzle

    def recur(self, states: list[Tensor], x: Tensor) -> list[Tensor]:
        angles, H_cycles, L_cycles = self.angles(), self.config["H_cycles"], self.config["L_cycles"]
        L = self.L_level
        high = self.H_level if self.kind == "hrm" else L
        for cycle in range(H_cycles):
            final = cycle == H_cycles - 1
            for step in range(L_cycles):
                with torch.set_grad_enabled(final and (self.kind != "hrm" or step == L_cycles - 1)):
                    if self.kind == "trm_singlez":
                        states = [L(states[0] + x, angles)]
                    elif self.kind == "trm_hier6":
                        states[1 + step] = L(sum(states[1:]) + (states[0] + x), angles)
                    else:
                        states = [states[0], L(states[1] + (states[0] + x), angles)]
            with torch.set_grad_enabled(final):
                if self.kind == "trm_singlez":
                    states = [L(states[0], angles)]
                else:
                    states = [high(states[0] + sum(states[1:]), angles), *states[1:]]
        return states

    def forward(
        self, states: list[Tensor], batch: dict[str, Tensor]
    ) -> tuple[list[Tensor], Tensor, Tensor, Tensor | None]:
        """New states without gradient, logits [B, S, V], q [B, 2] in float32, the puzzle rows."""
        x, puzzle = self.embed(batch)
        states = self.recur(list(states), x)
        logits = self.lm_head(states[0])[:, self.prefix :]
        return [z.detach() for z in states], logits, self.q_head(states[0][:, 0]).float(), puzzle


class EagerModel(nn.Module):
    """The wrapper, for the names only: ``inner.`` in front of every key."""

    def __init__(self, kind: str, config: dict[str, Any], prefix: int) -> None:
        super().__init__()
        self.inner = EagerInner(kind, config, prefix)
