"""torch's own scaled_dot_product_attention with llmfast switched in, and llmfast's twin of it, against torch itself.

One file above 500 lines: both are held against the same list of calls and the same oracle.
"""

import math
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import llmfast
from llmfast import backend
from llmfast.integrations import torch as integration

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF = math.inf
OPERATOR = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@pytest.fixture(autouse=True)
def _switched_off_afterwards():
    yield
    integration.disable_sdpa()
    assert not integration.sdpa_enabled()


@pytest.fixture
def strict(monkeypatch):
    monkeypatch.setenv("LLMFAST_STRICT", "1")


def calls(table="attention"):
    return sum(row["calls"] for row in backend.implementations(table))


def native_calls():
    return (
        calls("attention") + calls("attention_decode"),
        calls("attention_backward") + calls("attention_decode_backward"),
    )


def with_gradients(function, tensors, grad, **options):
    inputs = [t.detach().requires_grad_() for t in tensors]
    out = function(*inputs, **options)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(t.grad for t in inputs)]


def switched(*args, **kwargs):
    with integration.sdpa():
        return F.scaled_dot_product_attention(*args, **kwargs)


def switched_with_gradients(tensors, grad, **options):
    """Forward and backward pass both under the switch."""
    with integration.sdpa():
        return with_gradients(F.scaled_dot_product_attention, tensors, grad, **options)


def doubled(options):
    mask = options.get("attn_mask")
    return {**options, "attn_mask": mask.double()} if mask is not None and mask.is_floating_point() else options


def compare(ours, tensors, grad, **options):
    """Error rule on output and gradients; layouts as torch's own function has them."""
    assert not integration.sdpa_enabled()
    theirs = with_gradients(F.scaled_dot_product_attention, tensors, grad, **options)
    with sdpa_kernel(SDPBackend.MATH):
        exact = with_gradients(
            F.scaled_dot_product_attention, [t.double() for t in tensors], grad.double(), **doubled(options)
        )
    for name, mine, peer, truth in zip(("out", "grad_q", "grad_k", "grad_v"), ours, theirs, exact):
        assert mine.dtype == peer.dtype, name
        assert_as_accurate(mine, peer, truth, what=name)
    assert ours[0].stride() == theirs[0].stride()


def make(B, Hq, Hkv, L, S, E, Ev=None, dtype=torch.float32):
    return [
        torch.randn(shape).to(dtype) for shape in ((B, Hq, L, E), (B, Hkv, S, E), (B, Hkv, S, E if Ev is None else Ev))
    ]


# (B, Hq, Hkv, L, S, E), options
CASES = {
    "plain": ((2, 3, 3, 33, 47, 16), {}),
    "causal": ((2, 2, 2, 70, 70, 32), {"is_causal": True}),
    "causal, fewer queries": ((1, 2, 2, 5, 47, 16), {"is_causal": True}),
    "causal, fewer keys": ((1, 2, 2, 47, 5, 16), {"is_causal": True}),
    "causal, one query": ((2, 2, 2, 1, 47, 16), {"is_causal": True}),
    "one query, long cache": ((2, 4, 4, 1, 300, 24), {}),
    "grouped heads": ((2, 6, 2, 20, 20, 16), {"enable_gqa": True, "is_causal": True}),
    "one kv head, mask": ((1, 4, 1, 20, 33, 16), {"enable_gqa": True, "attn_mask": torch.rand(20, 33) < 0.7}),
    "scale": ((1, 2, 2, 20, 33, 16), {"scale": 0.7}),
    "zero scale": ((1, 2, 2, 20, 33, 16), {"scale": 0.0}),
    "odd head dim": ((1, 3, 3, 20, 33, 7), {"is_causal": True}),
    "head dim 1": ((1, 2, 2, 20, 33, 1), {}),
    "head dim 160": ((1, 1, 1, 20, 33, 160), {}),
    "boolean [L, S]": ((2, 2, 2, 20, 33, 16), {"attn_mask": torch.ones(20, 33, dtype=torch.bool).tril(3)}),
    "boolean [B, 1, 1, S]": (
        (2, 2, 2, 20, 33, 16),
        {"attn_mask": (torch.arange(33) < torch.tensor([[9], [30]]))[:, None, None]},
    ),
    "boolean, a row sees nothing": (
        (2, 2, 2, 20, 33, 16),
        {"attn_mask": torch.ones(20, 33, dtype=torch.bool).tril(-4)},
    ),
    "additive [1, S]": ((2, 2, 2, 20, 33, 16), {"attn_mask": torch.linspace(-3, 3, 33)[None]}),
    "additive [L, 1]": ((2, 2, 2, 20, 33, 16), {"attn_mask": torch.linspace(-3, 3, 20)[:, None]}),
    "additive [B, H, L, S]": ((2, 2, 2, 20, 33, 16), {"attn_mask": torch.randn(2, 2, 20, 33), "scale": 0.2}),
    "additive, transposed": ((2, 2, 2, 20, 33, 16), {"attn_mask": torch.randn(33, 20).t()}),
    "additive, expanded": ((2, 2, 2, 20, 33, 16), {"attn_mask": torch.randn(1, 1, 1, 33).expand(2, 2, 20, 33)}),
    "additive with -inf": ((1, 2, 2, 20, 33, 16), {"attn_mask": torch.zeros(20, 33).masked_fill(torch.rand(20, 33) < 0.3, -INF)}),  # noqa: E501
}  # fmt: skip


