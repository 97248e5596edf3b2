"""linear against float64, on every instruction set."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_as_accurate

import llmfast
from llmfast import backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (M, N, K): single elements, sizes around every tile (4, 6, 14, 16, 32), several depth blocks, few and many rows
SHAPES = [
    (1, 1, 1),
    (3, 5, 7),
    (4, 17, 33),
    (5, 64, 32),
    (7, 31, 65),
    (33, 33, 31),
    (97, 70, 300),
    (64, 96, 1500),
    (130, 257, 129),
]


def make(M, N, K, dtype):
    return torch.randn(M, K, dtype=dtype), torch.randn(N, K, dtype=dtype), torch.randn(N, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(isa, shape, dtype):
    tensors = [t.requires_grad_() for t in make(*shape, dtype)]
    peers = [t.detach().clone().requires_grad_() for t in tensors]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    grad = torch.randn(shape[:2], dtype=dtype)
    results = []
    for function, inputs in ((llmfast.linear, tensors), (F.linear, peers), (F.linear, exact)):
        out = function(*inputs)
        out.backward(grad.to(out.dtype))
        results.append([out.detach(), *(t.grad for t in inputs)])
    for name, ours, theirs, truth in zip(("out", "grad_x", "grad_weight", "grad_bias"), *results):
        assert ours.dtype == dtype
        assert_as_accurate(ours, theirs, truth, what=name)


def test_strides_and_leading_dims(isa):
    x = torch.randn(40, 5, 3).permute(2, 1, 0)  # K contiguous nowhere
    weight = torch.randn(40, 9).t()
    assert_as_accurate(llmfast.linear(x, weight), F.linear(x, weight), F.linear(x.double(), weight.double()))
    expanded = torch.randn(1, 40).expand(6, 40)
    assert_as_accurate(
        llmfast.linear(expanded, weight), F.linear(expanded, weight), F.linear(expanded.double(), weight.double())
    )
    assert llmfast.linear(torch.randn(40), weight).shape == (9,)


def test_gradient_of_a_broadcast_sum(isa):
    x, weight, bias = (t.requires_grad_() for t in make(9, 33, 20, torch.float32))
    llmfast.linear(x, weight, bias).sum().backward()  # the incoming gradient has stride 0
    torch.testing.assert_close(bias.grad, torch.full((33,), 9.0))
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(33, 20))


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)], ids=str)
def test_empty(shape):
    x, weight, bias = (t.requires_grad_() for t in make(*shape, torch.float32))
    out = llmfast.linear(x, weight, bias)
    torch.testing.assert_close(out, F.linear(x, weight, bias))
    out.sum().backward()
    assert x.grad.shape == x.shape and weight.grad.abs().sum() == 0
    torch.testing.assert_close(bias.grad, torch.full_like(bias, shape[0]))


def test_used_twice_in_one_graph():
    x, weight, _ = make(5, 6, 6, torch.float64)
    twin, ours = weight.clone().requires_grad_(), weight.float().requires_grad_()
    F.linear(F.linear(x, twin), twin).square().sum().backward()
    llmfast.linear(llmfast.linear(x.float(), ours), ours).square().sum().backward()
    torch.testing.assert_close(ours.grad, twin.grad.float(), rtol=1e-4, atol=1e-3)


def test_autocast_casts_like_torch():
    x, weight, bias = make(5, 6, 7, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = llmfast.linear(x, weight, bias)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, llmfast.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()))


def test_compile_and_opcheck():
    x, weight, bias = (t.requires_grad_() for t in make(5, 6, 7, torch.float32))
    compiled = torch.compile(lambda *a: llmfast.linear(*a).relu().sum(), fullgraph=True)
    compiled(x, weight, bias).backward()
    got = [t.grad.clone() for t in (x, weight, bias)]
    for t in (x, weight, bias):
        t.grad = None
    F.linear(x, weight, bias).relu().sum().backward()
    for ours, t in zip(got, (x, weight, bias)):
        torch.testing.assert_close(ours, t.grad, rtol=1e-4, atol=1e-5)
    torch.library.opcheck(torch.ops.llmfast.linear.default, (x, weight, bias))
    torch.library.opcheck(torch.ops.llmfast.linear.default, (x, weight, None))


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_any_number_of_threads(threads):
    x, weight, bias = make(150, 70, 90, torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        out = llmfast.linear(x, weight, bias)
        assert torch.equal(out, llmfast.linear(x, weight, bias))
    finally:
        torch.set_num_threads(before)
    assert_as_accurate(out, F.linear(x, weight, bias), F.linear(x.double(), weight.double(), bias.double()))


def test_errors_name_the_argument():
    x, weight, bias = make(2, 3, 4, torch.float32)
    with pytest.raises(ValueError, match=r"weight: got shape \(3, 4\), expected \(N, 5\)"):
        llmfast.linear(torch.randn(2, 5), weight)
    with pytest.raises(TypeError, match=r"weight: got dtype torch.bfloat16, expected torch.float32 as x has"):
        llmfast.linear(x, weight.bfloat16())
    with pytest.raises(ValueError, match=r"bias: got shape \(4,\), expected \(3,\)"):
        llmfast.linear(x, weight, torch.randn(4))
    with pytest.raises(TypeError, match=r"x: got dtype torch.int64"):
        llmfast.linear(x.long(), weight)
    with pytest.raises(TypeError, match=r"x: got list, expected a torch.Tensor"):
        llmfast.linear([1.0], weight)


def test_rows_are_counted(isa):
    def calls():
        return {row["isa"]: row["calls"] for row in backend.implementations("linear")}

    before = calls()
    llmfast.linear(torch.randn(2, 3), torch.randn(4, 3))
    changed = {name: n - before[name] for name, n in calls().items() if n != before[name]}
    assert changed == {min(isa, "avx512", key=backend.ISAS.index): 1}
