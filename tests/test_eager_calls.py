"""Whole native calls (csrc/bindings/eager.h) against the long way through Python: same values, layouts and gradients."""

import importlib
import pickle
import re
import threading
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import llmfast
from llmfast import backend

MODULES = ("attention", "embedding", "ffn", "linear", "linear_cross_entropy", "norm", "rotary", "sdpa")
WHOLE_CALLS = (
    "add_norm",
    "attention",
    "embedding",
    "ffn",
    "linear",
    "linear_cross_entropy",
    "rotary_pair",
    "scaled_dot_product_attention",
    "varlen_attention",
)

B, H, T, D, C, V = 2, 4, 3, 8, 16, 11


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype)


def heads(layout: str, H: int = H, T: int = T, dtype=torch.float32):
    order = {"BHTD": (0, 1, 2, 3), "BTHD": (0, 2, 1, 3), "TBHD": (2, 0, 1, 3)}[layout]
    sizes = (B, H, T, D)
    return randn(*(sizes[i] for i in order), dtype=dtype).permute(*(order.index(i) for i in range(4)))


def norm_cases():
    bf16 = torch.bfloat16
    x, stream, w = randn(B, T, C), randn(B, T, C), randn(C)
    yield "layer", llmfast.add_layer_norm, (x, stream, w, w + 1), {}
    yield "layer, no residual", llmfast.add_layer_norm, (x, None, w, None), {}
    yield "layer, no weights", llmfast.add_layer_norm, (x, stream, None, None), {}
    yield "layer, mixed", llmfast.add_layer_norm, (x.to(bf16), stream, w, w), {"out_dtype": bf16}
    yield "layer, one row", llmfast.add_layer_norm, (randn(C), randn(C), w, w), {}
    yield "rms", llmfast.add_rms_norm, (x, stream, w), {}
    yield "rms, no residual", llmfast.add_rms_norm, (x.to(bf16), None, w.to(bf16)), {}
    yield "rms, row stride", llmfast.add_rms_norm, (randn(B, T, 2 * C)[..., :C], None, w), {}


def product_cases():
    x, w = randn(B, T, C), randn(V, C)
    target = torch.tensor([[1, -100, 3], [0, 10, -100]])
    up, down = randn(24, C), randn(C, 24)
    yield "linear", llmfast.linear, (x, w, randn(V)), {}
    yield "linear, vector", llmfast.linear, (x[0, 0], w), {}
    yield "linear, transposed weight", llmfast.linear, (x, randn(C, V).t()), {}
    yield "ffn", llmfast.ffn, (x, up, randn(24), down, randn(C)), {}
    yield "ffn, gated", llmfast.ffn, (x, up, None, down, None), {"activation": "silu", "gate_weight": randn(24, C)}
    for reduction in ("mean", "sum", "none"):
        yield f"loss, {reduction}", llmfast.linear_cross_entropy, (x, w, target), {"reduction": reduction}
    yield "loss, all ignored", llmfast.linear_cross_entropy, (x, w, target * 0 + 4), {"ignore_index": 4}


def attention_cases():
    q, kv = heads("BHTD"), lambda layout="BHTD": (heads(layout, 2), heads(layout, 2))
    yield "attention", llmfast.attention, (q, *kv()), {"causal": True}
    for layout in ("BTHD", "TBHD"):
        yield f"attention, {layout}", llmfast.attention, (heads(layout), *kv(layout)), {"causal": True, "scale": 0.3}
    yield "attention, one token", llmfast.attention, (heads("BTHD", T=1), *kv()), {"causal": True}
    yield "attention, window", llmfast.attention, (q, *kv()), {"window": 2, "softcap": 5}
    yield "attention, two sides", llmfast.attention, (q, *kv()), {"window": (-1, 1)}
    yield "attention, mask", llmfast.attention, (q, *kv()), {"mask": torch.rand(B, 1, 1, T) > 0.3}
    yield "attention, bias", llmfast.attention, (q, *kv()), {"mask": randn(H, 1, T)}
    sdpa = llmfast.scaled_dot_product_attention
    yield "sdpa", sdpa, (q, heads("BTHD"), heads("BTHD", T=T)), {"is_causal": True}
    yield "sdpa, more keys", sdpa, (heads("BHTD", T=2), q, q.clone()), {"is_causal": True}
    yield "sdpa, groups", sdpa, (q, *kv()), {"enable_gqa": True, "attn_mask": torch.ones(T, T, dtype=torch.bool).tril()}
    packed, bounds = (randn(7, H, D), randn(7, 2, D), randn(7, 2, D)), torch.tensor([0, 3, 3, 7])
    yield "packed", llmfast.varlen_attention, (*packed, bounds, bounds), {"causal": True}
    yield "packed, int32", llmfast.varlen_attention, (*packed, bounds.int(), bounds.int()), {"window": 2}


