"""Checkpoints: a trmfast model from the files that people have, and back to a file that describes itself.

Files are read as tensors and plain data; nothing in them is ever executed.
"""

from __future__ import annotations

import errno
import json
import os
import reprlib
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from trmfast.checkpoint_files import Config, read_config, read_file
from trmfast.config import LARGEST
from trmfast.data import model_file
from trmfast.file_format import KEY, LONGEST, VALUES, VERSION
from trmfast.layouts import LAYOUTS, Layout, find_layout, inferred, inner_names
from trmfast.models import ACTLossHead, ACTModel
from trmfast.models.losses import LOSSES

__all__ = ["Loaded", "load", "read", "save"]

# Defaults for keys that only training reads, and for the rows of an absent puzzle embedding.
DEFAULTS: dict[str, Any] = {"batch_size": 1, "halt_exploration_prob": 0.1, "num_puzzle_identifiers": 1}

STORED = (torch.float32, torch.bfloat16)


def load(
    path: str | os.PathLike[str],
    config: Config | None = None,
    *,
    strict: bool = True,
    device: torch.device | str | None = None,
    **options: Any,
) -> nn.Module:
    """A model from a checkpoint.

    Args:
        path: a file of :func:`save`, the name of a model that comes with trmfast (``"sudoku-mlp"``), a ``.pt`` of the
            published training scripts (upstream saves averaged weights where it keeps an average), its tensors as
            safetensors, or a Lightning checkpoint of nano-trm, of which the averaged weights are taken if it has them.
            Prefixes such as ``_orig_mod.model.inner.`` do not matter.
        config: configuration keys that do not follow from the tensors, such as ``H_cycles`` and ``num_heads``: a dict,
            or a YAML or JSON file.  By default ``all_config.yaml`` beside the checkpoint, if upstream left one there.
        strict: whether missing and unexpected tensors are an error; otherwise they are named in a warning, and what is
            missing is as the constructor draws it.
        device: where the model goes, by default the CPU.
        options: configuration keys, before those of ``config``.  ``num_puzzle_identifiers`` other than the file's gives
            a puzzle embedding of that many rows, each the mean of the file's.

    Returns:
        The model, in training mode; inside an ``ACTLossHead`` if it was saved so by :func:`save`.

    Raises:
        OSError: a file cannot be read; FileNotFoundError: there is none, IsADirectoryError: it is a folder.
        TypeError: a configuration key, in a file or in the arguments, has a value of another type.
        ValueError: one line with what is missing, contradicts the tensors, is larger than ``trmfast.config.MOST``
            says, or is not a model that trmfast has.
    """
    found = read(path, config, strict=strict, **options)
    return found.model if device is None else found.model.to(device)


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model as safetensors, with its class and configuration as metadata.

    Args:
        model: one of ``trmfast.models`` (TRM, HRM and their variants), bare or inside an ``ACTLossHead``, compiled or
            not.  Cycles, gradient window and halting are saved as they are now, the backend is not.
            Parametrized weights are saved as the weights that they make.
        path: the file, which ends in ``.safetensors``; an existing one, or the file that a symbolic link
            names, is replaced once the new one is complete.
        dtype: ``torch.bfloat16`` rounds the weights and halves the file; :func:`load` gives float32 parameters again.
            By default, and with ``torch.float32``, nothing is rounded.
        notes: words and numbers about the model, such as its training; ``trmfast.runtime.Model`` has them.

    Raises:
        TypeError: another kind of model, or a note that is no word, number, truth value or None.
        ValueError: another ending or dtype, a loss function that :class:`ACTLossHead` has no name for, or a module with
            other tensors than its class has, such as a pruned one.
        OSError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if Path(path).suffix != ".safetensors":
        raise ValueError(f"path: got {os.fspath(path)}, accepted are files that end in .safetensors")
    if dtype not in (None, *STORED):
        raise ValueError(f"dtype: got {dtype}, accepted are {', '.join(map(str, STORED))}")
    for name, value in (notes or {}).items():
        if type(name) is not str or type(value) not in VALUES:
            raise TypeError(f"notes: got {value!r} as {name!r}, accepted are words, numbers, truth values and None")
    head, bare = _unwrap(model)
    layout = next((layout for layout in LAYOUTS if type(bare) is layout.model), None)
    if layout is None or not isinstance(bare, ACTModel):
        accepted = ", ".join(dict.fromkeys(layout.name for layout in LAYOUTS))
        raise TypeError(f"model: got {type(bare).__name__}, accepted are {accepted}, bare or in an ACTLossHead")
    loss = None
    if head is not None:
        loss = next((name for name, function in LOSSES.items() if function is head.loss_fn), None)
        if loss is None:
            raise ValueError(f"model.loss_fn: got {head.loss_fn!r}, accepted are {', '.join(LOSSES)}")
    now = replace(
        bare.config,
        H_cycles=bare.H_cycles,
        L_cycles=bare.L_cycles,
        halt_max_steps=bare.halt_max_steps,
        halt_exploration_prob=bare.halt_exploration_prob,
    )
    kept = asdict(now)
    del kept["backend"]  # a property of the machine
    about = {"version": VERSION, "model": layout.name, "config": kept, "window": bare.window, "loss": loss}
    tensors = _plain_tensors(bare)
    if dtype is not None:
        about["stored"] = str(dtype).removeprefix("torch.")
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    if notes:
        about["notes"] = dict(notes)
    text = json.dumps(about)
    if len(text) > LONGEST:
        raise ValueError(f"notes: got metadata of {len(text)} characters, accepted are up to {LONGEST}")
    try:
        with _replacing(Path(path)) as part:
            # One key: several would be written in an order that differs from run to run.
            save_file(tensors, part, metadata={KEY: text})
    except (OSError, SafetensorError) as error:
        kind = type(error) if isinstance(error, OSError) else OSError
        reason = getattr(error, "strerror", None) or error
        raise kind(f"path: got {os.fspath(path)}, accepted are files that can be written: {reason}") from error


