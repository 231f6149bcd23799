"""The rival: TRM and HRM in eager PyTorch, operation for operation as the published code runs them.

Weights are float32 and cast to the compute dtype at every call, attention is PyTorch's fused one, norms and rotation
are float32, autograd keeps every activation of the gradient window.  Embeddings, heads, halting and losses are those of
:mod:`trmfast.models`, so that a comparison measures the recursion alone; parameters carry the published names, so that
a state_dict loads in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmfast.models import HRM, TRM, ACTModel, ModelConfig
from trmfast.models.inner import Family, Inner
from trmfast.nn import CastedLinear
from trmfast.reference import summed_input, wide_dtype
from trmfast.spec import swiglu_width

__all__ = ["EagerHRM", "EagerInner", "EagerTRM"]

CosSin = tuple[Tensor, Tensor]


def _rms_norm(h: Tensor, eps: float) -> Tensor:
    wide = h.to(wide_dtype(h.dtype))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(h.dtype)


def _rotate(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """q: [B, L, heads, head_dim]; cos, sin: float32 [L, head_dim]."""
    wide = q.to(wide_dtype(q.dtype))
    low, high = wide.chunk(2, dim=-1)
    turned = torch.cat((-high, low), dim=-1)
    return (wide * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)).to(q.dtype)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.qkv_proj = CastedLinear(width, 3 * heads * self.head_dim)
        self.o_proj = CastedLinear(heads * self.head_dim, width)

    def forward(self, h: Tensor, cos_sin: CosSin | None) -> Tensor:
        batch, length, _ = h.shape
        q, k, v = self.qkv_proj(h).view(batch, length, 3, self.heads, self.head_dim).unbind(2)
        if cos_sin is not None:
            q, k = _rotate(q, *cos_sin), _rotate(k, *cos_sin)
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))


class SwiGLU(nn.Module):
    def __init__(self, width: int, expansion: float) -> None:
        super().__init__()
        inner = swiglu_width(width, expansion)
        self.gate_up_proj = CastedLinear(width, 2 * inner)
        self.down_proj = CastedLinear(inner, width)

    def forward(self, h: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(h).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.mixes_tokens_by_mlp = config.mlp_t
        if config.mlp_t:
            self.mlp_t = SwiGLU(config.total_len, config.expansion)
        else:
            self.self_attn = Attention(config.hidden_size, config.num_heads)
        self.mlp = SwiGLU(config.hidden_size, config.expansion)

    def forward(self, h: Tensor, cos_sin: CosSin | None) -> Tensor:
        if self.mixes_tokens_by_mlp:
            t = h.transpose(1, 2)
            h = _rms_norm(t + self.mlp_t(t), self.eps).transpose(1, 2)
        else:
            h = _rms_norm(h + self.self_attn(h, cos_sin), self.eps)
        return _rms_norm(h + self.mlp(h), self.eps)


class Stack(nn.Module):
    """A network: blocks one after the other."""

    def __init__(self, config: ModelConfig, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(depth))

    def forward(self, h: Tensor, cos_sin: CosSin | None) -> Tensor:
        for layer in self.layers:
            h = layer(h, cos_sin)
        return h


class EagerInner(Inner):
    """:class:`Inner` with its networks applied one update at a time."""

    def __init__(self, config: ModelConfig, family: Family) -> None:
        super().__init__(config, family)
        for name, depth in family.nets:
            setattr(self, name, Stack(config, getattr(config, depth)))
        self._recur: Callable[..., list[Tensor]] = self._recur_eagerly

    def compile(self, scope: str) -> None:
        """Has torch.compile run the recursion.

        Args:
            scope: ``"recursion"``, all updates as one graph, minutes of compilation; or ``"network"``, one network as a
                function of its weights, which all updates share.  There the weights are cast to the compute dtype once
                a step and not at every application, which is what a compiler makes of the whole recursion too.

        Raises:
            ValueError: another scope.
        """
        if scope not in ("network", "recursion"):
            raise ValueError(f"scope: got {scope!r}, accepted are 'network' and 'recursion'")
        if scope == "recursion":
            self._recur = torch.compile(self._recur_eagerly, dynamic=False)
            return
        with torch.device("meta"):
            skeleton = Stack(self.config, self.config.L_layers)

        def apply(weights: dict[str, Tensor], h: Tensor, cos_sin: CosSin | None) -> Tensor:
            return cast(Tensor, torch.func.functional_call(skeleton, weights, (h, cos_sin)))

        compiled = torch.compile(apply, dynamic=False)

        def recur(states: Sequence[Tensor], x: Tensor) -> list[Tensor]:
            weights = [{name: p.to(x.dtype) for name, p in net.named_parameters()} for net in self._nets()]
            # Without a gradient the compiled code must not see that the weights have one: it would be compiled again.
            constants = [{name: w.detach() for name, w in net.items()} for net in weights]

            def net(index: int, h: Tensor, cos_sin: CosSin | None) -> Tensor:
                return compiled((weights if torch.is_grad_enabled() else constants)[index], h, cos_sin)

            return self._updates(net, states, x)

        self._recur = recur

    def recur(self, states: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        """The recursion, compiled if asked for; states and x: [B, L, D] in the forward dtype."""
        return self._recur(states, x)

    def _nets(self) -> list[Stack]:
        return [cast(Stack, getattr(self, name)) for name, _ in self.family.nets]

    def _recur_eagerly(self, states: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        nets = self._nets()
        return self._updates(lambda index, h, cos_sin: nets[index](h, cos_sin), states, x)

    def _updates(
        self, net: Callable[[int, Tensor, CosSin | None], Tensor], states: Sequence[Tensor], x: Tensor
    ) -> list[Tensor]:
        cos_sin = self.rotary_emb() if self.config.uses_rope else None
        current, grad = list(states), torch.is_grad_enabled()
        for update in self.program.updates:
            with torch.set_grad_enabled(update.grad and grad):
                current[update.dst] = net(update.net, summed_input(update, current, x), cos_sin)
        return current

    def forward(self, carry: Any, batch: dict[str, Tensor]) -> tuple[Any, Tensor, tuple[Tensor, Tensor]]:
        """As :meth:`Inner.forward`."""
        identifiers = batch["puzzle_identifiers"] if self.config.puzzle_emb_ndim > 0 else None
        states = self.recur(self._states(carry), self._input_embeddings(batch["inputs"], identifiers))
        head = states[self.family.head]
        q = self.q_head(head[:, 0]).to(torch.float32)
        logits = self.lm_head(head)[:, self.puzzle_emb_len :]
        return self.family.carry(*(z.detach() for z in states)), logits, (q[..., 0], q[..., 1])


class EagerModel(ACTModel):
    def __init__(self, config_dict: Mapping[str, Any]) -> None:
        super().__init__(config_dict)
        self.inner = EagerInner(self.config, self.family)


class EagerTRM(EagerModel, TRM):
    """:class:`trmfast.TRM` without the fused recursion."""


class EagerHRM(EagerModel, HRM):
    """:class:`trmfast.HRM` without the fused recursion."""
