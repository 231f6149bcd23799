"""Structures that accelerate() leaves alone, and what it says about them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import trmfast
from dropin_cases import blocks, make, refused
from dropin_models.layers import CastedLinear, SwiGLU

pytestmark = pytest.mark.usefixtures("one_thread")

Change = Callable[[Any], None]


def affine_norm(model: Any) -> None:
    for block in blocks(model):
        block.norm1 = nn.RMSNorm(32, eps=1e-5)


def bias(model: Any) -> None:
    blocks(model)[1].mlp.down_proj = CastedLinear(256, 32, bias=True)


def dropout(model: Any) -> None:
    blocks(model)[0].mlp.dropout = nn.Dropout(0.1)


def normalised_query_with_weight(model: Any) -> None:
    blocks(model)[0].self_attn.q_norm = nn.RMSNorm(16)


def adapter(model: Any) -> None:
    blocks(model)[0].mlp.down_proj.lora_A = nn.Linear(256, 4)


def hook(model: Any) -> None:
    blocks(model)[1].self_attn.o_proj.register_forward_hook(lambda *_: None)


def hook_on_the_network(model: Any) -> None:
    model.inner.L_level.register_forward_pre_hook(lambda *_: None)


def backward_hook(model: Any) -> None:
    blocks(model)[0].register_full_backward_hook(lambda *_: None)


def mixed_dtypes(model: Any) -> None:
    blocks(model)[1].mlp.to(torch.bfloat16)


def other_eps(model: Any) -> None:
    blocks(model)[1].norm_eps = 1e-6


def other_width(model: Any) -> None:
    blocks(model)[1].mlp = SwiGLU(32, 20)


def no_eps(model: Any) -> None:
    for block in blocks(model):
        del block.norm_eps


def tied_blocks(model: Any) -> None:
    blocks(model)[1] = blocks(model)[0]


def tied_weights(model: Any) -> None:
    blocks(model)[1].mlp.down_proj.weight = blocks(model)[0].mlp.down_proj.weight


def replaced_forward(model: Any) -> None:
    model.inner.forward = lambda carry, batch: type(model.inner).forward(model.inner, carry, batch)


def no_cycles(model: Any) -> None:
    model.config.L_cycles = 0


def other_buffers(model: Any) -> None:
    model.inner.register_buffer("M_init", torch.zeros(32))


def lost_network(model: Any) -> None:
    del model.inner.L_level


def experts(model: Any) -> None:
    blocks(model)[0].mlp = nn.ModuleList([SwiGLU(32, 1), SwiGLU(32, 1)])


STRUCTURE: list[tuple[Change, str]] = [
    (affine_norm, "L_level.layers.0.norm1: got an extra RMSNorm with weight, accepted are mlp, self_attn"),
    (bias, "L_level.layers.1.mlp.down_proj.bias: got a bias [32], accepted is none"),
    (dropout, "L_level.layers.0.mlp.dropout: got dropout 0.1, accepted is 0"),
    (normalised_query_with_weight, "L_level.layers.0.self_attn.q_norm: got an extra RMSNorm with weight"),
    (adapter, "L_level.layers.0.mlp.down_proj.lora_A: got an extra part"),
    (hook, "L_level.layers.1.self_attn.o_proj: has forward hooks, which a fused recursion would not call"),
    (hook_on_the_network, "L_level: has forward pre hooks"),
    (backward_hook, "L_level.layers.0: has backward hooks"),
    (mixed_dtypes, "mixed dtypes: got float32 (L_level.layers.0.self_attn.qkv_proj.weight), bfloat16 (L_level"),
    (other_eps, "L_level.layers.1: got rms_norm_eps 1e-06, accepted is 1e-05, that of the first block"),
    (other_width, "L_level.layers.1: got intermediate_size 512, accepted is 256"),
    (no_eps, "L_level.layers.0.norm_eps: got None"),
    (tied_blocks, "L_level.layers.1: the same module as L_level.layers.0"),
    (
        tied_weights,
        "L_level.layers.1.mlp.down_proj.weight: the same parameter as L_level.layers.0.mlp.down_proj.weight",
    ),
    (replaced_forward, "forward: replaced on the instance"),
    (no_cycles, "config.L_cycles: got 0, accepted are integers >= 1"),
    (other_buffers, "got networks L_level and buffers H_init, L_init, M_init, accepted are TRM: L_level and H_init"),
    (lost_network, "no module has lm_head, q_head and networks under one of the names L_level"),
    (experts, "L_level.layers.0.mlp.down_proj: got nothing, accepted is a projection"),
]


@pytest.mark.parametrize("change, line", STRUCTURE, ids=[change.__name__ for change, _ in STRUCTURE])
def test_structure(change: Change, line: str) -> None:
    model = make("trm")
    change(model)
    assert any(difference.startswith(line) for difference in refused(model)), refused(model)


def test_every_difference_is_listed() -> None:
    model = make("trm")
    for change in (bias, dropout, hook, mixed_dtypes):
        change(model)
    found = refused(model)
    assert [line.split(":")[0] for line in found] == [
        "L_level.layers.0.mlp.dropout",
        "L_level.layers.1.mlp.down_proj.bias",
        "L_level.layers.1.self_attn.o_proj",
        "mixed dtypes",
    ]


@pytest.mark.parametrize("name", ["hrm", "hrm-mlp_t"])
def test_tied_nets(name: str) -> None:
    model = make(name, L_layers=2, H_layers=2)
    model.inner.H_level = model.inner.L_level
    assert refused(model)[0] == "L_level: the same module as H_level, accepted are modules of their own"


def test_urm_with_a_convolution_in_another_dtype() -> None:
    model = make("urm", forward_dtype="float32")
    model.inner.layers[0].mlp.dwconv.to(torch.bfloat16)
    differences = refused(model)
    assert differences[0].startswith("layers.0.mlp.dwconv.weight: got bfloat16, accepted is float32, the forward dtype")


@pytest.mark.parametrize(
    "name, value, line",
    [
        ("padding", (0,), "got (0,), accepted is (1,)"),
        ("padding_mode", "circular", "got 'circular', accepted is 'zeros'"),
        ("dilation", (2,), "got (2,), accepted is (1,)"),
        ("bias", None, "got None, accepted is a bias"),
    ],
)
def test_urm_with_another_convolution(name: str, value: Any, line: str) -> None:
    model = make("urm")
    setattr(model.inner.layers[1].mlp.dwconv, name, value)
    assert refused(model) == (f"layers.1.mlp.dwconv.{name}: {line}",)


def test_convolution_before_the_gate() -> None:
    """nano-trm's ConvSwiGLU."""
    model = make("nano")
    for block in model.lenet.layers:
        block.mlp.dwconv = nn.Conv1d(512, 512, 3, padding=1, groups=512)
    assert refused(model)[0] == ("lenet.layers.0.mlp.dwconv.weight: got shape [512, 1, 3], accepted is [256, 1, 3]")


