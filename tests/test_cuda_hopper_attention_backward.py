"""The backward of attention on Hopper's kernels, emulated or real, against float64; the forward is whatever runs."""

import math

import pytest
import torch
from conftest import assert_as_accurate
from test_attention import make, packed_bounds, torch_varlen_attention, with_gradients
from test_cuda_attention import check, placed

from llmfast import backend, reference
from llmfast.ops import attention, varlen_attention

pytest_plugins = "cuda_emulated"

BF16, F16 = torch.bfloat16, torch.float16

# (B, Hq, Hkv, Tq, Tk, D, Dv), options. Tiles: 128 own rows, 64 or 128 of the other side; heads of 64 and 128.
CASES = {
    "one token": ((1, 1, 1, 1, 1, 8, 8), {}),
    "full": ((2, 1, 1, 130, 70, 64, 64), {}),
    "causal": ((1, 1, 1, 257, 257, 64, 64), {"causal": True}),
    "causal, wide": ((1, 1, 1, 257, 257, 128, 128), {"causal": True}),
    "grouped, padded dims": ((1, 4, 2, 131, 131, 72, 128), {"causal": True}),
    "fewer queries": ((1, 1, 1, 33, 300, 32, 40), {"causal": True}),
    "fewer keys": ((1, 2, 1, 290, 150, 64, 64), {"causal": True}),
    "many lead rows see nothing": ((1, 1, 1, 300, 20, 128, 128), {"causal": True}),
    "window": ((1, 1, 1, 300, 300, 64, 64), {"window": 70}),
    "window both sides": ((1, 2, 1, 200, 220, 128, 96), {"window": (70, 3)}),
    "softcap": ((1, 2, 2, 140, 170, 64, 64), {"softcap": 2.0, "causal": True, "scale": 1.0}),
    "softcap, wide": ((1, 1, 1, 70, 140, 128, 128), {"softcap": 2.0, "scale": -0.5}),
    "negative scale": ((1, 1, 1, 20, 30, 16, 16), {"scale": -0.5}),
}


# Of those, what the way in one pass runs, always here and with long sequences elsewhere.
ONE_PASS = ["full", "causal, wide", "grouped, padded dims", "fewer keys", "many lead rows see nothing", "window"]


@pytest.fixture
def set_one_pass_from(hopper):
    set_from = backend.native_cuda().set_attention_one_pass_from
    before = set_from(0)
    yield set_from
    set_from(before)


@pytest.fixture(params=["in turns", "in any order"])
def one_pass(request, hopper, set_one_pass_from):
    with backend.deterministic_sums(request.param == "in turns"):
        yield hopper


def calls() -> int:
    rows = backend.native_cuda().implementations("attention_backward")
    return next(row["calls"] for row in rows if row["isa"] == "sm90a")


@pytest.mark.parametrize("case", CASES)
def test_gradients(hopper, case):
    shape, options = CASES[case]
    before = calls()
    check(hopper, make(*shape, dtype=BF16), **options)
    assert calls() == before + 1


