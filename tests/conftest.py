"""Shared fixtures. `isa` runs a test once for each instruction set that this machine (or the emulated build) has.

Test files are spread over up to four processes (pytest-xdist), each with torch's usual threads: those wait without
spinning, or processes with more threads than there are cores would keep each other from working.
"""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch loads its OpenMP runtime
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from llmfast import backend


def available_isas() -> list[str]:
    return list(backend.ISAS[: backend.ISAS.index(backend.native().active_isa()) + 1])


def pytest_xdist_auto_num_workers(config) -> int:
    """None for a single file, which one process runs anyway."""
    files = {argument.split("::")[0] for argument in config.args}
    if len(files) == 1 and files.pop().endswith(".py"):
        return 0
    return min(4, len(os.sched_getaffinity(0)))


def pytest_generate_tests(metafunc):
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", available_isas(), indirect=True)


@pytest.fixture
def isa(request):
    """Forces one instruction set for the test; yields its name."""
    with backend.force(isa=request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def assert_as_accurate(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor, *, what: str = "result") -> None:
    """The error rule: our largest error against float64 is at most twice that of same-dtype torch, plus 1e-5.

    The allowance scales with the result, so that it means the same for sums of 10 and of 10,000 terms.
    """
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)} instead of {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    error = (ours.double() - exact).abs().max().item()
    peer = (theirs.double() - exact).abs().max().item()
    allowed = 2 * peer + 1e-5 * max(1.0, exact.abs().max().item())
    assert error <= allowed, f"{what}: error {error:.3e}, torch's {peer:.3e}, allowed {allowed:.3e}"
