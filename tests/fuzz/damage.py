"""Damaged checkpoints: whole files of several forms, and edits of bytes, headers, metadata, tensors and options."""

from __future__ import annotations

import io
import json
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

import trmfast
from trmfast.models import HRM, TRM, URM, ACTLossHead, TRMHier6, TRMSingleZ

from .trial import _Plain

__all__ = ["FORMS", "VALUES", "FileTrial", "draw_file", "file_bytes"]

# Kind, where, and what: ("byte", 17, 255), ("metadata", "config/H_cycles", "1e30"), ("tensor", "H_init", "flat").
Edit: TypeAlias = tuple[Any, ...]
FORMS = ("safetensors", "plain safetensors", "state_dict", "lightning")

TINY: dict[str, Any] = {
    "batch_size": 2, "seq_len": 4, "puzzle_emb_ndim": 8, "num_puzzle_identifiers": 3, "vocab_size": 5, "H_cycles": 2,
    "L_cycles": 2, "H_layers": 1, "L_layers": 1, "hidden_size": 8, "expansion": 1, "num_heads": 2,
    "pos_encodings": "rope", "halt_max_steps": 4, "halt_exploration_prob": 0.1, "forward_dtype": "float32",
    "puzzle_emb_len": 2,
}  # fmt: skip
URM_ONLY: dict[str, Any] = {"num_layers": 1, "loops": 2, "attn_dropout": 0.0}
NOT_URM = ("H_layers", "L_layers", "puzzle_emb_len", "halt_max_steps", "halt_exploration_prob")
MLP = {"mlp_t": True, "pos_encodings": "none"}
MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "trm": lambda: TRM(TINY),
    "trm-mlp_t": lambda: TRM(TINY | MLP),
    "trm-learned": lambda: TRM(TINY | {"pos_encodings": "learned"}),
    "trm-head": lambda: ACTLossHead(TRM(TINY), "stablemax_cross_entropy"),
    "single_z": lambda: TRMSingleZ(TINY),
    "hier6": lambda: TRMHier6(TINY),
    "hrm": lambda: HRM(TINY),
    "urm": lambda: URM({k: v for k, v in TINY.items() if k not in NOT_URM} | URM_ONLY),
}

VALUES: dict[str, Any] = {
    "null": None, "true": True, "false": False, "list": [], "object": {}, "nested list": [[1], {"a": []}], "empty": "",
    "word": "many", "line break": "a\nb", "long": "x" * 5000, "surrogate": "\ud800", "0": 0, "-1": -1, "1": 1, "3": 3,
    "1.5": 1.5, "1e6": 10**6, "2e8": 2 * 10**8, "2**31": 2**31, "2**63": 2**63, "1e30": 1e30, "10**30": 10**30,
    "10**5000": 10**5000, "nan": float("nan"), "inf": float("inf"), "-0.0": -0.0, "1e-320": 1e-320, "TRM": "TRM",
    "HRM": "HRM", "URM": "URM", "all": "all", "deep": "deep",
}  # fmt: skip
DEEP = 5000  # a list in a list in a list, deeper than Python's recursion limit

TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "scalar": lambda t: t.reshape(-1)[0],
    "flat": lambda t: t.reshape(-1),
    "unsqueezed": lambda t: t[None],
    "transposed": lambda t: t.mT if t.dim() > 1 else t,
    "half": lambda t: t[: len(t) // 2] if t.dim() else t,
    "no rows": lambda t: t[:0] if t.dim() else t,
    "float64": lambda t: t.double(),
    "bfloat16": lambda t: t.bfloat16(),
    "integers": lambda t: t.to(torch.int64),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "nan": lambda t: torch.full_like(t, float("nan")),
    "huge stride 0": lambda t: t.reshape(-1)[:1].expand(2**40),
    "huge matrix of stride 0": lambda t: t.reshape(-1)[:1].reshape(1, 1).expand(2**20, 2**20),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "parameter": lambda t: torch.nn.Parameter(t.float()),
    "number": lambda _: 1.0,
    "list": lambda _: [],
    "none": lambda _: None,
}
OPTIONS = (*TINY, *URM_ONLY, "mlp_t", "rms_norm_eps", "rope_theta", "backend", "recompute", "no_ACT_continue", "colour")


