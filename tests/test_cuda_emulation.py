"""The instructions of csrc/ptx against their definitions: emulated, in every order of threads, and on a GPU where there
is one; and the programming errors that the emulation reports."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
PROGRAM = ROOT / "tests" / "native" / "cuda_instructions.cu"
HOPPER_PROGRAM = ROOT / "tests" / "native" / "cuda_hopper.cu"
# What the report says, or what the program finds where the mistake only spoils results
MISTAKES = {
    "two_barriers": "__syncthreads at",
    "barriers_that_never_meet": "threads wait for others that never come: 32 wait at barrier 1; 32 wait at barrier 2",
    "half_a_warp": "16 have exited; 16 wait at __shfl_xor_sync",
    "two_instructions": "while other lanes of the warp are at",
    "misaligned": "store of 16 bytes at an address that is no multiple of it",
    "beyond_shared_memory": "st.shared at byte 64 of 64 bytes",
    "write_around_shared_memory": "a write at byte 64 of 64 bytes of dynamic shared memory",
    "never_waited": "exits with cp.async copies that it never waited for",
    "read_before_wait": "NaN",
    "read_before_barrier": "NaN",
}


def build_emulated(source: Path, folder: Path) -> Path:
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(compiler[0]) is None or not CSRC.exists():
        pytest.skip("needs a C++ compiler and the source tree")
    program = folder / source.stem
    flags = ["-std=c++17", "-O1", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas", "-DLLMFAST_TARGET=cuda", f"-I{CSRC}"]
    sources = [source, *sorted((CSRC / "ptx" / "emulated").glob("*.cpp"))]
    subprocess.run([*compiler, *flags, "-x", "c++", *map(str, sources), "-o", str(program)], check=True)
    return program


def build_for_the_gpu(source: Path, arch: str, folder: Path) -> Path:
    program = folder / source.stem
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    sources = [str(source), str(CSRC / "core" / "cuda_device.cu")]
    flags = ["-std=c++17", target, "-DLLMFAST_TARGET=cuda", f"-I{CSRC}"]
    subprocess.run(["nvcc", *flags, *sources, "-o", str(program)], check=True)
    return program


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> Path:
    return build_emulated(PROGRAM, tmp_path_factory.mktemp("emulated"))


def run(program: Path, *arguments: str, order: str = "forward") -> subprocess.CompletedProcess:
    environment = {**os.environ, "LLMFAST_EMULATE_ORDER": order}
    return subprocess.run([program, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("order", ["forward", "reverse", "1", "2", "3"])
def test_emulated_instructions(emulated, order):
    result = run(emulated, order=order)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("mistake", MISTAKES)
def test_emulation_catches(emulated, mistake):
    result = run(emulated, mistake)
    assert result.returncode == 0 and MISTAKES[mistake] in result.stdout, result.stdout + result.stderr


def test_emulated_hopper_instructions(tmp_path):
    program = build_emulated(HOPPER_PROGRAM, tmp_path)
    for order in ("forward", "reverse", "1"):
        result = run(program, order=order)
        assert result.returncode == 0, result.stdout + result.stderr


def test_instructions_of_the_gpu(tmp_path):
    if not torch.cuda.is_available() or shutil.which("nvcc") is None:
        pytest.skip("no CUDA device, or no nvcc")
    capability = torch.cuda.get_device_capability()
    arch = "{}{}".format(*capability)
    programs = [build_for_the_gpu(PROGRAM, arch, tmp_path)]
    if capability == (9, 0):
        programs.append(build_for_the_gpu(HOPPER_PROGRAM, "90a", tmp_path))
    for program in programs:
        result = run(program)
        assert result.returncode == 0, result.stdout + result.stderr
