"""The wheel: built from the checkout, it holds the compiled module and runs on its own, at any instruction set."""

import json
import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "LLMFAST_CPU_ISA")}
    return subprocess.run(command, cwd=ROOT / "tests", env={**env, **environment}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Objects of an earlier build are reused, so this takes seconds after `pip install .` in the same checkout."""
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(out), str(ROOT)]
    result = run(*pip)
    assert result.returncode == 0, result.stderr[-3000:]
    (path,) = out.glob("llmfast-*.whl")
    return path


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert sum(name.startswith("llmfast/_cpu") and name.endswith(".so") for name in names) == 1
    assert "llmfast/models/gpt.py" in names
    assert not [name for name in names if name.startswith(("csrc/", "tests/", "benchmarks/", "build/"))]
    (metadata,) = (name for name in names if name.endswith("METADATA"))
    assert "Requires-Dist: torch>=2.10" in zipfile.ZipFile(wheel).read(metadata).decode()


def test_runs_elsewhere_at_any_instruction_set(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import json, torch, llmfast\n"
        "x, w = torch.randn(5, 7), torch.randn(3, 7)\n"
        "assert torch.allclose(llmfast.linear(x, w), x @ w.t(), atol=1e-5)\n"
        "print(json.dumps([llmfast.__file__, llmfast.backend.native().active_isa(), llmfast.backend.fallbacks()]))"
    )
    for isa in ("ref", "avx2", ""):
        result = run(sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", code,
                     PYTHONPATH=str(tmp_path), LLMFAST_CPU_ISA=isa)  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
        file, active, fallbacks = json.loads(result.stdout)
        assert Path(file).is_relative_to(tmp_path) and fallbacks == {}
        assert active == isa or isa == "" or active == "ref"  # a cap lowers, never raises


def test_unknown_instruction_set_is_named():
    result = run(sys.executable, "-c", "import llmfast; llmfast.backend.info()", LLMFAST_CPU_ISA="sse9")
    assert result.returncode != 0
    assert "LLMFAST_CPU_ISA: got 'sse9', expected one of ref, avx2, avx512, avx512bf16, amx" in result.stderr


def test_missing_compiler_is_said_in_one_sentence(tmp_path):
    result = run(sys.executable, str(ROOT / "setup.py"), "-q", "build_ext", "--build-lib", str(tmp_path),
                 CXX="no-such-compiler", LLMFAST_BUILD_DIR=str(tmp_path / "objects"))  # fmt: skip
    assert result.returncode != 0
    assert "building needs a C++17 compiler with OpenMP, and none was found" in result.stderr
    assert "Traceback" not in result.stderr


def test_kinds_of_build_share_what_they_have_in_common(tmp_path):
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("other processors have one target, and nothing to emulate")
    compiler, calls = tmp_path / "compiler", tmp_path / "calls"
    compiler.write_text(f'#!/bin/sh\nfor out; do :; done\n: >"$out"\necho "$out" >>{calls}\n')  # -o is its last
    compiler.chmod(0o755)

    def compiled(**kind: str) -> set[str]:
        calls.write_text("")
        result = run(sys.executable, str(ROOT / "setup.py"), "-q", "build_ext", "--build-lib", str(tmp_path / "lib"),
                     CXX=str(compiler), LLMFAST_BUILD_DIR=str(tmp_path / "objects"), LLMFAST_CUDA="off", **kind)  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
        return {Path(line).name for line in calls.read_text().splitlines() if line.endswith(".o")}

    objects = compiled(LLMFAST_EMULATE_ISA="0")
    emulated = {name for name in objects if name.split(".")[1] in ("avx512", "avx512bf16", "amx", "amx_split")}
    assert {name.split(".")[1] for name in objects - emulated} == {"base", "ref", "avx2"}
    assert compiled(LLMFAST_EMULATE_ISA="1") == emulated | {"core-isa.base.o"}
    assert compiled(LLMFAST_SANITIZE="1") == objects - emulated
