"""Registers, spills, shared memory, matrix instructions and loads of a program that Triton compiled."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["read_amd", "read_nvidia"]

_NVIDIA_MATRIX = (
    ("tcgen05", re.compile(r"\bU?T?C(?:H|Q|OM|I)MMA\b|\bUTC\w*MMA\b")),
    ("wgmma", re.compile(r"\b[HIQ]GMMA\b")),
    ("mma", re.compile(r"\b[HIQD]MMA\b")),
)
_NVIDIA_LOAD = re.compile(r"\b(?:LDG|LDGSTS)\.E(?:\.\w+)*")
_NVIDIA_SPILL = re.compile(r"\b(?:STL|LDL)\b")


def read_nvidia(cubin: bytes) -> dict[str, Any]:
    """The fields of ``KernelCode`` that are found in a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage, code = (_cuobjdump(option, file) for option in ("-res-usage", "-sass"))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage: got {usage!r}, expected a line with REG, STACK, SHARED and LOCAL")
    loads = _NVIDIA_LOAD.findall(code)
    wide = sum(".128" in load for load in loads)
    # Bulk copies by the tensor memory accelerator have no width for a thread.
    wide += len(re.findall(r"\bUBLKCP\b|\bUTMALDG\b", code))
    tensor, kind = 0, ""
    for name, pattern in _NVIDIA_MATRIX:
        count = len(pattern.findall(code))
        if count:
            tensor, kind = count, name
            break
    return {
        "registers": int(found[1]),
        "shared": int(found[3]),
        "spills": len(_NVIDIA_SPILL.findall(code)),
        "tensor": tensor,
        "instructions": kind,
        "wide_loads": wide,
        "narrow_loads": len(loads) - sum(".128" in load for load in loads),
    }


def _cuobjdump(option: str, file: Path) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([program, option, file], capture_output=True, text=True, check=True).stdout


def read_amd(assembly: str) -> dict[str, Any]:
    """The fields of ``KernelCode`` that are found in AMD assembly."""

    def metadata(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s+(\d+)", assembly, re.MULTILINE)
        if found is None:
            raise RuntimeError(f"amdgcn: no .{name} in the metadata of the kernel")
        return int(found[1])

    loads = re.findall(r"^\s*((?:global|buffer|flat)_load_\w+)", assembly, re.MULTILINE)
    wide = sum(load.endswith("dwordx4") for load in loads)
    tensor = len(re.findall(r"^\s*v_mfma_", assembly, re.MULTILINE))
    return {
        # The count covers accumulation registers too: they share one file.
        "registers": metadata("vgpr_count"),
        "shared": metadata("group_segment_fixed_size"),
        "spills": metadata("vgpr_spill_count") + metadata("sgpr_spill_count"),
        "tensor": tensor,
        "instructions": "mfma" if tensor else "",
        "wide_loads": wide,
        "narrow_loads": len(loads) - wide,
    }