@pytest.mark.parametrize("case", ONE_PASS)
def test_one_pass(one_pass, case):
    """grad_q summed in memory; by blocks that take turns, to the same bits every time."""
    shape, options = CASES[case]
    tensors, before = make(*shape, dtype=BF16), calls()
    check(one_pass, tensors, **options)
    assert calls() == before + 1
    if not backend.deterministic():
        return
    grad = torch.randn(*tensors[0].shape[:-1], shape[-1]).to(BF16).to(one_pass)
    tensors, _ = placed(one_pass, tensors, {})
    runs = [with_gradients(attention, tensors, grad, **options) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_one_pass_float16(one_pass):
    check(one_pass, make(1, 2, 1, 70, 90, 40, dtype=F16), causal=True)
    check(one_pass, make(1, 2, 1, 70, 130, 128, dtype=F16), causal=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_one_pass_does_not_leak(one_pass, bad):
    """Hidden keys, and queries that see nothing, whatever they hold. Three tiles of keys add to a tile of queries: in any
    order their sums may differ in the last bit."""
    q, k, v = (t.to(one_pass) for t in make(1, 1, 1, 150, 140, 64, dtype=BF16))
    grad = torch.randn(1, 1, 150, 64).to(BF16).to(one_pass)
    clean = with_gradients(attention, (q, k, v), grad, causal=True)
    q[:, :, :10], grad[:, :, 5:10], k[:, :, 130], v[:, :, 130] = bad, bad, bad, bad
    dirty = with_gradients(attention, (q, k, v), grad, causal=True)
    assert (clean[1][:, :, :10] == 0).all() and (dirty[1][:, :, :10] == 0).all()
    if backend.deterministic():
        assert torch.equal(clean[1][:, :, :140], dirty[1][:, :, :140])
    torch.testing.assert_close(dirty[1][:, :, :140], clean[1][:, :, :140])
    assert not dirty[1][:, :, 140:].isfinite().all()


@pytest.mark.parametrize("any_order", [False, True])
def test_one_pass_is_for_long_sequences(hopper, any_order):
    def sums(B, Hq, Hkv, T, D, left=None, softcap=0.0):
        native = backend.native_cuda()
        return native.attention_backward_sums(B, Hq, Hkv, T, T, D, D, left, 0, softcap, 0, None, any_order)

    assert sums(2, 16, 16, 8192, 128) == 2 * 16 * 64 * (128 * 128 + 4) + 4
    assert sums(2, 16, 16, 8192, 72) == sums(2, 16, 16, 8192, 128)
    assert sums(8, 16, 16, 4096, 128) and sums(4, 16, 16, 4096, 64)
    assert sums(4, 32, 8, 8192, 128) and sums(1, 32, 32, 16384, 64)
    assert bool(sums(8, 16, 16, 2048, 128)) == bool(sums(8, 32, 8, 2048, 128)) == any_order
    assert not sums(16, 32, 4, 1024, 128)
    assert not any((sums(2, 16, 16, 8192, 128, left=255), sums(1, 1, 1, 8192, 128)))
    assert not any((sums(2, 16, 16, 8192, 256), sums(2, 16, 16, 8192, 128, softcap=30.0)))


def test_who_asks_for_the_same_bits_gets_them(hopper, set_one_pass_from, monkeypatch):
    """torch's switch and llmfast's; the emulation runs blocks one after another, so only the way tells."""
    monkeypatch.setattr(backend, "_deterministic", None)  # whatever LLMFAST_DETERMINISTIC says
    assert backend.deterministic() is False
    with backend.deterministic_sums():
        assert backend.deterministic() is True
        with backend.deterministic_sums(False):
            assert backend.deterministic() is False
        assert backend.deterministic() is True
    torch.use_deterministic_algorithms(True)
    try:
        assert backend.deterministic() is True
    finally:
        torch.use_deterministic_algorithms(False)
    if hopper != "cpu":
        return
    tensors = make(1, 1, 1, 260, 260, 128, dtype=BF16)
    grad = torch.randn(1, 1, 260, 128).to(BF16)
    stored = []
    for asked in (
        True,
        False,
    ):  # in turns the first block to come stores, in any order zeros are stored for it to add to
        with backend.deterministic_sums(asked):
            out = attention(*(t.requires_grad_() for t in tensors), causal=True)
            backend.native_cuda().reset_counters()
            out.backward(grad)
            stored.append(backend.native_cuda().counters()["bytes_stored"])
    assert stored[1] - stored[0] == 3 * 128 * 128 * 4


def test_float16(hopper):
    check(hopper, make(1, 2, 1, 70, 90, 40, dtype=F16), causal=True)
    check(hopper, make(1, 2, 1, 70, 90, 128, dtype=F16), causal=True)


@pytest.mark.parametrize(
    ("q_lengths", "k_lengths"),
    [([5, 0, 140, 1], [5, 0, 140, 1]), ([3, 70, 0, 2], [190, 20, 4, 2]), ([130, 7], [20, 9])],
    ids=str,
)
def test_packed(hopper, q_lengths, k_lengths):
    bounds = packed_bounds(q_lengths), packed_bounds(k_lengths, torch.int64)
    q = torch.randn(sum(q_lengths), 2, 64).to(BF16)
    k, v = torch.randn(2, sum(k_lengths), 1, 64).to(BF16)
    grad, before = torch.randn(q.shape).to(BF16), calls()
    for options in ({"causal": True}, {"window": (20, 1), "softcap": 4.0, "scale": 0.3}, {}):
        ours, theirs, exact = (
            with_gradients(lambda *a, f=f, b=b: f(*a, *b, **options), tensors, g)  # noqa: B023
            for f, tensors, b, g in (
                (varlen_attention, [t.to(hopper) for t in (q, k, v)], [b.to(hopper) for b in bounds], grad.to(hopper)),
                (torch_varlen_attention, (q, k, v), bounds, grad),
                (reference.varlen_attention, (q.double(), k.double(), v.double()), bounds, grad),
            )
        )
        for name, a, b, c in zip(("out", "grad_q", "grad_k", "grad_v"), ours, theirs, exact):
            assert_as_accurate(a.cpu(), b, c, what=f"{name} {options}")
    assert calls() == before + 3


def test_packed_neighbours_do_not_leak(hopper):
    """A tile of one sequence's end holds the next sequence's first rows: whatever is there must not matter."""
    bounds = packed_bounds([70, 60]).to(hopper)
    q, k, v, grad = (t.to(hopper) for t in torch.randn(4, 130, 1, 64).to(BF16))

    def run(*tensors):
        return with_gradients(lambda *a: varlen_attention(*a, bounds, bounds, causal=True), tensors[:3], tensors[3])

    clean = run(q, k, v, grad)
    for which in range(4):
        spoilt = [t.clone() for t in (q, k, v, grad)]
        spoilt[which][75] = math.nan
        dirty = run(*spoilt)
        assert all(torch.equal(a[:70], b[:70]) for a, b in zip(clean, dirty)), which


def test_wrong_offsets_stay_inside(hopper):
    q, k, v = torch.randn(3, 140, 2, 16).to(BF16).to(hopper)
    for bounds in ([0, 190, 20, 140], [-7, 5, 1 << 40, 3]):
        offsets = torch.tensor(bounds).to(hopper)
        with_gradients(lambda *a, o=offsets: varlen_attention(*a, o, o, causal=True), (q, k, v), q)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_hidden_keys_and_values_do_not_leak(hopper, bad):
    Tq = Tk = 140
    grad = torch.randn(1, 1, Tq, 64).to(BF16).to(hopper)
    for options, spoiled in ({"causal": True}, 130), ({"window": 20}, 50):
        tensors = [t.to(hopper) for t in make(1, 1, 1, Tq, Tk, 64, dtype=BF16)]
        clean = with_gradients(attention, tensors, grad, **options)
        sees = reference.visible(Tq, Tk, causal="causal" in options, window=options.get("window"))[:, spoiled]
        for which in (1, 2):
            spoilt = [t.clone() for t in tensors]
            spoilt[which][:, :, spoiled] = bad
            dirty = with_gradients(attention, spoilt, grad, **options)
            assert torch.equal(clean[1][:, :, ~sees], dirty[1][:, :, ~sees]), options
            assert not dirty[1][:, :, sees].isfinite().all()


def test_queries_that_see_nothing_pass_nothing(hopper):
    """Not even what their own row or gradient holds."""
    q, k, v = (t.to(hopper) for t in make(1, 1, 1, 150, 20, 64, dtype=BF16))
    grad = torch.randn(1, 1, 150, 64).to(BF16).to(hopper)
    clean = with_gradients(attention, (q, k, v), grad, causal=True)
    q[:, :, :130], grad[:, :, 100:130] = math.nan, math.inf  # the first to see a key is number 130
    dirty = with_gradients(attention, (q, k, v), grad, causal=True)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty))
    assert (clean[1][:, :, :130] == 0).all()


