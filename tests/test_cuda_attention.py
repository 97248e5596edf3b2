"""attention, varlen_attention and the SDPA twin on CUDA kernels, emulated or real, against float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_as_accurate
from test_attention import make, packed_bounds, torch_attention, torch_varlen_attention, with_gradients

from llmfast import backend, reference
from llmfast.ops import attention, scaled_dot_product_attention, varlen_attention
from llmfast.ops.attention import _attention

pytest_plugins = "cuda_emulated"

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
INF = math.inf

# (B, Hq, Hkv, Tq, Tk, D, Dv), options. Tiles: 128 or 64 queries, 64, 32 or 16 keys; heads of 64, 128 and 256
CASES = {
    "one token": ((1, 1, 1, 1, 1, 1, 1), {}),
    "plain": ((2, 1, 1, 70, 70, 64, 64), {}),
    "causal, grouped": ((1, 4, 2, 131, 131, 64, 64), {"causal": True}),
    "fewer queries": ((1, 1, 1, 33, 140, 32, 32), {"causal": True}),
    "fewer keys": ((1, 2, 2, 90, 50, 32, 32), {"causal": True}),
    "odd dims": ((1, 3, 1, 19, 65, 7, 13), {"causal": True}),
    "wide head": ((1, 1, 1, 70, 90, 200, 256), {"causal": True}),
    "middle head": ((1, 1, 1, 140, 70, 96, 128), {"causal": True}),
    "int window": ((1, 1, 1, 200, 200, 16, 16), {"window": 9}),
    "window both sides": ((1, 2, 1, 100, 120, 16, 16), {"window": (70, 3)}),
    "softcap": ((1, 2, 2, 40, 70, 16, 16), {"softcap": 2.0, "causal": True, "scale": 1.0}),
    "negative scale": ((1, 1, 1, 20, 30, 16, 16), {"scale": -0.5}),
    "decode": ((2, 8, 2, 1, 300, 40, 24), {"causal": True}),
    "decode, aligned": ((2, 8, 2, 1, 300, 64, 64), {"causal": True}),
    "decode, aligned, wide": ((1, 16, 1, 1, 70, 256, 200), {}),
    "decode, aligned, split": ((1, 8, 1, 1, 1500, 64, 48), {"causal": True}),
    "decode, narrow values, split": ((1, 2, 1, 1, 1300, 104, 40), {}),
    "decode, all keys": ((2, 4, 2, 5, 700, 104, 128), {}),
    "decode, split": ((1, 4, 2, 3, 1100, 72, 72), {"causal": True}),
    "decode, window": ((1, 6, 2, 2, 700, 33, 33), {"window": 550}),
    "decode, wide, softcap": ((1, 2, 1, 3, 70, 256, 256), {"softcap": 3.0}),
}


def placed(device, tensors, options):
    moved = {name: o.to(device) if isinstance(o, torch.Tensor) else o for name, o in options.items()}
    return [t.to(device) for t in tensors], moved


def check(device, tensors, **options):
    """Output and gradients under the error rule; the peer and the truth are computed on the CPU.

    Tensors that are on the device keep their layout; those that come there lose strides with gaps."""
    q, _, v = tensors
    grad = torch.randn(*q.shape[:-1], v.shape[-1]).to(q.dtype)
    ours_in, ours_options = placed(device, tensors, options)
    ours = [t.cpu() for t in with_gradients(attention, ours_in, grad.to(device), **ours_options)]
    tensors = [t.cpu() for t in tensors]
    theirs = with_gradients(torch_attention, tensors, grad, **options)
    exact = with_gradients(reference.attention, [t.double() for t in tensors], grad, **options)
    for name, mine, peer, truth in zip(("out", "grad_q", "grad_k", "grad_v"), ours, theirs, exact):
        assert mine.dtype == q.dtype
        assert_as_accurate(mine, peer, truth, what=name)
    return ours


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(cuda, case, dtype):
    shape, options = CASES[case]
    check(cuda, make(*shape, dtype=dtype), **options)


def test_float16(cuda):
    check(cuda, make(1, 2, 1, 70, 90, 40, dtype=F16), causal=True)
    check(cuda, make(1, 2, 1, 2, 90, 40, dtype=F16), causal=True)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("Tq", [2, 50])
def test_masks(cuda, Tq, dtype):
    B, Hq, Tk = 2, 2, 70
    tensors = make(B, Hq, 1, Tq, Tk, 16, dtype=dtype)
    check(cuda, tensors, mask=torch.rand(B, 1, 1, Tk) < 0.7)
    check(cuda, tensors, mask=torch.randn(1, Hq, Tq, Tk).to(dtype), causal=True)
    check(cuda, tensors, mask=torch.where(torch.rand(Tk, Tq) < 0.3, -INF, torch.randn(Tk, Tq)).t())


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("Tq", [2, 40])
def test_rows_that_see_nothing(cuda, Tq, dtype):
    tensors = make(1, 2, 2, Tq, 40, 16, dtype=dtype)
    mask = torch.rand(1, 2, Tq, 40) < 0.5
    mask[:, :, 0] = False
    mask[:, 1] = False
    for hidden in (mask, torch.where(mask, 0.0, -INF)):
        out, grad_q, grad_k, grad_v = check(cuda, tensors, mask=hidden)
        assert (out[:, :, 0] == 0).all() and (grad_q[:, :, 0] == 0).all() and (grad_q[:, 1] == 0).all()
        assert (grad_k[:, 1] == 0).all() and (grad_v[:, 1] == 0).all()
    check(cuda, make(1, 2, 2, Tq, 1, 16, dtype=dtype), causal=True)  # all but the last query stand before the first key


@pytest.mark.parametrize("Tq", [2, 40])
def test_lse(cuda, Tq):
    q, k, v = (t.to(cuda) for t in make(1, 4, 2, Tq, 70, 16, dtype=BF16))
    lse = _attention(q, k, v, None, None, 0, 0.25, 0.0)[1].cpu()
    scores = 0.25 * q.cpu().double() @ k.cpu().double().repeat_interleave(2, 1).mT
    scores = scores.masked_fill(~reference.visible(Tq, 70, causal=True), -INF)
    torch.testing.assert_close(lse, scores.logsumexp(-1).float(), rtol=1e-5, atol=1e-5)


def test_rows_masked_with_the_lowest_number(cuda):
    """Hugging Face hides by adding finfo.min. Rows with nothing else average the values, as in PyTorch."""
    for Tq in (2, 40):
        q, k, v = make(1, 1, 1, Tq, 70, 16, dtype=BF16)
        mask = torch.zeros(Tq, 70)
        mask[:, 30:] = torch.finfo(torch.float32).min
        mask[0] = torch.finfo(torch.float32).min
        out, *grads = (
            t.cpu()
            for t in with_gradients(
                attention, [t.to(cuda) for t in (q, k, v)], torch.ones(1, 1, Tq, 16).to(cuda), mask=mask.to(cuda)
            )
        )
        expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask.double())
        torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)
        assert all(g.isfinite().all() for g in grads) and (grads[0][0, 0, 0] == 0).all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("bad", [math.nan, INF], ids=str)
@pytest.mark.parametrize("Tq", [4, 70])
def test_hidden_keys_and_values_do_not_leak(cuda, Tq, bad, dtype):
    Tk, grad = 70, torch.randn(1, 2, Tq, 16).to(dtype).to(cuda)
    some = torch.ones(Tq, Tk, dtype=torch.bool)
    some[: Tq // 2, 40:60] = False  # the other queries do see the bad ones
    cases = [
        ({"mask": some}, torch.arange(Tk).clamp(40, 59) == torch.arange(Tk)),
        ({"causal": True}, torch.arange(Tk) == Tk - 1),
        ({"window": 20}, torch.arange(Tk) == Tk - 21),
    ]
    for options, spoiled in cases:
        tensors, device_options = placed(cuda, make(1, 2, 1, Tq, Tk, 16, dtype=dtype), options)
        clean = with_gradients(attention, tensors, grad, **device_options)
        sees = reference.visible(Tq, Tk, causal="causal" in options, window=options.get("window"))
        unhurt = ~(sees & options.get("mask", torch.ones(1, dtype=torch.bool)) & spoiled).any(-1)
        for which in (1, 2):
            spoilt = [t.clone() for t in tensors]
            spoilt[which][:, :, spoiled] = bad
            dirty = with_gradients(attention, spoilt, grad, **device_options)
            for name, a, b in zip(("out", "grad_q"), clean, dirty):
                assert torch.equal(a[:, :, unhurt], b[:, :, unhurt]), (name, options)
                assert unhurt.all() or not b[:, :, ~unhurt].isfinite().all(), (name, options)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(
    ("q_lengths", "k_lengths"), [([5, 0, 70, 1], [5, 0, 70, 1]), ([3, 40, 0, 2], [90, 20, 4, 2])], ids=str
)
def test_varlen(cuda, q_lengths, k_lengths, dtype):
    bounds = packed_bounds(q_lengths), packed_bounds(k_lengths, torch.int64)
    q = torch.randn(sum(q_lengths), 2, 24).to(dtype)
    k, v = torch.randn(2, sum(k_lengths), 1, 24).to(dtype)
    grad = torch.randn(q.shape).to(dtype)
    for options in ({"causal": True}, {"window": (20, 1), "softcap": 4.0, "scale": 0.3}):
        ours, theirs, exact = (
            with_gradients(lambda *a, f=f, b=b: f(*a, *b, **options), tensors, g)  # noqa: B023
            for f, tensors, b, g in (
                (
                    varlen_attention,
                    [t.to(cuda) for t in (q, k, v)],
                    [b.to(cuda) for b in bounds],
                    grad.to(cuda),
                ),
                (torch_varlen_attention, (q, k, v), bounds, grad),
                (reference.varlen_attention, (q.double(), k.double(), v.double()), bounds, grad),
            )
        )
        for name, a, b, c in zip(("out", "grad_q", "grad_k", "grad_v"), ours, theirs, exact):
            assert_as_accurate(a.cpu(), b, c, what=f"{name} {options}")


def test_wrong_offsets_stay_inside(cuda):
    """They cannot be checked without reading them back; they must not lead outside the tensors."""
    q, k, v = torch.randn(3, 40, 2, 16).to(BF16).to(cuda)
    for bounds in ([0, 90, 20, 40], [-7, 5, 1 << 40, 3]):
        offsets = torch.tensor(bounds).to(cuda)
        with_gradients(lambda *a, o=offsets: varlen_attention(*a, o, o, causal=True), (q, k, v), q)


def test_layouts(cuda):
    """Heads side by side in one tensor; keys and values as views into a cache; rows that start at odd addresses."""
    B, H, T, D = 2, 2, 40, 16
    fused = torch.randn(B, T, 3 * H * D).to(BF16)
    heads = [t.view(B, T, H, D).transpose(1, 2) for t in fused.split(H * D, dim=-1)]
    out = check(cuda, heads, causal=True)[0]
    assert out.shape == (B, H, T, D)
    cache = torch.randn(2, B, H, 90, D).to(BF16)[:, :, :, :70]
    check(cuda, (torch.randn(B, 2 * H, 1, D).to(BF16), *cache))
    odd = [t[..., 1:] for t in torch.randn(3, B, H, T, D + 2).to(BF16)]
    check(cuda, [odd[0], odd[1], odd[2][..., :D]], causal=True)


@pytest.mark.parametrize(
    "shape", [(0, 2, 2, 4, 4, 8), (2, 2, 1, 0, 5, 8), (2, 2, 1, 5, 0, 8), (1, 4, 1, 40, 0, 8)], ids=str
)
def test_empty(cuda, shape):
    tensors = [t.to(cuda) for t in make(*shape, dtype=BF16)]
    results = with_gradients(attention, tensors, torch.ones(tensors[0].shape).to(cuda), causal=True)
    for result, like in zip(results, (tensors[0], *tensors)):
        assert result.shape == like.shape and (result == 0).all()


def test_sdpa_twin(cuda):
    for Tq, Tk in ((20, 33), (33, 20)):
        tensors = make(1, 2, 2, Tq, Tk, 16)
        grad = torch.randn(1, 2, Tq, 16)
        ours = with_gradients(
            scaled_dot_product_attention, [t.to(cuda) for t in tensors], grad.to(cuda), is_causal=True
        )
        exact = with_gradients(F.scaled_dot_product_attention, [t.double() for t in tensors], grad, is_causal=True)
        for a, b in zip(ours, exact):
            torch.testing.assert_close(a.cpu().double(), b, rtol=1e-4, atol=1e-5)


def test_order_of_threads_does_not_matter(cuda, thread_order):
    """And neither does the time: the same input gives the same bits."""
    for shape in ((1, 2, 1, 140, 70, 64), (1, 4, 1, 2, 600, 32), (1, 4, 1, 1, 1100, 64)):
        tensors = make(*shape, dtype=BF16)
        check(cuda, tensors, causal=True)
        grad = torch.randn(*tensors[0].shape).to(BF16).to(cuda)
        runs = [with_gradients(attention, [t.to(cuda) for t in tensors], grad, causal=True) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_a_second_kernel_only_where_the_keys_of_few_heads_are_many(cuda):
    if cuda != "cpu":
        pytest.skip("the emulation counts launches")
    module = backend.native_cuda()
    for Hkv, Tk, launches in ((1, 1100, 2), (1, 1000, 1), (80, 1100, 1)):
        q, k, v = (t.to(BF16) for t in (torch.randn(1, Hkv, T, 64) for T in (1, Tk, Tk)))
        module.reset_counters()
        attention(q, k, v)
        assert module.counters()["launches"] == launches, (Hkv, Tk)


def test_shared_memory_has_no_bank_conflicts_and_hidden_tiles_cost_nothing(cuda):
    if cuda != "cpu":
        pytest.skip("the emulation counts them")
    module, counts = backend.native_cuda(), {}
    tensors = make(1, 1, 1, 256, 256, 64, dtype=BF16)
    for name, options in (("full", {}), ("causal", {"causal": True}), ("window", {"window": 16})):
        module.reset_counters()
        with_gradients(attention, tensors, torch.ones(1, 1, 256, 64).to(BF16), **options)
        assert module.counters()["ldmatrix_conflicts"] == 0
        counts[name] = module.counters()["mma"]
    assert counts["causal"] == counts["full"] * 3 // 4  # 6 of 8 tiles of 128 x 64
    assert counts["window"] < counts["causal"]
