"""llmfast.nn's twins of torch.nn modules against torch's: results, gradients, state_dict, and what stays native.

One file above 500 lines: five modules under the same checks (layouts, masks, compile, autocast, checkpointing).
"""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from conftest import assert_as_accurate
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import llmfast
from llmfast import backend
from llmfast import nn as fast
from llmfast.integrations.torch import convert_modules, revert_modules
from llmfast.nn.drop_in import TWINS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def strict(monkeypatch):
    monkeypatch.setenv("LLMFAST_STRICT", "1")


def twins(name, *args, dtype=torch.float32, **kwargs):
    """(ours, torch's, torch's in float64) with the same parameters, none of them at its initial value."""
    theirs = getattr(nn, name)(*args, **kwargs).to(dtype)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    ours = getattr(fast, name)(*args, **kwargs).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, copy.deepcopy(theirs).double()


def run(module, inputs, grad, options):
    """Output and gradients of the inputs, each distinct one once, and of the parameters, which are cleared after."""
    leaves = {id(t): t.detach().clone().requires_grad_() for t in inputs}
    out = module(*(leaves[id(t)] for t in inputs), **options)
    out = out[0] if isinstance(out, tuple) else out
    out.backward(grad(out))
    grads = [t.grad for t in leaves.values()] + [p.grad for p in module.parameters()]
    module.zero_grad()
    return [out.detach(), *grads]


def compare(modules, inputs, **options):
    ours, theirs, exact = modules
    torch.manual_seed(5)
    fixed = torch.randn(10**5)

    def grad(out):
        return fixed[: out.numel()].view(out.shape).to(out.dtype)

    mine = run(ours, inputs, grad, options)
    peer = run(theirs, inputs, grad, options)
    doubles = {id(t): t.double() for t in inputs}
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}
    truth = run(exact, [doubles[id(t)] for t in inputs], grad, wide)
    assert len(mine) == len(peer) == len(truth)
    for a, b in zip(mine, peer):
        assert (a is None) == (b is None) and (a is None or a.dtype == b.dtype)
    present = [i for i, t in enumerate(truth) if t is not None and t.numel()]
    if peer[0].dtype == torch.float32:
        for i in present:
            assert_as_accurate(mine[i], peer[i], truth[i], what=f"result {i}")
    elif present:  # the largest error of a small tensor, rounded several times, is down to luck: all as one
        scales = [truth[i].abs().max().clamp(min=1e-30) for i in present]
        all_results = (
            [r[i].double().flatten() / scale for i, scale in zip(present, scales)] for r in (mine, peer, truth)
        )
        assert_as_accurate(*(torch.cat(r) for r in all_results))


def native_calls():
    return {op: sum(row["calls"] for row in backend.implementations(op)) for op in backend.ops()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "normalized"),
    [((3, 5, 16), 16), ((7, 33), (33,)), ((2, 3, 4, 6), (4, 6)), ((9,), 9), ((0, 8), 8), ((2, 5, 2, 3, 4), [2, 3, 4])],
    ids=str,
)
def test_norms(isa, strict, shape, normalized, dtype):
    x = torch.randn(shape).to(dtype)
    before = native_calls()
    for options in ({}, {"elementwise_affine": False}, {"bias": False}, {"eps": 0.1}):
        compare(twins("LayerNorm", normalized, dtype=dtype, **options), [x])
    for options in ({}, {"elementwise_affine": False}, {"eps": 0.1}):
        compare(twins("RMSNorm", normalized, dtype=dtype, **options), [x])
    ran = {op: n - before[op] for op, n in native_calls().items()}
    assert (ran["add_layer_norm"], ran["add_rms_norm"]) == ((4, 3) if x.numel() else (0, 0))


