"""The CUDA kernels without a GPU: `_cuda` built on emulated threads (csrc/ptx/emulated), whose functions take CPU tensors.

A pytest plugin: test files name it as ``pytest_plugins = "cuda_emulated"`` and use the fixture `cuda`, which is the device
on which a test makes its tensors: "cpu" under the emulation and, once more, "cuda" where there is a GPU. While it is
active, ops with a CUDA implementation run it.
"""

import fcntl
import functools
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch

from llmfast import backend, optim
from llmfast.models import gpt

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def emulated_module() -> ModuleType:
    """Builds it into the build folder (seconds when nothing changed) and loads it."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("the emulated CUDA module is built from a checkout")
    build = Path(os.environ.get("LLMFAST_BUILD_DIR") or ROOT / "build").resolve() / "emulated-cuda"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(build), "--build-temp", str(build)]
    environment = {**os.environ, "LLMFAST_EMULATE_CUDA": "1"}
    build.mkdir(parents=True, exist_ok=True)
    with (build / "lock").open("w") as lock:  # other test processes wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    path = build / "llmfast" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("llmfast._cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def devices() -> list[str]:
    return ["emulated", "cuda"] if torch.cuda.is_available() and backend.native_cuda() else ["emulated"]


@pytest.fixture(params=devices())
def cuda(request, monkeypatch) -> str:
    """The portable kernels; on a real GPU whatever it chooses."""
    return use_device(request.param, "sm80", monkeypatch)


@pytest.fixture(params=devices())
def hopper(request, monkeypatch) -> str:
    """The kernels for compute capability 9.0."""
    if request.param == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no CUDA device of compute capability 9.0")
    return use_device(request.param, "sm90a", monkeypatch)


def use_device(which: str, arch: str, monkeypatch) -> str:
    if which == "cuda":
        return "cuda"
    module = emulated_module()
    module.set_arch_cap(arch)
    monkeypatch.setattr(backend, "native_cuda", lambda: module)
    monkeypatch.setattr(backend, "native_for", lambda tensor: module)
    losses = sys.modules["llmfast.ops.linear_cross_entropy"]  # the package has a function of that name
    monkeypatch.setattr(losses, "is_worthwhile", lambda *_: False)  # the CPU's kernel
    for name in ("fused_block", "fused_stack"):  # the CPU's
        monkeypatch.setattr(gpt, name, lambda *_: None)
    monkeypatch.setattr(optim, "_step_on_cpu", optim._step_on_gpu)
    monkeypatch.setattr(optim, "_runs_on_gpu", lambda device: True)
    return "cpu"


@pytest.fixture(params=["forward", "reverse", "1"])
def thread_order(request, monkeypatch) -> str:
    """Runs a test once for each order in which the emulation may take a block's threads."""
    monkeypatch.setenv("LLMFAST_EMULATE_ORDER", request.param)
    return request.param
