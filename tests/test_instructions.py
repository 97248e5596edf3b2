"""The vector and tile vocabulary of the AMX target against its definitions: emulated, and real where there is AMX."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from llmfast import backend

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
EMULATED = [*AVX2, "-DLLMFAST_EMULATED", "-DLLMFAST_WIDTH=512", f"-I{CSRC / 'simd' / 'emulated'}"]
REAL = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
MISTAKES = ["unaligned_stream", "no_configuration", "after_release", "nested_configuration", "reserved_bytes"]


def build(folder: Path, flags: list[str]) -> Path:
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(compiler[0]) is None or not CSRC.exists():
        pytest.skip("needs a C++ compiler and the source tree")
    program = folder / "instructions"
    common = ["-std=c++17", "-O2", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", f"-I{CSRC}"]
    target = ["-DLLMFAST_X86", "-DLLMFAST_TARGET=amx", "-DLLMFAST_TARGET_AMX"]
    sources = [ROOT / "tests" / "native" / "instructions.cpp", CSRC / "core" / "isa.cpp"]
    subprocess.run([*compiler, *common, *target, *flags, *map(str, sources), "-o", str(program)], check=True)
    return program


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> Path:
    if "avx2" not in backend.native().cpu_features():
        pytest.skip("the emulation needs a processor with AVX2")
    return build(tmp_path_factory.mktemp("emulated"), EMULATED)


def test_emulated_instructions(emulated):
    result = subprocess.run([emulated], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("mistake", MISTAKES)
def test_emulation_catches(emulated, mistake):
    result = subprocess.run([emulated, mistake], capture_output=True, text=True)
    assert result.returncode < 0, "the mistake went unnoticed"
    assert "llmfast, emulated instruction" in result.stderr


def test_real_instructions(tmp_path):
    native = backend.native()
    if native.emulated or native.detected_isa() != "amx":
        pytest.skip("this machine has no AMX")
    result = subprocess.run([build(tmp_path, REAL)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
