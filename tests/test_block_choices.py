"""Every choice of a block: the reference against code written independently of it, gradients, and who refuses what."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from naive_block import DRAWN, LENGTH, OPTIONS, naive_net, sees, segments_of, spec_of
from trmfast import BlockSpec, NetSpec, Problem, RecursionProgram, recursion
from trmfast.backends import BACKENDS
from trmfast.cases import CHOICES, Case, make_case, make_inputs, rope_tables
from trmfast.flops import block_flops
from trmfast.nn import Net, Recursion, RotaryEmbedding
from trmfast.problem import unsupported
from trmfast.reference import inject, run_block, run_net, run_program
from trmfast.spec import SIZES

pytestmark = pytest.mark.usefixtures("one_thread")


def name_of(options: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())


def weights_of(spec: NetSpec) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _, shape in spec.weight_shapes]


def tables(block: BlockSpec) -> tuple[Tensor, Tensor]:
    """In float64, as the naive rotation has them."""
    angles = torch.outer(torch.arange(LENGTH).double(), 1e4 ** -(torch.arange(0, block.head_dim, 2) / block.head_dim))
    angles = angles.repeat(1, 2) if block.rotation == "half" else angles.repeat_interleave(2, 1)
    return angles.cos(), angles.sin()


def enter(spec: NetSpec, total: Tensor, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return total + x if spec.injection == "add" else inject(spec, total, x, weights[-1])


@pytest.mark.parametrize("options", DRAWN, ids=name_of)
def test_reference(options: dict[str, Any]) -> None:
    spec = spec_of(options)
    weights = weights_of(spec)
    total, x = torch.randn(2, 1, LENGTH, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = naive_net(total[0], x[0], spec, weights)[None]
    found = run_net(
        spec, enter(spec, total, x, weights), weights, *tables(spec.block), segments=segments_of(spec.block)
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", DRAWN, ids=name_of)
def test_gradients(options: dict[str, Any]) -> None:
    spec = spec_of(options)
    weights = [w.requires_grad_() for w in weights_of(spec)]
    drawn = torch.randn(2, 1, LENGTH, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    total, x = (t.requires_grad_() for t in drawn.unbind())
    cos, sin = tables(spec.block)

    def net(total: Tensor, x: Tensor, *weights: Tensor) -> Tensor:
        entered = enter(spec, total, x, weights)
        return run_net(spec, entered, weights, cos, sin, segments=segments_of(spec.block))

    torch.autograd.gradcheck(net, (total, x, *weights), fast_mode=True)


@pytest.mark.parametrize("case", CHOICES, ids=str)
def test_the_operator_is_the_reference(case: Case) -> None:
    """Its backward pass recomputes each update from the saved sum; in float64 the gradients are autograd's."""
    inputs = make_inputs(case, torch.float64, weight_scale=0.7)
    problem, results = inputs.problem, []
    for fused in (False, True):
        states = [state.clone().requires_grad_() for state in inputs.states]
        x = None if inputs.x is None else inputs.x.clone().requires_grad_()
        weights = [weight.double().requires_grad_() for weight in inputs.weights]
        tables = inputs.cos, inputs.sin
        if fused:
            out = recursion(
                problem.program, problem.nets, states, x, weights, *tables, "reference", segments=inputs.segments
            )
        else:
            out = run_program(problem, states, x, weights, *tables, segments=inputs.segments)
        leaves = [*states, *weights, *(() if x is None else (x,))]
        pairs = [(o, g) for o, g in zip(out, inputs.grad_states, strict=True) if o.requires_grad]
        roots, grads = zip(*pairs, strict=True)
        found = torch.autograd.grad(roots, leaves, grads, materialize_grads=True)
        results.append([*(o.detach() for o in out), *found])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CHOICES, ids=str)
