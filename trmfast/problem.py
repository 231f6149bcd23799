"""A program with its networks: everything that an operator needs to know about a recursion except the tensors."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from trmfast.program import RecursionProgram, Update
from trmfast.spec import NetSpec

__all__ = ["COMPUTE_DTYPES", "Problem", "check_segments", "unsupported"]

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Problem:
    """A program and one :class:`NetSpec` for each of its networks, validated against each other once.

    Attributes:
        program: the recursion.
        nets: the networks, in the order of ``program.nets``.

    Raises:
        ValueError: the number of networks does not fit the program, or the networks disagree about a size they share.
    """

    program: RecursionProgram
    nets: tuple[NetSpec, ...]
    # Everything below is derived; operators read it on every call.
    hidden_size: int = field(init=False, repr=False, compare=False)
    num_grad_updates: int = field(init=False, repr=False, compare=False)
    uses_x: bool = field(init=False, repr=False, compare=False)
    # Sequence length that the weights fix (mlp_t), or None.
    seq_len: int | None = field(init=False, repr=False, compare=False)
    # Width of the RoPE tables, or None where no network attends and tables are ignored.
    rope_dim: int | None = field(init=False, repr=False, compare=False)
    # Whether a network reads the boundaries of sequences.
    uses_segments: bool = field(init=False, repr=False, compare=False)
    # Whether backward computes the input of an update from x again: what forward saves is the sum before an injection.
    backward_reads_x: bool = field(init=False, repr=False, compare=False)
    # Whether a sequence may have a prefix that sees itself in both directions.
    uses_prefixes: bool = field(init=False, repr=False, compare=False)
    weight_names: tuple[str, ...] = field(init=False, repr=False, compare=False)
    weight_shapes: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)
    # weights[weight_slices[n]] belong to network n.
    weight_slices: tuple[slice, ...] = field(init=False, repr=False, compare=False)
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        program, nets = self.program, tuple(self.nets)
        if len(nets) != len(program.nets):
            accepted = f"{len(program.nets)} ({', '.join(program.nets)})"
            raise ValueError(f"nets: got {len(nets)}, accepted are {accepted}")
        blocks = [net.block for net in nets]
        attention = [block for block in blocks if block.attends]
        mixers = [block for block in blocks if not block.attends]
        shared: dict[str, set[Any]] = {
            "hidden_size": {block.hidden_size for block in blocks},
            "seq_len": {block.seq_len for block in mixers},
            "head_dim": {block.head_dim for block in attention},
            "rotation": {block.rotation for block in attention},
        }
        for name, sizes in shared.items():
            if len(sizes) > 1:
                got = ", ".join(str(size) for size in sorted(sizes))
                raise ValueError(f"nets: got {name} {got}, accepted are networks that share one {name}")
        names: list[str] = []
        shapes: list[tuple[int, ...]] = []
        slices: list[slice] = []
        for net_name, net in zip(program.nets, nets, strict=True):
            start = len(names)
            for name, shape in net.weight_shapes:
                names.append(f"{net_name}.{name}")
                shapes.append(shape)
            slices.append(slice(start, len(names)))
        for name, value in (
            ("nets", nets),
            ("hidden_size", blocks[0].hidden_size),
            ("num_grad_updates", program.num_grad_updates),
            ("uses_x", program.uses_x),
            ("seq_len", mixers[0].seq_len if mixers else None),
            ("rope_dim", attention[0].head_dim if attention else None),
            ("uses_segments", any(block.segments for block in attention)),
            (
                "backward_reads_x",
                any(u.grad and u.inject_x and nets[u.net].injection != "add" for u in program.counts()),
            ),
            ("uses_prefixes", all(block.token_mixer != "simple_gla" for block in attention if block.segments)),
            ("weight_names", tuple(names)),
            ("weight_shapes", tuple(shapes)),
            ("weight_slices", tuple(slices)),
            ("_hash", hash((program.key, tuple(net.key for net in nets)))),
        ):
            object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        return self._hash

    @staticmethod
    @lru_cache(maxsize=256)
    def from_keys(program_key: str, net_keys: tuple[str, ...]) -> Problem:
        """The problem that ``program.key`` and the ``key`` of every network describe."""
        return Problem(RecursionProgram.from_key(program_key), tuple(NetSpec.from_key(key) for key in net_keys))

    @property
    def num_weights(self) -> int:
        """Number of weight tensors of all networks together."""
        return len(self.weight_shapes)

    def net_weights(self, flat: Sequence[Tensor], net_index: int) -> list[Tensor]:
        """The weights of one network, out of the flat list of all."""
        return list(flat[self.weight_slices[net_index]])

    def weighs(self, update: Update) -> bool:
        """Whether the sum of an update's sources meets a weight before its network."""
        return bool(update.sources) and self.nets[update.net].injection != "add"

    def live_updates(self, states: Sequence[bool], x: bool, weights: Sequence[bool]) -> tuple[list[bool], list[bool]]:
        """Where gradients can flow.

        Args:
            states: S flags, whether each incoming state requires a gradient.
            x: whether x does.
            weights: W flags, whether each weight does.

        Returns:
            For each update, whether its summed input requires a gradient; for each final state, whether it does.
        """
        live = list(states)
        trained = [any(weights[part]) for part in self.weight_slices]
        inputs = []
        for update in self.program.updates:
            flows = update.grad and (any(live[s] for s in update.sources) or (update.inject_x and x))
            inputs.append(flows)
            live[update.dst] = flows or (update.grad and trained[update.net])
        return inputs, live

    def validate(
        self,
        states: Sequence[Tensor],
        x: Tensor | None,
        weights: Sequence[Tensor],
        cos: Tensor | None,
        sin: Tensor | None,
        segments: Tensor | None = None,
    ) -> None:
        """Checks tensors against the problem.

        Args:
            states: S tensors [B, L, D] of one compute dtype and device.
            x: [B, L, D] of the same dtype and device, or None when no update injects x.
            weights: :attr:`num_weights` tensors of :attr:`weight_shapes`, of any float dtype, on the same device.
            cos, sin: [>= L, head_dim] float tables on the same device, or None.
            segments: integers [B, L, 2] on the same device where a network reads them, else None; what they hold is
                checked by :func:`check_segments`.

        Raises:
            ValueError: one line naming the argument, what came and what is accepted.
        """
        names = self.program.states
        if len(states) != len(names):
            raise ValueError(f"states: got {len(states)}, accepted are {len(names)} ({', '.join(names)})")
        first = states[0]
        shape, dtype, device = first.shape, first.dtype, first.device
        if dtype not in COMPUTE_DTYPES:
            accepted = ", ".join(_name(d) for d in COMPUTE_DTYPES)
            raise ValueError(f"states[0].dtype: got {_name(dtype)}, accepted are {accepted}")
        if len(shape) != 3 or shape[2] != self.hidden_size:
            accepted = f"[B, L, {self.hidden_size}]"
            raise ValueError(f"states[0].shape: got {_size(shape)}, accepted are {accepted}")
        length = shape[1]
        if self.seq_len is not None and length != self.seq_len:
            raise ValueError(
                f"states[0].shape: got length {length}, accepted is {self.seq_len}, the seq_len of the mlp_t weights"
            )
        for i, state in enumerate(states[1:], 1):
            if state.shape != shape or state.dtype != dtype or state.device != device:
                _refuse(f"states[{i}]", state, shape, dtype, device)
        if x is not None:
            if x.shape != shape or x.dtype != dtype or x.device != device:
                _refuse("x", x, shape, dtype, device)
        elif self.uses_x:
            raise ValueError(f"x: got None, accepted are tensors of shape {_size(shape)}, the program injects x")
        if len(weights) != len(self.weight_shapes):
            raise ValueError(f"weights: got {len(weights)} tensors, accepted are {len(self.weight_shapes)}")
        for i, (weight, expected) in enumerate(zip(weights, self.weight_shapes, strict=True)):
            if weight.shape != expected or weight.device != device or not weight.dtype.is_floating_point:
                _refuse(f"weights[{i}] ({self.weight_names[i]})", weight, expected, None, device)
        if (cos is None) != (sin is None):
            missing, given = ("cos", "sin") if cos is None else ("sin", "cos")
            raise ValueError(f"{missing}: got None with {given} given, accepted are both tables or neither")
        if cos is not None and sin is not None and self.rope_dim is not None:
            _check_table("cos", cos, length, self.rope_dim, device)
            _check_table("sin", sin, length, self.rope_dim, device)
        if self.uses_segments != (segments is not None):
            accepted = f"integers [{shape[0]}, {length}, 2]" if self.uses_segments else "None, no network reads them"
            raise ValueError(f"segments: got {'None' if segments is None else 'a tensor'}, accepted is {accepted}")
        if segments is not None:
            expected = (shape[0], length, 2)
            if segments.shape != expected:
                raise ValueError(f"segments.shape: got {_size(segments.shape)}, accepted is {list(expected)}")
            if segments.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"segments.dtype: got {_name(segments.dtype)}, accepted are int32 and int64")
            if segments.device != device:
                raise ValueError(f"segments.device: got {segments.device}, accepted is {device}, that of states[0]")


