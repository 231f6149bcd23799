"""PyTorch models for the solving loop: those of ``trmfast.models`` and accelerated ones."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from trmfast.dropin.families import FAMILIES
from trmfast.dropin.swap import is_swapped, swap_of
from trmfast.models.inner import Inner
from trmfast.solving.evaluator import Step

__all__ = ["TorchEvaluator"]

# MKL sums float32 products of fewer rows in another order.  Padding with rows of zeros makes the heads' outputs
# independent of the batch size.
LEAST_HEAD_ROWS = 16
STEP_LIMITS = ("halt_max_steps", "loops", "N_supervision")


class TorchEvaluator:
    """The inner module of a model, run in evaluation mode; the model itself is not changed.

    Args:
        model: a model of ``trmfast.models`` or an accelerated one, plain, in its loss head or another wrapper.
        dtype: ``"int8"`` for int8 operands in the recursion, with bfloat16 states; by default the model's own.

    Raises:
        TypeError: not a module.
        ValueError: no such recursion in it, several of them, no Q head, or another dtype.
    """

    has_q_head = True

    def __init__(self, model: Any, dtype: str | None = None) -> None:
        if not isinstance(model, nn.Module):
            accepted = "models of trmfast.models, accelerated models, and those of trmfast.runtime"
            raise TypeError(f"model: got {type(model).__name__}, accepted are {accepted}")
        found = [m for m in model.modules() if isinstance(m, Inner) or is_swapped(m)]
        if len(found) != 1:
            accepted = "models with one, of trmfast.models or after trmfast.accelerate"
            raise ValueError(
                f"model: got {type(model).__name__} with {len(found)} fused recursions, accepted are {accepted}"
            )
        inner: Any = found[0]
        self.inner = inner
        if getattr(inner, "q_head", None) is None:
            raise ValueError(f"model: got {type(model).__name__} without a q_head, accepted are models with one")
        settings: Any
        if isinstance(inner, Inner):
            self.state_names, self.inputs, method, settings = inner.state_names, "inputs", "forward", inner.config
            self.learns_to_continue = not settings.no_ACT_continue
        else:
            family = FAMILIES[swap_of(inner).family]
            self.state_names, self.inputs, method = family.states, family.inputs, family.method
            settings = getattr(inner, family.settings)
            # By default HRM and the baseline compare their two logits.
            learns = swap_of(inner).family in ("HRM", "transformer baseline")
            self.learns_to_continue = not getattr(settings, "no_ACT_continue", not learns)
        self._method = method
        wrapper: Any = next((m for m in model.modules() if isinstance(getattr(m, "halt_max_steps", None), int)), None)
        source = wrapper if wrapper is not None else settings
        self.halt_max_steps = int(next(getattr(source, name) for name in STEP_LIMITS if hasattr(source, name)))
        self.seq_len = int(settings.seq_len)
        self.vocab_size = int(inner.lm_head.weight.shape[0])
        puzzle_emb = getattr(inner, "puzzle_emb", None)
        self.num_identifiers = 0 if puzzle_emb is None else int(puzzle_emb.weights.shape[0])
        hidden = int(inner.lm_head.weight.shape[1])
        self.dtype = dtype
        if dtype not in (None, "int8"):
            raise ValueError(f"dtype: got {dtype!r}, accepted are 'int8' and None, for the model's own")
        # The heads read the first state.
        self.noisy = self.state_names[1:] or self.state_names
        self.noise_shape = (len(self.noisy), self.seq_len + int(inner.puzzle_emb_len), hidden)

    @property
    def device(self) -> torch.device:
        """The model's current device."""
        return cast(torch.device, self.inner.lm_head.weight.device)

    def new_batch(self) -> TorchBatch:
        """See :class:`trmfast.solving.Evaluator`."""
        return TorchBatch(self)

    def start(self, rows: int) -> Any:
        """A carry of initial states."""
        inner, device = self.inner, self.device
        takes_device = "device" in inspect.signature(inner.empty_carry).parameters
        with device:
            empty = inner.empty_carry(rows, *((device,) if takes_device else ()))
        return inner.reset_carry(torch.ones(rows, dtype=torch.bool, device=device), empty)

    def step(self, carry: Any, data: dict[str, Tensor]) -> tuple[Any, Tensor, Any]:
        """The inner module's own step in evaluation mode."""
        with (
            _evaluating(self.inner),
            _padded(self.inner.lm_head, self.inner.q_head),
            _multiplying(self.inner, self.dtype),
        ):
            return cast(tuple[Any, Tensor, Any], getattr(self.inner, self._method)(carry, data))


