"""Calls that keep only their inputs and are recomputed in backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

__all__ = ["recomputed", "refusal"]


def recomputed(owner: nn.Module, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``, of which autograd keeps only the tensors among the arguments.

    Backward calls the function a second time, under the same autocast and with the same random numbers; results and
    gradients are bitwise those of the plain call where the function is deterministic.  Without gradients it is a plain
    call.

    Args:
        owner: the module whose parameters the function reads.
        function: what to call.
        args, kwargs: nested lists, tuples and dicts of tensors and anything else.

    Raises:
        RuntimeError: in backward, if a parameter was replaced or written to since the call.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    # Autograd counts only tensors that are direct arguments as saved, and runs its hooks on them alone.
    leaves, structure = tree_flatten((args, kwargs))
    call = _Call(owner, function, structure)
    return checkpoint(call, *leaves, use_reentrant=False)


class _Call:
    """The function on flattened arguments; checks that every call finds the same parameters."""

    def __init__(self, owner: nn.Module, function: Callable[..., Any], structure: Any) -> None:
        self.owner = owner
        self.function = function
        self.structure = structure
        self.seen: list[tuple[str, Tensor, int]] | None = None

    def __call__(self, *leaves: Any) -> Any:
        # A compiled graph takes its parameters as inputs, which cannot change under it.
        if not torch.compiler.is_compiling():
            self._watch()
        args, kwargs = tree_unflatten(list(leaves), self.structure)
        return self.function(*args, **kwargs)

    def _watch(self) -> None:
        # Inference tensors have no version counter; autograd does not let them train.
        now: list[tuple[str, Tensor, int]] = [
            (name, p, 0 if p.is_inference() else p._version) for name, p in self.owner.named_parameters()
        ]
        if self.seen is None:
            self.seen = now
            return
        for (name, old, version), (_, new, current) in zip(self.seen, now, strict=True):
            if hasattr(new, "to_local") != hasattr(old, "to_local"):
                continue  # fully_shard shows a parameter whole or as a shard, and keeps the two equal
            if new is not old:
                raise RuntimeError(f"{name}: got another tensor than in forward, which backward would compute with")
            if current != version:
                raise RuntimeError(f"{name}: was written to between forward and backward, which computes with it again")


def refusal(module: nn.Module) -> str | None:
    """Why a module must not be called twice, or None; one that counts its calls would be wrong."""
    for name, inner in module.named_modules():
        where = f" at {name}" if name else ""
        if isinstance(inner, _NormBase) and inner.running_mean is not None:
            return f"{type(inner).__name__}{where} keeps running statistics, which a second call would update again"
        if isinstance(inner, nn.utils.parametrizations._SpectralNorm) or any(
            type(hook).__name__ == "SpectralNorm" for hook in inner._forward_pre_hooks.values()
        ):
            return f"spectral norm{where} keeps an iterate, which a second call would advance again"
    return None
