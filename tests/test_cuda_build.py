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


SASS = """
		Function : _Z6hopperv
	.headerflags	@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;             /* 0x00000a00ff017b82 */
                                                                      /* 0x000fe20000000800 */
        /*0010*/              @!P0 UTMALDG.3D [UR8], [UR6] ;          /* 0x00000008060075b4 */
        /*0020*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ; /* 0x03e00000041879f0 */
        /*0030*/              @UP1 HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24 ; /* 0x03e00000041879f0 */
        /*0040*/                   MUFU.EX2 R3, R3 ;                  /* 0x0000000300037308 */
        /*0050*/                   STL [R1+0x4], R2 ;                 /* 0x0000040201007387 */
"""


def test_gate_reads_machine_code(gate, monkeypatch):
    counts = gate.instructions(SASS)
    assert counts == {"_Z6hopperv": {"HGMMA": 2, "UTMALDG": 1, "UTMASTG": 0, "MUFU": 1, "LDL": 0, "STL": 1}}
    names = {"_Z6hopperv": "hopper()"}
    assert gate.machine_code_problems(counts, names) == ["hopper(): local memory, 0 LDL and 1 STL"]
    monkeypatch.setitem(gate.HGMMA_OF, r"hopper\(", 4)
    assert gate.machine_code_problems(counts, names)[1:] == ["hopper(): 2 HGMMA, expected 4"]
    assert gate.machine_code_problems({}, {}) == ["no HGMMA in any kernel"]


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
