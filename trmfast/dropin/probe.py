"""Behaviour: the model's own code is run on random numbers and compared with the reference, on a private double.

Structure alone cannot tell SiLU from another activation, a normalised query, or a loop that skips an update.  The
double shares no tensor with the model: its weights are random, so that weights which are zero hide nothing, and drawn
from a generator of its own.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from trmfast import reference
from trmfast.dropin.families import FAMILIES
from trmfast.dropin.structure import Found, blocks_of
from trmfast.dropin.swap import Plan, fused_step
from trmfast.spec import BlockSpec

__all__ = ["differences"]

# Largest difference relative to the largest value.  Models that cast to float32 on the way stay below 1e-5 in float64.
ACCEPTED = {torch.float64: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05, torch.float32: 1e-3}
ROWS, CYCLES, BLOCKS = 2, 2, 2
SHORT = 12  # positions of a block that attends


def differences(found: Found) -> list[str]:
    """What the model's blocks and loop compute otherwise than the reference, one line each; empty if nothing.

    The comparison runs in float64, or in the model's own dtype where its kernels take no other.
    """
    with _quiet(_device(found.inner)):
        for dtype in dict.fromkeys((torch.float64, found.dtype)):
            try:
                double = _Double(found, dtype)
                return double.block_differences() or double.step_differences()
            except _OwnCodeError as error:
                failure = error
        return [str(failure)]


class _OwnCodeError(Exception):
    """The model's own code raised on the double."""