def case(name, dtype=torch.float32):
    shape, options = CASES[name]
    tensors = make(*shape, dtype=dtype)
    if "attn_mask" in options and options["attn_mask"].is_floating_point():
        options = {**options, "attn_mask": options["attn_mask"].to(dtype)}
    return tensors, torch.randn(tensors[0].shape).to(dtype), options


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_switch_against_torch(isa, strict, name, dtype):
    tensors, grad, options = case(name, dtype)
    before = native_calls()
    ours = switched_with_gradients(tensors, grad, **options)
    after = native_calls()
    assert (after[0] - before[0], after[1] - before[1]) == (1, 1)
    compare(ours, tensors, grad, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_twin_against_torch(isa, strict, name, dtype):
    tensors, grad, options = case(name, dtype)
    ours = with_gradients(llmfast.scaled_dot_product_attention, tensors, grad, **options)
    compare(ours, tensors, grad, **options)


def test_operator_outputs_are_laid_out_as_torchs(strict):
    """What compiled code, which was promised torch's strides, relies on."""
    q, k, v = make(2, 4, 4, 20, 33, 16)
    fused = torch.randn(2, 20, 3, 4, 16)
    by_time = torch.randn(20, 2, 3, 4, 16)
    mask = torch.zeros(20, 33).masked_fill(torch.rand(20, 33) < 0.5, -INF)
    mask[3] = -INF
    for query, key, value, options in (
        (q, k, v, {"attn_mask": mask}),
        (*fused.permute(2, 0, 3, 1, 4), {"is_causal": True}),
        (*by_time.permute(2, 1, 3, 0, 4), {"scale": 0.1}),
        (q, k[:, :2], v[:, :2], {}),
        (q[:, :, :1].expand_as(q), k, v, {}),
    ):
        theirs = OPERATOR(query, key, value, 0.0, options.pop("is_causal", False), **options)
        grad = torch.randn_like(theirs[0]).mT.contiguous().mT
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        their_grads = backward(grad, query, key, value, *theirs, 0.0, False, **options)
        with integration.sdpa():
            ours = OPERATOR(query, key, value, **options)
            our_grads = backward(grad, query, key, value, *theirs, 0.0, False, **options)
        with integration.sdpa():
            ours = OPERATOR(query, key, value, 0.0, "is_causal" in options, **options)
        for mine, peer in zip((*ours, *our_grads), (*theirs, *their_grads)):
            assert mine.stride() == peer.stride() and mine.dtype == peer.dtype
    theirs = OPERATOR(q, k, v, attn_mask=mask)
    with integration.sdpa():
        ours = OPERATOR(q, k, v, attn_mask=mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours[1][:, :, 3] == theirs[1][:, :, 3]).all()


@pytest.mark.parametrize("forward_on", [True, False])
def test_turning_the_switch_between_forward_and_backward(forward_on):
    """Rows that see nothing included: each side reads the logsumexp that the other wrote."""
    tensors, grad, options = case("boolean, a row sees nothing")
    inputs = [t.requires_grad_() for t in tensors]
    if forward_on:
        out = switched(*inputs, **options)
        out.backward(grad)
    else:
        out = F.scaled_dot_product_attention(*inputs, **options)
        with integration.sdpa():
            out.backward(grad)
    compare([out.detach(), *(t.grad for t in inputs)], [t.detach() for t in tensors], grad, **options)


def test_on_and_off():
    q = torch.randn(1, 2, 20, 16)
    seen = []

    def check(expected):
        before = native_calls()[0]
        F.scaled_dot_product_attention(q, q, q)
        seen.append(native_calls()[0] - before)
        assert seen[-1] == expected and integration.sdpa_enabled() == bool(expected)

    check(0)
    integration.enable_sdpa()
    integration.enable_sdpa()
    check(1)
    with integration.sdpa():
        check(1)
        with integration.sdpa():
            integration.disable_sdpa()
            check(1)
        check(1)
    check(0)
    integration.disable_sdpa()
    check(0)
    with pytest.raises(ZeroDivisionError), integration.sdpa():
        1 / 0  # noqa: B018
    check(0)

    @integration.sdpa()
    def decorated():
        check(1)

    decorated()
    decorated()
    check(0)


def test_torchs_own_kernel_comes_back():
    def registered():
        name = "aten::_scaled_dot_product_flash_attention_for_cpu"
        return [torch._C._dispatch_dump(name), torch._C._dispatch_dump(f"{name}_backward")]

    q, before = torch.randn(1, 2, 20, 16), registered()
    expected = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    for _ in range(3):
        switched(q, q, q)
    assert torch.equal(F.scaled_dot_product_attention(q, q, q, is_causal=True), expected)
    assert registered() == before


def test_switching_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        switched(*make(1, 2, 2, 5, 5, 16))


def test_torchs_own_registry_of_providers():
    """Registered by the import, active only when asked; deactivating leaves `enable_sdpa` alone."""
    from torch.nn import attention

    assert "llmfast" in attention.list_flash_attention_impls() and attention.current_flash_attention_impl() is None
    assert not integration.sdpa_enabled()
    attention.activate_flash_attention_impl("llmfast")
    try:
        assert integration.sdpa_enabled() and attention.current_flash_attention_impl() == "llmfast"
        integration.enable_sdpa()
        integration.disable_sdpa()
        assert integration.sdpa_enabled()
        attention.activate_flash_attention_impl("llmfast")
        assert integration.sdpa_enabled()
    finally:
        attention.restore_flash_attention_impl()
    assert not integration.sdpa_enabled() and attention.current_flash_attention_impl() is None


def test_what_no_kernel_takes_runs_in_torch_and_is_counted(monkeypatch):
    tensors = [t.double() for t in make(1, 2, 2, 20, 20, 16)]
    grad = torch.randn(1, 2, 20, 16)
    before = backend.fallbacks()
    compare(switched_with_gradients(tensors, grad, is_causal=True), tensors, grad, is_causal=True)
    new = {name: n - before.get(name, 0) for name, n in backend.fallbacks().items() if n != before.get(name, 0)}
    assert new == {"torch SDPA: dtype torch.float64": 1, "torch SDPA backward: dtype torch.float64": 1}
    monkeypatch.setenv("LLMFAST_STRICT", "1")
    with pytest.raises(RuntimeError, match="LLMFAST_STRICT"):
        switched(*tensors)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: ((q[0], k[0], v[0]), {}),
        lambda q, k, v: ((q[0, 0], k[0, 0], v[0, 0]), {}),
        lambda q, k, v: ((q[None], k[None], v[None]), {"is_causal": True}),
        lambda q, k, v: ((q, k, v[..., :3]), {}),
        lambda q, k, v: ((q, k[:1], v[:1]), {}),
        lambda q, k, v: ((q, k[:, :1], v[:, :1]), {"attn_mask": torch.randn(20, 33)}),
        lambda q, k, v: ((q[0], k, v), {}),
        lambda q, k, v: ((q[:, :, :0], k, v), {}),
        lambda q, k, v: ((q, k[:, :, :0], v[:, :, :0]), {}),
        lambda q, k, v: ((q[:0], k[:0], v[:0]), {}),
        lambda q, k, v: ((q, k, v), {"attn_mask": torch.randn(4, 20, 33)}),
        lambda q, k, v: ((q[0], k[0], v[0]), {"attn_mask": torch.rand(4, 20, 33) < 0.5}),
        lambda q, k, v: ((q[:, None], k[:, None], v[:, None]), {"attn_mask": torch.rand(4, 20, 33) < 0.5}),
        lambda q, k, v: ((q, k[:, :2], v[:, :2]), {"enable_gqa": True, "attn_mask": torch.rand(20, 33) < 0.5}),
        lambda q, k, v: ((q[0], k[0, :2], v[0, :2]), {"enable_gqa": True}),
        lambda q, k, v: ((q, k[:1, :2], v[:1, :2]), {"enable_gqa": True}),
        lambda q, k, v: ((q, k, v), {"attn_mask": causal_upper_left(20, 33)}),
        lambda q, k, v: ((q, k, v), {"attn_mask": causal_lower_right(20, 33)}),
        lambda q, k, v: ((q, k[:, :, :20], v[:, :, :20]), {"attn_mask": causal_lower_right(20, 20)}),
    ],
    ids=["3-D", "2-D", "5-D causal", "value dim", "one batch of keys", "one head of keys, mask", "3-D and 4-D",
         "no queries", "no keys", "no batch", "mask by head", "3-D mask by head", "5-D mask by head", "grouped, mask",
         "3-D grouped", "grouped, one batch of keys", "upper left", "lower right", "lower right, square"],
)  # fmt: skip
def test_the_twin_takes_natively_what_torch_computes_in_plain_operations(isa, strict, change):
    tensors, options = change(*make(2, 4, 4, 20, 33, 16))
    shape = F.scaled_dot_product_attention(*tensors, **options).shape
    grad = torch.randn(shape)
    ours = with_gradients(llmfast.scaled_dot_product_attention, tensors, grad, **options)
    if isinstance(options.get("attn_mask"), torch.nn.attention.bias.CausalBias):
        options = {"attn_mask": options["attn_mask"]._materialize()}
    theirs = with_gradients(F.scaled_dot_product_attention, tensors, grad, **options)
    exact = with_gradients(
        F.scaled_dot_product_attention, [t.double() for t in tensors], grad.double(), **doubled(options)
    )
    for name, mine, peer, truth in zip(("out", "grad_q", "grad_k", "grad_v"), ours, theirs, exact):
        assert_as_accurate(mine, peer, truth, what=name)
    on = switched_with_gradients(tensors, grad, **options)  # the switch: whatever way torch takes, the same numbers
    for name, mine, peer, truth in zip(("out", "grad_q", "grad_k", "grad_v"), on, theirs, exact):
        assert_as_accurate(mine, peer, truth, what=name)


