"""The CUDA engine behind the backend protocol: csrc/cuda, a whole program forward in one launch.

The Triton backend runs the backward pass.  It needs `saved`, the summed input of every update with gradient, and
nothing else besides weights and tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from trmfast.backends.call import BackwardCall, ForwardCall
from trmfast.backends.graphs import outside_of_pools
from trmfast.backends.triton import TritonBackend
from trmfast.build_info import build_info
from trmfast.engine import address, block_fields, update_rows
from trmfast.problem import Problem, unsupported

if TYPE_CHECKING:
    from trmfast.kernels.architectures import Gpu
    from trmfast.kernels.forward_plan import Setting
    from trmfast.kernels.persistent import Grid

try:
    from trmfast import _cuda as _extension
except ImportError as error:
    _cuda: ModuleType | None = None
    _import_error = str(error)
else:
    _cuda = _extension
    _import_error = ""

__all__ = ["CudaBackend", "Limits", "grid_of", "is_slower", "limits_of", "modelled_times"]

ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
OLDEST = (8, 0)
# The options of a network that the engine may run, see :func:`trmfast.problem.unsupported`.
CHOICES: dict[str, tuple[object, ...]] = {
    "token_mixer": ("attention", "mlp_t"),
    "channel_mixer": ("swiglu", "conv_swiglu"),
    "causal": (False, True),
}
# A group gives up when it waits longer than this for one of its blocks; on a healthy device waits take microseconds.
TIMEOUT_NS = 10_000_000_000


class Limits(NamedTuple):
    """Of a device: its compute capability, the bytes of shared memory that a block may have, its multiprocessors."""

    major: int
    minor: int
    shared_bytes: int
    multiprocessors: int


class CudaBackend:
    """One launch a program; groups of thread blocks keep sequences on chip and stream the weights from L2."""

    name = "cuda"
    device_types: tuple[str, ...] = ("cuda",)
    slow_device_types: tuple[str, ...] = ()
    keeps_updates_whole = True

    def __init__(self) -> None:
        self._triton = TritonBackend()

    def available(self) -> str | None:
        """None, or why the engine does not run here."""
        if _cuda is None:
            return f"the engine was not built: {build_info('cuda').error or _import_error}"
        if torch.version.cuda is None:
            return "this PyTorch is built without CUDA"
        missing: str | None = _cuda.missing_driver()
        return missing

    def supports(
        self, problem: Problem, device: torch.device, dtype: torch.dtype, batch: int, length: int
    ) -> str | None:
        """None, or why the engine does not run this problem."""
        if dtype not in ELEMENTS:
            accepted = ", ".join(str(d).removeprefix("torch.") for d in ELEMENTS)
            return f"it computes in {accepted}, not in {str(dtype).removeprefix('torch.')}"
        reason = unsupported(problem, CHOICES)
        if reason is not None:
            return reason
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST:
            return f"it needs compute capability 8.0 or newer, not {capability[0]}.{capability[1]}"
        index = _index(device)
        prepared = _prepare(problem, batch, length, _limits(index))
        if isinstance(prepared, str):
            return prepared
        resident = _resident_blocks(problem, dtype, batch, length, index)
        needed = prepared.groups * prepared.group_blocks
        if needed > resident:
            return f"it needs {needed} blocks at the same time, the device runs {resident}"
        reason = self._triton.available() or self._triton.supports(problem, device, dtype, batch, length)
        return None if reason is None else f"its backward pass needs the triton backend: {reason}"

    def declines(self, problem: Problem, device: torch.device, dtype: torch.dtype, batch: int, length: int) -> bool:
        """Whether the triton backend is about as fast, by the rule of :func:`is_slower`; see docs/gpu_model.md."""
        from trmfast.backends.triton import forward_setting

        setting = forward_setting(problem, device, dtype, batch, length)
        return is_slower(problem, batch, length, setting, _limits(_index(device)))

    def pair_bytes(self, problem: Problem, dtype: torch.dtype, length: int) -> int:
        """0: it always recomputes."""
        return 0

    def output_bytes(self, problem: Problem, dtype: torch.dtype, length: int) -> int:
        """0: it always recomputes."""
        return 0

    def forward(self, call: ForwardCall) -> tuple[list[Tensor], Tensor, Tensor]:
        """See :class:`trmfast.backends.Backend`."""
        assert _cuda is not None
        problem, first = call.problem, call.states[0]
        device, index, element = first.device, _index(first.device), ELEMENTS[first.dtype]
        batch, length, _ = first.shape
        with torch.cuda.device(device):
            _raise_if_failed(index)
            prepared = _prepare(problem, batch, length, _limits(index))
            words = _words(problem, batch, length, index)
            stream = torch.cuda.current_stream(device).cuda_stream
            packed = _pack(problem, call.weights, first.dtype, stream)
            out = [torch.empty_like(state) for state in call.states]
            saved = first.new_empty((problem.num_grad_updates if call.save else 0, *first.shape))
            exchange = first.new_empty(prepared.exchange_elements)
            arrivals = torch.zeros(prepared.groups * _cuda.arrival_stride, dtype=torch.int32, device=device)
            _cuda.forward(
                element=element,
                prepared=prepared,
                steps=words.steps.data_ptr(),
                sources=words.sources.data_ptr(),
                runs=words.runs.data_ptr(),
                weights=[tensor.data_ptr() for tensor in packed],
                states_in=[state.data_ptr() for state in call.states],
                states_out=[state.data_ptr() for state in out],
                x=address(call.x),
                saved=saved.data_ptr() if saved.numel() else 0,
                cos=address(call.cos),
                sin=address(call.sin),
                exchange=exchange.data_ptr(),
                arrivals=arrivals.data_ptr(),
                failed=_failed(index).data_ptr(),
                timeout_ns=TIMEOUT_NS,
                stream=stream,
            )
        return out, saved, first.new_empty(0, dtype=torch.uint8)

    def backward(self, call: BackwardCall) -> tuple[list[Tensor | None], Tensor | None, list[Tensor | None]]:
        """See :class:`trmfast.backends.Backend`."""
        if call.saved.is_cuda:
            _raise_if_failed(_index(call.saved.device))
        return self._triton.backward(call)


# ---------------------------------------------------------------- preparation


@lru_cache(maxsize=256)
def is_slower(problem: Problem, batch: int, length: int, setting: Setting, limits: Limits) -> bool:
    """The rule of ``backend="auto"``: whether one launch is modelled less than GAIN times as fast as a Triton plan.

    True if nothing can be launched.
    """
    from trmfast.kernels.persistent import GAIN

    times = modelled_times(problem, batch, length, setting, limits)
    return times is None or times[0] * GAIN > times[1]


def modelled_times(
    problem: Problem, batch: int, length: int, setting: Setting, limits: Limits
) -> tuple[float, float] | None:
    """Seconds of one launch and of the Triton plan of a setting, by the models of both, or None without one launch."""
    from trmfast.kernels.forward_plan import forward_plan
    from trmfast.kernels.persistent import persistent_time
    from trmfast.kernels.roofline import plan_time

    prepared = _prepare(problem, batch, length, limits)
    if isinstance(prepared, str):
        return None
    gpu = setting.configuration.gpu
    one = persistent_time(gpu, problem, batch, length, grid_of(prepared))
    return one, plan_time(gpu, forward_plan(setting, save=False))


def limits_of(gpu: Gpu) -> Limits:
    """The limits of a GPU, without the device."""
    from trmfast.kernels.architectures import ARCHITECTURES

    architecture = ARCHITECTURES[gpu.architecture]
    return Limits(*divmod(int(architecture.number), 10), architecture.block_shared, gpu.multiprocessors)


def grid_of(prepared: Any) -> Grid:
    """What the model of time in kernels/persistent.py needs to know of a launch."""
    from trmfast.kernels.persistent import Grid

    return Grid(**{field.name: getattr(prepared, field.name) for field in fields(Grid)})


@dataclass(frozen=True)
class _Words:
    """A program on the device."""

    steps: Tensor
    sources: Tensor
    runs: Tensor


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@lru_cache(maxsize=64)
def _limits(index: int) -> Limits:
    assert _cuda is not None
    return Limits(*_cuda.limits(index))


@lru_cache(maxsize=64)
def _device(limits: Limits) -> Any:
    """The limits, and the constants of the model of time that chooses among instances."""
    from trmfast.kernels.architectures import nearest_architecture
    from trmfast.kernels.configurations import Configuration
    from trmfast.kernels.persistent import cache_blocks, stream_rows

    assert _cuda is not None
    gpu = Configuration(nearest_architecture(limits.major, limits.minor), limits.multiprocessors).gpu
    return _cuda.Device(
        shared_bytes=limits.shared_bytes,
        multiprocessors=limits.multiprocessors,
        stream_rows=stream_rows(gpu),
        cache_blocks=cache_blocks(gpu),
    )


@lru_cache(maxsize=256)
def _block(problem: Problem) -> Any:
    assert _cuda is not None
    return _cuda.BlockShape(**block_fields(problem.nets[0].block))


@lru_cache(maxsize=256)
def _prepare(problem: Problem, batch: int, length: int, limits: Limits) -> Any:
    """What to launch on a device of these limits, or in one line why nothing can be launched."""
    assert _cuda is not None
    if len({net.block for net in problem.nets}) > 1:
        return "it takes networks whose blocks are equal, these differ"
    return _cuda.prepare(
        block=_block(problem),
        layers=[net.num_layers for net in problem.nets],
        num_states=len(problem.program.states),
        program=update_rows(problem.program),
        batch=batch,
        length=length,
        device=_device(limits),
    )


@lru_cache(maxsize=256)
def _resident_blocks(problem: Problem, dtype: torch.dtype, batch: int, length: int, index: int) -> int:
    """Blocks of the kernel that the device runs at the same time."""
    limits = _limits(index)
    with torch.cuda.device(index):
        blocks: int = _prepare(problem, batch, length, limits).resident_blocks(ELEMENTS[dtype])
    return blocks * limits.multiprocessors


@lru_cache(maxsize=256)
def _words(problem: Problem, batch: int, length: int, index: int) -> _Words:
    prepared = _prepare(problem, batch, length, _limits(index))

    device = torch.device("cuda", index)

    def make() -> _Words:
        words = (prepared.steps, prepared.sources, prepared.runs)
        return _Words(*(torch.tensor(w, dtype=torch.int64).to(torch.int32).to(device) for w in words))

    return outside_of_pools(device, make)


def _pack(problem: Problem, weights: Sequence[Tensor], dtype: torch.dtype, stream: int) -> list[Tensor]:
    """The weights of every net in the order of csrc/cuda/layout.h.

    Every call packs them again, which takes tens of microseconds: the host cannot tell whether a write through
    ``p.data`` changed them.
    """
    assert _cuda is not None
    block, element = _block(problem), ELEMENTS[dtype]
    packed = []
    for n, net in enumerate(problem.nets):
        own = [weight.detach().to(torch.float32).contiguous() for weight in problem.net_weights(weights, n)]
        target = own[0].new_empty(net.num_layers * block.packed_elements, dtype=dtype)
        count = len(own) // net.num_layers
        for layer in range(net.num_layers):
            addresses = [weight.data_ptr() for weight in own[layer * count : (layer + 1) * count]]
            at = target.data_ptr() + layer * block.packed_elements * target.element_size()
            _cuda.pack(element, block, addresses, at, stream)
        packed.append(target)
    return packed


# ---------------------------------------------------------------- failures


@lru_cache(maxsize=64)
def _failed(index: int) -> Tensor:
    """A word of host memory that kernels write when a group of blocks has waited too long."""
    make = partial(torch.zeros, 1, dtype=torch.int32, pin_memory=True)
    return outside_of_pools(torch.device("cuda", index), make)


def _raise_if_failed(index: int) -> None:
    """Raises if a launch of an earlier call gave up.  Reads host memory and does not wait."""
    failed = _failed(index)
    blocks = int(failed[0])
    if blocks:
        failed.zero_()
        raise RuntimeError(
            f"trmfast CUDA: {blocks} blocks waited more than {TIMEOUT_NS / 1e9:g} s for others of their group; "
            "the results of an earlier call are incomplete"
        )
