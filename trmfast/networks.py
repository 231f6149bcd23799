"""Blocks and networks, named as in the published state_dicts, and the watch over the modules that a recursion reads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from trmfast import reference
from trmfast.layers import (
    MLP,
    Attention,
    CastedLinear,
    ConvSwiGLU,
    CosSin,
    Injection,
    RMSNorm,
    SimpleGLA,
    SwiGLU,
)
from trmfast.spec import BlockSpec, NetSpec
from trmfast.watch import Watch, hook_of, is_sharded, plain, watch_of, watched_modules

__all__ = ["Block", "Net", "block_weights", "watch_nets"]


class Block(nn.Module):
    """One block: ``self_attn``, ``mlp_t`` or ``simple_gla``, then ``mlp``.

    Where norms have weights, also ``norm1`` to ``norm2`` or ``norm4``.
    A subclass may call its attention by another name.
    """

    attention_name = "self_attn"

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.spec = spec
        if spec.token_mixer == "attention":
            self.add_module(self.attention_name, Attention(spec))
        elif spec.token_mixer == "simple_gla":
            self.simple_gla = SimpleGLA(spec)
        else:
            self.mlp_t = SwiGLU(spec.seq_len, spec.seq_intermediate_size)
        self.mlp: SwiGLU | ConvSwiGLU | MLP
        if spec.channel_mixer == "swiglu":
            self.mlp = SwiGLU(spec.hidden_size, spec.intermediate_size)
        elif spec.channel_mixer == "conv_swiglu":
            self.mlp = ConvSwiGLU(spec.hidden_size, spec.intermediate_size, spec.conv_kernel)
        else:
            self.mlp = MLP(spec)
        for i in range(spec.num_norms if spec.norm_weight else 0):
            self.add_module(f"norm{i + 1}", RMSNorm(spec, spec.hidden_size))

    def weights(self) -> list[Tensor]:
        """The parameters in the order of ``spec.weight_shapes``."""
        return block_weights(self, self.spec)

    def forward(self, h: Tensor, cos_sin: CosSin | None = None, segments: Tensor | None = None) -> Tensor:
        """h: [B, L, D]; cos_sin: RoPE tables [>= L, head_dim]; segments as in :func:`trmfast.recursion`."""
        if not torch.compiler.is_compiling():
            watch_of(self, partial(_watch_block, self))
        cos, sin = cos_sin if cos_sin is not None else (None, None)
        return reference.run_block(self.spec, h, self.weights(), cos, sin, segments=segments)


def block_weights(block: Any, spec: BlockSpec) -> list[Tensor]:
    """The parameters that a block of this structure has now, in the order of ``spec.weight_shapes``."""
    return [_at(block, path) for path in _paths(block, spec)]


def _paths(block: Any, spec: BlockSpec) -> list[str]:
    """Where the weights of a block are, in the order of ``spec.weight_shapes``."""
    name = getattr(block, "attention_name", "self_attn")
    return [path.replace("self_attn.", f"{name}.") for path in spec.weight_shapes]


def _at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _last_parts(spec: NetSpec) -> dict[str, type[nn.Module]]:
    """The modules of a network beside its blocks, in the order of ``spec.weight_shapes``."""
    parts: dict[str, type[nn.Module]] = {}
    if spec.final_norm and spec.block.norm_weight:
        parts["norm"] = RMSNorm
    if spec.injection != "add":
        parts["injection"] = Injection
    return parts


class Net(nn.Module):
    """A stack of blocks; ``layers.0.self_attn.qkv_proj.weight`` and so on, as in the published state_dicts.

    ``norm`` is the final norm where it has a weight, ``injection`` the way in where that has one.  A subclass may have
    blocks of another :attr:`block_type`.
    """

    block_type = Block

    def __init__(self, spec: NetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.layers = nn.ModuleList(self.block_type(spec.block) for _ in range(spec.num_layers))
        if spec.final_norm and spec.block.norm_weight:
            self.norm = RMSNorm(spec.block, spec.block.hidden_size)
        if spec.injection != "add":
            self.injection = Injection(spec)

    def weights(self) -> tuple[Tensor, ...]:
        """The parameters in the order of ``spec.weight_shapes``."""
        layers = tuple(weight for layer in self.layers for weight in cast(Block, layer).weights())
        return (*layers, *(_at(self, f"{name}.weight") for name in _last_parts(self.spec)))

    def forward(self, h: Tensor, cos_sin: CosSin | None = None, segments: Tensor | None = None) -> Tensor:
        """Applies the layers and the final norm once, in plain PyTorch; arguments as in :class:`Block`.

        h is behind the injection: ``self.injection(total, x)`` where that has a weight.
        """
        for layer in self.layers:
            h = layer(h, cos_sin, segments)
        if not self.spec.final_norm:
            return h
        if self.spec.block.norm_weight:
            return cast(Tensor, self.norm(h))
        return reference.rms_norm(h, self.spec.block.rms_norm_eps)


# ---------------------------------------------------------------- modules that the recursion reads but does not call

_WHY = "the fused recursion reads its weights and does not call it; torch.nn.utils.parametrize is followed"
# The functions at import: a class that is patched later differs.
_FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward
    for kind in (
        Block,
        Attention,
        SimpleGLA,
        SwiGLU,
        ConvSwiGLU,
        MLP,
        RMSNorm,
        Injection,
        CastedLinear,
        nn.Conv1d,
    )
}


def _parts(spec: BlockSpec, paths: Sequence[str]) -> dict[str, type[nn.Module]]:
    """The modules of a block by path; paths: those of its weights, of which the first is in the token mixer."""
    mixers: dict[str, type[nn.Module]] = {"attention": Attention, "mlp_t": SwiGLU, "simple_gla": SimpleGLA}
    parts = {paths[0].partition(".")[0]: mixers[spec.token_mixer]}
    mlps: dict[str, type[nn.Module]] = {"swiglu": SwiGLU, "conv_swiglu": ConvSwiGLU}
    parts["mlp"] = mlps.get(spec.channel_mixer, MLP)
    for path in paths:
        owner = path.rpartition(".")[0]
        if owner not in parts:
            linear = CastedLinear if owner.endswith("_proj") else RMSNorm
            parts[owner] = nn.Conv1d if owner.endswith("dwconv") else linear
    return parts


Facts = list[tuple[dict[str, Any], str, Any]]


def _child(parent: nn.Module, name: str, kind: type[nn.Module], where: str) -> nn.Module:
    child = parent._modules.get(name)
    if child is None:
        raise RuntimeError(f"{where}: got nothing, accepted is {kind.__name__}: {_WHY}")
    return plain(child)


def _examine_part(where: str, module: nn.Module, kind: type[nn.Module], spec: BlockSpec | NetSpec) -> Facts:
    """Checks one module of a network; returns what must stay."""
    facts: Facts = []
    if "forward" in module.__dict__:
        raise RuntimeError(f"{where}.forward: got another function, accepted is that of its class: {_WHY}")
    if type(module).forward is not _FORWARDS[kind]:
        got = f"another {kind.__name__}.forward" if type(module) is kind else type(module).__name__
        raise RuntimeError(f"{where}: got {got}, accepted is {kind.__name__}: {_WHY}")
    if kind is CastedLinear:
        if module._parameters.get("bias") is not None:
            raise RuntimeError(f"{where}.bias: got a bias, accepted is None: {_WHY}")
        facts.append((cast(dict[str, Any], module._parameters), "bias", None))
    if "spec" in module.__dict__:
        if module.spec != spec:
            raise RuntimeError(f"{where}.spec: got {module.spec}, accepted is {spec}, that of the network")
        facts.append((module.__dict__, "spec", spec))
    return facts


def _examine_block(
    path: str, block: nn.Module, spec: BlockSpec, called: bool = False
) -> tuple[list[tuple[nn.Module, str]], Facts]:
    """Where the weights of a block are read from, and what must stay.

    Raises:
        RuntimeError: a part was replaced, patched or hooked; hooks of a block that is ``called`` may be.
    """
    parts = {"": plain(block)}
    facts: Facts = []
    paths = _paths(parts[""], spec)
    kinds: dict[str, type[nn.Module]] = {"": Block, **_parts(spec, paths)}
    for name, kind in kinds.items():
        where = f"{path}.{name}".strip(".")
        if name:
            parent, _, last = name.rpartition(".")
            parts[name] = _child(parts[parent], last, kind, where)
        facts += _examine_part(where, parts[name], kind, spec)
    for name, module in watched_modules(block):
        hook = None if called and not name else hook_of(module)
        if hook is not None and not is_sharded(module):
            where = f"{path}.{name}".strip(".")
            raise RuntimeError(f"{where}: has {hook}, accepted are none: {_WHY}")
    return [(parts[owner], last) for owner, _, last in (p.rpartition(".") for p in paths)], facts


def _watch_block(block: Block) -> Watch:
    """The watch over the parts of a block that is called."""
    readers, facts = _examine_block("", block, block.spec, called=True)
    return Watch(block, list(block._modules.values()), readers, facts)  # type: ignore[arg-type]


def watch_nets(owner: nn.Module, names: Sequence[str], prefix: str = "") -> Watch:
    """The watch over networks that ``owner`` holds but does not call.

    Args:
        owner: the module.
        names: its networks, by path: :class:`Net`, or a list of blocks with a ``spec``.  Modules on the way are not
            called either.
        prefix: of their paths, in errors.

    Raises:
        RuntimeError: a module of theirs was replaced, patched or hooked, in one line with its path.
    """

    def examine() -> Watch:
        readers: list[tuple[nn.Module, str]] = []
        facts: Facts = []
        networks: list[nn.Module] = []
        for name in names:
            path, holder, outer = f"{prefix}{name}", owner, None
            *parents, last = name.split(".")
            for parent in parents:
                facts.append((holder._modules, parent, holder._modules[parent]))
                holder = plain(cast(nn.Module, holder._modules[parent]))
                outer = outer or holder
                if hook_of(holder) is not None:
                    raise RuntimeError(f"{path}: {parent} has {hook_of(holder)}, accepted are none: {_WHY}")
            held = holder._modules[last]
            net = plain(cast(nn.Module, held))
            spec = cast(NetSpec, net.spec)
            hook = hook_of(net)
            if hook is not None and not is_sharded(net):
                raise RuntimeError(f"{path}: has {hook}, accepted are none: {_WHY}")
            layers = net if isinstance(net, nn.ModuleList) else plain(cast(nn.Module, net.layers))
            blocks = path if layers is net else f"{path}.layers"
            if len(layers._modules) != spec.num_layers:
                got = len(layers._modules)
                raise RuntimeError(f"{blocks}: got {got} blocks, accepted are {spec.num_layers}, as in {path}.spec")
            facts += [(holder._modules, last, held), (net.__dict__, "spec", spec)]
            networks.append(outer or net)
            for i, block in layers._modules.items():
                more = _examine_block(f"{blocks}.{i}", cast(nn.Module, block), spec.block)
                readers += more[0]
                facts += more[1]
            for part, kind in _last_parts(spec).items():
                where = f"{path}.{part}"
                module = _child(net, part, kind, where)
                facts += _examine_part(where, module, kind, spec.block if kind is RMSNorm else spec)
                if hook_of(module) is not None:
                    raise RuntimeError(f"{where}: has {hook_of(module)}, accepted are none: {_WHY}")
                readers.append((module, "weight"))
        return Watch(owner, networks, readers, facts)

    return watch_of(owner, examine)
