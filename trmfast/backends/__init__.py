"""The backends that can run a recursion, and the choice between them."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from trmfast.backends.call import BackwardCall, ForwardCall, Kept
from trmfast.backends.cpu import CpuBackend
from trmfast.backends.cuda import CudaBackend
from trmfast.backends.reference import ReferenceBackend
from trmfast.backends.triton import TritonBackend
from trmfast.problem import Problem

__all__ = ["BACKENDS", "Backend", "BackwardCall", "ForwardCall", "Kept", "select", "what_fits"]


class Backend(Protocol):
    """What the operators ask of a backend.  They validate every tensor first; call.py says what they pass."""

    @property
    def name(self) -> str:
        """The name users choose it by."""

    @property
    def device_types(self) -> tuple[str, ...]:
        """The device types it is made for; empty for all."""

    @property
    def slow_device_types(self) -> tuple[str, ...]:
        """The device types on which it is interpreted or emulated; it runs there only if asked for by name."""

    def available(self) -> str | None:
        """None if the backend works on this machine, else the reason in one line."""

    def supports(
        self, problem: Problem, device: torch.device, dtype: torch.dtype, batch: int, length: int
    ) -> str | None:
        """None if the backend can run this problem on [batch, length, D] states, else the reason in one line.

        ``dtype`` is that of the products by weights: torch.int8 for bfloat16 states with int8 operands.
        """

    def declines(self, problem: Problem, device: torch.device, dtype: torch.dtype, batch: int, length: int) -> bool:
        """Whether ``"auto"`` should take the next backend although this one supports the problem."""

    def pair_bytes(self, problem: Problem, dtype: torch.dtype, length: int) -> int:
        """Bytes that activations of one update of one sequence take if forward keeps them; 0 if it never does."""

    def output_bytes(self, problem: Problem, dtype: torch.dtype, length: int) -> int:
        """Bytes that the outputs of the blocks of such a pair take; 0 if forward never keeps them alone."""

    @property
    def keeps_updates_whole(self) -> bool:
        """Whether forward keeps an update of all sequences or of none."""

    def forward(self, call: ForwardCall) -> tuple[list[Tensor], Tensor, Tensor]:
        """Runs the program.

        Returns:
            The final states, newly allocated and contiguous, in the compute dtype; the summed inputs of the updates
            with ``grad`` that are not wholly kept, [G, B, L, D] in the compute dtype, with G = 0 if not ``save``; and
            what it kept, [keep.nbytes] bytes in a form of the backend's own.
        """

    def backward(self, call: BackwardCall) -> tuple[list[Tensor | None], Tensor | None, list[Tensor | None]]:
        """Differentiates the grad updates in reverse; recomputes of each what ``kept`` lacks from its saved input.

        It changes neither ``saved`` nor ``kept``: backward may run again.

        Returns:
            Gradients of the incoming states and of x in the compute dtype or a wider one, and of the weights in float32
            or wider, contiguous and newly allocated.  None where a gradient is not needed, or is zero.
        """


BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (CpuBackend(), CudaBackend(), TritonBackend(), ReferenceBackend())
}
"""Backends by name, in order of preference."""

_told: set[str] = set()


@lru_cache(maxsize=1024)
def select(name: str, problem: Problem, device: torch.device, dtype: torch.dtype, batch: int, length: int) -> Backend:
    """The backend that runs a problem.

    Args:
        name: the name of a backend, or ``"auto"`` for the first one that takes the problem.  A backend made for this
            type of device that refuses is named in a warning, once for each reason.
        problem, device, dtype, batch, length: what is to be run: [batch, length, D] states of a dtype on a device;
            torch.int8 is as in :meth:`Backend.supports`.

    Raises:
        ValueError: there is no backend of that name, it does not work on this machine, or it refuses the problem.
    """
    if name != "auto":
        backend = BACKENDS.get(name)
        if backend is None:
            raise ValueError(f"backend: got {name!r}, accepted are {', '.join(['auto', *BACKENDS])}")
        reason = backend.available()
        if reason is not None:
            works = ", ".join(["auto", *(other.name for other in BACKENDS.values() if other.available() is None)])
            raise ValueError(f"backend: got {name!r}, which does not work here: {reason}; accepted are {works}")
        reason = _refusal(backend, backend.slow_device_types, problem, device, dtype, batch, length)
        if reason is not None:
            raise ValueError(f"backend: got {name!r}, accepted are auto or a backend that takes this problem: {reason}")
        return backend
    for backend in BACKENDS.values():
        reason = _refusal(backend, (), problem, device, dtype, batch, length)
        if reason is None:
            if backend.declines(problem, device, dtype, batch, length):
                continue
            return backend
        if device.type in backend.device_types and reason not in _told:
            _told.add(reason)
            warnings.warn(f"trmfast: backend {backend.name} is not used: {reason}", stacklevel=2)
    raise AssertionError("the reference backend takes every problem")


def what_fits(backend: Backend, problem: Problem, dtype: torch.dtype, batch: int, length: int, budget: int) -> Kept:
    """What a backend keeps for backward.

    The outputs of blocks come first: at published widths each of their bytes spares several times the work that one of
    whole pairs does.
    For a budget that is the size of what is kept, the result is that again.

    Args:
        backend, problem, dtype, length: what runs it, and what it runs.
        batch: sequences; may be symbolic.
        budget: bytes that it may keep.
    """
    size = backend.pair_bytes(problem, dtype, length) if budget and problem.num_grad_updates else 0
    if not size:
        return Kept()
    window, output = problem.num_grad_updates * batch, backend.output_bytes(problem, dtype, length)
    # The functions for symbols take ten times as long.
    least, most = (min, max) if isinstance(batch, int) else (torch.sym_min, torch.sym_max)
    pairs: int = most(0, least(window, (budget - window * output) // (size - output)))
    if backend.keeps_updates_whole:
        pairs = pairs // batch * batch
    outputs: int = least(window - pairs, (budget - pairs * size) // output) if output else 0
    return Kept(pairs, outputs, pairs * size + outputs * output)


def _refusal(
    backend: Backend,
    more_device_types: tuple[str, ...],
    problem: Problem,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    length: int,
) -> str | None:
    if backend.device_types and device.type not in (*backend.device_types, *more_device_types):
        return f"it runs on {', '.join(backend.device_types)}, not on {device.type}"
    return backend.available() or backend.supports(problem, device, dtype, batch, length)
