"""What a user could run a recursion with: eager PyTorch, compilers, inference engines, and trmfast.

All get the same states, x and float32 weights.  All run any program over their networks, except OpenVINO when it
compiles the whole recursion as one graph.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from trmfast.benchmark.eager import EagerRecursion, Stack, apply_updates, with_own_code
from trmfast.benchmark.memory import saved_bytes
from trmfast.budget import DEFAULT, Recompute
from trmfast.cases import Inputs
from trmfast.ops import recursion
from trmfast.program import RecursionProgram

__all__ = [
    "RIVALS",
    "TITLES",
    "Fused",
    "Runner",
    "Trained",
    "descend",
    "implementation_of",
    "in_order",
    "is_ours",
    "missing",
    "runner_of",
    "title_of",
]

# Above this many blocks OpenVINO would take minutes over the whole recursion; it then gets one network.
MOST_BLOCKS = 64


class Runner(ABC):
    """One implementation of one recursion, with its own copy of the weights.

    Args:
        inputs: states and x in the compute dtype, float32 weights.
        threads: how many it may use.
    """

    title: str
    steps: tuple[str, ...] = ("forward",)
    """What is timed of it."""
    device_types: tuple[str, ...] = ("cpu", "cuda")
    """Where it runs."""
    modules: tuple[str, ...] = ()
    """Packages that it needs."""
    keeps_memory = False
    """Whether it keeps weights and buffers of its own between calls, outside PyTorch."""

    def __init__(self, inputs: Inputs, threads: int) -> None:
        self.inputs = inputs
        self.program = inputs.problem.program
        self.threads = threads
        self.note = ""
        """How it was run, for the reader."""

    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    """What it computes in."""

    @abstractmethod
    def forward(self, program: RecursionProgram | None = None) -> Sequence[Tensor]:
        """The final states, without gradients; ``program``: another one over the same networks."""

    def training(self, program: RecursionProgram | None = None) -> None:
        """Forward, and backward from the gradients of the final states into x and the weights."""
        raise NotImplementedError(f"{self.title} does not train")

    def change_weights(self) -> None:  # noqa: B027  # nothing to change without training
        """Called before each training step, so that none sees the same weights twice."""

    def saved_bytes(self) -> int | None:
        """Bytes of activations that autograd keeps for backward; None without autograd."""
        return None

    def runs(self, program: RecursionProgram) -> bool:
        """Whether it can run another program than that of the inputs."""
        return True


class Trained(Runner):
    """What autograd differentiates."""

    steps: tuple[str, ...] = ("forward", "training")

    def __init__(self, inputs: Inputs, threads: int) -> None:
        super().__init__(inputs, threads)
        self.x = None if inputs.x is None else inputs.x.detach().clone().requires_grad_()
        self.weights: list[nn.Parameter] = []

    @abstractmethod
    def recur(self, x: Tensor | None, program: RecursionProgram) -> Sequence[Tensor]:
        """The final states."""

    def forward(self, program: RecursionProgram | None = None) -> Sequence[Tensor]:
        with torch.no_grad():
            return self.recur(self.inputs.x, program or self.program)

    def outputs(self, program: RecursionProgram | None = None) -> list[tuple[Tensor, Tensor]]:
        """The first half of a training step: final states that gradients reach, each with its gradient."""
        out = self.recur(self.x, program or self.program)
        return [(z, g) for z, g in zip(out, self.inputs.grad_states, strict=True) if z.requires_grad]

    def training(self, program: RecursionProgram | None = None) -> None:
        self.drop_gradients()
        states, gradients = zip(*self.outputs(program), strict=True)
        torch.autograd.backward(states, gradients)

    def drop_gradients(self) -> None:
        """Those of the last training step."""
        for leaf in (self.x, *self.weights):
            if leaf is not None:
                leaf.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of x and the weights, of the last training step; zeros where none came."""
        leaves = {f"grad {name}": w for name, w in zip(self.inputs.problem.weight_names, self.weights, strict=True)}
        found = {} if self.x is None else {"grad x": self.x}
        found |= cast(dict[str, Tensor], leaves)
        return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in found.items()}

    def saved_bytes(self) -> int | None:
        return saved_bytes(self.outputs, self.weights)

    def change_weights(self) -> None:
        descend(self.weights, 1e-9)


