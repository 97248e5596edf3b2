"""Builds the native modules `llmfast._cpu` and `llmfast._cuda` with ninja. No torch at build time: the native core
includes no torch header.

A source file's suffix says for which targets it is compiled (see SUFFIX_TARGETS), a target says with which flags.
Every object gets -DLLMFAST_TARGET=<target>, and all code in it lives in namespace llmfast::<target>, so that two
objects never share a symbol that was compiled with different instruction sets.

Environment: CXX chooses the compiler; LLMFAST_EMULATE_ISA=1 builds the AVX-512 and AMX rows on top of a C++ emulation of
their instructions, so that a machine without them can run their tests (slow; never for production); LLMFAST_SANITIZE=1
builds for AddressSanitizer and UBSan (see .ci/sanitize); LLMFAST_BUILD_DIR is where objects are kept between builds
(default: build/). Builds of different kinds share the objects that they have in common.

CUDA: LLMFAST_CUDA=on|off|auto (default auto: on where there are nvcc and an NVIDIA driver); NVCC chooses the compiler;
LLMFAST_CUDA_ARCHS lists targets (default "80;90a"). A kernel file `_sm80.cu` gets machine code for each listed number and
PTX of the smallest, which serves everything newer; `_sm90a.cu` is compiled for sm_90a alone, if 90a is listed. "90a"
alone builds for Hopper and nothing older, in the least time.
LLMFAST_EMULATE_CUDA=1 builds nothing but `_cuda`, with the C++ compiler, on emulated threads (csrc/ptx/emulated): its
functions take CPU tensors, for tests.
"""

import fcntl
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
EMULATE_CUDA = os.environ.get("LLMFAST_EMULATE_CUDA") == "1"
SANITIZE = os.environ.get("LLMFAST_SANITIZE") == "1"
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
AVX512BF16_FLAGS = [*AVX512_FLAGS, "-mavx512bf16"]
AMX_FLAGS = [*AVX512BF16_FLAGS, "-mamx-tile", "-mamx-bf16"]
EMULATED_FLAGS = ["-O1", *AVX2_FLAGS, f"-I{CSRC / 'simd' / 'emulated'}"]

TARGET_FLAGS = {
    "ref": [],
    "avx2": AVX2_FLAGS,
    "avx512": AVX512_FLAGS,
    "avx512bf16": AVX512BF16_FLAGS,
    "amx": AMX_FLAGS,
    "amx_split": AMX_FLAGS,
}
EMULATED_TARGETS = ("avx512", "avx512bf16", "amx", "amx_split")
if EMULATE:
    TARGET_FLAGS.update({target: [*EMULATED_FLAGS, "-DLLMFAST_WIDTH=512"] for target in EMULATED_TARGETS})

SANITIZER_FLAGS = ["-fsanitize=address,undefined"] if SANITIZE else []
# Targets that are checked: without the emulation the others rarely run. Theirs are the objects of any other build.
SANITIZED = ("base", "ref", "avx2", *(EMULATED_TARGETS if EMULATE else []))

SUFFIX_TARGETS = {
    "_vec": ["ref", "avx2", "avx512"],  # written against simd/vec.h only
    "_round": ["ref", "avx2", "avx512", "avx512bf16"],  # the same, where rounding to bf16 is much of the work
    # also uses the GEMM core, which has kernels for bf16, and for float32 as the sum of two bf16
    "_mm": ["ref", "avx2", "avx512", "avx512bf16", "amx", "amx_split"],
    "_bf16": ["avx512bf16", "amx"],  # multiplies blocks of bf16
}

# Of `_cuda` alone; all other .cpp files belong to `_cpu`, and both have core/check.cpp and *_checks.cpp.
CUDA_ONLY = ("core/cuda_*.cpp", "ptx/emulated/*.cpp", "**/*_cuda.cpp")
CUDA_ARCHS = [arch for arch in os.environ.get("LLMFAST_CUDA_ARCHS", "80;90a").split(";") if arch]
CUDA_DEFINES = ["-DLLMFAST_TARGET=cuda", *(["-DLLMFAST_SM90A"] if "90a" in CUDA_ARCHS else [])]
NVCC_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
# Compiled first, so that none of them starts last; then all other .cu files.
SLOWEST_CUDA = ("ffn_sm80", "attention_bwd_sm90a", "attention_bwd_sm80", "linear_cross_entropy_sm80")
EMULATED_CUDA_FLAGS = ["-DLLMFAST_EMULATE_CUDA", "-O1", "-Wno-unused-parameter"]


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


def sanitizer_flags(target: str) -> list[str]:
    if not SANITIZE or target not in SANITIZED:
        return []
    return ["-O1", "-g1", "-fno-omit-frame-pointer", *SANITIZER_FLAGS]


