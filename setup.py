"""Builds the native module `llmfast._cpu` with ninja. No torch at build time: the native core includes no torch header.

A source file's suffix says for which targets it is compiled (see SUFFIX_TARGETS), a target says with which flags.
Every object gets -DLLMFAST_TARGET=<target>, and all code in it lives in namespace llmfast::<target>, so that two
objects never share a symbol that was compiled with different instruction sets.

Environment: CXX chooses the compiler; LLMFAST_EMULATE_ISA=1 builds the AVX-512 and AMX rows on top of a C++ emulation of
their instructions, so that a machine without them can run their tests (slow; never for production); LLMFAST_BUILD_DIR is
where objects are kept between builds (default: build/).
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
EMULATE = os.environ.get("LLMFAST_EMULATE_ISA") == "1"
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")

COMMON_FLAGS = [
    "-std=c++17", "-O2", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
    "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas",
]  # fmt: skip
# gcc 12 warns about its own AVX-512 headers: gcc.gnu.org/PR105593
GCC_BUG_105593 = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [
    *AVX2_FLAGS,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-mprefer-vector-width=512",
    *GCC_BUG_105593,
]
AMX_FLAGS = [*AVX512_FLAGS, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
EMULATED_FLAGS = [*AVX2_FLAGS, "-DLLMFAST_EMULATED", f"-I{CSRC / 'simd' / 'emulated'}"]

TARGET_FLAGS = {"ref": [], "avx2": AVX2_FLAGS, "avx512": AVX512_FLAGS, "amx": AMX_FLAGS}
if EMULATE:
    TARGET_FLAGS.update(avx512=[*EMULATED_FLAGS, "-DLLMFAST_WIDTH=512"], amx=[*EMULATED_FLAGS, "-DLLMFAST_WIDTH=512"])

SUFFIX_TARGETS = {
    "_vec": ["ref", "avx2", "avx512"],  # written against simd/vec.h only
    "_mm": ["ref", "avx2", "avx512", "amx"],  # also uses the GEMM core, which has an AMX kernel
    "_amx": ["amx"],
}


def compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(command[0]) is None and "CXX" not in os.environ:
        command = ["clang++"]
    if shutil.which(command[0]) is None:
        sys.exit(
            "llmfast: building needs a C++17 compiler with OpenMP, and none was found: "
            "install g++ 12 or newer (for example 'apt-get install g++') or set CXX to one."
        )
    return command


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def linked_pybind11(build_dir: Path) -> Path:
    """pybind11's headers under a path that stays: pip's isolated build puts them elsewhere each time, and a command line
    that changes is a reason to compile again."""
    import pybind11

    link = build_dir / "pybind11"
    link.unlink(missing_ok=True)
    link.symlink_to(pybind11.get_include(), target_is_directory=True)
    return link


def objects(build_dir: Path):
    """Yields (source, object, flags) for every object file of the module.

    The bindings are one translation unit: nearly all of their compile time is pybind11's headers, nine times over.
    """
    bindings = build_dir / "bindings.cpp"
    includes = sorted(path.relative_to(CSRC) for path in (CSRC / "bindings").glob("*.cpp"))
    write_if_changed(bindings, "".join(f'#include "{path.as_posix()}"\n' for path in includes))
    python = [f"-isystem{linked_pybind11(build_dir)}", f"-isystem{sysconfig.get_paths()['include']}"]
    yield bindings, build_dir / "bindings.base.o", ["-O1", *python]
    for source in sorted(CSRC.rglob("*.cpp")):
        if source.parent == CSRC / "bindings":
            continue
        suffix = next((s for s in SUFFIX_TARGETS if source.stem.endswith(s)), None)
        targets = SUFFIX_TARGETS[suffix] if suffix else ["base"]
        for target in targets:
            if target not in ("base", "ref") and not IS_X86:
                continue
            defines = [f"-DLLMFAST_TARGET={target}", f"-DLLMFAST_TARGET_{target.upper()}"]
            flags = [] if target == "base" else [*TARGET_FLAGS[target], *defines]
            name = str(source.relative_to(CSRC).with_suffix("")).replace(os.sep, "-")
            yield source, build_dir / f"{name}.{target}.o", flags


def write_ninja(build_dir: Path, output: Path) -> None:
    build_dir.mkdir(parents=True, exist_ok=True)
    defines = (["-DLLMFAST_X86"] if IS_X86 else []) + (["-DLLMFAST_EMULATED"] if EMULATE else [])
    escape = lambda path: str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")  # noqa: E731
    cxx = shlex.join(compiler())
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {cxx}",
        f"cflags = {shlex.join([*COMMON_FLAGS, *defines, f'-I{CSRC}'])}",
        "rule compile\n  command = $cxx $cflags $flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "rule link\n  command = $cxx -shared -fopenmp $in -o $out",
    ]
    outputs = []
    for source, target, flags in objects(build_dir):
        lines.append(f"build {escape(target)}: compile {escape(source)}\n  flags = {shlex.join(flags)}")
        outputs.append(escape(target))
    lines.append(f"build {escape(output)}: link {' '.join(outputs)}")
    write_if_changed(build_dir / "build.ninja", "\n".join(lines) + "\n")


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import ninja

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        tag = f"{sysconfig.get_config_var('SOABI')}{'-emulated' if EMULATE else ''}"
        build_dir = Path(os.environ.get("LLMFAST_BUILD_DIR") or ROOT / "build").resolve() / f"native-{tag}"
        write_ninja(build_dir, build_dir / output.name)
        result = subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build_dir)])
        if result.returncode:
            sys.exit("llmfast: compiling the native module failed; the compiler's first error is above.")
        shutil.copyfile(build_dir / output.name, output)


setup(ext_modules=[Extension("llmfast._cpu", sources=[])], cmdclass={"build_ext": NinjaBuild})
