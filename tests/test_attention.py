"""attention, varlen_attention and the SDPA twin against float64, on every instruction set.

One file above 500 lines: the three share inputs, masks and the oracle.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfast import backend, reference
from llmfast.ops import attention, scaled_dot_product_attention, varlen_attention
from llmfast.ops.attention import packed_attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF = math.inf


def make(B, Hq, Hkv, Tq, Tk, D, Dv=None, dtype=torch.float32):
    Dv = D if Dv is None else Dv
    return (
        torch.randn(B, Hq, Tq, D).to(dtype),
        torch.randn(B, Hkv, Tk, D).to(dtype),
        torch.randn(B, Hkv, Tk, Dv).to(dtype),
    )


def torch_attention(q, k, v, *, causal=False, mask=None, window=None, scale=None, softcap=None):
    """The peer: the formula in plain PyTorch operations, each in q's dtype."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    allowed = reference.visible(q.shape[2], k.shape[2], causal=causal, window=window)
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        scores, allowed = scores + mask.to(q.dtype).clamp(min=torch.finfo(q.dtype).min), allowed & (mask != -INF)
    weights = torch.softmax(scores.masked_fill(~allowed, torch.finfo(q.dtype).min), dim=-1) * allowed
    return weights @ v


def with_gradients(function, tensors, grad, **options):
    inputs = [t.detach().requires_grad_() for t in tensors]
    out = function(*inputs, **options)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(t.grad for t in inputs)]


def check(tensors, **options):
    """Output and gradients of `attention` under the error rule."""
    q, _, v = tensors
    grad = torch.randn(*q.shape[:-1], v.shape[-1]).to(q.dtype)
    ours = with_gradients(attention, tensors, grad, **options)
    theirs = with_gradients(torch_attention, tensors, grad, **options)
    exact = with_gradients(reference.attention, [t.double() for t in tensors], grad, **options)
    for name, mine, peer, truth in zip(("out", "grad_q", "grad_k", "grad_v"), ours, theirs, exact):
        assert mine.dtype == q.dtype
        assert_as_accurate(mine, peer, truth, what=name)


# (B, Hq, Hkv, Tq, Tk, D, Dv), options. Sizes straddle the panels (8, 16, 32 rows), tiles (64 keys) and items (128 rows).
CASES = {
    "one token": ((1, 1, 1, 1, 1, 1, 1), {}),
    "plain": ((2, 3, 3, 70, 70, 64, 64), {}),
    "causal": ((2, 2, 2, 131, 131, 64, 64), {"causal": True}),
    "fewer queries": ((1, 2, 2, 33, 140, 32, 32), {"causal": True}),
    "fewer keys": ((1, 2, 2, 90, 50, 32, 32), {"causal": True}),
    "grouped heads": ((2, 6, 2, 45, 67, 24, 24), {"causal": True}),
    "one kv head, odd dims": ((1, 5, 1, 19, 65, 7, 13), {"causal": True}),
    "wide head": ((1, 1, 1, 20, 20, 320, 3), {"causal": True}),
    "narrow head": ((1, 2, 2, 64, 64, 1, 1), {"causal": True}),
    "int window": ((1, 2, 2, 150, 150, 16, 16), {"window": 9}),
    "window both sides": ((1, 2, 1, 100, 120, 16, 16), {"window": (70, 3)}),
    "window left open": ((1, 2, 1, 30, 20, 16, 16), {"window": (-1, 4)}),
    "window and causal": ((1, 2, 1, 80, 80, 16, 16), {"window": (5, 5), "causal": True}),
    "scale": ((1, 2, 2, 20, 30, 16, 16), {"scale": 0.5}),
    "softcap": ((1, 2, 2, 40, 70, 16, 16), {"softcap": 2.0, "causal": True, "scale": 1.0}),
    "decode": ((3, 8, 2, 1, 300, 40, 24), {"causal": True}),
    "decode two, window": ((2, 6, 2, 2, 270, 33, 33), {"window": 150}),
    "decode softcap": ((1, 4, 4, 3, 130, 16, 16), {"causal": True, "softcap": 3.0}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(isa, case, dtype):
    shape, options = CASES[case]
    check(make(*shape, dtype=dtype), **options)


@pytest.mark.parametrize("Tq", [2, 50])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 1, 1, 1), (1, 4, 1, 1), (2, 1, -1, 1), (1, 1, 1, -1), (2, 4, -1, -1)], ids=str
)
def test_masks_broadcast(isa, shape, Tq):
    B, Hq, Tk = 2, 4, 90
    sizes = [1 if s == 1 else n for s, n in zip(shape, (B, Hq, Tq, Tk))]
    tensors = make(B, Hq, 2, Tq, Tk, 16)
    check(tensors, mask=torch.rand(sizes) < 0.7)
    check(tensors, mask=torch.randn(sizes), causal=True)
    check(tensors, mask=torch.where(torch.rand(sizes) < 0.3, -INF, torch.randn(sizes)))
    check([t.bfloat16() for t in tensors], mask=torch.randn(sizes).bfloat16())