def lowered(mask: torch.Tensor, lowest: float = -math.inf, dtype=torch.float32) -> torch.Tensor:
    """A boolean mask as a floating one, with biases where it shows."""
    return torch.where(mask, torch.randn(mask.shape), torch.tensor(lowest)).to(dtype)


def padding(B: int, T: int, *lengths: int) -> torch.Tensor:
    return (torch.arange(T) < torch.tensor(lengths)[:, None]).view(B, 1, 1, T)


def masks(B, Hq, Tq, Tk) -> dict[str, torch.Tensor]:
    some = torch.rand(B, Hq, Tq, Tk) < 0.5
    some[:, :, 5] = False  # a row that sees nothing
    some[0, -1, :, :130] = False  # a tile of keys, and some
    some[0, 0, 128:256] = False  # a tile of queries
    return {
        "boolean": some,
        "heads alike": some[:, :1],
        "sequences alike": some[:1],
        "queries alike": some[:, :, 3:4],
        "keys alike": some[..., 4:5],
        "padding": padding(B, Tk, *([Tk - 150, 3] * B)[:B]),
        "causal and padding": torch.ones(Tq, Tk, dtype=torch.bool).tril() & padding(B, Tk, *([Tk - 40, 150] * B)[:B]),
        "transposed": (torch.rand(Tk, Tq) < 0.5).t(),
        "bfloat16": lowered(some, dtype=BF16),
        "float32": lowered(some[:, :1, :, :]),
        "bias of heads": torch.randn(1, Hq, Tq, Tk) * 3,
        "bias of keys": lowered(some[:, :1, 3:4], dtype=F16),
        "lowest number": lowered(some[:1, :1] | (torch.arange(Tk) == 7), torch.finfo(torch.float32).min),
    }


