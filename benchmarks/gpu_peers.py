"""PyTorch's side of `gpu_ops.py`. Knows nothing of llmfast, so that torch.compile's cache can be filled while llmfast is
built: ``python benchmarks/gpu_peers.py`` does."""

from __future__ import annotations

import functools
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

BF16 = torch.bfloat16
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def add_layer_norm(x, stream, weight, bias):
    stream = stream + x
    return F.layer_norm(stream, stream.shape[-1:], weight, bias).to(x.dtype), stream


def ffn_gelu(x, up, up_bias, down, down_bias):
    return (F.linear(F.gelu(F.linear(x, up, up_bias), approximate="tanh"), down, down_bias),)


def ffn_swiglu(x, up, gate, down):
    return (F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down),)


def linear_cross_entropy(x, weight, target):
    return (F.cross_entropy(F.linear(x, weight).float(), target),)


def linear(x, weight):
    return (F.linear(x, weight),)


def sdpa(which: str, **options):
    grouped = options.pop("grouped", False)

    def run(q, k, v, *mask):
        with sdpa_kernel(BACKENDS[which]):
            return (F.scaled_dot_product_attention(q, k, v, *mask, enable_gqa=grouped, **options),)

    return run


@functools.cache
def compiled(function):
    return torch.compile(function, dynamic=False)


# The sizes that are timed, and compiled: (M, C, F or V)
NORM_SIZES = ((65536, 768), (16384, 4096))
GELU_SIZE, SWIGLU_SIZE, HEAD_SIZE = (65536, 768, 3072), (8192, 4096, 14336), (16384, 768, 50304)


def gelu_inputs():
    M, C, H = GELU_SIZE
    return _random((M, C), 1.0), _random((H, C)), _random((H,)), _random((C, H)), _random((C,))


def swiglu_inputs():
    M, C, H = SWIGLU_SIZE
    return _random((M, C), 1.0), _random((H, C)), _random((H, C)), _random((C, H))


def head_inputs():
    M, C, V = HEAD_SIZE
    return _random((M, C), 1.0), _random((V, C)), torch.randint(V, (M,), device="cuda")


def norm_inputs(M, C):
    return _random((M, C), 1.0), *(_random(shape, 1.0, torch.float32) for shape in ((M, C), (C,), (C,)))


def _random(shape, scale=0.02, dtype=BF16):
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def warm() -> None:
    """Compiles everything once, so that the next process finds it in the cache."""
    torch._functorch.config.donated_buffer = False
    jobs = [
        *((add_layer_norm, functools.partial(norm_inputs, *size), 4) for size in NORM_SIZES),
        (ffn_gelu, gelu_inputs, 5),
        (ffn_swiglu, swiglu_inputs, 4),
        (linear_cross_entropy, head_inputs, 2),
    ]
    for function, inputs, differentiable in jobs:
        begun = time.perf_counter()
        tensors = inputs()
        with torch.no_grad():
            compiled(function)(*tensors)
        leaves = [t.requires_grad_() for t in tensors[:differentiable]]
        outputs = compiled(function)(*leaves, *tensors[differentiable:])
        torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])
        torch.cuda.synchronize()
        print(f"{function.__name__}: {time.perf_counter() - begun:.0f} s", flush=True)
        del tensors, leaves, outputs
        torch.cuda.empty_cache()


if __name__ == "__main__":
    warm()
