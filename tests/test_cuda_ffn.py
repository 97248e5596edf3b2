"""ffn on CUDA kernels, emulated or real, against float64."""

import pytest
import torch
from conftest import assert_as_accurate
from test_ffn import make, run

import llmfast
from llmfast import reference
from llmfast.ops.ffn import ACTIVATIONS

pytest_plugins = "cuda_emulated"

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# (M, C, F): one row; sides that are no multiple of 8; beside tiles of 64
SHAPES = [(1, 8, 16), (5, 33, 65), (70, 72, 136)]


def check(device, tensors, activation, dtype):
    tensors = [None if t is None else t.to(device) for t in tensors]
    ours = run(llmfast.ffn, tensors, activation, dtype)
    theirs = run(reference.ffn, tensors, activation, dtype)
    exact = run(reference.ffn, tensors, activation, dtype, exact=True)
    for i, triple in enumerate(zip(ours, theirs, exact)):
        assert triple[0].dtype == dtype
        assert_as_accurate(*triple, what=f"{activation} tensor {i}")


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(cuda, activation, gated):
    check(cuda, make(9, 20, 37, gated=gated), activation, F32)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(cuda, shape, gated, dtype):
    check(cuda, make(*shape, gated=gated), "silu" if gated else "gelu_tanh", dtype)


def test_extreme_activations_stay_finite(cuda):
    x = torch.tensor([[-1e4, -100.0, -20.0, -1e-30, 0.0, 20.0, 100.0, 1e4]]).t().contiguous().to(cuda).requires_grad_()
    one = torch.ones(1, 1).to(cuda)
    for activation in ACTIVATIONS:
        x.grad = None
        out = llmfast.ffn(x, one, None, one, None, activation=activation)
        out.sum().backward()
        exact = reference.activation(activation, x.detach().double())
        torch.testing.assert_close(out.detach().double(), exact, rtol=1e-5, atol=1e-6)
        assert torch.isfinite(x.grad).all()
        assert llmfast.ffn(x[:1].detach() * float("nan"), one, None, one, None, activation=activation).isnan().all()


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_without_gradients_and_biases(cuda, gated):
    x, up, _, down, _, gate = (None if t is None else t.to(cuda) for t in make(12, 16, 24, gated=gated, bias=False))
    with torch.no_grad():
        out = llmfast.ffn(x.view(3, 4, 16), up, None, down, None, gate_weight=gate)
    expected = reference.ffn(x, up, None, down, None, gate_weight=gate).view(3, 4, 16)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_only_what_is_needed_is_differentiated(cuda):
    x, up, up_bias, down, down_bias, _ = (None if t is None else t.to(cuda) for t in make(6, 8, 16, gated=False))
    down.requires_grad_()
    llmfast.ffn(x, up, up_bias, down, down_bias).sum().backward()
    assert down.grad is not None and x.grad is None and up.grad is None


def test_empty_batch(cuda):
    tensors = [None if t is None else t.to(cuda).requires_grad_() for t in make(0, 8, 16, gated=True)]
    out = llmfast.ffn(*tensors[:5], gate_weight=tensors[5])
    out.sum().backward()
    assert out.shape == (0, 8) and all(t.grad.abs().sum() == 0 for t in tensors)
