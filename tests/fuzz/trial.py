"""One problem of the fuzzer: plain data, from which programs, networks and tensors follow.

The defaults are the simplest values; the minimiser moves towards them, and a printed trial names only what differs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from trmfast.cases import PROGRAMS, Case, Inputs, make_inputs
from trmfast.problem import Problem
from trmfast.program import RecursionProgram, Update
from trmfast.spec import NOT_FOR_MLP_T, BlockSpec, NetSpec
from trmfast.testing import Result, run_eager, run_truth

__all__ = ["GROUPS", "Trial", "Update_", "make_program", "references", "tensors_of"]

# dst, sources, inject_x, net, grad
Update_: TypeAlias = tuple[int, tuple[int, ...], bool, int, bool]
# The arguments of a constructor (("trm", H_cycles, L_cycles, window)), or the updates themselves.
Program: TypeAlias = tuple[Any, ...]

GROUPS = ("states", "x", "weights", "grads", "tables")


class _Plain:
    """Prints the fields that differ from their defaults: a line that can be pasted."""

    def __repr__(self) -> str:
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)  # type: ignore[arg-type]
            if getattr(self, field.name) != field.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True, repr=False)
class Trial(_Plain):
    """A recursion and its tensors.

    Attributes:
        program: a constructor and its arguments, or updates ``(dst, sources, inject_x, net, grad)``.
        hidden_size, intermediate_size, token_mixer, channel_mixer, num_heads, num_kv_heads, head_dim, causal,
            seq_intermediate_size, conv_kernel, rms_norm_eps, norm_placement, norm_weight, rotation, qk_norm, qk_bias,
            gate, attention_window, segments: as in ``BlockSpec``; what the token mixer has.  simple_gla is causal and
            without a window whatever these say.
        num_layers, final_norm, injection: as in ``NetSpec``.
        batch, length, rope: B, L, and whether there are tables.
        dtype, weight_dtype: names of dtypes.
        weight_scale: factor on the weights.
        scales: factors on whole groups of tensors: zero, tiny, huge.
        layouts: how groups of tensors lie in memory, see layouts.py; plain otherwise.
        needs: the tensors that need gradients, "all" or the groups of them; () for none.
        seed: of the numbers.
    """

    program: Program = ("urm", 1, 1, "all")
    hidden_size: int = 16
    intermediate_size: int = 16
    token_mixer: str = "attention"
    channel_mixer: str = "swiglu"
    num_heads: int = 1
    num_kv_heads: int = 1
    head_dim: int = 16
    causal: bool = False
    seq_intermediate_size: int = 16
    conv_kernel: int = 2
    rms_norm_eps: float = 1e-5
    norm_placement: str = "post"
    norm_weight: bool = False
    rotation: str = "half"
    qk_norm: str = "none"
    qk_bias: bool = False
    gate: str = "none"
    attention_window: int = 0
    segments: bool = False
    num_layers: int = 1
    final_norm: bool = False
    injection: str = "add"
    batch: int = 1
    length: int = 4
    rope: bool = False
    dtype: str = "float32"
    weight_dtype: str = "float32"
    weight_scale: float = 0.7
    scales: tuple[tuple[str, float], ...] = ()
    layouts: tuple[tuple[str, str], ...] = ()
    needs: tuple[str, ...] = ("all",)
    seed: int = 0

    @cached_property
    def case(self) -> Case:
        """The recursion; raises ValueError where the fields contradict each other."""
        attends, linear = self.token_mixer != "mlp_t", self.token_mixer == "simple_gla"
        options = {name: getattr(self, name) for name in NOT_FOR_MLP_T} if attends else {}
        if linear:
            options["attention_window"] = 0
        block = BlockSpec(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            token_mixer=self.token_mixer,
            channel_mixer=self.channel_mixer,
            num_heads=self.num_heads if attends else 0,
            num_kv_heads=self.num_kv_heads if attends else 0,
            head_dim=self.head_dim if attends else 0,
            causal=linear or (self.causal and attends),
            seq_len=0 if attends else self.length,
            seq_intermediate_size=0 if attends else self.seq_intermediate_size,
            conv_kernel=self.conv_kernel,
            rms_norm_eps=self.rms_norm_eps,
            **options,
        )
        program = make_program(self.program)
        net = NetSpec(block, self.num_layers, self.final_norm, self.injection)
        problem = Problem(program, (net,) * len(program.nets))
        return Case("fuzz", problem, self.batch, self.length, self.rope and attends)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The compute dtype."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def needed(self, name: str) -> bool:
        """Whether a group of tensors needs gradients."""
        return "all" in self.needs or name in self.needs

    def layout(self, group: str) -> str:
        """How a group of tensors lies in memory."""
        return dict(self.layouts).get(group, "plain")

    @property
    def work(self) -> int:
        """Multiply-adds of a forward pass, roughly."""
        block = self.case.problem.nets[0].block
        weights = sum(_product(shape) for shape in block.weight_shapes.values())
        if self.token_mixer != "mlp_t":
            weights += 2 * self.length * self.num_heads * self.head_dim
        else:  # these weights meet every channel instead of every token
            weights += 3 * self.seq_intermediate_size * self.hidden_size
        total = weights * self.num_layers + (self.injection == "linear") * self.hidden_size**2
        return total * self.batch * self.length * len(self.case.problem.program.updates)


def make_program(program: Program) -> RecursionProgram:
    """The program that a trial describes."""
    if isinstance(program[0], str):
        name, H_cycles, L_cycles, window = program
        return PROGRAMS[name](H_cycles, L_cycles, window)
    updates = tuple(Update(dst, tuple(sources), inject, net, grad) for dst, sources, inject, net, grad in program)
    states = 1 + max(max((update.dst, *update.sources)) for update in updates)
    nets = 1 + max(update.net for update in updates)
    names = (tuple(f"z{i}" for i in range(states)), tuple(f"f{i}" for i in range(nets)))
    return RecursionProgram(*names, updates, len(updates))


@lru_cache(maxsize=64)
def tensors_of(trial: Trial) -> Inputs:
    """The tensors of a trial, contiguous."""
    inputs = make_inputs(trial.case, trial.torch_dtype, trial.seed, weight_scale=trial.weight_scale)
    held: torch.dtype = getattr(torch, trial.weight_dtype)
    groups = {
        "states": inputs.states,
        "x": () if inputs.x is None else (inputs.x,),
        "weights": tuple(weight.to(held) for weight in inputs.weights),
        "grads": inputs.grad_states,
    }
    for name, factor in trial.scales:
        groups[name] = tuple(tensor * factor for tensor in groups[name])
    for name in ("states", "x", "grads"):  # a broadcast tensor holds one sequence
        if trial.layout(name) == "expanded":
            groups[name] = tuple(tensor[:1].expand_as(tensor).contiguous() for tensor in groups[name])
    return replace(
        inputs,
        states=groups["states"],
        x=_first(groups["x"]),
        weights=groups["weights"],
        grad_states=groups["grads"],
    )


@lru_cache(maxsize=64)
def references(trial: Trial) -> tuple[Result, Result]:
    """What eager PyTorch and the float64 reference make of a trial's tensors, all gradients included."""
    inputs = tensors_of(trial)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run_eager(inputs), run_truth(inputs)
    finally:
        torch.set_num_threads(before)


def _first(tensors: Iterable[Tensor]) -> Tensor | None:
    return next(iter(tensors), None)


def _product(sizes: Iterable[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
