"""A model for the solving loop, without PyTorch."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from trmfast.architectures import ARCHITECTURES
from trmfast.build_info import build_info
from trmfast.config import ModelConfig
from trmfast.data import model_file
from trmfast.engine import block_fields, int8_refusal, update_rows
from trmfast.runtime.arrays import narrow, read, rounded, widen
from trmfast.solving.checks import integer
from trmfast.solving.evaluator import Step
from trmfast.spec import NetSpec
from trmfast.targets import extension, import_error, target_of

__all__ = ["Model", "cores", "load"]

# Of states and of products, by dtype.
ELEMENTS = {"float32": ("f32", "f32"), "bfloat16": ("bf16", "bf16"), "int8": ("bf16", "i8")}


def load(path: str | os.PathLike[str], dtype: str | None = None, threads: int | None = None) -> Model:
    """A model from a file of ``trmfast.save`` (or ``trmfast convert``).

    Args:
        path: the file, or the name of a model that comes with trmfast, such as ``"sudoku-mlp"``.
        dtype: ``"bfloat16"``, ``"float32"``, or ``"int8"``: bfloat16 with int8 operands in the recursion's products by
            weights.  By default the file's.
        threads: threads of the engine; by default one per core of the process.

    Raises:
        OSError: the file cannot be read.
        RuntimeError: the C++ engine was not built.
        TypeError: ``threads`` is not an integer, or a key of the file's configuration has a value of another type.
        ValueError: one line with what is wrong with the file or the arguments.
    """
    tensors, about = read(model_file(path))
    return Model(tensors, about, dtype, threads)


class Model:
    """An :class:`trmfast.solving.Evaluator` over the C++ engine.

    Args:
        tensors: the state_dict, in float32.
        about: the metadata of the file: the name of the model and its configuration.
        dtype, threads: as in :func:`load`.

    Attributes:
        config: the configuration.
        notes: what the file says about the model's training.
        dtype: the compute dtype.
        threads: threads of the engine.
    """

    def __init__(
        self,
        tensors: dict[str, np.ndarray],
        about: dict[str, Any],
        dtype: str | None = None,
        threads: int | None = None,
    ) -> None:
        if extension is None:
            raise RuntimeError(f"trmfast.runtime: the CPU engine was not built: {build_info().error or import_error}")
        if about["model"] not in ARCHITECTURES:
            raise ValueError(f"path: the model is {about['model']!r}, accepted are {', '.join(ARCHITECTURES)}")
        kind = ARCHITECTURES[about["model"]]
        config: Any = kind.config.from_dict(about["config"])
        self.config: ModelConfig = config
        self.notes: dict[str, Any] = about.get("notes", {})
        self.dtype = config.forward_dtype if dtype is None else dtype
        if self.dtype not in ELEMENTS:
            raise ValueError(f"dtype: got {self.dtype!r}, accepted are {', '.join(ELEMENTS)}")
        self.threads = cores() if threads is None else integer("threads", threads, 1)
        self.element, self.product_element = ELEMENTS[self.dtype]
        self.learns_to_continue = not config.no_ACT_continue
        self.seq_len, self.vocab_size = config.seq_len, config.vocab_size
        self.num_identifiers = config.num_puzzle_identifiers if config.puzzle_emb_ndim else 0
        self.halt_max_steps = config.halt_max_steps

        D, L = config.hidden_size, config.total_len
        take = _Tensors(tensors)
        self.embedding = rounded(take("embed_tokens.embedding_weight", config.vocab_size, D), self.element)
        self.puzzles = self.positions = None
        if self.num_identifiers:
            self.puzzles = take("puzzle_emb.weights", self.num_identifiers, config.puzzle_emb_ndim)
        if config.pos_encodings == "learned":
            self.positions = rounded(take("embed_pos.embedding_weight", L, D), self.element)
        self.lm_head = rounded(take("lm_head.weight", config.vocab_size, D), self.element).T.copy()
        self.has_q_head = "inner.q_head.weight" in tensors
        if self.has_q_head:
            self.q_head = rounded(take("q_head.weight", 2, D), self.element).T.copy()
            self.q_bias = rounded(take("q_head.bias", 2), self.element)
        self.inits = [narrow(take(name, D), self.element) for name in kind.inits]
        self.noisy = range(1, len(self.inits)) if len(self.inits) > 1 else range(1)  # the heads read the first
        self.noise_shape = (len(self.noisy), L, D)
        self.tables = _rope(L, config.head_dim, config.rope_theta) if config.uses_rope else None

        self.recursion = kind.program(config.H_cycles, config.L_cycles, "none")
        self.written = {update.dst for update in self.recursion.counts()}
        self.nets = [self._packed(take, name, config.net_spec(getattr(config, depth))) for name, depth in kind.nets]

    def _packed(self, take: _Tensors, name: str, spec: NetSpec) -> Any:
        """The weights of a network in the engine's own layout; their source arrays are no longer needed."""
        assert extension is not None
        prefix = "" if name == "layers" else f"{name}."  # URM's list of blocks has no module around it
        weights = [take(prefix + weight, *shape) for weight, shape in spec.weight_shapes]
        addresses = [weight.ctypes.data for weight in weights]
        block = extension.BlockShape(**block_fields(spec.block))
        element = self.product_element
        refusal = int8_refusal(spec.block) if element == "i8" else None
        if refusal is not None:
            raise ValueError(f"dtype: got 'int8', accepted is another one: {refusal}")
        target = target_of(element)
        return extension.PackedWeights(target, element, block, spec.num_layers, addresses, False, self.threads)

    @cached_property
    def program(self) -> Any:
        """The recursion as the engine's list of updates; made at the first step, for there may be millions."""
        assert extension is not None
        return extension.Program(len(self.recursion.states), update_rows(self.recursion))

    def new_batch(self) -> RuntimeBatch:
        """See :class:`trmfast.solving.Evaluator`."""
        return RuntimeBatch(self)

    def embed(self, inputs: np.ndarray, identifiers: np.ndarray) -> np.ndarray:
        """The input x of the recursion, [N, L, D] in the engine's form: puzzle tokens, then those of ``inputs``.

        Every operation is rounded to the compute dtype, as in the PyTorch model.
        """
        D, prefix = self.config.hidden_size, self.config.prefix_len
        x = self.embedding[inputs]
        if self.puzzles is not None:
            puzzle = np.zeros((len(inputs), prefix * D), dtype=np.float32)
            puzzle[:, : self.puzzles.shape[1]] = rounded(self.puzzles[identifiers], self.element)
            x = np.concatenate((puzzle.reshape(-1, prefix, D), x), axis=1)
        if self.positions is not None:
            x = rounded(np.float32(0.707106781) * rounded(x + self.positions, self.element), self.element)
        return narrow(np.float32(math.sqrt(D)) * x, self.element)

    def recur(self, states: Sequence[np.ndarray], x: np.ndarray) -> list[np.ndarray]:
        """The recursion: new states from states and x, each [B, L, D] in the engine's form."""
        assert extension is not None
        out = [np.empty_like(z) if s in self.written else z.copy() for s, z in enumerate(states)]
        cos, sin = (0, 0) if self.tables is None else (table.ctypes.data for table in self.tables)
        extension.forward(
            self.program,
            self.nets,
            x.shape,
            [z.ctypes.data for z in states],
            [z.ctypes.data for z in out],
            x.ctypes.data,
            0,
            (0, 0, 0, 0),
            cos,
            sin,
            self.threads,
        )
        return out

    def heads(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Logits [B, S, V], and the Q head's two [B, 2], in float32, from the first state, [B, L, D].

        Rows are multiplied one at a time, so that the result of a row does not depend on the batch.
        """
        wide = widen(z)
        logits = rounded(np.matmul(wide[:, self.config.prefix_len :], self.lm_head), self.element)
        if not self.has_q_head:
            return logits, None
        return logits, rounded(np.matmul(wide[:, :1], self.q_head)[:, 0] + self.q_bias, self.element)


class RuntimeBatch:
    """Rows in NumPy arrays."""

    def __init__(self, model: Model) -> None:
        self.model = model
        shape = (0, *model.noise_shape[1:])
        self.states = [np.empty(shape, dtype=init.dtype) for init in model.inits]
        self.x = np.empty(shape, dtype=model.inits[0].dtype)

    def update(self, keep: Sequence[int], inputs: np.ndarray, identifiers: np.ndarray) -> None:
        """See :class:`trmfast.solving.Batch`."""
        kept = np.array(keep, dtype=np.intp)
        shape = (len(inputs), *self.x.shape[1:])
        fresh = [np.broadcast_to(init, shape) for init in self.model.inits]
        self.states = [np.concatenate((z[kept], new)) for z, new in zip(self.states, fresh, strict=True)]
        self.x = np.concatenate((self.x[kept], self.model.embed(inputs, identifiers)))

    def step(self, noise: np.ndarray | None) -> Step:
        """See :class:`trmfast.solving.Batch`."""
        model = self.model
        if noise is not None:
            for i, s in enumerate(model.noisy):
                self.states[s] = narrow(widen(self.states[s]) + noise[:, i], model.element)
        self.states = model.recur(self.states, self.x)
        logits, q = model.heads(self.states[0])
        predictions = logits.argmax(-1).astype(np.int32)
        if q is None:
            return Step(predictions, None, None)
        margin = q[:, 0] - q[:, 1] if model.learns_to_continue else q[:, 0]
        return Step(predictions, q[:, 0], margin)


class _Tensors:
    """The tensors of a file, checked as they are taken."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self.tensors = tensors

    def __call__(self, name: str, *shape: int) -> np.ndarray:
        tensor = self.tensors.get(f"inner.{name}")
        if tensor is None:
            raise ValueError(f"path: has no tensor inner.{name}, which the configuration requires")
        if tensor.shape != shape:
            got, expected = list(tensor.shape), list(shape)
            raise ValueError(f"inner.{name}: got shape {got}, the configuration makes it {expected}")
        return tensor


def _rope(length: int, dim: int, base: float) -> tuple[np.ndarray, np.ndarray]:
    """RoPE tables [length, dim] in float32, for the rotate-half convention."""
    frequencies = np.float32(1) / np.float32(base) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    angles = np.tile(np.outer(np.arange(length, dtype=np.float32), frequencies), 2)
    return np.cos(angles), np.sin(angles)


def cores() -> int:
    """The cores of this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
