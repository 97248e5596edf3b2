"""The gate that compiles CUDA sources (.ci/cuda runs it), rules that hold for every kernel file, the module's build."""

import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GATE = ROOT / ".ci" / "cuda"
CLEAN = """ptxas info    : Compiling entry function '_Z1kv' for 'sm_80'
ptxas info    : Function properties for _Z1kv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 86 registers, used 1 barriers, 128 bytes smem, 1152 bytes cmem[0]
"""


@pytest.fixture(scope="module")
def gate():
    if not GATE.exists():
        pytest.skip("no source tree")
    loader = importlib.machinery.SourceFileLoader("cuda_gate", str(GATE))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("cuda_gate", loader))
    dont_write, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    loader.exec_module(module)
    sys.dont_write_bytecode = dont_write
    return module


def test_gate_reads_what_ptxas_says(gate):
    (kernel,) = gate.kernels(CLEAN)
    assert (kernel["registers"], kernel["shared"], kernel["spilled"]) == (86, 128, 0)
    assert gate.problems(CLEAN, {}) == []
    spilling = CLEAN.replace("0 bytes spill stores", "16 bytes spill stores")
    assert gate.problems(spilling, {"_Z1kv": "k()"}) == ["k() for sm_80: spills 16 bytes, stack 0 bytes"]
    serialized = (
        CLEAN + "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    )
    assert len(gate.problems(serialized, {})) == 1


def test_every_kernel_file_has_a_target(gate):
    """A suffix that setup.py does not know would be left out of the module without a word."""
    sources = sorted((ROOT / "csrc").rglob("*.cu"))
    assert sources
    for source in sources:
        assert source.stem.endswith(("_sm80", "_sm90a")) or source.name == "cuda_device.cu", source


def test_kernels_contain_no_asm_and_no_toolkit_header():
    """What holds for them holds for the emulated build too; instructions live in csrc/ptx."""
    for source in [*(ROOT / "csrc").rglob("*_sm80.cu"), *(ROOT / "csrc").glob("*/cuda/*.h")]:
        text = source.read_text()
        assert not re.search(r"\basm\b", text), source
        assert not re.search(r"#include <(cuda|cooperative_groups|mma)", text), source


def test_unknown_choice_is_named():
    environment = {**os.environ, "LLMFAST_CUDA": "maybe"}
    result = subprocess.run(
        [sys.executable, "setup.py", "--name"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode != 0 and "LLMFAST_CUDA: got 'maybe', expected auto, on or off" in result.stderr
