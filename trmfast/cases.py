"""Named recursions with random inputs: the one problem list of tests, ``trmfast check`` and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from trmfast.problem import Problem
from trmfast.program import GradientWindow, RecursionProgram
from trmfast.spec import BlockSpec, NetSpec, swiglu_width

__all__ = [
    "CHOICES",
    "LOOPED",
    "MEASURED",
    "PUBLISHED",
    "SMALL",
    "Case",
    "Inputs",
    "find_case",
    "make_case",
    "make_inputs",
    "rope_tables",
]

PROGRAMS: dict[str, Callable[..., RecursionProgram]] = {
    "trm": RecursionProgram.trm,
    "hrm": RecursionProgram.hrm,
    "single_z": RecursionProgram.single_z,
    "hier6": RecursionProgram.hier6,
    "urm": RecursionProgram.urm,
    "hrm_text": RecursionProgram.hrm_text,
}


@dataclass(frozen=True)
class Case:
    """A problem with a batch size and a length.

    Attributes:
        name: what it is called in tables and test ids.
        problem: program and networks.
        batch: B.
        length: L.
        rope: whether attention rotates queries and keys.
    """

    name: str
    problem: Problem
    batch: int
    length: int
    rope: bool = True

    def __str__(self) -> str:
        return self.name


def make_case(
    name: str,
    model: str = "trm",
    *,
    H_cycles: int = 2,
    L_cycles: int = 2,
    window: GradientWindow = "last_cycle",
    batch: int = 2,
    length: int = 12,
    hidden_size: int = 64,
    num_heads: int = 2,
    num_layers: int = 2,
    intermediate_size: int | None = None,
    token_mixer: str = "attention",
    channel_mixer: str = "swiglu",
    conv_kernel: int = 2,
    num_kv_heads: int = 0,
    causal: bool = False,
    rope: bool = True,
    final_norm: bool = False,
    injection: str = "add",
    **options: Any,
) -> Case:
    """A case from sizes; the inner widths are those of the published models (expansion 4) unless given.

    Args:
        name: the name of the case.
        model: which program: trm, hrm, single_z, hier6 or urm.
        H_cycles, L_cycles, window: as in the constructors of :class:`RecursionProgram`.
        batch, length: B and L.
        hidden_size, num_heads, num_layers, token_mixer, channel_mixer, conv_kernel, num_kv_heads, causal: as in
            :class:`BlockSpec`.
        intermediate_size: inner width of both SwiGLUs.
        rope: whether attention rotates queries and keys.
        final_norm, injection: as in :class:`NetSpec`.
        options: further fields of :class:`BlockSpec`.
    """
    program = PROGRAMS[model](H_cycles, L_cycles, window)
    attends = token_mixer != "mlp_t"
    block = BlockSpec(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or swiglu_width(hidden_size, 4),
        token_mixer=token_mixer,
        channel_mixer=channel_mixer,
        conv_kernel=conv_kernel,
        num_heads=num_heads if attends else 0,
        num_kv_heads=num_kv_heads if attends else 0,
        causal=causal,
        seq_len=0 if attends else length,
        seq_intermediate_size=0 if attends else intermediate_size or swiglu_width(length, 4),
        **options,
    )
    problem = Problem(program, (NetSpec(block, num_layers, final_norm, injection),) * len(program.nets))
    return Case(name, problem, batch, length, rope and attends)


# Every program, and every option of the published puzzle models' block, at sizes that take milliseconds.
SMALL: tuple[Case, ...] = (
    make_case("trm"),
    make_case("trm-mlp_t", token_mixer="mlp_t", intermediate_size=64),
    make_case("hrm", "hrm"),
    make_case("single_z", "single_z"),
    make_case("hier6", "hier6", H_cycles=1, L_cycles=6, num_layers=1),
    make_case("urm", "urm", channel_mixer="conv_swiglu"),
    make_case(
        "conv-3-taps", "urm", H_cycles=1, channel_mixer="conv_swiglu", conv_kernel=3, length=13, intermediate_size=80
    ),
    make_case(
        "conv-5-taps-2-tokens", "urm", H_cycles=1, channel_mixer="conv_swiglu", conv_kernel=5, length=2, num_layers=1
    ),
    make_case("grouped-heads", num_heads=4, num_kv_heads=2),
    make_case("causal", causal=True),
    make_case("no-rope", rope=False),
    make_case("odd-sizes", batch=3, length=13, hidden_size=48, num_heads=3, intermediate_size=80),
    make_case("one-token", length=1),
    make_case("one-row", batch=1, length=81),
    make_case("long", H_cycles=1, L_cycles=1, batch=1, length=333, num_layers=1),
    make_case("window-one_step", window="one_step"),
    make_case("window-2-cycles", H_cycles=3, L_cycles=1, window=2, num_layers=1),
    make_case("window-all", window="all", num_layers=1),
)

# Every other choice of a block, and the blocks of looped language models, at such sizes.
_SHORT: dict[str, Any] = {"H_cycles": 1, "L_cycles": 2, "length": 11, "intermediate_size": 80}
CHOICES: tuple[Case, ...] = (
    make_case("pre", norm_placement="pre", final_norm=True, **_SHORT),
    make_case("pre-no-final-norm", norm_placement="pre", num_layers=1, **_SHORT),
    make_case("post-weights", norm_weight=True, **_SHORT),
    make_case("sandwich", norm_placement="sandwich", **_SHORT),
    make_case("sandwich_sum", norm_placement="sandwich_sum", **_SHORT),
    make_case("final-norm-mlp_t", token_mixer="mlp_t", final_norm=True, **_SHORT),
    make_case("interleaved", rotation="interleaved", **_SHORT),
    make_case("qk_norm", qk_norm="plain", **_SHORT),
    make_case("qk_norm-weights", qk_norm="learned", num_heads=4, num_kv_heads=2, **_SHORT),
    make_case("qk_bias", qk_bias=True, num_heads=4, num_kv_heads=2, **_SHORT),
    make_case("gate-channel", gate="channel", num_heads=4, num_kv_heads=2, **_SHORT),
    make_case("gate-head", gate="head", num_heads=4, num_kv_heads=2, **_SHORT),
    make_case("window", attention_window=4, **_SHORT),
    make_case("window-causal", attention_window=4, causal=True, **_SHORT),
    make_case("relu2", channel_mixer="relu2", **_SHORT),
    make_case("gelu", channel_mixer="gelu", **_SHORT),
    make_case("gelu-mlp_t", token_mixer="mlp_t", channel_mixer="gelu", **_SHORT),
    make_case("segments", causal=True, segments=True, **_SHORT),
    make_case("diagonal", injection="diagonal", **_SHORT),
    make_case("linear", injection="linear", **_SHORT),
    make_case("linear-mlp_t", "hrm", token_mixer="mlp_t", injection="linear", **_SHORT),
    make_case("simple_gla", token_mixer="simple_gla", causal=True, **_SHORT),
    make_case(
        "simple_gla-segments",
        token_mixer="simple_gla",
        causal=True,
        segments=True,
        norm_placement="pre",
        norm_weight=True,
        final_norm=True,
        gate="channel",
        qk_norm="learned",
        num_heads=4,
        num_kv_heads=2,
        **_SHORT,
    ),
    make_case(
        "hrm_text",
        "hrm_text",
        window="all",
        segments=True,
        norm_placement="pre",
        final_norm=True,
        gate="channel",
        causal=True,
        **_SHORT,
    ),
    make_case("ouro", "urm", norm_placement="sandwich", norm_weight=True, final_norm=True, causal=True, **_SHORT),
    make_case(
        "huginn",
        "urm",
        norm_placement="sandwich_sum",
        norm_weight=True,
        qk_bias=True,
        rotation="interleaved",
        causal=True,
        **_SHORT,
    ),
    make_case(
        "parcae",
        "urm",
        norm_placement="pre",
        norm_weight=True,
        qk_norm="plain",
        rotation="interleaved",
        channel_mixer="relu2",
        causal=True,
        **_SHORT,
    ),
)

# The published configurations (width 512, 8 heads, expansion 4), one sequence each.
PUBLISHED: tuple[Case, ...] = tuple(
    make_case(name, model, batch=1, hidden_size=512, num_heads=8, **options)
    for name, model, options in (
        ("trm-sudoku-mlp", "trm", {"H_cycles": 3, "L_cycles": 6, "length": 97, "token_mixer": "mlp_t"}),
        ("trm-sudoku-att", "trm", {"H_cycles": 3, "L_cycles": 6, "length": 97}),
        ("trm-arc-att", "trm", {"H_cycles": 3, "L_cycles": 4, "length": 916}),
        ("hrm-sudoku", "hrm", {"window": "one_step", "length": 82, "num_layers": 4}),
        ("hrm-arc", "hrm", {"window": "one_step", "length": 901, "num_layers": 4}),
        ("urm-arc", "urm", {"L_cycles": 6, "length": 901, "num_layers": 4, "channel_mixer": "conv_swiglu"}),
    )
)

# What benchmarks run besides the published configurations: small models, blocks alone, deep recursion at test time.
MEASURED: tuple[Case, ...] = (
    *(
        make_case(
            name, H_cycles=3, L_cycles=6, batch=1, length=97, hidden_size=128, num_heads=4, token_mixer=token_mixer
        )
        for name, token_mixer in (("trm-small-att", "attention"), ("trm-small-mlp", "mlp_t"))
    ),
    *(
        make_case(
            name,
            "urm",
            H_cycles=1,
            L_cycles=1,
            batch=1,
            length=length,
            hidden_size=512,
            num_heads=8,
            num_layers=1,
            token_mixer=token_mixer,
            channel_mixer=channel_mixer,
        )
        for name, length, token_mixer, channel_mixer in (
            ("block-att-97", 97, "attention", "swiglu"),
            ("block-att-916", 916, "attention", "swiglu"),
            ("block-mlp-97", 97, "mlp_t", "swiglu"),
            ("block-conv-97", 97, "attention", "conv_swiglu"),
        )
    ),
    make_case("trm-deep-256", H_cycles=32, L_cycles=7, batch=1, length=97, hidden_size=512, num_heads=8),
)


# Networks of looped language models: HRM-Text B, whose two networks have these sizes, over one update.
LOOPED: tuple[Case, ...] = (
    make_case(
        "hrm-text-net",
        "urm",
        H_cycles=1,
        L_cycles=1,
        length=256,
        hidden_size=1024,
        num_heads=8,
        num_layers=6,
        intermediate_size=2816,
        causal=True,
        final_norm=True,
        norm_placement="pre",
        gate="channel",
        rms_norm_eps=1e-6,
    ),
)


def find_case(name: str) -> Case:
    """The case of that name, of all lists.

    Raises:
        KeyError: there is none.
    """
    return {case.name: case for case in (*SMALL, *CHOICES, *PUBLISHED, *MEASURED, *LOOPED)}[name]


@dataclass(frozen=True)
class Inputs:
    """Tensors for a problem: what :func:`trmfast.recursion` takes, and gradients of what it returns."""

    problem: Problem
    states: tuple[Tensor, ...]
    x: Tensor | None
    weights: tuple[Tensor, ...]
    cos: Tensor | None
    sin: Tensor | None
    grad_states: tuple[Tensor, ...]
    segments: Tensor | None = None


def make_inputs(
    case: Case,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str = "cpu",
    weight_scale: float = 1.0,
) -> Inputs:
    """Random tensors for a case.

    Args:
        case: the case.
        dtype: compute dtype of states, x and the gradients; weights and tables are float32.
        seed: seed; it draws the same numbers whatever the dtype and device.
        device: where the tensors go.
        weight_scale: factor on the weights, whose std is 1 / sqrt(fan in); below 1 rounding errors grow more slowly.
            Weights of norms are one plus such numbers, those of a diagonal injection a half.
    """
    problem = case.problem
    generator = torch.Generator().manual_seed(seed)
    shape = (case.batch, case.length, problem.hidden_size)

    def draw(size: tuple[int, ...], std: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator) * std

    states = tuple(draw(shape).to(device, dtype) for _ in problem.program.states)
    x = draw(shape).to(device, dtype) if problem.uses_x else None
    grads = tuple(draw(shape).to(device, dtype) for _ in problem.program.states)
    weights = tuple(
        (draw(size, weight_scale * size[-1] ** -0.5) + _mean(name, size)).to(device)
        for name, size in zip(problem.weight_names, problem.weight_shapes, strict=True)
    )
    cos, sin = (None, None)
    if case.rope and problem.rope_dim is not None:
        rotation = next(n.block.rotation for n in problem.nets if n.block.attends)
        cos, sin = (table.to(device) for table in rope_tables(case.length, problem.rope_dim, rotation=rotation))
    segments = _draw_segments(case, generator).to(device) if problem.uses_segments else None
    return Inputs(problem, states, x, weights, cos, sin, grads, segments)


def _draw_segments(case: Case, generator: torch.Generator) -> Tensor:
    """Rows of up to three sequences, each with a prefix, which may be empty or all of it: int32 [B, L, 2].

    Where networks have no prefixes, it is empty or one token.
    """
    segments = torch.empty(case.batch, case.length, 2, dtype=torch.int32)
    for row in segments:
        cuts = torch.randint(max(case.length, 1), (2,), generator=generator).tolist()
        bounds = sorted({0, *cuts, case.length})
        for start, end in pairwise(bounds):
            row[start:end, 0] = start
            most = end - start if case.problem.uses_prefixes else min(end - start, 1)
            row[start:end, 1] = start + int(torch.randint(most + 1, (), generator=generator))
    return segments


def _mean(name: str, size: tuple[int, ...]) -> float:
    """The weights of norms lie around one, those of a diagonal injection around a half."""
    owner = name.rpartition(".")[0].rpartition(".")[2]
    if owner == "injection" and len(size) == 1:
        return 0.5
    return 1.0 if owner.startswith(("norm", "q_norm", "k_norm")) else 0.0


def rope_tables(length: int, head_dim: int, base: float = 1e4, rotation: str = "half") -> tuple[Tensor, Tensor]:
    """Cosine and sine tables [length, head_dim] in float32, as :class:`trmfast.nn.RotaryEmbedding` holds them."""
    from trmfast.layers import RotaryEmbedding

    return RotaryEmbedding(head_dim, length, base, rotation=rotation)()
