"""Compiles the CUDA engine without a GPU, and reads its machine code.

``python -m benchmarks.offline.cuda --write docs/cuda_kernels.md``.  Needs nvcc and cuobjdump
(of the toolkit, or the one that Triton's wheel brings); no GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from trmfast.kernels.architectures import ARCHITECTURES

__all__ = [
    "CUDA_ARCHITECTURES",
    "ELEMENTS",
    "RESIDENT",
    "Instance",
    "InstanceCode",
    "compile_all",
    "find_cuobjdump",
    "find_nvcc",
    "instances",
    "machine_code",
    "markdown",
]

SOURCE = Path(__file__).resolve().parent.parent.parent / "csrc" / "cuda"
CUDA_ARCHITECTURES = tuple(a.number for a in ARCHITECTURES.values() if isinstance(a.number, int))
ELEMENTS = ("bf16", "fp16")
WARPS = 8
RESERVED_SHARED = 1024
"""Shared memory that CUDA reserves in every block; cuobjdump counts them as the kernel's own."""
RESIDENT = 1
"""Blocks of the grid that a multiprocessor must hold; csrc/cuda/launch_shape.h counts on it when it makes groups."""


class Instance(NamedTuple):
    """An instance of the kernel (csrc/cuda/instances.h), and bytes of shared memory for the largest block it runs."""

    row_tiles: int
    stages: int
    width_tiles: int
    token_tiles: int
    strip_tiles: int
    shared: int

    @property
    def name(self) -> str:
        """Its rows, width and mixer in words."""
        width = 64 * self.width_tiles
        mixer = f"mlp_t up to L {64 * self.token_tiles}" if self.token_tiles else "attention"
        return f"{mixer}, D up to {width}, {16 * self.row_tiles} rows, {self.stages} stages"


@dataclass(frozen=True)
class InstanceCode:
    """One kernel for one architecture.

    Attributes:
        element: ``"bf16"`` or ``"fp16"``.
        architecture: its name.
        instance: which instance of the recursion, or None for the kernel that packs weights.
        registers: for each thread.
        stack, local: bytes of local memory for each thread.
        shared: bytes of static shared memory; dynamic shared memory is the instance's.
        counts: machine instructions by name, and by name with modifiers.
    """

    element: str
    architecture: str
    instance: Instance | None
    registers: int
    stack: int
    local: int
    shared: int
    counts: Counter[str] = field(repr=False)

    @property
    def fits(self) -> bool:
        """Whether a block's shared memory fits this architecture.  Plans pass over instances that don't fit."""
        wanted = self.shared + (self.instance.shared if self.instance else 0)
        return wanted <= ARCHITECTURES[self.architecture].block_shared

    @property
    def resident(self) -> int:
        """Resident blocks per multiprocessor."""
        wanted = self.shared + (self.instance.shared if self.instance else 0)
        return ARCHITECTURES[self.architecture].occupancy(self.registers, WARPS, wanted) // WARPS

    @property
    def spills(self) -> int:
        """Loads from and stores to local memory."""
        return self.counts["LDL"] + self.counts["STL"]

    @property
    def faults(self) -> list[str]:
        """Faults, one phrase each."""
        found = []
        if self.spills or self.stack or self.local:
            found.append(f"{self.spills} loads and stores of local memory, {self.stack + self.local} bytes of it")
        for name in ("LD", "ST"):
            if self.counts[name]:
                found.append(f"{self.counts[name]} x {name}: a generic address")
        if self.instance is None:
            return found
        product = "HMMA.16816.F32.BF16" if self.element == "bf16" else "HMMA.16816.F32"
        # The product that fills the widest accumulator alone has this many.
        least = self.instance.row_tiles * self.instance.width_tiles
        if self.counts[product] < least or self.counts[product] != self.counts["HMMA"]:
            found.append(
                f"{self.counts[product]} of {self.counts['HMMA']} HMMA are {product}, expected all and {least}"
            )
        if not self.counts["LDSM"]:
            found.append("no LDSM: operands of products don't come by ldmatrix")
        if not self.counts["LDGSTS"] or self.counts["LDGSTS.E.BYPASS.LTC128B.128"] != self.counts["LDGSTS"]:
            found.append("no LDGSTS of 16 bytes: weights don't come by cp.async")
        if self.counts["STG.E.128"] != self.counts["STG"] or not self.counts["LDG.E.128"]:
            found.append(f"{self.counts['STG.E.128']} of {self.counts['STG']} stores have 16 bytes, or no load has")
        # The acquire of a group's barrier invalidates other blocks' exchange in the L1 cache.
        if not self.counts["MEMBAR.ALL.GPU"] or not self.counts["CCTL.IVALL"]:
            found.append(
                "no MEMBAR.ALL.GPU or no CCTL.IVALL: blocks of a group may read what was there before a barrier"
            )
        if self.fits and self.resident < RESIDENT:
            found.append(f"{self.resident} resident blocks, plans count on {RESIDENT}")
        return found


