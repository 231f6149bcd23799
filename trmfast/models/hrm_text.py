"""HRM-Text: the recursion of a language model, between its embedding and its head (github.com/sapientinc/HRM-Text)."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from trmfast import ops
from trmfast.budget import DEFAULT, Recompute, budget_of
from trmfast.config import convert
from trmfast.layers import RotaryEmbedding
from trmfast.networks import Block, Net, watch_nets
from trmfast.program import RecursionProgram
from trmfast.spec import BlockSpec, NetSpec, swiglu_width
from trmfast.watch import inside

__all__ = ["HRMText", "HRMTextConfig"]

INIT_TYPES = ("fixed_normal", "lecun_normal", "megatron")


@dataclass(frozen=True, kw_only=True)
class HRMTextConfig:
    """Configuration of HRM-Text, under the published keys.

    Attributes:
        max_seq_len: positions of the RoPE tables.
        n_layers: blocks of each of the two networks; of both together with ``half_layers``.
        hidden_size, num_heads, expansion: width D, heads, and the expansion that sets the inner width.
        H_cycles, L_cycles: depth of the recursion.
        attn_type: ``"prefixlm"``, where the prefix of a sequence sees itself in both directions, or ``"causal"``.
        init_type, init_std: of the weights.
        norm_type, norm_eps: ``"pre"``, with a norm after the last block, or ``"post"``; norms have no weights.
        pos_emb_type, rope_theta: ``"rope"`` with its base, or ``"none"``.
        bp_warmup_ratio, bp_min_steps, bp_max_steps: the gradient window grows from the least to the most updates over
            this part of the training steps.
        H_override: changes of f_H's configuration, none here.
        backend, recompute: as in :func:`trmfast.recursion`.
    """

    max_seq_len: int
    n_layers: int
    hidden_size: int
    num_heads: int
    expansion: float
    H_cycles: int
    L_cycles: int
    init_type: str
    norm_type: str
    norm_eps: float
    pos_emb_type: str
    rope_theta: float = 0.0
    attn_type: str = "prefixlm"
    init_std: float = 0.0
    half_layers: bool = False
    bp_warmup_ratio: float = 0.0
    bp_min_steps: int = 2
    bp_max_steps: int = 5
    backend: str = "auto"
    recompute: Recompute = DEFAULT

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> HRMTextConfig:
        """Reads the published keys; others are ignored, as upstream does.

        Raises:
            ValueError, TypeError: a key is missing, or a value is not accepted, in one line.
        """
        known = {field.name: field for field in fields(cls)}
        missing = [name for name, field in known.items() if field.default is MISSING and name not in config]
        if missing:
            raise ValueError(f"config_dict: got no {', '.join(missing)}, required by HRMText")
        if config.get("H_override"):
            raise ValueError(
                f"H_override: got {reprlib.repr(config['H_override'])}, accepted is {{}}, both networks are alike"
            )
        # None is upstream's default of rope_theta and init_std.
        given = {name: config[name] for name in known if config.get(name) is not None}
        return cls(**{name: convert(name, str(known[name].type), value) for name, value in given.items()})

    def __post_init__(self) -> None:
        budget_of(self.recompute)
        for name, accepted in (
            ("attn_type", ("prefixlm", "causal")),
            ("init_type", INIT_TYPES),
            ("norm_type", ("pre", "post")),
            ("pos_emb_type", ("rope", "none")),
        ):
            self._accept(name, getattr(self, name) in accepted, " or ".join(accepted))
        for name in ("max_seq_len", "n_layers", "bp_min_steps", "bp_max_steps"):
            least = 2 if name.startswith("bp_") else 1
            self._accept(name, getattr(self, name) >= least, f"integers >= {least}")
        self._accept("n_layers", not self.half_layers or self.n_layers % 2 == 0, "even numbers with half_layers")
        self._accept("rope_theta", self.pos_emb_type == "none" or self.rope_theta > 0, "positive numbers with rope")
        self._accept("expansion", self.expansion > 0, "positive numbers")

    def _accept(self, name: str, good: bool, accepted: str) -> None:
        if not good:
            raise ValueError(f"{name}: got {reprlib.repr(getattr(self, name))}, accepted are {accepted}")

    @property
    def depth(self) -> int:
        """Blocks of one network."""
        return self.n_layers // 2 if self.half_layers else self.n_layers

    def net_spec(self, segments: bool) -> NetSpec:
        """A network, for rows of one sequence each, or with boundaries."""
        pre = self.norm_type == "pre"
        block = BlockSpec(
            hidden_size=self.hidden_size,
            intermediate_size=swiglu_width(self.hidden_size, self.expansion),
            num_heads=self.num_heads,
            causal=True,
            rms_norm_eps=self.norm_eps,
            norm_placement="pre" if pre else "post",
            gate="channel",
            segments=segments,
        )
        return NetSpec(block, self.depth, final_norm=pre)

    def stds(self, fan_in: int, is_output: bool) -> float:
        """Standard deviation of a projection's initial weights."""
        if self.init_type == "lecun_normal":
            return fan_in**-0.5
        if self.init_type == "fixed_normal":
            return self.init_std or 0.02
        std = self.init_std or self.hidden_size**-0.5
        return std / math.sqrt(2 * self.depth) if is_output else std


