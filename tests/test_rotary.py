"""rotary against float64, on every instruction set, and its tables."""

import pytest
import torch
from conftest import assert_as_accurate

import llmfast
from llmfast import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, Hq, Hkv, T, D, R
SHAPES = [
    (1, 1, 1, 1, 2, 2),
    (2, 3, 1, 5, 64, 64),
    (1, 4, 2, 7, 10, 6),
    (2, 2, 2, 9, 33, 16),
    (1, 2, 1, 3, 7, 0),
    (3, 8, 2, 33, 128, 128),
]


def half_rotation(q, k, cos, sin):
    """As Hugging Face writes it, in the tensors' own dtype."""

    def rotate(x):
        R = 2 * cos.shape[-1]
        c, s = (torch.cat((t, t), -1).to(x.dtype) for t in (cos, sin))
        if c.dim() == 3:
            c, s = c[:, None], s[:, None]
        turned = x[..., :R]
        other = torch.cat((-turned[..., R // 2 :], turned[..., : R // 2]), -1)
        return torch.cat((turned * c + other * s, x[..., R:]), -1)

    return rotate(q), rotate(k)


def results_of(function, q, k, cos, sin, grads):
    q, k = q.detach().clone().requires_grad_(), k.detach().clone().requires_grad_()
    out = function(q, k, cos, sin)
    torch.autograd.backward(out, [g.to(o.dtype) for g, o in zip(grads, out)])
    return [*(o.detach() for o in out), q.grad, k.grad]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(isa, shape, dtype):
    B, Hq, Hkv, T, D, R = shape
    q, k = torch.randn(B, Hq, T, D).to(dtype), torch.randn(B, Hkv, T, D).to(dtype)
    cos, sin = llmfast.rotary_tables(T, R)
    grads = torch.randn_like(q), torch.randn_like(k)
    ours = results_of(llmfast.rotary, q, k, cos, sin, grads)
    theirs = results_of(half_rotation, q, k, cos, sin, grads)
    exact = results_of(half_rotation, q.double(), k.double(), cos.double(), sin.double(), grads)
    for name, a, b, c in zip(("q", "k", "grad_q", "grad_k"), ours, theirs, exact):
        assert a.dtype == dtype
        assert_as_accurate(a, b, c, what=name)


def test_tables_of_every_shape(isa):
    q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16)
    positions = torch.tensor([[3, 4, 5, 6, 7], [0, 1, 2, 3, 4]])
    cos, sin = llmfast.rotary_tables(positions, 16)
    expected = reference.rotary(q, k, cos, sin)
    torch.testing.assert_close(llmfast.rotary(q, k, cos, sin), expected)
    doubled = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    torch.testing.assert_close(llmfast.rotary(q, k, *doubled), expected)
    torch.testing.assert_close(llmfast.rotary(q, k, *(t.bfloat16() for t in doubled)), expected, rtol=0, atol=3e-2)
    one = llmfast.rotary(q, k, cos[:1], sin[:1])
    torch.testing.assert_close(one, reference.rotary(q, k, cos[0], sin[0]))
    torch.testing.assert_close(llmfast.rotary(q, k, cos.transpose(0, 2).contiguous().transpose(0, 2), sin), expected)

    partial, partial_sin = llmfast.rotary_tables(5, 8)
    expected = reference.rotary(q, k, partial, partial_sin)
    doubled = torch.cat((partial, partial), -1), torch.cat((partial_sin, partial_sin), -1)
    torch.testing.assert_close(llmfast.rotary(q, k, *doubled, rotary_dim=8), expected)
    torch.testing.assert_close(llmfast.rotary(q, k, partial, partial_sin, rotary_dim=8), expected)


def test_layouts_are_kept(isa):
    cos, sin = llmfast.rotary_tables(6, 32)
    packed = torch.randn(2, 6, 3 * 4 * 32)  # a projection's output: q, k and v side by side
    q, k, _ = (t.view(2, 6, 4, 32).transpose(1, 2) for t in packed.split(4 * 32, dim=-1))
    transposed = torch.randn(2, 6, 4, 32).transpose(1, 2)
    for x, y in (
        (q, k),
        (transposed, q),
        (q.contiguous(), transposed),
        (torch.randn(2, 6, 32)[:, None].expand(2, 4, 6, 32), q),
    ):
        out = llmfast.rotary(x, y, cos, sin)
        torch.testing.assert_close(out, reference.rotary(x, y, cos, sin))
        assert [o.stride() for o in out] == [torch.empty_like(t).stride() for t in (x, y)]
    assert llmfast.rotary(transposed, q, cos, sin)[0].stride() == transposed.stride()
    columns = torch.randn(2, 4, 32, 6).transpose(2, 3)  # D is not contiguous
    torch.testing.assert_close(llmfast.rotary(columns, q, cos, sin), reference.rotary(columns, q, cos, sin))


def test_gradients_of_views_and_of_one_output(isa):
    cos, sin = llmfast.rotary_tables(6, 32)
    exact_cos, exact_sin = cos.double(), sin.double()
    x = torch.randn(2, 6, 4, 32)
    for use in (0, 1, None):
        ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        for t, function, c, s in ((ours, llmfast.rotary, cos, sin), (exact, half_rotation, exact_cos, exact_sin)):
            q, k = function(t.transpose(1, 2), t.transpose(1, 2)[:, ::2], c, s)
            (q.sum() + k.square().sum() if use is None else (q, k)[use].sum()).backward()
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)


def test_inverse_undoes(isa):
    q, k = torch.randn(1, 2, 50, 24), torch.randn(1, 2, 50, 24)
    cos, sin = llmfast.rotary_tables(50, 24)
    back = llmfast.rotary(*llmfast.rotary(q, k, cos, sin), cos, -sin)
    torch.testing.assert_close(back, (q, k), rtol=1e-5, atol=1e-5)


def test_tables():
    cos, sin = llmfast.rotary_tables(8192, 64, theta=500000.0)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (8192, 32)
    angle = 8191 * 500000.0 ** (-2 * 5 / 64)
    assert abs(cos[-1, 5].item() - torch.tensor(angle, dtype=torch.float64).cos().item()) < 1e-7
    positions = torch.tensor([[5, 0], [7, 100]])
    assert torch.equal(llmfast.rotary_tables(positions, 64, theta=500000.0)[1], sin[positions])
    assert llmfast.rotary_tables(0, 8)[0].shape == (0, 4)
    with pytest.raises(ValueError, match="dim: got 7, expected an even number"):
        llmfast.rotary_tables(4, 7)


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 0, 3, 8), (2, 2, 0, 8)], ids=str)
def test_empty(shape):
    q = torch.randn(shape, requires_grad=True)
    k = torch.randn(shape[0], 2, *shape[2:], requires_grad=True)
    out = llmfast.rotary(q, k, *llmfast.rotary_tables(shape[2], 8))
    (out[0].sum() + out[1].sum()).backward()
    assert q.grad.shape == q.shape and k.grad.shape == k.shape


