"""Compiles the Triton kernels without a GPU, and reads registers, spills, shared memory and instructions.

``python -m benchmarks.offline.triton --write build/gpu_kernels.md --summary docs/gpu_kernels.md``.  Triton ships the
compilers and disassemblers.  Compilation runs in separate processes, so that it works from a process in which Triton
interprets.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from trmfast.kernels.architectures import ARCHITECTURES
from trmfast.kernels.backward_plan import backward_plan
from trmfast.kernels.configurations import Configuration
from trmfast.kernels.forward_plan import Setting, forward_plan
from trmfast.kernels.plan import Buffer, Launch, resolve

from benchmarks.offline.machine_code import read_amd, read_nvidia
from trmfast.cases import PUBLISHED, Case, make_case

__all__ = [
    "OPTIONS",
    "Job",
    "KernelCode",
    "compile_all",
    "compile_one",
    "markdown",
    "production_jobs",
    "specialise",
    "summary",
]

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_INT32 = 2**31
# The published sizes: both token mixers at both lengths, sums of two, three and eight, and the convolution.  Other
# published sizes differ only in length, which attention kernels take at run time.  Wide heads are not published.
PRODUCTION = (
    *(case for case in PUBLISHED if case.name != "hrm-arc"),
    make_case("trm-arc-mlp", H_cycles=1, L_cycles=2, batch=1, length=916, hidden_size=512, token_mixer="mlp_t"),
    make_case("wide-heads", "urm", H_cycles=1, L_cycles=1, batch=1, length=97, hidden_size=512, num_heads=4),
    make_case("hier6-sudoku", "hier6", H_cycles=1, L_cycles=6, batch=1, length=97, hidden_size=512, num_heads=8),
    make_case("wide-1024", "urm", H_cycles=1, L_cycles=1, batch=1, length=97, hidden_size=1024, num_heads=16,
              channel_mixer="conv_swiglu"),
    make_case("wide-2560", "urm", H_cycles=1, L_cycles=1, batch=1, length=97, hidden_size=2560, num_heads=40),
)  # fmt: skip
# Every option of blocks: in networks of HRM-Text's, Ouro's and Huginn's sizes, in smaller ones, and in short sequences.
_ONE: dict[str, Any] = {"H_cycles": 1, "L_cycles": 1, "batch": 1}
_SMALL: dict[str, Any] = {**_ONE, "hidden_size": 512, "num_heads": 8}
_HRM_TEXT: dict[str, Any] = {
    **_ONE,
    "length": 256,
    "causal": True,
    "segments": True,
    "norm_placement": "pre",
    "final_norm": True,
    "gate": "channel",
}
OPTIONS = (
    make_case("hrm-text", "urm", hidden_size=1024, num_heads=8, intermediate_size=2816, **_HRM_TEXT),
    make_case("hrm-text-wide", "urm", hidden_size=2560, num_heads=20, intermediate_size=6912, **_HRM_TEXT),
    make_case("ouro", "urm", hidden_size=2048, num_heads=16, intermediate_size=5632, causal=True, length=256,
              norm_placement="sandwich", norm_weight=True, final_norm=True, **_ONE),
    make_case("huginn", "urm", hidden_size=768, num_heads=8, causal=True, norm_placement="sandwich_sum", length=250,
              norm_weight=True, qk_bias=True, rotation="interleaved", channel_mixer="gelu", injection="linear", **_ONE),
    make_case("heads", "urm", norm_placement="pre", norm_weight=True, qk_norm="learned", length=250,
              attention_window=64, channel_mixer="relu2", injection="diagonal", **_SMALL),
    make_case("grouped", "trm", num_kv_heads=2, gate="head", causal=True, segments=True, length=250, **_SMALL),
    make_case("grouped-short", "trm", num_kv_heads=2, gate="head", causal=True, segments=True, length=97,
              rotation="interleaved", **_SMALL),
    make_case("window-short", "trm", attention_window=16, qk_norm="plain", qk_bias=True, gate="channel", length=97,
              final_norm=True, **_SMALL),
    make_case("causal-short", "urm", causal=True, rope=False, norm_weight=True, length=97, **_SMALL),
    make_case("simple_gla", "urm", token_mixer="simple_gla", causal=True, length=250, **_SMALL),
    make_case("simple_gla-wide", "urm", hidden_size=1024, num_heads=8, num_kv_heads=4, token_mixer="simple_gla",
              causal=True, segments=True, gate="channel", qk_norm="learned", norm_placement="pre", length=250, **_ONE),
)  # fmt: skip
# They read one column of a row of many.
_COLUMNS = ("simple_gla.sum_decays_kernel", "simple_gla_backward.decays_backward_kernel")
# Tile sizes that are rows of the left operand of a product.
_ROWS = ("BLOCK_M", "BLOCK_C")


@dataclass(frozen=True)
class Job:
    """A launch to compile.

    Attributes:
        launch: the launch.
        label: distinguishes it from others of the same kernel.
        architecture: for which.
    """

    launch: Launch
    label: str
    architecture: str

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for launches that are the same program: of other values of run-time integers, for example."""

        def kind(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(kind(item) for item in value)
            if isinstance(value, Buffer):
                return value.dtype, value.offset * value.dtype.itemsize % 16 == 0
            return value if value in (None, 1) else type(value), isinstance(value, int) and value % 16 == 0

        launch = self.launch
        values = tuple((name, kind(value)) for name, value in launch.arguments)
        return launch.kernel, launch.constants, values, launch.num_warps, launch.num_stages, self.architecture


class _Recorder(Configuration):
    """Records every launch that it could choose, and chooses one kernel (``"most"``) or two (``"least"``)."""

    def __init__(self, architecture: str, fusion: str) -> None:
        super().__init__(architecture, fusion=fusion)
        object.__setattr__(self, "seen", [])

    def fastest(self, choices: Sequence[Sequence[Launch]]) -> Sequence[Launch]:
        self.seen: list[Launch]
        self.seen += [launch for launches in choices for launch in launches]
        return choices[-1 if self.fusion == "least" else 0]


def production_jobs(
    architecture: str,
    dtype: torch.dtype = torch.bfloat16,
    batches: Sequence[int] = (3, 16),
    tf32: bool = True,
    cases: Sequence[Case] = (*PRODUCTION, *OPTIONS),
) -> list[Job]:
    """Every kernel of the published problems and of every option, with every tile that an architecture could get.

    Args:
        architecture: its name.
        dtype: compute dtype.
        batches: of B; by default one that leaves no number of tokens divisible by 16, and one that does: these are
            different programs, and either may be the one that spills.
        tf32: whether products of float32 are TF32.
        cases: the problems.
    """
    jobs: dict[tuple[Any, ...], Job] = {}
    for case, batch, fusion in product(cases, batches, ("most", "least")):
        problem, recorder = case.problem, _Recorder(architecture, fusion)
        setting = Setting(problem, batch, case.length, dtype, case.rope, recorder, tf32)
        for keep in (0, problem.num_grad_updates):
            forward_plan(setting, True, keep)
            backward_plan(setting, [True] * len(problem.program.states), True, [True] * problem.num_weights, keep)
        for launch in recorder.seen:
            tile = ", ".join(f"{name[6:]} {size}" for name, size in launch.constants if name.startswith("BLOCK_"))
            label = f"L={case.length}: {tile}, {launch.num_warps} warps, {launch.num_stages} stages"
            job = Job(launch, label, architecture)
            jobs.setdefault(job.key, job)
    return list(jobs.values())


@dataclass(frozen=True)
class KernelCode:
    """One kernel, compiled for one architecture.

    Attributes:
        kernel: ``"stem.function"``.
        architecture: its name.
        label: what tells it from other compilations of the same kernel.
        products: whether it multiplies matrices, and
        rows: the most rows of a tile of such a product.
        columns: whether it reads a column of a row of many, or too little for 16 bytes a thread.
        registers: for each thread; on AMD, vector and accumulation registers together.
        spills: instructions that store registers to or load them from local memory; on AMD, spilled registers.
        shared: bytes of shared memory of one program.
        tensor: matrix instructions.
        wide_loads: loads from global memory of 16 bytes a thread, and
        narrow_loads: of less.
        num_warps: of one program.
        occupancy: warps that a multiprocessor holds.
        instructions: kind of the matrix instructions: ``"mma"``, ``"wgmma"``, ``"tcgen05"``, ``"mfma"`` or ``""``.
        error: why it does not compile, in one line, or None.
    """

    kernel: str
    architecture: str
    label: str
    products: bool = False
    rows: int = 0
    columns: bool = False
    registers: int = 0
    spills: int = 0
    shared: int = 0
    tensor: int = 0
    wide_loads: int = 0
    narrow_loads: int = 0
    num_warps: int = 0
    occupancy: int = 0
    instructions: str = ""
    error: str | None = None

    @property
    def faults(self) -> list[str]:
        """Faults, one phrase each: spills, too much shared memory, no tensor cores in products, no wide loads."""
        if self.error is not None:
            return [self.error]
        found = []
        limit = ARCHITECTURES[self.architecture].block_shared
        if self.spills:
            found.append(f"{self.spills} spills")
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, the limit is {limit}")
        if self.products and not self.tensor:
            found.append("no tensor-core instructions")
        # Four warps multiply 64 rows at a time there, smaller tiles are left to mma.
        if self.products and self.architecture == "sm_90" and self.rows >= 64 and self.instructions != "wgmma":
            found.append(f"{self.instructions} instead of wgmma")
        if not self.wide_loads and not self.columns:
            found.append("no 16-byte loads")
        return found


def specialise(
    launch: Launch, params: Sequence[Any], amd: bool
) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """Signature, constants and attributes of a launch as Triton would find them at run time.

    Triton makes constants of absent buffers and of integers that are 1; it notes pointers and integers that are
    divisible by 16, and on AMD pointers to less than 2 GiB.

    Args:
        launch: the launch; its buffers are allocated at multiples of 16 bytes.
        params: ``fn.params`` of its kernel.
        amd: whether for AMD.
    """
    values = {**dict(launch.arguments), **dict(launch.constants)}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}

    def kind(value: Any, param: Any, where: tuple[int, ...]) -> Any:
        """The type of a value, or of each element of a tuple, at a place among the arguments."""
        if isinstance(value, tuple) and not param.is_constexpr:
            return tuple(kind(item, param, (*where, i)) for i, item in enumerate(value))
        if isinstance(value, Buffer):
            found = []
            if value.offset * value.dtype.itemsize % 16 == 0:
                found.append(["tt.divisibility", 16])
            if amd and (value.offset + value.numel) * value.dtype.itemsize < _INT32:
                found.append(["tt.pointer_range", 32])
            if found:
                attributes[where] = found
            return _TYPES[value.dtype]
        if param.is_constexpr or value is None or (value == 1 and not param.do_not_specialize):
            constants[where] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if value % 16 == 0 and not param.do_not_specialize and not param.do_not_specialize_on_alignment:
            attributes[where] = [["tt.divisibility", 16]]
        return "i32" if -_INT32 <= value < _INT32 else "i64"

    signature = {param.name: kind(values.get(param.name, param.default), param, (i,)) for i, param in enumerate(params)}
    return signature, constants, attributes