class TransformerBlock(Block):
    """A block whose attention is called ``attn``."""

    attention_name = "attn"


class Transformer(Net):
    """A network of such blocks."""

    block_type = TransformerBlock


class Level(nn.Module):
    """The place of a network in the published tree of modules."""

    def __init__(self, spec: NetSpec) -> None:
        super().__init__()
        self.core = Transformer(spec)


class HRMText(nn.Module):
    """The recursion of HRM-Text as one operation: ``HierarchicalReasoningModel`` with the same constructor, state_dict,
    initial weights, gradient windows and outputs, for training and scoring.

    The embedding, the head and the loss are those of the training script.  There is no incremental decoding: a cache is
    refused.

    Args:
        config_dict: see :class:`HRMTextConfig`.
    """

    zL_init: Tensor

    def __init__(self, config_dict: Mapping[str, Any]) -> None:
        super().__init__()
        config = self.config = HRMTextConfig.from_dict(config_dict)
        self.hidden_size = config.hidden_size
        self.H_cycles, self.L_cycles = config.H_cycles, config.L_cycles
        # One for rows of one sequence, one for rows with boundaries.
        self.specs = tuple(config.net_spec(segments) for segments in (False, True))
        spec = self.specs[0]
        device = torch.empty(0).device
        with torch.device("meta"):  # where nothing is drawn: a seed gives the published weights
            self.H_level, self.L_level = Level(spec), Level(spec)
        for level in (self.H_level, self.L_level):
            for path, weight in level.to_empty(device=device).named_parameters():
                output = path.endswith(("o_proj.weight", "down_proj.weight"))
                _cut_normal_(weight, config.stds(weight.shape[1], output))
        self.register_buffer("zL_init", _cut_normal_(torch.empty(config.hidden_size, dtype=torch.bfloat16), 1.0))
        if config.pos_emb_type == "rope":
            self.rotary_emb = RotaryEmbedding(spec.block.head_dim, config.max_seq_len, config.rope_theta)
        std = config.stds(config.hidden_size, is_output=False)
        self.head_hint = {side: {"dim": config.hidden_size, "init_std": std} for side in ("in", "out")}

    def initial_carry(self, batch_size: int, dtype: torch.dtype) -> None:
        """None: nothing is carried from one batch to the next."""

    def create_cache(self, **_: Any) -> Any:
        """Raises NotImplementedError: there is no incremental decoding."""
        raise NotImplementedError("create_cache: HRMText has no incremental decoding, accepted are calls without cache")

    def compute_train_extra_args(self, train_state: Any) -> dict[str, Any]:
        """``bp_steps`` of a training step: the gradient window grows over the first part of training.

        Args:
            train_state: has ``step`` and ``total_steps``.
        """
        config = self.config
        steps = train_state.total_steps * config.bp_warmup_ratio
        progress = min(1.0, train_state.step / steps) if steps > 0 else 1.0
        return {"bp_steps": config.bp_min_steps + int(progress * (config.bp_max_steps - config.bp_min_steps))}

    def forward(
        self,
        carry: None,
        x: Tensor,
        cache: None = None,
        bp_steps: int = 2,
        position_ids: Tensor | None = None,
        prefix_lens: Tensor | None = None,
        causal_lens: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        total_seqlen: Tensor | None = None,
        numseqs: Tensor | None = None,
        max_seqlen_prefix: Tensor | None = None,
        max_seqlen_causal: Tensor | None = None,
        max_seqlen_all: Tensor | None = None,
    ) -> tuple[None, Tensor]:
        """Runs the recursion.

        Args:
            carry: ignored.
            x: scaled embeddings in the compute dtype: [T, D], a row of packed sequences if ``cu_seqlens`` is given and
                of one sequence if not; or [B, L, D], a sequence a row.
            cache: None.
            bp_steps: updates with gradient, at least 2: as many of z_H as there are, but one, the others of z_L.
            position_ids: integers [T], the position of each token in its sequence; by default that in the row.
            prefix_lens: integers [>= sequences], the lengths of the prefixes.
            cu_seqlens: integers [> sequences], where each sequence begins and the last one ends; the rest is ignored.
            numseqs: the number of sequences, an integer tensor.
            causal_lens, total_seqlen, max_seqlen_prefix, max_seqlen_causal, max_seqlen_all: accepted, and not needed.

        Returns:
            None, and z_H, shaped like x.  Rows behind the last sequence hold numbers without meaning.

        Raises:
            ValueError: an argument that is not accepted, in one line.
        """
        if cache is not None:
            raise ValueError("cache: got one, accepted is None, HRMText has no incremental decoding")
        if x.dim() not in (2, 3):
            raise ValueError(f"x.shape: got {list(x.shape)}, accepted are [T, D] and [B, L, D]")
        seq = [_unwrapped(value) for value in (position_ids, prefix_lens, cu_seqlens, numseqs)]
        if x.dim() == 3 and any(value is not None for value in seq):
            raise ValueError("x.shape: got three dimensions with packed sequences, accepted is [T, D]")
        position_ids, prefix_lens, cu_seqlens, numseqs = seq
        h = x if x.dim() == 3 else x[None]
        segments = None
        if cu_seqlens is not None:
            if prefix_lens is None or numseqs is None:
                raise ValueError("cu_seqlens: got it alone, accepted with prefix_lens and numseqs")
            prefix = prefix_lens if self.config.attn_type == "prefixlm" else torch.zeros_like(prefix_lens)
            segments = _segments(x.shape[0], cu_seqlens, prefix, numseqs)
        cos, sin = self.rotary_emb() if self.config.pos_emb_type == "rope" else (None, None)
        if cos is not None and sin is not None and position_ids is not None:
            cos, sin = cos[position_ids], sin[position_ids]
        watch = None if torch.compiler.is_compiling() else watch_nets(self, ("H_level.core", "L_level.core"))
        program = _program(self.H_cycles, self.L_cycles, bp_steps)
        if bp_steps <= self.H_cycles:  # the first update of z_H, which alone carries x on, is outside the window
            h = h.detach()

        def run(*states: Tensor) -> tuple[Tensor, ...]:
            cores = (self.H_level.core, self.L_level.core)
            return ops.recursion(
                program,
                [self.specs[segments is not None]] * 2,
                states,
                None,
                watch.weights() if watch else [weight for core in cores for weight in core.weights()],
                cos,
                sin,
                backend=self.config.backend,
                recompute=self.config.recompute,
                segments=segments,
            )

        z_H, _ = inside(watch.sharded if watch else (), run, (h, self.zL_init.to(h.dtype).expand_as(h)))
        return None, z_H if x.dim() == 3 else z_H[0]


