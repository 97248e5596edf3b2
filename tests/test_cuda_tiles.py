"""Index arithmetic of the CUDA kernels (swizzles, fragment maps, tile order, bands, packed tiles) by brute force."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_host_functions(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None or not (ROOT / "csrc").exists():
        pytest.skip("needs g++ and a checkout")
    program = tmp_path / "cuda_tiles"
    defines = ["-DLLMFAST_TARGET=cuda", "-DLLMFAST_EMULATE_CUDA"]
    emulated = ROOT / "csrc" / "ptx" / "emulated"
    machine = [str(emulated / "machine.cpp"), str(emulated / "hopper.cpp")]
    source = str(ROOT / "tests" / "native" / "cuda_tiles.cpp")
    command = [compiler, "-std=c++17", "-O1", *defines, f"-I{ROOT / 'csrc'}", source, *machine, "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
