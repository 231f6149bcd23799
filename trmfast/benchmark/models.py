"""Published models as one more kind of work: a supervision step with embeddings, heads and loss, on real puzzles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from trmfast.benchmark import gpu, memory
from trmfast.benchmark.configs import BenchConfig
from trmfast.benchmark.eager import EagerInner
from trmfast.benchmark.errors import check_model
from trmfast.benchmark.measure import Prepared, Runs, build, count_flops
from trmfast.benchmark.rivals import descend, implementation_of, is_ours, title_of
from trmfast.benchmark.suites import BOTH, Work
from trmfast.budget import Recompute
from trmfast.cases import Case
from trmfast.models import ACTLossHead, ACTModel
from trmfast.nn import Net
from trmfast.problem import Problem

__all__ = ["prepare_model"]


class ModelRunner:
    """One implementation of a model, with its own copy of the weights.

    Args:
        name: as in :func:`trmfast.benchmark.rivals.title_of`.
        model: the model.
        batch: its input.
    """

    note = ""
    keeps_memory = False

    def __init__(self, name: str, model: ACTModel, batch: dict[str, Tensor]) -> None:
        self.title, self.model, self.batch = title_of(name), model, batch
        # Forward does not depend on what training recomputes.
        self.steps: tuple[str, ...] = ("training",) if is_ours(name) and name != "trmfast" else BOTH
        self.head = ACTLossHead(model, "stablemax_cross_entropy")
        self.carry = model.initial_carry(batch)
        inner = model.inner
        self.graphs = isinstance(inner, EagerInner) and inner.stacks.graphs

    def forward(self) -> None:
        """One supervision step without gradients."""
        self._begin()
        with torch.no_grad():
            self.model.eval()(carry=self.carry, batch=self.batch)

    def training(self) -> None:
        """One supervision step, its loss and the gradients of all parameters."""
        self._begin()
        self.head.train().zero_grad(set_to_none=True)
        self.loss().backward()

    def _begin(self) -> None:
        """Graphs of torch.compile overwrite what the step before returned, gradients too."""
        if self.graphs:
            self.head.zero_grad(set_to_none=True)
            torch.compiler.cudagraph_mark_step_begin()

    def loss(self) -> Tensor:
        """The loss of one supervision step."""
        return cast(Tensor, self.head.train()([], carry=self.carry, batch=self.batch)[1])

    def change_weights(self) -> None:
        """A small gradient descent step, so that no training step sees the same weights twice."""
        descend(self.model.parameters(), 1e-6)

    def saved_bytes(self) -> int:
        """Bytes of activations that autograd keeps for backward."""
        return memory.saved_bytes(self.loss, self.model.parameters(), self.model.buffers())


def prepare_model(
    config: BenchConfig,
    say: Callable[[str], None],
    *,
    compile_scope: str | None,
    overrides: dict[str, Any],
    peak_dtype: torch.dtype,
    batch: int | None = None,
    check: tuple[int, int] | None = None,
    settings: Sequence[Recompute] = (),
    device: str = "cpu",
) -> Prepared:
    """Builds a model for every implementation, all of the same weights, and checks them.

    Args:
        config: the model.
        say: called with what is being done.
        compile_scope: ``"network"``, ``"recursion"`` or None for no torch.compile.
        overrides: configuration keys to change, for tests.
        peak_dtype: whose matrix peak rates are compared with.
        batch: sequences, or None for the configuration's own number.
        check: (H_cycles, L_cycles) of the accuracy check, None for the configuration's own.
        settings: of ``recompute``, with which training is measured too.
        device: where it runs, ``"cpu"`` or ``"cuda"``; there torch.compile makes CUDA graphs.

    Raises:
        ModuleNotFoundError: the configuration's puzzles come with a package that is not installed.
    """
    torch.compiler.reset()
    rows = batch or config.batch
    place = torch.device(device) if device == "cpu" else gpu.current()
    inputs = {name: tensor.to(place) for name, tensor in config.inputs(rows).items()}
    torch.manual_seed(0)
    fused = config.model(rows, True, overrides)
    models = {"eager": config.model(rows, False, overrides)}
    if compile_scope is not None:
        models["compile"] = config.model(rows, False, overrides)
        cast(EagerInner, models["compile"].inner).stacks.compile(compile_scope, graphs=device != "cpu")
    models["trmfast"] = fused
    for recompute in settings:
        models[implementation_of(recompute)] = config.model(rows, True, {**overrides, "recompute": recompute})
    makers: dict[str, tuple[str, Callable[[], Runs]]] = {}
    for name, model in models.items():
        model.load_state_dict(fused.state_dict())
        makers[name] = title_of(name), partial(ModelRunner, name, model, inputs)
    for model in models.values():
        model.to(place)
    built, remarks = build(config.title, makers, BOTH, say, ("eager", *filter(is_ours, models)), device)
    if "compile" in built:
        remarks.append(f"{config.title}: torch.compile took {built['compile'].seconds:.0f} s to compile")
    say(f"{config.title}: accuracy")
    models = {name: model for name, model in models.items() if name in built}
    for cycles in (config.check or check, (1, 2), (1, 1)):
        checks = check_model(models, inputs, cycles)
        # If eager PyTorch itself is far off, judge fewer cycles.
        if all(checks[step]["trmfast"].judged for step in BOTH):
            break
    if cycles is not None:
        remarks.append(f"{config.title}: errors are those of H_cycles {cycles[0]}, L_cycles {cycles[1]}")
    nets = [cast(Net, getattr(fused.inner, name)) for name in fused.inner.net_names]
    problem, length = Problem(fused.inner.program, tuple(net.spec for net in nets)), fused.config.total_len
    # HRM's training runs the recursion a second time, for the target of its q head.
    flops = count_flops(problem, rows, length, forwards=1 if fused.config.no_ACT_continue else 2)
    case = Case(config.name, problem, rows, length, fused.config.uses_rope)
    work = Work(case, torch.bfloat16, BOTH, tuple(name for name in built if not is_ours(name)), device)
    return Prepared(work, built, checks, flops, remarks, peak_dtype)
