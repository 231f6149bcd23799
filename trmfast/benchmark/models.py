"""Published models as one more kind of work: a supervision step with embeddings, heads and loss, on real puzzles."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from trmfast.benchmark import memory
from trmfast.benchmark.accuracy import measure_accuracy
from trmfast.benchmark.configs import BenchConfig
from trmfast.benchmark.errors import Check
from trmfast.benchmark.recursions import Built, Prepared
from trmfast.benchmark.rivals import TITLES
from trmfast.benchmark.suites import BOTH, Work
from trmfast.cases import Case
from trmfast.flops import forward_flops, window_flops
from trmfast.models import ACTLossHead, ACTModel
from trmfast.nn import Net
from trmfast.problem import Problem

__all__ = ["Settings", "prepare_model"]


@dataclass(frozen=True)
class Settings:
    """How a model is built and checked.

    Attributes:
        compile_scope: ``"network"``, ``"recursion"`` or None for no torch.compile.
        overrides: configuration keys to change, for tests.
        batch: sequences, or None for the configuration's own number.
        check: (H_cycles, L_cycles) of the accuracy check, None for the configuration's own.
        keep: whether training is measured with ``recompute=False`` too.
        peak_dtype: whose matrix peak rates are compared with.
    """

    compile_scope: str | None
    overrides: dict[str, Any]
    peak_dtype: torch.dtype
    batch: int | None = None
    check: tuple[int, int] | None = None
    keep: bool = False


class ModelRunner:
    """One implementation of a model, with its own copy of the weights.

    Args:
        name: a name in :data:`trmfast.benchmark.rivals.TITLES`.
        model: the model.
        batch: its input.
    """

    note = ""
    keeps_memory = False

    def __init__(self, name: str, model: ACTModel, batch: dict[str, Tensor]) -> None:
        self.title, self.model, self.batch = TITLES[name], model, batch
        # Forward does not depend on whether training recomputes.
        self.steps: tuple[str, ...] = ("training",) if name == "kept" else BOTH
        self.head = ACTLossHead(model, "stablemax_cross_entropy")
        self.carry = model.initial_carry(batch)

    def forward(self) -> None:
        """One supervision step without gradients."""
        with torch.no_grad():
            self.model.eval()(carry=self.carry, batch=self.batch)

    def training(self) -> None:
        """One supervision step, its loss and the gradients of all parameters."""
        self.head.train().zero_grad(set_to_none=True)
        self.loss().backward()

    def loss(self) -> Tensor:
        """The loss of one supervision step."""
        return cast(Tensor, self.head.train()([], carry=self.carry, batch=self.batch)[1])

    def change_weights(self) -> None:
        """A small gradient descent step, so that no training step sees the same weights twice."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-1e-6)

    def saved_bytes(self) -> int:
        """Bytes of activations that autograd keeps for backward."""
        return memory.saved_bytes(self.loss, self.model.parameters(), self.model.buffers())


def prepare_model(config: BenchConfig, settings: Settings, say: Callable[[str], None]) -> Prepared:
    """Builds a model for every implementation, all of the same weights, and checks them.

    Args:
        config, settings: what and how.
        say: called with what is being done.

    Raises:
        ModuleNotFoundError: the configuration's puzzles come with a package that is not installed.
    """
    torch.compiler.reset()
    say(f"{config.title}: models")
    rows = settings.batch or config.batch
    batch = config.inputs(rows)
    torch.manual_seed(0)
    fused = config.model(rows, True, settings.overrides)
    models = {"eager": config.model(rows, False, settings.overrides)}
    if settings.compile_scope is not None:
        models["compile"] = config.model(rows, False, settings.overrides)
    models["trmfast"] = fused
    if settings.keep:
        models["kept"] = config.model(rows, True, {**settings.overrides, "recompute": False})
    for model in models.values():
        model.load_state_dict(fused.state_dict())
    remarks: list[str] = []
    built: dict[str, Built] = {}
    for name, model in list(models.items()):
        if name == "compile":
            say(f"{config.title}: torch.compile")
            cast(Any, model.inner).compile(settings.compile_scope)
        runner, start = ModelRunner(name, model, batch), time.perf_counter()
        try:
            for _ in range(2 if name == "compile" else 1):
                for step in runner.steps:
                    getattr(runner, step)()
        except Exception as error:  # any compiler failure; the others can still be compared
            if name != "compile":
                raise
            text = (str(error).splitlines() or [""])[0]
            remarks.append(f"{config.title}: no torch.compile: {type(error).__name__}: {text[:160]}")
            del models[name]
            continue
        built[name] = Built(runner, time.perf_counter() - start)
        if name == "compile":
            remarks.append(f"{config.title}: torch.compile took {built[name].seconds:.0f} s to compile")
    say(f"{config.title}: accuracy")
    for cycles in (config.check or settings.check, (1, 2), (1, 1)):
        accuracy = measure_accuracy(models, batch, cycles)
        # If eager PyTorch itself is far off, judge fewer cycles.
        if accuracy["trmfast"].judged:
            break
    if cycles is not None:
        remarks.append(f"{config.title}: errors are those of H_cycles {cycles[0]}, L_cycles {cycles[1]}")
    nets = [cast(Net, getattr(fused.inner, name)) for name, _ in fused.inner.family.nets]
    problem, length = Problem(fused.inner.program, tuple(net.spec for net in nets)), fused.config.total_len
    checked = len(problem.program.updates) if cycles is None else cycles[0] * (cycles[1] + 1)
    checks = {
        "forward": {name: Check(found.logits, checked, found.verdict) for name, found in accuracy.items()},
        "training": {name: Check(found.gradients, checked, found.verdict) for name, found in accuracy.items()},
    }
    # HRM's training runs the recursion a second time, for the target of its q head.
    passes = 1 if fused.config.no_ACT_continue else 2
    forward = forward_flops(problem, rows, length)
    flops = {"forward": forward, "training": passes * forward + 2 * window_flops(problem, rows, length)}
    case = Case(config.name, problem, rows, length, fused.config.uses_rope)
    work = Work(case, torch.bfloat16, BOTH, tuple(name for name in built if name not in ("trmfast", "kept")))
    return Prepared(work, built, checks, flops, remarks, settings.peak_dtype)
