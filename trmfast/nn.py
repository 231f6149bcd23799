"""Modules that own the float32 parameters, named as in the published state_dicts, and run recursions over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from trmfast import reference
from trmfast.ops import recursion
from trmfast.problem import Problem
from trmfast.program import RecursionProgram
from trmfast.recompute import recomputed, refusal
from trmfast.spec import BlockSpec, NetSpec

__all__ = [
    "Attention",
    "Block",
    "CastedEmbedding",
    "CastedLinear",
    "ConvSwiGLU",
    "Net",
    "Recursion",
    "RotaryEmbedding",
    "SwiGLU",
    "block_weights",
    "trunc_normal_init_",
]

CosSin = tuple[Tensor, Tensor]


@torch.no_grad()
def trunc_normal_init_(tensor: Tensor, std: float = 1.0, lower: float = -2.0, upper: float = 2.0) -> Tensor:
    """Fills a tensor with a normal distribution cut at lower and upper, scaled so that ``std`` is what comes out.

    The inverse of the error function is applied to one uniform draw an element, as in JAX, so a seed gives the weights
    that the published training code draws.
    """
    if std == 0:
        return tensor.zero_()
    low, high = math.erf(lower / math.sqrt(2)), math.erf(upper / math.sqrt(2))
    mass = (high - low) / 2
    at_lower, at_upper = (math.exp(-0.5 * cut * cut) / math.sqrt(2 * math.pi) for cut in (lower, upper))
    variance = 1 - (upper * at_upper - lower * at_lower) / mass - ((at_upper - at_lower) / mass) ** 2
    scale = std / math.sqrt(variance)
    tensor.uniform_(low, high).erfinv_().mul_(math.sqrt(2) * scale)
    return tensor.clip_(lower * scale, upper * scale)


class CastedLinear(nn.Module):
    """A linear layer with float32 parameters that computes in the dtype of its input.

    ``weight`` is [out_features, in_features], drawn with std 1 / sqrt(in_features); ``bias`` is zeros, or None.
    """

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(trunc_normal_init_(torch.empty(out_features, in_features), std=in_features**-0.5))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, h: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(h.dtype)
        return nn.functional.linear(h, self.weight.to(h.dtype), bias)


class CastedEmbedding(nn.Module):
    """An embedding with a float32 table, ``embedding_weight`` [num_embeddings, embedding_dim], read in ``cast_to``."""

    def __init__(self, num_embeddings: int, embedding_dim: int, init_std: float, cast_to: torch.dtype) -> None:
        super().__init__()
        self.cast_to = cast_to
        table = torch.empty(num_embeddings, embedding_dim)
        self.embedding_weight = nn.Parameter(trunc_normal_init_(table, std=init_std))

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.embedding_weight.to(self.cast_to))


class RotaryEmbedding(nn.Module):
    """RoPE tables [max_position_embeddings, dim] in float32, for the rotate-half convention (arXiv 2104.09864).

    They are float32 in a module of any dtype, and are made again where they come from the meta device.
    """

    cos_cached: Tensor
    sin_cached: Tensor

    def __init__(
        self, dim: int, max_position_embeddings: int, base: float, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.dim, self.max_position_embeddings, self.base = dim, max_position_embeddings, base
        self.make_tables(device)

    def make_tables(self, device: torch.device | str | None) -> None:
        """Makes the tables on a device."""
        inv_freq = 1.0 / (self.base ** (torch.arange(0, self.dim, 2, dtype=torch.float32, device=device) / self.dim))
        positions = torch.arange(self.max_position_embeddings, dtype=torch.float32, device=device)
        angles = torch.outer(positions, inv_freq).repeat(1, 2)
        self.register_buffer("cos_cached", angles.cos(), persistent=False)
        self.register_buffer("sin_cached", angles.sin(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        before = self.cos_cached
        super()._apply(fn, recurse)
        moved = self.cos_cached
        if moved.dtype != torch.float32 or (before.is_meta and not moved.is_meta):
            self.make_tables(moved.device)
        return self

    def forward(self) -> CosSin:
        return self.cos_cached, self.sin_cached


class Attention(nn.Module):
    """The parameters of self-attention: ``qkv_proj`` and ``o_proj``."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.spec = spec
        query = spec.num_heads * spec.head_dim
        self.qkv_proj = CastedLinear(spec.hidden_size, query + 2 * spec.num_kv_heads * spec.head_dim)
        self.o_proj = CastedLinear(query, spec.hidden_size)

    def forward(self, h: Tensor, cos_sin: CosSin | None = None) -> Tensor:
        """h: [B, L, D]; cos_sin: RoPE tables [>= L, head_dim]."""
        cos, sin = cos_sin if cos_sin is not None else (None, None)
        return reference.attention(self.spec, h, self.qkv_proj.weight, self.o_proj.weight, cos, sin)


