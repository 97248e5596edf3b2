"""Whole native calls on a GPU's kernels, emulated or real, against the long way through Python; see test_eager_calls.py."""

import gc
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
# Left to Python: ids have to be sorted for their gradient.
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
    assert watched.calls and watched.refused == SORTED_IDS.get(name, set())
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


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@on_a_gpu
@both
def test_work_goes_to_the_current_stream(name):
    """The operands are written late, on a side stream: what ran elsewhere would read what was there before."""
    function, arguments, options = on("cuda", name)
    expected = results(function, arguments, options)
    floating = [isinstance(a, torch.Tensor) and a.is_floating_point() for a in arguments]
    late = [torch.zeros_like(a) if f else a for a, f in zip(arguments, floating)]
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for to, a, f in zip(late, arguments, floating):
            if f:
                to.copy_(a)
        out = results(function, late, options)
    assert not side.query()  # nothing waited for the device
    side.synchronize()
    assert_same(out, expected)


@on_a_gpu
@both
def test_whole_calls_in_a_graph(name):
    function, arguments, options = on("cuda", name)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        results(function, arguments, options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = results(function, arguments, options)
    for a in arguments:
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            a.normal_()
    graph.replay()
    torch.cuda.synchronize()
    assert_same(out, results(function, arguments, options))


@on_a_gpu
@both
def test_no_memory_is_kept(name):
    def allocated() -> int:
        gc.collect()  # graphs of earlier calls may hang in cycles
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    case = on("cuda", name)
    differentiated(*case)
    before = allocated()
    with torch.no_grad():
        out = results(*case)
    own = [o for o in out if not any(o is a for a in case[1])]
    assert allocated() - before <= sum(-(-o.nbytes // 512) * 512 for o in own)
    del out, own
    differentiated(*case)
    assert allocated() == before


@on_a_gpu
@both
def test_tensors_of_another_device_than_the_current_one(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    out, (_, grads) = results(*on("cuda:1", name)), differentiated(*on("cuda:1", name))
    assert torch.cuda.current_device() == 0
    assert all(t is None or t.device == torch.device("cuda", 1) for t in (*out, *grads))
    assert_same([t.to("cuda:0") for t in out], results(*on("cuda:0", name)))


@on_a_gpu
def test_gradients_run_on_the_stream_of_the_forward_pass(cuda, watched):
    x, weight = torch.zeros(64, 64, device="cuda", requires_grad=True), torch.eye(64, device="cuda")
    llmfast.linear(x, weight).sum().backward()
    grad, side = torch.zeros(64, 64, device="cuda"), torch.cuda.Stream()
    x.grad = None
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        out = llmfast.linear(x, weight)
        torch.cuda._sleep(50_000_000)
        grad.fill_(2.0)
        (found,) = torch.autograd.grad(out, x, grad)
    side.synchronize()
    assert (found == 2.0).all() and "linear_gradient" in watched.calls