def compile_one(job: Job) -> KernelCode:
    """Compiles in this process, in which Triton must not interpret."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch, architecture = job.launch, ARCHITECTURES[job.architecture]
    function = resolve(launch.kernel)
    amd = architecture.backend == "hip"
    source = ASTSource(function, *specialise(launch, function.params, amd))
    target = GPUTarget(architecture.backend, architecture.number, architecture.warp_size)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    try:
        compiled = triton.compile(source, target=target, options=options)
    except Exception as error:  # whatever the compiler raises is a result to show
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        return KernelCode(
            launch.kernel, architecture.name, job.label, error=f"{type(error).__name__}: {lines[-1].strip()}"
        )
    read = read_amd(compiled.asm["amdgcn"]) if amd else read_nvidia(compiled.asm["cubin"])
    read["shared"] = max(read.get("shared", 0), compiled.metadata.shared)
    # Warp specialisation may add warps.
    num_warps = compiled.metadata.num_warps
    occupancy = architecture.occupancy(read["registers"], num_warps, read["shared"])
    rows = max((size for name, size in launch.constants if name in _ROWS), default=0)
    most = max(buffer.nbytes for buffer in launch.buffers(launch.reads))
    return KernelCode(
        *(launch.kernel, architecture.name, job.label),
        products=launch.flops > 0,
        rows=rows,
        columns=launch.kernel in _COLUMNS or most < 16 * architecture.warp_size * launch.num_warps,
        num_warps=num_warps,
        occupancy=occupancy,
        **read,
    )


def compile_all(jobs: Iterable[Job], processes: int | None = None) -> list[KernelCode]:
    """Compiles many, in order.

    Args:
        jobs: what to compile.
        processes: how many at a time; by default one for each CPU that this process may use.
    """
    processes = processes or len(os.sched_getaffinity(0))
    # Fresh processes: they must import Triton with the interpreter off.
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            return list(pool.map(_compile, jobs, chunksize=4))
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret


def _compile(job: Job) -> KernelCode:
    torch.set_num_threads(1)
    return compile_one(job)


# ---------------------------------------------------------------- report


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles all and prints what is wrong; 1 if anything is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offline.triton", description=__doc__)
    parser.add_argument("--architecture", action="append", choices=list(ARCHITECTURES), help="by default all")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--write", type=Path, metavar="FILE", help="write every program as Markdown")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="write the extremes of each kernel as Markdown")
    options = parser.parse_args(arguments)
    names = options.architecture or list(ARCHITECTURES)
    found: list[KernelCode] = []
    for name in names:
        own = compile_all(production_jobs(name, getattr(torch, options.dtype)))
        print(f"{name}: {len(own)} programs, {sum(bool(c.faults) for c in own)} with faults", flush=True)
        found += own
    if options.write is not None:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(markdown(found))
    if options.summary is not None:
        options.summary.write_text(summary(found))
    faulty = [compiled for compiled in found if compiled.faults]
    for compiled in faulty:
        faults = "; ".join(compiled.faults)
        print(f"{compiled.kernel} for {compiled.architecture}, {compiled.label}: {faults}")
    print(f"{len(found)} programs compiled, {len(faulty)} with faults")
    return 1 if faulty else 0


SIZES = (
    "at the published sizes (D = 512, inner width 1536, 8 heads of 64), with 4 heads of 128, at D = 1024 and 2560 and "
    "with every option of a block, for numbers of tokens that 16 divides and others, with and without kept "
    "activations, with each tile that the table in kernels/tiles.py allows"
)


def markdown(found: Sequence[KernelCode]) -> str:
    """The table of every kernel, tile and architecture."""
    import triton

    heads = ("kernel", "tile", "registers", "spills", "shared KB", "matrix", "16-byte loads", "narrower", "warps an SM")
    lines = [
        "# Compiled Triton kernels",
        "",
        f"Written by `python -m benchmarks.offline.triton --write FILE` with Triton {triton.__version__}, without a "
        f"GPU: every kernel {SIZES}.  Registers are those of a thread; spills are instructions that use local memory, "
        "on AMD registers; loads are counted in the code; warps are those that a multiprocessor (compute unit) holds.",
    ]
    for name in dict.fromkeys(compiled.architecture for compiled in found):
        lines += ["", f"## {name}", "", f"| {' | '.join(heads)} |", f"| --- | --- |{' ---: |' * (len(heads) - 2)}"]
        for c in (compiled for compiled in found if compiled.architecture == name):
            cells = (
                *(_stem(c), c.label, c.registers, c.spills, f"{c.shared / 1024:.0f}"),
                *(f"{c.instructions} {c.tensor}" if c.tensor else "-", c.wide_loads, c.narrow_loads, c.occupancy),
            )
            lines.append(
                f"| {' | '.join(map(str, cells))} |" if c.error is None else f"| {_stem(c)} | {c.label} | {c.error} |"
            )
    return "\n".join(lines) + "\n"


def summary(found: Sequence[KernelCode]) -> str:
    """One row for each kernel: the extremes over its programs on each architecture."""
    import triton

    names = list(dict.fromkeys(compiled.architecture for compiled in found))
    lines = [
        "# Compiled Triton kernels",
        "",
        f"Every Triton kernel {SIZES}, compiled with Triton {triton.__version__}, without a GPU.  This page gives the "
        "extremes of each kernel.  This command writes it, and every program with its instructions to build/:",
        "",
        "    python -m benchmarks.offline.triton --write build/gpu_kernels.md --summary docs/gpu_kernels.md",
        "",
        "It exits with 1 if a program spills, exceeds a block's shared memory, multiplies without tensor cores, or "
        "has no 16-byte loads; `pytest -m compile` checks the same.  `--architecture sm_90` compiles for one alone.",
        "",
        "| architecture | programs | with faults | spills | matrix instructions |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for name in names:
        own = [c for c in found if c.architecture == name]
        kinds = sorted({c.instructions for c in own if c.instructions})
        faulty = sum(bool(c.faults) for c in own)
        lines.append(f"| {name} | {len(own)} | {faulty} | {sum(c.spills for c in own)} | {', '.join(kinds)} |")
    lines += [
        "",
        "Most registers a thread / most KB of shared memory / fewest warps that a multiprocessor (compute unit) holds:",
        "",
        f"| kernel | {' | '.join(names)} |",
        f"| --- |{' ---: |' * len(names)}",
    ]
    for stem in dict.fromkeys(map(_stem, found)):
        cells = [_extremes([c for c in found if (c.architecture, _stem(c)) == (name, stem)]) for name in names]
        lines.append(f"| {stem} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _stem(compiled: KernelCode) -> str:
    return compiled.kernel.split(".")[1].removesuffix("_kernel")


def _extremes(programs: Sequence[KernelCode]) -> str:
    compiled = [c for c in programs if c.error is None]
    if not compiled:
        return "-"
    shared = max(c.shared for c in compiled) / 1024
    return f"{max(c.registers for c in compiled)} / {shared:.0f} / {min(c.occupancy for c in compiled)}"


if __name__ == "__main__":
    sys.exit(main())
