"""The Hopper attention kernels, emulated or real, against float64: forward."""

import math

import pytest
import torch
from conftest import assert_as_accurate
from test_attention import make, packed_bounds, torch_attention, torch_varlen_attention

from llmfast import backend, reference
from llmfast.ops import attention, varlen_attention
from llmfast.ops.attention import _attention

pytest_plugins = "cuda_emulated"

BF16, F16 = torch.bfloat16, torch.float16
INF = math.inf

# (B, Hq, Hkv, Tq, Tk, D, Dv), options. Tiles: 128 queries, two warpgroups of 64; heads of 64, 128 and 256
CASES = {
    "plain": ((1, 2, 1, 130, 130, 64, 64), {}),
    "causal, grouped": ((1, 4, 2, 257, 257, 64, 64), {"causal": True}),
    "fewer queries": ((1, 1, 1, 33, 280, 128, 128), {"causal": True}),
    "fewer keys": ((1, 2, 2, 150, 50, 32, 32), {"causal": True}),
    "value wider": ((1, 3, 1, 70, 65, 40, 72), {"causal": True}),
    "wide head": ((1, 1, 1, 70, 170, 200, 256), {"causal": True}),
    "middle head": ((2, 1, 1, 140, 270, 96, 128), {"causal": True}),
    "int window": ((1, 1, 1, 300, 300, 16, 16), {"window": 9}),
    "window both sides": ((1, 2, 1, 140, 400, 16, 16), {"window": (70, 3)}),
    "many keys": ((1, 3, 1, 580, 2048, 64, 64), {"causal": True}),  # three warpgroups of 64
    "softcap": ((1, 2, 2, 40, 150, 128, 128), {"softcap": 2.0, "causal": True, "scale": 1.0}),
    "negative scale": ((1, 1, 1, 40, 150, 16, 16), {"scale": -0.5}),
}


def calls() -> int:
    """How often the Hopper forward ran."""
    return next(row["calls"] for row in backend.native_cuda().implementations("attention") if row["isa"] == "sm90a")


def check(device, tensors, **options):
    before = calls()
    placed = {name: o.to(device) if isinstance(o, torch.Tensor) else o for name, o in options.items()}
    ours = attention(*(t.to(device) for t in tensors), **placed).cpu()
    assert calls() == before + 1
    exact = reference.attention(*(t.double() for t in tensors), **options)
    assert_as_accurate(ours, torch_attention(*tensors, **options), exact, what="out")
    return ours


@pytest.mark.parametrize("case", CASES)
def test_forward(hopper, case):
    shape, options = CASES[case]
    check(hopper, make(*shape, dtype=BF16), **options)


def test_float16(hopper):
    check(hopper, make(1, 2, 1, 140, 90, 40, dtype=F16), causal=True)


def test_lse(hopper):
    q, k, v = (t.to(hopper) for t in make(1, 4, 2, 140, 270, 16, dtype=BF16))
    lse = _attention(q, k, v, None, None, 0, 0.25, 0.0)[1].cpu()
    scores = 0.25 * q.cpu().double() @ k.cpu().double().repeat_interleave(2, 1).mT
    scores = scores.masked_fill(~reference.visible(140, 270, causal=True), -INF)
    torch.testing.assert_close(lse, scores.logsumexp(-1).float(), rtol=1e-5, atol=1e-5)


def test_masks(hopper):
    B, Hq, Tq, Tk = 2, 2, 140, 150
    tensors = make(B, Hq, 1, Tq, Tk, 16, dtype=BF16)
    check(hopper, tensors, mask=torch.rand(B, 1, 1, Tk) < 0.7)
    check(hopper, tensors, mask=torch.randn(1, Hq, Tq, Tk).to(BF16), causal=True)
    check(hopper, tensors, mask=torch.where(torch.rand(Tk, Tq) < 0.3, -INF, torch.randn(Tk, Tq)).t(), softcap=2.0)
    hidden = torch.rand(1, Hq, Tq, Tk) < 0.5
    hidden[:, :, 0] = False
    hidden[:, 1] = False
    out = check(hopper, tensors, mask=hidden)
    assert (out[:, :, 0] == 0).all() and (out[:, 1] == 0).all()
    check(hopper, make(1, 1, 1, 70, 170, 200, dtype=BF16), mask=torch.rand(70, 170) < 0.5)


@pytest.mark.parametrize("D", [64, 256])
def test_masks_of_keys(hopper, D):
    """Padding before and after, holes, a sequence without keys: the same for all queries."""
    B, Tk = 4, 520
    mask = torch.ones(B, 1, 1, Tk, dtype=torch.bool)
    mask[0, ..., 390:] = False
    mask[1, ..., :150] = False
    mask[2, ..., 200:210] = False
    mask[3] = False
    q, k, v = make(B, 2, 1, 70, Tk, D, dtype=BF16)
    clean = check(hopper, (q, k, v), mask=mask)
    assert (clean[3] == 0).all()
    check(hopper, (q, k, v), mask=mask, window=(200, 30))
    hidden = ~mask[:, :, 0, :, None]
    k, v = (torch.where(hidden, torch.tensor(math.nan, dtype=BF16), t) for t in (k, v))
    assert torch.equal(attention(*(t.to(hopper) for t in (q, k, v)), mask=mask.to(hopper)).cpu(), clean)


