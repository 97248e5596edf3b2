"""linear on CUDA kernels, emulated or real, against float64."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_as_accurate

import llmfast
from llmfast import backend

pytest_plugins = "cuda_emulated"

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# (M, N, K): one element; ragged in every side, leading dimensions that are no multiple of 8; exact tiles; beside tiles of
# 64; a depth that is cut into parts (1,024 and more)
SHAPES = [(1, 1, 1), (3, 5, 7), (64, 64, 32), (65, 72, 40), (33, 130, 264), (9, 40, 1100)]


def run(function, inputs, grad):
    inputs = [None if t is None else t.detach().requires_grad_() for t in inputs]
    out = function(*inputs)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(t.grad for t in inputs if t is not None)]


def check(inputs, grad):
    ours = run(llmfast.linear, inputs, grad)
    theirs = run(F.linear, inputs, grad)
    exact = run(F.linear, [None if t is None else t.double() for t in inputs], grad)
    for name, a, b, c in zip(("out", "grad_x", "grad_weight", "grad_bias"), ours, theirs, exact):
        assert a.dtype == b.dtype
        assert_as_accurate(a, b, c, what=name)
    return ours


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(cuda, shape, dtype):
    M, N, K = shape
    inputs = [torch.randn(*s).to(dtype).to(cuda) for s in ((M, K), (N, K), (N,))]
    check(inputs, torch.randn(M, N).to(dtype).to(cuda))


@pytest.mark.parametrize("shape", [(1417, 1400, 40), (1921, 3850, 24)], ids=["128x128", "128x256"])
def test_large_tiles(cuda, shape):
    """Enough of them for a whole device, ragged at both edges, in few blocks of depth."""
    M, N, K = shape
    x, weight = torch.randn(M, K).to(BF16).to(cuda), torch.randn(N, K).to(BF16).to(cuda)
    exact = F.linear(x.double(), weight.double())
    assert_as_accurate(llmfast.linear(x, weight), F.linear(x, weight), exact)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_any_strides(cuda, dtype):
    M, N, K = 40, 24, 48
    grad = torch.randn(M, N).to(dtype).to(cuda)
    transposed = [torch.randn(K, M).to(dtype).to(cuda).t(), torch.randn(K, N).to(dtype).to(cuda).t(), None]
    padded = [
        torch.randn(M, K + 3).to(dtype).to(cuda)[:, 1 : K + 1],
        torch.randn(N, 2 * K).to(dtype).to(cuda)[:, ::2],
        None,
    ]
    expanded = [torch.randn(1, K).to(dtype).to(cuda).expand(M, K), torch.randn(N, K).to(dtype).to(cuda), None]
    for inputs in (transposed, padded, expanded):
        check(inputs, grad)
    check(padded, grad[:1].expand(M, N))  # as the gradient of a sum comes


def test_leading_dims_and_bias_alone(cuda):
    x, weight = torch.randn(2, 3, 20).to(cuda), torch.randn(5, 20).to(cuda)
    assert llmfast.linear(x, weight).shape == (2, 3, 5)
    assert llmfast.linear(x[0, 0], weight).shape == (5,)
    bias = torch.randn(5).to(cuda)
    torch.testing.assert_close(llmfast.linear(x[..., :0], weight[:, :0], bias), bias.expand(2, 3, 5))


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)], ids=str)
def test_empty(cuda, shape):
    M, N, K = shape
    inputs = [torch.randn(*s).to(cuda) for s in ((M, K), (N, K), (N,))]
    out, grad_x, grad_weight, grad_bias = run(llmfast.linear, inputs, torch.ones(M, N).to(cuda))
    assert out.shape == (M, N) and grad_x.shape == (M, K) and grad_weight.abs().sum() == 0
    torch.testing.assert_close(grad_bias, torch.full_like(grad_bias, M))


def test_order_of_threads_does_not_matter(cuda, thread_order):
    """And neither does the time: the same input gives the same bits."""
    inputs = [torch.randn(*s).to(BF16).to(cuda) for s in ((70, 1032), (40, 1032), (40,))]
    grad = torch.randn(70, 40).to(BF16).to(cuda)
    first = check(inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, run(llmfast.linear, inputs, grad)))


def test_shared_memory_has_no_bank_conflicts(cuda):
    if cuda != "cpu":
        pytest.skip("the emulation counts them")
    module = backend.native_cuda()
    module.reset_counters()
    inputs = [torch.randn(*s).to(BF16) for s in ((70, 72), (80, 72), (80,))]
    run(llmfast.linear, inputs, torch.randn(70, 80).to(BF16))
    assert module.counters()["mma"] > 0 and module.counters()["ldmatrix_conflicts"] == 0
