"""Launches of plans, as work of the current stream of the current device.

A kernel is replaced by a formula of everything that the launch declares to read, so that a stale or poisoned operand
shows in all that follows: what the kernels compute is tested elsewhere, in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from trmfast.kernels.plan import Launch

from standin.memory import Block, HazardError
from standin.tensors import DeviceTensor

if TYPE_CHECKING:
    from standin.runtime import Runtime

__all__ = ["formula", "launch_on"]


def formula(launch: Launch, arguments: Mapping[str, Any], _: Mapping[str, Any]) -> None:
    """Writes every result of a launch over tensors of the CPU."""
    total = 0.0
    for i, tensor in enumerate(_tensors(launch.reads, arguments)):
        total += float(tensor.double().mean()) / (i + 1)
    for i, tensor in enumerate(_tensors(launch.writes, arguments)):
        ramp = torch.arange(tensor.numel()).remainder(7).view(tensor.shape)
        kept = tensor.double() if any(tensor is t for t in _tensors(launch.reads, arguments)) else 0.0
        tensor.copy_(torch.tanh(total + 0.1 * ramp + 0.01 * i + 0.5 * kept))


def _tensors(names: Any, arguments: Mapping[str, Any]) -> list[Any]:
    return [t for name in names for t in tree_leaves(arguments[name]) if t is not None]


def launch_on(runtime: Runtime, launch: Launch, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """In the place of :func:`trmfast.kernels.plan.start`.

    Raises:
        HazardError: a tensor of the host, or of another device; a kernel that would be compiled during a capture.
    """
    stream, name = runtime.current_stream(), launch.kernel
    accesses: dict[Block, list[bool]] = {}
    for names, place in ((launch.reads, 0), (launch.writes, 1)):
        for tensor in _tensors(names, arguments):
            if not isinstance(tensor, DeviceTensor):
                raise HazardError(f"{name}: a tensor of the host is passed to a kernel")
            if tensor.block.device != stream.device_index:
                raise HazardError(f"{name}: launched on {stream}, its tensors lie on cuda:{tensor.block.device}")
            accesses.setdefault(tensor.block, [False, False])[place] = True
    _compile(runtime, name, arguments, options)
    inner = {key: _unwrap(value) for key, value in arguments.items()}

    def work() -> None:
        with torch.inference_mode(False), torch.no_grad():
            runtime.kernel(launch, inner, options)

    stream.advance()
    if stream.capture is not None:
        stream.capture.add(work, [(block, read, write) for block, (read, write) in accesses.items()])
        return
    for block, (read, write) in accesses.items():
        block.touch(stream, read=read, write=write)
    work()


def _unwrap(value: Any) -> Any:
    return tuple(map(_unwrap, value)) if isinstance(value, tuple) else value.inner


def _compile(runtime: Runtime, name: str, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Triton compiles a kernel for each combination of constants, and of addresses that are multiples of 16."""
    stream = runtime.current_stream()
    tensors: list[Tensor] = tree_leaves(list(arguments.values()))
    aligned = tuple((tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in tensors)
    key = (stream.device_index, name, aligned, repr(sorted(options.items())))
    if key not in runtime.compiled:
        if stream.capture is not None:
            raise HazardError(f"{name}: compiled and loaded during a capture")
        runtime.compiled.add(key)