def test_modules(case: Case) -> None:
    """Parameters are those of the spec; a module's forward and the fused recursion are the same function."""
    spec = case.problem.nets[0]
    net = Net(spec)
    if spec.injection != "add":  # it begins as one and the identity
        torch.nn.init.normal_(net.injection.weight)
    assert [(name, tuple(p.shape)) for name, p in net.named_parameters()] == sorted(
        spec.weight_shapes, key=lambda item: list(dict(net.named_parameters())).index(item[0])
    )
    named = dict(net.named_parameters())
    assert all(weight is named[name] for weight, (name, _) in zip(net.weights(), spec.weight_shapes, strict=True))
    h = torch.randn(2, case.length, case.problem.hidden_size, generator=torch.Generator().manual_seed(0))
    dim = case.problem.rope_dim
    cos_sin = RotaryEmbedding(dim, case.length, 1e4, rotation=spec.block.rotation)() if dim else None
    program = RecursionProgram.looped(1)
    segments = make_inputs(case).segments
    (fused,) = Recursion(program, [net], "reference")([h], cos_sin=cos_sin, segments=segments)
    entered = h if spec.injection == "add" else net.injection(h, None)
    torch.testing.assert_close(net(entered, cos_sin, segments), fused)


def test_bfloat16_rounds_where_the_models_round() -> None:
    """Ouro's block, written in the dtype as its code computes it: float32 inside a norm, weights outside."""
    case = next(case for case in CHOICES if case.name == "ouro")
    block, inputs = case.problem.nets[0].block, make_inputs(case, torch.bfloat16)
    qkv, o, gate_up, down, *norms = (w.bfloat16() for w in inputs.weights[: len(block.weight_shapes)])
    h = inputs.states[0]

    def normed(h: Tensor, i: int) -> Tensor:
        wide = h.float()
        return norms[i] * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + block.rms_norm_eps)).bfloat16()

    heads = (normed(h, 0) @ qkv.T).unflatten(-1, (3, block.num_heads, block.head_dim)).permute(2, 0, 3, 1, 4)
    q, k, v = heads.float()
    cos, sin = (table[: case.length] for table in (inputs.cos, inputs.sin) if table is not None)
    q, k = (t * cos + torch.cat((-t[..., t.shape[-1] // 2 :], t[..., : t.shape[-1] // 2]), -1) * sin for t in (q, k))
    mixed = torch.nn.functional.scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), is_causal=True)
    h1 = h + normed(mixed.transpose(1, 2).flatten(2) @ o.T, 1)
    gate, up = (normed(h1, 2) @ gate_up.T).chunk(2, -1)
    expected = h1 + normed((torch.nn.functional.silu(gate) * up) @ down.T, 3)
    found = run_block(block, h, inputs.weights[: len(block.weight_shapes)], inputs.cos, inputs.sin)
    assert torch.equal(found, expected)


def test_packed_sequences_are_sequences() -> None:
    """A row of two sequences gives what each gives by itself, with tables by position in the sequence."""
    case = make_case("plain", "hrm_text", window="all", batch=1, length=9, causal=True, segments=True, num_layers=1)
    inputs = make_inputs(case, torch.float64)
    cos, sin = (table.double() for table in rope_tables(9, 32))
    weights = [weight.double() for weight in inputs.weights]
    cuts, prefixes = ((0, 4), (4, 9)), (2, 3)
    segments = torch.zeros(1, 9, 2, dtype=torch.int64)
    for (start, end), prefix in zip(cuts, prefixes, strict=True):
        segments[0, start:end] = torch.tensor([start, start + prefix])
    position = torch.cat([torch.arange(end - start) for start, end in cuts])
    program, nets = case.problem.program, case.problem.nets
    tables = cos[position], sin[position]
    packed = recursion(program, nets, inputs.states, None, weights, *tables, "reference", segments=segments)
    for (start, end), prefix in zip(cuts, prefixes, strict=True):
        states = [state[:, start:end] for state in inputs.states]
        alone = torch.tensor([0, prefix]).expand(1, end - start, 2)
        parts = recursion(program, nets, states, None, weights, cos, sin, "reference", segments=alone)
        for whole, part in zip(packed, parts, strict=True):
            torch.testing.assert_close(whole[:, start:end], part)


@pytest.mark.parametrize(
    "row, message",
    [
        ([[0, 1], [0, 1], [1, 3]], "segments[1, 2]: got [1, 3]"),  # no start, and not that of the token before
        ([[1, 1], [1, 1], [1, 1]], "segments[1, 0]: got [1, 1]"),  # the first token starts a sequence
        ([[0, 1], [0, 2], [0, 2]], "segments[1, 1]: got [0, 2]"),  # a prefix that differs within a sequence
        ([[0, 2], [1, 2], [1, 2]], "segments[1, 0]: got [0, 2]"),  # a prefix that is longer than its sequence
        ([[0, 4], [0, 4], [0, 4]], "segments[1, 2]: got [0, 4]"),  # or than the row
        ([[0, 0], [1, 0], [1, 0]], "segments[1, 1]: got [1, 0]"),  # a prefix that ends before it starts
    ],
)
def test_boundaries_that_are_refused(row: list[list[int]], message: str) -> None:
    case = make_case("plain", H_cycles=1, L_cycles=1, length=3, causal=True, segments=True, num_layers=1)
    inputs = make_inputs(case)
    problem = case.problem
    good = [[0, 2], [0, 2], [2, 3]]

    def run(segments: Tensor | None) -> None:
        arguments = (problem.program, problem.nets, inputs.states, inputs.x, inputs.weights)
        recursion(*arguments, backend="reference", segments=segments)

    run(torch.tensor([good, good]))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}, accepted are"):
        run(torch.tensor([good, row]))


def test_simple_gla_refuses_prefixes() -> None:
    """Boundaries with an empty prefix, or one of the first token, are those of the recurrence."""
    case = make_case("gla", H_cycles=1, L_cycles=1, length=4, token_mixer="simple_gla", causal=True, segments=True)
    inputs = make_inputs(case)
    arguments = (case.problem.program, case.problem.nets, inputs.states, inputs.x, inputs.weights)

    def run(row: list[list[int]]) -> tuple[Tensor, ...]:
        return recursion(*arguments, backend="reference", segments=torch.tensor([row, row]))

    empty, one = run([[0, 0], [1, 1], [1, 1], [1, 1]]), run([[0, 1], [1, 2], [1, 2], [1, 2]])
    assert all(torch.equal(a, b) for a, b in zip(empty, one, strict=True))
    message = "segments[0, 1]: got [1, 3], accepted are [1, 1] and [1, 2], simple_gla has no prefixes"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run([[0, 0], [1, 3], [1, 3], [1, 3]])


def test_boundaries_of_another_form_are_refused() -> None:
    inputs = make_inputs(next(case for case in CHOICES if case.name == "segments"))
    plain = make_inputs(make_case("trm"))
    for given, segments, message in (
        (inputs, None, r"^segments: got None, accepted is integers \[2, 11, 2\]$"),
        (plain, torch.zeros(2, 12, 2).int(), "^segments: got a tensor, accepted is None, no network reads them$"),
        (inputs, torch.zeros(2, 11).int(), r"^segments.shape: got \[2, 11\], accepted is \[2, 11, 2\]$"),
        (inputs, torch.zeros(2, 11, 2), "^segments.dtype: got float32, accepted are int32 and int64$"),
    ):
        program, nets = given.problem.program, given.problem.nets
        with pytest.raises(ValueError, match=message):
            recursion(program, nets, given.states, given.x, given.weights, backend="reference", segments=segments)


def test_a_row_of_the_tables_is_an_angle_of_a_token() -> None:
    """Gathered tables rotate by any position: a shifted sequence gives the same scores."""
    case = make_case("plain", H_cycles=1, L_cycles=1, num_layers=1, length=6)
    inputs = make_inputs(case)
    long = rope_tables(20, 32)
    shifted = [table[torch.arange(6) + 7] for table in long]
    plain = [table[:6] for table in long]
    results = [
        run_program(case.problem, inputs.states, inputs.x, inputs.weights, cos, sin) for cos, sin in (plain, shifted)
    ]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- specs


def test_a_key_without_the_newer_options_loads() -> None:
    """As an exported program of an earlier version holds it; and today's key leaves defaults out."""
    old = (
        '[{"hidden_size":64,"intermediate_size":32,"token_mixer":"attention","channel_mixer":"swiglu","num_heads":4,'
        '"num_kv_heads":4,"head_dim":16,"causal":false,"seq_len":0,"seq_intermediate_size":0,"conv_kernel":2,'
        '"rms_norm_eps":1e-05},2]'
    )
    spec = NetSpec(BlockSpec(64, 32, num_heads=4), 2)
    assert NetSpec.from_key(old) == spec
    assert spec.key == '[{"hidden_size":64,"intermediate_size":32,"num_heads":4,"num_kv_heads":4,"head_dim":16},2]'


@pytest.mark.parametrize("options", DRAWN, ids=name_of)
def test_keys(options: dict[str, Any]) -> None:
    spec = spec_of(options)
    assert NetSpec.from_key(spec.key) == spec
    assert len({spec_of(other).key for other in OPTIONS}) == len(OPTIONS)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"norm_placement": "both"},
            "norm_placement: got 'both', accepted are post or pre or sandwich or sandwich_sum",
        ),
        ({"rotation": "full"}, "rotation: got 'full', accepted are half or interleaved"),
        ({"qk_norm": "l2"}, "qk_norm: got 'l2', accepted are none or plain or learned"),
        ({"gate": "token"}, "gate: got 'token', accepted are none or channel or head"),
        ({"segments": True}, "segments: got True, accepted is False unless causal and without attention_window"),
        (
            {"segments": True, "causal": True, "attention_window": 2},
            "segments: got True, accepted is False unless causal and without attention_window",
        ),
        ({"attention_window": -1}, "attention_window: got -1, accepted are integers >= 0"),
        ({"token_mixer": "simple_gla"}, "causal: got False with token_mixer 'simple_gla', accepted is True"),
        (
            {"token_mixer": "simple_gla", "causal": True, "attention_window": 2},
            "attention_window: got 2 with token_mixer 'simple_gla', accepted is 0",
        ),
        (
            {"token_mixer": "simple_gla", "num_kv_heads": 3},
            "num_kv_heads: got 3, accepted are the divisors of num_heads 4",
        ),
    ],
)
def test_values_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        BlockSpec(64, 32, num_heads=4, **change)


