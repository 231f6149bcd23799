"""The files of checkpoints and configurations, read as tensors and plain data; nothing in them is ever executed."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trmfast.file_format import described, naming, shortened

__all__ = ["Config", "Content", "read_config", "read_file"]

Config = Mapping[str, Any] | str | os.PathLike[str]
"""Configuration keys, or the path of a file that holds them."""


@dataclass(frozen=True)
class Content:
    """What a file holds.

    Attributes:
        form: what kind of file it is, for people.
        tensors: its tensors by name.
        config: configuration keys that it states.
        described: the metadata of a file of trmfast (file_format.py), None of others.
    """

    form: str
    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    described: dict[str, Any] | None = None


def read_file(path: Path) -> Content:
    """The tensors of a checkpoint, dense and of real numbers, and what it says of them.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or holds anything but such tensors and plain data.
    """
    with naming("path", path), path.open("rb") as file:
        start = file.read(9)
    # A safetensors file starts with the length of its header, which is JSON.
    content = _read_safetensors(path) if start[8:] == b"{" else _read_torch(path)
    for name, tensor in content.tensors.items():
        if not name.isprintable():
            raise ValueError(f"path: {path} holds a tensor named {reprlib.repr(name)}, accepted are names in one line")
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
            kind = f"{tensor.dtype}, {tensor.layout}".replace("torch.", "")
            raise ValueError(f"{name}: got {kind} on {tensor.device}, accepted are dense tensors of real numbers")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name}: got shape {list(tensor.shape)}, accepted are tensors that store each element")
    return content


def _read_safetensors(path: Path) -> Content:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Clones, which do not lie in the mapped file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"path: {path} is not a whole safetensors file: {shortened(error)}") from error
    found = described(path, metadata)
    if found is None:
        return Content("safetensors", tensors)
    return Content("safetensors of trmfast", tensors, found["config"], found)


def _read_torch(path: Path) -> Content:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make torch.load raise almost anything
        raise ValueError(
            f"path: got {path}, accepted are safetensors files and PyTorch checkpoints of tensors and plain data"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"path: {path} holds a {type(content).__name__}, accepted are dicts of tensors")
    inside = next((k for k in ("state_dict", "model_state_dict", "model") if isinstance(content.get(k), Mapping)), None)
    if inside is None:
        return Content("PyTorch state_dict", _tensors(path, content))
    tensors = _tensors(path, content[inside])
    form = f"PyTorch checkpoint, its {inside}"
    callbacks = content.get("callbacks")
    for callback in callbacks.values() if isinstance(callbacks, Mapping) else ():
        shadow = callback.get("shadow") if isinstance(callback, Mapping) else None
        if isinstance(shadow, Mapping):
            tensors.update(_tensors(path, shadow))
            form += " with averaged weights"
    hyper_parameters = content.get("hyper_parameters")
    config = hyper_parameters if isinstance(hyper_parameters, Mapping) else {}
    return Content(form, tensors, {str(k): v for k, v in config.items() if not isinstance(v, Tensor)})


def _tensors(path: Path, content: Mapping[Any, Any]) -> dict[str, Tensor]:
    other = next((name for name, value in content.items() if not isinstance(value, Tensor)), None)
    if other is not None or not content:
        what = "nothing" if other is None else f"{type(content[other]).__name__} at {reprlib.repr(other)}"
        raise ValueError(f"path: {path} holds {what}, accepted are dicts of tensors")
    return {str(name): value for name, value in content.items()}


def _read_values(path: Path) -> Any:
    """The content of a JSON or YAML file."""
    kind = "JSON" if path.suffix == ".json" else "YAML"
    try:
        with naming("config", path):
            text = path.read_text()
        if kind == "JSON":
            return json.loads(text)
        import yaml  # type: ignore[import-untyped]

        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(str(error).splitlines()[0]) from error
    except ModuleNotFoundError as error:
        raise ValueError(f"config: {path} is YAML, which needs pyyaml: `pip install pyyaml`") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"config: {path} is not {kind} of plain data: {shortened(error)}") from error


def read_config(config: Config | None) -> dict[str, Any]:
    """The configuration keys, of a training script's ``arch`` part if there is one.

    Args:
        config: a dict, a YAML or JSON file, or None for no keys.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no dict.
    """
    if config is None:
        return {}
    values: Any = config
    if not isinstance(config, Mapping):
        values = _read_values(Path(config))
    if isinstance(values, Mapping) and isinstance(values.get("arch"), Mapping):
        batch = values.get("global_batch_size")
        values = {**values["arch"], **({} if batch is None else {"batch_size": batch})}
    if not isinstance(values, Mapping):
        raise ValueError(f"config: got {type(values).__name__}, accepted are dicts and YAML or JSON files of one")
    # Skip interpolations such as ${.hidden_size}: only the training script resolves them.
    return {str(k): v for k, v in values.items() if not (isinstance(v, str) and "${" in v) and v is not None}