def test_norms_of_low_precision_activations_with_float32_parameters(strict):
    x = torch.randn(3, 16).bfloat16()
    for name in ("LayerNorm", "RMSNorm"):
        ours, theirs, exact = twins(name, 16)
        out = ours(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks that mixed dtypes are slow
            expected = theirs(x)
        assert out.dtype == expected.dtype == torch.bfloat16
        assert_as_accurate(out, expected, exact(x.double()))


def test_rms_norm_default_eps_is_that_of_float32():
    for dtype in DTYPES:
        x = (torch.randn(64) * 1e-3).to(dtype)
        ours, theirs, _ = twins("RMSNorm", 64, dtype=dtype)
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(isa, strict, dtype):
    for shape in ((3, 5, 16), (16,), (0, 16)):
        for bias in (True, False):
            compare(twins("Linear", 16, 9, bias=bias, dtype=dtype), [torch.randn(shape).to(dtype)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", [nn.GELU, nn.ReLU, nn.SiLU, lambda: nn.GELU(approximate="tanh"), nn.Tanh])
@pytest.mark.parametrize("out_features", [None, 7])
def test_mlp(isa, strict, act, out_features, dtype):
    ours = fast.MLP(16, 40, out_features, act_layer=act, dtype=dtype)
    theirs = nn.Sequential(nn.Linear(16, 40), act(), nn.Identity(), nn.Linear(40, out_features or 16)).to(dtype)
    assert list(ours.state_dict()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values())))
    before = native_calls()["ffn"]
    compare((ours, theirs, copy.deepcopy(theirs).double()), [torch.randn(2, 5, 16).to(dtype)])
    assert native_calls()["ffn"] - before == (1 if act is not nn.Tanh and out_features is None else 0)


MHA = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "key and value bias": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True, "batch_first": True},
    "all of them": {"add_zero_attn": True, "add_bias_kv": True},
    "other widths": {"kdim": 12, "vdim": 20},
    "other widths, batch first": {"kdim": 12, "vdim": 20, "batch_first": True, "bias": False},
}


def tokens(B, T, E, batch_first, dtype=torch.float32):
    return torch.randn((B, T, E) if batch_first else (T, B, E)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MHA)
def test_multihead_attention(isa, strict, name, dtype):
    options = MHA[name]
    modules = twins("MultiheadAttention", 24, 3, dtype=dtype, **options)
    first = options.get("batch_first", False)
    q = tokens(2, 9, 24, first, dtype)
    k, v = tokens(2, 13, options.get("kdim", 24), first, dtype), tokens(2, 13, options.get("vdim", 24), first, dtype)
    compare(modules, [q, k, v], need_weights=False)
    if "kdim" not in options:
        compare(modules, [q, q, q], need_weights=False)
        compare(modules, [q, k, k], need_weights=False)
        compare(modules, [q[:, 0] if not first else q[0]] * 3, need_weights=False)


PADDING = torch.arange(9) >= torch.tensor([[9], [4]])  # [B, S], True where hidden
CAUSAL = torch.ones(9, 9, dtype=torch.bool).triu(1)
MASKS = {
    "padding": {"key_padding_mask": PADDING},
    "additive padding": {"key_padding_mask": torch.zeros(2, 9).masked_fill(PADDING, -torch.inf)},
    "boolean": {"attn_mask": torch.rand(9, 9) < 0.3},
    "additive": {"attn_mask": torch.randn(9, 9)},
    "by head": {"attn_mask": torch.rand(6, 9, 9) < 0.3},
    "by head, additive": {"attn_mask": torch.randn(6, 9, 9)},
    "causal": {"attn_mask": CAUSAL, "is_causal": True},
    "additive causal": {"attn_mask": torch.zeros(9, 9).masked_fill(CAUSAL, -torch.inf), "is_causal": True},
    "both": {"attn_mask": CAUSAL, "key_padding_mask": PADDING},
    "both, additive": {"attn_mask": torch.randn(9, 9), "key_padding_mask": torch.randn(2, 9)},
    "both by head": {"attn_mask": torch.rand(6, 9, 9) < 0.3, "key_padding_mask": PADDING},
    "causal and padding": {"attn_mask": CAUSAL, "key_padding_mask": PADDING, "is_causal": True},
}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_masks_of_multihead_attention(strict, name, batch_first):
    for options in ({}, {"add_bias_kv": True}, {"add_zero_attn": True}):
        modules = twins("MultiheadAttention", 24, 3, batch_first=batch_first, **options)
        x = tokens(2, 9, 24, batch_first)
        compare(modules, [x, x, x], need_weights=False, **MASKS[name])


