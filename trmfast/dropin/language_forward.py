"""The forwards that run a looped language model's layers as one recursion.

A call that asks for what the recursion does not have (a cache, hidden states, attention maps, a mask that is more than
one run of tokens a row) runs the model's own code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from trmfast import ops
from trmfast.dropin.language import KINDS, functions_of, networks_of, packed, read
from trmfast.dropin.swap import BASE, SWAP, Swap
from trmfast.program import RecursionProgram
from trmfast.watch import Watch, inside, watch_of

__all__ = ["FORWARDS", "hrm_text_program"]

OUTPUT = "BaseModelOutputWithPast"


def _examine(model: nn.Module, own: Swap) -> Watch:
    """Raises RuntimeError if the layers are not those that were accelerated."""
    try:
        found = read(model, own.family)
    except ValueError as error:
        raise RuntimeError(f"{error}; this came after accelerate(): undo it, or call trmfast.restore(model)") from None
    if tuple(parts.spec for parts in found) != own.nets:
        raise RuntimeError(f"layers: got {found[0].spec}, accepted is {own.nets[0]}, that of accelerate()")
    for path, function in functions_of(model, own.family).items():
        if function != own.forwards.get(path):
            got = f"{path}: got {function}, accepted is {own.forwards.get(path, 'nothing')}"
            raise RuntimeError(f"{got}; this came after accelerate(): undo it, or call trmfast.restore(model)")
    networks = networks_of(model, own.family)
    facts = [(cast(dict[str, Any], model._modules), path, network) for path, network in networks.items()]
    facts += [fact for parts in found for fact in parts.facts]
    return Watch(model, list(networks.values()), [reader for parts in found for reader in parts.readers], facts)


def _recur(
    model: nn.Module, program: RecursionProgram, states: Sequence[Tensor], segments: Tensor | None, tables: Any
) -> tuple[Tensor, ...]:
    own = cast(Swap, model.__dict__[SWAP])
    kind, nets = KINDS[own.family], own.nets
    watch = None if torch.compiler.is_compiling() else watch_of(model, partial(_examine, model, own))
    if segments is not None:
        nets = tuple(replace(net, block=replace(net.block, segments=True)) for net in nets)
    cos, sin = (table[0] for table in tables)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        if watch:
            raw = watch.weights()
        else:
            raw = [getattr(*reader) for parts in read(model, own.family) for reader in parts.readers]
        each = len(raw) // len(nets)
        weights: list[Tensor] = []
        for n, net in enumerate(nets):
            weights += packed(kind, net.num_layers, raw[n * each : (n + 1) * each])
        return ops.recursion(
            program, nets, tensors, None, weights, cos, sin, own.backend, own.recompute, segments=segments
        )

    return inside(watch.sharded if watch else (), run, tuple(states))


def _boundaries(mask: Tensor | None, prefix: Tensor | None, like: Tensor) -> Tensor | str | None:
    """Boundaries [B, L, 2] of rows with padding on either side and a prefix; None where causal attention is all.

    Args:
        mask: which tokens are none of padding, [B, L], or None for all.
        prefix: which tokens see each other in both directions, bool [B, L], or None.
        like: [B, L, D].

    Returns:
        A reason where boundaries cannot say it.  Padding becomes sequences of its own, whose outputs mean nothing.
    """
    rows, length = like.shape[:2]
    if mask is not None and (mask.dim() != 2 or mask.shape != (rows, length)):
        return "a mask that is not one of tokens"
    whole = mask is None or bool(mask.all())
    if whole and (prefix is None or not bool(prefix.any())):
        return None
    position = torch.arange(length, device=like.device).expand(rows, length)
    real = torch.ones_like(position, dtype=torch.bool) if mask is None else mask.bool()
    count = real.sum(1, keepdim=True)
    start = real.int().argmax(1, keepdim=True)
    ahead = torch.zeros_like(start) if prefix is None else prefix.sum(1, keepdim=True)
    if not torch.equal(real, (position >= start) & (position < start + count)):
        return "a row of several runs of tokens"
    if prefix is not None and not torch.equal(prefix, (position >= start) & (position < start + ahead)):
        return "a prefix that is not at the start of its row"
    outside = torch.where(position < start, 0, start + count)
    first = torch.where(real, start, outside)
    return torch.stack((first, torch.where(real, start + ahead, first)), -1).int()


def _asks_for_more(model: Any, given: dict[str, Any]) -> bool:
    """Whether a call needs the model's own code."""
    config = model.config
    named = ("output_attentions", "output_hidden_states")
    if any(getattr(config, name, False) for name in named) or given.get("return_dict") is False:
        return True
    harmless = ("num_items_in_batch", "return_dict", "cache_position")
    return any(value is not None and value is not False for name, value in given.items() if name not in harmless)


