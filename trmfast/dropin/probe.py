"""Behaviour: what the model's own code computes on random numbers, against the reference and the fused step.

Structure alone cannot tell SiLU from another activation, a normalised query, or a loop that skips an update.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from trmfast import reference
from trmfast.dropin.double import BLOCKS, CYCLES, SHORT, Double, device_of
from trmfast.dropin.structure import Found, blocks_of, get
from trmfast.dropin.swap import SWAP, Swap, forwards_of, fused_step
from trmfast.spec import BlockSpec

__all__ = ["differences"]

# Largest difference relative to the largest value, of a block and of a step.  In float64, published norms still round
# to float32: at published sizes that puts a block off by 1e-6 and a step by 2e-4, most of all in gradients.
# Float32 on GPUs may be TF32.
BLOCK = {torch.float64: 1e-4, torch.float32: 5e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
STEP = {torch.float64: 1e-2, torch.float32: 1e-2, torch.bfloat16: 0.2, torch.float16: 0.2}
LONG = 1024  # most positions over which attention is compared

ATTENTION = "softmax attention over sqrt(head_dim) with rotate-half RoPE and nothing normalised"
SWIGLU = "down(silu(gate) * up)"
CONV_SWIGLU = "down(silu(conv(silu(gate) * up)))"
BLOCK_RULE = "h = norm(h + mixer(h)) twice, with RMSNorm without weight and norm_eps"


def differences(found: Found) -> list[str]:
    """Differences of the model's blocks and loop from the reference, one line each; empty if none.

    The comparison runs in float64 or, where the model's kernels do not take that, in float32 or the model's own dtype.
    """
    with _quiet(device_of(found.inner)):
        for dtype in dict.fromkeys((torch.float64, torch.float32, found.dtype)):
            try:
                double = _own("the model's code", lambda dtype=dtype: Double(found, dtype))  # type: ignore[misc]
                return _block_differences(double) or _step_differences(double)
            except _OwnCodeError as error:
                failure = error
        return [str(failure)]


class _OwnCodeError(Exception):
    """The model's own code raised on the double."""