def test_masks_of_one_sequence_without_a_batch(strict):
    x = torch.randn(9, 24)
    for options in ({"key_padding_mask": PADDING[1]}, {"attn_mask": CAUSAL, "is_causal": True},
                    {"attn_mask": torch.rand(3, 9, 9) < 0.3}):  # fmt: skip
        compare(twins("MultiheadAttention", 24, 3), [x, x, x], need_weights=False, **options)


def test_padding_masks_are_not_expanded(strict):
    """A [B, S] mask reaches the kernel as it is: nothing of size L x S appears."""
    mha = fast.MultiheadAttention(8, 1, batch_first=True)
    x, hidden = torch.randn(1, 4096, 8), torch.zeros(1, 4096, dtype=torch.bool)
    hidden[:, 4000:] = True
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        mha(x, x, x, key_padding_mask=hidden, need_weights=False)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 4096 * 4096 / 4


def test_mixed_masks_warn_as_torch_does():
    ours, theirs, _ = twins("MultiheadAttention", 24, 3)
    x = torch.randn(9, 2, 24)
    options = {"attn_mask": torch.randn(9, 9), "key_padding_mask": PADDING, "need_weights": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(ours(x, x, x, **options)[0], theirs(x, x, x, **options)[0], rtol=1e-4, atol=1e-5)


def counted(what):
    return backend.fallbacks().get(what, 0)


def test_attention_weights_come_from_torch_and_are_counted(monkeypatch):
    ours, theirs, _ = twins("MultiheadAttention", 24, 3)
    x = torch.randn(9, 2, 24)
    for options in ({}, {"average_attn_weights": False}, {"attn_mask": CAUSAL}):
        before = counted("MultiheadAttention: need_weights=True")
        results, expected = ours(x, x, x, **options), theirs(x, x, x, **options)
        for a, b in zip(results, expected):
            assert torch.equal(a, b)
        assert counted("MultiheadAttention: need_weights=True") == before + 1
    assert ours(x, x, x, need_weights=False)[1] is None
    monkeypatch.setenv("LLMFAST_STRICT", "1")
    with pytest.raises(RuntimeError, match="need_weights=True"):
        ours(x, x, x)


def test_what_no_kernel_takes_is_torchs_own():
    x = torch.randn(9, 2, 24).double()
    for name, args, calls in (
        ("LayerNorm", (24,), (x,)),
        ("RMSNorm", (24,), (x,)),
        ("Linear", (24, 8), (x,)),
        ("MultiheadAttention", (24, 3), (x, x, x)),
        ("TransformerEncoderLayer", (24, 3, 48, 0.0), (x,)),
    ):
        ours, theirs, _ = twins(name, *args, dtype=torch.float64)
        options = {"need_weights": False} if name == "MultiheadAttention" else {}
        before = counted(f"{name}: dtype torch.float64")
        a, b = ours(*calls, **options), theirs(*calls, **options)
        assert counted(f"{name}: dtype torch.float64") > before
        assert torch.equal(a[0], b[0])
    torch.autograd.gradcheck(
        fast.TransformerEncoderLayer(8, 2, 16, 0.0).double(), torch.randn(3, 2, 8).double().requires_grad_()
    )


@pytest.mark.parametrize(
    ("name", "args", "calls", "options"),
    [
        ("LayerNorm", (24,), ((3, 23),), {}),
        ("RMSNorm", (24,), ((3, 23),), {}),
        ("Linear", (24, 8), ((3, 23),), {}),
        ("MultiheadAttention", (24, 3), ((9, 2, 23),) * 3, {}),
        ("MultiheadAttention", (24, 3), ((9, 2, 24), (8, 2, 24), (7, 2, 24)), {}),
        ("MultiheadAttention", (24, 3), ((9, 2, 24), (8, 3, 24), (8, 3, 24)), {}),
        ("MultiheadAttention", (24, 3), ((9, 2, 24),) * 3, {"attn_mask": torch.ones(9, 8, dtype=torch.bool)}),
        ("MultiheadAttention", (24, 3), ((9, 2, 24),) * 3, {"attn_mask": torch.ones(9, 9).long()}),
        ("MultiheadAttention", (24, 3), ((9, 2, 24),) * 3, {"key_padding_mask": torch.ones(9, 2, dtype=torch.bool)}),
        ("MultiheadAttention", (24, 3), ((9, 2, 24),) * 3, {"is_causal": True}),
        ("MultiheadAttention", (24, 3), ((1, 9, 2, 24),) * 3, {}),
    ],
)  # fmt: skip
def test_errors_are_torchs_own(name, args, calls, options):
    ours, theirs, _ = twins(name, *args)
    if name == "MultiheadAttention":
        options = {"need_weights": False, **options}
    kinds = []
    for module in (theirs, ours):
        with pytest.raises(Exception) as caught:
            module(*(torch.randn(shape) for shape in calls), **options)
        kinds.append((caught.type, str(caught.value)))
    assert kinds[0] == kinds[1]
    with pytest.raises(RuntimeError):
        twins("Linear", 24, 8)[0](torch.randn(3, 24).bfloat16())


LAYERS = [
    {"activation": "relu"},
    {"activation": "gelu", "norm_first": True},
    {"activation": F.silu, "bias": False},
    {"activation": nn.GELU(approximate="tanh"), "norm_first": True, "layer_norm_eps": 0.1},
    {"activation": torch.tanh},
]
LAYER_NAMES = ["relu", "gelu", "silu", "gelu_tanh", "tanh"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("options", LAYERS, ids=LAYER_NAMES)
def test_encoder_layer(isa, strict, options, batch_first, dtype):
    if dtype != torch.float32 and options["activation"] == "relu":  # where rounding turns a unit off, gradients jump
        options = {**options, "activation": "gelu"}
    modules = twins("TransformerEncoderLayer", 24, 3, 40, 0.0, batch_first=batch_first, dtype=dtype, **options)
    x = tokens(2, 9, 24, batch_first, dtype)
    before = native_calls()
    compare(modules, [x])
    ran = {op: n - before[op] for op, n in native_calls().items() if n != before[op]}
    fused = options["activation"] is not torch.tanh
    assert ran["attention"] == ran["attention_backward"] == 1 and ran["add_layer_norm"] == 2
    assert ran.get("ffn", 0) == fused and ran["linear"] == (2 if fused else 4)
    compare(modules, [x], src_key_padding_mask=PADDING)
    compare(modules, [x], src_mask=CAUSAL, is_causal=True)
    compare(modules, [x], src_mask=torch.randn(9, 9).to(dtype), src_key_padding_mask=torch.randn(2, 9).to(dtype))
    for module in modules:
        module.eval()
    with torch.no_grad():
        exact = modules[2](x.double(), src_key_padding_mask=PADDING)
        a, b = (m(x, src_key_padding_mask=PADDING) for m in modules[:2])
    assert_as_accurate(a, b, exact)


def test_dropout_in_training_is_that_of_torch():
    """In torch's own layout the same random numbers reach the same elements."""
    for norm_first in (False, True):
        ours, theirs, _ = twins("TransformerEncoderLayer", 24, 3, 40, 0.3, norm_first=norm_first)
        x = torch.randn(9, 2, 24)
        results = []
        for module in (ours, theirs):
            torch.manual_seed(7)
            out = module(x)
            out.square().sum().backward()
            results.append([out, *(p.grad for p in module.parameters())])
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
    before = counted("scaled_dot_product_attention: dropout")
    ours(x)
    assert counted("scaled_dot_product_attention: dropout") == before + 1
    ours.eval()(x)
    assert counted("scaled_dot_product_attention: dropout") == before + 1
    mlp = fast.MLP(8, 16, drop=0.5)
    assert (mlp(torch.randn(100, 8)) == 0).float().mean() > 0.3


def test_same_seed_same_parameters_and_checkpoints_both_ways():
    for name, args, options in (
        ("LayerNorm", ((4, 6),), {}),
        ("RMSNorm", (24,), {}),
        ("Linear", (24, 8), {}),
        ("MultiheadAttention", (24, 3), {"add_bias_kv": True}),
        ("MultiheadAttention", (24, 3), {"kdim": 12}),
        ("TransformerEncoderLayer", (24, 3, 40), {"norm_first": True}),
    ):
        torch.manual_seed(1)
        theirs = getattr(nn, name)(*args, **options)
        torch.manual_seed(1)
        ours = getattr(fast, name)(*args, **options)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for a, b in zip(ours.parameters(), theirs.parameters()):
            assert torch.equal(a, b)
        theirs.load_state_dict(ours.state_dict())
        assert isinstance(ours, type(theirs))
        again = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
        assert type(again) is type(ours) and repr(again) == repr(ours)


def test_a_stack_in_torchs_encoder_trains_as_torchs(strict):
    """nn.TransformerEncoder of llmfast's layers: losses over steps of SGD, as exact as torch's. (AdamW's first steps go by
    signs, so that gradients that are zero but for rounding would decide.)"""
    losses = []
    for module, dtype in ((fast, torch.float32), (nn, torch.float32), (nn, torch.float64)):
        torch.manual_seed(0)
        layer = module.TransformerEncoderLayer(24, 3, 40, 0.0, batch_first=True)
        model = nn.TransformerEncoder(layer, 2, norm=module.LayerNorm(24), enable_nested_tensor=False).to(dtype)
        x = torch.randn(2, 9, 24).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        losses.append([])
        for _ in range(5):
            loss = model(x, mask=CAUSAL, is_causal=True).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    ours, theirs, exact = torch.tensor(losses, dtype=torch.float64)
    assert exact[-1] < 0.9 * exact[0], "it trains"
    assert_as_accurate(ours, theirs, exact)


@pytest.mark.parametrize("norm_first", [False, True])
def test_padded_batches_in_the_fast_path_of_torchs_encoder(strict, norm_first):
    """There, torch's encoder hands its layers a nested tensor, and pads what comes out with zeros."""
    options = {"batch_first": True, "norm_first": norm_first}
    ours, theirs, exact = twins("TransformerEncoderLayer", 24, 4, 40, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: nested tensors are a prototype; and not for norm_first in its encoder
        ours, theirs, exact = (nn.TransformerEncoder(m, 2).eval() for m in (ours, theirs, exact))
        x = torch.randn(2, 9, 24)
        before = native_calls()
        with torch.no_grad():
            a, b = (m(x, src_key_padding_mask=PADDING) for m in (ours, theirs))
            truth = exact(x.double(), src_key_padding_mask=PADDING)
        assert_as_accurate(a, b, truth)
        ran = {op: n - before[op] for op, n in native_calls().items()}
        assert ran["attention"] == ran["ffn"] == 2 and ran["add_layer_norm"] == 4
        nested = torch.nested.nested_tensor([torch.randn(5, 24), torch.randn(7, 24)])
        with torch.no_grad():
            results = [m.layers[0](nested) for m in (ours, theirs)]
        for one, other in zip(*(r.unbind() for r in results)):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_converting_a_model_and_back(strict):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 3, 40, 0.0, batch_first=True)
    net = nn.Sequential(
        nn.Linear(24, 24), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.RMSNorm(24), nn.Tanh()
    )
    x, keys = torch.randn(2, 9, 24), list(net.state_dict())
    expected = net(x)
    grads = torch.autograd.grad(expected.square().sum(), list(net.parameters()))
    parameters = list(net.parameters())
    converted = convert_modules(net)
    assert converted == ["0"] + [f"1.layers.{i}{part}" for i in range(2) for part in (
        "", ".self_attn", ".linear1", ".linear2", ".norm1", ".norm2")] + ["2"]  # fmt: skip
    assert convert_modules(net) == []
    before = native_calls()
    out = net(x)
    mine = torch.autograd.grad(out.square().sum(), list(net.parameters()))
    ran = {op: n - before[op] for op, n in native_calls().items()}
    assert (ran["attention"], ran["ffn"], ran["add_layer_norm"], ran["add_rms_norm"], ran["linear"]) == (2, 2, 4, 1, 5)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine, grads, rtol=1e-4, atol=1e-4)
    assert list(net.state_dict()) == keys and all(a is b for a, b in zip(net.parameters(), parameters))
    assert revert_modules(net) == converted and revert_modules(net) == []
    assert torch.equal(net(x), expected) and type(net[0]) is nn.Linear
    assert convert_modules(nn.MultiheadAttention(8, 2)) == [""]  # the module itself; its out_proj is a subclass


def test_replaced_and_hooked_parts_of_a_layer_are_called(strict):
    ours, theirs, _ = twins("TransformerEncoderLayer", 24, 3, 40, 0.0, batch_first=True)
    x, seen = torch.randn(2, 9, 24), []
    for layer in (ours, theirs):
        for name in ("linear1", "linear2", "norm1", "norm2", "self_attn"):
            getattr(layer, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert seen[:5] == seen[5:] == ["self_attn", "norm1", "linear1", "linear2", "norm2"]

    ours, theirs, _ = twins("TransformerEncoderLayer", 24, 3, 40, 0.0, batch_first=True)
    for layer in (ours, theirs):
        layer.linear1 = nn.Sequential(copy.deepcopy(theirs.linear1), nn.LayerNorm(40))
        nn.utils.parametrizations.weight_norm(layer.linear2)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_low_precision_under_autocast(strict):
    ours, theirs, exact = twins("TransformerEncoderLayer", 24, 3, 40, 0.0, batch_first=True)
    x = torch.randn(2, 9, 24)
    for options in ({}, {"src_key_padding_mask": PADDING}, {"src_mask": torch.randn(9, 9)}):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            a, b = ours(x, **options), theirs(x, **options)
        assert a.dtype == b.dtype
        wide = {k: v.double() if v.is_floating_point() else v for k, v in options.items()}
        assert_as_accurate(a, b, exact(x.double(), **wide))
        a.square().sum().backward()
    mha, reference, _ = twins("MultiheadAttention", 24, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mha(x, x, x, need_weights=False)[0].dtype == reference(x, x, x, need_weights=False)[0].dtype
        for name in ("LayerNorm", "RMSNorm", "Linear"):
            module, other, _ = twins(name, *((24, 8) if name == "Linear" else (24,)))
            assert module(x).dtype == other(x).dtype


def model():
    layer = fast.TransformerEncoderLayer(24, 3, 40, 0.0, batch_first=True, norm_first=True)
    return nn.Sequential(fast.Linear(24, 24), layer, fast.RMSNorm(24), fast.MLP(24, 40))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(strict, dynamic):
    net, x = model(), torch.randn(2, 9, 24)
    expected = net(x)
    grads = torch.autograd.grad(expected.square().sum(), list(net.parameters()))
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic)
    before = native_calls()["attention"]
    out = compiled(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), list(net.parameters())), grads, rtol=1e-4, atol=1e-4
    )
    assert native_calls()["attention"] > before