@pytest.mark.parametrize(
    "name, value", [("norm_weight", 1), ("qk_bias", None), ("segments", 0), ("attention_window", True)]
)
def test_types_that_are_refused(name: str, value: Any) -> None:
    kind = "int" if name == "attention_window" else "bool"
    with pytest.raises(TypeError, match=rf"^{name}: got {value!r} \({type(value).__name__}\), accepted is {kind}$"):
        BlockSpec(64, 32, num_heads=4, **{name: value})


@pytest.mark.parametrize(
    "name, value, default",
    [
        ("norm_placement", "pre", "post"),
        ("norm_weight", True, False),
        ("rotation", "interleaved", "half"),
        ("qk_norm", "plain", "none"),
        ("qk_bias", True, False),
        ("gate", "head", "none"),
        ("attention_window", 3, 0),
        ("segments", True, False),
    ],
)
def test_options_without_meaning_over_the_sequence(name: str, value: Any, default: Any) -> None:
    message = f"^{name}: got {value!r} with token_mixer 'mlp_t', accepted is {default!r}$"
    with pytest.raises(ValueError, match=message):
        BlockSpec(64, 32, token_mixer="mlp_t", seq_len=9, seq_intermediate_size=8, **{name: value})


def test_networks_that_share_tables_share_the_rotation() -> None:
    half = NetSpec(BlockSpec(64, 32, num_heads=4), 1)
    other = NetSpec(BlockSpec(64, 32, num_heads=4, rotation="interleaved"), 1)
    with pytest.raises(ValueError, match=r"^nets: got rotation half, interleaved, accepted"):
        Problem(RecursionProgram.hrm(1, 1), (half, other))


