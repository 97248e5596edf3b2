"""Whole native calls on a GPU's kernels, emulated or real, against the long way through Python; see test_eager_calls.py."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_as_accurate
from test_eager_calls import CASES, MODULES, Watched, assert_same, differentiated, results

import llmfast
from llmfast import backend

pytest_plugins = "cuda_emulated"

both = pytest.mark.parametrize("name", CASES)
# What a GPU's whole calls leave to Python: ids have to be sorted for their gradient, and offsets become int64.
LONG_WAY = {"packed, int32": {"varlen_attention"}}
SORTED_IDS = {name: {"embedding_gradient"} for name in CASES if name.startswith("embedding")}


@pytest.fixture
def watched(cuda, monkeypatch):
    module = Watched(backend.native_cuda())
    monkeypatch.setattr(backend, "native_for", lambda tensor: module)
    return module


def on(device: str, name: str):
    function, arguments, options = CASES[name]
    move = lambda value: value.to(device) if isinstance(value, torch.Tensor) else value  # noqa: E731
    return function, [move(a) for a in arguments], {key: move(value) for key, value in options.items()}


def no_whole_calls(monkeypatch):
    for module in MODULES:
        monkeypatch.setattr(importlib.import_module(f"llmfast.ops.{module}"), "whole_calls", lambda _: None)


@both
def test_whole_calls_agree_with_the_long_way(name, cuda, watched, monkeypatch):
    before, case = backend.fallbacks(), on(cuda, name)
    out, (graph_out, grads) = results(*case), differentiated(*case)
    assert watched.calls and watched.refused == {**LONG_WAY, **SORTED_IDS}.get(name, set())
    watched.calls.clear()
    no_whole_calls(monkeypatch)
    assert_same(out, results(*case))
    expected, expected_grads = differentiated(*case)
    assert_same(graph_out, expected)
    assert_same(grads, expected_grads)
    assert not watched.calls and backend.fallbacks() == before


@both
def test_outputs_are_torchs_own(name, cuda):
    """Their memory can be given back, and record_stream() knows their allocator."""
    function, arguments, options = on(cuda, name)
    for out in results(function, arguments, options):
        if any(out is a for a in arguments):
            continue
        if out.is_cuda:
            out.record_stream(torch.cuda.current_stream())
        out.untyped_storage().resize_(0)
        assert out.untyped_storage().nbytes() == 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignored", ["some", "none", "all"])
def test_reduced_losses_of_many_rows(cuda, watched, reduction, ignored):
    """More rows than the threads of a block, and than a block gives their gradient."""
    M, C, V = 8200, 4, 6
    x, weight = torch.randn(M, C).to(cuda), torch.randn(V, C).to(cuda)
    target = torch.randint(V, (M,)).to(cuda)
    if ignored != "none":
        target[:: 3 if ignored == "some" else 1] = -100

    def run(function, *tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        loss = function(*leaves)
        return [loss.detach(), *torch.autograd.grad(loss, leaves, torch.full_like(loss, 0.5))]

    def plain(x, weight):
        return F.cross_entropy(F.linear(x, weight), target, reduction=reduction)

    ours = run(lambda *t: llmfast.linear_cross_entropy(*t, target, reduction=reduction), x, weight)
    assert watched.calls == ["linear_cross_entropy", "linear_cross_entropy_gradient"] and not watched.refused
    theirs, exact = run(plain, x, weight), run(plain, x.double(), weight.double())
    for what, a, b, c in zip(("loss", "grad_x", "grad_weight"), ours, theirs, exact):
        if ignored == "all" and reduction == "mean":
            assert a.isnan().all() or what != "loss"
            continue
        assert a.dtype == torch.float32
        assert_as_accurate(a, b, c, what=what)


@pytest.fixture
def falls_back(cuda, monkeypatch):
    """Attention asks what a GPU's kernels take, also of the emulation's tensors."""
    module = importlib.import_module("llmfast.ops.attention")
    if cuda == "cpu":
        monkeypatch.setattr(module, "_why_not_native", lambda q, v, mask: module._why_not_on_device(q, v))


def test_what_kernels_do_not_take_goes_the_long_way(cuda, watched, falls_back):
    """Strided vectors, head dims above 256, empty tensors, gradients of masks."""
    x, weight, strided = torch.randn(3, 8).to(cuda), torch.randn(8, 8).to(cuda), torch.randn(16).to(cuda)[::2]
    torch.testing.assert_close(llmfast.linear(x, weight, strided), F.linear(x, weight, strided))
    normed, _ = llmfast.add_layer_norm(x, None, strided, strided)
    torch.testing.assert_close(normed, F.layer_norm(x, (8,), strided, strided))
    assert llmfast.linear(x[:0], weight).shape == (0, 8)
    wide, mask = torch.randn(1, 1, 2, 264).to(cuda), torch.zeros(2, 2).to(cuda).requires_grad_()
    narrow = wide[..., :8].contiguous()
    before = sum(backend.fallbacks().values())
    llmfast.attention(wide, wide, wide)
    llmfast.attention(narrow, narrow, narrow, mask=mask).sum().backward()
    assert sum(backend.fallbacks().values()) == before + 2 and mask.grad is not None
    assert watched.refused == set(watched.calls) == {"linear", "add_norm", "attention"}


def test_strict_forbids_what_falls_back(cuda, falls_back, monkeypatch):
    monkeypatch.setenv("LLMFAST_STRICT", "1")
    wide = torch.randn(1, 1, 2, 264).to(cuda)
    with pytest.raises(RuntimeError, match="head dim above 256"):
        llmfast.attention(wide, wide, wide)


def test_errors_are_those_of_the_long_way(cuda):
    x, weight = torch.randn(3, 8).to(cuda), torch.randn(5, 9).to(cuda)
    with pytest.raises(ValueError, match=r"weight: got shape \(5, 9\), expected \(N, 8\)"):
        llmfast.linear(x, weight)
    with pytest.raises(TypeError, match=r"weight: got dtype torch\.bfloat16, expected torch\.float32 as x has"):
        llmfast.linear(x, weight[:, :8].bfloat16())
    with pytest.raises(TypeError, match=r"x: got dtype torch\.float64"):
        llmfast.add_rms_norm(x.double(), None, None)
    with pytest.raises(ValueError, match="window: got 0"):
        q = torch.randn(1, 1, 2, 8).to(cuda)
        llmfast.attention(q, q, q, window=0)


def test_autocast_decides_the_dtype(cuda):
    """Whole calls would not see it."""
    x, weight = torch.randn(3, 8).to(cuda), torch.randn(5, 8).to(cuda)
    with torch.autocast(x.device.type, torch.bfloat16):
        assert llmfast.linear(x, weight).dtype == torch.bfloat16
    assert llmfast.linear(x, weight).dtype == torch.float32
