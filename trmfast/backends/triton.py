"""Triton kernels behind the backend protocol: the launch plan of a problem, run eagerly or replayed as a CUDA graph."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trmfast.backends.call import BackwardCall, ForwardCall
from trmfast.backends.graphs import Graphs, allocate, fill, new_input
from trmfast.problem import Problem, unsupported
from trmfast.spec import INJECTIONS

if TYPE_CHECKING:
    from trmfast.kernels.backward_plan import BackwardPlan
    from trmfast.kernels.configurations import Configuration
    from trmfast.kernels.forward_plan import Setting
    from trmfast.kernels.plan import Buffer, Plan
    from trmfast.kernels.tuning import Tuner

__all__ = ["TritonBackend", "forward_setting", "interprets", "release_memory"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_TRITON = (3, 4)
MOST_TERMS = 8
# The options of a network that the kernels run, see :func:`trmfast.problem.unsupported`.
CHOICES: dict[str, Container[object]] = {
    "token_mixer": ("attention", "mlp_t", "simple_gla"),
    "channel_mixer": ("swiglu", "conv_swiglu", "relu2", "gelu"),
    "causal": (False, True),
    "norm_placement": ("post", "pre", "sandwich", "sandwich_sum"),
    "norm_weight": (False, True),
    "final_norm": (False, True),
    "rotation": ("half", "interleaved"),
    "qk_norm": ("none", "plain", "learned"),
    "qk_bias": (False, True),
    "gate": ("none", "channel", "head"),
    "attention_window": range(2**31),
    "segments": (False, True),
    "injection": INJECTIONS,
}
WIDEST, WIDEST_HEAD = 4096, 128
MOST_SEQUENCES = 65535  # CUDA's limit for the second and third axis of a grid


def interprets() -> bool:
    """Whether Triton's interpreter is on: whether ``TRITON_INTERPRET=1`` was set when Triton was imported."""
    if _triton_problem() is not None:
        return False
    from trmfast.kernels.dot import INTERPRETED

    return bool(INTERPRETED)


