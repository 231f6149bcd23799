"""Tensor names of checkpoints, the models they belong to, and the configuration that their shapes imply."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trmfast.config import own_names
from trmfast.models import HRM, TRM, URM, ACTModel, TRMHier6, TRMSingleZ
from trmfast.spec import swiglu_width

__all__ = ["LAYOUTS", "Layout", "find_layout", "inferred", "inner_names"]

WRAPPERS = ("_orig_mod", "module", "model", "inner")


def _same(values: dict[str, Any]) -> dict[str, Any]:
    return values


@dataclass(frozen=True)
class Layout:
    """How a model appears in its tensors.

    Attributes:
        name: of the model's class in trmfast.
        model: the class.
        has: prefixes, each of which some tensor name must have.
        lacks: prefixes that no tensor name may have.
        translate: configuration keys as trmfast names them.
        adapt: tensors as trmfast's model has them.
    """

    name: str
    model: type[ACTModel]
    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    translate: Callable[[dict[str, Any]], dict[str, Any]] = _same
    adapt: Callable[[dict[str, Tensor]], dict[str, Tensor]] = _same

    def fits(self, names: Mapping[str, Any]) -> bool:
        """Whether tensors of these names are this model's."""

        def present(part: str) -> bool:
            return any(name == part or name.startswith(f"{part}.") for name in names)

        return all(present(part) for part in self.has) and not any(present(part) for part in self.lacks)


# ---------------------------------------------------------------- nano-trm

NANO_KEYS = {
    "num_layers": "L_layers",
    "ffn_expansion": "expansion",
    "puzzle_emb_dim": "puzzle_emb_ndim",
    "num_puzzles": "num_puzzle_identifiers",
    "N_supervision": "halt_max_steps",
    "use_mlp_t": "mlp_t",
}
NANO_NAMES = {
    "lenet": "L_level",
    "input_embedding": "embed_tokens",
    "z_H_init": "H_init",
    "z_L_init": "L_init",
}


def _nano_config(values: dict[str, Any]) -> dict[str, Any]:
    for name in ("use_conv_swiglu", "use_board_swiglu"):
        if values.get(name):
            raise ValueError(f"{name}: got True, accepted is False, trmfast.TRM has no convolution in its SwiGLU")
    found = {NANO_KEYS.get(name, name): value for name, value in values.items()}
    if "pos_emb_type" in found and "pos_encodings" not in found:
        kind = found["pos_emb_type"]
        if kind == "2d":
            raise ValueError("pos_emb_type: got '2d', accepted are '1d' and none, trmfast.TRM rotates by one position")
        found["pos_encodings"] = "rope" if kind == "1d" else "none"
    for name in ("num_puzzle_identifiers", "vocab_size", "seq_len", "batch_size"):
        if found.get(name) == 0:  # its default, filled in from the data
            del found[name]
    dtype = found.get("forward_dtype")
    if isinstance(dtype, torch.dtype):
        found["forward_dtype"] = str(dtype).removeprefix("torch.")
    elif dtype is None:  # its default; the tensors decide
        found.pop("forward_dtype", None)
    return found


def _nano_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        first = NANO_NAMES.get(first, first)
        found[f"{first}.{rest}" if rest else first] = tensor
    # It has no q_continue, which TRM does not read either: the untrained row of a new model.
    weight, bias = found.get("q_head.weight"), found.get("q_head.bias")
    if weight is not None and bias is not None and weight.shape[:-1] == bias.shape == (1,):
        found["q_head.weight"] = torch.cat((weight, torch.zeros_like(weight)))
        found["q_head.bias"] = torch.cat((bias, torch.full_like(bias, -5)))
    return found


LAYOUTS = (
    Layout("TRM", TRM, ("embed_tokens", "L_level", "H_init", "L_init"), ("H_level",)),
    Layout("TRMSingleZ", TRMSingleZ, ("embed_tokens", "L_level", "L_init"), ("H_level", "H_init")),
    Layout("TRMHier6", TRMHier6, ("embed_tokens", "L_level", "H_init", "L1_init", "L6_init")),
    Layout("HRM", HRM, ("embed_tokens", "H_level", "L_level", "H_init", "L_init")),
    Layout("URM", URM, ("embed_tokens", "layers", "init_hidden"), (), own_names),
    Layout("TRM", TRM, ("input_embedding", "lenet", "z_H_init"), (), _nano_config, _nano_tensors),
)


# ---------------------------------------------------------------- names and shapes


