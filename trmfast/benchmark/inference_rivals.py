"""Rivals for inference alone, with the weights frozen: torch.compile tuned, OpenVINO and ONNX Runtime."""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from trmfast.benchmark.eager import EagerRecursion, Stack, apply_updates, with_own_code
from trmfast.benchmark.runner import Runner, rope_tables
from trmfast.cases import Inputs
from trmfast.program import RecursionProgram

__all__ = ["MaxAutotune", "OnnxRuntime", "OpenVino"]

# Above this many blocks OpenVINO would take minutes over the whole recursion; it then gets one network.
MOST_BLOCKS = 64


class _ByNetwork(Runner):
    """Inference with each network as a function of h [B, L, D]; PyTorch sums the states."""

    wide = False
    """Whether h is float32 whatever the compute dtype."""

    def __init__(self, inputs: Inputs, threads: int) -> None:
        super().__init__(inputs, threads)
        dtype = torch.float32 if self.wide else inputs.states[0].dtype
        self.states = [state.to(dtype) for state in inputs.states]
        self.x = None if inputs.x is None else inputs.x.to(dtype)
        model = EagerRecursion(inputs.problem, inputs.weights, rope_tables(inputs)).eval().requires_grad_(False)
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
