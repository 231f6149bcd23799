"""setup.py's build of the C++ extension, tried out on an engine of twenty lines in a copy of the source tree."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")
needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="other machines build only the portable target")

ENGINE = """
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
namespace trmfast { namespace JOIN(TRMFAST_TARGET, TRMFAST_ELEMENT) {
int features() {
  int bits = 0;
#ifdef __AVX2__
  bits |= 1;
#endif
#ifdef __AVX512BF16__
  bits |= 2;
#endif
#ifdef TRMFAST_EMULATE_AMX
  bits |= 4;
#endif
  return bits;
} } }
"""

MODULE = """
#include <Python.h>
#define X(target, element) namespace trmfast { namespace target##_##element { int features(); } }
TRMFAST_TARGETS
#undef X
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cpu", 0, -1, 0, 0, 0, 0, 0};
PyMODINIT_FUNC PyInit__cpu() {
  PyObject* module = PyModule_Create(&definition);
  PyObject* found = PyDict_New();
  PyObject* value;
#define X(target, element)                                              \\
  value = PyLong_FromLong(trmfast::target##_##element::features());     \\
  PyDict_SetItemString(found, #target "/" #element, value);             \\
  Py_DECREF(value);
  TRMFAST_TARGETS
#undef X
  PyModule_AddObject(module, "found", found);
  return module;
}
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree with the real setup.py and pyproject.toml around a tiny engine; its path holds a space."""
    root = tmp_path / "source tree"
    (root / "csrc" / "cpu").mkdir(parents=True)
    (root / "trmfast").mkdir()
    (root / "kernels").mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root / name)
    shutil.copy(ROOT / "trmfast" / "version.py", root / "trmfast" / "version.py")
    for package in ("trmfast", "kernels"):
        (root / package / "__init__.py").write_text("")
    for name in ("engine_target.cpp", "engine_int8.cpp"):
        (root / "csrc" / "cpu" / name).write_text(ENGINE)
    (root / "csrc" / "cpu" / "module.cpp").write_text(MODULE)
    return root


def build(tree: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    """Build in place; the process and the record it leaves."""
    ours = ("TRMFAST_", "CXX", "LDFLAGS")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tree,
        env={**plain, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    record = tree / "trmfast" / "_build_info_cpu.json"
    return done, json.loads(record.read_text()) if record.exists() else {}


def extensions(tree: Path) -> list[Path]:
    return list((tree / "trmfast").glob("_cpu*.so"))


def found(tree: Path) -> dict[str, int]:
    code = "import json, trmfast._cpu as cpu; print(json.dumps(cpu.found))"
    return json.loads(subprocess.check_output([sys.executable, "-c", code], cwd=tree, text=True))


@pytest.mark.breadth
@needs_compiler
def test_every_target_is_built_with_its_own_flags(tree: Path) -> None:
    done, record = build(tree, TRMFAST_EMULATE_AMX="1")
    assert done.returncode == 0, done.stderr
    assert record["error"] is None
    features = found(tree)
    assert sorted(features) == sorted(record["targets"])
    assert features["portable/f32"] == features["portable/bf16"] == features["portable/i8"] == 0
    if platform.machine() == "x86_64":
        assert features["avx2/f32"] == features["avx2/bf16"] == 1
        assert features["amx_emulated/bf16"] == 5
        for target in ("avx512_bf16", "amx"):
            assert f"{target}/bf16" in features or target in record["left_out"]
            assert f"{target}/f32" not in features

    # Nothing to do, then one file.
    again, _ = build(tree, TRMFAST_EMULATE_AMX="1")
    assert "no work to do" in again.stdout
    (tree / "csrc" / "cpu" / "module.cpp").write_text(MODULE + "// changed\n")
    changed, _ = build(tree, TRMFAST_EMULATE_AMX="1")
    assert "module.o" in changed.stdout
    assert "engine_portable" not in changed.stdout


@pytest.mark.breadth
@needs_compiler
@needs_x86
def test_targets_that_are_asked_for(tree: Path) -> None:
    done, record = build(tree, TRMFAST_CPU_TARGETS="avx2")
    assert done.returncode == 0, done.stderr
    assert {name.split("/")[0] for name in found(tree)} == {"avx2", "portable"}
    assert record["left_out"] == {}
    _, record = build(tree, TRMFAST_CPU_TARGETS="avx2 sse9")
    assert record["error"].startswith("TRMFAST_CPU_TARGETS: got sse9, accepted are amx, ")


@pytest.mark.breadth
@needs_compiler
@needs_x86
def test_target_that_the_compiler_does_not_know_is_left_out(tree: Path) -> None:
    old = tree / "old g++"
    old.write_text(
        '#!/bin/sh\ncase "$*" in *-mamx*) echo "error: unrecognized option" >&2; exit 1;; esac\nexec g++ "$@"\n'
    )
    old.chmod(0o755)
    done, record = build(tree, CXX=f"'{old}'")
    assert done.returncode == 0, done.stderr
    assert record["error"] is None
    assert "unrecognized option" in record["left_out"]["amx"]
    assert "leaving out amx" in done.stderr
    assert not [name for name in found(tree) if name.startswith("amx")]


@pytest.mark.breadth
@needs_compiler
def test_failed_compilation_is_recorded_and_removes_the_old_extension(tree: Path) -> None:
    assert build(tree)[0].returncode == 0
    assert extensions(tree)
    (tree / "csrc" / "cpu" / "module.cpp").write_text("#error this engine does not compile\n")
    done, record = build(tree)
    assert done.returncode == 0
    assert "this engine does not compile" in record["error"]
    assert "this engine does not compile" in record["log"]
    assert "the CPU engine was not built" in done.stderr
    assert not extensions(tree)
    assert build(tree, TRMFAST_REQUIRE_CPU="1")[0].returncode != 0


def test_missing_compiler_is_recorded(tree: Path) -> None:
    done, record = build(tree, CXX="/nonexistent/g++")
    assert done.returncode == 0, done.stderr
    assert record["error"].startswith("no C++ compiler: tried /nonexistent/g++")
    assert record["targets"] == []
    assert not extensions(tree)


@needs_compiler
def test_missing_source_is_recorded(tree: Path) -> None:
    (tree / "csrc" / "cpu" / "engine_target.cpp").unlink()
    done, record = build(tree)
    assert done.returncode == 0, done.stderr
    assert "csrc/cpu/engine_target.cpp" in record["error"]


def test_no_code_is_shared_between_instruction_sets() -> None:
    """An inline function outside a target's namespace is merged across targets, into whichever copy comes first."""
    folders = list((ROOT / "build").glob("cpu-release-*/engine_portable_f32.o"))
    if not folders or shutil.which("nm") is None:
        pytest.skip("no objects of this source tree's engine, or no nm to read them")
    newest = max(folders, key=lambda file: file.stat().st_mtime).parent
    for file in newest.glob("engine_*.o"):
        namespace = file.stem.removeprefix("engine_")
        symbols = subprocess.check_output(["nm", "--demangle", str(file)], text=True).splitlines()
        weak = [symbol for symbol in symbols if re.match(r"^[0-9a-f ]{16} [WVu] ", symbol)]
        # Emulated tiles are in one object only.  Names of templates over lambdas may be more than nm can demangle.
        own = (f"trmfast::{namespace}::", "trmfast::amx_emulated::", f" _ZN7trmfast{len(namespace)}{namespace}")
        assert [symbol for symbol in weak if not any(name in symbol for name in own)] == [], file.name