def check_segments(segments: Tensor, prefixes: bool = True) -> None:
    """Checks the boundaries of sequences; on a GPU this waits for the device.

    Args:
        segments: [B, L, 2], for each token the first position of its sequence and the end of its prefix.
        prefixes: whether a prefix may be longer than one token.

    Raises:
        ValueError: sequences that do not follow each other, or a prefix that is not part of its sequence or too long.
    """
    starts, ends = segments.long().unbind(-1)
    position = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
    begins = starts == position
    same = torch.zeros_like(begins)
    same[:, 1:] = (starts[:, 1:] == starts[:, :-1]) & (ends[:, 1:] == ends[:, :-1])
    # The sequence of a token ends where the next begins, or with the row.
    last = torch.ones_like(begins)
    last[:, :-1] = begins[:, 1:]
    good = (begins | same) & (ends >= starts) & ~(last & (ends > position + 1))
    if not bool(good.all()):
        row, token = (~good).nonzero()[0].tolist()
        got = segments[row, token].tolist()
        raise ValueError(
            f"segments[{row}, {token}]: got {got}, accepted are the start of the token's sequence, {token} or that of "
            "the token before, and the end of a prefix inside that sequence, the same for all of its tokens"
        )
    long = ends > starts + 1
    if not prefixes and bool(long.any()):
        row, token = long.nonzero()[0].tolist()
        start, end = segments[row, token].tolist()
        accepted = f"[{start}, {start}] and [{start}, {start + 1}], simple_gla has no prefixes"
        raise ValueError(f"segments[{row}, {token}]: got [{start}, {end}], accepted are {accepted}")