def kind(emulated: bool, sanitized: bool) -> str:
    """The folder, in a build folder, of what is compiled so: the folder itself for neither."""
    return "-".join(word for word, holds in (("emulated", emulated), ("sanitized", sanitized)) if holds)


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def nvcc() -> str | None:
    return shutil.which(os.environ.get("NVCC", "nvcc")) or shutil.which("/usr/local/cuda/bin/nvcc")


def cuda_is_wanted() -> bool:
    choice = os.environ.get("LLMFAST_CUDA", "auto")
    if choice not in ("auto", "on", "off"):
        sys.exit(f"llmfast: LLMFAST_CUDA: got {choice!r}, expected auto, on or off")
    if choice == "on" and nvcc() is None:
        sys.exit("llmfast: LLMFAST_CUDA=on needs nvcc, and none was found: install the CUDA toolkit or set NVCC.")
    return choice == "on" or (choice == "auto" and nvcc() is not None and Path("/proc/driver/nvidia/version").exists())


def linked_pybind11(build_dir: Path) -> Path:
    """pybind11's headers under a path that stays: pip's isolated build puts them elsewhere each time, and a command line
    that changes is a reason to compile again."""
    import pybind11

    link = build_dir / "pybind11"
    link.unlink(missing_ok=True)
    link.symlink_to(pybind11.get_include(), target_is_directory=True)
    return link


def bindings(build_dir: Path, sources: list[Path]):
    """Bindings are one translation unit: nearly all of their compile time is pybind11's headers, a dozen times over."""
    all_of_them = build_dir / "bindings.cpp"
    includes = sorted(path.relative_to(CSRC) for path in sources)
    write_if_changed(all_of_them, "".join(f'#include "{path.as_posix()}"\n' for path in includes))
    python = [f"-isystem{linked_pybind11(build_dir)}", f"-isystem{sysconfig.get_paths()['include']}"]
    target = build_dir / kind(False, SANITIZE) / "bindings.base.o"
    return all_of_them, target, ["-O1", *python, *sanitizer_flags("base")]


def cpu_objects(build_dir: Path):
    """Yields (source, object, flags) for every object file of `_cpu`."""
    yield bindings(build_dir, [source for d in ("bindings", "bindings_cpu") for source in (CSRC / d).glob("*.cpp")])
    cuda_only = {source for pattern in CUDA_ONLY for source in CSRC.glob(pattern)}
    for source in sorted(CSRC.rglob("*.cpp")):
        if source.parent.name.startswith("bindings") or source in cuda_only:
            continue
        suffix = next((s for s in SUFFIX_TARGETS if source.stem.endswith(s)), None)
        targets = SUFFIX_TARGETS[suffix] if suffix else ["base"]
        for target in targets:
            if target not in ("base", "ref") and not IS_X86:
                continue
            defines = [f"-DLLMFAST_TARGET={target}", f"-DLLMFAST_TARGET_{target.upper()}"]
            flags = [] if target == "base" else [*TARGET_FLAGS[target], *defines]
            emulated = EMULATE and (target in EMULATED_TARGETS or source.name == "isa.cpp")
            flags += [*(["-DLLMFAST_EMULATED"] if emulated else []), *sanitizer_flags(target)]
            name = str(source.relative_to(CSRC).with_suffix("")).replace(os.sep, "-")
            folder = build_dir / kind(emulated, SANITIZE and target in SANITIZED)
            yield source, folder / f"{name}.{target}.o", flags


def arch_flags(source: Path) -> list[str]:
    if source.stem.endswith("_sm90a"):
        return ["-gencode=arch=compute_90a,code=sm_90a"]
    numbers = sorted({int(arch.rstrip("a")) for arch in CUDA_ARCHS})
    codes = [f"sm_{n}" for n in numbers]
    return [
        f"-gencode=arch=compute_{numbers[0]},code=[compute_{numbers[0]},{codes[0]}]",
        *(f"-gencode=arch=compute_{n},code={code}" for n, code in zip(numbers[1:], codes[1:])),
    ]