def _own(name: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # a model whose code raises is left alone
        first = str(error).strip().splitlines()
        raise _OwnCodeError(f"{name}: raised {type(error).__name__}: {first[0] if first else ''}") from error


@contextmanager
def _quiet(device: torch.device) -> Iterator[None]:
    """Leaves no trace: restores generators, switches the caller's modes off, compiles nothing."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled, and the import takes a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(device)
        yield


def _compare(
    double: Double, name: str, got: Any, wanted: Tensor, what: str, accepted: Mapping[torch.dtype, float] = BLOCK
) -> list[str]:
    if not isinstance(got, Tensor) or got.shape != wanted.shape:
        shape = list(got.shape) if isinstance(got, Tensor) else type(got).__name__
        return [f"{name}: gives {shape}, accepted is {list(wanted.shape)}, {what}"]
    scale = wanted.abs().max().item()
    error = (got.double() - wanted.double()).abs().max().item()
    if error <= accepted[double.dtype] * scale:  # False for NaN
        return []
    return [f"{name}: off by {error:.2g} at values up to {scale:.2g}, accepted is {what}"]


# ---------------------------------------------------------------- blocks


def _block_differences(double: Double) -> list[str]:
    lines = []
    with torch.no_grad():
        for net, spec in zip(double.family.nets, double.found.nets, strict=True):
            prefix = net if net == "layers" else f"{net}.layers"
            for i, block in enumerate(blocks_of(double.inner, net)):
                for training in (True, False):  # training mode reveals dropout of any implementation
                    found = _mixers(double, block.train(training), spec.block, f"{prefix}.{i}")
                    found = found or _whole_block(double, block, spec.block, f"{prefix}.{i}")
                    if found:
                        lines += found
                        break
    return lines


def _mixers(double: Double, block: Any, spec: BlockSpec, path: str) -> list[str]:
    """Token mixer and channel mixer, each alone."""
    weights = [cast(Tensor, get(block, name)) for name in spec.weight_shapes]
    lines = []
    if spec.token_mixer == "attention":
        cos_sin = _tables(double, spec, LONG)
        cos, sin = cos_sin or (None, None)
        h = double.random(1, SHORT if cos is None else len(cos), spec.hidden_size)
        got = _own(f"{path}.self_attn", lambda: block.self_attn(cos_sin=cos_sin, hidden_states=h))
        wanted = reference.attention(spec, h, weights[0], weights[1], cos, sin)
        lines += _compare(double, f"{path}.self_attn", got, wanted, ATTENTION)
    else:
        t = double.random(double.rows, spec.hidden_size, spec.seq_len)
        got = _own(f"{path}.mlp_t", lambda: block.mlp_t(t))
        lines += _compare(double, f"{path}.mlp_t", got, reference.swiglu(t, weights[0], weights[1]), SWIGLU)
    h = double.random(double.rows, SHORT, spec.hidden_size)
    got = _own(f"{path}.mlp", lambda: block.mlp(h))
    mix, what = (reference.swiglu, SWIGLU) if spec.channel_mixer == "swiglu" else (reference.conv_swiglu, CONV_SWIGLU)
    return lines + _compare(double, f"{path}.mlp", got, mix(h, *weights[2:]), what)


def _whole_block(double: Double, block: Any, spec: BlockSpec, path: str) -> list[str]:
    """Residuals and norms.  An epsilon of 0.25 shows that both norms add ``norm_eps``, and to what."""
    cos_sin = _tables(double, spec, SHORT) if spec.token_mixer == "attention" else None
    cos, sin = cos_sin or (None, None)
    length = spec.seq_len if spec.token_mixer == "mlp_t" else SHORT if cos is None else len(cos)
    weights = [cast(Tensor, get(block, name)) for name in spec.weight_shapes]
    lines: list[str] = []
    for eps, scale in ((0.25, 1.0), (spec.rms_norm_eps, 1.0), (spec.rms_norm_eps, math.sqrt(spec.rms_norm_eps))):
        h = double.random(double.rows, length, spec.hidden_size, scale=scale)
        block.norm_eps = eps
        got = _own(path, lambda h=h: block(cos_sin=cos_sin, hidden_states=h))  # type: ignore[misc]
        block.norm_eps = spec.rms_norm_eps
        wanted = reference.run_block(replace(spec, rms_norm_eps=eps), h, weights, cos, sin)
        lines = lines or _compare(double, path, got, wanted, BLOCK_RULE)
    return lines


def _tables(double: Double, spec: BlockSpec, most: int) -> tuple[Tensor, Tensor] | None:
    """The first rows of the model's RoPE tables."""
    tables = _own(double.family.rope, double.tables)
    if tables is None:
        return None
    shapes = [list(table.shape) for table in tables]
    if len(shapes) != 2 or any(len(shape) != 2 or shape[1] != spec.head_dim for shape in shapes):
        raise _OwnCodeError(
            f"{double.family.rope}: gives shapes {shapes}, accepted are two tables [L, {spec.head_dim}]"
        )
    return tables[0][:most], tables[1][:most]


# ---------------------------------------------------------------- the step


def _step_differences(double: Double) -> list[str]:
    """The model's own step against the fused one: states, heads and, in training, every gradient."""
    found, method = double.found, double.family.method
    own_step = cast(Callable[..., Any], getattr(type(found.inner), method))
    _own(method, double.shorten)
    carry, batch = _own(method, double.example)
    nets = tuple(replace(net, num_layers=min(net.num_layers, BLOCKS)) for net in found.nets)
    double.inner.__dict__[SWAP] = Swap(found.family, nets, "reference", forwards_of(double.inner, double.family))
    what = f"the {found.family} loop, here {CYCLES} cycles of {CYCLES} updates"
    for training in (False, True):
        double.inner.train(training)
        own = _own(method, lambda: _run(double, own_step, carry, batch))
        try:
            fused = _run(double, fused_step, carry, batch)
        except Exception as error:  # a fork has changed the code around the loop
            return [f"{method}: {type(error).__name__} in {what}: {error}"]
        lines = [
            line
            for name, value in own.items()
            for line in _compare(double, f"{method}: {name}", value, fused[name], what, STEP)
        ]
        if lines:
            return lines
    return []


def _run(double: Double, step: Callable[..., Any], carry: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of a step by name, and in training the gradients of everything that takes one."""
    inner = double.inner
    new, logits, q = step(inner, copy.copy(carry), dict(batch))
    q = torch.stack(q, -1) if isinstance(q, tuple) else q
    results = {f"new {name}": getattr(new, name) for name in double.family.states}
    attached = torch.tensor([float(state.requires_grad) for state in results.values()])
    results |= {"gradient through the carry": attached, "logits": logits, "q": q}
    if inner.training:
        leaves = {name: p for name, p in (*inner.named_parameters(), *inner.named_buffers()) if p.requires_grad}
        loss = torch.zeros((), dtype=torch.float64)
        for out in (logits, q):
            generator = torch.Generator().manual_seed(1)
            loss = (
                loss + (out.double() * torch.randn(out.shape, generator=generator, device="cpu").to(out.device)).sum()
            )
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        results |= {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: value.detach() for name, value in results.items()}