@dataclass(frozen=True, repr=False)
class FileTrial(_Plain):
    """A file and what is wrong with it.

    Attributes:
        model: the model whose checkpoint was written.
        form: how.
        edits: later changes, in this order.
    """

    model: str = "trm"
    form: str = "safetensors"
    edits: tuple[Edit, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """What the caller of ``load`` says besides: what no tensor tells, and the edits that are options."""
        told = {edit[1]: _value(edit[2]) for edit in self.edits if edit[0] == "option"}
        if self.form == "safetensors":
            return told
        known = dict(_known(self.model))
        return known | told


def _known(model: str) -> dict[str, Any]:
    made = _model(model)
    bare: Any = getattr(made, "model", made)
    names = ("H_cycles", "L_cycles", "halt_max_steps", "num_heads", "pos_encodings", "seq_len", "puzzle_emb_len")
    return {name: getattr(bare.config, name) for name in names if hasattr(bare.config, name)}


@cache
def _model(name: str) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[name]()


@cache
def _whole(model: str, form: str) -> bytes:
    """A file without damage."""
    return _written(_model(model), form, {})


def _written(model: torch.nn.Module, form: str, changes: dict[str, Any]) -> bytes:
    """A file of a model, tensors of the state_dict replaced or added."""
    if form == "safetensors" and not changes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.safetensors"
            trmfast.save(model, path)
            return path.read_bytes()
    state = {**model.state_dict(), **changes}
    if form.endswith("safetensors"):
        tensors = {k: t.detach().contiguous() for k, t in state.items() if type(t) is Tensor and _storable(t)}
        return save_tensors(tensors)
    content: Any = state
    if form == "lightning":
        shadow = {"EMA": {"shadow": dict(state)}}
        content = {"state_dict": state, "hyper_parameters": {"H_cycles": 2}, "callbacks": shadow}
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _storable(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.numel() < 10**6


def file_bytes(trial: FileTrial) -> bytes:
    """The bytes of the damaged file."""
    changes = {e[1]: TENSORS[e[2]](_tensor(trial.model, e[1])) for e in trial.edits if e[0] == "tensor"}
    data = _written(_model(trial.model), trial.form, changes) if changes else _whole(trial.model, trial.form)
    for kind, *arguments in trial.edits:
        if kind in EDITS:
            data = EDITS[kind](data, *arguments)
    return data


def _tensor(model: str, name: str) -> Tensor:
    return _model(model).state_dict().get(name, torch.zeros(2, 2))


# ---------------------------------------------------------------- edits of bytes


def _byte(data: bytes, at: int, value: int) -> bytes:
    at %= max(len(data), 1)
    return data[:at] + bytes([value]) + data[at + 1 :]


def _cut(data: bytes, size: int) -> bytes:
    return data[:size]


def _zeros(data: bytes, at: int, size: int) -> bytes:
    return data[:at] + bytes(len(data[at : at + size])) + data[at + size :]


def _insert(data: bytes, at: int, text: str) -> bytes:
    return data[:at] + text.encode() + data[at:]


def _repeat(data: bytes, at: int, size: int) -> bytes:
    return data[: at + size] + data[at:]


def _length(data: bytes, value: int) -> bytes:
    """Another length of the safetensors header."""
    return value.to_bytes(8, "little") + data[8:]


# ---------------------------------------------------------------- edits of structure


def _value(name: str) -> Any:
    return VALUES[name]


def _dumped(content: Any) -> str:
    digits = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        text = json.dumps(content)
    finally:
        sys.set_int_max_str_digits(digits)
    return text.replace('"deep"', "[" * DEEP + "]" * DEEP)


def _set(content: Any, path: str, value: Any) -> Any:
    """The content with the value at ``a.b.c``; "" is all of it, and a name that ends in ``!`` is removed."""
    if not path:
        return value
    keys = path.split("/")
    inner = content
    for key in keys[:-1]:
        if not isinstance(inner.get(key) if isinstance(inner, dict) else None, dict):
            return content
        inner = inner[key]
    if isinstance(inner, dict):
        if keys[-1].endswith("!"):
            inner.pop(keys[-1][:-1], None)
        else:
            inner[keys[-1]] = value
    return content


def _header(data: bytes, path: str, name: str) -> bytes:
    """The safetensors header with another value; as it was where there is no whole header."""
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
    except (ValueError, RecursionError):
        return data
    text = _dumped(_set(header, path, _value(name))).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def _metadata(data: bytes, path: str, name: str) -> bytes:
    """The description of the model with another value."""
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
        described = json.loads(header["__metadata__"]["trmfast"])
    except (ValueError, RecursionError, KeyError, TypeError):
        return data
    header["__metadata__"]["trmfast"] = _dumped(_set(described, path, _value(name)))
    text = _dumped(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


EDITS: dict[str, Callable[..., bytes]] = {
    "byte": _byte,
    "cut": _cut,
    "zeros": _zeros,
    "insert": _insert,
    "repeat": _repeat,
    "length": _length,
    "header": _header,
    "metadata": _metadata,
}


# ---------------------------------------------------------------- drawing


def draw_file(rng: random.Random) -> FileTrial:
    """A damaged file: mostly one edit, sometimes several."""
    model, form = rng.choice(list(MODELS)), rng.choice(FORMS)
    size = len(_whole(model, form))
    names = list(_model(model).state_dict())
    edits = tuple(_draw_edit(rng, form, size, names) for _ in range(rng.choice((1, 1, 1, 1, 2, 3))))
    return FileTrial(model, form, edits)


def _draw_edit(rng: random.Random, form: str, size: int, names: list[str]) -> Edit:
    kinds = ["bytes", "tensor", "option"]
    if form.endswith("safetensors"):
        kinds += ["header", "length"]
    if form == "safetensors":
        kinds += ["metadata"] * 6
    kind = rng.choice(kinds)
    # The start of a safetensors file and the end of a zip file say what is in it.
    at = rng.choice((rng.randrange(size), rng.randrange(min(size, 2000)), size - 1 - rng.randrange(min(size, 2000))))
    if kind == "bytes":
        return rng.choice(
            (
                ("byte", at, rng.randrange(256)),
                ("cut", at),
                ("zeros", at, rng.randrange(1, 200)),
                ("insert", at, rng.choice(("0", "9" * 30, "[" * 3000, "\0", "}", '"', "é"))),
                ("repeat", at, rng.randrange(1, 500)),
            )
        )
    value = rng.choice(list(VALUES))
    if kind == "tensor":
        return ("tensor", rng.choice((*names, "inner.extra")), rng.choice(list(TENSORS)))
    if kind == "option":
        return ("option", rng.choice(OPTIONS), value)
    if kind == "length":
        return ("length", rng.choice((0, 1, 2, size, size - 8, 2**31, 2**62, 2**64 - 1, rng.randrange(size))))
    if kind == "header":
        where = rng.choice((*names, "__metadata__"))
        return (
            "header",
            rng.choice((where, f"{where}!", f"{where}/shape", f"{where}/dtype", f"{where}/data_offsets")),
            value,
        )
    parts = ("", "version", "model", "config", "window", "loss", "model!", "config!", "window!", "loss!", "extra")
    return (
        "metadata",
        rng.choice((*parts, *(f"config/{key}" for key in OPTIONS), *(f"config/{key}!" for key in OPTIONS))),
        value,
    )
