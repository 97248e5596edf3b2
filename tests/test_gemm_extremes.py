"""Products with a side so short that they go another way: a depth of a token or two, columns for fewer panels than threads,
a large C of little depth, and left operands whose columns are contiguous. Inputs are surrounded by NaN.
"""

import ctypes
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import assert_as_accurate
from test_gemm_targets import surrounded

import llmfast
from llmfast import backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    out = torch.full((grad.shape[1], x.shape[1]), float("nan"), dtype=x.dtype)
    backend.native().linear_backward(None, out, None, grad, x, torch.empty(grad.shape[1], x.shape[1], dtype=x.dtype))
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 2, 3, 4, 5])
def test_weight_gradients_of_few_tokens(isa, dtype, M):
    for N, K in [(17, 1), (40, 7), (65, 16), (100, 33), (19, 515)]:
        grad, x = torch.randn(M, N, dtype=dtype), torch.randn(M, K, dtype=dtype)
        ours = weight_gradient(surrounded(grad, "rows"), surrounded(x, "rows"))
        assert_as_accurate(ours, grad.t() @ x, grad.double().t() @ x.double(), what=f"N={N} K={K}")


@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
def test_weight_gradients_of_few_tokens_of_any_strides(isa, layout):
    grad, x = torch.randn(3, 45), torch.randn(3, 37)
    ours = weight_gradient(surrounded(grad, layout), surrounded(x, layout))
    assert_as_accurate(ours, grad.t() @ x, grad.double().t() @ x.double())


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("K", [1, 16, 17, 50, 64, 65])
def test_weight_gradients_with_few_columns(isa, dtype, K):
    """Left operands are taken as they lie, but for rows of 256 floats, which meet in few sets of L1."""
    for M, N in [(9, 20), (300, 77), (70, 256), (513, 18)]:
        grad, x = torch.randn(M, N, dtype=dtype), torch.randn(M, K, dtype=dtype)
        ours = weight_gradient(surrounded(grad, "rows"), surrounded(x, "rows"))
        assert_as_accurate(ours, grad.t() @ x, grad.double().t() @ x.double(), what=f"M={M} N={N}")


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("N", [3, 16, 33, 70])
def test_fewer_panels_of_columns_than_threads(isa, N, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for M, K in [(17, 2100), (65, 1201), (100, 333), (290, 600)]:
            x, weight, bias = torch.randn(M, K), torch.randn(N, K), torch.randn(N)
            out = torch.full((M, N), float("nan"))
            backend.native().linear_forward(out, surrounded(x, "rows"), surrounded(weight, "rows"), bias)
            exact = x.double() @ weight.double().t() + bias.double()
            assert_as_accurate(out, torch.nn.functional.linear(x, weight, bias), exact, what=f"M={M} K={K}")
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def fewer_threads():
    """OpenMP gives no team more threads than there are processors, and fewer than asked for, as OMP_DYNAMIC lets it."""
    libraries = set(re.findall(r"/\S*/lib[gi]?omp\S*\.so\S*", Path("/proc/self/maps").read_text()))
    runtimes, before = [ctypes.CDLL(library) for library in libraries], torch.get_num_threads()
    assert runtimes
    for runtime in runtimes:
        runtime.omp_set_dynamic(1)
    torch.set_num_threads(4 * os.cpu_count())
    yield
    torch.set_num_threads(before)
    for runtime in runtimes:
        runtime.omp_set_dynamic(0)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_fewer_threads_than_asked_for(isa, fewer_threads, dtype):
    for M, N, K in [(4, 3000, 700), (48, 700, 300), (400, 300, 200)]:
        x, weight = torch.randn(M, K, dtype=dtype), torch.randn(N, K, dtype=dtype)
        out = torch.full((M, N), float("nan"))
        backend.native().linear_forward(out, x, weight, None)
        exact = x.double() @ weight.double().t()
        assert_as_accurate(out, torch.nn.functional.linear(x, weight), exact, what=f"M={M} N={N} K={K}")
    x, weight = torch.randn(300, 64).requires_grad_(), torch.randn(800, 64).requires_grad_()
    target = torch.randint(800, (300,))
    loss = llmfast.linear_cross_entropy(x, weight, target)
    expected = torch.nn.functional.cross_entropy(x @ weight.t(), target)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(expected, (x, weight))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("K", [5, 24, 25])
def test_large_results_of_little_depth(isa, K, dtype, threads):
    """C beyond the caches is written row by row up to a depth of 24."""
    M, N = 1203, 1001
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, weight, bias = torch.randn(M, K, dtype=dtype), torch.randn(N, K, dtype=dtype), torch.randn(N, dtype=dtype)
        out = torch.full((M, N), float("nan"), dtype=dtype)
        backend.native().linear_forward(out, surrounded(x, "rows"), surrounded(weight, "rows"), bias)
        exact = x.double() @ weight.double().t() + bias.double()
        assert_as_accurate(out, torch.nn.functional.linear(x, weight, bias), exact)
    finally:
        torch.set_num_threads(before)