def inner_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by their names inside the inner model, without the prefixes of wrappers.

    Raises:
        ValueError: two tensors of one name.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts = [part for part in name.split(".") if part != "_orig_mod"]
        while parts and parts[0] in WRAPPERS:
            parts.pop(0)
        short = ".".join(parts)
        if short in found:
            raise ValueError(f"path: holds {short} twice, under different prefixes")
        found[short] = tensor
    return found


def find_layout(names: Mapping[str, Tensor]) -> Layout:
    """The layout of tensors with these names inside the inner model.

    Raises:
        ValueError: trmfast has no such model.
    """
    for layout in LAYOUTS:
        if layout.fits(names):
            return layout
    tops = sorted({name.partition(".")[0] for name in names})
    shown = ", ".join(tops[:8]) + (", ..." if len(tops) > 8 else "")
    accepted = ", ".join(dict.fromkeys(layout.name for layout in LAYOUTS))
    raise ValueError(f"path: holds {shown}, accepted are the tensors of {accepted}")


def inferred(layout: Layout, tensors: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration keys that follow from the tensors.

    Args:
        layout: which model it is.
        tensors: by their names inside the inner model.
        given: what is known already; the split of the sequence into puzzle tokens and others depends on it.

    Raises:
        ValueError: a tensor has another number of dimensions than in any such model, or a given length does not fit.
    """
    vocabulary, D = _matrix(tensors, "embed_tokens.embedding_weight")
    found: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": D,
        "puzzle_emb_ndim": 0,
        "forward_dtype": str(_named(tensors, layout.model.family.inits[0]).dtype).removeprefix("torch."),
    }
    if "puzzle_emb.weights" in tensors:
        found["num_puzzle_identifiers"], found["puzzle_emb_ndim"] = _matrix(tensors, "puzzle_emb.weights")
    first = ""
    for net, key in layout.model.family.nets:
        layers = net if net == "layers" else f"{net}.layers"
        found[key] = len({n.removeprefix(f"{layers}.").split(".")[0] for n in tensors if n.startswith(f"{layers}.")})
        first = f"{layers}.0"
    found["mlp_t"] = f"{first}.mlp_t.down_proj.weight" in tensors
    widths = {D: _matrix(tensors, f"{first}.mlp.down_proj.weight")[1]}
    length = None
    if found["mlp_t"]:
        length, inner = _matrix(tensors, f"{first}.mlp_t.down_proj.weight")
        widths[length] = inner
        found["num_heads"] = given.get("num_heads", 1)  # nothing attends
    if "embed_pos.embedding_weight" in tensors:
        length = _matrix(tensors, "embed_pos.embedding_weight")[0]
        found["pos_encodings"] = "learned"
    elif found["mlp_t"]:
        found["pos_encodings"] = given.get("pos_encodings", "none")  # the tables of "rope" would not be read
    expansion = _expansion(widths)
    if expansion is not None:
        found["expansion"] = expansion
    if length is not None:
        found.update(_split(layout, length, found, given))
    return found


def _split(layout: Layout, length: int, found: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, int]:
    """Which part of the sequence is the puzzle's embedding."""
    D, width = found["hidden_size"], found["puzzle_emb_ndim"]
    fewest = -(-width // D)
    chosen = "puzzle_emb_len" in layout.model.config_type.__dataclass_fields__ and width > 0
    if not chosen:
        return {"seq_len": length - fewest}
    if not all(isinstance(given.get(name, 0), int) for name in ("puzzle_emb_len", "seq_len")):
        return {}  # the configuration reports what is wrong with them
    if "puzzle_emb_len" not in given and "seq_len" in given:
        if not 1 <= given["seq_len"] <= length - fewest:
            accepted = f"1 to {length - fewest}, the tensors are those of {length} positions"
            raise ValueError(f"seq_len: got {given['seq_len']}, accepted are {accepted}")
        return {"puzzle_emb_len": length - given["seq_len"], "seq_len": given["seq_len"]}
    prefix = given.get("puzzle_emb_len", layout.model.config_type.__dataclass_fields__["puzzle_emb_len"].default)
    return {"puzzle_emb_len": prefix, "seq_len": length - (prefix or fewest)}


def _expansion(widths: Mapping[int, int]) -> float | None:
    """An expansion that explains every inner width, 4 (as published) if it does; None if none does."""
    largest = min(1.5 * inner / width for width, inner in widths.items())
    for value in (4.0, 2.0, 1.0, 3.0, 8.0, largest):
        if all(swiglu_width(width, value) == inner for width, inner in widths.items()):
            return value
    return None


def _named(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"path: holds no {name}, which gives the sizes of the model")
    return tensors[name]


def _matrix(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    shape = _named(tensors, name).shape
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{name}: got shape {list(shape)}, accepted are matrices with elements")
    return shape[0], shape[1]