@torch.no_grad()
def _plain_tensors(model: ACTModel) -> dict[str, Tensor]:
    """The state_dict with parametrized weights folded."""
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if "parametrizations" in prefix.split("."):
            continue
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                tensors[prefix + name] = tensor
        for name in module._modules.get("parametrizations") or ():
            tensors[prefix + name] = getattr(module, name)
    with torch.device("meta"):
        wanted = type(model)(asdict(model.config)).state_dict()
    for name in (*tensors, *wanted):
        if name not in wanted or name not in tensors:
            path, got = name.rpartition(".")[0], "an extra" if name in tensors else "no"
            raise ValueError(
                f"{path}: got {got} {name.rpartition('.')[2]}, accepted are the tensors of its class: remove adapters, "
                "pruning (torch.nn.utils.prune.remove) and old weight norms before"
            )
    return {name: tensors[name].detach().contiguous() for name in wanted}


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file to write, which then takes the place of ``path``, or of what a link there names; else nothing is left.

    An unhandled SIGTERM waits until the file is complete or removed.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    part = target.with_name(f"{target.name}.part")
    waiting: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()
    deferred = in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if deferred:
        signal.signal(signal.SIGTERM, lambda number, _: waiting.append(number))
    try:
        yield part
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
        if deferred:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if waiting:
            os.kill(os.getpid(), signal.SIGTERM)


