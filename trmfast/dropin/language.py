"""The structure of looped language models: HRM-Text of transformers, and Ouro, whose code comes with its checkpoints.

The model keeps its embedding, its rotation, its head and its loss; its layers run as one recursion, by
trmfast/dropin/language_forward.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from trmfast.spec import BlockSpec, NetSpec
from trmfast.watch import hook_of, is_sharded, watched_modules

__all__ = ["KINDS", "Kind", "Parts", "functions_of", "kind_of", "language_models", "networks_of", "packed", "read"]


@dataclass(frozen=True)
class Kind:
    """The names of a model's parts.

    Attributes:
        children, tensors: modules and tensors by which the model is known.
        stacks: the networks in the order of the program; "" is the model itself.
        projections: of attention, those that read its input, in the order in which they are packed.
        norms: of a layer, in the order of application.
        final: the norm behind the layers.
        eps: the attribute of a norm that holds its epsilon.
        placement, weighted: as ``norm_placement`` and ``norm_weight`` of :class:`BlockSpec`.
    """

    children: tuple[str, ...]
    tensors: tuple[str, ...]
    stacks: tuple[str, ...]
    projections: tuple[str, ...]
    norms: tuple[str, ...]
    final: str
    eps: str
    placement: str
    weighted: bool


KINDS: dict[str, Kind] = {
    "HRM-Text": Kind(
        ("embed_tokens", "rotary_emb", "H_module", "L_module"),
        ("z_L_init",),
        ("H_module", "L_module"),
        ("gate_proj", "q_proj", "k_proj", "v_proj"),
        ("input_layernorm", "post_attention_layernorm"),
        "final_norm",
        "eps",
        "pre",
        weighted=False,
    ),
    "Ouro": Kind(
        ("embed_tokens", "rotary_emb", "layers", "norm", "early_exit_gate"),
        (),
        ("",),
        ("q_proj", "k_proj", "v_proj"),
        ("input_layernorm", "input_layernorm_2", "post_attention_layernorm", "post_attention_layernorm_2"),
        "norm",
        "variance_epsilon",
        "sandwich",
        weighted=True,
    ),
}


def kind_of(module: nn.Module) -> str | None:
    """The name of the looped language model that a module is, by its parts, or None."""
    for name, kind in KINDS.items():
        if all(child in module._modules for child in kind.children) and all(
            tensor in module._parameters or tensor in module._buffers for tensor in kind.tensors
        ):
            return name
    return None


def language_models(model: nn.Module) -> list[nn.Module]:
    """The looped language models inside a model."""
    return [module for module in model.modules() if kind_of(module) is not None]


def networks_of(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """The modules that the recursion stands for, by path."""
    paths = [stack for stack in KINDS[name].stacks if stack] or ["layers", KINDS[name].final]
    return {path: model.get_submodule(path) for path in paths}


def functions_of(model: nn.Module, name: str) -> dict[str, str]:
    """The function that computes each module of the networks, by path and by name: a copy or a pickle keeps them."""
    return {
        f"{path}.{inner}".rstrip("."): function
        for path, network in networks_of(model, name).items()
        for inner, function in _functions(network).items()
    }


def _functions(module: nn.Module) -> dict[str, str]:
    forwards = {path: type(part).forward for path, part in watched_modules(module)}
    return {path: f"{forward.__module__}.{forward.__qualname__}" for path, forward in forwards.items()}


# ---------------------------------------------------------------- structure

Reader = tuple[nn.Module, str]
Fact = tuple[dict[str, Any], str, Any]


@dataclass
class Parts:
    """What a network's weights are read from, and what its spec was read from.

    Attributes:
        spec: of the network.
        readers: (module, parameter) in the order in which :func:`packed` takes them.
        facts: (dict, key, value) that must stay.
    """

    spec: NetSpec
    readers: list[Reader]
    facts: list[Fact]


def read(model: nn.Module, name: str) -> list[Parts]:
    """The networks of a model.

    Raises:
        ValueError: a part that the recursion does not compute, in one line with its path.
    """
    found = [_read_stack(model, stack, KINDS[name]) for stack in KINDS[name].stacks]
    if len({parts.spec for parts in found}) > 1:
        raise ValueError(f"{', '.join(KINDS[name].stacks)}: got networks that differ, accepted are equal ones")
    return found


def _read_stack(model: nn.Module, stack: str, kind: Kind) -> Parts:
    owner = model.get_submodule(stack)
    layers = owner._modules.get("layers")
    prefix = f"{stack}.layers".strip(".")
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise ValueError(f"{prefix}: got {type(layers).__name__}, accepted is a list of layers")
    blocks: list[BlockSpec] = []
    readers: list[Reader] = []
    facts: list[Fact] = [(cast(dict[str, Any], owner._modules), "layers", layers)]
    first: dict[str, str] = {}
    for i, layer in enumerate(layers):
        block = _read_layer(layer, f"{prefix}.{i}", kind, readers, facts)
        if blocks and block != blocks[0]:
            raise ValueError(f"{prefix}.{i}: got {block}, accepted is {blocks[0]}, that of the layers before")
        for path, function in _functions(layer).items():
            accepted = first.setdefault(path, function)
            if function != accepted:
                raise ValueError(f"{prefix}.{i}.{path}: got {function}, accepted is {accepted}, as in layer 0")
        blocks.append(block)
    final = _norm(owner, kind.final, f"{stack}.{kind.final}".strip("."), kind, readers, facts)
    if final != blocks[0].rms_norm_eps:
        accepted = f"{blocks[0].rms_norm_eps}, that of the layers"
        raise ValueError(f"{stack}.{kind.final}: got epsilon {final}, accepted is {accepted}".lstrip("."))
    return Parts(NetSpec(blocks[0], len(layers), final_norm=True), readers, facts)


def _read_layer(layer: nn.Module, path: str, kind: Kind, readers: list[Reader], facts: list[Fact]) -> BlockSpec:
    _only(layer, path, ("self_attn", "mlp", *kind.norms))
    attention, mlp = cast(nn.Module, layer.self_attn), cast(nn.Module, layer.mlp)
    _only(attention, f"{path}.self_attn", (*kind.projections, "o_proj"))
    _only(mlp, f"{path}.mlp", ("gate_proj", "up_proj", "down_proj"), more="act_fn")
    shapes = {}
    for owner, where, names in (
        (attention, f"{path}.self_attn", (*kind.projections, "o_proj")),
        (mlp, f"{path}.mlp", ("gate_proj", "up_proj", "down_proj")),
    ):
        for name in names:
            shapes[where.rpartition(".")[2], name] = _linear(owner, name, where, readers, facts)
    values: dict[str, Any] = {name: getattr(attention, name, None) for name in ("head_dim", "scaling", *ZERO)}
    head_dim = values["head_dim"]
    if isinstance(head_dim, bool) or not isinstance(head_dim, int) or head_dim < 1:
        raise ValueError(f"{path}.self_attn.head_dim: got {head_dim!r}, accepted are integers >= 1")
    if not isinstance(values["scaling"], float) or not math.isclose(values["scaling"], head_dim**-0.5):
        raise ValueError(f"{path}.self_attn.scaling: got {values['scaling']!r}, accepted is head_dim^-0.5")
    for name in ZERO:
        if values[name]:
            raise ValueError(f"{path}.self_attn.{name}: got {values[name]!r}, accepted is none")
    facts += [(attention.__dict__, name, attention.__dict__.get(name)) for name in values]
    epsilons = {_norm(layer, name, f"{path}.{name}", kind, readers, facts) for name in kind.norms}
    if len(epsilons) > 1:
        raise ValueError(f"{path}: got norms of epsilon {sorted(epsilons)}, accepted is one epsilon")
    query, hidden = shapes["self_attn", "q_proj"]
    return BlockSpec(
        hidden_size=hidden,
        intermediate_size=shapes["mlp", "up_proj"][0],
        num_heads=query // head_dim,
        num_kv_heads=shapes["self_attn", "k_proj"][0] // head_dim,
        head_dim=head_dim,
        causal=True,
        rms_norm_eps=epsilons.pop(),
        norm_placement=kind.placement,
        norm_weight=kind.weighted,
        gate="channel" if "gate_proj" in kind.projections else "none",
    )


ZERO = ("attention_dropout", "sliding_window")


def _only(module: nn.Module, path: str, names: Sequence[str], more: str = "") -> None:
    got = [name for name, child in module._modules.items() if child is not None and name != more]
    if sorted(got) != sorted(names):
        raise ValueError(f"{path}: got the parts {', '.join(got)}, accepted are {', '.join(names)}")
    if hook_of(module) is not None and not is_sharded(module):
        raise ValueError(f"{path}: has {hook_of(module)}, accepted are none, the recursion does not call it")
    if "forward" in module.__dict__:
        raise ValueError(f"{path}.forward: replaced on the instance, accepted is the method of its class")


def _linear(owner: nn.Module, name: str, path: str, readers: list[Reader], facts: list[Fact]) -> tuple[int, int]:
    linear = owner._modules[name]
    if type(linear) is not nn.Linear:
        raise ValueError(f"{path}.{name}: got {type(linear).__name__}, accepted is torch.nn.Linear")
    _only(linear, f"{path}.{name}", ())
    if linear._parameters.get("bias") is not None:
        raise ValueError(f"{path}.{name}.bias: got a bias, accepted is None")
    readers.append((linear, "weight"))
    facts.append((cast(dict[str, Any], linear._parameters), "bias", None))
    return linear.out_features, linear.in_features


def _norm(owner: nn.Module, name: str, path: str, kind: Kind, readers: list[Reader], facts: list[Fact]) -> float:
    norm = cast(nn.Module, owner._modules.get(name))
    eps = getattr(norm, kind.eps, None)
    if not isinstance(eps, float):
        raise ValueError(f"{path}.{kind.eps}: got {eps!r}, accepted are positive floats")
    if list(norm._parameters) != ["weight"] * kind.weighted:
        accepted = "weight" if kind.weighted else "none"
        raise ValueError(f"{path}: got parameters {', '.join(norm._parameters) or 'none'}, accepted is {accepted}")
    _only(norm, path, ())
    if kind.weighted:
        readers.append((norm, "weight"))
    facts.append((norm.__dict__, kind.eps, eps))
    return eps


def packed(kind: Kind, layers: int, raw: Sequence[Tensor]) -> list[Tensor]:
    """The weights of a network in the order of ``NetSpec.weight_shapes``, out of those that :func:`read` found."""
    inputs, norms = len(kind.projections), len(kind.norms) * kind.weighted
    each, found = inputs + 4 + norms, []
    for start in range(0, layers * each, each):
        layer = raw[start : start + each]
        o, gate, up, down = layer[inputs : inputs + 4]
        found += [torch.cat(tuple(layer[:inputs])), o, torch.cat((gate, up)), down, *layer[inputs + 4 :]]
    return [*found, *raw[layers * each :]]