@lru_cache(maxsize=1)
def _triton_problem() -> str | None:
    """None, or why Triton cannot be used."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: `pip install trmfast[triton]` installs it on Linux"
    import triton

    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if found < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"Triton {triton.__version__} is too old: it needs {oldest} or newer, which PyTorch 2.8 brings"
    return None


@lru_cache(maxsize=64)
def _architecture(index: int) -> tuple[str | None, str]:
    """The architecture whose tiles a GPU uses, or None; and the name of its own."""
    from trmfast.kernels.architectures import nearest_architecture

    if torch.version.hip is not None:
        found = str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
        return ("gfx942" if found in ("gfx90a", "gfx940", "gfx941", "gfx942", "gfx950") else None), found
    major, minor = torch.cuda.get_device_capability(index)
    name = f"sm_{major}{minor}"
    if major < 8:
        return None, name
    return nearest_architecture(major, minor), name


class TritonBackend:
    """Kernels in kernels/, planned by :mod:`trmfast.kernels.forward_plan` and :mod:`trmfast.kernels.backward_plan`.

    Where launching takes the host longer than the GPU is modelled to run, the second call of a problem captures the
    plan into a CUDA graph, which later calls replay (graphs.py); the environment variable ``TRMFAST_GRAPHS`` set to
    ``0`` or ``1`` turns that off or on.
    ``TRMFAST_TUNE=1`` times tiles on the GPU instead of asking the model of time, see kernels/tuning.py.  With
    ``TRITON_INTERPRET=1`` it runs on CPU tensors, slowly, if asked for by name.
    """

    name = "triton"
    device_types = ("cuda",)
    keeps_updates_whole = True

    @property
    def slow_device_types(self) -> tuple[str, ...]:
        """The CPU, if Triton interprets."""
        return ("cpu",) if interprets() else ()

    def available(self) -> str | None:
        """None, or why no kernel runs here."""
        reason = _triton_problem()
        if reason is None and not torch.cuda.is_available() and not interprets():
            reason = "no GPU: torch.cuda.is_available() is False"
        return reason

    def supports(
        self, problem: Problem, device: torch.device, dtype: torch.dtype, batch: int, length: int
    ) -> str | None:
        """None, or why the kernels do not run this problem."""
        if device.type not in (*self.device_types, *self.slow_device_types):
            return f"it runs on {', '.join(self.device_types)}, not on {device.type}"
        if device.type == "cuda":
            if interprets():
                return "TRITON_INTERPRET is set: it interprets, on CPU tensors"
            architecture, found = _architecture(_index(device))
            if architecture is None:
                return f"it has no tiles for {found}: it needs compute capability 8.0 or newer, or CDNA 2 or newer"
        if dtype not in DTYPES:
            accepted = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            return f"it computes in {accepted}, not in {str(dtype).removeprefix('torch.')}"
        reason = unsupported(problem, CHOICES)
        if reason is not None:
            return reason
        if problem.hidden_size > WIDEST:
            return f"it takes widths up to {WIDEST}, not {problem.hidden_size}"
        if problem.rope_dim is not None and problem.rope_dim > WIDEST_HEAD:
            return f"it takes head_dim up to {WIDEST_HEAD}, not {problem.rope_dim}"
        terms = max(len(update.sources) + update.inject_x for update in problem.program.counts())
        if terms > MOST_TERMS:
            return f"it adds up to {MOST_TERMS} tensors in an update, not {terms}"
        if batch > MOST_SEQUENCES or batch * length >= 2**31:
            return f"it takes up to {MOST_SEQUENCES} sequences and 2^31 tokens, not {batch} of {length}"
        return None

    def declines(self, problem: Problem, device: torch.device, dtype: torch.dtype, batch: int, length: int) -> bool:
        """False: it is the best choice for whatever it supports."""
        return False

    def pair_bytes(self, problem: Problem, dtype: torch.dtype, length: int) -> int:
        """Bytes of the activations of one update of one sequence, at most."""
        return _pair_bytes(problem, dtype, length)

    def output_bytes(self, problem: Problem, dtype: torch.dtype, length: int) -> int:
        """0: it keeps whole updates only."""
        return 0

    def forward(self, call: ForwardCall) -> tuple[list[Tensor], Tensor, Tensor]:
        """See :class:`trmfast.backends.Backend`."""
        first = call.states[0]
        setting = _setting(call.problem, first, call.cos is not None)
        keep = call.keep.pairs // setting.batch
        plan = _forward_plan(setting, call.save, keep)
        inputs: dict[str, Tensor] = {f"states.{s}": state for s, state in enumerate(call.states)}
        if call.x is not None:
            inputs["x"] = call.x
        kept = torch.empty(call.keep.nbytes, dtype=torch.uint8, device=first.device)
        results = _run((setting, call.save, keep), plan, {**inputs, **_constants(call)}, _kept(plan.outputs, kept))
        # A state that no update writes is still the caller's tensor.
        out = [results[f"out.{s}"] if f"out.{s}" in results else state.clone() for s, state in enumerate(call.states)]
        saved = results.get("saved", first.new_empty((0, *first.shape)))
        return out, saved, kept

    def backward(self, call: BackwardCall) -> tuple[list[Tensor | None], Tensor | None, list[Tensor | None]]:
        """See :class:`trmfast.backends.Backend`."""
        setting = _setting(call.problem, call.grad_states[0], call.cos is not None, call.saved.dtype)
        keep = call.keep.pairs // setting.batch
        key = (setting, tuple(call.needs_states), call.needs_x, tuple(call.needs_weights), keep)
        backward = _backward_plan(*key)
        inputs = {f"grad.{s}": gradient for s, gradient in enumerate(call.grad_states)}
        inputs.update(_kept(backward.plan.inputs, call.kept))
        if call.saved.numel():
            inputs["saved"] = call.saved
        if call.x is not None and any(buffer.name == "x" for buffer in backward.plan.inputs):
            inputs["x"] = call.x
        results = _run(key, backward.plan, {**inputs, **_constants(call)})

        def of(buffer: Buffer | None) -> Tensor | None:
            return None if buffer is None else results[buffer.name]

        return [of(g) for g in backward.grad_states], of(backward.grad_x), [of(g) for g in backward.grad_weights]


def _kept(buffers: Sequence[Buffer], kept: Tensor) -> dict[str, Tensor]:
    """The parts of the kept bytes that a plan has as buffers."""
    from trmfast.kernels.plan import KEPT

    found, at = {}, 0
    for buffer in buffers:
        if buffer.name.startswith(KEPT):
            found[buffer.name] = kept[at : at + buffer.nbytes].view(buffer.dtype)
            at += buffer.nbytes
    return found


def _constants(call: ForwardCall | BackwardCall) -> dict[str, Tensor]:
    found = {f"weights.{i}": weight for i, weight in enumerate(call.weights)}
    for name in ("cos", "sin", "segments"):
        tensor = getattr(call, name)
        if tensor is not None:
            found[name] = tensor
    return found


# ---------------------------------------------------------------- plans


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@lru_cache(maxsize=64)
def _configuration(device: torch.device) -> Configuration:
    from trmfast.kernels.configurations import INTERPRETER, Configuration

    if device.type == "cpu":
        return Configuration(INTERPRETER, 1)
    architecture, found = _architecture(_index(device))
    assert architecture is not None, found
    units = torch.cuda.get_device_properties(device).multi_processor_count
    return Configuration(architecture, units, tuner=_tuner(device) if os.environ.get("TRMFAST_TUNE") == "1" else None)


def _tuner(device: torch.device) -> Tuner:
    import triton

    from trmfast.kernels.tuning import Tuner, cache_file, time_launch

    return Tuner(cache_file(), f"{torch.cuda.get_device_name(device)}, Triton {triton.__version__}", time_launch)


def _setting(problem: Problem, like: Tensor, rope: bool, dtype: torch.dtype | None = None) -> Setting:
    from trmfast.kernels.forward_plan import Setting

    batch, length, _ = like.shape
    dtype = dtype or like.dtype
    tf32 = like.is_cuda and dtype == torch.float32 and _allows_tf32(like.device)
    return Setting(problem, batch, length, dtype, rope, _configuration(like.device), tf32)


def _allows_tf32(device: torch.device) -> bool:
    """Whether products of float32 may round their operands to TF32, by PyTorch's setting and the GPU's ability."""
    if torch.version.hip is not None and _architecture(_index(device))[1] != "gfx942":
        return False  # Triton has no TF32 for other AMD GPUs
    matmul = torch.backends.cuda.matmul
    # Once a program has set `fp32_precision`, reading `allow_tf32` is an error.
    if hasattr(matmul, "fp32_precision"):
        return bool(matmul.fp32_precision == "tf32")
    return bool(matmul.allow_tf32)


def forward_setting(problem: Problem, device: torch.device, dtype: torch.dtype, batch: int, length: int) -> Setting:
    """The setting of a forward plan, before there are tensors."""
    from trmfast.kernels.forward_plan import Setting

    return Setting(problem, batch, length, dtype, problem.rope_dim is not None, _configuration(device))


@lru_cache(maxsize=256)
def _pair_bytes(problem: Problem, dtype: torch.dtype, length: int) -> int:
    from trmfast.kernels.backward_plan import pair_bytes
    from trmfast.kernels.configurations import INTERPRETER, Configuration
    from trmfast.kernels.forward_plan import Setting

    return pair_bytes(Setting(problem, 1, length, dtype, problem.rope_dim is not None, Configuration(INTERPRETER, 1)))


@lru_cache(maxsize=256)
def _forward_plan(setting: Setting, save: bool, keep: int = 0) -> Plan:
    from trmfast.kernels.forward_plan import forward_plan

    return forward_plan(setting, save, keep).packed()


@lru_cache(maxsize=256)
def _backward_plan(
    setting: Setting, needs_states: tuple[bool, ...], needs_x: bool, needs_weights: tuple[bool, ...], keep: int = 0
) -> BackwardPlan:
    from trmfast.kernels.backward_plan import backward_plan

    found = backward_plan(setting, needs_states, needs_x, needs_weights, keep)
    return replace(found, plan=found.plan.packed())


# ---------------------------------------------------------------- execution

_graphs = Graphs()


def _run(
    key: tuple[Any, ...], plan: Plan, inputs: Mapping[str, Tensor], into: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Runs the plan of a key; returns its outputs by name, in tensors of their own or in those of ``into``."""
    device, into = next(iter(inputs.values())).device, into or {}
    if device.type != "cuda":
        return _run_eagerly(plan, inputs, into, device)
    with torch.cuda.device(device):
        # While the caller captures a graph, the launches become part of it.
        if not torch.cuda.is_current_stream_capturing():
            graph = _graphs.get(key, plan, device, key[0].configuration.gpu)
            results = None if graph is None else graph(inputs, into)
            if results is not None:
                return results
        return _run_eagerly(plan, inputs, into, device)


def _run_eagerly(
    plan: Plan, inputs: Mapping[str, Tensor], into: Mapping[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    """Kernel by kernel on the current stream, over the caller's tensors and new ones."""
    from trmfast.kernels.plan import run

    tensors = {**allocate(plan, device, skip=[*inputs, *into]), **into}
    changed = {buffer.name for launch in plan for buffer in launch.buffers(launch.writes)}
    for buffer in plan.inputs:
        given = inputs[buffer.name]
        fits = given.dtype == buffer.dtype and given.shape == buffer.shape and given.is_contiguous()
        if fits and buffer.name not in changed:
            tensors[buffer.name] = given
        else:
            tensors[buffer.name] = new_input(buffer, device)
            fill(tensors[buffer.name], given)
    run(plan, tensors)
    return {buffer.name: buffer.of(tensors[buffer.name]) for buffer in plan.outputs}


def release_memory() -> None:
    """Frees the graphs and their buffers; later calls make them again."""
    _graphs.clear()
