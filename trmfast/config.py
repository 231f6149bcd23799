"""Configurations of the published models: the same keys, types and defaults as their YAML files, checked one by one.

Imports no PyTorch.
"""

from __future__ import annotations

import difflib
import reprlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from trmfast.budget import DEFAULT, Recompute, budget_of
from trmfast.spec import BlockSpec, NetSpec, swiglu_width

if TYPE_CHECKING:
    import torch

__all__ = ["HRMConfig", "ModelConfig", "TRMConfig", "URMConfig", "own_names"]

DTYPES = ("bfloat16", "float16", "float32", "float64", "int8")
MAY_BE_ZERO = ("puzzle_emb_ndim", "puzzle_emb_len", "H_layers")
LARGEST = 2**31 - 1  # of integers that are not in MOST
MOST = {
    # No tensor of a file confirms these, so they alone decide how much a model allocates.
    "batch_size": 2**16,
    "seq_len": 2**17,
    "puzzle_emb_len": 2**17,
    # Far beyond any published model.
    "H_cycles": 10**6,
    "L_cycles": 10**6,
    "H_layers": 4096,
    "L_layers": 4096,
    "hidden_size": 2**20,
    "expansion": 2**16,
    "rms_norm_eps": 1e30,
    "rope_theta": 1e30,
}
MOST_UPDATES = 10**7
POSITIONS = ("rope", "learned", "none")
UPSTREAM_KEYS = {"num_layers": "L_layers", "loops": "halt_max_steps"}
# Keys of published training configurations that look like a model's.
NOT_MISSPELT = ("puzzle_emb_lr",)