# ---------------------------------------------------------------- backends


def test_every_field_is_a_size_or_an_option() -> None:
    spec = NetSpec(BlockSpec(8, 6, num_heads=2), 1)
    assert {field.name for field in fields(BlockSpec)} | {"final_norm", "injection"} == set(SIZES) | set(spec.options)


@pytest.mark.parametrize("case", CHOICES, ids=str)
def test_an_option_that_is_not_named_is_refused(case: Case) -> None:
    today = {"token_mixer": ("attention", "mlp_t"), "causal": (False, True)}
    reason = unsupported(case.problem, today)
    assert reason is not None
    assert reason.startswith("it runs networks with ")
    everything = {name: (value,) for net in case.problem.nets for name, (value, _) in net.options.items()}
    assert unsupported(case.problem, everything) is None


@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize("case", CHOICES, ids=str)
def test_gpu_backends_name_what_they_do_not_run(case: Case, name: str) -> None:
    """The reason comes before any question to a device."""
    module = __import__(f"trmfast.backends.{name}", fromlist=["CHOICES"])
    reason = unsupported(case.problem, module.CHOICES)
    if reason is not None:
        device = torch.device("cpu" if name == "triton" else "cuda")
        assert BACKENDS[name].supports(case.problem, device, torch.bfloat16, case.batch, case.length) == reason