def lookup_cases():
    ids, table, positions = torch.randint(V, (B, T)), randn(V, C), randn(5, C)
    yield "embedding", llmfast.embedding, (ids, table), {}
    yield "embedding, positions", llmfast.embedding, (ids, table, positions), {"out_dtype": torch.bfloat16}
    yield "embedding, ids", llmfast.embedding, (ids.int(), table, positions, torch.tensor([4, 0, 1])), {}
    cos, sin = llmfast.rotary_tables(T, D)
    for layout in ("BHTD", "BTHD", "TBHD"):
        yield f"rotary, {layout}", llmfast.rotary, (heads(layout), heads(layout, 2), cos, sin), {}
    one = llmfast.rotary_tables(torch.tensor([[5], [9]]), D)
    yield "rotary, one token", llmfast.rotary, (heads("BTHD", T=1), heads("BTHD", 2, T=1), *one), {}
    doubled = [torch.cat((t, t), -1) for t in llmfast.rotary_tables(T, D)]
    yield "rotary, doubled", llmfast.rotary, (heads("BHTD"), heads("BHTD", 2), *doubled), {}
    part = [torch.cat((t, t), -1)[None] for t in llmfast.rotary_tables(T, D // 2)]
    yield "rotary, part", llmfast.rotary, (heads("BHTD"), heads("BHTD", 2), *part), {"rotary_dim": D // 2}


def cases():
    torch.manual_seed(0)
    for group in (norm_cases, product_cases, attention_cases, lookup_cases):
        yield from group()


CASES = {name: case for name, *case in cases()}
both = pytest.mark.parametrize("name", CASES)


class Watched:
    """A native module, with a note of the whole calls that it took and of those that it left to Python."""

    def __init__(self, module):
        self.module, self.calls, self.refused = module, [], set()

    def __getattr__(self, name):
        function = getattr(self.module, name)
        if name not in WHOLE_CALLS and not name.endswith("_gradient"):
            return function

        def noted(*args):
            answer = function(*args)
            self.calls.append(name)
            if answer is None:
                self.refused.add(name)
            return answer

        return noted


@pytest.fixture
def watched(monkeypatch):
    module = Watched(backend.native())
    monkeypatch.setattr(backend, "_native", module)
    return module


def results(function, arguments, options):
    out = function(*arguments, **options)
    return out if isinstance(out, tuple) else (out,)


def differentiated(function, arguments, options):
    floating = [isinstance(a, torch.Tensor) and a.is_floating_point() for a in arguments]
    arguments = [a.detach().requires_grad_() if f else a for a, f in zip(arguments, floating)]
    leaves = [a for a, f in zip(arguments, floating) if f]
    out = results(function, arguments, options)
    torch.manual_seed(1)
    grads = [torch.empty_like(o).normal_() for o in out]
    return out, torch.autograd.grad(out, leaves, grads, allow_unused=True)


def assert_same(given, expected):
    assert len(given) == len(expected)
    for a, b in zip(given, expected):
        if a is None or b is None:
            assert a is b
            continue
        assert a.dtype == b.dtype and a.shape == b.shape
        assert [s for s, n in zip(a.stride(), a.shape) if n > 1] == [s for s, n in zip(b.stride(), b.shape) if n > 1]
        torch.testing.assert_close(a, b, equal_nan=True)


@both
def test_whole_calls_agree_with_the_long_way(name, watched, monkeypatch):
    out, (graph_out, grads) = results(*CASES[name]), differentiated(*CASES[name])
    assert watched.calls and not watched.refused
    watched.calls.clear()
    for module in MODULES:
        monkeypatch.setattr(importlib.import_module(f"llmfast.ops.{module}"), "whole_calls", lambda _: None)
    assert_same(out, results(*CASES[name]))
    expected, expected_grads = differentiated(*CASES[name])
    assert_same(graph_out, expected)
    assert_same(grads, expected_grads)
    assert not watched.calls


@both
def test_checkpoint_and_modes_reach_the_gradient(name):
    function, arguments, options = CASES[name]
    names = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    def run(*tensors):
        return sum(o.float().sum() for o in results(function, tensors, options))

    leaves = [
        a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments
    ]
    checkpoint(run, *leaves, use_reentrant=False).backward()
    with Mode():
        run(*leaves).backward()
    assert any(n.startswith("llmfast") for n in names)


@both
def test_no_second_derivative(name):
    function, arguments, options = CASES[name]
    floating = [isinstance(a, torch.Tensor) and a.is_floating_point() for a in arguments]
    arguments = [a.detach().requires_grad_() if f else a for a, f in zip(arguments, floating)]
    leaf = arguments[floating.index(True)]
    loss = sum((o.float() ** 2).sum() for o in results(function, arguments, options) if o is not leaf)
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad((grad**2).sum(), leaf)


@both
def test_saved_tensors_may_come_back_with_other_strides(name):
    function, arguments, options = CASES[name]
    expected = differentiated(function, arguments, options)[1]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: torch.stack((t, t), -1)[..., 0]):
        given = differentiated(function, arguments, options)[1]
    for a, b in zip(given, expected):
        torch.testing.assert_close(a, b, equal_nan=True)


def imaginary(t: torch.Tensor) -> torch.Tensor:
    """The same numbers, whose memory holds them with the other sign."""
    negated = torch.complex(t, -t).conj().imag
    assert negated.is_neg()
    return negated


@both
def test_lazily_negated_tensors(name):
    function, arguments, options = CASES[name]
    lazy = [
        imaginary(a) if isinstance(a, torch.Tensor) and a.dtype == torch.float32 and a.numel() > 1 else a
        for a in arguments
    ]
    out, expected = results(function, lazy, options), results(function, arguments, options)
    for a, b in zip(out, expected):
        torch.testing.assert_close(a, b, equal_nan=True)
    for a, b in zip(differentiated(function, lazy, options)[1], differentiated(function, arguments, options)[1]):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_a_lazily_negated_gradient():
    x, w, grad = randn(B, C).requires_grad_(), randn(V, C), randn(B, V)
    llmfast.linear(x, w).backward(imaginary(grad))
    torch.testing.assert_close(x.grad, grad @ w)


def test_zero_tensors_have_no_memory():
    zero, w = torch._efficientzerotensor((B, C)), randn(V, C)
    assert torch.equal(llmfast.linear(zero, w), torch.zeros(B, V))
    assert torch.equal(llmfast.add_rms_norm(zero, None, None)[0], torch.zeros(B, C))


@both
def test_no_forward_mode_derivative(name):
    function, arguments, options = CASES[name]
    floating = [isinstance(a, torch.Tensor) and a.is_floating_point() for a in arguments]
    leaf = arguments[floating.index(True)]
    with forward_ad.dual_level():
        results(function, arguments, options)
        dual = forward_ad.make_dual(leaf, torch.ones_like(leaf))
        with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
            function(*(dual if a is leaf else a for a in arguments), **options)
    with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        call = lambda x: results(function, [x if a is leaf else a for a in arguments], options)  # noqa: E731
        torch.func.jvp(call, (leaf,), (torch.ones_like(leaf),))


@both
def test_symbolic_trace(name):
    """torch.fx: the graph calls the op, whichever of its tensors the graph makes."""
    function, arguments, options = CASES[name]
    expected = results(function, arguments, options)
    for i, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            traced = torch.fx.symbolic_trace(lambda x: function(*arguments[:i], x, *arguments[i + 1 :], **options))  # noqa: B023
            assert function in [node.target for node in traced.graph.nodes]
            out = pickle.loads(pickle.dumps(traced))(argument)
            assert_same(out if isinstance(out, tuple) else (out,), expected)


def test_no_forward_mode_derivative_of_a_gradient():
    x, w = randn(B, C).requires_grad_(), randn(V, C)
    out = llmfast.linear(x, w)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="linear_backward has no forward-mode"):
        torch.autograd.grad(out, x, forward_ad.make_dual(torch.ones(B, V), torch.ones(B, V)))


@pytest.mark.filterwarnings("ignore:.*(beta|prototype).*")
def test_tensors_that_are_not_dense_are_named():
    x, w = randn(B, C), randn(V, C)
    nested = torch.nested.nested_tensor([randn(2, C), randn(3, C)])
    for name, kind, call in (
        ("x", "a tensor of layout torch.sparse_coo", lambda: llmfast.linear(x.to_sparse(), w)),
        ("weight", "a tensor of layout torch.sparse_csr", lambda: llmfast.linear(x, w.to_sparse_csr())),
        ("x", "a nested tensor", lambda: llmfast.linear(nested, w)),
        ("x", "a nested tensor", lambda: llmfast.add_layer_norm(nested, None, None, None)),
        ("q", "a tensor of layout torch.sparse_coo", lambda: llmfast.attention(*[heads("BHTD").to_sparse()] * 3)),
        ("input_ids", "a tensor of layout", lambda: llmfast.embedding(torch.ones(3).long().to_sparse(), w)),
    ):
        with pytest.raises(TypeError, match=f"{name}: got {kind}.*, expected a dense one"):
            call()


def test_shapes_without_data():
    x, w = torch.empty(B, C, device="meta"), torch.empty(V, C, device="meta")
    q = torch.empty(B, H, T, D, device="meta")
    assert llmfast.linear(x, w).shape == (B, V)
    assert llmfast.ffn(x, w, None, w.t(), None).shape == (B, C)
    assert llmfast.attention(q, q, q).shape == llmfast.scaled_dot_product_attention(q, q, q).shape == q.shape
    assert llmfast.linear_cross_entropy(x, w, torch.empty(B, dtype=torch.int64, device="meta")).shape == ()


def test_new_threads_take_torchs_number_of_threads():
    before, seen = torch.get_num_threads(), []
    x, w = randn(B, C), randn(V, C)

    def call():
        llmfast.linear(x, w)
        seen.append(backend.native().max_threads())

    torch.set_num_threads(before + 1)  # a thread of its own would start with OpenMP's default
    try:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert seen == [before + 1]


def test_outputs_are_ordinary_tensors():
    x, w = randn(B, C), randn(V, C)
    with torch.inference_mode():
        assert llmfast.linear(x, w).is_inference()
    with torch.device("meta"):
        assert llmfast.linear(x, w).is_cpu
    out = llmfast.linear(x, w.requires_grad_())
    out.mul_(2).sum().backward()
    torch.testing.assert_close(w.grad, 2 * x.sum(0).expand(V, C))
    assert not llmfast.linear(x, w.detach()).requires_grad
    out.untyped_storage().resize_(0)  # as sharded training does with memory that it no longer needs
    assert out.untyped_storage().nbytes() == 0


def mapping_flags(address: int) -> list[str]:
    """The kernel's flags of this process's mapping that holds `address`."""
    within = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            within = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif within and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("no mapping there")


def test_large_outputs_ask_for_large_pages():
    x, weight = torch.randn(6000, 64), torch.randn(2000, 64)
    out = llmfast.ops.linear(x, weight)  # 46 MiB
    torch.testing.assert_close(out, torch.nn.functional.linear(x, weight))
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        assert "hg" in mapping_flags(out.data_ptr() + out.nbytes // 2)