@pytest.mark.parametrize("name", masks(1, 1, 300, 300))
@pytest.mark.parametrize("D", [64, 128])
def test_masks(hopper, name, D):
    B, Hq, Hkv, Tq, Tk = 2, 2, 1, 261, 270
    mask, before = masks(B, Hq, Tq, Tk)[name].expand(B, Hq, Tq, Tk), calls()
    grads = check(hopper, make(B, Hq, Hkv, Tq, Tk, D, dtype=BF16), mask=mask)
    hidden = ~mask if mask.dtype == torch.bool else mask < -1e30
    assert (grads[1][hidden.all(-1)] == 0).all()
    of_keys = hidden.all(-2).all(1)[:, None]
    assert (grads[2][of_keys] == 0).all() and (grads[3][of_keys] == 0).all()
    assert calls() == before + 1


@pytest.mark.parametrize(
    "options", [{"causal": True}, {"window": (60, 20)}, {"scale": -0.4}], ids=lambda options: next(iter(options))
)
def test_masks_beside_bands_and_scales(hopper, options):
    tensors, before = make(1, 4, 2, 200, 290, 72, 96, dtype=F16), calls()
    some = torch.rand(1, 4, 200, 290) < 0.7
    some[..., :140] = False
    check(hopper, tensors, mask=some, **options)
    check(hopper, tensors, mask=lowered(some), **options)
    assert calls() == before + 2


