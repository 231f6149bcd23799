"""Input that is wrong, odd, or poisoned: one-line errors before any work, and isolation between sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trmfast import BlockSpec, NetSpec, RecursionProgram, Update, recursion
from trmfast.backends import BACKENDS
from trmfast.cases import Case, make_case, make_inputs, rope_tables

CASE = make_case("small", L_cycles=1, window="all", length=6, hidden_size=32, num_layers=1, intermediate_size=16)
MIXER = make_case(
    "mixer", L_cycles=1, length=6, hidden_size=32, num_layers=1, intermediate_size=16, token_mixer="mlp_t"
)


def good(case: Case = CASE, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    inputs = make_inputs(case, dtype)
    return {
        "program": case.problem.program,
        "nets": case.problem.nets,
        "states": list(inputs.states),
        "x": inputs.x,
        "weights": list(inputs.weights),
        "cos": inputs.cos,
        "sin": inputs.sin,
    }


def change(name: str, make: Callable[[Any], Any], index: int | None = None) -> Callable[[dict[str, Any]], None]:
    """A change of one argument, or of one element of it."""

    def apply(arguments: dict[str, Any]) -> None:
        if index is None:
            arguments[name] = make(arguments[name])
        else:
            arguments[name][index] = make(arguments[name][index])

    return apply


BAD: dict[str, tuple[Callable[[dict[str, Any]], None], type[Exception], str]] = {
    # dtypes
    "integer states": (
        change("states", lambda s: [t.long() for t in s]),
        ValueError,
        r"states\[0\].dtype: got int64, accepted are float32, bfloat16, float16, float64",
    ),
    "complex states": (
        change("states", lambda s: [t.cfloat() for t in s]),
        ValueError,
        r"states\[0\].dtype: got complex64",
    ),
    "states of two dtypes": (
        change("states", torch.Tensor.double, 1),
        ValueError,
        r"states\[1\].dtype: got float64, accepted is float32, that of states\[0\]",
    ),
    "x of another dtype": (
        change("x", torch.Tensor.bfloat16),
        ValueError,
        "x.dtype: got bfloat16, accepted is float32",
    ),
    "integer weight": (
        change("weights", torch.Tensor.int, 2),
        ValueError,
        r"weights\[2\] \(f.layers.0.mlp.gate_up_proj.weight\).dtype: got int32, accepted are float dtypes",
    ),
    "integer table": (change("cos", torch.Tensor.int), ValueError, "cos.dtype: got int32, accepted are float dtypes"),
    # devices
    "states of two devices": (
        change("states", lambda t: t.to("meta"), 1),
        ValueError,
        r"states\[1\].device: got meta, accepted is cpu, that of states\[0\]",
    ),
    "x elsewhere": (change("x", lambda t: t.to("meta")), ValueError, "x.device: got meta, accepted is cpu"),
    "weight elsewhere": (
        change("weights", lambda t: t.to("meta"), 0),
        ValueError,
        r"weights\[0\] \(f.layers.0.self_attn.qkv_proj.weight\).device: got meta, accepted is cpu",
    ),
    "table elsewhere": (change("sin", lambda t: t.to("meta")), ValueError, "sin.device: got meta, accepted is cpu"),
    # sizes
    "batch": (
        change("states", lambda t: t[:1], 1),
        ValueError,
        r"states\[1\].shape: got \[1, 6, 32\], accepted is \[2, 6, 32\]",
    ),
    "batch of x": (change("x", lambda t: t[:1]), ValueError, r"x.shape: got \[1, 6, 32\], accepted is \[2, 6, 32\]"),
    "length": (change("x", lambda t: t[:, :5]), ValueError, r"x.shape: got \[2, 5, 32\], accepted is \[2, 6, 32\]"),
    "width": (
        change("states", lambda s: [t[..., :31] for t in s]),
        ValueError,
        r"states\[0\].shape: got \[2, 6, 31\], accepted are \[B, L, 32\]",
    ),
    "two axes": (
        change("states", lambda s: [t[0] for t in s]),
        ValueError,
        r"states\[0\].shape: got \[6, 32\], accepted are \[B, L, 32\]",
    ),
    "weight shape": (
        change("weights", lambda t: t.T, 0),
        ValueError,
        r"weights\[0\] \(f.layers.0.self_attn.qkv_proj.weight\).shape: got \[32, 96\], accepted is \[96, 32\]",
    ),
    # RoPE tables
    "short table": (
        change("cos", lambda t: t[:5]),
        ValueError,
        r"cos.shape: got \[5, 16\], accepted are \[at least 6, 16\]",
    ),
    "narrow table": (
        change("sin", lambda t: t[:, :8]),
        ValueError,
        r"sin.shape: got \[6, 8\], accepted are \[at least 6, 16\]",
    ),
    "one table": (
        change("sin", lambda _: None),
        ValueError,
        "sin: got None with cos given, accepted are both tables or neither",
    ),
    "trained table": (
        change("cos", lambda t: t.requires_grad_()),
        ValueError,
        "cos.requires_grad: got True, accepted is False",
    ),
    # counts
    "state count": (change("states", lambda s: s[:1]), ValueError, r"states: got 1, accepted are 2 \(z_H, z_L\)"),
    "no states": (change("states", lambda _: []), ValueError, r"states: got 0, accepted are 2 \(z_H, z_L\)"),
    "weight count": (change("weights", lambda w: w[:-1]), ValueError, "weights: got 3 tensors, accepted are 4"),
    "net count": (change("nets", lambda n: n * 2), ValueError, r"nets: got 2, accepted are 1 \(f\)"),
    "no x": (change("x", lambda _: None), ValueError, r"x: got None, accepted are tensors of shape \[2, 6, 32\]"),
    # backend
    "unknown backend": (
        lambda arguments: arguments.update(backend="fast"),
        ValueError,
        f"backend: got 'fast', accepted are auto, {', '.join(BACKENDS)}",
    ),
    # Python types
    "program": (change("program", str), TypeError, "program: got str, accepted are RecursionProgram"),
    "nets": (change("nets", lambda n: n[0]), TypeError, "nets: got NetSpec, accepted are lists and tuples of NetSpec"),
    "block for net": (
        change("nets", lambda n: (n[0].block,)),
        TypeError,
        r"nets\[0\]: got BlockSpec, accepted are NetSpec",
    ),
    "one tensor for states": (
        change("states", lambda s: torch.stack(s)),
        TypeError,
        "states: got Tensor, accepted are lists and tuples of Tensor",
    ),
    "array for state": (
        change("states", lambda t: t.numpy(), 0),
        TypeError,
        r"states\[0\]: got ndarray, accepted are Tensor",
    ),
    "array for x": (change("x", lambda t: t.numpy()), TypeError, "x: got ndarray, accepted are Tensor"),
    "None for weight": (
        change("weights", lambda _: None, 1),
        TypeError,
        r"weights\[1\]: got NoneType, accepted are Tensor",
    ),
    "number for table": (change("cos", lambda _: 1.0), TypeError, "cos: got float, accepted are Tensor and None"),
    "number for backend": (
        lambda arguments: arguments.update(backend=0),
        TypeError,
        "backend: got int, accepted are str",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    apply, kind, message = BAD[name]
    arguments = good()
    apply(arguments)
    for backend in BACKENDS.values():

        def refuse(*_: Any) -> Any:
            raise AssertionError("work was done")

        monkeypatch.setattr(backend, "forward", refuse)
    with pytest.raises(kind, match=f"^{message}") as caught:
        recursion(**arguments)
    assert "\n" not in str(caught.value)


def test_requires_grad_on_an_integer_tensor() -> None:
    """PyTorch refuses to set it on one; an integer tensor that came from somewhere is refused for its dtype."""
    with pytest.raises(RuntimeError, match="floating point"):
        torch.zeros(2, dtype=torch.int32).requires_grad_()
    arguments = good()
    arguments["weights"] = [w.requires_grad_() for w in arguments["weights"]]
    arguments["x"] = arguments["x"].long()
    with pytest.raises(ValueError, match=r"^x.dtype: got int64, accepted is float32"):
        recursion(**arguments)


def test_length_that_the_mixer_was_not_made_for() -> None:
    arguments = good(MIXER)
    arguments["states"] = [t[:, :5] for t in arguments["states"]]
    arguments["x"] = arguments["x"][:, :5]
    with pytest.raises(
        ValueError, match=r"^states\[0\].shape: got length 5, accepted is 6, the seq_len of the mlp_t weights$"
    ):
        recursion(**arguments)


def test_odd_head_dim_cannot_rotate() -> None:
    case = make_case("odd", hidden_size=9, num_heads=3, intermediate_size=4, length=3, rope=False)
    arguments = good(case)
    recursion(**arguments, backend="reference")
    arguments["cos"], arguments["sin"] = (table[:, :3] for table in rope_tables(3, 4))
    with pytest.raises(ValueError, match=r"^cos: got a table for head_dim 3, accepted are even head_dims$"):
        recursion(**arguments)


def test_construction_refuses_what_could_not_run() -> None:
    """Head counts that do not divide, states that do not exist, no updates; more in test_program and test_spec."""
    with pytest.raises(ValueError, match=r"^num_heads: got 5, accepted are the divisors of hidden_size 32$"):
        BlockSpec(32, 16, num_heads=5)
    with pytest.raises(ValueError, match=r"^updates\[0\].sources: got 2, accepted are 0 to 1 \(a, b\)$"):
        RecursionProgram(("a", "b"), ("f",), (Update(0, (0, 2), False, 0, True),), 1)
    with pytest.raises(ValueError, match=r"^updates: got none, a program needs at least one update$"):
        RecursionProgram(("a",), ("f",), (), 1)
    with pytest.raises(ValueError, match=r"^num_layers: got 0"):
        NetSpec(BlockSpec(32, 16, num_heads=4), 0)


# ---------------------------------------------------------------- odd, but right


@pytest.mark.parametrize("case", [CASE, MIXER], ids=str)
def test_batch_of_none(case: Case, backend: str) -> None:
    arguments = good(case)
    arguments["states"] = [t[:0].requires_grad_() for t in arguments["states"]]
    arguments["x"] = arguments["x"][:0].requires_grad_()
    arguments["weights"] = [w.requires_grad_() for w in arguments["weights"]]
    outputs = recursion(**arguments, backend=backend)
    assert [list(out.shape) for out in outputs] == [[0, 6, 32]] * 2
    torch.cat(outputs).sum().backward()
    for weight in arguments["weights"]:
        assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert arguments["x"].grad.shape == (0, 6, 32)


def test_sequence_of_none() -> None:
    arguments = good()
    arguments["states"] = [t[:, :0] for t in arguments["states"]]
    arguments["x"] = arguments["x"][:, :0]
    assert [list(out.shape) for out in recursion(**arguments)] == [[2, 0, 32]] * 2


def results(arguments: dict[str, Any], backend: str, grad_states: list[Tensor] | None = None) -> list[Tensor]:
    """Outputs and gradients of states, x and weights."""
    leaves = [*arguments["states"], arguments["x"], *arguments["weights"]]
    leaves = [t if t.requires_grad else t.requires_grad_() for t in leaves]
    outputs = recursion(**arguments, backend=backend)
    grads = grad_states or [torch.ones_like(out) for out in outputs]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, grads)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", [CASE, MIXER], ids=str)
def test_nan_stays_in_its_sequence(case: Case, value: float, backend: str) -> None:
    for where in ("states", "x"):
        clean, poisoned = good(case), good(case)
        (poisoned["states"][1] if where == "states" else poisoned["x"])[1, 2, 3] = value
        before, after = recursion(**clean, backend=backend), recursion(**poisoned, backend=backend)
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a[0], b[0])
            assert torch.isnan(b[1]).any()


def test_nan_in_a_gradient_stays_in_its_sequence(backend: str) -> None:
    clean, poisoned = ([torch.ones(2, 6, 32), torch.ones(2, 6, 32)] for _ in range(2))
    poisoned[0][1, 2, 3] = float("nan")
    before, after = results(good(), backend, clean), results(good(), backend, poisoned)
    for a, b in zip(before[2:5], after[2:5], strict=True):  # of the two states and of x
        assert torch.equal(a[0], b[0])
        assert torch.isnan(b[1]).any()
    # The weights are shared by the whole batch.
    assert torch.isnan(after[-1]).any()


def strided(tensor: Tensor, how: str) -> Tensor:
    """The same values in another layout."""
    if how == "transposed":
        return tensor.detach().transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "every other":
        wide = tensor.detach().repeat_interleave(2, dim=-1)
        return wide[..., ::2]
    padded = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan"))
    padded[..., 1:-2] = tensor.detach()
    return padded[..., 1:-2]


@pytest.mark.parametrize("how", ["transposed", "every other", "offset"])
@pytest.mark.parametrize("case", [CASE, MIXER], ids=str)
def test_strides(case: Case, how: str, backend: str) -> None:
    plain, odd = good(case), good(case)
    for name in ("states", "weights"):
        odd[name] = [strided(t, how) for t in odd[name]]
    odd["x"] = strided(odd["x"], how)
    if odd["cos"] is not None:
        odd["cos"], odd["sin"] = strided(odd["cos"], how), strided(odd["sin"], how)
    assert not odd["x"].is_contiguous()
    grads = [t.detach().clone() for t in plain["states"]]
    expected = results(plain, backend, grads)
    found = results(odd, backend, [strided(g, how) for g in grads])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_expanded_states(backend: str) -> None:
    """Initial states are one vector expanded over batch and length; a sum's gradient is one number expanded."""
    first = torch.randn(32, generator=torch.Generator().manual_seed(1))
    plain, odd = good(), good()
    plain["states"] = [first.expand(2, 6, 32).clone() for _ in range(2)]
    odd["states"] = [first.expand(2, 6, 32) for _ in range(2)]
    assert odd["states"][0].stride() == (0, 0, 1)
    grad = torch.ones(()).expand(2, 6, 32)
    assert grad.stride() == (0, 0, 0)
    expected = results(plain, backend, [grad.clone(), grad.clone()])
    for a, b in zip(results(odd, backend, [grad, grad]), expected, strict=True):
        assert torch.equal(a, b)


