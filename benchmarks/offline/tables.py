"""Writes the counted and modelled tables: ``python -m benchmarks.offline.tables --write docs/gpu_model.md``.

Launches and bytes of the Triton backend come from its plans; those of eager and compiled PyTorch are counted on the CPU
(traffic.py); bytes of the CUDA engine come from kernels/persistent.py, which tests/test_cuda_emulated.py compares with
what the emulator counts.  Times are modelled (kernels/roofline.py).  Nothing is measured, and no GPU is needed; the
tables of the CUDA engine need the engine (``TRMFAST_CUDA=1``), which makes the plans.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from trmfast.kernels.architectures import GPUS, Gpu
from trmfast.kernels.configurations import Configuration
from trmfast.kernels.forward_plan import Setting, forward_plan, weight_buffers
from trmfast.kernels.persistent import GAIN, persistent_traffic
from trmfast.kernels.plan import KEPT, Launch, Plan
from trmfast.kernels.plans import plans, setting_on
from trmfast.kernels.roofline import plan_time, program_bytes
from trmfast.kernels.tiles import LENGTH, ROW, TILES

from benchmarks.offline.traffic import compiled_launches, eager_traffic, forward_of, training_of
from trmfast.backends import BACKENDS, cuda
from trmfast.cases import MEASURED, PUBLISHED, Case, make_case
from trmfast.flops import forward_flops, window_flops

__all__ = ["CUDA_SECTIONS", "SECTIONS", "cuda_model_section", "cuda_traffic_section", "fill"]

SHOWN = ("A100", "H100", "L40S", "RTX 4090", "MI300X")
# Batches of one GPU: latency, a small batch, and the published global batch over the published number of GPUs.
BATCHES = {
    "trm-sudoku-mlp": (1, 8, 768),
    "trm-sudoku-att": (1, 8, 768),
    "trm-arc-att": (1, 8, 192),
    "hrm-sudoku": (1, 8, 384),
    "hrm-arc": (1, 8, 96),
    "urm-arc": (1, 8, 96),
}
KEEPING = "training, all kept"
CUDA_SHOWN = ("A100", "L40S", "RTX 4090", "H100")
CUDA_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 768)
# The published problems that the CUDA engine takes, and narrower ones.
CUDA_CASES = (
    *(case for case in PUBLISHED if case.name != "urm-arc"),
    *(case for case in MEASURED if case.name.startswith("trm-small")),
    make_case("trm-256-att", H_cycles=3, L_cycles=6, batch=1, length=97, hidden_size=256, num_heads=4),
)


def setting_of(case: Case, gpu: Gpu) -> Setting:
    """The setting of a case in bf16."""
    return setting_on(gpu, case.problem, case.batch, case.length, torch.bfloat16, rope=case.rope)


def plans_of(case: Case, gpu: Gpu, keep: int = 0) -> tuple[Plan, Plan]:
    """The plans of a case in bf16; ``keep`` as in :func:`forward_plan`."""
    return plans(gpu, case.problem, case.batch, case.length, torch.bfloat16, rope=case.rope, keep=keep)


# ---------------------------------------------------------------- the Triton backend


def launches_section() -> list[str]:
    """The launches of one block, forward without those that only norm."""
    lines = ["| block | launches forward | launches backward, with what is computed again |", "| --- | --- | --- |"]
    sizes: dict[str, Any] = {"H_cycles": 1, "L_cycles": 1, "hidden_size": 512, "num_heads": 8, "num_layers": 2}
    blocks = (
        ("attention, L = 97, B = 768", {"length": 97, "batch": 768}),
        ("attention, L = 97, B = 8", {"length": 97, "batch": 8}),
        ("attention, L = 916, B = 192", {"length": 916, "batch": 192}),
        ("mlp_t, L = 97, B = 768", {"length": 97, "batch": 768, "token_mixer": "mlp_t"}),
        ("mlp_t, L = 916, B = 192", {"length": 916, "batch": 192, "token_mixer": "mlp_t"}),
        ("attention and conv_swiglu, L = 901, B = 96", {"length": 901, "batch": 96, "channel_mixer": "conv_swiglu"}),
    )
    for title, options in blocks:
        case = make_case(title, "urm", window="all", **{**sizes, **options})
        forward, backward = plans_of(case, GPUS["H100"])
        # The last block of two: the first one ends with the gradients of states.
        products = [launch for launch in forward if not launch.kernel.startswith("rows.")]
        per_layer = len(products) // 2
        names = [launch.kernel.split(".")[1].removesuffix("_kernel") for launch in products[:per_layer]]
        back = [launch.kernel.split(".")[1].removesuffix("_kernel") for launch in backward]
        lines.append(f"| {title} | {per_layer}: {', '.join(names)} | {len(back) / 2:g} |")
    return lines


def counts_section() -> list[str]:
    """Launches and bytes beside eager and compiled PyTorch."""
    lines = [
        "| problem | B | step | launches | of compiled PyTorch | GB | of eager PyTorch | eager / trmfast "
        "| GB through the shared cache | GB of one fused kernel | scratch MB |",
        "| --- | ---: | --- |" + " ---: |" * 8,
    ]
    for case in PUBLISHED:
        eager = {"forward": eager_traffic(case, forward_of), "training": eager_traffic(case, training_of)}
        compiled = compiled_launches(case)
        for batch in BATCHES[case.name]:
            sized = replace(case, batch=batch)
            forward, backward = plans_of(sized, GPUS["H100"])
            for step, parts in (("forward", [forward]), ("training", [forward, backward])):
                nbytes = sum(part.nbytes for part in parts) + len(parts) * cast_bytes(case)
                plain = eager[step].nbytes(batch)
                cells = (
                    *(case.name, batch, step, sum(len(part) for part in parts), compiled[step]),
                    *(f"{nbytes / 1e9:.3g}", f"{plain / 1e9:.3g}", f"{plain / nbytes:.1f}"),
                    f"{sum(cache_bytes(part) for part in parts) / 1e9:.3g}",
                    f"{least_bytes(sized, step == 'training') / 1e9:.3g}",
                    f"{max(part.scratch_bytes for part in parts) / 1e6:.0f}",
                )
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def cast_bytes(case: Case) -> int:
    """Bytes that a call moves before the plan: the weights, from float32 to the compute dtype."""
    read = sum(4 * prod(shape) for shape in case.problem.weight_shapes)
    return read + sum(buffer.nbytes for buffer in weight_buffers(case.problem, torch.bfloat16))


def cache_bytes(plan: Plan) -> float:
    """Bytes that all programs of a plan load and store; they pass through the shared cache, and mostly stay there."""
    return sum(prod(launch.grid) * program_bytes(launch) for launch in plan)


def least_bytes(case: Case, training: bool) -> int:
    """Bytes that no fusion avoids: weights, states and x read once, results written once."""
    problem = case.problem
    weights = sum(prod(shape) for shape in problem.weight_shapes)
    state = case.batch * case.length * problem.hidden_size
    found = 4 * weights + 2 * state * (2 * len(problem.program.states) + problem.uses_x)
    if training:
        # The weights again and their gradients, the saved inputs written and read, gradients of a state and of x.
        found += 8 * weights + 2 * state * (2 * problem.num_grad_updates + 2)
    return found


def roofline_section() -> list[str]:
    """Times of a supervision step by the model."""
    lines = [
        f"| problem | B | step | {' | '.join(f'{name} ms (of peak)' for name in SHOWN)} |",
        f"| --- | ---: | --- |{' ---: |' * len(SHOWN)}",
    ]
    for case in PUBLISHED:
        for batch in BATCHES[case.name]:
            sized = replace(case, batch=batch)
            problem, length = case.problem, case.length
            useful = {"forward": forward_flops(problem, batch, length)}
            useful["training"] = useful["forward"] + 2 * window_flops(problem, batch, length)
            useful[KEEPING] = useful["training"]
            cells = {
                step: [modelled(sized, GPUS[name], step, flops) for name in SHOWN] for step, flops in useful.items()
            }
            lines += [f"| {case.name} | {batch} | {step} | {' | '.join(row)} |" for step, row in cells.items()]
    return lines


def modelled(case: Case, gpu: Gpu, step: str, flops: int) -> str:
    """Milliseconds, and the share of the tensor cores' peak by the published count of FLOP."""
    forward, backward = plans_of(case, gpu, case.problem.num_grad_updates if step == KEEPING else 0)
    seconds = plan_time(gpu, forward) + (0.0 if step == "forward" else plan_time(gpu, backward))
    return f"{seconds * 1e3:.3g} ({flops / seconds / gpu.tensor_flops:.0%})"


