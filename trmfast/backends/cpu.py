"""The CPU engine behind the backend protocol: C++ in csrc/cpu, one parallel region for a whole program."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from torch.profiler import record_function

from trmfast.backends.call import BackwardCall, ForwardCall, Kept
from trmfast.backends.packed_weights import NetShape, PackedCache, SeenWeights
from trmfast.build_info import build_info
from trmfast.engine import address, block_fields, choice_fields, int8_refusal, update_rows
from trmfast.problem import Problem, unsupported
from trmfast.spec import INJECTIONS
from trmfast.targets import extension, force_target, import_error, target_of, targets

__all__ = ["CpuBackend", "force_target", "release_memory", "target_for", "targets", "thread_source"]

ELEMENTS = {torch.float32: "f32", torch.bfloat16: "bf16"}
# Those of inference too: int8 operands with bfloat16 states.
FORWARD_ELEMENTS = {**ELEMENTS, torch.int8: "i8"}
LEAST_STORE_BYTES = 36 << 20
MOST_STATES, MOST_NETS, MOST_TAPS = 64, 16, 8
# The options of a network that the engine runs, see :func:`trmfast.problem.unsupported`.
CHOICES: dict[str, Container[object]] = {
    "token_mixer": ("attention", "mlp_t", "simple_gla"),
    "channel_mixer": ("swiglu", "conv_swiglu", "relu2", "gelu"),
    "causal": (False, True),
    "norm_placement": ("post", "pre", "sandwich", "sandwich_sum"),
    "norm_weight": (False, True),
    "rotation": ("half", "interleaved"),
    "qk_norm": ("none", "plain", "learned"),
    "qk_bias": (False, True),
    "gate": ("none", "channel", "head"),
    "attention_window": range(1 << 31),
    "segments": (False, True),
    "final_norm": (False, True),
    "injection": INJECTIONS,
}
INT8_CHOICES: dict[str, Container[object]] = {
    "token_mixer": ("attention", "mlp_t"),
    "channel_mixer": ("swiglu", "conv_swiglu"),
    "causal": CHOICES["causal"],
}

_cpu = extension


def target_for(dtype: torch.dtype) -> str:
    """The target that multiplies in a dtype: the best that this machine runs, or the one forced."""
    return target_of(FORWARD_ELEMENTS[dtype])


# ---------------------------------------------------------------- threads

THREADS = ("pytorch", "own")


def _use_threads_of_pytorch() -> None:
    """Runs the engine on PyTorch's OpenMP threads, unless it has none or ``TRMFAST_CPU_THREADS`` is ``own``.

    Threads of the engine's own would share the cores with PyTorch's, which spin for milliseconds after each of its
    parallel loops.
    """
    wanted = os.environ.get("TRMFAST_CPU_THREADS") or THREADS[0]
    if wanted not in THREADS:
        raise ValueError(f"TRMFAST_CPU_THREADS: got {wanted!r}, accepted are {', '.join(THREADS)}")
    if _cpu is None or wanted == "own" or not torch.backends.openmp.is_available():
        return
    try:
        # The loader searches the libraries that PyTorch was linked with, so this finds the runtime that it uses.
        pytorch = ctypes.CDLL(torch._C.__file__)
        names = ("GOMP_parallel", "omp_get_num_threads", "omp_get_thread_num")
        entries = [ctypes.cast(getattr(pytorch, name), ctypes.c_void_p).value for name in names]
    except (OSError, AttributeError):  # a PyTorch linked in another way: the engine starts threads
        return
    _cpu.use_openmp(*entries)


_use_threads_of_pytorch()


def thread_source() -> str:
    """Whose threads the engine runs on: ``"pytorch"`` or ``"own"``."""
    return "pytorch" if _cpu is not None and _cpu.uses_openmp() else "own"


# ---------------------------------------------------------------- profiler

PROFILE = os.environ.get("TRMFAST_PROFILE") == "1"


class _Ranges:
    """Opens a range of torch.profiler for each phase that the engine's first thread begins."""

    def __init__(self) -> None:
        self._open: record_function | None = None

    def __call__(self, phase: str | None) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
        self._open = None if phase is None else record_function(f"trmfast::cpu: {phase}")
        if self._open is not None:
            self._open.__enter__()