def test_masks_of_keys_differ_between_heads_and_skip_tiles(hopper):
    mask = torch.rand(1, 2, 1, 300) < 0.5
    mask[:, 0, :, 120:] = True
    mask[:, 1, :, 128:] = False
    tensors = make(1, 2, 2, 150, 300, 16, dtype=BF16)
    check(hopper, tensors, mask=mask, causal=True)
    if hopper == "cpu":
        module = backend.native_cuda()
        module.reset_counters()
        attention(*tensors, mask=mask[:, 1:])
        assert module.counters()["warpgroup_products"] == 2 * 2 * 2 * (4 + 8)  # heads, tiles, warpgroups; Q K^T, P V


@pytest.mark.parametrize(("Tk", "D"), [(160, 64), (176, 256), (150, 64)])
def test_boolean_masks_of_rows(hopper, Tk, D):
    """Read in pieces of 16 bytes where rows lie so; also views into longer ones."""
    Tq = 140
    tensors = make(1, 2, 1, Tq, Tk, D, dtype=BF16)
    mask = torch.rand(1, 2, Tq, 192) < 0.5
    mask[:, :, 5] = False
    check(hopper, tensors, mask=mask[..., :Tk])
    check(hopper, tensors, mask=(torch.rand(Tq, Tk) < 0.5), causal=True)