def _prepared(
    model: Any, given: dict[str, Any], kwargs: dict[str, Any], prefix: Tensor | None = None
) -> tuple[Tensor, Any, Tensor | None] | None:
    """Embeddings [B, L, D], RoPE tables [1, L, head_dim] and segments of a call; None if it needs the model's own code.

    Args:
        model: the accelerated model.
        given: the arguments that its forward names.
        kwargs: the others.
        prefix: as in :func:`_boundaries`.
    """
    input_ids, h, positions = (given[name] for name in ("input_ids", "inputs_embeds", "position_ids"))
    if given["past_key_values"] is not None or given["use_cache"] or (input_ids is None) is (h is None):
        return None
    if _asks_for_more(model, kwargs):
        return None
    if h is None:
        h = model.embed_tokens(input_ids)
    if positions is None:
        positions = torch.arange(h.shape[1], device=h.device)[None]
    if positions.shape[0] > 1 and not torch.equal(positions, positions[:1].expand_as(positions)):
        return None  # rows have positions of their own
    segments = _boundaries(given["attention_mask"], prefix, h)
    return None if isinstance(segments, str) else (h, model.rotary_emb(h, positions[:1]), segments)


def _output(model: nn.Module, state: Tensor) -> Any:
    """The state in the class of outputs that the model's own code uses, found where its class or a base is defined."""
    modules = (sys.modules[kind.__module__] for kind in getattr(type(model), BASE).__mro__)
    make = next(getattr(module, OUTPUT) for module in modules if hasattr(module, OUTPUT))
    return make(last_hidden_state=state, past_key_values=None)


def hrm_text_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    token_type_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> Any:
    """``HrmTextModel.forward`` with the recursion fused."""
    given = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "past_key_values": past_key_values,
        "token_type_ids": token_type_ids,
        "inputs_embeds": inputs_embeds,
        "use_cache": use_cache,
    }
    prefix = token_type_ids == 1 if token_type_ids is not None and self.config.prefix_lm else None
    found = _prepared(self, given, kwargs, prefix)
    if found is None:
        return getattr(type(self), BASE).forward(self, **given, **kwargs)
    h, tables, segments = found
    x = h * self.embedding_scale
    program = hrm_text_program(self.config.H_cycles, self.config.L_cycles, tuple(self.L_bp_cycles_padded))
    z_L = self.z_L_init.to(dtype=x.dtype, device=x.device).expand_as(x)
    z_H, _ = _recur(self, program, (x, z_L), segments, tables)
    return _output(self, z_H)


@lru_cache(maxsize=64)
def hrm_text_program(H_cycles: int, L_cycles: int, windows: tuple[int, ...]) -> RecursionProgram:
    """The program of transformers' HRM-Text: in cycle h the last ``windows[h]`` updates of z_L have gradients."""
    program = RecursionProgram.hrm_text(H_cycles, L_cycles)
    updates = []
    for h in range(H_cycles):
        grad = windows[h] if h < len(windows) else 1
        for k in range(L_cycles + 1):
            update = program.updates[h * (L_cycles + 1) + k]
            updates.append(replace(update, grad=k >= L_cycles - grad))
    return RecursionProgram(program.states, program.nets, updates, program.updates_per_cycle)


def ouro_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    cache_position: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """``OuroModel.forward`` with the recursion fused; the state of every step is an output."""
    given = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "past_key_values": past_key_values,
        "inputs_embeds": inputs_embeds,
        "use_cache": use_cache,
        "cache_position": cache_position,
    }
    found = _prepared(self, given, kwargs)
    if found is None:
        return getattr(type(self), BASE).forward(self, **given, **kwargs)
    h, tables, segments = found
    program = _looped(self.total_ut_steps)
    states = list(_recur(self, program, (h,) * self.total_ut_steps, segments, tables))
    return _output(self, states[-1]), states, [self.early_exit_gate(state) for state in states]


@lru_cache(maxsize=64)
def _looped(steps: int) -> RecursionProgram:
    return RecursionProgram.looped(steps)


FORWARDS: dict[str, Callable[..., Any]] = {"HRM-Text": hrm_text_forward, "Ouro": ouro_forward}
