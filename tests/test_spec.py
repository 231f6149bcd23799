"""Specs of blocks and networks: published sizes and parameter counts, validation, and the forms they are kept in."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest

from trmfast import BlockSpec, NetSpec, Problem, RecursionProgram
from trmfast.cases import PUBLISHED
from trmfast.spec import swiglu_width


@pytest.mark.parametrize(
    "width,expected", [(512, 1536), (97, 512), (81, 256), (916, 2560), (256, 768), (128, 512), (1024, 2816)]
)
def test_published_swiglu_widths(width: int, expected: int) -> None:
    assert swiglu_width(width, 4) == expected


# Vocabulary, and the published totals less two vocabulary tables, q_head and its bias.
PARAMETERS = {
    "trm-sudoku-mlp": (11, 5_028_866),
    "trm-sudoku-att": (11, 6_828_034),
    "trm-arc-att": (12, 6_829_058),
    "hrm-sudoku": (11, 27_275_266),
}


@pytest.mark.parametrize("case", [case for case in PUBLISHED if case.name in PARAMETERS], ids=str)
def test_published_parameter_counts(case: Any) -> None:
    vocabulary, total = PARAMETERS[case.name]
    heads = 2 * vocabulary * 512 + 2 * 512 + 2
    assert sum(math.prod(shape) for shape in case.problem.weight_shapes) + heads == total


def test_published_names_and_shapes() -> None:
    attention = NetSpec(BlockSpec(512, 1536, num_heads=8), 2)
    assert attention.weight_shapes[4:] == (
        ("layers.1.self_attn.qkv_proj.weight", (1536, 512)),
        ("layers.1.self_attn.o_proj.weight", (512, 512)),
        ("layers.1.mlp.gate_up_proj.weight", (3072, 512)),
        ("layers.1.mlp.down_proj.weight", (512, 1536)),
    )
    mixer = BlockSpec(512, 1536, token_mixer="mlp_t", seq_len=97, seq_intermediate_size=512)
    assert mixer.weight_shapes["mlp_t.gate_up_proj.weight"] == (1024, 97)
    assert mixer.weight_shapes["mlp_t.down_proj.weight"] == (97, 512)
    conv = BlockSpec(512, 1536, channel_mixer="conv_swiglu", num_heads=8)
    assert list(conv.weight_shapes)[2:] == [
        "mlp.gate_up_proj.weight",
        "mlp.dwconv.weight",
        "mlp.dwconv.bias",
        "mlp.down_proj.weight",
    ]
    assert conv.weight_shapes["mlp.dwconv.weight"] == (1536, 1, 2)


def test_grouped_heads_and_uneven_width() -> None:
    grouped = BlockSpec(512, 64, num_heads=8, num_kv_heads=2)
    assert grouped.weight_shapes["self_attn.qkv_proj.weight"] == ((8 + 2 * 2) * 64, 512)
    # The 12 heads of 42 of the published transformer baseline.
    uneven = BlockSpec(512, 64, num_heads=12, head_dim=42)
    assert uneven.weight_shapes["self_attn.qkv_proj.weight"] == (1512, 512)
    assert uneven.weight_shapes["self_attn.o_proj.weight"] == (512, 504)


@pytest.mark.parametrize("case", PUBLISHED, ids=str)
def test_key_copy_and_pickle(case: Any) -> None:
    for net in case.problem.nets:
        for other in (NetSpec.from_key(net.key), copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert other == net
            assert hash(other) == hash(net)
            assert other.key == net.key
    problem = case.problem
    for same in (
        Problem.from_keys(problem.program.key, tuple(net.key for net in problem.nets)),
        copy.deepcopy(problem),
        pickle.loads(pickle.dumps(problem)),
    ):
        assert same == problem
        assert hash(same) == hash(problem)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"token_mixer": "conv"}, "token_mixer: got 'conv', accepted are attention or mlp_t or simple_gla"),
        ({"channel_mixer": "moe"}, "channel_mixer: got 'moe', accepted are swiglu or conv_swiglu"),
        ({"hidden_size": 0}, "hidden_size: got 0"),
        ({"intermediate_size": 0}, "intermediate_size: got 0"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps: got 0.0, accepted are positive numbers"),
        ({"conv_kernel": 0}, "conv_kernel: got 0"),
        ({"num_heads": 0}, "num_heads: got 0"),
        ({"num_heads": 7}, "num_heads: got 7, accepted are the divisors of hidden_size 64"),
        ({"num_kv_heads": 3}, "num_kv_heads: got 3, accepted are the divisors of num_heads 4"),
        ({"token_mixer": "mlp_t"}, "seq_len: got 0"),
        ({"token_mixer": "mlp_t", "seq_len": 9}, "seq_intermediate_size: got 0"),
    ],
)
def test_bad_block(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 32, "num_heads": 4}
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        BlockSpec(**{**good, **change})
    assert "\n" not in str(caught.value)


INTEGERS = (
    "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "seq_len", "seq_intermediate_size",
    "conv_kernel",
)  # fmt: skip


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", ["64", 64.0, True, None])
def test_a_block_of_other_than_integers(name: str, value: Any) -> None:
    good: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 32, "num_heads": 4}
    kind = type(value).__name__
    with pytest.raises(TypeError, match=rf"^{name}: got {value!r} \({kind}\), accepted is int$"):
        BlockSpec(**good | {name: value})


def test_an_epsilon_that_is_no_number() -> None:
    with pytest.raises(TypeError, match=r"^rms_norm_eps: got '1e-5' \(str\), accepted is float$"):
        BlockSpec(64, 32, num_heads=4, rms_norm_eps="1e-5")  # type: ignore[arg-type]
    assert BlockSpec(64, 32, num_heads=4, rms_norm_eps=1).rms_norm_eps == 1


@pytest.mark.parametrize("layers", [0, -1, True, 1.0])
def test_bad_net(layers: int) -> None:
    with pytest.raises(ValueError, match=r"^num_layers: got .*, accepted are integers >= 1$"):
        NetSpec(BlockSpec(64, 32, num_heads=4), layers)


def test_networks_that_do_not_fit() -> None:
    net = NetSpec(BlockSpec(64, 32, num_heads=4), 1)
    wider = NetSpec(BlockSpec(128, 32, num_heads=8), 1)
    heads = NetSpec(BlockSpec(64, 32, num_heads=2), 1)
    program = RecursionProgram.hrm(1, 1)
    with pytest.raises(ValueError, match=r"^nets: got 1, accepted are 2 \(f_H, f_L\)$"):
        Problem(program, (net,))
    with pytest.raises(ValueError, match=r"^nets: got hidden_size 64, 128, accepted are networks that share one"):
        Problem(program, (net, wider))
    with pytest.raises(ValueError, match=r"^nets: got head_dim 16, 32, accepted"):
        Problem(program, (net, heads))