@pytest.mark.parametrize("name", ["padding", "causal", "both", "causal and padding"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_compile_with_masks(strict, name, batch_first):
    mha, x = fast.MultiheadAttention(24, 3, batch_first=batch_first), tokens(2, 9, 24, batch_first)

    def attend(x):
        return mha(x, x, x, need_weights=False, **MASKS[name])[0]

    torch.testing.assert_close(torch.compile(attend, fullgraph=True)(x), attend(x), rtol=1e-4, atol=1e-5)


def test_export(strict):
    net, x = model().eval(), torch.randn(2, 9, 24)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("B"), 1: torch.export.Dim("T")},))
    for sample in (x, torch.randn(3, 17, 24)):
        torch.testing.assert_close(program.module()(sample), net(sample), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(strict, use_reentrant):
    net, x = model(), torch.randn(2, 9, 24, requires_grad=True)
    net(x).square().sum().backward()
    expected, x.grad = x.grad, None
    torch.utils.checkpoint.checkpoint(net, x, use_reentrant=use_reentrant).square().sum().backward()
    assert torch.equal(x.grad, expected)


def test_functional_transforms(strict):
    """Gradients of each sample on its own, as in torch's tutorial; and the Jacobian."""
    net, x = model(), torch.randn(3, 5, 24)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters, sample):
        return torch.func.functional_call(net, parameters, (sample[None],)).square().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: loops where an op has no batching rule
        per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        vmapped = torch.func.grad(lambda p: torch.vmap(loss, in_dims=(None, 0))(p, x).sum())(parameters)
        jacobian = torch.func.jacrev(lambda row: net(row[None, None])[0, 0, :3])(x[0, 0])
    total = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    for grads, expected, whole in zip(per_sample.values(), total, vmapped.values()):
        torch.testing.assert_close(grads.sum(0), expected, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-3)
    row = x[0, 0].clone().requires_grad_()
    expected = torch.stack([torch.autograd.grad(net(row[None, None])[0, 0, i], row)[0] for i in range(3)])
    torch.testing.assert_close(jacobian, expected, rtol=1e-4, atol=1e-4)