# ---------------------------------------------------------------- what is kept between calls

CHECK_WEIGHTS = os.environ.get("TRMFAST_CHECK_WEIGHTS") != "0"

_cache = PackedCache()
_seen = SeenWeights()


def release_memory() -> None:
    """Frees what the engine keeps between calls: packed weights and its workspace.  Later calls rebuild both."""
    _cache.clear()
    if _cpu is not None:
        _cpu.release_memory()


# ---------------------------------------------------------------- backend


@dataclass(frozen=True)
class _Engine:
    """A problem in the engine's own structs."""

    program: object
    nets: tuple[NetShape, ...]
    written: tuple[bool, ...]  # the states that an update writes
    folded: tuple[tuple[int, int], ...]  # the weight of each norm before a product, and the product's


@lru_cache(maxsize=256)
def _engine(problem: Problem) -> _Engine:
    assert _cpu is not None
    blocks = [_cpu.BlockShape(**block_fields(net.block), **choice_fields(net.block)) for net in problem.nets]
    return _Engine(
        _cpu.Program(len(problem.program.states), update_rows(problem.program)),
        tuple(
            NetShape(net.key, block, net.num_layers, net.final_norm, INJECTIONS.index(net.injection))
            for net, block in zip(problem.nets, blocks, strict=True)
        ),
        tuple(s in {update.dst for update in problem.program.counts()} for s in range(len(problem.program.states))),
        tuple(_folded(problem)),
    )


def _folded(problem: Problem) -> Iterator[tuple[int, int]]:
    """The places of norm weights that the engine packs into the product behind the norm, each with the product's."""
    for net, part in zip(problem.nets, problem.weight_slices, strict=True):
        names = list(net.block.weight_shapes)
        if not net.block.norm_weight or net.block.norm_placement == "post":
            continue
        second = "norm2.weight" if net.block.norm_placement == "pre" else "norm3.weight"
        for layer in range(net.num_layers):
            first = part.start + layer * len(names)
            yield first + names.index("norm1.weight"), first
            yield first + names.index(second), first + 2


@lru_cache(maxsize=256)
def _pair_bytes(problem: Problem, target: str, element: str, length: int) -> tuple[int, int]:
    """Bytes of all activations of a pair, and of the outputs of its blocks."""
    assert _cpu is not None
    nets = _engine(problem).nets
    layers = [(net.num_layers, net.final_norm, net.injection) for net in nets]
    activations, outputs = _cpu.pair_bytes(target, element, nets[0].block, layers, length)
    return activations, outputs


