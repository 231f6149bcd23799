"""What compiled kernels assume of addresses and sizes is true at every launch; see triton_hints.py."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}


def run(code: str) -> subprocess.CompletedProcess[str]:
    """In a process in which Triton does not interpret."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)


def test_assumptions_are_true_at_every_launch() -> None:
    done = run("import json, triton_hints; print(json.dumps(triton_hints.main()))")
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["launches"] > 200
    assert seen["assumptions"] > seen["launches"]
    assert seen["misaligned"] > 200


def test_a_kernel_for_other_addresses_is_found() -> None:
    """The kernel of the first launch serves all others, as if Triton's key left alignment out."""
    done = run(
        "import triton_hints\n"
        "kernels = {}\n"
        "def wrong(self, key, *rest):\n"
        "    if self.__name__ not in kernels:\n"
        "        kernels[self.__name__] = triton_hints.compile_nothing(self, key, *rest)\n"
        "    kernels[self.__name__].constants = {}\n"
        "    return kernels[self.__name__]\n"
        "triton_hints.main(wrong)\n"
    )
    assert done.returncode != 0
    assert "assumed is a multiple of 16" in done.stderr


def test_kernels_give_no_hints_of_their_own() -> None:
    """Hints that a kernel states itself would need a check of values in the interpreter."""
    hints = {"multiple_of", "max_contiguous", "max_constancy", "assume"}
    files = list((ROOT / "kernels").glob("*.py"))
    assert len(files) > 20
    for file in files:
        found = {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
        assert not found & hints, f"{file.name}: {found & hints}"
