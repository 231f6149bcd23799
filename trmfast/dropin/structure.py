"""Structure: which module holds the recursion, and the specs of its networks; every difference becomes one line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from trmfast.dropin.families import FAMILIES, Family
from trmfast.networks import Block
from trmfast.problem import COMPUTE_DTYPES, Problem
from trmfast.spec import BlockSpec, NetSpec
from trmfast.watch import hook_of, is_sharded, plain

__all__ = [
    "Found",
    "UnsupportedModelError",
    "blocks_of",
    "find",
    "get",
    "inner_modules",
    "named_modules",
    "read_net",
    "settings_of",
]

NET_NAMES = tuple(dict.fromkeys(name for family in FAMILIES.values() for name in family.nets))
# Modules without weights that do nothing, or only what the block computes anyway: URM names its SiLU.
INERT = (nn.Identity, nn.SiLU)


class UnsupportedModelError(ValueError):
    """The model's recursion is not one that trmfast computes.

    Attributes:
        differences: what differs, one line each.
    """

    def __init__(self, differences: list[str]) -> None:
        self.differences = tuple(differences)
        super().__init__("accelerate: the model is left as it is:" + "".join(f"\n  - {line}" for line in differences))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (list(self.differences),)


@dataclass(frozen=True)
class Found:
    """A recursion in a model.

    Attributes:
        path: name of the inner module in the model.
        inner: the inner module.
        family: name of its family.
        nets: the specs of its networks.
        dtype: the dtype that the model computes in.
    """

    path: str
    inner: nn.Module
    family: str
    nets: tuple[NetSpec, ...]
    dtype: torch.dtype


def find(model: nn.Module) -> Found:
    """The one recursion in a model.

    Raises:
        UnsupportedModelError: there is none, there are several, or its structure differs from every family.
    """
    candidates = inner_modules(model)
    if not candidates:
        raise UnsupportedModelError(
            [f"no module has lm_head, q_head and networks under one of the names {', '.join(NET_NAMES)}"]
        )
    if len(candidates) > 1:
        paths = ", ".join(path or "the model itself" for path, _ in candidates)
        raise UnsupportedModelError([f"several modules hold a recursion: {paths}; accelerate them one at a time"])
    path, inner = candidates[0]
    if any(isinstance(module, Block) for module in inner.modules()):
        raise UnsupportedModelError([f"{path or 'the model itself'}: runs trmfast's recursion already"])
    name = _family(inner)
    family = FAMILIES[name]
    differences = _inner_differences(inner, family)
    nets = [read_net(inner, net, differences) for net in family.nets]
    differences += _shared(inner, family)
    dtype = getattr(inner, "forward_dtype", None)
    if dtype not in COMPUTE_DTYPES:
        differences.append(f"forward_dtype: got {dtype!r}, accepted are {', '.join(map(_name, COMPUTE_DTYPES))}")
    else:
        differences += _dtypes(inner, family, cast(torch.dtype, dtype))
    specs = tuple(net for net in nets if net is not None)
    if not differences:
        try:
            settings = getattr(inner, family.settings)
            Problem(family.program(*(getattr(settings, cycles) for cycles in family.cycles)), specs)
        except ValueError as error:
            differences.append(str(error))
    if differences:
        raise UnsupportedModelError(differences)
    return Found(path, inner, name, specs, cast(torch.dtype, dtype))


def inner_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that hold heads and networks, by path; accelerated ones too."""
    return [(path, module) for path, module in model.named_modules() if _is_inner(module)]


def blocks_of(inner: nn.Module, net: str) -> list[nn.Module]:
    """The blocks of a network."""
    module = plain(cast(nn.Module, getattr(inner, net)))
    blocks = module if net == "layers" else plain(cast(nn.Module, module.layers))
    return [plain(block) for block in cast(nn.ModuleList, blocks)]


def named_modules(inner: nn.Module, net: str) -> Iterator[tuple[str, nn.Module]]:
    """Every module of a network by its path in the inner module, the network itself first."""
    for path, module in cast(nn.Module, getattr(inner, net)).named_modules(prefix=net, remove_duplicate=False):
        yield path.replace("._orig_mod", ""), module


