"""Runs the CUDA kernel of the forward recursion in the SIMT emulator (tests/simt/recursion_harness.cpp).

``PYTHONPATH=. python tests/simt_recursion.py trm-sudoku-att`` counts a supervision step of one sequence, in minutes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from trmfast.kernels.architectures import ARCHITECTURES
from trmfast.kernels.configurations import Configuration
from trmfast.kernels.persistent import Grid, Traffic, cache_blocks, persistent_traffic, stream_rows

import cuda_tools
from trmfast.cases import Case, Inputs, find_case, make_inputs
from trmfast.problem import Problem

ROOT = Path(__file__).resolve().parent.parent


class Instance(NamedTuple):
    """An instance of the kernel, as in csrc/cuda/instances.h; tiles of rows and strips have 16 elements."""

    row_tiles: int
    stages: int
    width_tiles: int
    token_tiles: int = 0
    strip_tiles: int = 0


class Schedule(NamedTuple):
    """In which order the emulator runs blocks, warps and lanes."""

    order: str = "forward"
    seed: int = 0


FORWARD = Schedule()

# Instances for small cases; `build(FEW)` makes one library for all tests of them.
ATTENTION, MIXER, LONG_MIXER = Instance(1, 8, 4), Instance(1, 8, 4, 2, 4), Instance(2, 4, 8, 16, 1)
FEW = [ATTENTION, MIXER, LONG_MIXER]


class EmulatorError(Exception):
    """What the emulator found: the place in the kernel and what is wrong there."""


class _Request(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("is_bf16", "width", "inner", "attention", "heads", "kv_heads")),
        *((name, ctypes.c_int32) for name in ("head_dim", "causal", "seq_len", "seq_inner")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("batch", "length", "num_nets", "num_states", "num_updates")),
        *((name, ctypes.c_int32) for name in Instance._fields),
        *((name, ctypes.c_int32) for name in ("groups", "resident_blocks", "order", "check_races", "truncate_mma")),
        *((name, ctypes.c_uint64) for name in ("seed", "timeout_ns")),
        *((name, ctypes.c_void_p) for name in ("layers", "updates", "sources", "weights", "states_in", "states_out")),
        *((name, ctypes.c_void_p) for name in ("x", "saved", "cos", "sin")),
    ]


@dataclass(frozen=True)
class Run:
    """What a launch gave.

    Attributes:
        states: the final states.
        saved: [G, B, L, D], the summed inputs of the updates with gradient.
        report: counters of the launch; ``failed`` is the number of blocks that waited too long.
        grid: what was launched.
    """

    states: tuple[Tensor, ...]
    saved: Tensor
    report: dict[str, Any]
    grid: Grid

    @property
    def traffic(self) -> Traffic:
        """The bytes that were counted; nothing is compulsory here."""
        counted = {name: sum(nbytes) for name, nbytes in self.report["traffic"].items()}
        states = sum(counted.get(name, 0) for name in ("states_in", "states_out", "x", "saved"))
        return Traffic(counted["weights"], counted.get("tables", 0), counted["exchange"], states, compulsory=0)


class LaunchShape(NamedTuple):
    """How a device runs a problem, as made by csrc/cuda/launch_shape.h."""

    instance: Instance
    groups: int
    group_blocks: int
    shared_bytes: int


def listed_instances() -> list[Instance]:
    """The instances of csrc/cuda/instances.h."""
    rows = re.findall(r"^ +X\(([\d, ]+)\)", (ROOT / "csrc" / "cuda" / "instances.h").read_text(), re.MULTILINE)
    return [Instance(*map(int, row.split(","))) for row in rows]


def build(instances: Iterable[Instance] = (), shapes_alone: bool = False) -> ctypes.CDLL:
    """Compiles the harness and loads it; the arguments are those of :func:`compile_harness`."""
    return ctypes.CDLL(str(compile_harness(instances, shapes_alone)))


def compile_harness(instances: Iterable[Instance] = (), shapes_alone: bool = False) -> Path:
    """Compiles the harness; ``TRMFAST_SIMT_VARIANT`` is a key of ``cuda_tools.VARIANTS``.

    Args:
        instances: by default all that are listed.
        shapes_alone: for :func:`launch_shape`, without the kernels.
    """
    listed = " ".join(f"X({', '.join(map(str, i))})" for i in instances)
    options = ["-O1"]  # compiling takes longer than running
    options += [f"-DTRMFAST_INSTANCES(X)={listed}"] * bool(listed) + ["-DTRMFAST_SHAPES_ALONE"] * shapes_alone
    variant = os.environ.get("TRMFAST_SIMT_VARIANT", "plain")
    source = cuda_tools.SIMT / "recursion_harness.cpp"
    return cuda_tools.build_emulated([source], variant=variant, options=options, shared=True)


def _request(problem: Problem, batch: int, length: int, **fields: Any) -> _Request:
    """The sizes of a problem, and what else is given."""
    block = problem.nets[0].block
    return _Request(
        width=block.hidden_size,
        inner=block.intermediate_size,
        attention=block.token_mixer == "attention",
        heads=block.num_heads,
        kv_heads=block.num_kv_heads,
        head_dim=block.head_dim,
        causal=block.causal,
        seq_len=block.seq_len,
        seq_inner=block.seq_intermediate_size,
        eps=block.rms_norm_eps,
        batch=batch,
        length=length,
        **fields,
    )


def launch_shape(library: ctypes.CDLL, case: Case, architecture: str, multiprocessors: int = 108) -> LaunchShape | str:
    """The launch shape of a problem on a device of some architecture, or why there is none."""
    block = case.problem.nets[0].block
    taps = block.conv_kernel if block.channel_mixer == "conv_swiglu" else 0
    words, reason = (ctypes.c_int32 * 8)(), ctypes.create_string_buffer(256)
    gpu = Configuration(architecture, multiprocessors).gpu
    limits = (ARCHITECTURES[architecture].block_shared, multiprocessors, stream_rows(gpu), cache_blocks(gpu))
    request = _request(case.problem, case.batch, case.length)
    if library.trmfast_launch_shape(ctypes.byref(request), taps, *limits, words, reason, len(reason)):
        return reason.value.decode()
    return LaunchShape(Instance(*words[:5]), *words[5:])


def run_emulated(
    library: ctypes.CDLL,
    inputs: Inputs,
    instance: Instance,
    schedule: Schedule = FORWARD,
    *,
    groups: int = 0,
    resident_blocks: int = 0,
    check_races: bool = True,
    truncate_mma: bool = False,
    timeout_ns: int = 10**9,
) -> Run:
    """One launch of the kernel in the emulator.

    Args:
        library: of :func:`build`.
        inputs: states, x and weights of a problem in bfloat16 or float16.
        instance, schedule: which kernel, in which order.
        groups: groups of blocks in the grid, by default one for each sequence.
        resident_blocks: how many blocks run at a time, by default all.
        check_races, truncate_mma: as in ``simt::Options``.
        timeout_ns: of the barriers between the blocks of a group.

    Raises:
        EmulatorError: the kernel broke a rule of the emulator.
    """
    problem, program = inputs.problem, inputs.problem.program
    batch, length, _ = inputs.states[0].shape

    def addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
        return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))

    states_in = [state.contiguous() for state in inputs.states]
    states_out = [torch.empty_like(state) for state in states_in]
    weights = [weight.float().contiguous() for weight in inputs.weights]
    saved = torch.empty((problem.num_grad_updates, *states_in[0].shape), dtype=states_in[0].dtype)
    rows, sources = [], []
    for update in program.updates:
        rows += [update.dst, update.net, int(update.inject_x), int(update.grad), len(update.sources)]
        sources += list(update.sources)
    layers = (ctypes.c_int32 * len(problem.nets))(*(net.num_layers for net in problem.nets))
    updates = (ctypes.c_uint32 * len(rows))(*rows)
    all_sources = (ctypes.c_uint32 * max(1, len(sources)))(*sources)
    tables = [None if table is None else table.float()[:length].contiguous() for table in (inputs.cos, inputs.sin)]
    pointers = {
        "layers": ctypes.addressof(layers),
        "updates": ctypes.addressof(updates),
        "sources": ctypes.addressof(all_sources),
        "x": None if inputs.x is None else inputs.x.data_ptr(),
        "saved": saved.data_ptr(),
        "cos": None if tables[0] is None else tables[0].data_ptr(),
        "sin": None if tables[1] is None else tables[1].data_ptr(),
    }
    arrays = {
        "weights": addresses(weights),
        "states_in": addresses(states_in),
        "states_out": addresses(states_out),
    }
    request = _request(
        problem,
        batch,
        length,
        is_bf16=states_in[0].dtype == torch.bfloat16,
        num_nets=len(problem.nets),
        num_states=len(states_in),
        num_updates=len(program.updates),
        **instance._asdict(),
        groups=groups,
        resident_blocks=resident_blocks,
        order=("forward", "reverse", "random").index(schedule.order),
        check_races=check_races,
        truncate_mma=truncate_mma,
        seed=schedule.seed,
        timeout_ns=timeout_ns,
        **pointers,
        **{name: ctypes.addressof(array) for name, array in arrays.items()},
    )
    text = ctypes.create_string_buffer(1 << 16)
    if library.trmfast_forward(ctypes.byref(request), text, len(text)):
        raise EmulatorError(text.value.decode())
    report = json.loads(text.value)
    grid = Grid(
        groups=groups or batch,
        group_blocks=report["group_blocks"],
        rows=16 * instance.row_tiles,
        channels=16 * instance.strip_tiles,
        **{name: report[name] for name in ("packed", "token_packed", "head_width")},
    )
    return Run(tuple(states_out), saved, report, grid)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what a supervision step of one sequence moves, counted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("problem", help="a published problem, for example trm-sudoku-att")
    parser.add_argument("--architecture", default="sm_80", choices=[name for name in ARCHITECTURES if "sm_" in name])
    options = parser.parse_args(arguments)
    case = find_case(options.problem)
    torch.set_num_threads(1)
    # The launch shape of as many sequences as the device takes at a time.
    found = launch_shape(build(shapes_alone=True), replace(case, batch=54), options.architecture)
    if isinstance(found, str):
        print(found)
        return 1
    library = build([found.instance])
    run = run_emulated(library, make_inputs(case, torch.bfloat16), found.instance, Schedule("random", 1))
    expected = persistent_traffic(case.problem, 1, case.length, run.grid, rope=case.rope)
    print(f"{case}, {options.architecture}: {run.grid}")
    for name in ("weights", "tables", "exchange", "states"):
        print(f"{name}: {getattr(run.traffic, name)} bytes counted, {getattr(expected, name)} by the formula")
    ratio = run.traffic.activations / expected.compulsory
    print(f"compulsory: {expected.compulsory} bytes; exchange and states are {ratio:.1f} times so many")
    count, wavefronts, least = run.report["ldmatrix"]
    print(f"ldmatrix: {count}, in {wavefronts} wavefronts; without bank conflicts {least}")
    print(f"mma: {run.report['mma']}; other bank conflicts by line: {run.report['conflicts']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
