"""Builds the package and its two extensions, ``trmfast._cpu`` (C++) and ``trmfast._cuda`` (CUDA C++).

Metadata is in pyproject.toml.  This file holds what that format cannot express: packages in two folders, the build of
the CPU engine, which compiles one source file once per instruction set with that set's flags, and the build of the
CUDA engine with nvcc.  Both extensions are optional: if one cannot be built, the installation continues and
``trmfast/_build_info_*.json`` says why.

Environment:
    CXX, CXXFLAGS, LDFLAGS       the compiler (default: the first of g++, clang++, c++) and flags appended to ours
    TRMFAST_CUDA                 1: build the CUDA engine or fail; 0: don't.  Default: build it if nvcc and an NVIDIA
                                 driver are found: it takes minutes, which a machine without a GPU need not spend
    NVCC                         nvcc; default: searched on the path and in /usr/local/cuda
    TRMFAST_CUDA_ARCHITECTURES   for example "89 90"; default: all
    TRMFAST_REQUIRE_CPU=1        a failure to build the extension fails the installation
    TRMFAST_SANITIZE=address,undefined | thread | ...     an instrumented build
    TRMFAST_CPU_TARGETS          for example "avx2 portable"; default: all that the compiler takes
    TRMFAST_EMULATE_AMX=1        also the target amx_emulated: the AMX kernel's schedule on plain vector instructions
    MAX_JOBS                     the number of parallel compilations
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCE = ROOT / "csrc" / "cpu"
CUDA_SOURCE = ROOT / "csrc" / "cuda"
PER_TARGET_SOURCES = {"f32": "engine_target.cpp", "bf16": "engine_target.cpp", "i8": "engine_int8.cpp"}

AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
AVX_VNNI = (*AVX2, "-mavxvnni")
AVX512_VNNI = (*AVX512, "-mavx512vnni")
AVX512_BF16 = (*AVX512_VNNI, "-mavx512bf16")
AMX = (*AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8")


@dataclass(frozen=True)
class Target:
    """One instruction set: its name in C++ and TRMFAST_CPU_ISA, its flags, the element types it is compiled for."""

    name: str
    flags: tuple[str, ...]
    elements: tuple[str, ...]


# Best first, the order of preference in csrc/cpu/isa.cpp and the dispatcher.
X86_TARGETS = (
    Target("amx", AMX, ("bf16", "i8")),
    Target("avx512_bf16", AVX512_BF16, ("bf16", "i8")),
    Target("avx512_vnni", AVX512_VNNI, ("i8",)),
    Target("avx512", AVX512, ("f32", "bf16", "i8")),
    Target("avx_vnni", AVX_VNNI, ("i8",)),
    Target("avx2", AVX2, ("f32", "bf16", "i8")),
)
EMULATED_AMX = Target("amx_emulated", (*AVX2, "-DTRMFAST_EMULATE_AMX"), ("bf16", "i8"))
PORTABLE = Target("portable", (), ("f32", "bf16", "i8"))


CUDA_ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
CUDA_ELEMENTS = ("bf16", "fp16")


class CannotBuildError(Exception):
    """The extension cannot be built; the message is one line that says what is missing."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


@dataclass
class Build:
    """Everything that decides the bytes of the extension."""

    compiler: list[str]
    compiler_version: str
    ninja: str
    common_flags: list[str]
    baseline_flags: list[str]  # of the files that are compiled once
    link_flags: list[str]
    targets: list[Target] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    sanitize: str = ""

    def pairs(self) -> list[tuple[Target, str]]:
        return [(target, element) for target in self.targets for element in target.elements]


def find_compiler() -> tuple[list[str], str]:
    """The C++ compiler as a command, and the first line of its --version."""
    asked = os.environ.get("CXX", "").strip()
    tried = []
    for command in [asked] if asked else ["g++", "clang++", "c++"]:
        words = shlex.split(command)
        tried.append(command)
        if shutil.which(words[0]) is None:
            continue
        version = subprocess.run([*words, "--version"], capture_output=True, text=True)
        if version.returncode == 0 and version.stdout:
            return words, version.stdout.splitlines()[0].strip()
    raise CannotBuildError(f"no C++ compiler: tried {', '.join(tried)}; install g++ or clang++, or set CXX")


def find_ninja() -> str:
    with contextlib.suppress(ImportError):
        import ninja  # the build requirement; a system ninja does as well

        found = shutil.which("ninja", path=ninja.BIN_DIR)
        if found:
            return found
    found = shutil.which("ninja")
    if found is None:
        raise CannotBuildError("no ninja: `pip install ninja` is enough")
    return found