def cuda_objects(build_dir: Path):
    """Yields (source, object, flags) for every object file of `_cuda`; .cu files go to nvcc unless emulated."""
    emulated = EMULATED_CUDA_FLAGS if EMULATE_CUDA else []
    tensors = [] if EMULATE_CUDA else ["-DLLMFAST_TENSOR_DEVICE=dlpack::kCuda"]
    sources = [source for d in ("bindings", "bindings_cuda") for source in (CSRC / d).glob("*.cpp")]
    source, target, flags = bindings(build_dir, sources)
    yield source, target, [*CUDA_DEFINES, "-DLLMFAST_GPU_KERNELS", *emulated, *tensors, *flags]
    plain = [
        CSRC / "core" / "check.cpp",
        *(p for q in ("core/cuda_*", "**/*_checks", "**/*_cuda") for p in CSRC.glob(f"{q}.cpp")),
    ]
    kernels = [*CSRC.rglob("*_sm80.cu"), *(CSRC.rglob("*_sm90a.cu") if "90a" in CUDA_ARCHS else [])]
    if EMULATE_CUDA:
        plain += [*CSRC.glob("ptx/emulated/*.cpp"), *kernels]
        kernels = []
    else:
        kernels.append(CSRC / "core" / "cuda_device.cu")
    # ninja starts them in this order
    for source in [*sorted(kernels, key=lambda source: (source.stem not in SLOWEST_CUDA, source)), *sorted(plain)]:
        name = str(source.relative_to(CSRC).with_suffix("")).replace(os.sep, "-")
        flags = [*NVCC_FLAGS, *arch_flags(source)] if source in kernels else emulated
        yield source, build_dir / f"{name}.o", [*CUDA_DEFINES, *flags]


def write_ninja(build_dir: Path, output: Path, cuda: bool) -> None:
    """Writes output's build.ninja beside it."""
    defines = ["-DLLMFAST_X86"] if IS_X86 else []
    escape = lambda path: str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")  # noqa: E731
    cxx = shlex.join(compiler())
    with_nvcc = cuda and not EMULATE_CUDA
    # nvcc knows where its runtime library is.
    linker = shlex.join([nvcc(), "--cudart=static"]) if with_nvcc else f"$cxx -fopenmp {shlex.join(SANITIZER_FLAGS)}"
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {cxx}",
        f"cflags = {shlex.join([*COMMON_FLAGS, *defines, f'-I{CSRC}'])}",
        "rule compile\n  command = $cxx $cflags $flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {linker} -shared $in -o $out",
    ]
    if with_nvcc:
        lines.append(
            f"rule nvcc\n  command = {shlex.join([nvcc(), f'-I{CSRC}'])} $flags -MD -MF $out.d -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc"
        )
    outputs = []
    for source, target, flags in (cuda_objects if cuda else cpu_objects)(build_dir):
        rule = "compile"
        if source.suffix == ".cu":
            rule, flags = ("nvcc", flags) if with_nvcc else ("compile", [*flags, "-x", "c++"])
        lines.append(f"build {escape(target)}: {rule} {escape(source)}\n  flags = {shlex.join(flags)}")
        outputs.append(escape(target))
    lines.append(f"build {escape(output)}: link {' '.join(outputs)}")
    write_if_changed(output.with_name("build.ninja"), "\n".join(lines) + "\n")


class NinjaBuild(build_ext):
    def build_extensions(self) -> None:
        """Both modules at once: their slow files are few, and each would leave most cores of a large machine idle."""
        self.locks = []
        started = [self.start(ext) for ext in reversed(self.extensions)]  # _cuda, which takes longer, first
        codes = [ninja.wait() for ninja, _, _ in started]
        if any(codes):
            sys.exit("llmfast: compiling the native module failed; the compiler's first error is above.")
        for _, built, output in started:
            # Replaced, not overwritten: a process may have the old one in its memory.
            fresh = output.with_name(f"{output.name}.{os.getpid()}")
            shutil.copyfile(built, fresh)
            fresh.replace(output)

    def start(self, ext: Extension) -> tuple[subprocess.Popen, Path, Path]:
        import ninja

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        cuda = ext.name == "llmfast._cuda"
        folder = f"{'cuda' if cuda else 'native'}-{sysconfig.get_config_var('SOABI')}"
        folder += "-emulated" if cuda and EMULATE_CUDA else ""
        build_dir = Path(os.environ.get("LLMFAST_BUILD_DIR") or ROOT / "build").resolve() / folder
        built = build_dir / kind(EMULATE and not cuda, SANITIZE) / output.name
        built.parent.mkdir(parents=True, exist_ok=True)
        self.locks.append((build_dir / "lock").open("w"))
        fcntl.flock(self.locks[-1], fcntl.LOCK_EX)  # one build at a time: ninja's log in the folder is of all kinds
        write_ninja(build_dir, built, cuda)
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build_dir), "-f", str(built.with_name("build.ninja"))]
        return subprocess.Popen(command), built, output


modules = ["llmfast._cuda"] if EMULATE_CUDA else ["llmfast._cpu", *(["llmfast._cuda"] if cuda_is_wanted() else [])]
setup(ext_modules=[Extension(name, sources=[]) for name in modules], cmdclass={"build_ext": NinjaBuild})