def test_a_compiled_method_of_nano() -> None:
    model = make("nano")
    model.inner_forward = torch.compile(model.inner_forward, backend="eager")
    assert refused(model) == ("inner_forward: replaced on the instance, accepted is the method of its class",)


def test_models_that_hold_none_or_several() -> None:
    assert refused(nn.Linear(2, 2))[0].startswith("no module has lm_head, q_head and networks under one of the names")
    pair = nn.ModuleList([make("trm"), make("hrm")])
    several = ("several modules hold a recursion: 0.inner, 1.inner; accelerate them one at a time",)
    assert refused(pair) == several
    trmfast.accelerate(pair[0])
    assert refused(pair) == several
    trmfast.accelerate(pair[1])
    assert trmfast.accelerate(pair) is pair
    for own, name in ((trmfast.TRM, "trm"), (trmfast.URM, "urm")):
        assert refused(own(vars(make(name).config))) == ("inner: runs trmfast's recursion already",)
    model = make("trm")
    model.inner.L_level.layers = nn.ModuleList()
    assert refused(model) == ("L_level: got Level without layers, accepted is a list of blocks",)
    model = make("trm_hier6")
    model.config.L_cycles = 7
    assert refused(model) == ("L_cycles: got 7, accepted are 1 to 6 for the six states of hier6",)