class TorchBatch:
    """Rows on the model's device; the carry and the puzzles stay there."""

    def __init__(self, evaluator: TorchEvaluator) -> None:
        self.evaluator = evaluator
        self.carry: Any = None
        self.data: dict[str, Tensor] = {}

    @torch.inference_mode()
    def update(self, keep: Sequence[int], inputs: np.ndarray, identifiers: np.ndarray) -> None:
        """See :class:`trmfast.solving.Batch`."""
        evaluator, device = self.evaluator, self.evaluator.device
        new: Any = evaluator.start(len(inputs)) if len(inputs) else None
        fresh = {evaluator.inputs: _on(device, inputs), "puzzle_identifiers": _on(device, identifiers)}
        if not keep:
            self.carry, self.data = new, fresh
            return
        kept = _on(device, np.array(keep, dtype=np.int64))
        self.data = {name: torch.cat((self.data[name][kept], value)) for name, value in fresh.items()}
        states = {name: getattr(self.carry, name)[kept] for name in evaluator.state_names}
        if new is not None:
            # States may be wider than the initial ones: after model.to(dtype) they promote.
            states = {name: torch.cat((z, getattr(new, name).to(z.dtype))) for name, z in states.items()}
        self.carry = replace(self.carry, **states)

    @torch.inference_mode()
    def step(self, noise: np.ndarray | None) -> Step:
        """See :class:`trmfast.solving.Batch`."""
        evaluator = self.evaluator
        if noise is not None:
            noisy = {}
            for i, name in enumerate(evaluator.noisy):
                z: Tensor = getattr(self.carry, name)
                wide = z.to(torch.promote_types(z.dtype, torch.float32))
                noisy[name] = (wide + _on(z.device, noise[:, i])).to(z.dtype)
            self.carry = replace(self.carry, **noisy)
        self.carry, logits, q = evaluator.step(self.carry, self.data)
        q_halt, q_continue = q if isinstance(q, tuple) else (q, None)
        margin = q_halt - q_continue if evaluator.learns_to_continue and q_continue is not None else q_halt
        return _read_back(logits.argmax(-1), q_halt, margin, evaluator.vocab_size)


def _read_back(predictions: Tensor, q_halt: Tensor, margin: Tensor, vocab_size: int) -> Step:
    """A step on the host, by one copy of bytes: a row's logits, then its predictions."""
    kind = torch.uint8 if vocab_size <= 256 else torch.int32
    logits = torch.stack((q_halt, margin), dim=1).float()
    parts = (logits.view(torch.uint8), predictions.to(kind).contiguous().view(torch.uint8))
    packed = torch.cat(parts, dim=1).cpu().numpy()
    q = packed[:, :8].copy().view(np.float32)
    tokens = packed[:, 8:].copy().view(np.uint8 if kind == torch.uint8 else np.int32)
    return Step(tokens.astype(np.int32), q[:, 0], q[:, 1])


def _on(device: torch.device, array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


@contextmanager
def _evaluating(inner: nn.Module) -> Iterator[None]:
    """Evaluation mode; restores each module's own mode afterwards."""
    training = [module for module in inner.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _multiplying(inner: nn.Module, dtype: str | None) -> Iterator[None]:
    """Gives a recursion the dtype of its products, if one is named, and restores its own afterwards."""
    own: Any = inner if isinstance(inner, Inner) else swap_of(inner)
    name = "product_dtype" if isinstance(inner, Inner) else "dtype"
    before = getattr(own, name)
    if dtype is not None:
        setattr(own, name, dtype)
    try:
        yield
    finally:
        setattr(own, name, before)


@contextmanager
def _padded(*heads: nn.Module) -> Iterator[None]:
    """Pads the input of every head to at least :data:`LEAST_HEAD_ROWS` rows of D values."""
    rows = 0

    def pad(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal rows
        z = inputs[0]
        rows = z.shape[0]
        fewest = -(-LEAST_HEAD_ROWS * rows * z.shape[-1] // z.numel())
        return (torch.cat((z, z.new_zeros(fewest - rows, *z.shape[1:]))) if fewest > rows else z,)

    def cut(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output[:rows]

    with ExitStack() as stack:
        for head in heads:
            stack.callback(head.register_forward_pre_hook(pad).remove)
            stack.callback(head.register_forward_hook(cut).remove)
        yield
