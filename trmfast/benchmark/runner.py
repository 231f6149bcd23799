"""What every implementation of a recursion has in common, for the benchmarks: forward, and training by autograd."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from trmfast.benchmark.memory import saved_bytes
from trmfast.cases import Inputs
from trmfast.program import RecursionProgram

__all__ = ["Runner", "Trained", "descend", "rope_tables"]


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


def rope_tables(inputs: Inputs) -> tuple[Tensor, Tensor] | None:
    """cos and sin of a recursion, None where nothing is rotated."""
    return None if inputs.cos is None or inputs.sin is None else (inputs.cos, inputs.sin)
