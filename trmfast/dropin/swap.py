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
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from trmfast import ops
from trmfast.budget import DEFAULT, Recompute
from trmfast.dropin.families import FAMILIES, Family, program_of
from trmfast.dropin.structure import blocks_of, get, read_net, settings_of
from trmfast.networks import block_weights
from trmfast.spec import NetSpec
from trmfast.watch import KEPT, Watch, inside, watch_of, watched_modules

__all__ = [
    "BASE",
    "SWAP",
    "Swap",
    "forwards_of",
    "fused_step",
    "is_swapped",
    "swap",
    "swap_back",
    "swap_of",
    "swapped_class",
]

SWAP = "_trmfast_swap"
BASE = "_trmfast_base"
REBUILD = "_trmfast_rebuild"


@dataclass
class Swap:
    """The description of a swapped inner module.

    Attributes:
        family: name of its family.
        nets: the specs of its networks.
        backend: the backend of its recursion.
        forwards: the function that computes each module of the networks, see :func:`forwards_of`.
        recompute: as in :func:`trmfast.recursion`.
        dtype: ``"int8"`` or None, as in :func:`trmfast.recursion`.
    """

    family: str
    nets: tuple[NetSpec, ...]
    backend: str
    forwards: dict[str, str]
    recompute: Recompute = DEFAULT
    dtype: str | None = None


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
        weights = watch.weights() if watch else _weights(inner, own)
        out = ops.recursion(
            program,
            own.nets,
            [state.to(dtype) for state in current],
            injected.to(dtype),
            weights,
            cos,
            sin,
            own.backend,
            own.recompute,
            own.dtype,
        )
        return tuple(state.to(dtype) for state in out)  # autocast computes in another dtype

    watch = None if torch.compiler.is_compiling() else watch_of(inner, partial(_examine, inner, own))
    return inside(watch.sharded if watch else (), run, (*states, x))


def _weights(inner: nn.Module, own: Swap) -> list[Tensor]:
    return [
        weight
        for net, spec in zip(FAMILIES[own.family].nets, own.nets, strict=True)
        for block in blocks_of(inner, net)
        for weight in block_weights(block, spec.block)
    ]


@torch.compiler.assume_constant_result
def _program(name: str, *cycles: int) -> Any:
    return program_of(name, *cycles)


# ---------------------------------------------------------------- changes inside the networks


def forwards_of(inner: nn.Module, family: Family) -> dict[str, str]:
    """The function that computes each module of the networks, by path and by name: a copy or a pickle keeps them."""
    found = {}
    for net in family.nets:
        for path, module in watched_modules(cast(nn.Module, inner._modules[net])):
            forward = type(module).forward
            found[f"{net}.{path}".rstrip(".")] = f"{forward.__module__}.{forward.__qualname__}"
    return found


def _examine(inner: nn.Module, own: Swap) -> Watch:
    """Compares the networks with those that were accelerated.

    Raises:
        RuntimeError: a module was replaced, patched or hooked, or computes with another setting, in one line.
    """
    family = FAMILIES[own.family]
    differences: list[str] = []
    for net, spec in zip(family.nets, own.nets, strict=True):
        now = read_net(inner, net, differences)
        if now is not None and now != spec:
            new, old = asdict(now.block), asdict(spec.block)
            changed = [f"{name} {new[name]}, accepted is {old[name]}" for name in new if new[name] != old[name]]
            changed += [f"{now.num_layers} blocks, accepted are {spec.num_layers}"]
            differences.append(f"{net}: got {changed[0]}")
    for path, forward in forwards_of(inner, family).items():
        if forward != own.forwards.get(path):
            differences.append(f"{path}: got {forward}, accepted is {own.forwards.get(path, 'nothing')}")
    if differences:
        raise RuntimeError(f"{differences[0]}; this came after accelerate(): undo it, or call trmfast.restore(model)")
    readers: list[tuple[nn.Module, str]] = []
    facts: list[tuple[dict[str, Any], str, Any]] = []
    for net, spec in zip(family.nets, own.nets, strict=True):
        facts.append((cast(dict[str, Any], inner._modules), net, inner._modules[net]))
        for block in blocks_of(inner, net):
            for path in spec.block.weight_shapes:
                owner, _, weight = path.rpartition(".")
                readers.append((get(block, owner), weight))
                parameters = cast(dict[str, Any], readers[-1][0]._parameters)
                facts.append((parameters, "bias", parameters.get("bias")))
            facts += [(part.__dict__, name, part.__dict__.get(name)) for part, name in settings_of(block)]
    return Watch(inner, [cast(nn.Module, inner._modules[net]) for net in family.nets], readers, facts)


# ---------------------------------------------------------------- classes


@cache
def swapped_class(base: Any, method: str, step: Callable[..., Any]) -> type:
    """The subclass of a model's class under the same name, with ``step`` for a method."""
    body = {
        method: step,
        BASE: base,
        REBUILD: (method, step),
        "__reduce_ex__": _reduce_ex,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (base,), body)


def _reduce_ex(self: Any, protocol: int) -> tuple[Any, ...]:
    """For copies and pickles: rebuilds the class from the model's own, which can be imported."""
    base = getattr(type(self), BASE)
    _, (_, *arguments), *rest = base.__reduce_ex__(self, max(protocol, 2))
    return _rebuild, (base, *getattr(type(self), REBUILD), *arguments), *rest


def _rebuild(base: type, method: str, step: Callable[..., Any], *arguments: Any) -> Any:
    cls = cast(Any, swapped_class(base, method, step))
    return cls.__new__(cls, *arguments)


def is_swapped(module: nn.Module) -> bool:
    """Whether a module runs the fused recursion."""
    return SWAP in module.__dict__


def swap_of(module: nn.Module) -> Swap:
    """The description of a swapped module."""
    return cast(Swap, module.__dict__[SWAP])


def swap(inner: nn.Module, own: Swap, method: str, step: Callable[..., Any] = fused_step) -> None:
    """Gives a module the fused recursion, as one of its methods."""
    inner.__dict__[SWAP] = own
    base: Any = type(inner)
    inner.__class__ = swapped_class(base, method, step)


def swap_back(inner: nn.Module) -> None:
    """Undoes :func:`swap`."""
    inner.__class__ = _without_swap(type(inner))
    del inner.__dict__[SWAP]
    inner.__dict__.pop(KEPT, None)


def _without_swap(cls: type) -> type:
    """A class without the swap, even if ``fully_shard`` has derived a class from it since."""
    if BASE in cls.__dict__:
        return cast(type, cls.__dict__[BASE])
    if not hasattr(cls, BASE):
        return cls
    body = {name: value for name, value in cls.__dict__.items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, tuple(map(_without_swap, cls.__bases__)), body)
