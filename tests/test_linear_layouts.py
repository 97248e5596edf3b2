"""Weights stored ``[in, out]``, as GPT-2's are: same numbers, gradients in the weight's own layout, few rows and many."""

import pytest
import torch
from conftest import assert_as_accurate

import llmfast

SHAPES = [
    (1, 1, 1),
    (1, 9, 1),
    (1, 7, 5),
    (2, 8, 16),
    (3, 9, 33),
    (4, 64, 100),
    (1, 130, 771),
    (5, 129, 77),
    (17, 40, 48),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(isa, dtype, shape):
    M, K, N = shape
    x, weight, bias, grad = (torch.randn(s).to(dtype) for s in ((M, K), (K, N), (N,), (M, N)))
    x.requires_grad_(), weight.requires_grad_()
    out = llmfast.linear(x, weight.t(), bias)
    out.backward(grad)
    exact = x.double() @ weight.double() + bias.double()
    assert_as_accurate(out, torch.addmm(bias, x, weight), exact)
    assert_as_accurate(weight.grad, x.t() @ grad, x.double().t() @ grad.double(), what="grad_weight")
    assert_as_accurate(x.grad, grad @ weight.t(), grad.double() @ weight.double().t(), what="grad_x")
