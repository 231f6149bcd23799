"""Behaviour of a looped language model: what its own code computes on random numbers, against the fused recursion.

The double has one layer in each network, so that a model of any size takes a moment, and shares no weight with it.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from trmfast.dropin.language import KINDS, Parts, functions_of
from trmfast.dropin.language_forward import FORWARDS
from trmfast.dropin.swap import SWAP, Swap, swapped_class

__all__ = ["difference"]

ROWS, TOKENS, PREFIX, PADDING = 2, 9, 3, 2
TOLERANCE = 1e-3  # of the largest number, in float32; another activation or a missing update is off by its size


def difference(model: nn.Module, name: str, parts: list[Parts]) -> str | None:
    """One line that says what differs, or None.

    Args:
        model: the module that holds the layers.
        name: its kind.
        parts: its networks.
    """
    if any(p.is_meta for p in model.parameters()):
        return "got tensors on meta, accepted is a model with its weights"
    double = _double(model, name)
    specs = tuple(replace(part.spec, num_layers=1) for part in parts)
    own_class, fused_class = type(model), swapped_class(cast(Any, type(model)), "forward", FORWARDS[name])
    double.__dict__[SWAP] = Swap(name, specs, "reference", functions_of(double, name))
    for given in _calls(double, name, specs[0].block.hidden_size):
        results = []
        for kind in (own_class, fused_class):
            double.__class__ = kind
            try:
                results.append(_run(double, given))
            except Exception as error:  # a version that takes other arguments, or whose parts do
                return f"forward: {type(error).__name__} on random numbers: {error}"
        own, fused = results
        for what, value in own.items():
            off = (fused[what] - value).abs().max().item()
            if not off <= TOLERANCE * max(value.abs().max().item(), 1e-6):
                return f"forward: {what} is off by {off:.2g}, accepted is the {name} loop over its layers"
    return None


def _double(model: nn.Module, name: str) -> Any:
    """The model with one layer in each network and random weights, in float32."""
    kind = KINDS[name]
    double = cast(Any, object.__new__(type(model)))
    double.__dict__.update(model.__dict__)
    double.__dict__["_modules"] = dict(model._modules)
    double.__dict__["_parameters"] = dict(model._parameters)
    config = copy.deepcopy(cast(Any, model).config)
    config._attn_implementation = "sdpa"
    for depth in ("num_layers_per_stack", "num_hidden_layers"):
        if hasattr(config, depth):
            setattr(config, depth, 1)
    double.__dict__["config"] = config
    memo: dict[int, Any] = {id(cast(Any, model).config): config}
    for stack in kind.stacks:
        owner = double
        if stack:
            owner = copy.copy(model.get_submodule(stack))
            owner.__dict__["_modules"] = dict(owner._modules)
            double._modules[stack] = owner
        owner._modules["layers"] = nn.ModuleList([copy.deepcopy(owner._modules["layers"][0], memo)])
        owner._modules[kind.final] = copy.deepcopy(owner._modules[kind.final], memo)
    for child in ("rotary_emb", "early_exit_gate"):
        if child in model._modules:
            double._modules[child] = copy.deepcopy(model._modules[child], memo)
    double._modules["embed_tokens"] = None
    generator = torch.Generator().manual_seed(0)
    for module in double.modules():
        for path, tensor in module._parameters.items():
            if tensor is not None:
                drawn = torch.randn(tensor.shape, generator=generator) * tensor.shape[-1] ** -0.5
                module._parameters[path] = nn.Parameter(drawn.to(tensor.device), tensor.requires_grad)
    double.train(False)  # no dropout; gradients do not depend on it
    return double


def _calls(double: Any, name: str, width: int) -> list[dict[str, Tensor]]:
    """Arguments: whole rows, and rows with padding and, where the model has them, prefixes."""
    device = next(double.parameters()).device
    h = torch.randn(ROWS, TOKENS, width, generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long, device=device)
    mask[1, TOKENS - PADDING :] = 0
    described = {"inputs_embeds": h, "attention_mask": mask}
    if name == "HRM-Text" and double.config.prefix_lm:
        described["token_type_ids"] = (torch.arange(TOKENS, device=device) < PREFIX).long().expand(ROWS, TOKENS)
    return [{"inputs_embeds": h}, described]


def _run(double: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The final state of tokens that are no padding, and the gradients of the input and of every weight."""
    h = given["inputs_embeds"].clone().requires_grad_()
    leaves = {"the gradient of the input": h}
    for path, p in double.named_parameters():
        if p.requires_grad and not path.startswith("early_exit_gate"):
            leaves[f"the gradient of {path}"] = p
    with torch.enable_grad():
        out = double(**{**given, "inputs_embeds": h}, use_cache=False)
        state = (out[0] if isinstance(out, tuple) else out).last_hidden_state
        if "attention_mask" in given:
            state = state[given["attention_mask"].bool()]
        weights = torch.randn(state.shape, generator=torch.Generator().manual_seed(2)).to(state.device)
        loss = (state * weights).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True, allow_unused=True)
    return {"the last state": state.detach(), **dict(zip(leaves, grads, strict=True))}