def test_the_twin_leaves_the_rest_to_torch_and_counts_it():
    q, k, v = make(2, 2, 2, 20, 33, 16)

    def expect(reason, *args, **options):
        name = f"scaled_dot_product_attention: {reason}"
        before = backend.fallbacks().get(name, 0)
        torch.manual_seed(3)
        ours = llmfast.scaled_dot_product_attention(*args, **options)
        assert backend.fallbacks()[name] == before + 1
        torch.manual_seed(3)
        assert torch.equal(ours, F.scaled_dot_product_attention(*args, **options))

    expect("dropout", q, k, v, dropout_p=0.4)
    expect("dtype torch.float64", q.double(), k.double(), v.double())
    expect("both attn_mask and is_causal", q, k, v, torch.randn(20, 33), is_causal=True)
    expect("5 dimensions, not contiguous", q.mT.contiguous().mT[:, None], k[:, None], v[:, None])
    expect("a mask that requires a gradient", q, k, v, torch.randn(20, 33, requires_grad=True))
    expect("a mask of 5 dimensions", q[None], k[None], v[None], torch.randn(1, 1, 1, 20, 33))

    mask = torch.randn(20, 33, requires_grad=True)
    llmfast.scaled_dot_product_attention(q, k, v, mask).square().sum().backward()
    grad, mask.grad = mask.grad, None
    switched(q, k, v, mask).square().sum().backward()
    torch.testing.assert_close(mask.grad, grad)


