"""`llmfast.backend`'s blocks: nested ones, and those of several threads, which overlap."""

import contextlib

import pytest
import torch

from llmfast import backend


def opened(block: contextlib.AbstractContextManager) -> contextlib.AbstractContextManager:
    block.__enter__()
    return block


def close(block: contextlib.AbstractContextManager) -> None:
    block.__exit__(None, None, None)


def test_deterministic_sums_of_blocks_that_overlap(monkeypatch):
    monkeypatch.setattr(backend, "_deterministic", None)  # whatever LLMFAST_DETERMINISTIC says
    assert not backend.deterministic()
    first = opened(backend.deterministic_sums())
    second = opened(backend.deterministic_sums())
    close(first)
    assert backend.deterministic()
    third = opened(backend.deterministic_sums(False))
    assert not backend.deterministic()
    close(second)
    assert not backend.deterministic()
    close(third)
    assert not backend.deterministic()
    torch.use_deterministic_algorithms(True)
    try:
        assert backend.deterministic()
        with backend.deterministic_sums(False):
            assert not backend.deterministic()
    finally:
        torch.use_deterministic_algorithms(False)


def test_forced_instruction_sets_of_blocks_that_overlap():
    active = backend.native().active_isa
    best = active()
    lower = backend.ISAS[max(0, backend.ISAS.index(best) - 1)]
    first = opened(backend.force(lower))
    second = opened(backend.force("ref"))
    assert active() == "ref"
    close(first)
    assert active() == "ref"
    first = opened(backend.force(best))
    assert active() == "ref"
    close(second)
    assert active() == best
    second = opened(backend.force(lower))
    close(first)
    assert active() == lower
    close(second)
    assert active() == best


def test_instruction_sets_that_cannot_be_forced():
    for isa in {"sse", *backend.ISAS[backend.ISAS.index(backend.native().active_isa()) + 1 :]}:
        with pytest.raises(ValueError, match="isa: got"), backend.force(isa):
            pass
