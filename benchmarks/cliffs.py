"""Looks for shapes at which llmfast falls behind PyTorch: random sizes, odd ones and those beside powers of two included.

    python benchmarks/cliffs.py [--cases 100] [--seed 0] [--only linear,attention] [--dtype float32] [--threads 2]
                                [--least 1.0] [--seconds 0.3]

Checked and timed as `llmfast bench op` does it. Shown are the cases whose ratio (the best of PyTorch's ways over ours) is
below `--least`, each measured again, four times as long, before it is believed; then how the ratios are spread. The same
seed draws the same cases, whatever `--only` leaves out.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import statistics
import sys

import torch

from llmfast import backend
from llmfast.bench import cases
from llmfast.bench.cases import Options, Work
from llmfast.bench.harness import Budget, measure

GREATEST = 3e9  # operations: some 20 ms on two cores without matrix units
BYTES = 2e8  # of float32 values, all tensors of a case


def size(draw: random.Random, least: int, most: int) -> int:
    """Between the two, evenly in the logarithm: as it comes, a multiple of 16, or beside or at a power of two."""
    n = round(math.exp(draw.uniform(math.log(least), math.log(most))))
    kind = draw.randrange(4)
    if kind == 1:
        n = n // 16 * 16
    elif kind == 2:
        n = 2 ** round(math.log2(n)) + draw.choice((-1, 0, 1))
    return max(least, min(most, n))


def linear(draw: random.Random) -> Work:
    M, K, N = (size(draw, *bounds) for bounds in ((1, 5000), (8, 9000), (8, 9000)))
    return cases.linear(M, K, N, draw.choice(("forward", "backward")))


def ffn(draw: random.Random) -> Work:
    gated = draw.random() < 0.5
    M, C, width = (size(draw, *bounds) for bounds in ((1, 3000), (32, 2048), (64, 8192)))
    activation = "silu" if gated else draw.choice(("gelu", "gelu_tanh", "relu"))
    return cases.ffn(M, C, width, activation, gated, draw.choice(("forward", "forward+backward")))


def attention(draw: random.Random) -> Work:
    Hkv, group = draw.randint(1, 8), draw.choice((1, 1, 2, 3, 4, 8))
    Tk, D = size(draw, 1, 5000), draw.choice((16, 32, 40, 64, 64, 72, 80, 96, 128, 128, 192, 256))
    direction = draw.choice(("forward", "backward", "forward+backward"))
    kind = draw.choice(("full", "causal", "causal", "window", "padding", "few queries"))
    B, Tq = draw.randint(1, 8), Tk
    if kind == "few queries":
        return cases.attention(B, Hkv * group, Hkv, min(Tk, draw.randint(1, 9)), Tk, D, direction, causal=True)
    call: dict = {"causal": kind in ("causal", "window")}
    if kind == "window":
        call["window"] = draw.randint(1, max(1, Tk // 2))
    if kind == "padding":
        lengths = torch.tensor([draw.randint(1, Tk) for _ in range(B)])
        call["mask"] = (torch.arange(Tk) < lengths[:, None])[:, None, None, :]
    return cases.attention(B, Hkv * group, Hkv, Tq, Tk, D, direction, **call)


def norm(op: str):
    def work(draw: random.Random) -> Work:
        return cases.norm(op, size(draw, 1, 20000), size(draw, 8, 9000), draw.choice(("forward", "backward")))

    return work


def cross_entropy(draw: random.Random) -> Work:
    return cases.cross_entropy(size(draw, 1, 2048), size(draw, 32, 2048), size(draw, 16, 60000))


DRAWN = {
    "linear": linear,
    "ffn": ffn,
    "attention": attention,
    "add_layer_norm": norm("add_layer_norm"),
    "add_rms_norm": norm("add_rms_norm"),
    "linear_cross_entropy": cross_entropy,
}


def drawn(op: str, count: int, seed: int) -> list[Work]:
    """`count` cases of an op that are not too large to be timed."""
    draw = random.Random(f"{op} {seed}")
    found: list[Work] = []
    while len(found) < count:
        work = DRAWN[op](draw)
        if work.flops <= GREATEST and 4 * work.values <= BYTES:
            found.append(work)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100, help="of each op")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(DRAWN), help="ops")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--least", type=float, default=1.0, help="show what is below")
    parser.add_argument("--seconds", type=float, default=0.3, help="of timed calls for each way")
    options = parser.parse_args(arguments)
    unknown = [op for op in options.only.split(",") if op not in DRAWN]
    if unknown:
        parser.error(f"--only: got {', '.join(unknown)}, expected some of {', '.join(DRAWN)}")
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    print(f"{backend.native().active_isa()}, {options.threads} threads, {options.dtype}, torch {torch.__version__}")
    budget = Budget(seconds=options.seconds, rounds=(5, 60))
    long = dataclasses.replace(budget, seconds=4 * options.seconds, rounds=(9, 200))

    wrong = 0
    for op in options.only.split(","):
        ratios = []
        for work in drawn(op, options.cases, options.seed):
            case = cases.case_of(work, dtype, Options())
            row = measure(case, None, budget)
            ratio = row["best"]["ratio"]
            if ratio is not None and ratio < options.least:
                row = measure(case, None, long)
                ratio = row["best"]["ratio"]
            bad = {name: p for name, p in row["providers"].items() if p["ours"] and p["status"] != "ok"}
            if bad or ratio is None:
                wrong += bool(bad)
                print(f"{'wrong' if bad else 'alone':>6}  {case.label}  {bad or ''}", flush=True)
                continue
            ratios.append(ratio)
            if ratio < options.least:
                ours, peer = (row["providers"][row["best"][side]]["median_ms"] for side in ("llmfast", "peer"))
                print(f"{ratio:5.2f}x  {case.label}  {ours:.4g} ms, {row['best']['peer']} {peer:.4g} ms", flush=True)
        if len(ratios) > 1:
            tenths = [f"{q:.2f}" for q in statistics.quantiles(ratios, n=10)]
            behind = sum(r < 0.9 for r in ratios)
            print(
                f"{op}: {len(ratios)} cases, least {min(ratios):.2f}, tenths {' '.join(tenths)}, below 0.9: {behind}\n"
            )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
