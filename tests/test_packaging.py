"""What the repository, an installation and a wheel hold; installing on a machine without a compiler."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import trmfast
from trmfast.build_info import build_info
from trmfast.data import model_names

ROOT = Path(__file__).resolve().parent.parent
TOP_LEVEL = {
    *("pyproject.toml", "setup.py", "constraints.txt", "MANIFEST.in", "LICENSE"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md"),
    *("kernels", "csrc", "trmfast", "benchmarks", "tests", "docs"),
}
BUILD_PRODUCTS = (".so", ".o", ".pyc", ".whl", ".pt", ".pth", ".ckpt", ".safetensors", ".npz", ".npy", ".cubin")


def repository_files() -> list[str]:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    return subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()


def test_one_version() -> None:
    assert metadata.version("trmfast") == trmfast.__version__
    newest = re.search(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == trmfast.__version__


def test_no_forbidden_files() -> None:
    files = repository_files()
    top_level = {name.split("/")[0] for name in files}
    assert {name for name in top_level if not name.startswith(".")} <= TOP_LEVEL
    models = {name for name in files if re.fullmatch(r"trmfast/data/[a-z-]+\.safetensors", name)}
    others = [name for name in files if name not in models]
    assert [name for name in others if name.endswith(BUILD_PRODUCTS) or "_build_info_" in name] == []
    for names, most in ((others, 1_000_000), (models, 2_000_000)):
        assert [name for name in names if (ROOT / name).exists() and (ROOT / name).stat().st_size > most] == []


def test_readme_commands_use_the_constraints() -> None:
    commands = [line for line in (ROOT / "README.md").read_text().splitlines() if "pip install" in line]
    assert any("-e '.[bench]'" in line and line.endswith("trmfast bench") for line in commands)
    assert any("-e '.[test]'" in line and line.endswith("pytest") for line in commands)
    # A user's own environment keeps the PyTorch that it has.
    assert all("-c constraints.txt" in line for line in commands if "venv" in line)


def test_constraints_cover_the_declared_requirements() -> None:
    pinned = set(re.findall(r"^([A-Za-z0-9_-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    declared = set()
    for requirement in metadata.requires("trmfast") or []:
        name = re.match(r"[A-Za-z0-9_.-]+", requirement)
        assert name is not None
        declared.add(name.group(0).lower())
    assert declared <= pinned


def test_this_installation_built_the_engine_or_says_why() -> None:
    info = build_info()
    if info.error is None:
        assert info.targets
        assert importlib.import_module("trmfast._cpu")
    else:
        compiler = shutil.which(os.environ.get("CXX", "g++"))
        assert compiler is None, f"{info.error}\n{info.log}"


def test_kernels_import_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import trmfast.kernels; print(trmfast.kernels.__file__)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip().endswith("__init__.py")


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made from a copy of the source tree."""
    source, output = tmp_path_factory.mktemp("source") / "trmfast", tmp_path_factory.mktemp("sdist")
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "__pycache__", "_build_info_*.json")
    shutil.copytree(ROOT, source, ignore=ignored)
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "-d", str(output)], cwd=source, check=True, timeout=300)
    (archive,) = output.glob("*.tar.gz")
    return archive


def test_source_distribution_holds_the_repository(source_distribution: Path) -> None:
    with tarfile.open(source_distribution) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = {name for name in repository_files() if (ROOT / name).exists()}
    assert {name for name in files - names if not name.startswith(".")} == set()


@pytest.fixture(scope="module")
def wheel_without_compiler(source_distribution: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the source distribution on a machine whose compiler does not exist."""
    output = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    environment = {**os.environ, "CXX": "/nonexistent/g++"}
    done = subprocess.run(
        [*pip, "-w", str(output), str(source_distribution)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = output.glob("*.whl")
    return wheel


def test_wheel_holds_every_module(wheel_without_compiler: Path) -> None:
    names = set(zipfile.ZipFile(wheel_without_compiler).namelist())
    for folder, package in ((ROOT / "trmfast", "trmfast"), (ROOT / "kernels", "trmfast/kernels")):
        for file in folder.rglob("*.py"):
            assert f"{package}/{file.relative_to(folder).as_posix()}" in names
    assert "trmfast/py.typed" in names
    assert {f"trmfast/data/{name}.safetensors" for name in model_names()} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "csrc/", "kernels/"))]


@pytest.mark.breadth
def test_installs_and_computes_without_a_compiler(wheel_without_compiler: Path, tmp_path: Path) -> None:
    # Beside the present environment, so that no second torch is installed.
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*pip, str(wheel_without_compiler)], check=True, timeout=300)
    code = """
import json, torch, trmfast
from trmfast.build_info import build_info
from trmfast.data import model_names
program = trmfast.RecursionProgram.trm(H_cycles=1, L_cycles=1)
net = trmfast.NetSpec(trmfast.BlockSpec(seq_len=3, hidden_size=16, intermediate_size=32, num_heads=2), num_layers=1)
nets = trmfast.nn.Recursion(program, [trmfast.nn.Net(net)])
states = nets((torch.randn(2, 3, 16), torch.randn(2, 3, 16)), torch.randn(2, 3, 16))
print(json.dumps([trmfast.__file__, build_info().error, [bool(s.isfinite().all()) for s in states]]))
"""
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, error, finite = json.loads(done.stdout)
    assert Path(file).is_relative_to(target)
    assert error.startswith("no C++ compiler: tried /nonexistent/g++")
    assert finite == [True, True]
