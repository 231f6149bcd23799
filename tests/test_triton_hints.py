"""What compiled kernels assume of addresses and sizes is true at every launch; see triton_hints.py."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from trmfast.kernels import assumptions, plan

from trmfast.cases import SMALL, make_inputs
from trmfast.testing import run_fused

ROOT = Path(__file__).resolve().parent.parent


def run(code: str, checks: str = "1") -> subprocess.CompletedProcess[str]:
    """In a process in which Triton does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT}/tests", "TRMFAST_CHECK_LAUNCHES": checks}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)


def test_assumptions_are_true_at_every_launch() -> None:
    done = run("import json, triton_hints; print(json.dumps(triton_hints.main()))")
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["launches"] > 200
    assert seen["assumptions"] > seen["launches"]
    assert seen["misaligned"] > 200


# The kernel of the first launch serves all others, as if Triton's key left out what is checked.
WRONG = """
import triton_hints
kernels = {}
def wrong(self, key, *rest):
    if self.__name__ not in kernels:
        kernels[self.__name__] = triton_hints.compile_nothing(self, key, *rest)
        setattr(kernels[self.__name__].src, "OTHER", {})
    return kernels[self.__name__]
try:
    print(triton_hints.main(wrong)["assumptions"])
except RuntimeError as error:
    print(error)
"""
ADDRESSES, CONSTANTS = (WRONG.replace("OTHER", other) for other in ("constants", "attrs"))


VALUE = r"([\w.']+|\([-\w., ]*\))"  # or a tuple of them


@pytest.mark.breadth
@pytest.mark.parametrize("wrong, assumed", [(ADDRESSES, "a multiple of 16"), (CONSTANTS, VALUE)])
def test_a_kernel_for_other_arguments_is_found(wrong: str, assumed: str) -> None:
    """In one line, before it is launched."""
    done = run(wrong)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"\w+_kernel: \w+(\[\d\])? is {VALUE}, the compiled kernel assumes {assumed}\n", done.stdout)


def test_nothing_is_compared_unless_asked() -> None:
    done = run(ADDRESSES, checks="")
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


@pytest.mark.gpu
def test_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels as Triton compiles them there."""
    compared = []
    check = assumptions.check
    monkeypatch.setattr(assumptions, "check", lambda *values: compared.append(check(*values)))
    monkeypatch.setattr(plan, "CHECK_LAUNCHES", True)
    run_fused(make_inputs(SMALL[0], torch.bfloat16, device="cuda"), "triton")
    assert sum(compared) > len(compared) > 0


def test_kernels_give_no_hints_of_their_own() -> None:
    """Hints that a kernel states itself would need a check of values in the interpreter."""
    hints = {"multiple_of", "max_contiguous", "max_constancy", "assume"}
    files = list((ROOT / "kernels").glob("*.py"))
    assert len(files) > 20
    for file in files:
        found = {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
        assert not found & hints, f"{file.name}: {found & hints}"