@lru_cache(maxsize=256)
def store_bytes(problem: Problem) -> int:
    """Memory for the operands of weight gradients, over all sequences of a backward pass.

    A network's gradients are read and written once for each store that is full: it has at least two fifths of their
    size.
    """
    elements = (sum(map(prod, problem.weight_shapes[part])) for part in problem.weight_slices)
    return max(LEAST_STORE_BYTES, 8 * max(elements) // 5)


def _keep(nbytes: int) -> Tensor:
    """[nbytes] bytes in memory that the engine takes back when the tensor dies."""
    assert _cpu is not None
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(_cpu.KeptActivations(nbytes), dtype=torch.uint8)


def _explained(error: Exception, problem: Problem, state: Tensor) -> Exception:
    """Adds the sizes, and what would need less, to an out-of-memory error; returns other errors unchanged."""
    reason = str(error)
    if not isinstance(error, MemoryError):
        bytes_of_pytorch = re.search(r"you tried to allocate (\d+) bytes", reason)
        if bytes_of_pytorch is None:
            return error
        reason = f"out of memory: {bytes_of_pytorch[1]} bytes of saved inputs, states or gradients"
    batch, length, width = state.shape
    less = "recompute=True or a smaller batch" if "kept" in reason else "a smaller batch, or shorter sequences,"
    return MemoryError(
        f"{reason}, for {batch} sequences of {length} tokens, D = {width}, {problem.num_grad_updates} updates with "
        f"gradient, {torch.get_num_threads()} threads; {less} needs less"
    )


class CpuBackend:
    """AMX, AVX-512, AVX2 or portable C++, chosen at run time; threads as in ``torch.set_num_threads``."""

    name = "cpu"
    device_types = ("cpu",)
    slow_device_types: tuple[str, ...] = ()
    keeps_updates_whole = False

    def available(self) -> str | None:
        """None, or why there is no engine in this installation."""
        if _cpu is not None:
            return None
        return f"the engine was not built: {build_info().error or import_error}"

    def supports(
        self, problem: Problem, device: torch.device, dtype: torch.dtype, batch: int, length: int
    ) -> str | None:
        """None, or why the engine does not run this problem."""
        if dtype not in FORWARD_ELEMENTS:
            accepted = ", ".join(str(d).removeprefix("torch.") for d in FORWARD_ELEMENTS)
            return f"it computes in {accepted}, not in {str(dtype).removeprefix('torch.')}"
        reason = unsupported(problem, INT8_CHOICES if dtype == torch.int8 else CHOICES)
        if reason is not None:
            return reason
        blocks = {net.block for net in problem.nets}
        if len(blocks) > 1:
            return "it takes networks whose blocks are equal, these differ"
        block = blocks.pop()
        if block.channel_mixer == "conv_swiglu" and block.conv_kernel > MOST_TAPS:
            return f"it convolves with up to {MOST_TAPS} taps, not with {block.conv_kernel}"
        refusal = int8_refusal(block) if dtype == torch.int8 else None
        if refusal is not None:
            return refusal
        if len(problem.program.states) > MOST_STATES or len(problem.nets) > MOST_NETS:
            return f"it takes up to {MOST_STATES} states and {MOST_NETS} networks"
        return None

    def declines(self, problem: Problem, device: torch.device, dtype: torch.dtype, batch: int, length: int) -> bool:
        """False: it is the best choice for whatever it supports."""
        return False

    def pair_bytes(self, problem: Problem, dtype: torch.dtype, length: int) -> int:
        """Bytes of the activations of one update of one sequence."""
        return _pair_bytes(problem, target_for(dtype), ELEMENTS[dtype], length)[0]

    def output_bytes(self, problem: Problem, dtype: torch.dtype, length: int) -> int:
        """Bytes of the outputs of its blocks."""
        return _pair_bytes(problem, target_for(dtype), ELEMENTS[dtype], length)[1]

    def _places(self, problem: Problem, state: Tensor, kept: Tensor, keep: Kept) -> tuple[int, int, int, int]:
        """Address and pairs of the kept activations, then of the outputs, which lie behind; 0 for none."""
        size = keep.pairs * self.pair_bytes(problem, state.dtype, state.shape[1]) if keep.pairs else 0
        activations = kept.data_ptr() if keep.pairs else 0
        outputs = kept.data_ptr() + size if keep.outputs else 0
        return activations, keep.pairs, outputs, keep.outputs

    def _packed(
        self,
        problem: Problem,
        engine: _Engine,
        dtype: torch.dtype,
        weights: Sequence[Tensor],
        backward: bool,
        threads: int,
    ) -> tuple[list[int], list[object]]:
        target, element = target_for(dtype), FORWARD_ELEMENTS[dtype]
        found = [
            _cache.get(target, element, net, problem.net_weights(weights, n), backward, threads)
            for n, net in enumerate(engine.nets)
        ]
        return [fingerprint for fingerprint, _ in found], [pack for _, pack in found]

    def forward(self, call: ForwardCall) -> tuple[list[Tensor], Tensor, Tensor]:
        """See :class:`trmfast.backends.Backend`."""
        try:
            return self._forward(call)
        except (MemoryError, RuntimeError) as error:
            raise _explained(error, call.problem, call.states[0]) from None

    def _forward(self, call: ForwardCall) -> tuple[list[Tensor], Tensor, Tensor]:
        assert _cpu is not None
        problem, first = call.problem, call.states[0]
        engine = _engine(problem)
        shape = tuple(first.shape)
        threads = torch.get_num_threads()
        dtype = torch.int8 if call.int8 else first.dtype
        fingerprints, packed = self._packed(problem, engine, dtype, call.weights, backward=call.save, threads=threads)
        out = [
            torch.empty_like(state) if written else state.clone()
            for state, written in zip(call.states, engine.written, strict=True)
        ]
        saved = first.new_empty((problem.num_grad_updates - call.keep.pairs // shape[0] if call.save else 0, *shape))
        kept = _keep(call.keep.nbytes)
        holder = saved if saved.numel() else kept
        if CHECK_WEIGHTS and holder.numel():
            _seen.note(holder, fingerprints)
        _cpu.forward(
            engine.program,
            packed,
            shape,
            [state.data_ptr() for state in call.states],
            [state.data_ptr() for state in out],
            address(call.x),
            saved.data_ptr() if saved.numel() else 0,
            self._places(problem, first, kept, call.keep),
            address(call.cos),
            address(call.sin),
            threads,
            _Ranges() if PROFILE else None,
            address(call.segments),
        )
        return out, saved, kept

    def backward(self, call: BackwardCall) -> tuple[list[Tensor | None], Tensor | None, list[Tensor | None]]:
        """See :class:`trmfast.backends.Backend`."""
        try:
            return self._backward(call)
        except (MemoryError, RuntimeError) as error:
            raise _explained(error, call.problem, call.grad_states[0]) from None

    def _backward(self, call: BackwardCall) -> tuple[list[Tensor | None], Tensor | None, list[Tensor | None]]:
        assert _cpu is not None
        problem, threads = call.problem, torch.get_num_threads()
        engine = _engine(problem)
        shape = tuple(call.saved.shape[1:])
        fingerprints, packed = self._packed(
            problem, engine, call.saved.dtype, call.weights, backward=True, threads=threads
        )
        if CHECK_WEIGHTS:
            _seen.check(problem, call.saved if call.saved.numel() else call.kept, fingerprints)
        grads = [torch.empty(shape, dtype=torch.float32) for _ in call.grad_states]
        grad_x = torch.empty(shape, dtype=torch.float32) if call.needs_x else None
        # The engine writes gradients only for the nets that it differentiates.
        live = {update.net for update in problem.program.counts() if update.grad}
        needed = [n in live for n, part in enumerate(problem.weight_slices) for _ in range(part.start, part.stop)]
        computed = list(call.needs_weights)
        for norm, product in engine.folded:
            computed[product] |= computed[norm]
        grad_weights = [
            torch.empty(weight.shape, dtype=torch.float32) if asked and written else None
            for weight, asked, written in zip(call.weights, computed, needed, strict=True)
        ]
        read = [weight.to(torch.float32).contiguous() for weight in call.weights] if engine.folded else []
        _cpu.backward(
            engine.program,
            packed,
            shape,
            [grad.data_ptr() for grad in call.grad_states],
            call.saved.data_ptr() if call.saved.numel() else 0,
            self._places(problem, call.grad_states[0], call.kept, call.keep),
            [grad.data_ptr() for grad in grads],
            address(grad_x),
            [address(grad) for grad in grad_weights],
            address(call.cos),
            address(call.sin),
            threads,
            store_bytes(problem),
            [weight.data_ptr() for weight in read],
            _Ranges() if PROFILE else None,
            address(call.segments),
            address(call.x),
        )
        return (
            [grad if asked else None for grad, asked in zip(grads, call.needs_states, strict=True)],
            grad_x,
            [grad if asked else None for grad, asked in zip(grad_weights, call.needs_weights, strict=True)],
        )