def _own(name: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # any error of a model's code is a reason to leave the model alone
        first = str(error).strip().splitlines()
        raise _OwnCodeError(f"{name}: raised {type(error).__name__}: {first[0] if first else ''}") from error


@contextmanager
def _quiet(device: torch.device) -> Iterator[None]:
    """Leaves no trace: generators as they were, modes of the caller off, nothing compiled."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(device)
        yield


def _device(inner: nn.Module) -> torch.device:
    device = next(inner.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


class _Double:
    """The inner module with tensors of its own, random weights and few cycles, in one dtype."""

    def __init__(self, found: Found, dtype: torch.dtype) -> None:
        self.found, self.dtype, self.device = found, dtype, _device(found.inner)
        self.family = FAMILIES[found.family]
        self.generator = torch.Generator().manual_seed(0)
        self.inner = self._build()
        self.step = cast(Callable[..., Any], getattr(type(found.inner), self.family.method))

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu") * scale
        return drawn.to(device=self.device, dtype=self.dtype)

    def _build(self) -> Any:
        source = self.found.inner
        memo: dict[int, Any] = {}
        for module in source.modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    scale = math.prod(parameter.shape[1:]) ** -0.5 if parameter.dim() > 1 else 0.5
                    memo[id(parameter)] = nn.Parameter(self.random(*parameter.shape, scale=scale))
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    memo[id(buffer)] = self._buffer(name, buffer)
        double = object.__new__(type(source))
        double.__dict__.update(source.__dict__)
        double._parameters = copy.deepcopy(source._parameters, memo)
        double._buffers = copy.deepcopy(source._buffers, memo)
        double._modules = copy.deepcopy(source._modules, memo)
        settings = copy.copy(getattr(source, self.family.settings))
        for name in self.family.cycles:
            setattr(settings, name, CYCLES)
        # A property of this name, as Lightning's hparams, reads the attribute with an underscore.
        key = self.family.settings
        double.__dict__[key if key in source.__dict__ else f"_{key}"] = settings
        for module in double.modules():
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
                module.__dict__[kind] = OrderedDict()
            for name, value in module.__dict__.items():
                if value is self.found.dtype:
                    module.__dict__[name] = self.dtype
        return double

    def _buffer(self, name: str, buffer: Tensor) -> Tensor:
        """Tables are copied; the rows of a puzzle embedding, of which there may be millions, become one."""
        if name == "weights" and buffer.dim() == 2:
            return self.random(1, buffer.shape[1]).expand(buffer.shape)
        if name in ("local_weights", "local_ids") and buffer.dim():
            made = torch.zeros(ROWS, *buffer.shape[1:], dtype=buffer.dtype, device=self.device)
            return made.to(self.dtype).requires_grad_() if buffer.requires_grad else made
        if buffer.is_meta:
            return self.random(*buffer.shape) if buffer.is_floating_point() else torch.zeros_like(buffer, device="cpu")
        copied = buffer.detach().clone()
        return copied.to(self.dtype) if buffer.is_floating_point() else copied

    # ---------------------------------------------------------------- blocks

    def block_differences(self) -> list[str]:
        lines = []
        with torch.no_grad():
            for net, spec in zip(self.family.nets, self.found.nets, strict=True):
                prefix = net if net == "layers" else f"{net}.layers"
                for i, block in enumerate(blocks_of(self.inner, net)):
                    for training in (True, False):
                        found = self._block(block.train(training), spec.block, f"{prefix}.{i}")
                        if found:
                            lines += found
                            break
        return lines

    def _block(self, block: Any, spec: BlockSpec, path: str) -> list[str]:
        attends = spec.token_mixer == "attention"
        cos_sin = self._tables(spec.head_dim) if attends else None
        cos, sin = cos_sin or (None, None)
        length = spec.seq_len if not attends else SHORT if cos is None else len(cos)
        h = self.random(ROWS, length, spec.hidden_size)
        weights = [cast(Tensor, _get(block, name)) for name in spec.weight_shapes]
        lines = []
        if attends:
            got = _own(f"{path}.self_attn", lambda: block.self_attn(cos_sin=cos_sin, hidden_states=h))
            wanted = reference.attention(spec, h, weights[0], weights[1], cos, sin)
            what = "softmax attention over the head dimension's square root, rotate-half RoPE, nothing normalised"
            lines += self._compare(f"{path}.self_attn", got, wanted, what)
        else:
            t = h.transpose(1, 2)
            got = _own(f"{path}.mlp_t", lambda: block.mlp_t(t))
            lines += self._compare(f"{path}.mlp_t", got, reference.swiglu(t, weights[0], weights[1]), SWIGLU)
        got = _own(f"{path}.mlp", lambda: block.mlp(h))
        if spec.channel_mixer == "swiglu":
            lines += self._compare(f"{path}.mlp", got, reference.swiglu(h, *weights[2:]), SWIGLU)
        else:
            what = "down(silu(conv(silu(gate) * up)))"
            lines += self._compare(f"{path}.mlp", got, reference.conv_swiglu(h, *weights[2:]), what)
        if lines:
            return lines
        # An epsilon of the size of the squares shows in both norms, and that norm_eps is what they add.
        for eps in (spec.rms_norm_eps, 0.25):
            block.norm_eps = eps
            for scale in (1.0, math.sqrt(spec.rms_norm_eps)):
                small = h * scale
                got = _own(path, lambda small=small: block(cos_sin=cos_sin, hidden_states=small))  # type: ignore[misc]
                probed = BlockSpec(**{**_fields(spec), "rms_norm_eps": eps})
                wanted = reference.run_block(probed, small, weights, cos, sin)
                what = "norm(h + mixer(h)) twice, with weightless RMSNorm and norm_eps"
                lines = lines or self._compare(path, got, wanted, what)
        block.norm_eps = spec.rms_norm_eps
        return lines

    def _tables(self, head_dim: int) -> tuple[Tensor, Tensor] | None:
        """The first rows of the model's RoPE tables."""
        rope = getattr(self.inner, self.family.rope, None)
        if rope is None:
            return None
        tables = _own(self.family.rope, rope)
        shapes = [list(table.shape) for table in tables if isinstance(table, Tensor)]
        if len(shapes) != 2 or any(len(shape) != 2 or shape[1] != head_dim for shape in shapes):
            raise _OwnCodeError(f"{self.family.rope}: gives shapes {shapes}, accepted are two tables [L, {head_dim}]")
        return tables[0][:SHORT], tables[1][:SHORT]

    # ---------------------------------------------------------------- the step

    def step_differences(self) -> list[str]:
        """Compares the model's own step with the fused one: states, heads and, in training, every gradient."""
        for net in self.family.nets:
            _shorten(self.inner, net)
        nets = tuple(
            type(spec)(spec.block, len(blocks_of(self.inner, net)))
            for net, spec in zip(self.family.nets, self.found.nets, strict=True)
        )
        self.inner.__dict__["_trmfast_plan"] = Plan(self.found.family, nets, "reference")
        carry, batch = self._carry()
        what = f"the {self.found.family} loop, at {CYCLES} cycles of {CYCLES} updates"
        lines = []
        for training in (False, True):
            self.inner.train(training)
            own = _own(self.family.method, lambda: self._run(self.step, carry, batch))
            try:
                fused = self._run(fused_step, carry, batch)
            except Exception as error:  # whatever a fork changed around the loop
                return [f"{self.family.method}: not {what}: {type(error).__name__}: {error}"]
            if own.keys() != fused.keys():
                return [f"{self.family.method}: gives {', '.join(own)}, accepted are {', '.join(fused)}"]
            for name, value in own.items():
                lines += self._compare(f"{self.family.method}: {name}", value, fused[name], what)
            if lines:
                break
        return lines

    def _carry(self) -> tuple[Any, dict[str, Tensor]]:
        # nano-trm's empty_carry takes the device, the others take PyTorch's default.
        arguments = (ROWS, self.device) if self.found.family == "nano-trm" else (ROWS,)
        carry = _own("empty_carry", lambda: self.inner.empty_carry(*arguments))
        for name in self.family.states:
            state = _own("empty_carry", lambda name=name: getattr(carry, name))  # type: ignore[misc]
            setattr(carry, name, self.random(*state.shape))
        length = state.shape[1] - self.inner.puzzle_emb_len
        vocabulary = self.inner.lm_head.weight.shape[0]
        tokens = torch.randint(vocabulary, (ROWS, length), generator=self.generator, dtype=torch.int32, device="cpu")
        ids = torch.zeros(ROWS, dtype=torch.int32)
        return carry, {self.family.inputs: tokens.to(self.device), "puzzle_identifiers": ids}

    def _run(self, step: Callable[..., Any], carry: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: p for name, p in self.inner.named_parameters() if p.requires_grad}
        for name, buffer in self.inner.named_buffers():
            if buffer.requires_grad:
                leaves[name] = buffer
        new, logits, q = step(self.inner, copy.copy(carry), dict(batch))
        q = torch.stack(q, -1) if isinstance(q, tuple) else q
        results = {name: getattr(new, name) for name in self.family.states}
        results |= {"logits": logits, "q": q}
        if self.inner.training:
            generator = torch.Generator().manual_seed(1)
            scalars = [
                (out * torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)).sum()
                for out in (logits, q)
            ]
            loss = scalars[0].double() + scalars[1].double()
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
                results[f"gradient of {name}"] = torch.zeros_like(leaf) if grad is None else grad
        return {name: value.detach() for name, value in results.items()}

    def _compare(self, name: str, got: Any, wanted: Tensor, what: str) -> list[str]:
        if not isinstance(got, Tensor) or got.shape != wanted.shape:
            shape = list(got.shape) if isinstance(got, Tensor) else type(got).__name__
            return [f"{name}: not {what}: gives {shape}, accepted is {list(wanted.shape)}"]
        scale = wanted.abs().max().item()
        error = (got.double() - wanted.double()).abs().max().item()
        if error <= ACCEPTED[self.dtype] * scale:
            return []
        return [f"{name}: not {what}: off by {error:.2g} at values up to {scale:.2g}"]


SWIGLU = "down(silu(gate) * up)"


def _get(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _fields(spec: BlockSpec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in BlockSpec.__dataclass_fields__}


def _shorten(inner: Any, net: str) -> None:
    """Keeps the first blocks of a network: each has been compared on its own."""
    owner, name = (inner, "layers") if net == "layers" else (getattr(inner, net), "layers")
    setattr(owner, name, nn.ModuleList(blocks_of(inner, net)[:BLOCKS]))