@pytest.mark.parametrize("dropout", [0.5, 1.0])
def test_dropout_under_the_switch_is_torchs_own(dropout):
    q, k, v = make(1, 2, 2, 20, 33, 16)
    torch.manual_seed(1)
    expected = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    torch.manual_seed(1)
    assert torch.equal(switched(q, k, v, dropout_p=dropout), expected)


def test_errors_are_torchs_own():
    """Bad arguments: the same kind of error from the function, the switched function and the twin."""
    q, k, v = make(2, 4, 4, 5, 7, 8)
    boolean = torch.ones(5, 7, dtype=torch.bool)
    for args, options in (
        ((q, k[..., :4], v), {}),
        ((q, k[:, :3], v[:, :3]), {}),
        ((q, k[:, :3], v[:, :3]), {"enable_gqa": True}),
        ((q, k.bfloat16(), v), {}),
        ((q, k, v, torch.ones(5, 6, dtype=torch.bool)), {}),
        ((q, k, v, torch.ones(5, 7).long()), {}),
        ((q, k, v, torch.ones(5, 7).bfloat16()), {}),
        ((q[0], k[0], v[0], boolean), {"is_causal": True}),
        ((q[0, 0, 0], k[0, 0, 0], v[0, 0, 0]), {}),
        ((q, k, [1.0]), {}),
        ((q, None, v), {}),
        ((q, k, v), {"dropout_p": 1.5}),
    ):
        kinds = []
        for function in (F.scaled_dot_product_attention, switched, llmfast.scaled_dot_product_attention):
            with pytest.raises(Exception) as caught:
                function(*args, **options)
            kinds.append((caught.type, str(caught.value)))
        assert kinds[0] == kinds[1] == kinds[2]
    for function in (switched, llmfast.scaled_dot_product_attention):  # torch itself reads past the end of value
        with pytest.raises(ValueError, match="value: got 3 tokens, expected 7"):
            function(q, k, v[:, :, :3])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_random_combinations(data):
    draw = data.draw
    group, Hkv, L, S = (draw(st.integers(1, n)) for n in (3, 2, 70, 90))
    B, E, dtype = draw(st.integers(1, 3)), draw(st.integers(1, 70)), draw(st.sampled_from(DTYPES))
    torch.manual_seed(draw(st.integers(0, 1000)))
    tensors = make(B, Hkv * group, Hkv, L, S, E, dtype=dtype)
    if draw(st.booleans()):  # as a projection leaves them
        tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    options = {"enable_gqa": group > 1, "scale": draw(st.sampled_from([None, 0.3]))}
    kind = draw(st.sampled_from(["none", "causal", "bool", "float"]))
    shape = [draw(st.sampled_from([1, n])) for n in (B, Hkv * group)] + [L, S]
    shape = shape[2:] if draw(st.booleans()) else shape
    if kind == "causal":
        options["is_causal"] = True
    elif kind == "bool":
        options["attn_mask"] = torch.rand(shape) < draw(st.floats(0, 1))
    elif kind == "float":
        options["attn_mask"] = torch.randn(shape).to(dtype)
    grad = torch.randn(tensors[0].shape).to(dtype)
    before = backend.fallbacks()
    compare(switched_with_gradients(tensors, grad, **options), tensors, grad, **options)
    compare(with_gradients(llmfast.scaled_dot_product_attention, tensors, grad, **options), tensors, grad, **options)
    assert backend.fallbacks() == before


