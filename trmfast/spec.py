"""The specification of a network: shapes and options of its blocks, and the order of its weights."""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache
from typing import Any

__all__ = ["BlockSpec", "NetSpec", "swiglu_width"]

# The values of each choice, today's block first.
CHOICES: dict[str, tuple[str, ...]] = {
    "token_mixer": ("attention", "mlp_t", "simple_gla"),
    "channel_mixer": ("swiglu", "conv_swiglu", "relu2", "gelu"),
    "norm_placement": ("post", "pre", "sandwich", "sandwich_sum"),
    "rotation": ("half", "interleaved"),
    "qk_norm": ("none", "plain", "learned"),
    "gate": ("none", "channel", "head"),
}
# How the sum of an update's sources enters a network, today's way first.
INJECTIONS = ("add", "diagonal", "linear")
# Options of attention, and of norms over the width: a SwiGLU over the sequence has neither.
NOT_FOR_MLP_T = (
    "norm_placement", "norm_weight", "rotation", "qk_norm", "qk_bias", "gate", "attention_window", "segments",
)  # fmt: skip
# What is no choice among kinds of networks: every backend takes the sizes that it takes.
SIZES = (
    "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "seq_len", "seq_intermediate_size",
    "conv_kernel", "rms_norm_eps",
)  # fmt: skip
# What the logarithm of a decay is divided by, as in flash-linear-attention: a logit of 0 halves a key in 16 tokens.
DECAY_NORMALIZER = 16
KINDS = {"int": (int,), "float": (int, float), "bool": (bool,)}


