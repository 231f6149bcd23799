"""Stand-ins for HRM-Text of transformers and for Ouro: the names, settings and arithmetic of their modules, without
caches, written for these tests."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["HrmText", "LanguageModel", "Ouro"]

D, INNER, HEADS, VOCABULARY = 32, 48, 2, 19


@dataclass
class BaseModelOutputWithPast:
    last_hidden_state: Tensor
    past_key_values: Any = None


class Norm(nn.Module):
    def __init__(self, eps_name: str, weighted: bool) -> None:
        super().__init__()
        self.eps_name = eps_name
        setattr(self, eps_name, 1e-6)
        if weighted:
            self.weight = nn.Parameter(1 + 0.1 * torch.randn(D))

    def forward(self, h: Tensor) -> Tensor:
        wide = h.float()
        normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + getattr(self, self.eps_name))).to(h.dtype)
        return self.weight * normed if "weight" in self._parameters else normed


class Attention(nn.Module):
    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.head_dim, self.scaling, self.attention_dropout = D // HEADS, (D // HEADS) ** -0.5, 0.0
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", *(["gate_proj"] if gated else [])):
            self.add_module(name, nn.Linear(D, D, bias=False))

    def forward(self, h: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        def heads(name: str) -> Tensor:
            return self._modules[name](h).unflatten(-1, (HEADS, self.head_dim)).transpose(1, 2)  # type: ignore[misc]

        def turned(q: Tensor) -> Tensor:
            low, high = q.chunk(2, -1)
            return q * tables[0][:, None] + torch.cat((-high, low), -1) * tables[1][:, None]

        q, k, v = turned(heads("q_proj")), turned(heads("k_proj")), heads("v_proj")
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None], scale=self.scaling)
        if "gate_proj" in self._modules:
            mixed = torch.sigmoid(heads("gate_proj")) * mixed
        out: Tensor = self.get_submodule("o_proj")(mixed.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(D, INNER, bias=False), nn.Linear(D, INNER, bias=False)
        self.down_proj, self.act_fn = nn.Linear(INNER, D, bias=False), nn.SiLU()

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(h)) * self.up_proj(h))
        return out


class Layer(nn.Module):
    def __init__(self, sandwich: bool) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(gated=not sandwich), MLP()
        eps = "variance_epsilon" if sandwich else "eps"
        for name in ("input_layernorm", "post_attention_layernorm"):
            self.add_module(name, Norm(eps, sandwich))
            if sandwich:
                self.add_module(f"{name}_2", Norm(eps, sandwich))

    def forward(self, h: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        def normed(name: str, h: Tensor) -> Tensor:
            norm = self._modules.get(name)
            return h if norm is None else norm(h)

        h = h + normed("input_layernorm_2", self.self_attn(normed("input_layernorm", h), tables, mask))
        mixed = self.mlp(normed("post_attention_layernorm", h))
        return h + normed("post_attention_layernorm_2", mixed)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(sandwich=False) for _ in range(2))
        self.final_norm = Norm("eps", weighted=False)

    def forward(self, h: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer(h, tables, mask)
        out: Tensor = self.final_norm(h)
        return out


class Rotary(nn.Module):
    def forward(self, h: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        width = D // HEADS
        angles = position_ids[..., None] * 1e4 ** (-torch.arange(0, width, 2) / width)
        return angles.cos().repeat(1, 1, 2).to(h.dtype), angles.sin().repeat(1, 1, 2).to(h.dtype)


def seen(h: Tensor, mask: Tensor | None, prefix: Tensor | None) -> Tensor:
    """bool [B, L, L]: what each token sees; a row of padding sees itself, so that no softmax is empty."""
    causal = torch.ones(h.shape[1], h.shape[1]).tril().bool().expand(len(h), -1, -1)
    if prefix is not None:
        causal = causal | (prefix[:, :, None] & prefix[:, None])
    if mask is not None:
        causal = causal & mask.bool()[:, None]
    return causal | torch.eye(h.shape[1]).bool()


class HrmText(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            H_cycles=2, L_cycles=3, prefix_lm=True, num_layers_per_stack=2, _attn_implementation="sdpa"
        )
        self.embed_tokens, self.rotary_emb = nn.Embedding(VOCABULARY, D), Rotary()
        self.H_module, self.L_module = Stack(), Stack()
        self.z_L_init = nn.Parameter(torch.randn(D), requires_grad=False)
        self.embedding_scale, self.L_bp_cycles_padded = 2.0, [1, 1, 2]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        h = (self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds) * self.embedding_scale
        tables = self.rotary_emb(h, torch.arange(h.shape[1])[None] if position_ids is None else position_ids)
        mask = seen(h, attention_mask, None if token_type_ids is None else token_type_ids == 1)
        z_H, z_L = h, self.z_L_init.to(h.dtype).expand_as(h)
        for i in range(self.config.H_cycles):
            for k in range(self.config.L_cycles):
                grad = k >= self.config.L_cycles - self.L_bp_cycles_padded[i]
                with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
                    z_L = self.L_module(z_L + z_H, tables, mask)
            z_H = self.H_module(z_H + z_L, tables, mask)
        return BaseModelOutputWithPast(z_H, "a cache" if use_cache else None)


class Ouro(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=2, _attn_implementation="sdpa")
        self.embed_tokens, self.rotary_emb = nn.Embedding(VOCABULARY, D), Rotary()
        self.layers = nn.ModuleList(Layer(sandwich=True) for _ in range(2))
        self.norm, self.early_exit_gate = Norm("variance_epsilon", weighted=True), nn.Linear(D, 1)
        self.total_ut_steps = 3

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> tuple[BaseModelOutputWithPast, list[Tensor], list[Tensor]]:
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        tables = self.rotary_emb(h, torch.arange(h.shape[1])[None] if position_ids is None else position_ids)
        mask, states = seen(h, attention_mask, None), []
        for _step in range(self.total_ut_steps):
            for layer in self.layers[: self.config.num_hidden_layers]:
                h = layer(h, tables, mask)
            h = self.norm(h)
            states.append(h)
        out = BaseModelOutputWithPast(h, "a cache" if use_cache else None)
        return out, states, [self.early_exit_gate(state) for state in states]


class LanguageModel(nn.Module):
    """A model with its head; returns logits, of Ouro those of every step."""

    def __init__(self, model: HrmText | Ouro) -> None:
        super().__init__()
        self.model, self.lm_head = model, nn.Linear(D, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, **given: Any) -> Tensor:
        out: Any = self.model(input_ids=input_ids, **given)
        states = [out.last_hidden_state] if isinstance(out, BaseModelOutputWithPast) else out[1]
        gates = [] if isinstance(out, BaseModelOutputWithPast) else out[2]
        return torch.cat([*(self.lm_head(state) for state in states), *gates], -1)