@pytest.mark.parametrize("threads", [1, 3, 5])
def test_any_number_of_threads(threads):
    q, k = torch.randn(2, 17, 7, 64).transpose(1, 2), torch.randn(2, 3, 17, 64)
    cos, sin = llmfast.rotary_tables(17, 48)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        out = llmfast.rotary(q, k, cos, sin)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(out, reference.rotary(q, k, cos, sin))


def test_used_twice_autocast_compile_and_opcheck():
    x, y = torch.randn(1, 2, 4, 8), torch.randn(1, 1, 4, 8)
    cos, sin = llmfast.rotary_tables(4, 8)

    def loss(rotary, x, y):
        q, k = rotary(x, y, cos, sin)
        q, k = rotary(q.sin(), k, cos, sin)
        return (q * k).sum()

    got = []
    for function, run in (
        (llmfast.rotary, torch.compile(loss, fullgraph=True)),
        (llmfast.rotary, loss),
        (reference.rotary, loss),
    ):
        leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
        run(function, *leaves).backward()
        got.append([t.grad for t in leaves])
    torch.testing.assert_close(got[0], got[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1], got[2], rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert llmfast.rotary(x, y, cos, sin)[0].dtype == torch.float32
    inputs = x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(), y.requires_grad_()
    torch.library.opcheck(torch.ops.llmfast.rotary.default, (*inputs, cos, sin, False))


def test_errors_name_the_argument():
    q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16)
    cos, sin = llmfast.rotary_tables(5, 16)
    with pytest.raises(ValueError, match=r"q: got shape \(4, 5, 16\), expected \(B, Hq, T, D\)"):
        llmfast.rotary(q[0], k, cos, sin)
    with pytest.raises(ValueError, match=r"k: got shape \(2, 2, 4, 16\), expected \(2, Hkv, 5, 16\)"):
        llmfast.rotary(q, k[:, :, :4], cos, sin)
    with pytest.raises(TypeError, match=r"k: got dtype torch.bfloat16, expected torch.float32 as q has"):
        llmfast.rotary(q, k.bfloat16(), cos, sin)
    with pytest.raises(ValueError, match=r"cos: got shape \(4, 8\), expected \(5, 8\)"):
        llmfast.rotary(q, k, cos[:4], sin)
    with pytest.raises(ValueError, match=r"sin: got shape \(5, 4\), expected \(5, 8\)"):
        llmfast.rotary(q, k, cos, sin[:, :4])
    with pytest.raises(ValueError, match=r"cos: got shape \(5, 40\), expected a last dimension of R/2 or R"):
        llmfast.rotary(q, k, torch.randn(5, 40), torch.randn(5, 40))
    with pytest.raises(ValueError, match=r"cos: got shape \(3, 5, 8\), expected \(2, 5, 8\)"):
        llmfast.rotary(q, k, cos.expand(3, 5, 8), sin.expand(3, 5, 8))
