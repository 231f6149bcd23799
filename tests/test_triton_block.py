"""One update of one net, differentiated by the chain of launches that a plan makes of it, between guard zones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from trmfast.kernels.backward_plan import backward_plan
from trmfast.kernels.configurations import INTERPRETER, Configuration, Sizes
from trmfast.kernels.forward_plan import Setting

import triton_guard
from triton_bounds import checked_run
from triton_guard import DEVICE, INTERPRETED, guarded_run
from trmfast.backends import triton as backend
from trmfast.cases import Case, Inputs, make_inputs
from trmfast.problem import Problem
from trmfast.program import RecursionProgram, Update
from trmfast.reference import summed_input
from trmfast.spec import BlockSpec, NetSpec
from trmfast.testing import compare, default_weight_scale, pool, require, run_eager, run_truth

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def addresses_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN shows what is read outside of a buffer only where it reaches a result; this shows the rest."""
    monkeypatch.setattr(triton_guard, "run", checked_run)


def make(name: str, block: BlockSpec, batch: int, length: int, layers: int = 1) -> Case:
    """The update ``z_L <- net(z_L + z_H + x)``."""
    program = RecursionProgram(("z_L", "z_H"), ("f",), (Update(0, (0, 1), True, 0, True),), 1)
    return Case(name, Problem(program, (NetSpec(block, layers),)), batch, length, block.token_mixer == "attention")


def mixer(width: int, inner: int, length: int) -> BlockSpec:
    return BlockSpec(width, inner, "mlp_t", seq_len=length, seq_intermediate_size=inner)


SMALL = [
    make("attention", BlockSpec(48, 80, num_heads=2), 3, 13, layers=2),
    make("attention over several tiles", BlockSpec(32, 48, num_heads=2, num_kv_heads=1, causal=True), 1, 133),
    make("conv_swiglu", BlockSpec(48, 80, channel_mixer="conv_swiglu", num_heads=2), 3, 13),
    make("mlp_t", mixer(48, 80, 13), 3, 13, layers=2),
    make("mlp_t over several tiles", mixer(48, 80, 133), 2, 133),
]


# On a GPU its own tiles: those of the interpreter take 320 KB of shared memory.
WHOLE = Configuration(INTERPRETER) if INTERPRETED else backend._configuration(DEVICE)


class Apart(Configuration):
    """Token mixers in tiles, however short the sequence: what a GPU does in float32 and with wide heads."""

    def keeps_sequences_whole(self, sizes: Sizes) -> bool:
        return False


def run(inputs: Inputs, configuration: Configuration) -> dict[str, Tensor]:
    """All gradients by the kernels, named as those of ``trmfast.testing``."""
    problem, (batch, length, _) = inputs.problem, inputs.states[0].shape
    dtype = inputs.states[0].dtype
    setting = Setting(problem, batch, length, dtype, inputs.cos is not None, configuration)
    made = backward_plan(setting, [True] * 2, True, [True] * problem.num_weights)
    saved = summed_input(problem.program.updates[0], inputs.states, inputs.x)
    given = {"saved": saved[None]}
    given.update((f"grad.{i}", grad.float()) for i, grad in enumerate(inputs.grad_states))
    for buffer, weight in zip(
        (b for b in made.plan.inputs if b.name.startswith("weights.")), inputs.weights, strict=True
    ):
        given[buffer.name] = F.pad(weight.to(dtype), (0, buffer.shape[-1] - weight.shape[-1]))
    if inputs.cos is not None and inputs.sin is not None:
        given.update(cos=inputs.cos, sin=inputs.sin)
    given.update((buffer.name, torch.zeros(buffer.shape, dtype=buffer.dtype)) for buffer in made.plan.zeros)
    used = {buffer.name for launch in made.plan for buffer in launch.buffers((*launch.reads, *launch.writes))}
    found = guarded_run(made.plan, {name: tensor for name, tensor in given.items() if name in used})
    results = dict(zip((f"grad {name}" for name in problem.program.states), made.grad_states, strict=True))
    results["grad x"] = made.grad_x
    results.update(zip((f"grad {name}" for name in problem.weight_names), made.grad_weights, strict=True))
    return {name: found[buffer.name].cpu() for name, buffer in results.items() if buffer is not None}


def check(case: Case, dtype: torch.dtype, seeds: range, configuration: Configuration = WHOLE) -> None:
    draws = []
    for seed in seeds:
        inputs = make_inputs(case, dtype, seed, weight_scale=default_weight_scale(dtype))
        fused, eager, truth = run(inputs, configuration), run_eager(inputs), run_truth(inputs)
        assert set(fused) == set(truth.gradients)
        draws.append(
            [
                compare(name, fused[name].to(eager.gradients[name].dtype), eager.gradients[name], value, True)
                for name, value in truth.gradients.items()
            ]
        )
    require(pool(draws))


@pytest.mark.breadth
@pytest.mark.representative(
    when=lambda case, dtype: (
        dtype == torch.bfloat16 or (dtype == torch.float32 and case.name in {"attention", "mlp_t"})
    ),
    rest="grid",
)
@pytest.mark.spread("case", "dtype")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, range(3))


@pytest.mark.breadth
@pytest.mark.parametrize(
    "case",
    [SMALL[0], SMALL[3], make("wide heads", BlockSpec(192, 80, num_heads=2), 2, 13)],
    ids=str,
)
def test_short_sequences_in_tiles(case: Case) -> None:
    check(case, torch.float32, range(3), Apart(WHOLE.architecture, WHOLE.multiprocessors))


@pytest.mark.grid  # test_triton_backend.py has whole passes of this size in breadth
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [BlockSpec(512, 1536, num_heads=8), mixer(512, 1536, 97)], ids=["attention", "mlp_t"])
def test_true_size(block: BlockSpec, dtype: torch.dtype) -> None:
    check(make("true size", block, 1, 97), dtype, range(1))