def unsupported(problem: Problem, choices: Mapping[str, Container[Any]]) -> str | None:
    """Why a backend does not run the networks of a problem, or None.

    Args:
        problem: the problem.
        choices: for options of :class:`BlockSpec` and :class:`NetSpec`, the values that the backend runs.  An option
            that it does not name must have its default, so no backend ignores an option that came later.
    """
    for net in problem.nets:
        for name, (value, default) in net.options.items():
            accepted = choices.get(name, (default,))
            if value not in accepted:
                shown = " or ".join(map(str, accepted)) if isinstance(accepted, tuple) else str(accepted)
                return f"it runs networks with {name} {shown}, not {value}"
    return None


def _check_table(name: str, table: Tensor, length: int, rope_dim: int, device: torch.device) -> None:
    if rope_dim % 2:
        raise ValueError(f"{name}: got a table for head_dim {rope_dim}, accepted are even head_dims")
    shape = table.shape
    if len(shape) != 2 or shape[1] != rope_dim or shape[0] < length:
        accepted = f"[at least {length}, {rope_dim}]"
        raise ValueError(f"{name}.shape: got {_size(shape)}, accepted are {accepted}")
    if not table.dtype.is_floating_point or table.device != device:
        _refuse(name, table, table.shape, None, device)
    if table.requires_grad:
        raise ValueError(f"{name}.requires_grad: got True, accepted is False, the tables are constants")


def _refuse(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype | None, device: torch.device) -> None:
    """Raises an error for the first property of a tensor that differs; dtype None accepts any float dtype."""
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{name}.shape: got {_size(tensor.shape)}, accepted is {_size(shape)}")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name}.dtype: got {_name(tensor.dtype)}, accepted is {_name(dtype)}, that of states[0]")
    if dtype is None and not tensor.dtype.is_floating_point:
        raise ValueError(f"{name}.dtype: got {_name(tensor.dtype)}, accepted are float dtypes")
    raise ValueError(f"{name}.device: got {tensor.device}, accepted is {device}, that of states[0]")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(shape: Sequence[int]) -> str:
    return str(list(shape))