def kept_section() -> list[str]:
    """What training keeps with ``recompute=False``, and what that buys by the model."""
    shown = ("A100", "H100")
    lines = [
        "| problem | B | updates | KB a token | GB | scratch MB: recomputing | keeping "
        f"| launches: recomputing | keeping | {' | '.join(f'{name}: time / recomputing' for name in shown)} |",
        f"| --- |{' ---: |' * (8 + len(shown))}",
    ]
    for case in PUBLISHED:
        updates = case.problem.num_grad_updates
        for batch in BATCHES[case.name]:
            sized = replace(case, batch=batch)
            made = {name: [plans_of(sized, GPUS[name], keep) for keep in (0, updates)] for name in shown}
            recomputing, keeping = made["H100"]
            nbytes = sum(buffer.nbytes for buffer in keeping[0].outputs if buffer.name.startswith(KEPT))
            times = [[sum(plan_time(GPUS[name], plan) for plan in both) for both in made[name]] for name in shown]
            cells = (
                *(case.name, batch, updates, f"{nbytes / batch / case.length / 1e3:.1f}", f"{nbytes / 1e9:.3g}"),
                *(f"{max(plan.scratch_bytes for plan in both) / 1e6:.0f}" for both in (recomputing, keeping)),
                *(sum(map(len, both)) for both in (recomputing, keeping)),
                *(f"{after / before:.2f}" for before, after in times),
            )
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def mixer_section() -> list[str]:
    """The number of tokens from which the channel mixer is one kernel."""
    tokens = (97, 388, 776, 1552, 3104, 6208, 12416, 24832, 74496)
    lines = [f"| GPU | {' | '.join(map(str, tokens))} |", f"| --- |{' --- |' * len(tokens)}"]
    for gpu in GPUS.values():
        row = []
        for count in tokens:
            case = make_case("mixer", "urm", H_cycles=1, L_cycles=1, batch=count // 97, length=97, hidden_size=512,
                             num_heads=8, num_layers=1)  # fmt: skip
            forward, _ = plans_of(case, gpu)
            row.append("one" if any(launch.kernel == "swiglu.swiglu_kernel" for launch in forward) else "two")
        lines.append(f"| {gpu.name} | {' | '.join(row)} |")
    return lines


