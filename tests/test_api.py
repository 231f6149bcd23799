"""The package's names: what `dir`, type checkers and editors see, and what is imported when."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import trmfast


def names_of_type_checkers() -> dict[str, str]:
    """Name to module of the imports under ``if TYPE_CHECKING:``."""
    tree = ast.parse(Path(trmfast.__file__).read_text())
    blocks = {ast.unparse(node.test): node for node in tree.body if isinstance(node, ast.If)}
    block = blocks["TYPE_CHECKING"]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert len(imports) == len(block.body)
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def test_every_public_name_is_known_before_it_is_used() -> None:
    assert names_of_type_checkers() == {**trmfast._LAZY, "nn": "trmfast"}
    assert {*trmfast._LAZY, "nn", "__version__"} == set(trmfast.__all__)
    assert set(trmfast.__all__) <= set(dir(trmfast))
    assert not {"Any", "import_module", "sys"} & set(dir(trmfast))


@pytest.mark.parametrize("name", trmfast.__all__)
def test_public_names_are_the_modules_own(name: str) -> None:
    value = getattr(trmfast, name)
    module = trmfast._LAZY.get(name)
    if name == "nn":
        assert value is import_module("trmfast.nn")
    elif module is not None:
        assert value is getattr(import_module(module), name)
        assert value.__module__.startswith("trmfast.")


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="module 'trmfast' has no attribute 'acelerate'"):
        trmfast.acelerate  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("statement", ["import trmfast; dir(trmfast)", "trmfast.cli.main(['--help'])"])
def test_without_torch(statement: str) -> None:
    """Neither the package nor the command's help waits for torch: seconds."""
    code = f"import atexit, sys, trmfast.cli\natexit.register(lambda: print('torch' in sys.modules))\n{statement}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.breadth
def test_star_import() -> None:
    code = "from trmfast import *\nprint(TRM.__name__, nn.Net.__name__, recursion.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "TRM Net recursion\n", done.stderr
