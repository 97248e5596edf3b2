"""What calling an op costs: microseconds a call on tensors too small to matter, llmfast / PyTorch.

    python benchmarks/calls.py [op ...] [--device cuda] [--dtype bfloat16]

Each figure is the least of many short samples, the two interleaved, on one thread; "graph" is forward and backward with
every floating input requiring a gradient. PyTorch's side is its own op where it has one, else the usual composition.
On a GPU it is the time of the host, which enqueues work and does not wait for it: the queue is empty before each sample.
"""

import argparse
import time
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F

import llmfast
from llmfast import backend

SECONDS, CALLS = 1.5, 30
# B, H, T, D, C, FFN, V; a GPU's fill the rows that Hopper's kernels want.
SIZES = {"cpu": (2, 2, 4, 8, 16, 32, 32), "cuda": (2, 2, 32, 64, 128, 256, 256)}


def operations(device: str, dtype: torch.dtype):
    """Yields (name, llmfast's call, PyTorch's call, floating inputs)."""
    B, H, T, D, C, FFN, V = SIZES[device]
    randn = partial(torch.randn, device=device, dtype=dtype)
    x, stream, w, b = randn(B, T, C), randn(B, T, C), randn(C, C), randn(C)
    q, k, v = (randn(1, H, T, D) for _ in range(3))
    packed = tuple(randn(T, H, D) for _ in range(3))
    bounds, mask = torch.tensor([0, T], device=device), torch.ones(T, T, dtype=torch.bool, device=device)
    ids, target = torch.randint(V, (B, T), device=device), torch.randint(V, (B, T), device=device)
    cos, sin = llmfast.rotary_tables(torch.arange(T, device=device), D)
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
    yield "attention_decode", lambda *t: llmfast.attention(*t, causal=True), sdpa, (q[:, :, :1].clone(), k, v)
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
        lambda x, w: F.cross_entropy(F.linear(x, w).view(-1, V).float(), target.view(-1)),
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


def least(functions, wait) -> list[float]:
    def microseconds(function) -> float:
        wait()
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op", nargs="*", help="default: all")
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    wait = torch.cuda.synchronize if wanted.device == "cuda" else lambda: None
    before = backend.fallbacks()
    print(f"{'op':30}{'no gradient':>18}{'graph':>18}")
    for name, ours, theirs, inputs in operations(wanted.device, getattr(torch, wanted.dtype)):
        if wanted.op and name not in wanted.op:
            continue
        figures = []
        for gradient in (False, True):
            with nullcontext() if gradient else torch.no_grad():
                prepare = with_gradient if gradient else without_gradient
                figures += least([prepare(ours, inputs), prepare(theirs, inputs)], wait)
        print(f"{name:30}{figures[0]:9.1f} /{figures[1]:7.1f}{figures[2]:9.1f} /{figures[3]:7.1f}", flush=True)
    if backend.fallbacks() != before:
        print("fell back:", backend.fallbacks())


if __name__ == "__main__":
    main()