# ---------------------------------------------------------------- tools


def find_nvcc() -> str | None:
    """The path of nvcc, or of what the environment variable NVCC names, or None."""
    asked = os.environ.get("NVCC")
    return shutil.which(asked) if asked else shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def find_cuobjdump() -> str | None:
    """The path of cuobjdump: on the path, beside nvcc, or in Triton's wheel; or None."""
    compiler = find_nvcc()
    beside = [Path(compiler).resolve().parent] if compiler else []
    wheel = Path(sysconfig.get_paths()["purelib"]) / "triton" / "backends" / "nvidia" / "bin"
    places = ["cuobjdump", *(str(folder / "cuobjdump") for folder in (*beside, wheel))]
    return next((found for place in places if (found := shutil.which(place))), None)


def machine_code(cubin: Path) -> dict[str, Counter[str]]:
    """Per kernel, how often each machine instruction occurs, by its name without modifiers and by its full name."""
    kernels: dict[str, Counter[str]] = {}
    counts: Counter[str] = Counter()
    for line in _run([_required(find_cuobjdump(), "cuobjdump"), "-sass", str(cubin)]).splitlines():
        function = re.search(r"Function : (\S+)", line)
        if function:
            counts = kernels.setdefault(function.group(1), Counter())
        instruction = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)((?:\.\w+)*)", line)
        if instruction:
            name, modifiers = instruction.groups()
            counts[name] += 1
            if modifiers:
                counts[name + modifiers] += 1
    return kernels


def instances(source: Path = SOURCE) -> list[Instance]:
    """The instances of instances.h, in its order, with shared memory as launch_shape.h computes it.

    Args:
        source: the folder csrc/cuda.
    """
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "describe"
        compiler = _required(find_nvcc(), "nvcc")
        _run([compiler, "-std=c++17", f"-I{source}", str(source / "describe.cpp"), "-o", str(program)])
        return [Instance(*map(int, line.split())) for line in _run([str(program)]).splitlines()]


def compile_all(architectures: Iterable[int], source: Path = SOURCE) -> list[InstanceCode]:
    """All kernels of both elements for some architectures, one compiler for each CPU that this process may use.

    Args:
        architectures: for example 80 and 90.
        source: the folder csrc/cuda.

    Raises:
        RuntimeError: the compiler fails or warns, with what it says.
    """
    known = instances(source)
    jobs = [(number, element) for number in architectures for element in ELEMENTS]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = pool.map(lambda job: _compile(job[0], job[1], known, source), jobs)
        return [one for found in results for one in found]


def _compile(number: int, element: str, known: Sequence[Instance], source: Path) -> list[InstanceCode]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        flags = ["-std=c++17", "-O3", "-DNDEBUG", f"-arch=sm_{number}", "-cubin", "--Werror=all-warnings"]
        flags += ["-Xcompiler=-Wall,-Wextra", "-Xptxas=-warn-spills,-warn-lmem-usage", f"-DTRMFAST_ELEMENT={element}"]
        compiler = _required(find_nvcc(), "nvcc")
        _run([compiler, *flags, f"-I{source}", str(source / "launch.cu"), "-o", str(cubin)], silent=True)
        usage = _run([_required(find_cuobjdump(), "cuobjdump"), "-res-usage", str(cubin)])
        code = machine_code(cubin)
    by_sizes = {instance[:5]: instance for instance in known}
    found = []
    for name, *numbers in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage):
        registers, stack, shared, local = map(int, numbers)
        sizes = tuple(map(int, re.findall(r"Li(\d+)E", name)))
        instance = by_sizes[sizes] if "recursion_forward" in name else None  # type: ignore[index]
        static = max(0, shared - RESERVED_SHARED)
        found.append(InstanceCode(element, f"sm_{number}", instance, registers, stack, local, static, code[name]))
    order = [*known, None]
    found.sort(key=lambda one: order.index(one.instance))
    if [one.instance for one in found] != order:
        raise RuntimeError(f"sm_{number}, {element}: got {len(found)} kernels, expected {len(order)}: {usage}")
    return found


