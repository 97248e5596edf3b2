"""The native module runs on machines that lack an instruction set only if that set's code stays in its own objects.

Two ways it could leak: an inline function compiled with AVX-512 flags whose weak symbol the linker picks for everyone,
and an object compiled with the wrong flags. Both are looked for in the objects of the build tree.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llmfast import backend

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("base", "ref", "avx2", "avx512", "avx512bf16", "amx", "amx_split")
YMM, ZMM, TILE, BF16 = r"%ymm", r"%zmm|%k[0-7]\b", r"%tmm|\b(ldtilecfg|tilerelease)\b", r"\bv\w*bf16\w*\b"
FORBIDDEN = {
    "base": [YMM, ZMM, TILE, BF16],
    "ref": [YMM, ZMM, TILE, BF16],
    "avx2": [ZMM, TILE, BF16],
    "avx512": [TILE, BF16],
    "avx512bf16": [TILE],
    "amx": [],
    "amx_split": [],
}


@pytest.fixture(scope="module")
def objects() -> dict[str, list[Path]]:
    """The build tree's object files by target."""
    build = Path(os.environ.get("LLMFAST_BUILD_DIR") or ROOT / "build")
    folder = build / f"native-{sysconfig.get_config_var('SOABI')}" / ("emulated" if backend.native().emulated else "")
    listed = folder / "build.ninja"
    if not listed.exists():
        pytest.skip(f"no build tree at {folder} (llmfast comes from a wheel, not from this checkout)")
    for tool in ("nm", "objdump"):
        if shutil.which(tool) is None:
            pytest.skip(f"binutils' {tool} is not installed")
    paths = [Path(path) for path in re.findall(r"^build (.*\.o): compile", listed.read_text(), re.MULTILINE)]
    return {target: [path for path in paths if path.name.endswith(f".{target}.o")] for target in TARGETS}


def run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def test_every_target_was_built(objects):
    assert objects["base"] and objects["ref"]
    if sysconfig.get_platform() == "linux-x86_64":
        assert all(objects[target] for target in TARGETS)


@pytest.mark.parametrize("target", TARGETS[1:])
def test_weak_symbols_name_their_target(objects, target):
    """A weak symbol is safe if its full name, template arguments included, mentions the target: no other has it."""
    stray = ["these belong in namespace llmfast::LLMFAST_TARGET or need internal linkage"]
    for path in objects[target]:
        for line in run("nm", "-C", path).splitlines():
            match = re.match(r"[0-9a-f]* +([WVuw]) (.*)", line)
            if match is None or match[1] == "w" or match[2] == "DW.ref.__gxx_personality_v0":
                continue  # w: an undefined weak reference; DW.ref: a pointer for exception handling, not code
            if f"llmfast::{target}::" not in match[2]:
                stray.append(f"{path.name}: {match[2]}")
    assert len(stray) == 1, "\n".join(stray)


@pytest.mark.parametrize("target", TARGETS)
def test_instructions_belong_to_their_target(objects, target):
    emulated = backend.native().emulated and target in TARGETS[3:]
    forbidden = FORBIDDEN["avx2" if emulated else target]
    pattern = re.compile("|".join(forbidden) or "no instruction is forbidden")

    def offences(path: Path) -> list[str]:
        listing = run("objdump", "-d", "--no-show-raw-insn", path)
        return [f"{path.name}: {line.strip()}" for line in listing.splitlines() if pattern.search(line)][:3]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [line for lines in pool.map(offences, objects[target]) for line in lines]
    assert not found, "\n".join(found)


AMX_INSTRUCTIONS = ("ldtilecfg", "tileloaddt1", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease")


@pytest.mark.parametrize(
    ("target", "instructions"),
    [("avx512bf16", ("vdpbf16ps",)), *((target, AMX_INSTRUCTIONS) for target in ("amx", "amx_split"))],
)
def test_bf16_objects_multiply_bf16(objects, target, instructions):
    if not objects[target]:
        assert sysconfig.get_platform() != "linux-x86_64"
        return
    [gemm] = [path for path in objects[target] if path.name.startswith("gemm-")]
    listing = run("objdump", "-d", "--no-show-raw-insn", gemm)
    for instruction in instructions:
        found = re.search(rf"\t{instruction}\b", listing) is not None
        assert found != backend.native().emulated, instruction