def test_tiles_that_a_boolean_mask_of_rows_hides(hopper):
    """Causal with padding, as a mask: products of the tiles that a warpgroup sees, and no others."""
    T = 384
    q, k, v = make(2, 2, 1, T, T, 64, dtype=BF16)
    mask = torch.ones(T, T, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[1, ..., 200:] = False
    clean = check(hopper, (q, k, v), mask=mask)
    bad = v.clone()
    bad[1, :, 200:] = math.nan
    assert torch.equal(attention(*(t.to(hopper) for t in (q, k, bad)), mask=mask.to(hopper)).cpu(), clean)
    if hopper == "cpu":
        module = backend.native_cuda()
        module.reset_counters()
        attention(q, k, v, mask=mask)
        tiles = 2 * (1 + 2 + 3) + 2 * (1 + 2 + 2)  # of two warpgroups
        assert module.counters()["warpgroup_products"] == 2 * tiles * (4 + 8)


def test_rows_masked_with_the_lowest_number(hopper):
    """Rows with nothing else average the values, as in PyTorch."""
    q, k, v = make(1, 1, 1, 140, 70, 16, dtype=BF16)
    mask = torch.zeros(140, 70)
    mask[:, 30:] = torch.finfo(torch.float32).min
    mask[0] = torch.finfo(torch.float32).min
    out = check(hopper, (q, k, v), mask=mask)
    torch.testing.assert_close(out[0, 0, 0].float(), v.float().mean((0, 1, 2)), rtol=2e-2, atol=2e-2)


def test_rows_that_see_nothing(hopper):
    out = check(hopper, make(1, 2, 2, 150, 20, 16, dtype=BF16), causal=True)
    assert (out[:, :, :130] == 0).all() and (out[:, :, 130:] != 0).any(-1).all()


@pytest.mark.parametrize("bad", [math.nan, INF], ids=str)
@pytest.mark.parametrize("D", [16, 136])
def test_hidden_keys_and_values_do_not_leak(hopper, D, bad):
    Tq, Tk = 150, 200
    some = torch.ones(Tq, Tk, dtype=torch.bool)
    some[: Tq // 2, 40:60] = False  # the other queries do see the bad ones
    for options, spoiled in (
        ({"mask": some}, torch.arange(Tk).clamp(40, 59) == torch.arange(Tk)),
        ({"causal": True}, torch.arange(Tk) == Tk - 9),
        ({"causal": True}, torch.arange(Tk) >= 100),
        ({"window": 20}, torch.arange(Tk) == 60),
    ):
        tensors = [t.to(hopper) for t in make(1, 2, 1, Tq, Tk, D, dtype=BF16)]
        device_options = {name: o.to(hopper) if name == "mask" else o for name, o in options.items()}
        clean = attention(*tensors, **device_options)
        sees = reference.visible(Tq, Tk, causal="causal" in options, window=options.get("window"))
        unhurt = ~(sees & options.get("mask", torch.ones(1, dtype=torch.bool)) & spoiled).any(-1)
        for which in (1, 2):
            spoilt = [t.clone() for t in tensors]
            spoilt[which][:, :, spoiled, 1::3] = bad
            dirty = attention(*spoilt, **device_options)
            assert torch.equal(clean[:, :, unhurt], dirty[:, :, unhurt]), options
            seen = dirty[:, :, ~unhurt]
            if which == 1:
                assert not seen.isfinite().any(-1).all(), options
            else:
                assert not seen[..., 1::3].isfinite().any() and seen[..., 0::3].isfinite().all(), options


@pytest.mark.parametrize(
    ("q_lengths", "k_lengths"), [([5, 0, 200, 1], [5, 0, 200, 1]), ([3, 140, 0, 2], [190, 20, 4, 2])], ids=str
)
def test_varlen(hopper, q_lengths, k_lengths):
    bounds = packed_bounds(q_lengths), packed_bounds(k_lengths, torch.int64)
    q = torch.randn(sum(q_lengths), 2, 24).to(BF16)
    k, v = torch.randn(2, sum(k_lengths), 1, 24).to(BF16)
    for options in ({"causal": True}, {"window": (20, 1), "softcap": 4.0, "scale": 0.3}):
        before = calls()
        ours = varlen_attention(*(t.to(hopper) for t in (q, k, v, *bounds)), **options).cpu()
        assert calls() == before + 1
        theirs = torch_varlen_attention(q, k, v, *bounds, **options)
        exact = reference.varlen_attention(q.double(), k.double(), v.double(), *bounds, **options)
        assert_as_accurate(ours, theirs, exact, what=f"out {options}")


def test_packed_neighbours_do_not_leak(hopper):
    q, k, v = (torch.randn(100, 2, 64).to(BF16) for _ in range(3))
    bounds = packed_bounds([60, 40])
    tensors = [t.to(hopper) for t in (q, k, v, bounds, bounds)]
    clean = varlen_attention(*tensors, causal=True)
    for t in tensors[1:3]:
        t[60:] = math.nan
    dirty = varlen_attention(*tensors, causal=True)
    assert torch.equal(clean[:60], dirty[:60]) and dirty[60:].isnan().all()


def test_wrong_offsets_stay_inside(hopper):
    q, k, v = torch.randn(3, 140, 2, 16).to(BF16).to(hopper)
    for bounds in ([0, 190, 20, 140], [-7, 5, 1 << 40, 3]):
        offsets = torch.tensor(bounds).to(hopper)
        varlen_attention(q, k, v, offsets, offsets, causal=True)


def test_layouts(hopper):
    """Heads side by side in one tensor; keys and values as views into a cache; broadcast heads."""
    B, H, T, D = 2, 2, 140, 16
    fused = torch.randn(B, T, 3 * H * D).to(BF16)
    heads = [t.view(B, T, H, D).transpose(1, 2) for t in fused.split(H * D, dim=-1)]
    assert check(hopper, heads, causal=True).shape == (B, H, T, D)
    cache = torch.randn(2, B, H, 190, D).to(BF16)[:, :, :, :170]
    check(hopper, (torch.randn(B, 2 * H, 40, D).to(BF16), *cache))
    q, k, v = torch.randn(3, B, 1, T, D).to(BF16)
    check(hopper, (q.expand(B, H, T, D), k.expand(B, H, T, D), v[:1].expand(B, H, T, D)))


def test_rows_that_the_copy_engine_cannot_address(hopper):
    """They run on the portable kernel."""
    before = calls()
    odd = [t[..., 1:].to(hopper) for t in torch.randn(3, 1, 2, 40, 18).to(BF16)]
    attention(*odd, causal=True)
    assert calls() == before


def test_order_of_threads_does_not_matter(hopper, thread_order):
    """And neither does the time: the same input gives the same bits."""
    tensors = make(2, 2, 1, 140, 270, 64, dtype=BF16)
    check(hopper, tensors, causal=True)
    runs = [attention(*(t.to(hopper) for t in tensors), window=40) for _ in range(2)]
    assert torch.equal(*runs)
    check(hopper, make(1, 1, 1, 140, 270, 256, dtype=BF16), causal=True)


def test_shared_memory_has_no_bank_conflicts_and_hidden_tiles_cost_nothing(hopper):
    if hopper != "cpu":
        pytest.skip("the emulation counts them")
    module, counts = backend.native_cuda(), {}
    tensors = make(1, 1, 1, 512, 512, 64, dtype=BF16)
    for name, options in (("full", {}), ("causal", {"causal": True}), ("window", {"window": 16})):
        module.reset_counters()
        attention(*tensors, **options)
        assert module.counters()["ldmatrix_conflicts"] == 0
        counts[name] = module.counters()["warpgroup_products"]
    assert counts["causal"] == counts["full"] * 10 // 16  # 10 of 16 tiles of 128 x 128
    assert counts["window"] == counts["full"] * 7 // 16