def test_tiles_that_a_mask_hides_cost_nothing(hopper):
    """Causal with padding, and padding alone: products of the tiles with something to see, and no others."""
    T, D = 512, 64
    tensors = make(2, 2, 1, T, T, D, dtype=BF16)
    pads = padding(2, T, 512, 200)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    full = {
        "padding": (4 + 2) * 4,
        "causal": 10 + 7,
        "bias": 10 + 10,
        "nothing": 0,
    }  # tiles of 128 x 128 of two sequences
    given = {
        "padding": pads,
        "causal": causal & pads,
        "bias": torch.where(causal, 0.5, -math.inf),
        "nothing": torch.zeros(T, T, dtype=torch.bool),
    }
    for name, mask in given.items():
        check(hopper, tensors, mask=mask)
        if hopper != "cpu":
            continue
        module = backend.native_cuda()
        inputs = [t.detach().requires_grad_() for t in tensors]
        out = attention(*inputs, mask=mask)
        module.reset_counters()
        out.backward(torch.randn(out.shape).to(BF16))
        products = 2 * (2 * 4 * 4) + 2 * (4 + 4 + 8)  # of two warpgroups, in steps of 64 and 128; depths of 16
        assert module.counters()["warpgroup_products"] == 2 * full[name] * products, name  # two heads


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("D", [64, 128])
def test_what_a_mask_hides_does_not_leak(hopper, D, bad):
    """Keys that some queries do not see, queries that see no key, keys that no query sees, whatever they hold."""
    T = 270
    mask = torch.ones(1, 1, T, T, dtype=torch.bool)
    mask[..., :100, 40:60] = False
    mask[..., 130:140, :] = False
    mask[..., 200:] = False
    tensors = [t.to(hopper) for t in make(1, 2, 1, T, T, D, dtype=BF16)]
    grad = torch.randn(1, 2, T, D).to(BF16).to(hopper)
    for given in (mask.to(hopper), torch.where(mask, 0.25, -math.inf).to(hopper)):
        clean = with_gradients(attention, tensors, grad, mask=given)
        q, k, v = (t.clone() for t in tensors)
        spoilt_grad = grad.clone()
        q[:, :, 135], spoilt_grad[:, :, 131] = bad, bad
        k[:, :, 210], v[:, :, 220] = bad, bad
        dirty = with_gradients(attention, (q, k, v), spoilt_grad, mask=given)
        assert all(torch.equal(a, b) for a, b in zip(clean, dirty))
        for which in (1, 2):
            spoilt = [t.clone() for t in tensors]
            spoilt[which][:, :, 50] = bad
            dirty = with_gradients(attention, spoilt, grad, mask=given)
            assert torch.equal(clean[1][:, :, :100], dirty[1][:, :, :100])
            assert not dirty[1][:, :, 100:130].isfinite().all()


def test_masks_and_softcaps_together_run_elsewhere(hopper):
    before = calls()
    check(hopper, make(1, 1, 1, 70, 80, 64, dtype=BF16), mask=torch.rand(70, 80) < 0.5, softcap=2.0)
    assert calls() == before


def test_layouts(hopper):
    """Heads side by side in one tensor run here; rows that start at odd addresses elsewhere."""
    B, H, T, D = 2, 2, 140, 64
    before = calls()
    joined = torch.randn(B, T, 3 * H * D).to(BF16).to(hopper)
    heads = [t.view(B, T, H, D).transpose(1, 2) for t in joined.split(H * D, dim=-1)]
    check(hopper, heads, causal=True)
    assert calls() == before + 1
    check(hopper, [t[..., 1:] for t in torch.randn(3, 1, 1, 30, 17).to(BF16).to(hopper)], causal=True)
    assert calls() == before + 1


def test_order_of_threads_does_not_matter(hopper, set_one_pass_from, thread_order, monkeypatch):
    """And neither does the time: the same input gives the same bits, by both ways."""
    monkeypatch.setattr(backend, "deterministic", lambda: True)
    for from_, shape, options in (
        (1 << 40, (1, 2, 1, 140, 200, 64), {"causal": True}),
        (1 << 40, (1, 1, 1, 200, 70, 128), {"window": 30}),
        (0, (1, 1, 1, 140, 140, 128), {"causal": True}),
    ):
        set_one_pass_from(from_)
        tensors = make(*shape, dtype=BF16)
        check(hopper, tensors, **options)
        tensors, _ = placed(hopper, tensors, {})
        grad = torch.randn(*tensors[0].shape).to(BF16).to(hopper)
        runs = [with_gradients(attention, tensors, grad, **options) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs))
