"""The rival: TRM, HRM and URM in eager PyTorch, operation for operation as the published code runs them.

Weights are float32 and cast to the compute dtype at every call, attention is PyTorch's fused one, norms and rotation
are float32, autograd keeps every activation of the gradient window.  Embeddings, heads, halting and losses are those of
:mod:`trmfast.models`, so that a comparison measures the recursion alone; parameters carry the published names, so that
a state_dict loads in both directions.  :class:`EagerRecursion` is a recursion without the model around it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmfast.layers import CastedLinear
from trmfast.models import HRM, TRM, ACTModel, ModelConfig
from trmfast.models.inner import Family, Inner
from trmfast.problem import Problem, unsupported
from trmfast.program import RecursionProgram
from trmfast.reference import summed_input, wide_dtype
from trmfast.spec import BlockSpec, NetSpec

__all__ = ["EagerHRM", "EagerInner", "EagerRecursion", "EagerTRM", "Stack", "Stacks", "apply_updates", "with_own_code"]

CosSin = tuple[Tensor, Tensor]
Apply = Callable[[int, Tensor, "CosSin | None"], Tensor]
"""(index of the network, h [B, L, D], RoPE tables) -> [B, L, D]"""
# The options of the networks here, see :func:`trmfast.problem.unsupported`.
CHOICES: dict[str, Container[object]] = {
    "token_mixer": ("attention", "mlp_t"),
    "channel_mixer": ("swiglu", "conv_swiglu"),
    "causal": (False, True),
    "norm_placement": ("post", "pre"),
    "gate": ("none", "channel"),
    "final_norm": (False, True),
}
Recur = Callable[[RecursionProgram, Sequence[Tensor], "Tensor | None", "CosSin | None"], list[Tensor]]


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
    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.causal = (
            *(spec.num_heads, spec.num_kv_heads),
            *(spec.head_dim, spec.causal),
        )
        query, self.gates = self.heads * self.head_dim, spec.gate_rows
        rows = query + 2 * self.kv_heads * self.head_dim
        if self.gates:
            self.gqkv_proj = CastedLinear(spec.hidden_size, self.gates + rows)
        else:
            self.qkv_proj = CastedLinear(spec.hidden_size, rows)
        self.o_proj = CastedLinear(query, spec.hidden_size)

    def forward(self, h: Tensor, cos_sin: CosSin | None) -> Tensor:
        batch, length, _ = h.shape
        rows = self.gqkv_proj(h) if self.gates else self.qkv_proj(h)
        gate, qkv = rows[..., : self.gates], rows[..., self.gates :]
        qkv = qkv.view(batch, length, self.heads + 2 * self.kv_heads, self.head_dim)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        if cos_sin is not None:
            q, k = _rotate(q, *cos_sin), _rotate(k, *cos_sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        grouped = self.heads != self.kv_heads
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=grouped)
        mixed = mixed.transpose(1, 2).reshape(batch, length, -1)
        return self.o_proj(mixed * torch.sigmoid(gate) if self.gates else mixed)


class SwiGLU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = CastedLinear(width, 2 * inner)
        self.down_proj = CastedLinear(inner, width)

    def forward(self, h: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(h).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class ConvSwiGLU(nn.Module):
    """URM's: a depthwise convolution over the sequence and a SiLU between the gate and ``down_proj``."""

    def __init__(self, width: int, inner: int, taps: int) -> None:
        super().__init__()
        self.gate_up_proj = CastedLinear(width, 2 * inner)
        self.dwconv = nn.Conv1d(inner, inner, taps, padding=taps // 2, groups=inner)
        self.down_proj = CastedLinear(inner, width)

    def forward(self, h: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(h).chunk(2, dim=-1)
        activation, conv = (F.silu(gate) * up).transpose(1, 2), self.dwconv
        bias = None if conv.bias is None else conv.bias.to(h.dtype)
        out = F.conv1d(activation, conv.weight.to(h.dtype), bias, padding=conv.padding, groups=conv.groups)
        return self.down_proj(F.silu(out[..., : h.shape[1]]).transpose(1, 2))


class Block(nn.Module):
    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.eps = spec.rms_norm_eps
        self.pre_norm = spec.norm_placement == "pre"
        self.mixes_tokens_by_mlp = spec.token_mixer == "mlp_t"
        if self.mixes_tokens_by_mlp:
            self.mlp_t = SwiGLU(spec.seq_len, spec.seq_intermediate_size)
        else:
            self.self_attn = Attention(spec)
        if spec.channel_mixer == "conv_swiglu":
            self.mlp: nn.Module = ConvSwiGLU(spec.hidden_size, spec.intermediate_size, spec.conv_kernel)
        else:
            self.mlp = SwiGLU(spec.hidden_size, spec.intermediate_size)

    def forward(self, h: Tensor, cos_sin: CosSin | None) -> Tensor:
        if self.pre_norm:
            h = h + self.self_attn(_rms_norm(h, self.eps), cos_sin)
            return h + self.mlp(_rms_norm(h, self.eps))
        if self.mixes_tokens_by_mlp:
            t = h.transpose(1, 2)
            h = _rms_norm(t + self.mlp_t(t), self.eps).transpose(1, 2)
        else:
            h = _rms_norm(h + self.self_attn(h, cos_sin), self.eps)
        return _rms_norm(h + self.mlp(h), self.eps)


class Stack(nn.Module):
    """A network: blocks one after the other.  h: [B, L, D] in the compute dtype."""

    def __init__(self, spec: NetSpec) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(spec.block) for _ in range(spec.num_layers))
        self.eps = spec.block.rms_norm_eps if spec.final_norm else None

    def forward(self, h: Tensor, cos_sin: CosSin | None) -> Tensor:
        for layer in self.layers:
            h = layer(h, cos_sin)
        return h if self.eps is None else _rms_norm(h, self.eps)


def apply_updates(
    program: RecursionProgram, net: Apply, states: Sequence[Tensor], x: Tensor | None, cos_sin: CosSin | None
) -> list[Tensor]:
    """The program, one update at a time; states and x: [B, L, D] in the compute dtype."""
    current, grad = list(states), torch.is_grad_enabled()
    for update in program.updates:
        with torch.set_grad_enabled(update.grad and grad):
            current[update.dst] = net(update.net, summed_input(update, current, x), cos_sin)
    return current


def with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with a code object of its own.

    torch.compile caches by code object, and counts recompilations against its limit by code object: functions made by
    one ``def`` for several models would share both.
    """
    function.__code__ = function.__code__.replace()
    return function


class Stacks:
    """Networks that run any program over them, eagerly or compiled.

    Attributes:
        nets: the networks, in the order of the program's.
        recur: (program, states, x, RoPE tables) -> final states; states and x: [B, L, D] in the compute dtype.
        graphs: whether compiled code runs as CUDA graphs, whose results the next step overwrites: see
            ``torch.compiler.cudagraph_mark_step_begin``.
    """

    def __init__(self, specs: Sequence[NetSpec], nets: Sequence[Stack]) -> None:
        self.specs, self.nets = list(specs), list(nets)
        self.recur: Recur = self._eager
        self.graphs = False

    def compile(self, scope: str, graphs: bool = False) -> None:
        """Runs the recursion under torch.compile.

        Args:
            scope: ``"recursion"``, all updates as one graph, minutes of compilation; or ``"network"``, one network as a
                function of its weights, which all updates share.  It casts the weights to the compute dtype once a step
                instead of at every application, as the compiler does for the whole recursion.
            graphs: whether the compiled code runs as CUDA graphs (``mode="reduce-overhead"``).

        Raises:
            ValueError: another scope.
        """
        options: dict[str, Any] = {"dynamic": False, **({"mode": "reduce-overhead"} if graphs else {})}
        self.graphs = graphs
        if scope == "recursion":
            self.recur = torch.compile(self._eager, **options)
        elif scope == "network":
            functions = {spec: torch.compile(_function(spec), **options) for spec in dict.fromkeys(self.specs)}
            self.functions = [functions[spec] for spec in self.specs]
            # What one graph returns another reads in place; anything else is copied for every call.
            self.cast = torch.compile(_casting(), **options) if graphs else _casting()
            self.recur = self._by_network
        else:
            raise ValueError(f"scope: got {scope!r}, accepted are 'network' and 'recursion'")

    def _eager(
        self, program: RecursionProgram, states: Sequence[Tensor], x: Tensor | None, cos_sin: CosSin | None
    ) -> list[Tensor]:
        nets = self.nets
        return apply_updates(program, lambda index, h, tables: nets[index](h, tables), states, x, cos_sin)

    def _by_network(
        self, program: RecursionProgram, states: Sequence[Tensor], x: Tensor | None, cos_sin: CosSin | None
    ) -> list[Tensor]:
        dtype = states[0].dtype
        weights = self.cast([dict(net.named_parameters()) for net in self.nets], dtype)
        # Without gradients the compiled code must not see weights that require them: it would be recompiled.
        constants = [{name: w.detach() for name, w in net.items()} for net in weights]

        def net(index: int, h: Tensor, tables: CosSin | None) -> Tensor:
            return self.functions[index]((weights if torch.is_grad_enabled() else constants)[index], h, tables)

        return apply_updates(program, net, states, x, cos_sin)


def _function(spec: NetSpec) -> Callable[[dict[str, Tensor], Tensor, CosSin | None], Tensor]:
    """A network as a function of its weights."""
    with torch.device("meta"):
        skeleton = Stack(spec)

    def apply(weights: dict[str, Tensor], h: Tensor, cos_sin: CosSin | None) -> Tensor:
        return cast(Tensor, torch.func.functional_call(skeleton, weights, (h, cos_sin)))

    return with_own_code(apply)


def _casting() -> Callable[[list[dict[str, Tensor]], torch.dtype], list[dict[str, Tensor]]]:
    """The weights of networks in another dtype."""

    def cast(nets: list[dict[str, Tensor]], dtype: torch.dtype) -> list[dict[str, Tensor]]:
        return [{name: weight.to(dtype) for name, weight in net.items()} for net in nets]

    return with_own_code(cast)


class EagerRecursion(nn.Module):
    """A recursion over eager networks; parameters are named and ordered as ``problem.weight_names``.

    Args:
        problem: program and networks.
        weights: values of the parameters, float32, in that order.
        cos_sin: RoPE tables, or None for no rotation.
    """

    def __init__(self, problem: Problem, weights: Sequence[Tensor], cos_sin: CosSin | None) -> None:
        super().__init__()
        reason = unsupported(problem, CHOICES)
        if reason is not None:
            raise ValueError(f"problem: {reason}")
        self.problem = problem
        self.cos_sin = cos_sin
        nets = [Stack(spec) for spec in problem.nets]
        for name, net in zip(problem.program.nets, nets, strict=True):
            self.add_module(name, net)
        self.stacks = Stacks(problem.nets, nets)
        with torch.no_grad():
            self.to(weights[0].device)
            for (_, parameter), weight in zip(self.named_parameters(), weights, strict=True):
                parameter.copy_(weight)

    def forward(
        self, states: Sequence[Tensor], x: Tensor | None, program: RecursionProgram | None = None
    ) -> list[Tensor]:
        """The final states; states and x: [B, L, D].  ``program``: another one over the same networks."""
        return self.stacks.recur(program or self.problem.program, states, x, self.cos_sin)


class EagerInner(Inner):
    """:class:`Inner` with its networks applied one update at a time."""

    def __init__(self, config: ModelConfig, family: Family) -> None:
        super().__init__(config, family)
        specs = [config.net_spec(getattr(config, depth)) for _, depth in family.nets]
        nets = [Stack(spec) for spec in specs]
        for name, net in zip(self.net_names, nets, strict=True):
            setattr(self, name, net)
        self.stacks = Stacks(specs, nets)

    def recur(self, states: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        """The recursion, compiled if asked for; states and x: [B, L, D] in the forward dtype."""
        return self.stacks.recur(self.program, states, x, self.rotary_emb() if self.config.uses_rope else None)

    def forward(self, carry: Any, batch: dict[str, Tensor]) -> tuple[Any, Tensor, tuple[Tensor, Tensor]]:
        """As :meth:`Inner.forward`."""
        identifiers = batch["puzzle_identifiers"] if self.config.puzzle_emb_ndim > 0 else None
        states = self.recur(self._states(carry), self._input_embeddings(batch["inputs"], identifiers))
        head = states[0]
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
