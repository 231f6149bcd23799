"""Detects changes of modules whose weights a fused recursion reads but which it never calls.

People replace, wrap, hook and patch submodules (adapters, pruning, weight norm, feature extraction) and expect a call
of the model to see it.  A fused recursion calls none of these modules, so a change would be lost.  A `Watch` examines
them once, with the module's path in the error, and compares a snapshot at every call.  That takes a quarter of the time
of looking up the weights by attribute, which it also replaces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from operator import contains
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["KEPT", "Watch", "hook_of", "inside", "is_sharded", "plain", "watch_of", "watched_modules"]

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
KEPT = "_trmfast_watch"


def plain(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile(module)`` wraps, or the module itself."""
    inside = module._modules.get("_orig_mod")
    return module if inside is None else inside


def watched_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules from ``root`` down by path, without those of parametrizations: reading a weight calls these."""
    waiting = [("", root)]
    while waiting:
        path, module = waiting.pop()
        module = plain(module)
        yield path, module
        prefix = f"{path}." if path else ""
        for name, child in reversed(module._modules.items()):
            if child is not None and name != "parametrizations":
                waiting.append((prefix + name, child))


def hook_of(module: nn.Module) -> str | None:
    """The kind of a hook that a call of the module would run, or None."""
    return next((kind.strip("_").replace("_", " ") for kind in HOOKS if getattr(module, kind)), None)


def _same(now: Any, then: Any) -> bool:
    """Whether a value is as it was; a tensor only if it is the same one."""
    return now is then or (not isinstance(now, Tensor) and not isinstance(then, Tensor) and now == then)


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to a module: a call of it gathers its parameters."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


class Watch:
    """A snapshot of networks and of the modules that hold their weights.

    Args:
        owner: the module that runs the recursion and keeps the watch.
        networks: what it reads and does not call.
        readers: (module, parameter name) of every weight, in the order of the operator.
        facts: (dict, key, value): values that must stay, such as an attribute in a module's ``__dict__``.

    Attributes:
        sharded: modules with ``fully_shard``, outer ones first.
    """

    def __init__(
        self,
        owner: nn.Module,
        networks: Sequence[nn.Module],
        readers: Sequence[tuple[nn.Module, str]],
        facts: Sequence[tuple[dict[str, Any], str, Any]] = (),
    ) -> None:
        modules = [module for network in networks for _, module in watched_modules(network)]
        self.owner = owner
        self.sharded = [module for module in modules if is_sharded(module)]
        self._readers = tuple(readers)
        self._slots = [(module._parameters, name) for module, name in readers]
        # Compares every list with its current value.
        self._children = [module._modules for module in modules]
        self._children_then = [list(children.values()) for children in self._children]
        self._modules = modules
        self._forwards_then = [type(module).forward for module in modules]
        self._instances = [module.__dict__ for module in modules]
        self._hooks = [getattr(module, kind) for module in modules for kind in HOOKS if module not in self.sharded]
        self._facts = [(values, key) for values, key, _ in facts]
        self._facts_then = [value for _, _, value in facts]

    def unchanged(self) -> bool:
        """Whether nothing has changed."""
        return (
            not any(self._hooks)
            and not any(map(contains, self._instances, repeat("forward")))
            and [list(children.values()) for children in self._children] == self._children_then
            and [type(module).forward for module in self._modules] == self._forwards_then
            and all(map(_same, [values.get(key) for values, key in self._facts], self._facts_then))
        )

    def weights(self) -> list[Tensor]:
        """The current weights."""
        try:
            return cast(list[Tensor], [parameters[name] for parameters, name in self._slots])
        except KeyError:  # parametrized, or a plain tensor in a parameter's place
            return [cast(Tensor, getattr(module, name)) for module, name in self._readers]

    # A copy of a module makes a snapshot of its own.
    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def watch_of(owner: nn.Module, examine: Callable[[], Watch]) -> Watch:
    """The watch of a module, made by ``examine`` and remade after a change."""
    watch = owner.__dict__.get(KEPT)
    if watch is None or watch.owner is not owner or not watch.unchanged():
        watch = examine()
        owner.__dict__[KEPT] = watch
    return cast(Watch, watch)


def inside(
    modules: Sequence[nn.Module], run: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """``run(*tensors)`` inside one call of every module, each inside the one before.

    So the hooks of ``fully_shard`` gather the parameters of all modules before they are read, and see the outputs, to
    which they attach the gathering for backward.
    """
    if not modules:
        return run(*tensors)
    first, rest = modules[0], modules[1:]

    def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
        return inside(rest, run, inputs)

    first.__dict__["forward"] = forward
    try:
        return cast(tuple[Tensor, ...], first(*tensors))
    finally:
        del first.__dict__["forward"]
