"""float32 products of `llmfast.linear` in float32 and in halves of bfloat16 (AMX), against torch: time and error.

    python benchmarks/split_float32.py [--threads 2]

Medians of calls that take turns, ms; errors against float64 as a share of the largest result.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

import llmfast
from llmfast import backend

SIZES = ((256, 768, 3072), (1024, 768, 3072), (1024, 3072, 768), (4096, 768, 3072), (2048, 4096, 4096))


def in_halves(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    backend.set_float32_matmul_precision("high")
    try:
        return llmfast.linear(x, weight)
    finally:
        backend.set_float32_matmul_precision("highest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    ways = {"halves": in_halves, "float32": llmfast.linear, "torch": F.linear}
    print(
        f"{backend.info()['cpu']}, {torch.get_num_threads()} threads, {backend.info()['isa']}, torch {torch.__version__}"
    )
    for M, K, N in SIZES:
        x, weight = torch.randn(M, K), torch.randn(N, K)
        exact = F.linear(x.double(), weight.double())
        times: dict[str, list[float]] = {name: [] for name in ways}
        errors = {name: ((way(x, weight) - exact).abs().max() / exact.abs().max()).item() for name, way in ways.items()}
        rounds = max(5, min(40, int(2e11 / (2 * M * N * K))))
        for _ in range(rounds):
            for name, way in ways.items():
                begun = time.perf_counter()
                way(x, weight)
                times[name].append(time.perf_counter() - begun)
        medians = {name: 1e3 * statistics.median(found) for name, found in times.items()}
        cells = "  ".join(f"{name} {medians[name]:.2f} ms, error {errors[name]:.1e}" for name in ways)
        print(f"M={M} K={K} N={N}: {cells}  halves {medians['torch'] / medians['halves']:.2f}x torch", flush=True)


if __name__ == "__main__":
    main()