def descend(weights: Iterable[Tensor], rate: float) -> None:
    """A tiny step of gradient descent, so that no training step sees the weights of the one before."""
    with torch.no_grad():
        for weight in weights:
            if weight.grad is not None:
                weight.add_(weight.grad, alpha=-rate)


class Fused(Trained):
    title = "trmfast"
    recompute: Recompute = DEFAULT

    def __init__(self, inputs: Inputs, threads: int) -> None:
        super().__init__(inputs, threads)
        self.weights = [nn.Parameter(weight.clone()) for weight in inputs.weights]

    def recur(self, x: Tensor | None, program: RecursionProgram) -> Sequence[Tensor]:
        i = self.inputs
        return recursion(program, i.problem.nets, i.states, x, self.weights, i.cos, i.sin, recompute=self.recompute)


class FusedInt8(Fused):
    """trmfast where the work is int8: inference alone."""

    steps = ("forward",)
    dtypes = (torch.int8,)

    def recur(self, x: Tensor | None, program: RecursionProgram) -> Sequence[Tensor]:
        i = self.inputs
        return recursion(program, i.problem.nets, i.states, x, self.weights, i.cos, i.sin, dtype="int8")


class FusedBf16(Fused):
    """What int8 is compared with: the same states with bf16 operands."""

    title = "trmfast bf16"
    steps = ("forward",)
    dtypes = (torch.int8,)


class Eager(Trained):
    title = "PyTorch eager"

    def __init__(self, inputs: Inputs, threads: int) -> None:
        super().__init__(inputs, threads)
        self.model = EagerRecursion(inputs.problem, inputs.weights, _tables(inputs))
        self.weights = list(self.model.parameters())

    def recur(self, x: Tensor | None, program: RecursionProgram) -> Sequence[Tensor]:
        return cast(Sequence[Tensor], self.model(self.inputs.states, x, program))


class Compiled(Eager):
    """Each network compiled, its weights cast once a step; on a GPU as CUDA graphs."""

    title = "torch.compile"

    def __init__(self, inputs: Inputs, threads: int) -> None:
        super().__init__(inputs, threads)
        self.graphs = inputs.states[0].is_cuda
        self.model.stacks.compile("network", self.graphs)
        self.note = "network by network, CUDA graphs" if self.graphs else "network by network"

    def recur(self, x: Tensor | None, program: RecursionProgram) -> Sequence[Tensor]:
        if not self.graphs:
            return super().recur(x, program)
        torch.compiler.cudagraph_mark_step_begin()
        return [state.clone() for state in super().recur(x, program)]  # graphs overwrite what they returned

    def forward(self, program: RecursionProgram | None = None) -> Sequence[Tensor]:
        if self.graphs:
            self.drop_gradients()  # they lie in memory of the graphs
        return super().forward(program)


class _ByNetwork(Runner):
    """Inference with each network as a function of h [B, L, D]; PyTorch sums the states."""

    wide = False
    """Whether h is float32 whatever the compute dtype."""

    def __init__(self, inputs: Inputs, threads: int) -> None:
        super().__init__(inputs, threads)
        dtype = torch.float32 if self.wide else inputs.states[0].dtype
        self.states = [state.to(dtype) for state in inputs.states]
        self.x = None if inputs.x is None else inputs.x.to(dtype)
        model = EagerRecursion(inputs.problem, inputs.weights, _tables(inputs)).eval().requires_grad_(False)
        self.nets = [_Network(net, model.cos_sin) for net in model.stacks.nets]
        self.functions: list[Callable[[Tensor], Tensor]] = []

    def forward(self, program: RecursionProgram | None = None) -> Sequence[Tensor]:
        with torch.no_grad():
            return apply_updates(
                program or self.program, lambda index, h, _: self.functions[index](h), self.states, self.x, None
            )