def test_masks_of_few_dims_and_any_strides(isa):
    tensors = make(2, 2, 2, 40, 70, 16)
    check(tensors, mask=torch.randn(70))
    check(tensors, mask=torch.randn(70, 40).t(), window=20)
    check(tensors, mask=(torch.rand(40, 140) < 0.5)[:, ::2])
    padding = torch.arange(70) < torch.tensor([[3], [65]])  # left all but a few keys
    check(tensors, mask=padding[:, None, None, :])


@pytest.mark.parametrize("Tq", [2, 70])
@pytest.mark.parametrize("per_query", [False, True])
def test_masks_that_let_through_the_middle_alone(isa, Tq, per_query):
    tensors = make(2, 4, 2, Tq, 200, 16)
    keys = torch.arange(200)
    middle = (keys >= torch.tensor([70, 5])[:, None]) & (keys < torch.tensor([141, 7])[:, None])
    middle = middle[:, None, None].repeat(1, 1, Tq if per_query else 1, 1)
    middle[..., -1, :80] = False  # of the last query, or of all
    check(tensors, mask=middle)
    check(tensors, mask=middle, causal=True, softcap=5.0)
    check(tensors, mask=middle & (keys % 3 != 0))
    check([t.bfloat16() for t in tensors], mask=torch.where(middle, torch.randn(200), -INF))


def test_lse(isa):
    for Tq in (2, 40):  # decode and prefill
        q, k, v = make(2, 4, 2, Tq, 70, 16)
        out, lse = torch.ops.llmfast.attention_forward(q, k, v, None, None, 0, 0.25, 0.0)
        scores = 0.25 * q.double() @ k.double().repeat_interleave(2, 1).mT
        scores = scores.masked_fill(~reference.visible(Tq, 70, causal=True), -INF)
        torch.testing.assert_close(lse, scores.logsumexp(-1).float(), rtol=1e-6, atol=2e-6)
        assert lse.dtype == torch.float32 and out.shape == q.shape


@pytest.mark.parametrize("Tq", [2, 70])
def test_rows_that_see_nothing(isa, Tq):
    tensors = make(1, 2, 2, Tq, 70, 16)
    mask = torch.rand(1, 2, Tq, 70) < 0.5
    mask[:, :, 0] = False
    mask[:, 1] = False
    for hidden in (mask, torch.where(mask, 0.0, -INF)):
        grads = with_gradients(attention, tensors, torch.ones(1, 2, Tq, 16), mask=hidden)
        assert all(g.isfinite().all() for g in grads)
        assert (grads[0][:, :, 0] == 0).all() and (grads[0][:, 1] == 0).all()
        assert (grads[1][:, :, 0] == 0).all() and (grads[1][:, 1] == 0).all()
        assert (grads[2][:, 1] == 0).all() and (grads[3][:, 1] == 0).all()
        lse = torch.ops.llmfast.attention_forward(*tensors, hidden, None, None, 0.25, 0.0)[1]
        assert (lse[:, :, 0] == -INF).all() and (lse[:, 1] == -INF).all() and lse[:, 0, 1:].isfinite().all()
        check(tensors, mask=hidden)
    check(make(1, 2, 2, Tq, 1, 16), causal=True)  # all but the last query stand before the first key


