"""Debian's cross compiler for AArch64, and qemu, which runs its statically linked programs on any machine."""

from __future__ import annotations

import shutil

__all__ = ["COMPILER", "LINK", "QEMU", "missing_reason"]

COMPILER = "aarch64-linux-gnu-g++"
QEMU = "qemu-aarch64"
LINK = ["-static"]


def missing_reason() -> str | None:
    """None, or what is not installed."""
    if shutil.which(COMPILER) is None:
        return "no cross compiler for AArch64 (Debian: g++-aarch64-linux-gnu)"
    if shutil.which(QEMU) is None:
        return f"no {QEMU} to run what is compiled (Debian: qemu-user)"
    return None