def swiglu_width(width: int, expansion: float) -> int:
    """Inner width of a SwiGLU: two thirds of ``expansion * width``, rounded up to a multiple of 256."""
    return -(-round(expansion * width * 2 / 3) // 256) * 256


@dataclass(frozen=True)
class BlockSpec:
    """One block: a token mixer and a channel mixer, each with a residual and with RMS norms around it.

    The defaults are the post-norm block of TRM and HRM.  trmfast/reference.py holds every formula.

    Attributes:
        hidden_size: width D of the states.
        intermediate_size: inner width of the channel mixer.
        token_mixer: ``"attention"``; ``"mlp_t"``, a SwiGLU over the sequence axis whose norm is over that axis too; or
            ``"simple_gla"``, linear attention with one decay for each head and token: the simple GLA of
            flash-linear-attention (GLA is arXiv 2312.06635), the core of Mamba-2 (arXiv 2405.21060).  It is causal,
            and takes the options of attention but for the window.
        channel_mixer: ``"swiglu"``; ``"conv_swiglu"`` (URM), with a depthwise convolution over the sequence after the
            gate; ``"relu2"``, the square of a ReLU, or ``"gelu"``, the exact one, both without a gate.
        num_heads: query heads (attention, here and below simple_gla too unless it says otherwise).
        num_kv_heads: key and value heads, a divisor of ``num_heads`` (attention); by default ``num_heads``.
        head_dim: width of one head (attention); by default ``hidden_size // num_heads``.
        causal: whether position i sees only positions up to i (attention; True with simple_gla).
        seq_len: sequence length L, fixed by the weights (mlp_t).
        seq_intermediate_size: inner width of the SwiGLU over the sequence (mlp_t).
        conv_kernel: taps of the depthwise convolution (conv_swiglu).
        rms_norm_eps: epsilon of the norms.
        norm_placement: ``"post"``, ``norm(h + mix(h))``; ``"pre"``, ``h + mix(norm(h))``; ``"sandwich"`` (Ouro),
            ``h + norm(mix(norm(h)))``; ``"sandwich_sum"`` (Huginn), ``norm(h + mix(norm(h)))``.
        norm_weight: whether norms over D have a learned weight.
        rotation: the channels of a head that RoPE turns together: ``"half"``, c and c + head_dim / 2, or
            ``"interleaved"``, 2i and 2i + 1 (attention).
        qk_norm: RMS norm of queries and keys over each head before the rotation: ``"none"``, ``"plain"``, or
            ``"learned"`` with a weight that the heads share (attention).
        qk_bias: whether queries and keys have a bias, added first of all (attention).
        gate: sigmoid of a further projection of the input that multiplies attention before the output projection:
            ``"none"``, ``"channel"`` for one value a channel, ``"head"`` for one a head (attention).
        attention_window: attention sees positions at a distance below it; 0 for no limit (attention, not simple_gla).
        segments: whether every call says which tokens belong together, so that a row may hold several sequences, each
            with a prefix that sees itself in both directions (attention; causal, without a window; simple_gla has no
            prefixes).

    Raises:
        TypeError: a width, count or length that is not an int, an epsilon that is not a number, or a flag that is not a
            bool.
        ValueError: a value out of range, or without meaning beside another; all name the field, what came and what is
            accepted.
    """

    hidden_size: int
    intermediate_size: int
    token_mixer: str = "attention"
    channel_mixer: str = "swiglu"
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    causal: bool = False
    seq_len: int = 0
    seq_intermediate_size: int = 0
    conv_kernel: int = 2
    rms_norm_eps: float = 1e-5
    norm_placement: str = "post"
    norm_weight: bool = False
    rotation: str = "half"
    qk_norm: str = "none"
    qk_bias: bool = False
    gate: str = "none"
    attention_window: int = 0
    segments: bool = False

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            kinds = KINDS.get(str(item.type))
            flag = item.type == "bool"
            if kinds is not None and (isinstance(value, bool) is not flag or not isinstance(value, kinds)):
                raise TypeError(f"{item.name}: got {value!r} ({type(value).__name__}), accepted is {item.type}")
        for name, accepted in CHOICES.items():
            self._accept(name, getattr(self, name) in accepted, " or ".join(accepted))
        self._accept("hidden_size", self.hidden_size >= 1, "integers >= 1")
        self._accept("intermediate_size", self.intermediate_size >= 1, "integers >= 1")
        self._accept("rms_norm_eps", self.rms_norm_eps > 0, "positive numbers")
        self._accept("conv_kernel", self.conv_kernel >= 1, "integers >= 1")
        self._accept("attention_window", self.attention_window >= 0, "integers >= 0")
        if self.attends:
            self._accept("num_heads", self.num_heads >= 1, "integers >= 1")
            if not self.head_dim:
                divides = self.hidden_size % self.num_heads == 0
                self._accept("num_heads", divides, f"the divisors of hidden_size {self.hidden_size}")
                object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
            if not self.num_kv_heads:
                object.__setattr__(self, "num_kv_heads", self.num_heads)
            grouped = self.num_kv_heads >= 1 and self.num_heads % self.num_kv_heads == 0
            self._accept("num_kv_heads", grouped, f"the divisors of num_heads {self.num_heads}")
        else:
            self._accept("seq_len", self.seq_len >= 1, "integers >= 1")
            self._accept("seq_intermediate_size", self.seq_intermediate_size >= 1, "integers >= 1")
            for name in NOT_FOR_MLP_T:
                default = type(self).__dataclass_fields__[name].default
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name}: got {getattr(self, name)!r} with token_mixer 'mlp_t', accepted is {default!r}"
                    )
        if self.token_mixer == "simple_gla":
            for name, only in (("causal", True), ("attention_window", 0)):
                if getattr(self, name) != only:
                    raise ValueError(
                        f"{name}: got {getattr(self, name)!r} with token_mixer 'simple_gla', accepted is {only!r}"
                    )
        free = self.causal and not self.attention_window
        if self.segments and not free:
            raise ValueError("segments: got True, accepted is False unless causal and without attention_window")

    def _accept(self, name: str, good: bool, accepted: str) -> None:
        if not good:
            raise ValueError(f"{name}: got {getattr(self, name)!r}, accepted are {accepted}")

    @property
    def num_norms(self) -> int:
        """Norms over D in a block, in order of application ``norm1`` to ``norm4``."""
        return 4 if self.norm_placement.startswith("sandwich") else 2

    @property
    def attends(self) -> bool:
        """Whether queries, keys and values mix the tokens: attention or simple_gla."""
        return self.token_mixer != "mlp_t"

    @property
    def gate_rows(self) -> int:
        """Rows of the gate's projection."""
        return {"none": 0, "channel": self.num_heads * self.head_dim, "head": self.num_heads}[self.gate]

    @property
    def decay_rows(self) -> int:
        """Rows of the decays' projection."""
        return self.num_heads if self.token_mixer == "simple_gla" else 0

    @property
    def rows_ahead(self) -> int:
        """Rows of the first product of attention that come before those of queries."""
        return self.gate_rows + self.decay_rows

    def attention_pairs(self, length: int) -> int:
        """Pairs of a query and a key that it sees in ``length`` tokens; segments count as one causal sequence."""
        reach = min(self.attention_window or length, length)
        before = reach * length - reach * (reach - 1) // 2  # keys up to the query itself
        return before if self.causal else 2 * before - length

    @property
    def mixer_name(self) -> str:
        """What the token mixer is called in a state_dict."""
        return "self_attn" if self.token_mixer == "attention" else self.token_mixer

    @property
    def packed_name(self) -> str:
        """What the first product of attention is called, by what it gives: gates, decays, queries, keys, values."""
        if self.token_mixer == "simple_gla":
            return "in_proj"
        return "qkv_proj" if self.gate == "none" else "gqkv_proj"

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names (those of the published state_dicts) and shapes of a block's weights, in the order all code uses."""
        D, inter = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {}
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        mixer = self.mixer_name
        if self.attends:
            shapes[f"{mixer}.{self.packed_name}.weight"] = (self.rows_ahead + query + 2 * kv, D)
            shapes[f"{mixer}.o_proj.weight"] = (D, query)
        else:
            shapes["mlp_t.gate_up_proj.weight"] = (2 * self.seq_intermediate_size, self.seq_len)
            shapes["mlp_t.down_proj.weight"] = (self.seq_len, self.seq_intermediate_size)
        if self.channel_mixer in ("swiglu", "conv_swiglu"):
            shapes["mlp.gate_up_proj.weight"] = (2 * inter, D)
        else:
            shapes["mlp.up_proj.weight"] = (inter, D)
        if self.channel_mixer == "conv_swiglu":
            shapes["mlp.dwconv.weight"] = (inter, 1, self.conv_kernel)
            shapes["mlp.dwconv.bias"] = (inter,)
        shapes["mlp.down_proj.weight"] = (D, inter)
        if self.decay_rows:
            shapes[f"{mixer}.decay_bias"] = (self.decay_rows,)
        if self.qk_bias:
            shapes[f"{mixer}.qk_bias"] = (query + kv,)
        if self.qk_norm == "learned":
            shapes[f"{mixer}.q_norm.weight"] = shapes[f"{mixer}.k_norm.weight"] = (self.head_dim,)
        if self.norm_weight:
            shapes.update({f"norm{i}.weight": (D,) for i in range(1, self.num_norms + 1)})
        return shapes


