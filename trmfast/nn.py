"""The module that runs a recursion over its networks, and the names of ``trmfast.nn``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from trmfast import reference
from trmfast.budget import DEFAULT, Recompute, budget_of
from trmfast.layers import (
    MLP,
    Attention,
    CastedEmbedding,
    CastedLinear,
    ConvSwiGLU,
    CosSin,
    Injection,
    RMSNorm,
    RotaryEmbedding,
    SimpleGLA,
    SwiGLU,
    trunc_normal_init_,
)
from trmfast.networks import Block, Net, block_weights, watch_nets
from trmfast.ops import recursion
from trmfast.problem import Problem
from trmfast.program import RecursionProgram
from trmfast.recompute import recomputed, refusal
from trmfast.spec import NetSpec
from trmfast.watch import inside

__all__ = [
    "MLP",
    "Attention",
    "Block",
    "CastedEmbedding",
    "CastedLinear",
    "ConvSwiGLU",
    "Injection",
    "Net",
    "RMSNorm",
    "Recursion",
    "RotaryEmbedding",
    "SimpleGLA",
    "SwiGLU",
    "block_weights",
    "trunc_normal_init_",
]


class Recursion(nn.Module):
    """A program over its networks.

    If all networks are :class:`Net`, they run as one fused operation, which reads their weights and does not call their
    modules: replacing, patching or hooking one of their modules is an error at the next call.
    ``torch.nn.utils.parametrize`` is followed.

    Any other module that maps h [B, L, D] to a tensor like h can be a network too.  The program then runs update by
    update, its updates without gradient under ``torch.no_grad``, and each update with gradient keeps only its summed
    input and is recomputed in backward.  Results and gradients are those of the plain loop; side effects of a network
    happen twice.

    Args:
        program: the recursion.
        nets: one network for each of the program.
        backend: the name of a backend, or ``"auto"``; networks other than :class:`Net` accept ``"auto"`` only.
        recompute: what backward computes again: True, False or a size, as in :func:`trmfast.recursion`.  Other networks
            than :class:`Net` compute the whole window again unless it is False.
        dtype: ``"int8"`` for inference with int8 operands, as in :func:`trmfast.recursion`; every network is a
            :class:`Net` then.

    Attributes:
        program: that of the next call; it may be assigned, or given to the call.  Nothing of the networks depends on
            it, and a program that was seen before is neither checked nor translated again.

    Raises:
        TypeError: ``nets`` is not a list, a network is not a module, or the program none.
        ValueError: the networks do not fit the program, or one of them must not be recomputed.
    """

    def __init__(
        self,
        program: RecursionProgram,
        nets: Sequence[nn.Module],
        backend: str = "auto",
        recompute: Recompute = DEFAULT,
        dtype: str | None = None,
    ) -> None:
        super().__init__()
        budget_of(recompute)
        if dtype not in (None, "int8"):
            raise ValueError(f"dtype: got {dtype!r}, accepted are 'int8' and None")
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
            if dtype is not None:
                raise ValueError(f"dtype: got {dtype!r}, accepted is None, nets[{foreign}] is not a trmfast.nn.Net")
            if backend != "auto":
                raise ValueError(
                    f"backend: got {backend!r}, accepted is 'auto', nets[{foreign}] is not a trmfast.nn.Net"
                )
            for i, net in enumerate(nets):
                reason = refusal(net) if recompute is not False else None
                if reason is not None:
                    raise ValueError(f"nets[{i}]: {reason}, accepted with recompute=False")
        self.program = program
        self.backend = backend
        self.recompute = recompute
        self.dtype = dtype

    def forward(
        self,
        states: Sequence[Tensor],
        x: Tensor | None = None,
        cos_sin: CosSin | None = None,
        program: RecursionProgram | None = None,
        segments: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Runs the recursion.

        Args:
            states: S tensors [B, L, D] of one compute dtype; under autocast they and x are cast to its dtype, which
                other networks than :class:`Net` do for themselves.
            x: [B, L, D], or None when no update injects x.
            cos_sin: RoPE tables [>= L, head_dim], or None for no rotation; read by each :class:`Net`.
            program: the program of this call, by default that of the constructor.
            segments: boundaries of sequences, as in :func:`trmfast.recursion`; all networks are :class:`Net` then.

        Returns:
            The final value of every state.
        """
        program, specs = program or self.program, self.specs
        if specs is None:
            if segments is not None:
                raise ValueError("segments: got a tensor, accepted is None, not every network is a trmfast.nn.Net")
            return self._run(program, states, x, cos_sin)
        cos, sin = cos_sin if cos_sin is not None else (None, None)
        settings = self.backend, self.recompute, self.dtype
        if torch.compiler.is_compiling():
            weights = [weight for net in self.nets for weight in cast(Net, net).weights()]
            return recursion(program, specs, states, x, weights, cos, sin, *settings, segments)
        watch = watch_nets(self.nets, tuple(self.nets._modules), "nets.")

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            current, injected = (tensors, None) if x is None else (tensors[:-1], tensors[-1])
            return recursion(program, specs, current, injected, watch.weights(), cos, sin, *settings, segments)

        return inside(watch.sharded, run, (*states, *(() if x is None else (x,))))

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
                if isinstance(net, Net) and net.spec.injection != "add":
                    total = reference.summed_sources(update, current)
                    h = cast(Tensor, net.injection(total, x if update.inject_x else None))
                else:
                    h = reference.summed_input(update, current, x)
                current[update.dst] = net(h, *args) if self.recompute is False else recomputed(net, net, h, *args)
        return tuple(current)

    def _check_count(self, program: RecursionProgram) -> None:
        if not isinstance(program, RecursionProgram):
            raise TypeError(f"program: got {type(program).__name__}, accepted are RecursionProgram")
        if len(self.nets) != len(program.nets):
            accepted = f"{len(program.nets)} ({', '.join(program.nets)})"
            raise ValueError(f"nets: got {len(self.nets)}, accepted are {accepted}")
