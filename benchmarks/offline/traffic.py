"""Memory traffic of eager PyTorch, and kernels of compiled PyTorch, counted without a GPU.

Both follow the convention of ``Launch.nbytes``: an operation reads each operand once and
writes each result once.  A view moves nothing.  Only the recursion is counted, without embeddings, heads and losses.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trmfast.cases import Case, make_inputs
from trmfast.reference import run_program

__all__ = ["CompiledKernels", "Traffic", "TrafficCounter", "bytes_touched", "compiled_kernels", "count_traffic"]


def bytes_touched(tensor: Tensor) -> int:
    """Bytes of the distinct elements of a tensor: an expanded axis is one element long."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count * tensor.element_size()


@dataclass
class Traffic:
    """The traffic of operations.

    Attributes:
        read, written: bytes.
        operations: number of operations that touch data: at least one kernel launch each.
        by_operation: bytes read and written by the name of the operation.
    """

    read: int
    written: int
    operations: int
    by_operation: Counter[str]

    @property
    def nbytes(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


class TrafficCounter(TorchDispatchMode):
    """Counts every operation that runs inside the ``with`` block, those of backward too.

    Attributes:
        traffic: what was counted so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic(0, 0, 0, Counter())

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        operands = _tensors((args, kwargs))
        results = _tensors(out)
        storages = {t.untyped_storage().data_ptr() for t in operands if t.numel()}
        fresh = [t for t in results if t.untyped_storage().data_ptr() not in storages]
        changed = _changed(func, args, kwargs or {})
        if not fresh and not changed:
            return out  # a view
        name = func.overloadpacket.__name__
        if name in _ALLOCATIONS:
            return out
        overwritten = {id(t) for t in changed} if name in _OVERWRITES else set()
        read = sum(bytes_touched(t) for t in operands if id(t) not in overwritten)
        written = sum(map(bytes_touched, (*fresh, *changed)))
        self.traffic.read += read
        self.traffic.written += written
        self.traffic.operations += 1
        self.traffic.by_operation[name] += read + written
        return out


_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_OVERWRITES = {"copy_", "fill_", "zero_"}


def _tensors(tree: Any) -> list[Tensor]:
    """The distinct tensors of a nest of arguments."""
    return list({id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}.values())


def _changed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operation writes in place."""
    if not func._schema.is_mutable:
        return []
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[i] if i < len(args) else kwargs.get(argument.name))
    return _tensors(found)


def count_traffic(run: Callable[[], object]) -> Traffic:
    """The traffic of a function."""
    with TrafficCounter() as counter:
        run()
    return counter.traffic


# ---------------------------------------------------------------- compiled PyTorch


@dataclass(frozen=True)
class CompiledKernels:
    """The calls that Inductor generates for a function, forward and backward together.

    Attributes:
        generated: calls of kernels that it generated.
        library: calls of library functions (matrix products, attention), each at least one kernel launch.
    """

    generated: int
    library: int

    @property
    def launches(self) -> int:
        """The least number of kernel launches."""
        return self.generated + self.library


_GENERATED = re.compile(r"^\s+(?:cpp_fused\w*|triton_\w+\.run)\(", re.MULTILINE)
_LIBRARY = re.compile(r"^\s+(?:\w+ = )?(?:extern_kernels\.|torch\.ops\.)\w[\w.]*\(", re.MULTILINE)


def compiled_kernels(run: Callable[[Callable[..., Any]], object], function: Callable[..., Any]) -> CompiledKernels:
    """Counts the calls in the code that torch.compile generates, without compiling that code.

    Inductor partitions, fuses and writes its output as usual, for CPU tensors; then the captured graph itself runs.
    The scheduler that decides on fusion is shared with GPUs, so the count stands for theirs.

    Args:
        run: calls the function that it is given, and differentiates if that is to be counted.
        function: what torch.compile gets.
    """
    codes: list[str] = []

    class NoModule:
        __file__ = ""

        @staticmethod
        def call(_: list[Any]) -> None:
            return None

    def keep_code(graph: GraphLowering) -> NoModule:
        code, _ = graph.codegen()
        codes.append(str(getattr(code, "value", code)))
        return NoModule()

    def compile_graph(graph: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        with patch.object(GraphLowering, "compile_to_module", keep_code):
            compile_fx_inner(graph, inputs, **options)
        return make_boxed_func(graph.forward)

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        return compile_fx(graph, inputs, inner_compile=compile_graph)

    torch.compiler.reset()
    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        run(torch.compile(function, dynamic=False, backend=backend))
    torch.compiler.reset()
    calls = [code[code.index("def call(") :] for code in codes]
    return CompiledKernels(
        sum(len(_GENERATED.findall(call)) for call in calls), sum(len(_LIBRARY.findall(call)) for call in calls)
    )


# ---------------------------------------------------------------- supervision steps


@dataclass(frozen=True)
class Eager:
    """Bytes of eager PyTorch: a constant plus a share per sequence."""

    constant: int
    sequence: int

    def nbytes(self, batch: int) -> int:
        """Bytes for a batch."""
        return self.constant + batch * self.sequence


def forward_of(case: Case) -> Callable[[], object]:
    """One supervision step forward in plain PyTorch, without gradients."""
    inputs = make_inputs(case, torch.bfloat16)

    def run() -> object:
        with torch.no_grad():
            return run_program(inputs.problem, inputs.states, inputs.x, inputs.weights, inputs.cos, inputs.sin)

    return run


def training_of(case: Case) -> Callable[[], object]:
    """The same with gradients of x and all weights, from the gradient of the first state, on which the heads sit."""
    inputs = make_inputs(case, torch.bfloat16)
    weights = [weight.requires_grad_() for weight in inputs.weights]
    x = None if inputs.x is None else inputs.x.clone().requires_grad_()

    def run() -> None:
        out = run_program(inputs.problem, inputs.states, x, weights, inputs.cos, inputs.sin)
        out[0].backward(inputs.grad_states[0])

    return run


def eager_traffic(case: Case, step: Callable[[Case], Callable[[], object]]) -> Eager:
    """Counts one and two sequences: every operation's operands are constant or grow with the batch."""
    one, two = (count_traffic(step(replace(case, batch=batch))).nbytes for batch in (1, 2))
    return Eager(2 * one - two, two - one)


def compiled_launches(case: Case) -> dict[str, int]:
    """Kernel launches of compiled PyTorch at least, for the whole recursion as one graph."""
    inputs = make_inputs(replace(case, batch=1), torch.bfloat16)
    weights = [weight.requires_grad_() for weight in inputs.weights]

    def function(states: Sequence[Tensor], x: Tensor | None, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return run_program(inputs.problem, states, x, weights, inputs.cos, inputs.sin)

    def forward(compiled: Callable[..., Any]) -> None:
        with torch.no_grad():
            compiled(inputs.states, inputs.x, weights)

    def training(compiled: Callable[..., Any]) -> None:
        x = None if inputs.x is None else inputs.x.clone().requires_grad_()
        compiled(inputs.states, x, weights)[0].backward(inputs.grad_states[0])

    return {
        "forward": compiled_kernels(forward, function).launches,
        "training": compiled_kernels(training, function).launches,
    }
