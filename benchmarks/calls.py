"""What calling an op costs: microseconds a call on tensors too small to matter, llmfast / PyTorch.

    python benchmarks/calls.py [op ...]

Each figure is the least of many short samples, the two interleaved, on one thread; "graph" is forward and backward with
every floating input requiring a gradient. PyTorch's side is its own op where it has one, else the usual composition.
"""

import sys
import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F

import llmfast

SECONDS, CALLS = 1.5, 30
B, H, T, D, C, FFN, V = 2, 2, 4, 8, 16, 32, 32


def operations():
    """Yields (name, llmfast's call, PyTorch's call, floating inputs)."""
    randn = torch.randn
    x, stream, w, b = randn(B, T, C), randn(B, T, C), randn(C, C), randn(C)
    q, k, v = (randn(1, H, T, D) for _ in range(3))
    packed = tuple(randn(T, H, D) for _ in range(3))
    bounds, mask = torch.tensor([0, T]), torch.ones(T, T, dtype=torch.bool)
    ids, target = torch.randint(V, (B, T)), torch.randint(V, (B, T))
    cos, sin = llmfast.rotary_tables(T, D)
    sdpa = F.scaled_dot_product_attention

    def torch_layer_norm(x, stream, w, b):
        summed = x + stream
        return F.layer_norm(summed, (C,), w, b), summed

    def torch_rms_norm(x, stream, w):
        summed = x + stream
        return F.rms_norm(summed, (C,), w), summed

    def torch_ffn(x, up, up_bias, down, down_bias):
        return F.linear(F.gelu(F.linear(x, up, up_bias), approximate="tanh"), down, down_bias)

    def rotate(x):
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    yield "linear", llmfast.linear, F.linear, (x, w, b)
    yield "add_layer_norm", llmfast.add_layer_norm, torch_layer_norm, (x, stream, b, b + 1)
    yield "add_rms_norm", llmfast.add_rms_norm, torch_rms_norm, (x, stream, b)
    yield "ffn", llmfast.ffn, torch_ffn, (x, randn(FFN, C), randn(FFN), randn(C, FFN), randn(C))
    yield "attention", lambda *t: llmfast.attention(*t, causal=True), lambda *t: sdpa(*t, is_causal=True), (q, k, v)
    yield "attention_mask", lambda *t: llmfast.attention(*t, mask=mask), lambda *t: sdpa(*t, attn_mask=mask), (q, k, v)
    yield (
        "scaled_dot_product_attention",
        lambda *t: llmfast.scaled_dot_product_attention(*t, is_causal=True),
        lambda *t: sdpa(*t, is_causal=True),
        (q, k, v),
    )
    yield (
        "varlen_attention",
        lambda *t: llmfast.varlen_attention(*t, bounds, bounds, causal=True),
        lambda *t: sdpa(*(a.transpose(0, 1) for a in t), is_causal=True),
        packed,
    )
    yield (
        "linear_cross_entropy",
        lambda x, w: llmfast.linear_cross_entropy(x, w, target),
        lambda x, w: F.cross_entropy(F.linear(x, w).view(-1, V), target.view(-1)),
        (x, randn(V, C)),
    )
    yield "rotary", lambda q, k: llmfast.rotary(q, k, cos, sin), lambda q, k: (rotate(q), rotate(k)), (q, k)
    yield "embedding", lambda w: llmfast.embedding(ids, w), lambda w: F.embedding(ids, w), (randn(V, C),)
    yield (
        "embedding_positions",
        lambda w, p: llmfast.embedding(ids, w, p),
        lambda w, p: F.embedding(ids, w) + p,
        (randn(V, C), randn(T, C)),
    )


def without_gradient(call, inputs):
    return lambda: call(*inputs)


def with_gradient(call, inputs):
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = call(*leaves)
    grads = [torch.ones_like(o) for o in out] if isinstance(out, tuple) else torch.ones_like(out)
    return lambda: torch.autograd.grad(call(*leaves), leaves, grads)


def least(functions) -> list[float]:
    def microseconds(function) -> float:
        start = time.perf_counter()
        for _ in range(CALLS):
            function()
        return (time.perf_counter() - start) / CALLS * 1e6

    for function in functions:
        microseconds(function)
    best, end = [float("inf")] * len(functions), time.time() + SECONDS
    while time.time() < end:
        best = [min(b, microseconds(function)) for b, function in zip(best, functions)]
    return best


def main(wanted: list[str]) -> None:
    torch.set_num_threads(1)
    print(f"{'op':30}{'no gradient':>18}{'graph':>18}")
    for name, ours, theirs, inputs in operations():
        if wanted and name not in wanted:
            continue
        figures = []
        for gradient in (False, True):
            with nullcontext() if gradient else torch.no_grad():
                prepare = with_gradient if gradient else without_gradient
                figures += least([prepare(ours, inputs), prepare(theirs, inputs)])
        print(f"{name:30}{figures[0]:9.1f} /{figures[1]:7.1f}{figures[2]:9.1f} /{figures[3]:7.1f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