class _Network(nn.Module):
    """A network with its tables, as a function of h alone."""

    def __init__(self, net: Stack, cos_sin: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self.net = net
        self.cos_sin = cos_sin

    def forward(self, h: Tensor) -> Tensor:
        return cast(Tensor, self.net(h, self.cos_sin))


def _function_of(network: nn.Module) -> Callable[[Tensor], Tensor]:
    def run(h: Tensor) -> Tensor:
        return cast(Tensor, network(h))

    return with_own_code(run)


class MaxAutotune(_ByNetwork):
    """Weights frozen in the compute dtype, so that the compiler folds and packs them."""

    title = "torch.compile max-autotune"

    def __init__(self, inputs: Inputs, threads: int) -> None:
        super().__init__(inputs, threads)
        import torch._inductor.config
        import torch._inductor.select_algorithm

        torch._inductor.select_algorithm.PRINT_AUTOTUNE = False
        dtype = inputs.states[0].dtype
        for net in self.nets:
            frozen = copy.deepcopy(net).eval()
            for parameter in frozen.parameters():
                parameter.data = parameter.data.to(dtype)
            compiled = torch.compile(_function_of(frozen), mode="max-autotune", dynamic=False)
            quiet = {"freezing": True, "max_autotune_report_choices_stats": False}
            with torch.no_grad(), torch._inductor.config.patch(quiet):
                compiled(self.states[0])
            self.functions.append(compiled)
        self.note = "network by network, weights frozen"

    def forward(self, program: RecursionProgram | None = None) -> Sequence[Tensor]:
        import torch._inductor.config

        graphs = self.states[0].is_cuda
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with torch._inductor.config.patch(freezing=True):  # a guard of the compiled code
            found = super().forward(program)
        return [state.clone() for state in found] if graphs else found


class OpenVino(_ByNetwork):
    """The recursion as one graph, or its network where that is too large; float32 outside, the compute dtype inside."""

    title = "OpenVINO"
    device_types = ("cpu",)
    modules = ("openvino",)
    keeps_memory = True
    wide = True

    def __init__(self, inputs: Inputs, threads: int) -> None:
        super().__init__(inputs, threads)
        import openvino

        precision = {torch.bfloat16: "bf16", torch.float32: "f32"}[inputs.states[0].dtype]
        options = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        core = openvino.Core()

        def compiled(module: nn.Module, arguments: Sequence[Tensor]) -> Any:
            shapes = [list(argument.shape) for argument in arguments]
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                model = openvino.convert_model(module, example_input=tuple(arguments), input=shapes)
            return core.compile_model(model, "CPU", options).create_infer_request()

        blocks = sum(inputs.problem.nets[update.net].num_layers for update in self.program.updates)
        self.whole: Any = None
        if blocks <= MOST_BLOCKS:
            self.arguments = [*self.states, *([] if self.x is None else [self.x])]
            self.whole = compiled(_Whole(self), self.arguments)
            self.note = f"{precision}, one graph"
        else:
            self.functions = [_infer(compiled(net, [self.states[0]])) for net in self.nets]
            self.note = f"{precision}, network by network ({blocks} blocks would take minutes to compile)"

    def runs(self, program: RecursionProgram) -> bool:
        return self.whole is None or program == self.program

    def forward(self, program: RecursionProgram | None = None) -> Sequence[Tensor]:
        if self.whole is None:
            return super().forward(program)
        found = self.whole.infer([argument.numpy() for argument in self.arguments], share_inputs=True)
        return [torch.from_numpy(found[index]) for index in range(len(self.states))]


class _Whole(nn.Module):
    """A recursion as a function of states and x."""

    def __init__(self, runner: _ByNetwork) -> None:
        super().__init__()
        self.program = runner.program
        self.count = len(runner.states)
        self.nets = nn.ModuleList(runner.nets)

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        x = arguments[self.count] if len(arguments) > self.count else None
        return tuple(apply_updates(self.program, lambda i, h, _: self.nets[i](h), arguments[: self.count], x, None))


def _infer(request: Any) -> Callable[[Tensor], Tensor]:
    def run(h: Tensor) -> Tensor:
        request.infer([h.contiguous().numpy()], share_inputs=True)
        return torch.from_numpy(request.get_output_tensor(0).data.copy())

    return run


class OnnxRuntime(_ByNetwork):
    """Its kernels for CPUs compute in float32."""

    title = "ONNX Runtime"
    device_types = ("cpu",)
    modules = ("onnxruntime", "onnx", "onnxscript")
    dtypes = (torch.float32,)
    keeps_memory = True
    wide = True

    def __init__(self, inputs: Inputs, threads: int) -> None:
        super().__init__(inputs, threads)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Waiting threads of one rival must not take cores from the next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        exporter = logging.getLogger("torch.onnx")
        level = exporter.level
        for net in self.nets:
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                exporter.setLevel(logging.ERROR)
                path = Path(folder) / "net.onnx"
                torch.onnx.export(
                    net,
                    (self.states[0],),
                    path,
                    dynamo=True,
                    external_data=False,
                    input_names=["h"],
                    output_names=["out"],
                    verbose=False,
                )
                exporter.setLevel(level)
                session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            self.functions.append(_session(session))
        self.note = "network by network"


def _session(session: Any) -> Callable[[Tensor], Tensor]:
    return lambda h: torch.from_numpy(session.run(None, {"h": h.contiguous().numpy()})[0])


def _tables(inputs: Inputs) -> tuple[Tensor, Tensor] | None:
    return None if inputs.cos is None or inputs.sin is None else (inputs.cos, inputs.sin)


RIVALS: dict[str, type[Runner]] = {
    "eager": Eager,
    "compile": Compiled,
    "max-autotune": MaxAutotune,
    "openvino": OpenVino,
    "onnxruntime": OnnxRuntime,
    "trmfast-bf16": FusedBf16,
    "trmfast": Fused,
}
"""Implementations of a recursion by name, trmfast the last."""

TITLES = {name: kind.title for name, kind in RIVALS.items()}
"""What tables and charts call an implementation, in their order; see :func:`title_of`."""

_SETTING = "recompute="


def implementation_of(recompute: Recompute) -> str:
    """The name of trmfast with a setting of ``recompute`` other than the default."""
    return f"{_SETTING}{recompute}"


def is_ours(name: str) -> bool:
    """Whether an implementation is trmfast, with whatever setting, and no rival."""
    return name == "trmfast" or name.startswith(_SETTING)


def title_of(name: str) -> str:
    """What tables and charts call an implementation."""
    return f"trmfast, {name}" if name.startswith(_SETTING) else TITLES[name]


def in_order(names: Collection[str]) -> list[str]:
    """Implementations in the order of tables and charts: trmfast and its settings last."""
    return [*(name for name in TITLES if name in names), *(name for name in names if name not in TITLES)]


def runner_of(name: str, dtype: torch.dtype) -> type[Runner]:
    """The implementation of that name, in a dtype of products."""
    return FusedInt8 if (name, dtype) == ("trmfast", torch.int8) else RIVALS[name]


def missing(name: str, dtype: torch.dtype, device: str = "cpu") -> str | None:
    """None, or why an implementation does not run in a dtype on a device here."""
    kind = runner_of(name, dtype)
    if device not in kind.device_types:
        return f"it runs on {', '.join(kind.device_types)}, not on {device}"
    absent = [module for module in kind.modules if find_spec(module) is None]
    if absent:
        return f"{', '.join(absent)} not installed, `pip install 'trmfast[rivals]'` installs it"
    if dtype not in kind.dtypes:
        return f"it computes in {', '.join(str(d).removeprefix('torch.') for d in kind.dtypes)}"
    return None