def test_one_tensor_for_every_state(backend: str) -> None:
    """The same tensor object for several arguments."""
    shared = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
    same, apart = good(), good()
    same["states"], same["x"] = [shared, shared], shared
    apart["states"], apart["x"] = [shared.clone(), shared.clone()], shared.clone()
    for a, b in zip(recursion(**same, backend=backend), recursion(**apart, backend=backend), strict=True):
        assert torch.equal(a, b)


def test_tables_are_ignored_where_nothing_attends(backend: str) -> None:
    arguments = good(MIXER)
    expected = recursion(**arguments, backend=backend)
    arguments["cos"], arguments["sin"] = torch.zeros(1, 7), torch.zeros(1, 7)
    for a, b in zip(recursion(**arguments, backend=backend), expected, strict=True):
        assert torch.equal(a, b)


def test_x_that_nobody_injects(backend: str) -> None:
    program = RecursionProgram(("z",), ("f",), (Update(0, (0,), False, 0, True),), 1)
    arguments = {**good(), "program": program}
    arguments["states"] = arguments["states"][:1]
    x = arguments["x"].requires_grad_()
    weights = [w.requires_grad_() for w in arguments["weights"]]
    (out,) = recursion(**arguments, backend=backend)
    out.sum().backward()
    assert x.grad is None or not x.grad.any()
    assert all(w.grad is not None for w in weights)
    (same,) = recursion(**{**arguments, "x": None}, backend=backend)
    assert torch.equal(out, same)
