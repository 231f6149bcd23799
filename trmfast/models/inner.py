"""The part of a model inside the halting loop: embeddings, the recursion, the heads."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmfast import ops
from trmfast.architectures import Architecture
from trmfast.backends import BACKENDS
from trmfast.config import ModelConfig
from trmfast.layers import CastedEmbedding, CastedLinear, RotaryEmbedding, trunc_normal_init_
from trmfast.models.sparse_embedding import CastedSparseEmbedding
from trmfast.networks import Net, watch_nets
from trmfast.program import GradientWindow, RecursionProgram
from trmfast.spec import NetSpec
from trmfast.watch import inside

__all__ = ["Family", "Inner"]


def _net(spec: NetSpec, _dtype: torch.dtype) -> nn.Module:
    return Net(spec)


def _make_tables(inner: nn.Module, _keys: Any) -> None:
    """Builds the RoPE tables of a model on meta that got its tensors with ``assign=True``."""
    device = cast(Inner, inner).lm_head.weight.device
    rope = inner._modules.get("rotary_emb")
    if isinstance(rope, RotaryEmbedding) and rope.cos_cached.is_meta and device.type != "meta":
        rope.make_tables(device)


@dataclass(frozen=True)
class Family:
    """An architecture with its PyTorch parts.

    Attributes:
        program, window, nets, inits: as in :class:`trmfast.architectures.Architecture`.
        carry: dataclass of the states, its fields in the order of the program's states.
        net: makes a network from its spec and the compute dtype.
    """

    program: Callable[[int, int, GradientWindow], RecursionProgram]
    window: GradientWindow
    nets: tuple[tuple[str, str], ...]
    inits: tuple[str, ...]
    carry: type
    net: Callable[[NetSpec, torch.dtype], nn.Module] = _net

    @classmethod
    def of(cls, kind: Architecture, carry: type, net: Callable[[NetSpec, torch.dtype], nn.Module] = _net) -> Family:
        """The family of an architecture."""
        return cls(kind.program, kind.window, kind.nets, kind.inits, carry, net)


class Inner(nn.Module):
    """One supervision step without halting.

    Modules, parameters and buffers are made in upstream's order and under upstream's names, so that seeds give the same
    models and checkpoints load.
    """

    L_level: Net

    def __init__(self, config: ModelConfig, family: Family) -> None:
        super().__init__()
        self.config = config
        self.family = family
        # torch.compile cannot look into dataclasses.fields.
        self.state_names = tuple(field.name for field in fields(family.carry))
        self.net_names = tuple(name for name, _ in family.nets)
        self.window: GradientWindow = family.window
        self.set_backend(config.backend)
        self.set_cycles(config.H_cycles, config.L_cycles)

        D, dtype = config.hidden_size, config.dtype
        self.forward_dtype = dtype
        self.product_dtype = "int8" if config.forward_dtype == "int8" else None
        self.embed_scale = math.sqrt(D)
        std = 1.0 / self.embed_scale
        self.puzzle_emb_len = config.prefix_len

        self.embed_tokens = CastedEmbedding(config.vocab_size, D, init_std=std, cast_to=dtype)
        self.lm_head = CastedLinear(D, config.vocab_size, bias=False)
        self.q_head = CastedLinear(D, 2, bias=True)
        if config.puzzle_emb_ndim > 0:
            self.puzzle_emb = CastedSparseEmbedding(
                config.num_puzzle_identifiers, config.puzzle_emb_ndim, config.batch_size, init_std=0, cast_to=dtype
            )
        if config.uses_rope:
            self.rotary_emb = RotaryEmbedding(config.head_dim, config.total_len, config.rope_theta)
        elif config.pos_encodings == "learned":
            self.embed_pos = CastedEmbedding(config.total_len, D, init_std=std, cast_to=dtype)
        for name, depth in family.nets:
            self.add_module(name, family.net(config.net_spec(getattr(config, depth)), dtype))
        for name in family.inits:
            self.register_buffer(name, trunc_normal_init_(torch.empty(D, dtype=dtype), std=1.0))

        self.register_load_state_dict_post_hook(_make_tables)

        with torch.no_grad():
            # A q_halt of -5 keeps every row going until the head has learned something.
            self.q_head.weight.zero_()
            assert self.q_head.bias is not None
            self.q_head.bias.fill_(-5)

    # ---------------------------------------------------------------- what may change between calls

    def set_cycles(self, H_cycles: int, L_cycles: int) -> None:
        """Change the recursion's depth; parameters and carries stay as they are."""
        self.program = self.family.program(H_cycles, L_cycles, self.window)
        self.H_cycles, self.L_cycles = H_cycles, L_cycles

    def set_window(self, window: GradientWindow) -> None:
        """Change the gradient window, see :meth:`RecursionProgram.with_window`."""
        self.program = self.program.with_window(window)
        self.window = window

    def set_backend(self, backend: str) -> None:
        """Change the backend."""
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(f"backend: got {reprlib.repr(backend)}, accepted are {', '.join(('auto', *BACKENDS))}")
        self.backend = backend

    # ---------------------------------------------------------------- carry

    def empty_carry(self, batch_size: int, device: torch.device | None = None) -> Any:
        """States for ``batch_size`` rows, to be reset before use; zeros, so that no path reads uninitialised memory."""
        shape = (batch_size, self.config.total_len, self.config.hidden_size)
        states = (torch.zeros(shape, dtype=self.forward_dtype, device=device) for _ in self.family.inits)
        return self.family.carry(*states)

    def reset_carry(self, reset_flag: Tensor, carry: Any) -> Any:
        """The initial states in the rows where ``reset_flag`` (bool [B]) is set, the carry's states in the others."""
        flag = reset_flag.view(-1, 1, 1)
        inits = (getattr(self, name).to(self.forward_dtype) for name in self.family.inits)
        pairs = zip(inits, self._states(carry), strict=True)
        return self.family.carry(*(torch.where(flag, init, z) for init, z in pairs))

    def _states(self, carry: Any) -> tuple[Tensor, ...]:
        return tuple(getattr(carry, name) for name in self.state_names)

    # ---------------------------------------------------------------- forward

    def _input_embeddings(self, inputs: Tensor, puzzle_identifiers: Tensor | None) -> Tensor:
        """[B, L, D] in the forward dtype: puzzle tokens, then the tokens of ``inputs`` [B, S], all times sqrt(D)."""
        D = self.config.hidden_size
        embedding = self.embed_tokens(inputs.to(torch.int32))
        if puzzle_identifiers is not None:
            puzzle = self.puzzle_emb(puzzle_identifiers)
            puzzle = F.pad(puzzle, (0, self.puzzle_emb_len * D - puzzle.shape[-1]))
            embedding = torch.cat((puzzle.view(-1, self.puzzle_emb_len, D), embedding), dim=-2)
        if self.config.pos_encodings == "learned":
            # sqrt(1/2): each summand contributes half of the variance.
            embedding = 0.707106781 * (embedding + self.embed_pos.embedding_weight.to(self.forward_dtype))
        return self.embed_scale * embedding

    def forward(self, carry: Any, batch: dict[str, Tensor]) -> tuple[Any, Tensor, tuple[Tensor, Tensor]]:
        """One run of the recursion.

        Args:
            carry: the states, [B, L, D].
            batch: ``inputs`` integers [B, S], and ``puzzle_identifiers`` integers [B] if there is a puzzle embedding.

        Returns:
            The new states without gradient, logits [B, S, V] in the forward dtype, (q_halt, q_continue) float32 [B].
        """
        identifiers = batch["puzzle_identifiers"] if self.config.puzzle_emb_ndim > 0 else None
        x = self._input_embeddings(batch["inputs"], identifiers)
        nets: list[Net] = [getattr(self, name) for name in self.net_names]
        cos, sin = self.rotary_emb() if self.config.uses_rope else (None, None)
        watch = None if torch.compiler.is_compiling() else watch_nets(self, self.net_names)

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            return ops.recursion(
                self.program,
                [net.spec for net in nets],
                tensors[:-1],
                tensors[-1],
                watch.weights() if watch else [weight for net in nets for weight in net.weights()],
                cos,
                sin,
                backend=self.backend,
                recompute=self.config.recompute,
                dtype=self.product_dtype,
            )

        states = inside(watch.sharded if watch else (), run, (*self._states(carry), x))
        head = states[0]
        logits = self.lm_head(head)[:, self.puzzle_emb_len :]
        q = self.q_head(head[:, 0]).to(torch.float32)
        return self.family.carry(*(z.detach() for z in states)), logits, (q[..., 0], q[..., 1])