def find_headers() -> list[str]:
    try:
        import pybind11
    except ImportError as error:
        raise CannotBuildError("no pybind11: `pip install pybind11` is enough") from error
    include = sysconfig.get_paths()["include"]
    if not (Path(include) / "Python.h").exists():
        raise CannotBuildError(f"no Python.h in {include}: install the headers of this Python (python3-dev)")
    return ["-isystem", pybind11.get_include(), "-isystem", include]


def compiler_problem(compiler: list[str], flags: list[str] | tuple[str, ...], source: str) -> str | None:
    """None if the compiler takes the flags, otherwise the first line it prints about them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "probe.cpp"
        file.write_text(source)
        done = subprocess.run(
            [*compiler, "-std=c++17", *flags, "-c", str(file), "-o", str(file.with_suffix(".o"))],
            capture_output=True,
            text=True,
        )
    if done.returncode == 0:
        return None
    return next((line.strip() for line in done.stderr.splitlines() if "error" in line), "it fails without a message")


def wanted_targets(known: tuple[Target, ...]) -> list[Target]:
    """The targets that TRMFAST_CPU_TARGETS names, all without it; `portable` is always built."""
    asked = os.environ.get("TRMFAST_CPU_TARGETS", "").split()
    names = [*(target.name for target in known), PORTABLE.name]
    if unknown := [name for name in asked if name not in names]:
        raise CannotBuildError(f"TRMFAST_CPU_TARGETS: got {unknown[0]}, accepted are {', '.join(names)}")
    return [target for target in known if not asked or target.name in asked]


def make_build() -> Build:
    for name in (*PER_TARGET_SOURCES.values(), "module.cpp"):
        if not (SOURCE / name).exists():
            raise CannotBuildError(f"csrc/cpu/{name} is not in this source tree")
    compiler, version = find_compiler()
    problem = compiler_problem(compiler, (), "#include <vector>\nint main() { return 0; }\n")
    if problem:
        raise CannotBuildError(f"{shlex.join(compiler)} cannot compile C++17: {problem}")

    sanitize = os.environ.get("TRMFAST_SANITIZE", "").strip()
    common = ["-std=c++17", "-fPIC", "-pthread", "-Wall", "-Wextra", f"-ffile-prefix-map={ROOT}/="]
    common += ["-fvisibility=hidden", "-fvisibility-inlines-hidden"]
    if sanitize:
        common += ["-O1", "-g1", "-fno-omit-frame-pointer", f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"]
    else:
        common += ["-O3", "-DNDEBUG"]
    common += shlex.split(os.environ.get("CXXFLAGS", ""))

    link = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    link += ["-pthread", *([f"-fsanitize={sanitize}"] if sanitize else []), *shlex.split(os.environ.get("LDFLAGS", ""))]

    build = Build(compiler, version, find_ninja(), common, find_headers(), link, sanitize=sanitize)
    if platform.machine().lower() in ("x86_64", "amd64"):
        emulated = (EMULATED_AMX,) if os.environ.get("TRMFAST_EMULATE_AMX", "") == "1" else ()
        for target in wanted_targets((*X86_TARGETS, *emulated)):
            problem = compiler_problem(compiler, target.flags, "#include <immintrin.h>\nint probe;\n")
            if problem is None:
                build.targets.append(target)
            else:
                build.left_out[target.name] = f"{version} does not take its flags: {problem}"
                print(f"trmfast: leaving out {target.name}: {build.left_out[target.name]}", file=sys.stderr)
    build.targets.append(PORTABLE)
    list_of_pairs = " ".join(f"X({target.name},{element})" for target, element in build.pairs())
    build.baseline_flags.append(f"-DTRMFAST_TARGETS={list_of_pairs}")
    return build


def quote(words: list[str]) -> str:
    """Words of a command in build.ninja."""
    return shlex.join(words).replace("$", "$$")


def ninja_path(file: Path) -> str:
    """A file in a build line of build.ninja."""
    return str(file).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_text(build: Build, output_name: str) -> str:
    """build.ninja: one object per file, one per (target, element) for the per-target file, and the link."""
    lines = [
        "ninja_required_version = 1.8",
        f"cxx = {quote(build.compiler)}",
        f"common = {quote(build.common_flags)}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $common $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = $cxx $in -o $out {quote(build.link_flags)}",
        "  description = link $out",
    ]
    objects = []

    def compile_one(source: Path, name: str, flags: list[str]) -> None:
        objects.append(name)
        lines.extend([f"build {name}: compile {ninja_path(source)}", f"  flags = {quote(flags)}"])

    for source in sorted(SOURCE.glob("*.cpp")):
        if source.name not in PER_TARGET_SOURCES.values():
            compile_one(source, f"{source.stem}.o", build.baseline_flags)
    for target, element in build.pairs():
        flags = [*target.flags, f"-DTRMFAST_TARGET={target.name}", f"-DTRMFAST_ELEMENT={element}"]
        compile_one(SOURCE / PER_TARGET_SOURCES[element], f"engine_{target.name}_{element}.o", flags)
    lines += [f"build {output_name}: link {' '.join(objects)}", f"default {output_name}"]
    return "\n".join(lines) + "\n"


@dataclass
class CudaBuild:
    """Everything that decides the bytes of the CUDA extension."""

    nvcc: Path
    compiler: list[str]
    compiler_version: str
    ninja: str
    toolkit: Path
    architectures: list[str]
    headers: list[str]


def has_driver() -> bool:
    """Whether this machine has an NVIDIA driver."""
    if any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg")):
        return True
    return shutil.which("nvidia-smi") is not None


def make_cuda_build() -> CudaBuild:
    asked = os.environ.get("TRMFAST_CUDA", "").strip()
    if asked == "0":
        raise CannotBuildError("TRMFAST_CUDA=0 when it was installed")
    named = os.environ.get("NVCC", "").strip()
    found = shutil.which(named or "nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        raise CannotBuildError(f"no nvcc: {named or 'nvcc'} is not on the path; install the CUDA toolkit, or set NVCC")
    if asked != "1" and not has_driver():
        raise CannotBuildError(f"{found} is there, but no NVIDIA driver; TRMFAST_CUDA=1 builds it all the same")
    compiler, host_version = find_compiler()
    version = subprocess.run([found, "--version"], capture_output=True, text=True).stdout.strip().splitlines()[-1]
    listed = subprocess.run([found, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    wanted = os.environ.get("TRMFAST_CUDA_ARCHITECTURES", "").replace(",", " ").split() or list(CUDA_ARCHITECTURES)
    architectures = [number for number in wanted if f"sm_{number}" in listed]
    unknown = [number for number in wanted if number not in CUDA_ARCHITECTURES]
    if unknown or not architectures:
        accepted = ", ".join(CUDA_ARCHITECTURES)
        got = " ".join(unknown or wanted)
        raise CannotBuildError(
            f"TRMFAST_CUDA_ARCHITECTURES: got {got}, accepted are {accepted}, as far as nvcc has them"
        )
    # Ask nvcc where its toolkit is: the file on the path may be a link or a script.
    dry = subprocess.run([found, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = next((line.split("TOP=", 1)[1] for line in dry.splitlines() if "TOP=" in line), None)
    toolkit = Path(top).resolve() if top else Path(found).resolve().parent.parent
    if not (toolkit / "include" / "cuda_runtime_api.h").exists():
        raise CannotBuildError(f"no cuda_runtime_api.h in {toolkit}/include: install the CUDA runtime's headers")
    headers = [*find_headers(), "-isystem", str(toolkit / "include")]
    version = f"nvcc {version}, {host_version}"
    return CudaBuild(Path(found), compiler, version, find_ninja(), toolkit, architectures, headers)


def cuda_ninja_text(build: CudaBuild, output_name: str) -> str:
    """build.ninja: launch.cu once per element, by nvcc; module.cpp, by the host compiler; and the link."""
    common = ["-std=c++17", "-O3", "-DNDEBUG"]
    host = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", f"-ffile-prefix-map={ROOT}/="]
    code = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in build.architectures]
    newest = build.architectures[-1]
    code.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")  # PTX for future GPUs
    device = [*common, f"-Xcompiler={','.join(host)}", "-Xptxas=-warn-spills", f"-ccbin={build.compiler[0]}", *code]
    names = ", ".join(f"sm_{number}" for number in build.architectures)
    module = [*common, *host, *build.headers, f'-DTRMFAST_ARCHITECTURES="{names}"']
    libraries = [
        f"-L{build.toolkit / 'lib64'}",
        f"-L{build.toolkit / 'lib'}",
        "-lcudart_static",
        "-ldl",
        "-lrt",
        "-pthread",
    ]
    lines = [
        "ninja_required_version = 1.8",
        "rule device",
        f"  command = {quote([str(build.nvcc), *device])} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule host",
        f"  command = {quote([*build.compiler, *module])} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = {quote([*build.compiler, '-shared'])} $in -o $out {quote(libraries)}",
        "  description = link $out",
        f"build module.o: host {ninja_path(CUDA_SOURCE / 'module.cpp')}",
    ]
    objects = ["module.o"]
    for element in CUDA_ELEMENTS:
        objects.append(f"launch_{element}.o")
        lines += [
            f"build launch_{element}.o: device {ninja_path(CUDA_SOURCE / 'launch.cu')}",
            f"  flags = -DTRMFAST_ELEMENT={element}",
        ]
    lines += [f"build {output_name}: link {' '.join(objects)}", f"default {output_name}"]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One build at a time per folder: concurrent installations of a source tree share their objects."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        with contextlib.suppress(ImportError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compile_extension(kind: str, ninja: str, compiler_version: str, text: str, output: Path) -> None:
    """Build what is out of date and put the extension at `output`."""
    tag = hashlib.sha256(f"{compiler_version}\n{text}".encode()).hexdigest()[:10]
    folder = ROOT / "build" / f"{kind}-{sysconfig.get_config_var('SOABI')}-{tag}"
    with locked(folder):
        build_file = folder / "build.ninja"
        if not build_file.exists() or build_file.read_text() != text:
            build_file.write_text(text)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        done = subprocess.run([ninja, *jobs, "-C", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        log = done.stdout.decode(errors="replace")
        print(log, flush=True)
        if done.returncode != 0:
            lines = log.replace(f"{ROOT}/", "").splitlines()
            start = next((i for i, line in enumerate(lines) if "error" in line.lower()), 0)
            message = f"{compiler_version} failed: {lines[start].strip() if lines else 'ninja says nothing'}"
            raise CannotBuildError(message, "\n".join(lines[start : start + 40]))
        output.parent.mkdir(parents=True, exist_ok=True)
        # Copy, then rename: a process that has mapped the old file keeps it.
        beside = output.with_name(output.name + ".new")
        shutil.copy2(folder / output.name, beside)
        os.replace(beside, output)


class BuildEngines(build_ext):
    """Builds the extensions with ninja and writes _build_info_cpu.json and _build_info_cuda.json beside them."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build, name, required = (
            (self.build_cpu, "CPU", os.environ.get("TRMFAST_REQUIRE_CPU", "") == "1")
            if ext.name == "trmfast._cpu"
            else (self.build_cuda, "CUDA", os.environ.get("TRMFAST_CUDA", "") == "1")
        )
        info: dict[str, object] = {"error": None}
        try:
            build(output, info)
        except CannotBuildError as error:
            if required:
                raise
            info.update(error=str(error), log=error.log)
            self.remove_stale(output)
            print(f"\ntrmfast: the {name} engine was not built: {error}", file=sys.stderr)
            print("trmfast: installing without it; `trmfast info` repeats the reason\n", file=sys.stderr)
        for folder in self.package_folders(output):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"_build_info_{name.lower()}.json").write_text(json.dumps(info, indent=1) + "\n")

    @staticmethod
    def build_cpu(output: Path, info: dict[str, object]) -> None:
        info["targets"] = []
        build = make_build()
        info.update(compiler=build.compiler_version, left_out=build.left_out, sanitize=build.sanitize)
        kind = f"cpu-{build.sanitize.replace(',', '-') or 'release'}"
        compile_extension(kind, build.ninja, build.compiler_version, ninja_text(build, output.name), output)
        info["targets"] = [f"{target.name}/{element}" for target, element in build.pairs()]

    @staticmethod
    def build_cuda(output: Path, info: dict[str, object]) -> None:
        build = make_cuda_build()
        info["compiler"] = build.compiler_version
        compile_extension("cuda", build.ninja, build.compiler_version, cuda_ninja_text(build, output.name), output)
        info["targets"] = [f"sm_{architecture}" for architecture in build.architectures]

    def finalize_options(self) -> None:
        super().finalize_options()
        self.in_source = bool(self.inplace)  # run() of setuptools clears `inplace` while it builds

    def package_folders(self, output: Path) -> set[Path]:
        """Where this build puts the package's files: the build folder, and the source tree if building in place."""
        in_source = self.in_source or self.editable_mode
        return {output.parent, ROOT / "trmfast"} if in_source else {output.parent}

    def remove_stale(self, output: Path) -> None:
        """Remove the extension of an earlier build, which would contradict _build_info_*.json."""
        for folder in self.package_folders(output):
            (folder / output.name).unlink(missing_ok=True)


kernels = ["trmfast.kernels"] + [f"trmfast.kernels.{name}" for name in find_packages(str(ROOT / "kernels"))]

setup(
    packages=find_packages(str(ROOT), include=["trmfast", "trmfast.*"]) + kernels,
    package_dir={"trmfast": "trmfast", "trmfast.kernels": "kernels"},
    package_data={"trmfast": ["py.typed", "_build_info_*.json"], "trmfast.data": ["*.safetensors"]},
    ext_modules=[Extension(f"trmfast.{name}", sources=[], optional=True) for name in ("_cpu", "_cuda")],
    cmdclass={"build_ext": BuildEngines},
)
