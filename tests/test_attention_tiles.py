"""Attention in bfloat16 at sizes that straddle what the bf16 kernels are cut into: 32 lanes, blocks of 32 keys and head
dims, 64-key tiles, and segments and chunks of 512. Other rows run the same cases."""

import math

import pytest
import torch
from test_attention import check, make, with_gradients

from llmfast import backend, reference
from llmfast.ops.attention import attention

BF16 = torch.bfloat16

# (B, Hq, Hkv, Tq, Tk, D, Dv), options
CASES = {
    "three blocks of dims": ((1, 2, 2, 33, 33, 96), {"causal": True}),
    "a block and a bit": ((1, 2, 1, 65, 65, 40), {"causal": True}),
    "grouped, causal, window": ((1, 4, 2, 129, 129, 64), {"causal": True, "window": 50}),
    "two head dims": ((1, 3, 1, 50, 130, 80, 48), {"window": (40, 10)}),
    "two chunks": ((1, 1, 1, 600, 600, 32), {"causal": True}),
    "two chunks of a group": ((1, 4, 1, 150, 70, 16), {"causal": True}),
    "three segments": ((1, 1, 1, 40, 1100, 32), {}),
    "window across segments": ((1, 1, 1, 70, 1100, 32), {"window": (3, 600)}),
    "widest": ((1, 2, 2, 40, 70, 256), {"causal": True, "softcap": 5.0, "scale": 0.3}),
    "negative scale": ((1, 2, 2, 70, 90, 32), {"scale": -0.3}),
    "steep": ((1, 2, 2, 70, 200, 32), {"scale": 4.0}),
}


def calls(table: str) -> dict[str, int]:
    return {row["isa"]: row["calls"] for row in backend.implementations(table)}


@pytest.mark.parametrize("case", CASES)
def test_bfloat16(isa, case):
    shape, options = CASES[case]
    before = calls("attention"), calls("attention_backward")
    check(make(*shape, dtype=BF16), **options)
    after = calls("attention"), calls("attention_backward")
    assert all(new[isa] == old[isa] + 1 for old, new in zip(before, after)), "another row ran"


def test_bfloat16_with_masks(isa):
    check(make(1, 2, 2, 70, 200, 32, dtype=BF16), mask=torch.rand(70, 200) < 0.3, causal=True)
    check(make(1, 4, 2, 40, 90, 48, dtype=BF16), mask=(3 * torch.randn(4, 1, 90)).to(BF16), softcap=3.0)
    blocks = torch.zeros(1, 1, 100, 260, dtype=torch.bool)  # tiles and squares that are hidden altogether
    blocks[:, :, 40:, 100:170] = True
    check(make(1, 2, 2, 100, 260, 32, dtype=BF16), mask=blocks)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_hidden_bfloat16_does_not_leak(isa, bad):
    Tq, Tk = 90, 140
    grad = torch.randn(1, 4, Tq, 32)
    mask = torch.ones(Tq, Tk, dtype=torch.bool)
    mask[:37, 40:70] = False
    for options, spoiled in (({"mask": mask}, slice(40, 70)), ({"causal": True}, slice(Tk - 9, Tk)),
                             ({"window": 20}, slice(Tk - 40, Tk - 38))):  # fmt: skip
        sees = reference.visible(Tq, Tk, causal="causal" in options, window=options.get("window"))
        unhurt = ~(sees & options.get("mask", sees))[:, spoiled].any(-1)
        assert unhurt.any() and not unhurt.all()
        tensors = make(1, 4, 2, Tq, Tk, 32, dtype=BF16)
        clean = with_gradients(attention, tensors, grad, **options)
        for which in (1, 2):
            dirty_tensors = [t.clone() for t in tensors]
            dirty_tensors[which][:, :, spoiled] = bad
            dirty = with_gradients(attention, dirty_tensors, grad, **options)
            for name, a, b in zip(("out", "grad_q"), clean, dirty):
                assert torch.equal(a[:, :, unhurt], b[:, :, unhurt]), (name, options)
                assert not b[:, :, ~unhurt].isfinite().all(-1).any(), (name, options)


@pytest.mark.parametrize("count", [1, 3])
def test_bfloat16_on_any_number_of_threads(isa, count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        for shape in ((1, 2, 1, 300, 200, 32), (1, 1, 1, 600, 600, 32)):
            tensors = make(*shape, dtype=BF16)
            check(tensors, causal=True)
            grad = torch.randn(tensors[0].shape)
            runs = [with_gradients(attention, tensors, grad, causal=True) for _ in range(2)]
            assert all(torch.equal(a, b) for a, b in zip(*runs))
    finally:
        torch.set_num_threads(before)