@pytest.mark.parametrize("Ev", [3, 40])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_in_one_projection(isa, strict, Ev, causal):
    """Views of one [B, T, 3 H E] tensor, as in torch's transformer test model; E is odd and the views overlap nothing."""
    B, T, H = 2, 45, 3
    packed = torch.randn(B, T, 3 * H * Ev, requires_grad=True)
    twin = packed.detach().double().requires_grad_()

    def attend(x):
        q, k, v = (t.view(B, T, H, Ev).transpose(1, 2) for t in x.chunk(3, dim=-1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).reshape(B, T, H * Ev)

    with integration.sdpa():
        out = attend(packed)
        out.square().sum().backward()
    truth = attend(twin)
    truth.square().sum().backward()
    torch.testing.assert_close(out, truth.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed.grad, twin.grad.float(), rtol=1e-4, atol=1e-4)


def test_many_threads_at_once():
    tensors, _, options = case("causal")
    expected = switched(*tensors, **options)
    wrong = []

    def work():
        for _ in range(20):
            if not torch.allclose(switched(*tensors, **options), expected, atol=1e-5):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not integration.sdpa_enabled()


class Block(nn.Module):
    """Self-attention over one projection, through torch's function."""

    def __init__(self, attend=F.scaled_dot_product_attention):
        super().__init__()
        self.qkv, self.attend = nn.Linear(32, 96), attend

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.attend(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


FUNCTIONS = pytest.mark.parametrize(
    "attend", [F.scaled_dot_product_attention, llmfast.scaled_dot_product_attention], ids=["switch", "twin"]
)


@FUNCTIONS
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(strict, attend, dynamic):
    model, x = Block(attend), torch.randn(2, 20, 32)
    expected = Block.forward(model, x)
    expected_grad = torch.autograd.grad(expected.square().sum(), model.qkv.weight)[0]
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    for on in (False, True):  # compiled with the switch off, it runs natively once it is on
        if on:
            integration.enable_sdpa()
        before = native_calls()
        out = compiled(x)
        grad = torch.autograd.grad(out.square().sum(), model.qkv.weight)[0]
        ran = tuple(b - a for a, b in zip(before, native_calls()))
        assert ran == ((1, 1) if on or attend is not F.scaled_dot_product_attention else (0, 0))
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-4)
    if dynamic:
        y = torch.randn(3, 31, 32)
        torch.testing.assert_close(compiled(y), model(y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"attn_mask": torch.rand(20, 20) < 0.5},
        {"enable_gqa": True},
        {"attn_mask": causal_lower_right(20, 20)},
        {"dropout_p": 0.0, "scale": 0.5},
    ],
    ids=lambda o: next(iter(o)),
)
def test_compile_of_the_twin_with_options(strict, options):
    q, k, v = make(2, 4, 2 if "enable_gqa" in options else 4, 20, 20, 16)

    def attend(q, k, v):
        return llmfast.scaled_dot_product_attention(q, k, v, **options)

    torch.testing.assert_close(torch.compile(attend, fullgraph=True)(q, k, v), attend(q, k, v))
    if "enable_gqa" not in options:
        torch.testing.assert_close(torch.compile(attend, fullgraph=True)(q[0], k[0], v[0]), attend(q[0], k[0], v[0]))


