"""No module imports one of a higher layer, in functions and for types included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Bottom to top.  A module may import what is in its own layer and below.
LAYERS = (
    ("version", "build_info", "spec", "updates", "program", "problem"),
    ("budget",),
    ("config", "architectures", "engine", "targets", "file_format", "data", "sudoku", "sudoku_puzzles"),
    ("kernels",),
    ("int8", "reference", "recompute", "flops", "watch"),
    ("backends",),
    ("ops", "autograd", "transforms"),
    ("layers", "networks", "nn", "foreign"),
    ("cases", "testing", "models", "layouts", "checkpoint", "checkpoint_files", "puzzles"),
    ("dropin",),
    ("solving",),
    ("runtime",),
    ("",),  # the package itself: trmfast/__init__.py
    ("benchmark",),
    ("cli", "__main__"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# Kernels know the shape of a problem and nothing else of the package.
KERNELS_MAY_USE = {"kernels", "spec", "problem"}
# Extension modules, which backends load.
EXTENSIONS = {"_cpu": "targets", "_cuda": "backends"}


def imported(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of every module of trmfast that a source imports, as the piece after ``trmfast.``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            assert node.module is not None
            names = [node.module]
            if node.module == "trmfast":
                names = [f"trmfast.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "trmfast":
                piece = rest.partition(".")[0]
                piece = EXTENSIONS.get(piece, piece)
                yield node.lineno, piece if piece in RANK else ""


def sources() -> Iterator[tuple[str, Path]]:
    for file in sorted((ROOT / "trmfast").rglob("*.py")):
        piece = file.relative_to(ROOT / "trmfast").parts[0].removesuffix(".py")
        yield ("" if piece == "__init__" else piece), file
    for file in sorted((ROOT / "kernels").glob("*.py")):
        yield "kernels", file


def violations(piece: str, source: str) -> list[str]:
    found = []
    for line, other in imported(source):
        if RANK[other] > RANK[piece] or (piece == "kernels" and other not in KERNELS_MAY_USE):
            found.append(f"line {line}: {piece} imports {other or 'trmfast'}")
    return found


@pytest.mark.parametrize(
    "piece, file", [pytest.param(*found, id=str(found[1].relative_to(ROOT))) for found in sources()]
)
def test_imports_go_down(piece: str, file: Path) -> None:
    assert piece in RANK, f"{file}: in no layer"
    assert violations(piece, file.read_text()) == []


@pytest.mark.parametrize(
    "piece, source, expected",
    [
        ("kernels", "from trmfast.cases import PUBLISHED", ["line 1: kernels imports cases"]),
        ("kernels", "from trmfast.program import Update", ["line 1: kernels imports program"]),
        ("kernels", "from trmfast.problem import Problem\nimport trmfast.kernels.plan", []),
        ("benchmark", "def f():\n    from trmfast.cli.plan import plans", ["line 2: benchmark imports cli"]),
        ("ops", "from trmfast import nn", ["line 1: ops imports nn"]),
        ("ops", "from trmfast import recursion", ["line 1: ops imports trmfast"]),
        ("ops", "import trmfast.backends.cpu, torch", []),
        ("backends", "from trmfast import _cpu", []),
    ],
)
def test_what_counts_as_upward(piece: str, source: str, expected: list[str]) -> None:
    assert violations(piece, source) == expected