class SwiGLU(nn.Module):
    """The parameters of a SwiGLU over the last axis: ``gate_up_proj`` and ``down_proj``."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = CastedLinear(hidden_size, 2 * intermediate_size)
        self.down_proj = CastedLinear(intermediate_size, hidden_size)

    def forward(self, h: Tensor) -> Tensor:
        return reference.swiglu(h, self.gate_up_proj.weight, self.down_proj.weight)


class ConvSwiGLU(nn.Module):
    """The parameters of URM's SwiGLU: ``gate_up_proj``, the depthwise convolution ``dwconv``, and ``down_proj``."""

    def __init__(self, hidden_size: int, intermediate_size: int, conv_kernel: int = 2) -> None:
        super().__init__()
        self.gate_up_proj = CastedLinear(hidden_size, 2 * intermediate_size)
        self.dwconv = nn.Conv1d(intermediate_size, intermediate_size, conv_kernel, groups=intermediate_size)
        self.down_proj = CastedLinear(intermediate_size, hidden_size)

    def forward(self, h: Tensor) -> Tensor:
        conv = self.dwconv
        assert conv.bias is not None
        return reference.conv_swiglu(h, self.gate_up_proj.weight, conv.weight, conv.bias, self.down_proj.weight)


class Block(nn.Module):
    """One post-norm block: ``self_attn`` or ``mlp_t``, and ``mlp``."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.spec = spec
        if spec.token_mixer == "attention":
            self.self_attn = Attention(spec)
        else:
            self.mlp_t = SwiGLU(spec.seq_len, spec.seq_intermediate_size)
        self.mlp: SwiGLU | ConvSwiGLU
        if spec.channel_mixer == "swiglu":
            self.mlp = SwiGLU(spec.hidden_size, spec.intermediate_size)
        else:
            self.mlp = ConvSwiGLU(spec.hidden_size, spec.intermediate_size, spec.conv_kernel)

    def weights(self) -> list[Tensor]:
        """The parameters in the order of ``spec.weight_shapes``."""
        return block_weights(self, self.spec)

    def forward(self, h: Tensor, cos_sin: CosSin | None = None) -> Tensor:
        """h: [B, L, D]; cos_sin: RoPE tables [>= L, head_dim]."""
        cos, sin = cos_sin if cos_sin is not None else (None, None)
        return reference.run_block(self.spec, h, self.weights(), cos, sin)


def block_weights(block: Any, spec: BlockSpec) -> list[Tensor]:
    """The parameters that a block of this structure has now, in the order of ``spec.weight_shapes``."""
    mixer = block.self_attn if spec.token_mixer == "attention" else block.mlp_t
    if spec.token_mixer == "attention":
        weights = [mixer.qkv_proj.weight, mixer.o_proj.weight]
    else:
        weights = [mixer.gate_up_proj.weight, mixer.down_proj.weight]
    mlp = block.mlp
    weights.append(mlp.gate_up_proj.weight)
    if spec.channel_mixer == "conv_swiglu":
        weights += [mlp.dwconv.weight, mlp.dwconv.bias]
    weights.append(mlp.down_proj.weight)
    return weights


class Net(nn.Module):
    """A stack of blocks; ``layers.0.self_attn.qkv_proj.weight`` and so on, as in the published state_dicts."""

    def __init__(self, spec: NetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.layers = nn.ModuleList(Block(spec.block) for _ in range(spec.num_layers))

    def weights(self) -> tuple[Tensor, ...]:
        """The parameters in the order of ``spec.weight_shapes``."""
        return tuple(weight for layer in self.layers for weight in cast(Block, layer).weights())

    def forward(self, h: Tensor, cos_sin: CosSin | None = None) -> Tensor:
        """Applies the network once, layer by layer in plain PyTorch; h: [B, L, D], cos_sin: tables [>= L, head_dim]."""
        for layer in self.layers:
            h = layer(h, cos_sin)
        return h


class Recursion(nn.Module):
    """A program over its networks.

    Networks that are all :class:`Net` run as one fused operation, and hooks on their inner modules are not called.

    Any other module that maps h [B, L, D] to a tensor like h can be a network, too.  The program then runs update by
    update, its updates without gradient under ``torch.no_grad``, and each update with gradient keeps its summed input
    alone and is computed again in backward.  Results and gradients are those of the plain loop; a network with side
    effects has them twice.

    Args:
        program: the recursion.
        nets: one network for each of the program.
        backend: the name of a backend, or ``"auto"``; other networks than :class:`Net` take ``"auto"`` alone.
        recompute: whether the gradient window is computed again in backward, or keeps what backward needs: faster, and
            for :class:`Net` about thirty times the memory.

    Raises:
        TypeError: ``nets`` is not a list, a network is not a module, or the program none.
        ValueError: the networks do not fit the program, or one of them must not be computed again.
    """

    def __init__(
        self, program: RecursionProgram, nets: Sequence[nn.Module], backend: str = "auto", recompute: bool = True
    ) -> None:
        super().__init__()
        if not isinstance(nets, (Sequence, nn.ModuleList)):
            raise TypeError(f"nets: got {type(nets).__name__}, accepted are lists and tuples of torch.nn.Module")
        for i, net in enumerate(nets):
            if not isinstance(net, nn.Module):
                raise TypeError(f"nets[{i}]: got {type(net).__name__}, accepted are torch.nn.Module")
        self.nets = nn.ModuleList(nets)
        self._check_count(program)
        self.specs: tuple[NetSpec, ...] | None = None
        foreign = next((i for i, net in enumerate(nets) if not isinstance(net, Net)), None)
        if foreign is None:
            self.specs = Problem(program, tuple(cast(Net, net).spec for net in nets)).nets
        else:
            if backend != "auto":
                raise ValueError(
                    f"backend: got {backend!r}, accepted is 'auto', nets[{foreign}] is not a trmfast.nn.Net"
                )
            for i, net in enumerate(nets):
                reason = refusal(net) if recompute else None
                if reason is not None:
                    raise ValueError(f"nets[{i}]: {reason}, accepted with recompute=False")
        self.program = program
        self.backend = backend
        self.recompute = recompute

    def forward(
        self,
        states: Sequence[Tensor],
        x: Tensor | None = None,
        cos_sin: CosSin | None = None,
        program: RecursionProgram | None = None,
    ) -> tuple[Tensor, ...]:
        """Runs the recursion.

        Args:
            states: S tensors [B, L, D] of one compute dtype; under autocast they and x are cast to its dtype, which
                other networks than :class:`Net` do for themselves.
            x: [B, L, D], or None when no update injects x.
            cos_sin: RoPE tables [>= L, head_dim], or None for no rotation; read by each :class:`Net`.
            program: the program of this call, by default that of the constructor.

        Returns:
            The final value of every state.
        """
        program = program or self.program
        if self.specs is None:
            return self._run(program, states, x, cos_sin)
        cos, sin = cos_sin if cos_sin is not None else (None, None)
        weights = [weight for net in self.nets for weight in cast(Net, net).weights()]
        return recursion(program, self.specs, states, x, weights, cos, sin, self.backend, self.recompute)

    def _run(
        self, program: RecursionProgram, states: Sequence[Tensor], x: Tensor | None, cos_sin: CosSin | None
    ) -> tuple[Tensor, ...]:
        """The program, update by update."""
        self._check_count(program)
        if len(states) != len(program.states):
            accepted = f"{len(program.states)} ({', '.join(program.states)})"
            raise ValueError(f"states: got {len(states)}, accepted are {accepted}")
        if x is None and program.uses_x:
            raise ValueError("x: got None, accepted are tensors like the states, the program injects x")
        if cos_sin is not None and not any(isinstance(net, Net) for net in self.nets):
            raise ValueError("cos_sin: got tables, accepted is None, no network is a trmfast.nn.Net")
        current = list(states)
        for update in program.updates:
            net = self.nets[update.net]
            args = (cos_sin,) if isinstance(net, Net) else ()
            with torch.set_grad_enabled(update.grad and torch.is_grad_enabled()):
                h = reference.summed_input(update, current, x)
                current[update.dst] = recomputed(net, net, h, *args) if self.recompute else net(h, *args)
        return tuple(current)

    def _check_count(self, program: RecursionProgram) -> None:
        if not isinstance(program, RecursionProgram):
            raise TypeError(f"program: got {type(program).__name__}, accepted are RecursionProgram")
        if len(self.nets) != len(program.nets):
            accepted = f"{len(program.nets)} ({', '.join(program.nets)})"
            raise ValueError(f"nets: got {len(self.nets)}, accepted are {accepted}")