def test_the_switch_inside_a_compiled_function():
    q = torch.randn(1, 2, 20, 16)

    def attend(q):
        with integration.sdpa():
            return F.scaled_dot_product_attention(q, q, q) + 1

    expected, before = attend(q), native_calls()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it cannot trace
        torch.testing.assert_close(torch.compile(attend)(q), expected)  # a graph break, and then as always
    assert native_calls()[0] == before + 1


def test_compile_with_masks_of_dynamic_shape(strict):
    def attend(q, mask):
        twin = llmfast.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        return twin + llmfast.attention(q, q, q, mask=mask)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True)
    for T in (20, 31):
        q, mask = torch.randn(2, 4, T, 16), torch.rand(T, T) < 0.5
        torch.testing.assert_close(compiled(q, mask), attend(q, mask))


def test_a_default_device_is_no_obstacle(strict):
    with torch.device("cpu"):
        q = torch.randn(2, 4, 20, 16)
        torch.testing.assert_close(
            llmfast.scaled_dot_product_attention(q, q, q), F.scaled_dot_product_attention(q, q, q)
        )


@FUNCTIONS
def test_autocast(strict, attend):
    model, x = Block(attend), torch.randn(2, 20, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    q, k, v = make(1, 2, 2, 20, 20, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mask = torch.randn(20, 20)
        theirs = F.scaled_dot_product_attention(q, k, v, mask)
        with integration.sdpa():
            ours = attend(q, k, v, mask)
        assert attend(q, k.bfloat16(), v).dtype == torch.bfloat16
    assert ours.dtype == theirs.dtype == torch.bfloat16
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask.double())
    assert_as_accurate(ours, theirs, exact)


@FUNCTIONS
def test_export(strict, attend):
    model, x = Block(attend).eval(), torch.randn(2, 20, 32)
    program = torch.export.export(
        model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("B"), 1: torch.export.Dim("T")}}
    )
    before = native_calls()[0]
    with integration.sdpa():
        out = program.module()(x)
    assert native_calls()[0] == before + 1
    torch.testing.assert_close(out, model(x), rtol=1e-5, atol=1e-5)
    y = torch.randn(3, 9, 32)
    torch.testing.assert_close(program.module()(y), model(y), rtol=1e-5, atol=1e-5)