@dataclass(frozen=True)
class NetSpec:
    """A stack of equal blocks with weights of their own.

    Attributes:
        block: the block.
        num_layers: number of blocks.
        final_norm: whether an RMS norm over D follows the last block, with a learned weight if the block's norms have
            one.
        injection: how the sum s of an update's sources enters, with x if the update injects it: ``"add"``, ``s + x``;
            ``"diagonal"`` (Parcae), ``w * s + x`` with a learned w [D]; ``"linear"`` (Huginn), ``W s + x`` with a
            learned W [D, D].  Without sources x enters.
        key: the spec as one line of JSON, the form in which it crosses operator boundaries; fields of the block that
            have their defaults are left out.
    """

    block: BlockSpec
    num_layers: int
    final_norm: bool = False
    injection: str = "add"
    key: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.num_layers, bool) or not isinstance(self.num_layers, int) or self.num_layers < 1:
            raise ValueError(f"num_layers: got {self.num_layers!r}, accepted are integers >= 1")
        if not isinstance(self.final_norm, bool):
            raise TypeError(f"final_norm: got {self.final_norm!r}, accepted is bool")
        if self.injection not in INJECTIONS:
            raise ValueError(f"injection: got {self.injection!r}, accepted are {' or '.join(INJECTIONS)}")
        chosen = {f.name: getattr(self.block, f.name) for f in fields(self.block)}
        defaults = {f.name: f.default for f in fields(self.block) if f.default is not MISSING}
        shown = {name: value for name, value in chosen.items() if name not in defaults or value != defaults[name]}
        further = [self.final_norm, self.injection]
        while further and further[-1] in (False, INJECTIONS[0]):
            further.pop()
        items = [shown, self.num_layers, *further]
        object.__setattr__(self, "key", json.dumps(items, separators=(",", ":")))

    @property
    def options(self) -> dict[str, tuple[Any, Any]]:
        """What makes networks differ in kind: the value and the default of every field but the sizes."""
        found = {f.name: (getattr(self.block, f.name), f.default) for f in fields(self.block) if f.name not in SIZES}
        return {**found, "final_norm": (self.final_norm, False), "injection": (self.injection, INJECTIONS[0])}

    @staticmethod
    @lru_cache(maxsize=256)
    def from_key(key: str) -> NetSpec:
        """The spec that :attr:`key` describes."""
        block, *rest = json.loads(key)
        return NetSpec(BlockSpec(**block), *rest)

    @property
    def weight_shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """(name, shape) of every weight, layer by layer: ``layers.0.self_attn.qkv_proj.weight`` first.

        ``norm.weight`` of a final norm with a weight, and ``injection.weight`` where there is one, come last.
        """
        layers = tuple(
            (f"layers.{i}.{name}", shape)
            for i in range(self.num_layers)
            for name, shape in self.block.weight_shapes.items()
        )
        width = self.block.hidden_size
        last: list[tuple[str, tuple[int, ...]]] = []
        if self.final_norm and self.block.norm_weight:
            last.append(("norm.weight", (width,)))
        if self.injection != "add":
            last.append(("injection.weight", (width,) if self.injection == "diagonal" else (width, width)))
        return (*layers, *last)