def test_flops_of_options() -> None:
    plain = BlockSpec(64, 32, num_heads=4)
    base, length = block_flops(plain, 10), 10
    assert block_flops(replace(plain, channel_mixer="gelu"), length) == base - 2 * length * 64 * 32
    assert block_flops(replace(plain, gate="channel"), length) == base + 2 * length * 64 * 64
    assert block_flops(replace(plain, gate="head"), length) == base + 2 * length * 64 * 4
    causal_flops = block_flops(replace(plain, causal=True), length)
    gla = replace(plain, token_mixer="simple_gla", causal=True)
    assert block_flops(gla, length) == causal_flops + 2 * length * 64 * 4
    for causal in (False, True):
        for window in (1, 3, 10, 99):
            block = replace(plain, attention_window=window, causal=causal)
            seen = sum(sees(block, i, j) for i in range(length) for j in range(length))
            assert block_flops(block, length) - base == 4 * 64 * (seen - length * length)


# ---------------------------------------------------------------- compilers

RICH = make_case(
    "rich", "hrm", H_cycles=1, L_cycles=1, window="all", length=7, hidden_size=16, intermediate_size=24, num_heads=4,
    num_kv_heads=2, num_layers=1, final_norm=True, norm_placement="sandwich", norm_weight=True, qk_norm="learned",
    qk_bias=True, gate="channel", rotation="interleaved", causal=True, attention_window=3, injection="linear",
)  # fmt: skip


def test_compile_and_export() -> None:
    """A network with nearly every option traces whole, by its own forward and as the fused recursion."""
    problem, inputs = RICH.problem, make_inputs(RICH)
    nets = [Net(spec) for spec in problem.nets]
    assert inputs.cos is not None
    assert inputs.sin is not None
    tables = inputs.cos, inputs.sin
    h = inputs.states[0]
    compiled = torch.compile(nets[0], backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(h, tables), nets[0](h, tables))
    module = Recursion(problem.program, nets, backend="reference")
    exported = torch.export.export(module, (inputs.states, inputs.x, tables))
    torch.testing.assert_close(
        exported.module()(inputs.states, inputs.x, tables), module(inputs.states, inputs.x, tables)
    )
    names = [name for name, _ in nets[0].named_parameters()]
    assert {"injection.weight", "norm.weight", "layers.0.norm4.weight", "layers.0.self_attn.qk_bias"} <= set(names)


def test_opcheck() -> None:
    problem, inputs = RICH.problem, make_inputs(RICH)
    keys = problem.program.key, [net.key for net in problem.nets]
    leaves = [w.clone().requires_grad_() for w in inputs.weights]
    arguments = (list(inputs.states), inputs.x, leaves, inputs.cos, inputs.sin, *keys, "reference", True, True)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.trmfast.recursion.default, arguments, test_utils=checks)


@pytest.mark.parametrize("name", ["norm1", "self_attn.q_norm", "mlp.up_proj"])
def test_a_replaced_part_is_noticed(name: str) -> None:
    block = BlockSpec(
        16, 8, num_heads=2, norm_placement="pre", norm_weight=True, qk_norm="learned", channel_mixer="gelu"
    )
    net = Net(NetSpec(block, 1, final_norm=True))
    module = Recursion(RecursionProgram.looped(1), [net], "reference")
    h = [torch.randn(1, 4, 16)]
    module(h)
    parent, _, last = f"layers.0.{name}".rpartition(".")
    setattr(net.get_submodule(parent), last, torch.nn.Identity())
    with pytest.raises(RuntimeError, match=rf"^nets\.0\.layers\.0\.{name}: got Identity, accepted is "):
        module(h)


def test_a_final_norm_is_watched() -> None:
    net = Net(NetSpec(BlockSpec(16, 8, num_heads=2, norm_weight=True), 1, final_norm=True))
    module = Recursion(RecursionProgram.looped(1), [net], "reference")
    module([torch.randn(1, 4, 16)])
    net.norm.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"^nets\.0\.norm: has forward hooks, accepted are none"):
        module([torch.randn(1, 4, 16)])