@FUNCTIONS
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(strict, attend, use_reentrant):
    model, x = Block(attend), torch.randn(2, 20, 32, requires_grad=True)
    with integration.sdpa():
        model(x).square().sum().backward()
        expected, x.grad = x.grad, None
        before = native_calls()
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    after = native_calls()
    assert (after[0] - before[0], after[1] - before[1]) == (2, 1)
    assert torch.equal(x.grad, expected)


@FUNCTIONS
def test_functional_transforms(strict, attend):
    q, k, v = make(3, 2, 2, 20, 20, 16)

    def loss(q, k, v):
        return attend(q, k, v, is_causal=True).square().sum()

    with integration.sdpa():
        grads = torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v)
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        loss(*leaves).backward()
        for a, b in zip(grads, leaves):
            assert torch.equal(a, b.grad)
        batched = [torch.stack((t, t + 1)) for t in (q, k, v)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has no batching rule for its operator either, and says so
            out = torch.vmap(attend)(*batched)
            shared = torch.vmap(attend, in_dims=(0, None, None))(batched[0], k, v)
            rows = torch.vmap(lambda *t: attend(*t))(q, k, v)
            each = torch.vmap(torch.func.grad(loss))(*batched)
        for i in range(2):
            torch.testing.assert_close(out[i], attend(*(t[i] for t in batched)))
            torch.testing.assert_close(shared[i], attend(batched[0][i], k, v))
            torch.testing.assert_close(each[i], torch.func.grad(loss)(*(t[i] for t in batched)))
        torch.testing.assert_close(rows, attend(q, k, v))


@FUNCTIONS
def test_second_derivatives_are_an_error(attend):
    """Neither torch's operator nor llmfast's has any; a wrong number would be worse."""
    q = torch.randn(1, 1, 5, 8, requires_grad=True)
    with integration.sdpa(), pytest.raises(RuntimeError):
        first = torch.autograd.grad(attend(q, q, q).square().sum(), q, create_graph=True)[0]
        torch.autograd.grad(first.sum(), q)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("masked", [None, "causal", "padding"])
def test_multihead_attention_of_torch(strict, batch_first, masked):
    torch.manual_seed(0)
    mha, x = nn.MultiheadAttention(32, 2, batch_first=batch_first), torch.randn(3, 3, 32)
    options = {"need_weights": False}
    if masked == "causal":
        options |= {"attn_mask": nn.Transformer.generate_square_subsequent_mask(3), "is_causal": True}
    if masked == "padding":
        options["key_padding_mask"] = torch.tensor([[False, False, True]] * 3)
    before = native_calls()
    with integration.sdpa():
        out = mha(x, x, x, **options)[0]
        grads = torch.autograd.grad(out.square().sum(), list(mha.parameters()))
    after = native_calls()
    assert (after[0] - before[0], after[1] - before[1]) == (1, 1)
    theirs = mha(x, x, x, **options)[0]
    torch.testing.assert_close(out, theirs, rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(theirs.square().sum(), list(mha.parameters()))
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_layers_of_torch(strict, norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True, norm_first=norm_first)
    decoder = nn.TransformerDecoderLayer(32, 2, 64, dropout=0.0, batch_first=True, norm_first=norm_first)
    x, memory = torch.randn(2, 9, 32), torch.randn(2, 5, 32)
    causal = nn.Transformer.generate_square_subsequent_mask(9)

    def run():
        return decoder(layer(x, causal, is_causal=True), memory, tgt_mask=causal, tgt_is_causal=True)

    before = native_calls()
    with integration.sdpa():
        out = run()
        out.square().sum().backward()
    after = native_calls()
    assert (after[0] - before[0], after[1] - before[1]) == (3, 3)
    torch.testing.assert_close(out, run(), rtol=1e-5, atol=1e-5)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), integration.sdpa():
            before = native_calls()[0]
            layer.eval()(x)
            assert native_calls()[0] == before + 1
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_padded_batch_with_loss_scaling(strict):
    """Extra padding and the mask that hides it change nothing, gradients scaled by 2**16 included."""
    q, k, v = make(2, 2, 2, 9, 20, 16)
    grad = torch.randn(q.shape)
    plain = switched_with_gradients((q, k, v), grad)
    padded = [F.pad(t, (0, 0, 0, 12)) for t in (k, v)]
    padded[0][:, :, 20:] = 1e4
    mask = torch.arange(32) < 20
    got = switched_with_gradients((q, *padded), grad * 2.0**16, attn_mask=mask[None])
    for name, a, b in zip(("out", "grad_q", "grad_k", "grad_v"), plain, got):
        b = b if name == "out" else b / 2.0**16
        torch.testing.assert_close(a, b[:, :, : a.shape[2]], rtol=1e-5, atol=1e-5)


def test_large_scores_do_not_overflow(strict):
    for dtype in DTYPES:
        q, k, v = (t.to(dtype) for t in make(1, 1, 1, 20, 33, 16))
        ours = switched(q * 100, k * 100, v)
        exact = F.scaled_dot_product_attention((q * 100).double(), (k * 100).double(), v.double())
        assert ours.isfinite().all()
        assert_as_accurate(ours, F.scaled_dot_product_attention(q * 100, k * 100, v), exact)


def test_deterministic(strict):
    tensors, grad, options = case("causal")
    runs = [switched_with_gradients(tensors, grad, **options) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_importing_switches_nothing_on():
    from llmfast import integrations

    assert integrations.torch is integration
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = integrations.nothing


def test_twin_in_torchs_place(monkeypatch):
    """Programs that assign to torch.nn.functional: what the kernels do not take still reaches torch's own."""
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    expected = [
        F.scaled_dot_product_attention(q.double(), k.double(), v.double()),
        F.scaled_dot_product_attention(q, k, v),
    ]
    monkeypatch.setattr(F, "scaled_dot_product_attention", llmfast.scaled_dot_product_attention)
    monkeypatch.setenv("LLMFAST_STRICT", "0")
    torch.testing.assert_close(F.scaled_dot_product_attention(q.double(), k.double(), v.double()), expected[0])
    torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v), expected[1])
