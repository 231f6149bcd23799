"""The swap: one inner module gets a class whose step runs the fused recursion.

What changes is ``inner.__class__``, to a subclass of the model's own class with one method replaced, as ``fully_shard``
of PyTorch does.  The method is found on the type and everything it needs on ``self``, so nothing is bound to one
instance: deep and shallow copies, replicas, unpickled models, ``functional_call`` and compiled graphs follow their own
parameters and hooks, ``isinstance`` and state_dicts stay as they are.  A forward assigned to the instance would go on
with the parameters of the original in a copy, and pickle cannot store it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from trmfast import ops
from trmfast.dropin.families import FAMILIES, Family, program_of
from trmfast.dropin.structure import blocks_of, hooked
from trmfast.nn import block_weights
from trmfast.spec import NetSpec

__all__ = ["Swap", "fused_step", "is_swapped", "swap", "swap_back", "swap_of"]

SWAP = "_trmfast_swap"
BASE = "_trmfast_base"


@dataclass
class Swap:
    """What a swapped inner module knows about itself.

    Attributes:
        family: name of its family.
        nets: the specs of its networks.
        backend: the backend of its recursion.
    """

    family: str
    nets: tuple[NetSpec, ...]
    backend: str


def fused_step(self: Any, carry: Any, batch: dict[str, Tensor]) -> tuple[Any, Tensor, Any]:
    """One supervision step with the model's own embeddings and heads around one fused recursion.

    Args:
        carry: the states, [B, L, D], in fields with the family's names.
        batch: the tokens, integers [B, S], and ``puzzle_identifiers``, integers [B].

    Returns:
        The carry with new states without gradient, logits [B, S, V], and the q head's float32 [B] outputs.
    """
    own: Swap = self._trmfast_swap
    family = FAMILIES[own.family]
    rope = getattr(self, family.rope, None)
    cos, sin = rope() if rope is not None else (None, None)
    x = self._input_embeddings(batch[family.inputs], batch["puzzle_identifiers"])
    states = _recur(self, own, family, [getattr(carry, name) for name in family.states], x, cos, sin)
    carried = {name: z.detach() for name, z in zip(family.states, states, strict=True)}
    new_carry = dataclasses.replace(carry, **carried)
    logits = self.lm_head(states[0])[:, self.puzzle_emb_len :]
    q = self.q_head(states[0][:, 0]).to(torch.float32)
    return new_carry, logits, (q[..., 0], q[..., 1]) if family.q_continue else q[..., 0]


def _recur(
    inner: Any,
    own: Swap,
    family: Family,
    states: Sequence[Tensor],
    x: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
) -> Sequence[Tensor]:
    settings = getattr(inner, family.settings)
    program = _program(own.family, *(getattr(settings, name) for name in family.cycles))

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        *current, injected = tensors
        # States promote as in the model's own sums: after model.to(dtype), carry and embeddings may differ in dtype.
        dtype = injected.dtype
        for state in current:
            dtype = torch.promote_types(dtype, state.dtype)
        weights = [
            weight
            for net, spec in zip(family.nets, own.nets, strict=True)
            for block in blocks_of(inner, net)
            for weight in block_weights(block, spec.block)
        ]
        out = ops.recursion(
            program,
            own.nets,
            [state.to(dtype) for state in current],
            injected.to(dtype),
            weights,
            cos,
            sin,
            own.backend,
        )
        return tuple(state.to(dtype) for state in out)  # autocast computes in another dtype

    gathering = [] if torch.compiler.is_compiling() else _gathering(inner, family)
    return _inside(gathering, run, (*states, x))


@torch.compiler.assume_constant_result
def _program(name: str, *cycles: int) -> Any:
    return program_of(name, *cycles)


# ---------------------------------------------------------------- hooks inside the networks


def _gathering(inner: Any, family: Family) -> list[nn.Module]:
    """Modules in the networks that ``fully_shard`` was applied to: a call of theirs gathers their parameters.

    Raises:
        RuntimeError: a module has another hook, which would not be called.
    """
    found: list[nn.Module] = []
    waiting = [inner._modules[net] for net in reversed(family.nets)]
    while waiting:  # as Module.modules(), at a third of its cost
        module = waiting.pop()
        if hooked(module):
            if not _is_sharded(module):
                raise RuntimeError(
                    f"{_path(inner, module)}: got a hook after accelerate(), which a fused recursion would not call; "
                    "remove it or call trmfast.restore(model)"
                )
            found.append(module)
        if module._modules:
            waiting += [child for child in reversed(module._modules.values()) if child is not None]
    return found


def _path(inner: nn.Module, module: nn.Module) -> str:
    return next(path for path, other in inner.named_modules() if other is module)


def _is_sharded(module: nn.Module) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _inside(
    modules: Sequence[nn.Module], run: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """``run(*tensors)`` inside one call of every module, each inside the one before.

    So the hooks of ``fully_shard`` gather the parameters of all modules before they are read, and see the outputs, on
    which they hang the gathering for backward.
    """
    if not modules:
        return run(*tensors)
    first, rest = modules[0], modules[1:]

    def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
        return _inside(rest, run, inputs)

    first.__dict__["forward"] = forward
    try:
        return cast(tuple[Tensor, ...], first(*tensors))
    finally:
        del first.__dict__["forward"]


# ---------------------------------------------------------------- classes


@cache
def _swapped_class(base: Any, method: str) -> type:
    """The subclass of a model's inner class, under the same name."""
    body = {
        method: fused_step,
        BASE: base,
        "__reduce_ex__": _reduce_ex,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (base,), body)


def _reduce_ex(self: Any, protocol: int) -> tuple[Any, ...]:
    """For copies and pickles: the class is made again from the model's own, which can be imported."""
    base, family = getattr(type(self), BASE), FAMILIES[self._trmfast_swap.family]
    _, (_, *arguments), *rest = base.__reduce_ex__(self, max(protocol, 2))
    return _rebuild, (base, family.method, *arguments), *rest


def _rebuild(base: type, method: str, *arguments: Any) -> Any:
    cls = cast(Any, _swapped_class(base, method))
    return cls.__new__(cls, *arguments)


def is_swapped(module: nn.Module) -> bool:
    """Whether a module runs the fused recursion."""
    return SWAP in module.__dict__


def swap_of(module: nn.Module) -> Swap:
    """What a swapped module knows about itself."""
    return cast(Swap, module.__dict__[SWAP])


def swap(inner: nn.Module, own: Swap) -> None:
    """Gives an inner module the fused recursion."""
    inner.__dict__[SWAP] = own
    base: Any = type(inner)
    inner.__class__ = _swapped_class(base, FAMILIES[own.family].method)


def swap_back(inner: nn.Module) -> None:
    """Undoes :func:`swap`."""
    inner.__class__ = _without_swap(type(inner))
    del inner.__dict__[SWAP]


def _without_swap(cls: type) -> type:
    """A class without the swap, also where ``fully_shard`` has derived its own class from it since."""
    if BASE in cls.__dict__:
        return cast(type, cls.__dict__[BASE])
    if not hasattr(cls, BASE):
        return cls
    body = {name: value for name, value in cls.__dict__.items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, tuple(map(_without_swap, cls.__bases__)), body)