def test_rows_masked_with_the_lowest_number(isa):
    """Hugging Face hides by adding finfo.min. Rows with nothing else average the values, as in PyTorch."""
    for Tq in (2, 40):
        q, k, v = make(1, 1, 1, Tq, 70, 16)
        mask = torch.zeros(Tq, 70)
        mask[:, 30:] = torch.finfo(torch.float32).min
        mask[0] = torch.finfo(torch.float32).min
        out, *grads = with_gradients(attention, (q, k, v), torch.ones(1, 1, Tq, 16), mask=mask)
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, mask), rtol=1e-5, atol=1e-5)
        assert all(g.isfinite().all() for g in grads) and (grads[0][0, 0, 0] == 0).all()
        check((q[:, :, 1:], k, v), mask=mask[1:])


@pytest.mark.parametrize("bad", [math.nan, INF], ids=str)
@pytest.mark.parametrize("Tq", [1, 4, 90])
def test_hidden_keys_and_values_do_not_leak(isa, Tq, bad):
    Tk, grad = 90, torch.randn(1, 4, Tq, 16)
    visible_to_some = torch.ones(Tq, Tk, dtype=torch.bool)
    visible_to_some[: max(1, Tq // 2), 40:60] = False  # the other queries do see the bad ones
    nobody = torch.ones(Tk, dtype=torch.bool)
    nobody[::7] = False
    cases = [
        ({"mask": nobody}, ~nobody),
        ({"mask": torch.where(nobody, 0.0, -INF)}, ~nobody),
        ({"mask": visible_to_some}, torch.arange(Tk).clamp(40, 59) == torch.arange(Tk)),
        ({"causal": True}, torch.arange(Tk) == Tk - 1),
        ({"window": 20}, torch.arange(Tk) == Tk - 21),
    ]
    for options, spoiled in cases:
        q, k, v = make(1, 4, 2, Tq, Tk, 16)
        clean = with_gradients(attention, (q, k, v), grad, **options)
        allowed = options.get("mask", torch.ones(1, dtype=torch.bool))
        allowed = allowed if allowed.dtype == torch.bool else allowed == 0
        sees = reference.visible(Tq, Tk, causal="causal" in options, window=options.get("window")) & allowed
        unhurt = ~(sees & spoiled).any(-1)  # queries that see nothing bad
        for which in (1, 2):
            tensors = [q, k.clone(), v.clone()]
            tensors[which][:, :, spoiled] = bad
            dirty = with_gradients(attention, tensors, grad, **options)
            for name, a, b in zip(("out", "grad_q"), clean, dirty):
                assert torch.equal(a[:, :, unhurt], b[:, :, unhurt]), (name, options)
                assert not b[:, :, ~unhurt].isfinite().all() or unhurt.all(), (name, options)
            if unhurt.all():
                assert torch.equal(clean[2], dirty[2]) and torch.equal(clean[3], dirty[3])


def torch_varlen_attention(q, k, v, q_bounds, k_bounds, **options):
    """The peer of packed sequences: `torch_attention` one by one."""
    spans = zip(q_bounds, q_bounds[1:], k_bounds, k_bounds[1:])
    heads_first = ([t.transpose(0, 1)[None] for t in (q[a:b], k[c:d], v[c:d])] for a, b, c, d in spans)
    return torch.cat([torch_attention(*tensors, **options)[0].transpose(0, 1) for tensors in heads_first])


def packed_bounds(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


@pytest.mark.parametrize(
    ("q_lengths", "k_lengths"),
    [([5, 0, 70, 1], [5, 0, 70, 1]), ([1, 1, 1], [300, 0, 17]), ([3, 40, 0, 2], [90, 20, 4, 2])],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_varlen(isa, q_lengths, k_lengths, dtype):
    bounds = packed_bounds(q_lengths), packed_bounds(k_lengths, torch.int64)
    q = torch.randn(sum(q_lengths), 4, 24).to(dtype)
    k, v = torch.randn(2, sum(k_lengths), 2, 24).to(dtype)
    grad = torch.randn(q.shape).to(dtype)
    for options in ({}, {"causal": True}, {"window": (20, 1), "softcap": 4.0, "scale": 0.3}):
        ours, theirs, exact = (
            with_gradients(lambda *a, f=f: f(*a, *bounds, **options), tensors, grad)  # noqa: B023
            for f, tensors in (
                (varlen_attention, (q, k, v)),
                (torch_varlen_attention, (q, k, v)),
                (reference.varlen_attention, (q.double(), k.double(), v.double())),
            )
        )
        for name, a, b, c in zip(("out", "grad_q", "grad_k", "grad_v"), ours, theirs, exact):
            assert_as_accurate(a, b, c, what=f"{name} {options}")


def test_varlen_without_sequences(isa):
    q, bounds = torch.randn(0, 4, 24), torch.zeros(1, dtype=torch.int32)
    for result in with_gradients(lambda *a: varlen_attention(*a, bounds, bounds), (q, q, q), q):
        assert result.shape == q.shape


def test_varlen_equals_dense(isa):
    q, k, v = make(3, 4, 2, 50, 50, 16)
    bounds = packed_bounds([50] * 3)
    packed = varlen_attention(*(t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)), bounds, bounds, causal=True)
    assert torch.equal(packed.view(3, 50, 4, 16).transpose(1, 2), attention(q, k, v, causal=True))


def test_decode_from_a_cache(isa):
    """Keys and values are views into larger caches, in both usual layouts; long ones are split among threads."""
    B, Hq, Hkv, D, T = 2, 8, 2, 32, 1300
    q = torch.randn(B, Hq, 1, D)
    by_head = torch.randn(2, B, Hkv, 2048, D)[:, :, :, :T]
    by_token = torch.randn(2, B, 2048, Hkv, D)[:, :, :T].transpose(2, 3)
    for k, v in (by_head, by_token):
        exact = reference.attention(q.double(), k.double(), v.double())
        assert_as_accurate(attention(q, k, v), torch_attention(q, k, v), exact)
        assert_as_accurate(attention(q, k, v, causal=True, window=700), torch_attention(q, k, v, window=700),
                           reference.attention(q.double(), k.double(), v.double(), window=700))  # fmt: skip


def test_layout_follows_the_inputs(isa):
    B, H, T, D = 2, 4, 20, 16
    fused = torch.randn(B, T, 3 * H * D, requires_grad=True)
    q, k, v = (t.view(B, T, H, D).transpose(1, 2) for t in fused.split(H * D, dim=-1))
    out = attention(q, k, v, causal=True)
    assert out.transpose(1, 2).is_contiguous() and out.transpose(1, 2).flatten(2)._base is not None
    out.sum().backward()  # a gradient of strides 0
    twin = fused.detach().double().requires_grad_()
    q, k, v = (t.view(B, T, H, D).transpose(1, 2) for t in twin.split(H * D, dim=-1))
    reference.attention(q, k, v, causal=True).sum().backward()
    torch.testing.assert_close(fused.grad, twin.grad.float(), rtol=1e-5, atol=1e-5)

    q, k, v = (t.requires_grad_() for t in make(B, H, H, T, T, D))
    out = attention(q, k, v)
    assert out.is_contiguous()
    grads = torch.ops.llmfast.attention_backward(
        out,
        q,
        k.transpose(1, 2).contiguous().transpose(1, 2),
        v,
        out,
        out[..., 0].contiguous(),
        None,
        None,
        None,
        1.0,
        0.0,
    )
    assert grads[0].is_contiguous() and grads[1].transpose(1, 2).is_contiguous()


def test_broadcast_inputs(isa):
    q, k, v = torch.randn(1, 2, 40, 16), torch.randn(2, 1, 50, 16), torch.randn(1, 1, 50, 16)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    twins = [t.detach().double().requires_grad_() for t in leaves]
    for function, (a, b, c) in ((attention, leaves), (reference.attention, twins)):
        function(a.expand(2, 4, 40, 16) if a.shape[1] == 4 else a.expand(2, 2, 40, 16), b.expand(2, 2, 50, 16),
                 c.expand(2, 2, 50, 16), causal=True).square().sum().backward()  # fmt: skip
    for ours, truth in zip(leaves, twins):
        torch.testing.assert_close(ours.grad, truth.grad.float(), rtol=1e-5, atol=1e-5)


def test_a_strided_head_dim_is_copied_and_counted():
    q, k, v = make(1, 2, 2, 20, 20, 16)
    before = sum(backend.fallbacks().values())
    out = attention(q, k.mT.contiguous().mT, v)
    assert sum(backend.fallbacks().values()) == before + 1
    assert torch.equal(out, attention(q, k, v))


@pytest.mark.parametrize(
    "shape", [(0, 2, 2, 4, 4, 8), (2, 2, 1, 0, 5, 8), (2, 2, 1, 5, 0, 8), (1, 4, 1, 40, 0, 8)], ids=str
)
def test_empty(isa, shape):
    tensors = make(*shape)
    results = with_gradients(attention, tensors, torch.ones(*tensors[0].shape), causal=True)
    for result, like in zip(results, (tensors[0], *tensors)):
        assert result.shape == like.shape and (result == 0).all()


def test_used_twice_in_one_graph():
    q, k, v = (t.requires_grad_() for t in make(1, 2, 2, 20, 20, 16))
    twins = [t.detach().double().requires_grad_() for t in (q, k, v)]
    attention(attention(q, k, v, causal=True), k, v).square().sum().backward()
    reference.attention(reference.attention(*twins, causal=True), *twins[1:]).square().sum().backward()
    for ours, truth in zip((q, k, v), twins):
        torch.testing.assert_close(ours.grad, truth.grad.float(), rtol=1e-4, atol=1e-5)


def test_no_grad_path_gives_the_same():
    q, k, v = (t.requires_grad_() for t in make(1, 2, 2, 20, 20, 16))
    out = attention(q, k, v)
    with torch.no_grad():
        assert torch.equal(out, attention(q, k, v)) and not attention(q, k, v).requires_grad


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_packed_projection(isa, kv_heads):
    """Output and the one gradient of queries, keys and values that are parts of one tensor are those of its parts."""
    B, T, H, D = 2, 70, 4, 16
    whole = torch.randn(B, T, H + 2 * kv_heads, D)
    grad = torch.randn(B, H, T, D)
    for options in ({"causal": True}, {"causal": True, "window": 9}, {}):
        results = []
        for packed in (True, False):
            leaf = whole.clone().requires_grad_()
            if packed:
                out = packed_attention(leaf, H, **options)
            else:
                parts = leaf.split((H, kv_heads, kv_heads), dim=2)
                out = attention(*(t.transpose(1, 2) for t in parts), **options)
            out.backward(grad)
            results.append((out.detach(), leaf.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results)), options
        assert results[0][1].is_contiguous()
    with torch.no_grad():
        assert torch.equal(packed_attention(whole, H), results[0][0])
    leaf = whole.clone().requires_grad_()
    packed_attention(leaf, H).sum().backward()  # a gradient of strides 0
    twin = whole.clone().requires_grad_()
    packed_attention(twin, H).backward(torch.ones(B, H, T, D))
    assert torch.equal(leaf.grad, twin.grad)
    leaf.grad = None
    packed_attention(leaf, H).backward(torch.imag(torch.zeros(B, H, T, D, dtype=torch.cfloat).sub(1j).conj()))
    assert torch.equal(leaf.grad, twin.grad)  # of the ones that a lazily negated tensor stands for
    weight = grad.clone().requires_grad_()
    (first,) = torch.autograd.grad(packed_attention(leaf, H), leaf, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_only_some_inputs_need_gradients():
    q, k, v = make(1, 2, 2, 20, 20, 16)
    attention(q, k, v.requires_grad_()).sum().backward()
    assert q.grad is None and k.grad is None and v.grad is not None


def test_autocast_casts_like_torch():
    q, k, v = make(1, 2, 2, 20, 20, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, mask=torch.zeros(20))
        assert out.dtype == scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
    assert torch.equal(out, attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask=torch.zeros(20)))


def test_compile():
    q, k, v = (t.requires_grad_() for t in make(1, 4, 2, 20, 20, 16))
    bounds = packed_bounds([7, 13])

    def step(q, k, v, bounds):
        out = attention(q, k, v, causal=True, window=9) + scaled_dot_product_attention(q, k, v, enable_gqa=True)
        packed = varlen_attention(*(t[0].transpose(0, 1) for t in (out, k, v)), bounds, bounds)
        return packed.square().sum()

    step(q, k, v, bounds).backward()
    eager = [t.grad.clone() for t in (q, k, v)]
    for t in (q, k, v):
        t.grad = None
    torch.compile(step, fullgraph=True)(q, k, v, bounds).backward()
    for expected, t in zip(eager, (q, k, v)):
        torch.testing.assert_close(t.grad, expected, rtol=1e-4, atol=1e-5)


def test_opcheck():
    q, k, v = (t.requires_grad_() for t in make(1, 4, 2, 9, 12, 8))
    ops = torch.ops.llmfast
    options = (5, 0, 0.3, 0.0)
    torch.library.opcheck(ops.attention_forward.default, (q, k, v, None, *options))
    mask = torch.rand(9, 12) < 0.9
    torch.library.opcheck(
        ops.attention_forward.default, (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, mask, *options)
    )
    out, lse = (t.detach() for t in ops.attention_forward(q, k, v, mask, *options))
    plain = [t.detach() for t in (out, q, k, v, out)]
    torch.library.opcheck(ops.attention_backward.default, (*plain, lse, mask, *options))
    q, k, v = (t.detach()[0].transpose(0, 1).contiguous().requires_grad_() for t in (q, k, v))
    bounds = packed_bounds([4, 5]), packed_bounds([3, 9])
    torch.library.opcheck(ops.varlen_attention_forward.default, (q, k, v, *bounds, *options))
    out, lse = (t.detach() for t in ops.varlen_attention_forward(q, k, v, *bounds, *options))
    plain = [t.detach() for t in (out, q, k, v, out)]
    torch.library.opcheck(ops.varlen_attention_backward.default, (*plain, lse, *bounds, *options))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_any_number_of_threads(threads, count):
    threads(count)
    for shape in ((1, 2, 1, 200, 260, 32), (2, 6, 3, 90, 90, 32), (1, 4, 1, 1, 2000, 64), (2, 3, 3, 2, 900, 24)):
        tensors = make(*shape)
        check(tensors, causal=True)
        grad = torch.randn(tensors[0].shape)
        runs = [with_gradients(attention, tensors, grad, causal=True) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs))
    bounds = packed_bounds([500, 3, 0, 40])
    q, k, v = torch.randn(3, 543, 2, 32)
    grad = torch.randn(q.shape)
    ours, exact = (
        with_gradients(lambda *a, f=f: f(*a, bounds, bounds, causal=True), tensors, grad)
        for f, tensors in (
            (varlen_attention, (q, k, v)),
            (reference.varlen_attention, (q.double(), k.double(), v.double())),
        )
    )
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-5)


def test_memory_does_not_grow_with_the_square_of_the_length():
    tensors = make(1, 1, 1, 4096, 4096, 8)
    before = backend.native().workspace_bytes()
    with_gradients(attention, tensors, torch.ones(1, 1, 4096, 8), causal=True)
    assert backend.native().workspace_bytes() - before < 4096 * 4096 * 4 / 8


SDPA_CASES = {
    "causal, fewer queries": (20, 33, {"is_causal": True}),
    "causal, fewer keys": (33, 20, {"is_causal": True}),
    "causal, one query": (1, 20, {"is_causal": True}),
    "boolean mask": (20, 33, {"attn_mask": torch.ones(20, 33, dtype=torch.bool).tril(3)}),
    "additive mask": (20, 33, {"attn_mask": torch.linspace(-3, 3, 33)[None], "scale": 0.2}),
    "grouped heads": (20, 20, {"enable_gqa": True, "is_causal": True}),
}


@pytest.mark.parametrize("case", SDPA_CASES)
def test_sdpa_twin(isa, case):
    Tq, Tk, options = SDPA_CASES[case]
    tensors = make(2, 4, 2 if "enable_gqa" in options else 4, Tq, Tk, 16)
    grad = torch.randn(2, 4, Tq, 16)
    ours = with_gradients(scaled_dot_product_attention, tensors, grad, **options)
    theirs = with_gradients(F.scaled_dot_product_attention, tensors, grad, **options)
    doubled = dict(options)
    if "attn_mask" in options and options["attn_mask"].dtype != torch.bool:
        doubled["attn_mask"] = options["attn_mask"].double()
    exact = with_gradients(F.scaled_dot_product_attention, [t.double() for t in tensors], grad, **doubled)
    for a, b, c in zip(ours, theirs, exact):
        assert_as_accurate(a, b, c)


def test_sdpa_twin_takes_three_dimensions_and_falls_back():
    q, k, v = torch.randn(3, 4, 20, 16)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    before = dict(backend.fallbacks())
    torch.testing.assert_close(
        scaled_dot_product_attention(q.double(), k.double(), v.double()),
        F.scaled_dot_product_attention(q.double(), k.double(), v.double()),
    )
    assert scaled_dot_product_attention(q, k, v, dropout_p=0.5).shape == q.shape
    new = {name: n - before.get(name, 0) for name, n in backend.fallbacks().items()}
    assert new["scaled_dot_product_attention: dtype torch.float64"] == 1
    assert new["scaled_dot_product_attention: dropout"] == 1
    with pytest.raises(RuntimeError):
        scaled_dot_product_attention(q, k, v, torch.ones(20, 20, dtype=torch.bool), is_causal=True)


def test_a_mask_that_learns_runs_in_torch():
    tensors = make(1, 2, 2, 20, 20, 16)
    mask = torch.randn(20, 20, requires_grad=True)
    before = backend.fallbacks().get("attention: a mask that requires a gradient", 0)
    attention(*tensors, mask=mask, causal=True).sum().backward()
    assert backend.fallbacks()["attention: a mask that requires a gradient"] == before + 1
    assert mask.grad.isfinite().all() and mask.grad.abs().sum() > 0
    with torch.no_grad():
        attention(*tensors, mask=mask)
    assert backend.fallbacks()["attention: a mask that requires a gradient"] == before + 1


TABLES = ("attention", "attention_decode", "attention_backward", "attention_decode_backward")


@pytest.mark.parametrize(
    ("Tq", "D", "dtype", "forward", "backward"),
    [
        (2, 8, torch.bfloat16, "attention_decode", "attention_decode_backward"),
        (2, 64, torch.float32, "attention_decode", "attention_decode_backward"),
        (2, 64, torch.bfloat16, "attention_decode", "attention_backward"),  # where there are products of bf16
        (5, 8, torch.bfloat16, "attention", "attention_backward"),
        (5, 64, torch.bfloat16, "attention", "attention_backward"),
    ],
)
def test_rows_are_counted(isa, Tq, D, dtype, forward, backward):
    def calls():
        return {(table, row["isa"]): row["calls"] for table in TABLES for row in backend.implementations(table)}

    before = calls()
    tensors = [t.requires_grad_() for t in make(1, 4, 1, Tq, 20, D, dtype=dtype)]
    attention(*tensors).sum().backward()
    changed = {name: n - before[name] for name, n in calls().items() if n != before[name]}
    vector = min(isa, "avx512", key=backend.ISAS.index)
    of_blocks = isa if dtype == torch.bfloat16 and D >= 16 else vector
    if of_blocks == vector and Tq == 2:
        backward = "attention_decode_backward"
    expected = {(forward, of_blocks if forward == "attention" else vector): 1}
    expected[backward, of_blocks if backward == "attention_backward" else vector] = 1
    assert changed == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows", range(1, 9))
def test_few_rows(isa, rows, dtype):
    """Blocks of 128 keys, and keys that threads share."""
    for Tk, options in (
        (1, {}),
        (7, {"causal": True}),
        (129, {"softcap": 2.0}),
        (700, {"window": (260, 3), "causal": True}),
    ):
        check(make(2, rows, 1, 1, Tk, 20, 36, dtype=dtype), **options)
        check(make(1, 2, 2, rows, Tk, 33, 17, dtype=dtype), **options)


@pytest.mark.parametrize("far", [2**62, 2**63 - 1, 2**70])
def test_windows_wider_than_any_sequence(far):
    q, k, v = make(2, 4, 2, 7, 7, 8)
    for causal, window in ((True, far), (True, (far, 0)), (False, (far, far)), (False, (3, far))):
        near = 7 if window == far else tuple(min(w, 7) for w in window)
        expected = attention(q, k, v, causal=causal, window=near)
        torch.testing.assert_close(attention(q, k, v, causal=causal, window=window), expected, rtol=0, atol=0)


def test_errors_name_the_argument():
    q, k, v = make(2, 4, 2, 5, 7, 8)
    bounds = packed_bounds([2, 3])
    packed = torch.randn(5, 4, 8)

    def raises(kind, message, function, *args, **options):
        with pytest.raises(kind, match=message):
            function(*args, **options)

    raises(
        ValueError, r"k: got shape \(2, 2, 7, 8\), expected \(2, Hkv, Tk, 9\)", attention, torch.randn(2, 4, 5, 9), k, v
    )
    raises(ValueError, r"v: got shape \(2, 2, 6, 8\), expected \(2, 2, 7, Dv\)", attention, q, k, v[:, :, 1:])
    raises(ValueError, r"q: got 4 heads, expected a multiple of k's 3 heads", attention, q, k[:, :1].expand(2, 3, 7, 8),
           v[:, :1].expand(2, 3, 7, 8))  # fmt: skip
    raises(ValueError, r"q: got shape \(4, 5, 8\), expected 4 dimensions \[B, H, T, D\]", attention, q[0], k, v)
    raises(TypeError, r"k: got dtype torch.bfloat16, expected torch.float32 as q has", attention, q, k.bfloat16(), v)
    raises(TypeError, r"q: got dtype torch.float64", attention, q.double(), k, v)
    raises(TypeError, r"v: got list", attention, q, k, [1.0])
    raises(ValueError, r"mask: got shape \(5, 6\), expected one that broadcasts to \(2, 4, 5, 7\)", attention, q, k, v,
           mask=torch.ones(5, 6))  # fmt: skip
    raises(TypeError, r"mask: got dtype torch.int64", attention, q, k, v, mask=torch.ones(5, 7).long())
    raises(ValueError, r"window: got 0", attention, q, k, v, window=0)
    raises(ValueError, r"window: got \(-2, 0\)", attention, q, k, v, window=(-2, 0))
    raises(TypeError, r"window: got 'left'", attention, q, k, v, window="left")
    for softcap in (-1.0, 1e-50, float("inf"), float("nan")):
        raises(ValueError, f"softcap: got {softcap}", attention, q, k, v, softcap=softcap)
    raises(
        TypeError,
        r"cu_seqlens_q: got dtype torch.float32",
        varlen_attention,
        packed,
        packed,
        packed,
        bounds.float(),
        bounds,
    )
    raises(
        ValueError,
        r"cu_seqlens_k: got shape \(2,\), expected \(3,\)",
        varlen_attention,
        packed,
        packed,
        packed,
        bounds,
        bounds[1:],
    )
    for wrong in ([0, 2, 4], [1, 2, 5], [0, 6, 5]):
        raises(ValueError, r"cu_seqlens_k: expected token offsets that start at 0, never decrease and end at 5",
               varlen_attention, packed, packed, packed, bounds, torch.tensor(wrong))  # fmt: skip


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_random_combinations(data):
    draw = data.draw
    group, Hkv = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    Tq, Tk = draw(st.integers(0, 140)), draw(st.integers(0, 140))
    torch.manual_seed(draw(st.integers(0, 1000)))
    tensors = make(
        draw(st.integers(1, 2)), Hkv * group, Hkv, Tq, Tk, draw(st.integers(1, 70)), draw(st.integers(1, 70))
    )
    options = {"causal": draw(st.booleans()), "softcap": draw(st.sampled_from([None, 3.0]))}
    options["window"] = draw(
        st.one_of(st.none(), st.integers(1, 150), st.tuples(st.integers(-1, 99), st.integers(-1, 99)))
    )
    match draw(st.sampled_from(["none", "bool", "float"])):
        case "bool":
            options["mask"] = torch.rand(Tq, Tk) < draw(st.floats(0, 1))
        case "float":
            options["mask"] = torch.randn(Tk)
    check(tensors, **options)
