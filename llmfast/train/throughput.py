"""What this machine can multiply, measured, so that a training run can say which share of it is used (MFU)."""

from __future__ import annotations

import time

import torch

from llmfast import ops

__all__ = ["measure_peak_flops"]

_SIZES = (512, 1024, 2048)  # small ones first: a slow machine gets its answer within the budget too
_GPU_SIZES = (2048, 4096, 8192)


@torch.no_grad()
def measure_peak_flops(dtype: torch.dtype, seconds: float = 0.5, device: torch.device | str = "cpu") -> float:
    """The best rate, in floating-point operations a second, of `llmfast.linear` on large square matrices of `dtype`.

    Takes about `seconds` on `device`, on the CPU with all of torch's threads. The operands are normal random numbers (a
    processor multiplies zeros faster than it multiplies data). This is the denominator of MFU: what llmfast's own
    product reaches on this machine, now; what else runs on the machine lowers it.

    Example:
        >>> mfu = tokens_per_s * model.config.flops_per_token(seq_len) / measure_peak_flops(torch.bfloat16)
    """
    generator = torch.Generator().manual_seed(0)
    end = time.perf_counter() + seconds
    best, device = 0.0, torch.device(device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    sizes = _GPU_SIZES if device.type == "cuda" else _SIZES
    for number, size in enumerate(sizes, 1):
        x, weight = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
        ops.linear(x, weight)  # first touch of buffers and threads
        wait(device)
        share = end - (len(sizes) - number) * seconds / len(sizes)
        while best == 0.0 or time.perf_counter() < share:
            start = time.perf_counter()
            ops.linear(x, weight)
            wait(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
        if time.perf_counter() + 2 * 2 * (2 * size) ** 3 / best > end:
            break  # the next size, twice, would overrun the budget
    return best
