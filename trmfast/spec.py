"""The specification of a network: shapes and options of its blocks, and the order of its weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache

__all__ = ["BlockSpec", "NetSpec", "swiglu_width"]

TOKEN_MIXERS = ("attention", "mlp_t")
CHANNEL_MIXERS = ("swiglu", "conv_swiglu")


def swiglu_width(width: int, expansion: float) -> int:
    """Inner width of a SwiGLU: two thirds of ``expansion * width``, rounded up to a multiple of 256."""
    return -(-round(expansion * width * 2 / 3) // 256) * 256


@dataclass(frozen=True)
class BlockSpec:
    """One post-norm block: token mixer, residual, RMSNorm, channel mixer, residual, RMSNorm; norms have no weight.

    Attributes:
        hidden_size: width D of the states.
        intermediate_size: inner width of the channel mixer's SwiGLU.
        token_mixer: ``"attention"``, or ``"mlp_t"``, a SwiGLU over the sequence axis whose norm is over that axis too.
        channel_mixer: ``"swiglu"``, or ``"conv_swiglu"`` (URM): a depthwise convolution over the sequence after the
            gate.
        num_heads: query heads (attention).
        num_kv_heads: key and value heads, a divisor of ``num_heads`` (attention); by default ``num_heads``.
        head_dim: width of one head (attention); by default ``hidden_size // num_heads``.
        causal: whether position i sees only positions up to i (attention).
        seq_len: sequence length L, fixed by the weights (mlp_t).
        seq_intermediate_size: inner width of the SwiGLU over the sequence (mlp_t).
        conv_kernel: taps of the depthwise convolution (conv_swiglu).
        rms_norm_eps: epsilon of the norms.

    Raises:
        TypeError: a width, count or length that is not an int, or an epsilon that is not a number.
        ValueError: a value out of range; both name the field, what came and what is accepted.
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

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            kinds = {"int": (int,), "float": (int, float)}.get(str(item.type))
            if kinds is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
                raise TypeError(f"{item.name}: got {value!r} ({type(value).__name__}), accepted is {item.type}")
        self._accept("token_mixer", self.token_mixer in TOKEN_MIXERS, " or ".join(TOKEN_MIXERS))
        self._accept("channel_mixer", self.channel_mixer in CHANNEL_MIXERS, " or ".join(CHANNEL_MIXERS))
        self._accept("hidden_size", self.hidden_size >= 1, "integers >= 1")
        self._accept("intermediate_size", self.intermediate_size >= 1, "integers >= 1")
        self._accept("rms_norm_eps", self.rms_norm_eps > 0, "positive numbers")
        self._accept("conv_kernel", self.conv_kernel >= 1, "integers >= 1")
        if self.token_mixer == "attention":
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

    def _accept(self, name: str, good: bool, accepted: str) -> None:
        if not good:
            raise ValueError(f"{name}: got {getattr(self, name)!r}, accepted are {accepted}")

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names (those of the published state_dicts) and shapes of a block's weights, in the order all code uses."""
        D, inter = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {}
        if self.token_mixer == "attention":
            query = self.num_heads * self.head_dim
            shapes["self_attn.qkv_proj.weight"] = (query + 2 * self.num_kv_heads * self.head_dim, D)
            shapes["self_attn.o_proj.weight"] = (D, query)
        else:
            shapes["mlp_t.gate_up_proj.weight"] = (2 * self.seq_intermediate_size, self.seq_len)
            shapes["mlp_t.down_proj.weight"] = (self.seq_len, self.seq_intermediate_size)
        shapes["mlp.gate_up_proj.weight"] = (2 * inter, D)
        if self.channel_mixer == "conv_swiglu":
            shapes["mlp.dwconv.weight"] = (inter, 1, self.conv_kernel)
            shapes["mlp.dwconv.bias"] = (inter,)
        shapes["mlp.down_proj.weight"] = (D, inter)
        return shapes


@dataclass(frozen=True)
class NetSpec:
    """A stack of equal blocks with weights of their own.

    Attributes:
        block: the block.
        num_layers: number of blocks.
        key: the spec as one line of JSON, the form in which it crosses operator boundaries.
    """

    block: BlockSpec
    num_layers: int
    key: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.num_layers, bool) or not isinstance(self.num_layers, int) or self.num_layers < 1:
            raise ValueError(f"num_layers: got {self.num_layers!r}, accepted are integers >= 1")
        key = json.dumps([asdict(self.block), self.num_layers], separators=(",", ":"))
        object.__setattr__(self, "key", key)

    @staticmethod
    @lru_cache(maxsize=256)
    def from_key(key: str) -> NetSpec:
        """The spec that :attr:`key` describes."""
        block, num_layers = json.loads(key)
        return NetSpec(BlockSpec(**block), num_layers)

    @property
    def weight_shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """(name, shape) of every weight, layer by layer: ``layers.0.self_attn.qkv_proj.weight`` first."""
        return tuple(
            (f"layers.{i}.{name}", shape)
            for i in range(self.num_layers)
            for name, shape in self.block.weight_shapes.items()
        )