def of_torch(net):
    """What `model` made, of torch's modules and the same values."""
    net = copy.deepcopy(net)
    revert_modules(net)
    mlp = net[3]
    return nn.Sequential(*net[:3], nn.Sequential(mlp.fc1, nn.GELU(), mlp.fc2))


def test_gradients_by_graphs_that_outlive_a_transform(strict):
    """`torch.func.vjp`, ``is_grads_batched`` and vectorized Jacobians have backward passes outside of the transform, over
    tensors without memory of their own."""
    net, x = model(), torch.randn(2, 3, 24)
    cotangents = torch.randn(4, 2, 3, 24)

    def results(net):
        leaf = x.clone().requires_grad_()
        leaves = [leaf, *net.parameters()]
        yield torch.func.vjp(net, x)[1](cotangents[0])[0]
        yield from torch.autograd.grad(net(leaf), leaves, cotangents, is_grads_batched=True)
        yield torch.autograd.functional.jacobian(net, x[:1, :1], vectorize=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: loops where an op has no batching rule
        for ours, theirs in zip(results(net), results(of_torch(net)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grad", [False, True])
def test_jit_trace(strict, grad):
    """Results of native code are no constants of the trace, also where something else depends on the input."""
    net = model()
    plain = of_torch(net)

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return x + self.net(x)

    with warnings.catch_warnings(), torch.set_grad_enabled(grad):
        warnings.simplefilter("ignore")  # torch: about checks of shapes, and that tracing is deprecated
        traced = torch.jit.trace(Residual(), torch.randn(2, 3, 24))
    x = torch.randn(3, 5, 24, requires_grad=True)
    weight = torch.randn(3, 5, 24)
    expected = x + plain(x)
    grads = torch.autograd.grad(expected, [x, *plain.parameters()], weight)
    actual = traced(x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.autograd.grad(actual, [x, *net.parameters()], weight), grads, rtol=1e-4, atol=1e-3)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(24, 4, 40, dropout=0.0, batch_first=True)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.norms = nn.Sequential(nn.LayerNorm(24), nn.RMSNorm(24), nn.Linear(24, 24))

    def forward(self, x):
        x = self.layer(x)
        return self.norms(x + self.attention(x, x, x, need_weights=False)[0])


def test_symbolic_trace(strict):
    """torch.fx: modules stay whole, as torch's own do."""
    net, x = Mixed(), torch.randn(2, 5, 24)
    converted = copy.deepcopy(net)
    convert_modules(converted)
    graph = torch.fx.symbolic_trace(converted)
    calls = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert calls == ["layer", "attention", "norms.0", "norms.1", "norms.2"]
    torch.testing.assert_close(graph(x), net(x))
    for root in (fast.MLP(24, 40), nn.Sequential(fast.MLP(24, 40), fast.Linear(24, 7))):
        torch.testing.assert_close(torch.fx.symbolic_trace(root)(x), root(x))


def test_meta_tensors():
    """Shapes without memory, by which large models are planned."""
    net = model().to("meta")
    out = net(torch.empty(2, 3, 24, device="meta"))
    out.sum().backward()
    assert out.is_meta and out.shape == (2, 3, 24)
    assert all(p.grad.is_meta and p.grad.shape == p.shape for p in net.parameters())


def test_forward_mode_derivatives_are_torchs():
    x = torch.randn(2, 5, 24)
    ours, theirs, _ = twins("LayerNorm", 24)
    for a, b in zip(torch.func.jvp(ours, (x,), (x + 1,)), torch.func.jvp(theirs, (x,), (x + 1,))):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_weights_are_torchs():
    linear, x = nn.Linear(24, 8), torch.randn(5, 24)
    linear.weight = nn.Parameter(linear.weight.detach().to_sparse_csr(), requires_grad=False)
    expected = linear(x)
    convert_modules(linear)
    assert torch.equal(linear(x), expected)


def test_arguments_have_torchs_names():
    for theirs, ours in TWINS.items():
        assert list(inspect.signature(ours.forward).parameters) == list(inspect.signature(theirs.forward).parameters)


def test_public_names():
    for name in ("LayerNorm", "RMSNorm", "Linear", "MLP", "MultiheadAttention", "TransformerEncoderLayer"):
        assert name in llmfast.nn.__all__ and getattr(llmfast.nn, name).__doc__


def flops_of(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_flop_counter_counts_as_in_torch():
    """Forward and backward of modules, against torch's counts for the same modules."""
    for module, x in (
        (nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 7)), torch.randn(3, 5, 12)),
        (nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), torch.randn(2, 8)),
    ):
        ours = copy.deepcopy(module)
        assert convert_modules(ours)
        for inputs in (x, x.clone().requires_grad_()):
            expected = flops_of(lambda m=module, i=inputs: m(i).sum().backward())
            assert flops_of(lambda m=ours, i=inputs: m(i).sum().backward()) == expected > 0
    B, H, T, D, F, V = 2, 4, 6, 8, 24, 11
    q, k, v = (torch.randn(B, n, T, D, requires_grad=True) for n in (H, 2, 2))
    assert flops_of(lambda: llmfast.attention(q, k, v, causal=True).sum().backward()) == 2 * B * H * T * T * D * 7
    rows, bounds = torch.randn(3, 7, 2, D), torch.tensor([0, 3, 7])
    assert flops_of(lambda: llmfast.varlen_attention(*rows, bounds, bounds)) == 2 * 2 * (9 + 16) * D * 2
    x, up, gate, down = (torch.randn(*s, requires_grad=True) for s in ((T, D), (F, D), (F, D), (D, F)))
    gated = lambda: llmfast.ffn(x, up, None, down, None, activation="silu", gate_weight=gate)  # noqa: E731
    assert flops_of(lambda: gated().sum().backward()) == 9 * 2 * T * D * F
    weight, target = torch.randn(V, D, requires_grad=True), torch.randint(V, (T,))
    assert flops_of(lambda: llmfast.linear_cross_entropy(x, weight, target).backward()) == 3 * 2 * T * D * V