def settings_of(block: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The attributes of a block that its spec was read from: (module, name)."""
    yield block, "norm_eps"
    mixer = block._modules.get("self_attn")
    if mixer is not None:
        for name in ("num_heads", "num_key_value_heads", "head_dim", "causal"):
            yield plain(mixer), name


# ---------------------------------------------------------------- the inner module


def _is_inner(module: nn.Module) -> bool:
    children = module._modules
    if "lm_head" not in children or "q_head" not in children:
        return False
    return any(isinstance(children.get(name), nn.Module) for name in NET_NAMES)


def _family(inner: nn.Module) -> str:
    present = {name for name in NET_NAMES if isinstance(inner._modules.get(name), nn.Module)}
    buffers = set(inner._buffers)
    alike = {name: family for name, family in FAMILIES.items() if set(family.nets) == present}
    for name, family in alike.items():
        if set(family.inits) == buffers:
            return name
    got = f"networks {', '.join(sorted(present))} and buffers {', '.join(sorted(buffers)) or 'none'}"
    accepted = "; ".join(f"{n}: {', '.join(f.nets)} and {', '.join(f.inits)}" for n, f in (alike or FAMILIES).items())
    raise UnsupportedModelError([f"got {got}, accepted are {accepted}"])


def _inner_differences(inner: nn.Module, family: Family) -> list[str]:
    differences = []
    for name in (family.method, "forward"):
        if name in inner.__dict__:
            differences.append(f"{name}: replaced on the instance, accepted is the method of its class")
    for name in ("_input_embeddings", "empty_carry", family.method):
        if not callable(getattr(inner, name, None)):
            differences.append(f"{name}: got {getattr(inner, name, None)!r}, accepted is a method")
    settings = getattr(inner, family.settings, None)
    for name in family.cycles:
        value = getattr(settings, name, None)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            differences.append(f"{family.settings}.{name}: got {value!r}, accepted are integers >= 1")
    length = getattr(inner, "puzzle_emb_len", None)
    if not isinstance(length, int):
        differences.append(f"puzzle_emb_len: got {length!r}, accepted are integers >= 0")
    return differences


def _shared(inner: nn.Module, family: Family) -> list[str]:
    """Modules and parameters that occur twice in the networks."""
    differences = []
    modules: dict[int, str] = {}
    parameters: dict[int, str] = {}
    for net in family.nets:
        for path, module in named_modules(inner, net):
            first = modules.setdefault(id(module), path)
            if first != path and not isinstance(module, INERT):
                differences.append(f"{path}: the same module as {first}, accepted are modules of their own")
                continue
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                here = f"{path}.{name}"
                owner = parameters.setdefault(id(parameter), here)
                if owner != here and first == path:
                    differences.append(f"{here}: the same parameter as {owner}, accepted are parameters of their own")
    return differences


def _dtypes(inner: nn.Module, family: Family, forward_dtype: torch.dtype) -> list[str]:
    """Weights of matrix products share one dtype; a convolution computes in the dtype of its weights."""
    differences = []
    seen: dict[torch.dtype, str] = {}
    for net in family.nets:
        for path, module in named_modules(inner, net):
            if is_parametrized(module):
                differences.append(f"{path}: is parametrized, accepted are plain weights: accelerate first")
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                here = f"{path}.{name}"
                kind = type(parameter.data)
                if kind is not Tensor:
                    hint = ", accelerate before fully_shard" if kind.__name__ == "DTensor" else ""
                    differences.append(f"{here}: got a {kind.__name__}, accepted is torch.Tensor{hint}")
                elif isinstance(module, nn.Conv1d):
                    if parameter.dtype != forward_dtype:
                        differences.append(
                            f"{here}: got {_name(parameter.dtype)}, accepted is {_name(forward_dtype)}, the forward "
                            "dtype: a convolution in another dtype rounds where the rest of the block does not"
                        )
                elif not parameter.dtype.is_floating_point:
                    differences.append(f"{here}: got {_name(parameter.dtype)}, accepted are float dtypes")
                else:
                    seen.setdefault(parameter.dtype, here)
    if len(seen) > 1:
        got = ", ".join(f"{_name(dtype)} ({path})" for dtype, path in seen.items())
        differences.append(f"mixed dtypes: got {got}, accepted is one dtype for all weights of the networks")
    return differences


# ---------------------------------------------------------------- networks


def read_net(inner: nn.Module, net: str, differences: list[str]) -> NetSpec | None:
    """The spec of a network; None, and lines in ``differences``, where it is not one that trmfast computes."""
    module = plain(cast(nn.Module, getattr(inner, net)))
    layers = module if net == "layers" else module._modules.get("layers")
    if layers is None or not isinstance(plain(layers), nn.ModuleList) or not len(cast(nn.ModuleList, plain(layers))):
        differences.append(f"{net}: got {type(module).__name__} without layers, accepted is a list of blocks")
        return None
    prefix = net if net == "layers" else f"{net}.layers"
    specs: list[BlockSpec] = []
    before = len(differences)
    for i, block in enumerate(blocks_of(inner, net)):
        spec = _read_block(block, f"{prefix}.{i}", differences)
        if spec is not None:
            specs.append(spec)
    for path, child in named_modules(inner, net):
        hook = hook_of(child)
        if hook is not None and not is_sharded(child):
            differences.append(f"{path}: has {hook}, which a fused recursion would not call")
        if "forward" in child.__dict__ and plain(child) is child:
            differences.append(f"{path}.forward: replaced on the instance, accepted is the method of its class")
    if net != "layers":
        _only(module, net, {"layers"}, differences)
    for i, spec in enumerate(specs[1:], start=1):
        for name, value in asdict(spec).items():
            first = getattr(specs[0], name)
            if value != first:
                differences.append(f"{prefix}.{i}: got {name} {value}, accepted is {first}, that of the first block")
    return NetSpec(specs[0], len(specs)) if specs and len(differences) == before else None


def _only(module: nn.Module, path: str, children: set[str], differences: list[str]) -> None:
    """Nothing else in a module that could take part in its forward."""
    for name, child in module._modules.items():
        if name in children or child is None or isinstance(child, INERT):
            continue
        if isinstance(child, nn.modules.dropout._DropoutNd):
            if child.p > 0:
                differences.append(f"{path}.{name}: got dropout {child.p}, accepted is 0")
            continue
        what = type(child).__name__
        weights = ", ".join(n for n, _ in child.named_parameters())
        what += f" with {weights}" if weights else ""
        differences.append(f"{path}.{name}: got an extra {what}, accepted are {', '.join(sorted(children)) or 'none'}")
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            differences.append(f"{path}.{name}: got an extra tensor {list(tensor.shape)}, accepted is none")


def _read_block(block: nn.Module, path: str, differences: list[str]) -> BlockSpec | None:
    before = len(differences)
    mixers = {"self_attn", "mlp_t"} & set(block._modules)
    if len(mixers) != 1 or "mlp" not in block._modules:
        got = ", ".join(block._modules) or "no submodules"
        differences.append(f"{path}: got {got}, accepted are self_attn or mlp_t, and mlp")
        return None
    mixer = mixers.pop()
    _only(block, path, {mixer, "mlp"}, differences)
    options: dict[str, Any] = {}
    mlp = cast(nn.Module, block.mlp)
    children = {"gate_up_proj", "down_proj"}
    if "dwconv" in mlp._modules:
        options["channel_mixer"] = "conv_swiglu"
        children |= {"dwconv"}
    down = _weight(mlp, "down_proj", f"{path}.mlp", differences)
    _weight(mlp, "gate_up_proj", f"{path}.mlp", differences)
    _only(mlp, f"{path}.mlp", children, differences)
    if "dwconv" in children:
        options["conv_kernel"] = _read_conv(cast(nn.Module, mlp.dwconv), f"{path}.mlp.dwconv", differences)
    module = cast(nn.Module, getattr(block, mixer))
    if mixer == "self_attn":
        _weight(module, "qkv_proj", f"{path}.self_attn", differences)
        _weight(module, "o_proj", f"{path}.self_attn", differences)
        _only(module, f"{path}.self_attn", {"qkv_proj", "o_proj"}, differences)
        for name, source in (("num_heads",) * 2, ("num_kv_heads", "num_key_value_heads"), ("head_dim",) * 2):
            value = getattr(module, source, None)
            if isinstance(value, bool) or not isinstance(value, int):
                differences.append(f"{path}.self_attn.{source}: got {value!r}, accepted are integers >= 1")
            options[name] = value
        options["causal"] = bool(getattr(module, "causal", False))
    else:
        seq_down = _weight(module, "down_proj", f"{path}.mlp_t", differences)
        _weight(module, "gate_up_proj", f"{path}.mlp_t", differences)
        _only(module, f"{path}.mlp_t", {"gate_up_proj", "down_proj"}, differences)
        options["token_mixer"] = "mlp_t"
        if seq_down is not None:
            options["seq_len"], options["seq_intermediate_size"] = seq_down
    eps = getattr(block, "norm_eps", None)
    if not isinstance(eps, float):
        differences.append(f"{path}.norm_eps: got {eps!r}, accepted are positive floats")
    if len(differences) > before or down is None:
        return None
    hidden, inner = down
    try:
        spec = BlockSpec(hidden, inner, rms_norm_eps=cast(float, eps), **options)
    except ValueError as error:
        differences.append(f"{path}: {error}")
        return None
    for weight, shape in spec.weight_shapes.items():
        actual = list(cast(Tensor, get(block, weight)).shape)
        if actual != list(shape):
            differences.append(f"{path}.{weight}: got shape {actual}, accepted is {list(shape)}")
    return spec


def get(module: Any, path: str) -> Any:
    """The attribute at a dotted path."""
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _weight(owner: nn.Module, name: str, path: str, differences: list[str]) -> tuple[int, int] | None:
    """Shape of a projection's weight [out, in]; the projection has nothing else."""
    linear = owner._modules.get(name)
    parametrized = linear is not None and is_parametrized(linear, "weight")
    weight = None if linear is None else linear._parameters.get("weight")
    if parametrized:
        weight = cast(nn.Parameter, cast(Any, linear).weight)
    if linear is None or weight is None or weight.dim() != 2:
        got = "nothing" if linear is None else type(linear).__name__
        differences.append(f"{path}.{name}: got {got}, accepted is a projection with a weight of two dimensions")
        return None
    bias = linear._parameters.get("bias")
    if bias is not None:
        differences.append(f"{path}.{name}.bias: got a bias [{bias.numel()}], accepted is none")
    extra = set(linear._parameters) | set(linear._buffers) | set(linear._modules)
    for other in sorted(extra - {"weight", "bias", "parametrizations" if parametrized else ""}):
        if getattr(linear, other) is not None:
            differences.append(f"{path}.{name}.{other}: got an extra part, accepted is a weight alone")
    rows, columns = weight.shape
    return rows, columns


def _read_conv(conv: nn.Module, path: str, differences: list[str]) -> int:
    """Taps of a depthwise convolution over the sequence."""
    if not isinstance(conv, nn.Conv1d):
        differences.append(f"{path}: got {type(conv).__name__}, accepted is torch.nn.Conv1d")
        return 1
    taps = conv.kernel_size[0]
    wanted: dict[str, Any] = {
        "groups": conv.in_channels,
        "out_channels": conv.in_channels,
        "stride": (1,),
        "dilation": (1,),
        "padding": (taps // 2,),
        "padding_mode": "zeros",
    }
    for name, accepted in wanted.items():
        if getattr(conv, name) != accepted:
            differences.append(f"{path}.{name}: got {getattr(conv, name)!r}, accepted is {accepted!r}")
    if conv.bias is None:
        differences.append(f"{path}.bias: got None, accepted is a bias")
    return taps


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