def fusion_section() -> list[str]:
    """Microseconds of an attention block with each choice of fusion."""
    gpus = [GPUS[name] for name in ("A100", "H100", "MI300X")]
    heads = [f"{gpu.name}: {launches}" for gpu in gpus for launches in ("5", "4", "3")]
    lines = [f"| L, B | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]
    for length, batch in ((97, 1), (97, 8), (97, 768), (916, 1), (916, 192)):
        case = make_case("block", "urm", H_cycles=1, L_cycles=1, batch=batch, length=length, hidden_size=512,
                         num_heads=8, num_layers=1)  # fmt: skip
        row = []
        for gpu in gpus:

            def block(fusion: str, gpu: Gpu = gpu, case: Case = case) -> tuple[Launch, ...]:
                configuration = Configuration(gpu.architecture, gpu.multiprocessors, fusion)
                setting = replace(setting_of(case, gpu), configuration=configuration)
                launches = forward_plan(setting, save=False).launches
                return tuple(launch for launch in launches if not launch.kernel.startswith("rows."))

            least, most = block("least"), block("most")
            four = (least[:1] + most[1:2] + least[3:], least[:3] + most[2:])
            times = (plan_time(gpu, least), min(plan_time(gpu, launches) for launches in four), plan_time(gpu, most))
            row += [f"{time * 1e6:.0f}" for time in times]
        lines.append(f"| {length}, {batch} | {' | '.join(row)} |")
    return lines


def tiles_section() -> list[str]:
    """The table of tiles for 16-bit dtypes."""
    lines = ["| kernel | architectures | tiles, large ones first: blocks, warps x stages |", "| --- | --- | --- |"]
    for kernel, table in TILES.items():
        for key, tiles in table.items():
            size, _, architectures = key.partition(" ")
            if size == "16-bit":
                lines.append(f"| {kernel} | {architectures or 'others'} | {'; '.join(map(_tile_text, tiles))} |")
    return lines


def _tile_text(tile: Any) -> str:
    whole = {ROW: "D", LENGTH: "L"}
    blocks = " ".join(f"{name[6:]}{whole.get(size, size)}" for name, size in tile.blocks)
    return f"{blocks}, {tile.num_warps} x {tile.num_stages}"


# ---------------------------------------------------------------- the CUDA engine


def cuda_traffic_section() -> list[str]:
    """Bytes of one sequence in one supervision step, at the batch of most sequences."""
    lines = [
        "| problem | GPU | blocks x tokens of a sequence | weights MB | RoPE tables MB | exchange MB | states MB "
        "| compulsory MB | exchange and states / compulsory |",
        "| --- | --- | --- |" + " ---: |" * 6,
    ]
    for case in CUDA_CASES:
        for name in CUDA_SHOWN:
            prepared = cuda._prepare(case.problem, CUDA_BATCHES[-1], case.length, cuda.limits_of(GPUS[name]))
            grid = cuda.grid_of(prepared)
            one = persistent_traffic(case.problem, 1, case.length, grid, rope=case.rope)
            amounts = (one.weights, one.tables, one.exchange, one.states, one.compulsory)
            cells = [f"{nbytes / 1e6:.3g}" for nbytes in amounts]
            cells.append(f"{one.activations / one.compulsory:.1f}")
            lines.append(f"| {case.name} | {name} | {grid.group_blocks} x {grid.rows} | {' | '.join(cells)} |")
    return lines


def cuda_model_section() -> list[str]:
    """Milliseconds of one launch, and how many times faster than Triton's launches that is."""
    lines = [
        f"| problem | GPU | {' | '.join(f'B = {batch}' for batch in CUDA_BATCHES)} |",
        f"| --- | --- |{' ---: |' * len(CUDA_BATCHES)}",
    ]
    for case in CUDA_CASES:
        for name in CUDA_SHOWN:
            cells = [_compared(replace(case, batch=batch), name) for batch in CUDA_BATCHES]
            lines.append(f"| {case.name} | {name} | {' | '.join(cells)} |")
    return lines


def _compared(case: Case, name: str) -> str:
    gpu = GPUS[name]
    times = cuda.modelled_times(case.problem, case.batch, case.length, setting_of(case, gpu), cuda.limits_of(gpu))
    if times is None:
        return "-"
    one, launches = times
    text = f"{one * 1e3:.3g} ({launches / one:.2f})"
    return f"**{text}**" if launches >= GAIN * one else text


# ---------------------------------------------------------------- command

SECTIONS: dict[str, Callable[[], list[str]]] = {
    "launches": launches_section,
    "counts": counts_section,
    "roofline": roofline_section,
    "kept": kept_section,
    "mixer": mixer_section,
    "fusion": fusion_section,
    "tiles": tiles_section,
    "cuda-traffic": cuda_traffic_section,
    "cuda-model": cuda_model_section,
}
"""The sections between ``<!-- name -->`` and ``<!-- /name -->`` in docs/gpu_model.md."""
CUDA_SECTIONS = ("cuda-traffic", "cuda-model")
"""The sections that need the CUDA engine."""


def fill(text: str, name: str, lines: Sequence[str]) -> str:
    """The text with a section replaced.

    Raises:
        ValueError: the text has no such section.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"section: got {name!r}, the text has no {begin.strip()} with its end")
    return f"{head}{begin}" + "\n".join(lines) + f"\n{end}{tail}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints sections, or writes them into a document; 2 if a section is asked for that needs the missing engine."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offline.tables", description=__doc__)
    parser.add_argument("--section", action="append", choices=list(SECTIONS), help="by default all that can be made")
    parser.add_argument("--write", type=Path, metavar="FILE", help="the document; by default sections are printed")
    options = parser.parse_args(arguments)
    missing = CUDA_SECTIONS if cuda._cuda is None else ()
    if missing:
        print(f"no {', no '.join(missing)}: {BACKENDS['cuda'].available()}", file=sys.stderr)
    if set(missing) & set(options.section or ()):
        return 2
    for name in options.section or [name for name in SECTIONS if name not in missing]:
        lines = SECTIONS[name]()
        if options.write is None:
            print(f"{name}\n\n" + "\n".join(lines) + "\n")
        else:
            options.write.write_text(fill(options.write.read_text(), name, lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