C = TypeVar("C", bound="ModelConfig")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What TRM and HRM have in common.

    Attributes:
        batch_size: rows of a training batch on this device; the puzzle embedding keeps that many rows with gradient.
        seq_len: tokens S of one puzzle, 81 for Sudoku and 900 for a 30x30 grid.
        puzzle_emb_ndim: width of a puzzle's learned embedding; 0 for none.
        num_puzzle_identifiers: rows of the puzzle embedding table.
        vocab_size: number of token ids V.
        H_cycles, L_cycles: cycles of the recursion, and z_L updates in each of them.
        H_layers, L_layers: blocks of the two networks; TRM has only the second.
        hidden_size: width D of the states.
        expansion: width of the SwiGLUs relative to their input, before the two thirds and the rounding up to 256.
        num_heads: attention heads; a head is ``hidden_size // num_heads`` wide.
        pos_encodings: ``"rope"``, ``"learned"`` or ``"none"``.
        rms_norm_eps: epsilon of the norms.
        rope_theta: base of the rotary frequencies.
        halt_max_steps: most supervision steps of one puzzle.
        halt_exploration_prob: probability that training holds a row back for a random number of steps.
        forward_dtype: compute dtype: ``"bfloat16"``, ``"float16"``, ``"float32"`` or ``"float64"``; or ``"int8"`` for
            inference: bfloat16 with int8 operands in the products by weights, as in :func:`trmfast.recursion`.
        mlp_t: whether a SwiGLU over the sequence axis takes the place of attention.
        backend: backend of the recursion; ``"auto"`` takes the best that supports the problem.
        recompute: what backward computes again: True, False, a number of bytes or a size such as ``"256MB"`` that
            forward may keep; as in :func:`trmfast.recursion`.

    ``MOST`` has the largest values; of other integers the largest is 2**31 - 1, and H_cycles * (L_cycles + 1) is at
    most ``MOST_UPDATES``.

    Raises:
        TypeError: a value of the wrong type, naming the key.
        ValueError: a missing key or a value out of range, naming the key.
    """

    aliases: ClassVar[Mapping[str, str]] = {}
    """Upstream's names of keys that have another name here."""

    batch_size: int
    seq_len: int
    puzzle_emb_ndim: int = 0
    num_puzzle_identifiers: int
    vocab_size: int
    H_cycles: int
    L_cycles: int
    H_layers: int
    L_layers: int
    hidden_size: int
    expansion: float
    num_heads: int
    pos_encodings: str
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    halt_max_steps: int
    halt_exploration_prob: float
    forward_dtype: str = "bfloat16"
    mlp_t: bool = False
    backend: str = "auto"
    recompute: Recompute = DEFAULT

    @classmethod
    def from_dict(cls: type[C], config: Mapping[str, Any]) -> C:
        """The configuration that a dict describes.

        Keys that this model does not know are ignored, as upstream does; one that looks like a misspelt key is named in
        a warning.
        """
        if not isinstance(config, Mapping):
            raise TypeError(f"config_dict: got {type(config).__name__}, accepted is a dict")
        known = {field.name: field for field in fields(cls)}
        config = {cls.aliases.get(key, key): value for key, value in config.items()}
        misspelt = _misspelt(config, (*known, *cls.aliases))
        if misspelt:
            unused, meant = ", ".join(misspelt), ", ".join(misspelt.values())
            verb = "is" if len(misspelt) == 1 else "are"
            warnings.warn(f"config_dict: {unused} {verb} not used; did you mean {meant}?", stacklevel=3)
        missing = [name for name, field in known.items() if field.default is MISSING and name not in config]
        if missing:
            raise ValueError(f"config_dict: got no {', '.join(missing)}, required by {cls.__name__}")
        return cls(**{name: convert(name, str(known[name].type), config[name]) for name in known if name in config})

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type == "int":
                least, most = 0 if field.name in MAY_BE_ZERO else 1, MOST.get(field.name, LARGEST)
                value = getattr(self, field.name)
                self._accept(field.name, value >= least, f"integers >= {least}")
                self._accept(field.name, value <= most, f"integers up to {most}")
        for name in ("expansion", "rms_norm_eps", "rope_theta"):
            self._accept(name, getattr(self, name) > 0, "positive numbers")
            self._accept(name, getattr(self, name) <= MOST[name], f"numbers up to {MOST[name]:g}")
        updates = self.H_cycles * (self.L_cycles + 1)
        self._accept("H_cycles", updates <= MOST_UPDATES, f"numbers of cycles with at most {MOST_UPDATES} updates")
        self._accept("num_heads", 1 <= self.num_heads <= self.hidden_size, f"1 to hidden_size {self.hidden_size}")
        self._accept("halt_exploration_prob", 0 <= self.halt_exploration_prob <= 1, "0 to 1")
        self._accept("pos_encodings", self.pos_encodings in POSITIONS, ", ".join(POSITIONS))
        budget_of(self.recompute)
        self._accept("forward_dtype", self.forward_dtype in DTYPES, ", ".join(DTYPES))
        if self.uses_rope:
            accepted = f"divisors of hidden_size {self.hidden_size} that make heads of even width"
            self._accept("num_heads", self.head_dim % 2 == 0, accepted)

    def _accept(self, name: str, good: bool, accepted: str) -> None:
        if not good:
            raise ValueError(f"{name}: got {reprlib.repr(getattr(self, name))}, accepted are {accepted}")

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        import torch

        dtype: torch.dtype = torch.bfloat16 if self.forward_dtype == "int8" else getattr(torch, self.forward_dtype)
        return dtype

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads

    @property
    def uses_rope(self) -> bool:
        """Whether a block reads RoPE tables; the SwiGLU over the sequence has no use for them."""
        return self.pos_encodings == "rope" and not self.mlp_t

    @property
    def prefix_len(self) -> int:
        """Puzzle tokens P in front of the sequence."""
        return -(-self.puzzle_emb_ndim // self.hidden_size)

    @property
    def total_len(self) -> int:
        """Length L = P + S of the states."""
        return self.prefix_len + self.seq_len

    def net_spec(self, num_layers: int) -> NetSpec:
        """The network of ``num_layers`` blocks."""
        D, inter = self.hidden_size, swiglu_width(self.hidden_size, self.expansion)
        if self.mlp_t:
            block = BlockSpec(
                hidden_size=D,
                intermediate_size=inter,
                token_mixer="mlp_t",
                seq_len=self.total_len,
                seq_intermediate_size=swiglu_width(self.total_len, self.expansion),
                rms_norm_eps=self.rms_norm_eps,
            )
        else:
            block = BlockSpec(
                hidden_size=D,
                intermediate_size=inter,
                num_heads=self.num_heads,
                head_dim=self.head_dim,
                rms_norm_eps=self.rms_norm_eps,
            )
        return NetSpec(block, num_layers)


@dataclass(frozen=True, kw_only=True)
class TRMConfig(ModelConfig):
    """Configuration of TRM and its variants.

    Attributes:
        puzzle_emb_len: puzzle tokens; 0 for as few as hold the embedding.  Without an embedding there are none.
        no_ACT_continue: whether a row halts when ``q_halt > 0`` (True), or when ``q_halt > q_continue`` with a
            bootstrapped target for ``q_continue``, as in HRM (False).
    """

    H_layers: int = 0
    puzzle_emb_len: int = 16
    no_ACT_continue: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        fewest = -(-self.puzzle_emb_ndim // self.hidden_size)
        holds = self.puzzle_emb_len == 0 or self.puzzle_emb_len >= fewest
        self._accept("puzzle_emb_len", holds, f"0 and integers >= {fewest}")

    @property
    def prefix_len(self) -> int:
        """Puzzle tokens P in front of the sequence."""
        return self.puzzle_emb_len if self.puzzle_emb_len and self.puzzle_emb_ndim else super().prefix_len


@dataclass(frozen=True, kw_only=True)
class HRMConfig(ModelConfig):
    """Configuration of HRM."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._accept("H_layers", self.H_layers >= 1, "integers >= 1")

    @property
    def no_ACT_continue(self) -> bool:
        """HRM always learns when to continue."""
        return False


@dataclass(frozen=True, kw_only=True)
class URMConfig(ModelConfig):
    """Configuration of URM.

    Takes upstream's names ``num_layers`` for L_layers and ``loops`` for halt_max_steps.  Positions are always rotated;
    the dropout keys of upstream's configuration are not read there either.
    """

    aliases = UPSTREAM_KEYS

    H_layers: int = 0
    pos_encodings: str = "rope"
    halt_exploration_prob: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._accept("pos_encodings", self.pos_encodings == "rope", "rope")
        self._accept("mlp_t", not self.mlp_t, "False")

    @property
    def no_ACT_continue(self) -> bool:
        """A row halts when ``q_halt > 0``; nothing is bootstrapped."""
        return True

    def net_spec(self, num_layers: int) -> NetSpec:
        """The network of ``num_layers`` blocks, with a convolution of two taps in their SwiGLUs."""
        spec = super().net_spec(num_layers)
        return replace(spec, block=replace(spec.block, channel_mixer="conv_swiglu", conv_kernel=2))


def own_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of upstream's URM by trmfast's keys."""
    return {UPSTREAM_KEYS.get(key, key): value for key, value in config.items()}


def _misspelt(config: Iterable[Any], known: Iterable[str]) -> dict[str, str]:
    """The keys of ``config`` that are not known but close to one that is, with that one."""
    by_lower = {name.lower(): name for name in known}
    unused = [key for key in config if isinstance(key, str) and key not in {*by_lower.values(), *NOT_MISSPELT}]
    close = {key: difflib.get_close_matches(key.lower(), by_lower, n=1, cutoff=0.85) for key in unused}
    return {key: by_lower[names[0]] for key, names in close.items() if names}


def convert(name: str, kind: str, value: Any) -> Any:
    """``value`` converted to the type that ``kind`` names; YAML may have written 4 for 4.0."""
    if kind == "Recompute":
        budget_of(value)
        return value
    if kind == "bool" or isinstance(value, bool):
        if kind == "bool" and isinstance(value, bool):
            return value
    elif kind == "int" and (isinstance(value, Integral) or (isinstance(value, float) and value.is_integer())):
        return int(value)
    elif kind == "float" and isinstance(value, Real):
        try:
            return float(value)
        except OverflowError as error:
            raise ValueError(f"{name}: got an integer beyond float, accepted is {kind}") from error
    elif kind == "str" and isinstance(value, str):
        return value
    raise TypeError(f"{name}: got {reprlib.repr(value)} ({type(value).__name__}), accepted is {kind}")