@torch.compiler.assume_constant_result
def _program(H_cycles: int, L_cycles: int, bp_steps: int) -> Any:
    return hrm_text_program(H_cycles, L_cycles, bp_steps)


@lru_cache(maxsize=64)
def hrm_text_program(H_cycles: int, L_cycles: int, bp_steps: int) -> RecursionProgram:
    """The program with the gradient window of a training step."""
    if isinstance(bp_steps, bool) or not isinstance(bp_steps, int) or bp_steps < 2:
        raise ValueError(f"bp_steps: got {bp_steps!r}, accepted are integers >= 2")
    high = min(H_cycles, bp_steps - 1)
    return RecursionProgram.hrm_text(H_cycles, L_cycles).with_last((high, bp_steps - high))


def _unwrapped(value: Any) -> Any:
    """A tensor, which upstream's training script wraps so that fully_shard does not see it."""
    return value if value is None or isinstance(value, Tensor) else value.value


def _segments(length: int, cu_seqlens: Tensor, prefix_lens: Tensor, numseqs: Tensor) -> Tensor:
    """Boundaries [1, T, 2] of packed sequences; the tokens behind the last one are a sequence of their own."""
    ends = cu_seqlens[1:]
    count = torch.arange(len(ends), device=ends.device)
    # What follows the last sequence is no end: beyond every token, so that the ends stay sorted.
    ends = torch.where(count < numseqs, ends, length + 1)
    token = torch.arange(length, device=ends.device, dtype=ends.dtype)
    index = torch.searchsorted(ends.contiguous(), token, right=True)
    start = cu_seqlens[index]
    prefix = torch.where(index < numseqs, prefix_lens[index.clamp(max=len(prefix_lens) - 1)], 0)
    return torch.stack((start, start + prefix), dim=-1).to(torch.int32)[None]


@torch.no_grad()
def _cut_normal_(tensor: Tensor, std: float) -> Tensor:
    """Normal numbers of which those beyond three deviations lose three: a seed gives the published weights."""
    return tensor.normal_().fmod_(3.0).mul_(1.014762601732121 * std)
