"""ffn, plain and gated, against float64, on every instruction set."""

import pytest
import torch
from conftest import assert_as_accurate

import llmfast
from llmfast import reference
from llmfast.ops.ffn import ACTIVATIONS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (M, C, F): the few-rows path, one that keeps hidden rows in cache, sizes beside every tile
SHAPES = [(1, 8, 16), (5, 24, 40), (70, 33, 65), (150, 64, 96)]


def make(M, C, F, *, gated, bias=True):
    torch.manual_seed(M * 1000 + C)
    up, down = torch.randn(F, C) / C**0.5, torch.randn(C, F) / F**0.5
    biases = (torch.randn(F), torch.randn(C)) if bias else (None, None)
    return torch.randn(M, C), up, biases[0], down, biases[1], torch.randn(F, C) / C**0.5 if gated else None


def run(function, tensors, activation, dtype, exact=False):
    """Output and gradients of all inputs; `exact`: in float64, from the values that `dtype` can hold."""
    wide = torch.float64 if exact else dtype
    inputs = [None if t is None else t.to(dtype).to(wide).clone().requires_grad_() for t in tensors]
    out = function(*inputs[:5], activation=activation, gate_weight=inputs[5])
    out.backward(torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(dtype).to(wide))
    return [out.detach(), *(t.grad for t in inputs if t is not None)]


def check(tensors, activation, dtype):
    ours = run(llmfast.ffn, tensors, activation, dtype)
    theirs = run(reference.ffn, tensors, activation, dtype)
    exact = run(reference.ffn, tensors, activation, dtype, exact=True)
    for i, triple in enumerate(zip(ours, theirs, exact)):
        assert triple[0].dtype == dtype
        assert_as_accurate(*triple, what=f"{activation} tensor {i}")


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(isa, activation, gated):
    check(make(9, 20, 37, gated=gated), activation, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(isa, shape, gated, dtype):
    check(make(*shape, gated=gated), "silu" if gated else "gelu_tanh", dtype)


def test_extreme_activations_stay_finite(isa):
    x = torch.tensor([[-1e4, -100.0, -20.0, -1e-30, 0.0, 20.0, 100.0, 1e4]]).t().contiguous().requires_grad_()
    one = torch.ones(1, 1)
    for activation in ACTIVATIONS:
        x.grad = None
        out = llmfast.ffn(x, one, None, one, None, activation=activation)
        out.sum().backward()
        exact = reference.activation(activation, x.detach().double())
        torch.testing.assert_close(out.detach().double(), exact, rtol=1e-5, atol=1e-6)
        assert torch.isfinite(x.grad).all()
    x = torch.tensor([[float("nan")]])
    for activation in ACTIVATIONS:
        assert llmfast.ffn(x, one, None, one, None, activation=activation).isnan().all()


def test_without_biases_and_with_leading_dims(isa):
    x, up, _, down, _, _ = make(12, 16, 24, gated=False, bias=False)
    out = llmfast.ffn(x.view(3, 4, 16), up, None, down, None)
    torch.testing.assert_close(out, reference.ffn(x, up, None, down, None).view(3, 4, 16), rtol=1e-4, atol=1e-5)
    transposed = x.view(3, 4, 16).transpose(0, 1)
    torch.testing.assert_close(llmfast.ffn(transposed, up, None, down, None), out.transpose(0, 1))


def test_empty_batch():
    tensors = [None if t is None else t.requires_grad_() for t in make(0, 8, 16, gated=True)]
    out = llmfast.ffn(*tensors[:5], gate_weight=tensors[5])
    out.sum().backward()
    assert out.shape == (0, 8)
    assert all(t.grad.abs().sum() == 0 for t in tensors)


def test_only_what_is_needed_is_differentiated():
    x, up, up_bias, down, down_bias, _ = make(6, 8, 16, gated=False)
    down.requires_grad_()
    llmfast.ffn(x, up, up_bias, down, down_bias).sum().backward()
    assert down.grad is not None and x.grad is None and up.grad is None


def test_twice_in_one_graph_and_retained():
    x, up, up_bias, down, down_bias, _ = make(6, 8, 16, gated=False)
    up.requires_grad_()
    twin = up.detach().clone().requires_grad_()
    ours = llmfast.ffn(llmfast.ffn(x, up, up_bias, down, down_bias), up, up_bias, down, down_bias).sum()
    theirs = reference.ffn(reference.ffn(x, twin, up_bias, down, down_bias), twin, up_bias, down, down_bias).sum()
    ours.backward(retain_graph=True)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(up.grad, 2 * twin.grad, rtol=1e-4, atol=1e-4)


def test_autocast():
    x, up, up_bias, down, down_bias, gate = make(6, 8, 16, gated=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = llmfast.ffn(x, up, up_bias, down, down_bias, gate_weight=gate)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_compile_and_opcheck(gated):
    tensors = [None if t is None else t.requires_grad_() for t in make(5, 8, 16, gated=gated)]

    def loss(*t):
        return llmfast.ffn(*t[:5], activation="silu", gate_weight=t[5]).square().sum()

    torch.compile(loss, fullgraph=True)(*tensors).backward()
    compiled = [t.grad.clone() for t in tensors if t is not None]
    for t in tensors:
        if t is not None:
            t.grad = None
    loss(*tensors).backward()
    for a, b in zip(compiled, (t.grad for t in tensors if t is not None)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    x, up, up_bias, down, down_bias, gate = tensors
    torch.library.opcheck(torch.ops.llmfast.ffn.default, (x, up, up_bias, gate, down, down_bias, 4, True))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_agree_with_reference(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check(make(230, 48, 80, gated=True), "gelu", torch.float32)
    finally:
        torch.set_num_threads(before)


def test_errors_name_the_argument():
    x, up, up_bias, down, down_bias, _ = make(2, 8, 16, gated=False)
    with pytest.raises(ValueError, match=r"activation: got 'swish', expected one of gelu"):
        llmfast.ffn(x, up, up_bias, down, down_bias, activation="swish")
    with pytest.raises(ValueError, match=r"down_weight: got shape \(16, 8\), expected \(8, 16\)"):
        llmfast.ffn(x, up, up_bias, down.t(), down_bias)
    with pytest.raises(ValueError, match=r"gate_weight: got shape \(8, 8\), expected \(16, 8\)"):
        llmfast.ffn(x, up, up_bias, down, down_bias, gate_weight=torch.randn(8, 8))
    with pytest.raises(TypeError, match=r"up_weight: got dtype torch.bfloat16"):
        llmfast.ffn(x, up.bfloat16(), up_bias, down, down_bias)