@dataclass(frozen=True)
class Loaded:
    """A model and where it came from.

    Attributes:
        model: the model.
        form: what kind of file it was, for people.
        layout: which model it is.
        told: the configuration keys that follow from the tensors.
        missing, unexpected: names of tensors, within the model.
    """

    model: nn.Module
    form: str
    layout: Layout
    told: dict[str, Any]
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def read(path: str | os.PathLike[str], config: Config | None = None, *, strict: bool = True, **options: Any) -> Loaded:
    """As :func:`load`, with what was found in the file."""
    content = read_file(model_file(path))
    tensors = inner_names(content.tensors)
    layout = find_layout(tensors)
    about = content.described
    if about is not None and about["model"] != layout.name:
        said = about["model"] if len(about["model"]) < 40 else f"{about['model'][:37]}..."
        raise ValueError(f"path: the tensors are those of {layout.name}, the metadata says {said}")
    beside = Path(path).parent / "all_config.yaml"
    if config is None and about is None and beside.is_file():
        config = beside
    given = layout.translate({**content.config, **read_config(config), **options})

    tensors = layout.adapt(tensors)
    rows, puzzles = options.get("num_puzzle_identifiers"), tensors.get("puzzle_emb.weights")
    wanted_rows = type(rows) is int and 0 < rows <= LARGEST
    if wanted_rows and puzzles is not None and puzzles.dim() == 2 and 0 < len(puzzles) != rows:
        mean = puzzles.mean(0, keepdim=True).expand(cast(int, rows), -1)
        try:
            tensors["puzzle_emb.weights"] = mean.contiguous()
        except RuntimeError as error:
            size = mean.numel() * mean.element_size()
            raise ValueError(
                f"num_puzzle_identifiers: got {rows}, which take {size:,} bytes, more than can be allocated here"
            ) from error
    told = inferred(layout, tensors, given)
    _contradictions(given, told)
    values = {**DEFAULTS, **told, **given}
    required = [f.name for f in fields(layout.model.config_type) if f.default is MISSING]
    unknown = [name for name in required if name not in values]
    if unknown:
        raise ValueError(
            f"config: got no {', '.join(unknown)}, which do not follow from the tensors of {layout.name}; "
            "accepted as arguments or in config"
        )
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the model itself gives them
            wanted = layout.model(values).inner.state_dict()
        # Refuse sizes that contradict the tensors before anything of that size is allocated.
        missing, unexpected = _compare(wanted, tensors, strict)
        model: ACTModel = layout.model(values)
    present = {name: tensors[name] for name in wanted if name in tensors}
    if about is not None and "stored" in about:
        present = {name: tensor.to(wanted[name].dtype) for name, tensor in present.items()}
    model.inner.load_state_dict(present, strict=False, assign=True)
    if about is not None:
        model.window = about["window"]
    loss = about["loss"] if about is not None else None
    result = model if loss is None else ACTLossHead(model, loss)
    return Loaded(result, content.form, layout, told, missing, unexpected)


def _unwrap(model: nn.Module) -> tuple[ACTLossHead | None, nn.Module]:
    """The loss head, if any, and the bare model, through the wrappers of torch.compile and DistributedDataParallel."""
    head = None
    while True:
        if isinstance(model, ACTLossHead):
            head, model = model, model.model
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        else:
            return head, model


def _compare(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], strict: bool) -> tuple[list[str], list[str]]:
    """The names of missing and unexpected tensors."""
    wrong = [name for name in wanted if name in tensors and tensors[name].shape != wanted[name].shape]
    if wrong:
        name = wrong[0]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        got, expected = list(tensors[name].shape), list(wanted[name].shape)
        raise ValueError(f"{name}: got shape {got}, the configuration makes it {expected}{more}")
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted]
    if missing or unexpected:
        lists = (("missing", missing), ("unexpected", unexpected))
        report = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in lists if names)
        if strict:
            raise ValueError(f"path: the tensors are not those of the model, {report}; accepted with strict=False")
        warnings.warn(f"tensors of the checkpoint: {report}", stacklevel=4)
    return missing, unexpected


def _contradictions(given: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    # The expansion only decides widths, which are compared with the tensors; the dtype is the caller's choice.
    for name in told.keys() & given.keys() - {"expansion", "forward_dtype"}:
        if given[name] != told[name]:
            raise ValueError(f"{name}: got {reprlib.repr(given[name])}, the tensors of the file say {told[name]!r}")
