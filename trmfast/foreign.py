"""Models with networks of any kind: their own recursion runs, and backward recomputes what it needs.

Two models are recognised by their structure: ``TinyRecursiveModel`` of the package tiny-recursive-model (also the
variant with losses on every cycle) and ``HRM`` of hrm-pytorch (also with adaptive computation).  The model's own code
runs its updates and decides where gradients flow; its outputs stay the same.  A call of a network inside the gradient
window keeps only its input.  For any other model, call :func:`recompute` on its networks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from trmfast.recompute import recomputed, refusal

__all__ = ["Foreign", "recognise", "recompute", "undo"]


class _Forward:
    """Takes the place of ``module.forward``; an object, so that it follows its module through deepcopy and pickle."""

    def __init__(self, module: nn.Module, before: Any) -> None:
        self.module = module
        # The forward of the instance, if it had one of its own.
        self.before = before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function = self.before or type(self.module).forward.__get__(self.module)
        return recomputed(self.module, function, *args, **kwargs)


def recompute(module: nn.Module) -> nn.Module:
    """Makes calls of a module keep only their inputs and recompute them in backward; returns the module.

    Parameters, buffers, state_dict, class and the module's own hooks stay; hooks on modules inside it are called again
    in backward.  A second call of this function changes nothing, :func:`undo` takes it back.

    Raises:
        ValueError: the module must not be called twice, for example because it keeps running statistics.
    """
    reason = refusal(module)
    if reason is not None:
        raise ValueError(f"module: {reason}")
    before = module.__dict__.get("forward")
    if not isinstance(before, _Forward):
        module.__dict__["forward"] = _Forward(module, before)
    return module


def undo(model: nn.Module) -> int:
    """Restores the forward of every module in a model; returns how many were restored."""
    count = 0
    for module in model.modules():
        swapped = module.__dict__.get("forward")
        if isinstance(swapped, _Forward):
            del module.__dict__["forward"]
            if swapped.before is not None:
                module.__dict__["forward"] = swapped.before
            count += 1
    return count


@dataclass(frozen=True)
class Foreign:
    """A recursion over networks of any kind, found inside a model.

    Attributes:
        kind: ``"TinyRecursiveModel"`` or ``"HRM"``, what it is built like.
        name: where it is in the model, ``""`` for the model itself.
        owner: the module that runs the recursion.
        parts: name within ``owner`` -> module whose calls backward recomputes.
    """

    kind: str
    name: str
    owner: nn.Module
    parts: dict[str, nn.Module] = field(repr=False)

    def refusals(self) -> list[str]:
        """Why the recursion must stay as it is, one line for each reason."""
        found = ((name, refusal(part)) for name, part in self.parts.items())
        return [f"{name}: {reason}" for name, reason in found if reason is not None]

    def swap(self) -> None:
        """Makes backward recompute the recursion.

        Raises:
            ValueError: one line with all reasons why not; then nothing was changed.
        """
        reasons = self.refusals()
        if reasons:
            raise ValueError("; ".join(reasons))
        for part in self.parts.values():
            recompute(part)


def recognise(model: nn.Module) -> Foreign | None:
    """The recursion over foreign networks inside a model (compiled or wrapped as it may be), or None.

    Raises:
        ValueError: there are several.
    """
    found = []
    for name, module in model.named_modules():
        if "_orig_mod" in module._modules:
            continue  # torch.compile's wrapper shows the attributes of what it wraps
        for kind, find in (("TinyRecursiveModel", _tiny_recursive_model), ("HRM", _hrm)):
            parts = find(module)
            if parts is not None:
                found.append(Foreign(kind, name, module, parts))
    if len(found) > 1:
        names = ", ".join(one.name or "the model itself" for one in found)
        raise ValueError(f"several modules hold a recursion: {names}; accelerate them one at a time")
    return found[0] if found else None


def _tiny_recursive_model(module: nn.Module) -> dict[str, nn.Module] | None:
    """One network, called on sums of states; every update of the window is one call."""
    network = getattr(module, "network", None)
    fits = (
        isinstance(network, nn.Module)
        and _has(module, int, "num_refinement_blocks", "num_latent_refinements")
        and _has(module, nn.Parameter, "output_init_embed", "latent_init_embed")
        and callable(getattr(module, "deep_refinement", None))
    )
    return {"network": network} if fits and isinstance(network, nn.Module) else None


def _hrm(module: nn.Module) -> dict[str, nn.Module] | None:
    """Networks from low to high, each with a combiner of the states that it reads; both belong to an update."""
    networks, combiners = getattr(module, "networks", None), getattr(module, "hidden_combiners", None)
    if not (
        isinstance(networks, nn.ModuleList)
        and isinstance(combiners, nn.ModuleList)
        and len(networks) == len(combiners) > 0
        and _has(module, list, "evaluate_networks_at")
        and _has(module, int, "reasoning_steps", "lowest_steps_per_reasoning_step")
    ):
        return None
    parts = {f"networks.{i}": network for i, network in enumerate(networks)}
    return parts | {f"hidden_combiners.{i}": combiner for i, combiner in enumerate(combiners)}


def _has(module: nn.Module, kind: type, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), kind) for name in names)
