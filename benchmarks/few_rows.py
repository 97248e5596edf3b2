"""Products of few to medium many rows with a weight ``[N, K]``: milliseconds, llmfast / PyTorch.

    python benchmarks/few_rows.py [--rows 1,4,8,16,32,64,128,256] [--sizes 768x3072,4096x4096,768x50257] [--backward]
                                  [--dtype bfloat16] [--threads 2] [--isa avx512bf16] [--seconds 1]

The two take turns, each twice in a row of which the second is timed, so that both find the weight as they left it. Shown
are medians, torch's time over ours, our arithmetic rate and the rate at which the weight is read. One thread's times are
of its processor, so that other load counts less. `--backward` times both gradient products alone. Errors against float64
are checked first, by the tests' rule.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from llmfast import backend

Call = Callable[[], torch.Tensor]


def products(M: int, K: int, N: int, dtype: torch.dtype, backward: bool):
    """Yields (name, our call, PyTorch's call, the same in float64)."""
    native = backend.native()
    x, weight, grad = torch.randn(M, K).to(dtype), (torch.randn(N, K) * K**-0.5).to(dtype), torch.randn(M, N).to(dtype)
    out, grad_x, grad_weight = torch.empty(M, N, dtype=dtype), torch.empty_like(x), torch.empty_like(weight)

    def ours(result: torch.Tensor, call: Callable, *arguments: torch.Tensor | None) -> Call:
        return lambda: call(*arguments) or result

    if not backward:
        forward = ours(out, native.linear_forward, out, x, weight, None)
        yield "forward", forward, lambda: F.linear(x, weight), lambda: F.linear(x.double(), weight.double())
        return
    to_x = ours(grad_x, native.linear_backward, grad_x, None, None, grad, x, weight)
    yield "grad_x", to_x, lambda: grad @ weight, lambda: grad.double() @ weight.double()
    to_weight = ours(grad_weight, native.linear_backward, None, grad_weight, None, grad, x, weight)
    yield "grad_weight", to_weight, lambda: grad.t() @ x, lambda: grad.double().t() @ x.double()


def check(ours: Call, theirs: Call, exact: Call) -> None:
    expected = exact()
    error, peer = ((f().double() - expected).abs().max().item() for f in (ours, theirs))
    allowed = 2 * peer + 1e-5 * max(1.0, expected.abs().max().item())
    if error > allowed:
        raise AssertionError(f"error {error:.3e}, PyTorch's {peer:.3e}, allowed {allowed:.3e}")


def medians(calls: list[Call], seconds: float) -> list[float]:
    """Seconds a call, interleaved until `seconds` are over, at least five times."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    samples: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[0]) < 5:
        for call, times in zip(calls, samples, strict=True):
            call()
            begin = clock()
            call()
            times.append(clock() - begin)
    return [statistics.median(times) for times in samples]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,4,8,16,32,64,128,256")
    parser.add_argument("--sizes", default="768x3072,4096x4096,768x50257", help="KxN, ...")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", help="cap; default: the best")
    parser.add_argument("--seconds", type=float, default=1.0, help="a product")
    parser.add_argument("--backward", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    isa = options.isa or backend.native().active_isa()
    print(f"{isa}, {options.threads} threads, {options.dtype}, torch {torch.__version__}")
    print("product          M      K      N    ours ms   torch ms  torch/ours  GFLOP/s  weight GB/s")
    dtype = getattr(torch, options.dtype)
    with backend.force(isa=isa):
        for K, N in (map(int, size.split("x")) for size in options.sizes.split(",")):
            for M in map(int, options.rows.split(",")):
                for name, ours, theirs, exact in products(M, K, N, dtype, options.backward):
                    check(ours, theirs, exact)
                    mine, peer = medians([ours, theirs], options.seconds)
                    rates = f"{2e-9 * M * K * N / mine:8.0f} {1e-9 * N * K * dtype.itemsize / mine:12.1f}"
                    sizes = f"{M:5d} {K:6d} {N:6d}"
                    print(
                        f"{name:12s} {sizes} {mine * 1e3:10.3f} {peer * 1e3:10.3f} {peer / mine:11.2f} {rates}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