def _required(path: str | None, name: str) -> str:
    if path is None:
        raise RuntimeError(f"no {name} on this machine")
    return path


def _run(command: Sequence[str], silent: bool = False) -> str:
    """The output of a command; it must succeed, and print nothing if `silent`."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or (silent and (done.stdout or done.stderr)):
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    return done.stdout


# ---------------------------------------------------------------- report


def markdown(found: Sequence[InstanceCode], compiler: str) -> str:
    """The table of every kernel and architecture.

    Args:
        found: what was compiled.
        compiler: its version.
    """
    heads = ("kernel", "registers", "spills", "shared KB", "blocks an SM", "HMMA", "LDSM", "LDGSTS", "LDL + STL")
    lines = [
        "# Compiled CUDA kernels",
        "",
        "Written by `python -m benchmarks.offline.cuda --write docs/cuda_kernels.md` "
        f"with {compiler}, without a GPU: every kernel of csrc/cuda.  Where bf16 and fp16 differ both are given.  "
        "Registers are those of a thread, of 256 in a block; spills are bytes of local memory of a thread; shared "
        "memory is that of the largest block an instance runs (heads of 64).  Blocks are those that a multiprocessor "
        "holds, by registers and shared memory: plans count on one, and pass over an instance where its shared memory "
        "does not fit (-).  The rest are instructions in the code: HMMA is `mma`, LDSM `ldmatrix`, LDGSTS `cp.async`, "
        "LDL and STL use local memory.  `pytest -m compile` fails if one of these numbers becomes a fault.",
    ]
    for name in dict.fromkeys(one.architecture for one in found):
        lines += ["", f"## {name}", "", f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
        rows: dict[Instance | None, list[InstanceCode]] = {}
        for one in found:
            if one.architecture == name:
                rows.setdefault(one.instance, []).append(one)
        for instance, kinds in rows.items():
            columns = zip(*(_cells(one) for one in kinds), strict=True)
            cells = [" / ".join(dict.fromkeys(column)) for column in columns]
            lines.append(f"| {instance.name if instance else 'packing of weights'} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cells(one: InstanceCode) -> tuple[str, ...]:
    wanted = one.shared + (one.instance.shared if one.instance else 0)
    counts = (one.counts["HMMA"], one.counts["LDSM"], one.counts["LDGSTS"], one.spills)
    resident = str(one.resident) if one.fits else "-"
    return (str(one.registers), str(one.stack + one.local), f"{wanted / 1024:.1f}", resident, *map(str, counts))


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles everything and prints the faults; 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offline.cuda", description=__doc__)
    parser.add_argument("--architecture", type=int, action="append", choices=CUDA_ARCHITECTURES, help="by default all")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table as Markdown")
    options = parser.parse_args(arguments)
    needed = {"nvcc": find_nvcc(), "cuobjdump": find_cuobjdump(), str(SOURCE): SOURCE.exists() or None}
    missing = [name for name, found in needed.items() if found is None]
    if missing:
        print(f"no {', no '.join(missing)} on this machine", file=sys.stderr)
        return 2
    found = compile_all(options.architecture or CUDA_ARCHITECTURES)
    if options.write is not None:
        version = _run([_required(find_nvcc(), "nvcc"), "--version"])
        number = re.search(r"release ([\d.]+)", version)
        options.write.write_text(markdown(found, f"nvcc {number[1] if number else 'of an unknown version'}"))
    faulty = [one for one in found if one.faults]
    for one in faulty:
        name = one.instance.name if one.instance else "packing of weights"
        print(f"{one.architecture}, {one.element}, {name}: {'; '.join(one.faults)}")
    unfit = sum(not one.fits for one in found)
    print(f"{len(found)} kernels compiled, {len(faulty)} with faults, {unfit} need more shared memory than there is")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
