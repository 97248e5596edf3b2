"""llmfast's ops against torch's on a GPU; run by ``benchmarks/gpu``, or alone: ``python benchmarks/gpu_ops.py [FOLDER]``.

Correctness first, by the error rule against float64; then providers take turns, timed by CUDA events on sets of inputs
that together exceed the L2 cache. Shares are of limits measured in the same run: a device copy, and torch's product of
two 8192 x 8192 bfloat16 matrices. One JSON line a case goes to FOLDER/gpu-<device>.jsonl (default: benchmarks/results).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import llmfast
from llmfast import backend, reference
from llmfast.bench import rows
from llmfast.bench.harness import compare, errors, schedule, summary

L2_BYTES = 256 << 20
ROUNDS, CALLS = 15, 4
BF16 = torch.bfloat16

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Case:
    """`run[name](*inputs)` gives tensors; the first provider after llmfast is the baseline of the error rule."""

    op: str
    direction: str
    dims: dict[str, int]
    inputs: Callable[[], Tensors]
    run: dict[str, Callable[..., Tensors]]
    exact: Callable[..., Tensors]
    moved: float = 0.0
    flops: float = 0.0


def seconds(function: Callable[[], object], calls: int = CALLS) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def limits() -> dict[str, float]:
    a = torch.randn(8192, 8192, dtype=BF16, device="cuda")
    source = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    seconds(lambda: a @ a.t())
    return {
        "copy_bytes_per_s": 2 * 4 * source.numel() / min(seconds(lambda: target.copy_(source)) for _ in range(5)),
        "product_flops_per_s": 2 * 8192**3 / min(seconds(lambda: a @ a.t()) for _ in range(5)),
    }


def random(*shape: int, dtype=BF16, grad=False) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype).requires_grad_(grad)


def gradients(function: Callable[..., Tensors]) -> Callable[..., Tensors]:
    """Forward and backward; results and gradients of all inputs."""

    def run(*inputs):
        leaves = [t.detach().requires_grad_() for t in inputs]
        outputs = function(*leaves)
        return *outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])

    return run


def norm_cases():
    def torch_norm(x, stream, weight, bias):
        stream = stream + x
        return F.layer_norm(stream, stream.shape[-1:], weight, bias).to(x.dtype), stream

    compiled = torch.compile(torch_norm)
    for M, C in ((16384, 768), (16384, 4096), (512, 768)):
        forward = {"llmfast": llmfast.add_layer_norm, "torch": torch_norm, "torch.compile": compiled}

        def inputs(M=M, C=C):
            return random(M, C), *(random(*shape, dtype=torch.float32) for shape in ((M, C), (C,), (C,)))

        for direction, wrap, moved in (
            ("forward", lambda f: f, 12 * M * C),
            ("forward+backward", gradients, 30 * M * C),
        ):
            run = {name: wrap(f) for name, f in forward.items()}
            yield Case(
                "add_layer_norm", direction, {"M": M, "C": C}, inputs, run, wrap(reference.add_layer_norm), moved
            )


def rotary_cases():
    for B, H, T, D in ((16, 32, 1024, 128), (64, 12, 1024, 64)):
        tables = tuple(t.cuda() for t in llmfast.rotary_tables(T, D))
        inputs = lambda B=B, H=H, T=T, D=D: tuple(random(B, T, H, D).transpose(1, 2) for _ in range(2))  # noqa: E731
        ours = lambda q, k, tables=tables: llmfast.rotary(q, k, *tables)  # noqa: E731
        plain = lambda q, k, tables=tables: reference.rotary(q, k, *tables)  # noqa: E731
        exact = lambda q, k, tables=tables: reference.rotary(q, k, *(t.double() for t in tables))  # noqa: E731
        run = {"llmfast": ours, "torch": plain, "torch.compile": torch.compile(plain)}
        yield Case("rotary", "forward", {"B": B, "H": H, "T": T, "D": D}, inputs, run, exact, 8 * B * H * T * D)


def linear_cases():
    for M, K, N in ((8192, 8192, 8192), (16384, 768, 3072), (16384, 3072, 768)):
        inputs = lambda M=M, K=K, N=N: (random(M, K), random(N, K))  # noqa: E731
        ours, plain = (lambda x, w: (llmfast.linear(x, w),)), (lambda x, w: (F.linear(x, w),))
        for direction, wrap, products in (("forward", lambda f: f, 1), ("forward+backward", gradients, 3)):
            run = {"llmfast": wrap(ours), "torch (cuBLAS)": wrap(plain)}
            yield Case(
                "linear", direction, {"M": M, "K": K, "N": N}, inputs, run, wrap(plain), flops=2 * products * M * N * K
            )


def attention_cases():
    def torch_with(which):
        def run(q, k, v):
            with sdpa_kernel(which):
                return (F.scaled_dot_product_attention(q, k, v, is_causal=True),)

        return run

    def ours(q, k, v):
        return (llmfast.attention(q, k, v, causal=True),)

    def exact(q, k, v):
        return (reference.attention(q, k, v, causal=True),)

    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    for B, H, T, D in ((4, 16, 2048, 128), (16, 12, 1024, 64)):
        inputs = lambda B=B, H=H, T=T, D=D: tuple(random(B, H, T, D) for _ in range(3))  # noqa: E731
        for direction, wrap, products in (("forward", lambda f: f, 2), ("forward+backward", gradients, 7)):
            run = {"llmfast": wrap(ours), **{f"torch {name}": wrap(torch_with(b)) for name, b in backends.items()}}
            yield Case(
                "attention",
                direction,
                {"B": B, "H": H, "T": T, "D": D},
                inputs,
                run,
                wrap(exact),
                flops=products * B * H * T * T * D,
            )


def adamw_cases():
    def stepper(optimizer_class, **options):
        optimizers = {}

        def run(*params):
            key = params[0].data_ptr()
            if key not in optimizers:
                for p in params:
                    p.grad = torch.full_like(p, 1e-3)
                optimizers[key] = optimizer_class(params, lr=1e-6, **options)
            optimizers[key].step()
            return ()

        return run

    sizes = [50257 * 768, 1024 * 768, *[768 * 2304, 768 * 768, 768 * 3072, 768 * 3072, 768, 768] * 12]
    run = {"llmfast": stepper(llmfast.AdamW), "torch fused": stepper(torch.optim.AdamW, fused=True)}
    inputs = lambda: tuple(random(n, dtype=torch.float32, grad=True) for n in sizes)  # noqa: E731
    yield Case("adamw", "step", {"parameters": sum(sizes)}, inputs, run, lambda *_: (), 28 * sum(sizes))


def measured(case: Case, limit: dict[str, float]) -> dict:
    first = case.inputs()
    size = sum(t.numel() * t.element_size() for t in first)
    sets = [first, *(case.inputs() for _ in range(min(8, int(L2_BYTES // size))))]
    found, peer = {}, None
    try:
        exact = case.exact(*(t.detach().double() for t in first))
    except torch.OutOfMemoryError:
        exact = case.exact(*(t.detach().float() for t in first))
    exact = tuple(t.double() for t in exact)
    for name in [n for n in case.run if n != "llmfast"] + ["llmfast"]:  # the baseline's error first
        before = backend.fallbacks()
        try:
            error = errors(case.run[name](*first), exact)
        except Exception as problem:  # a peer that this GPU or this torch does not have
            found[name] = {
                "status": f"{type(problem).__name__}: {problem}".splitlines()[0][:200],
                "ours": name == "llmfast",
            }
            continue
        peer = peer or error
        fine = all(e <= 2 * p + 1e-5 * max(1.0, t.abs().max().item()) for e, p, t in zip(error, peer, exact))
        found[name] = {"status": "ok" if fine else "wrong", "errors": error, "ours": name == "llmfast"}
        found[name]["fell_back"] = backend.fallbacks() != before
    del exact
    good = {name for name, entry in found.items() if entry["status"] == "ok"}
    samples: dict[str, list[float]] = {name: [] for name in case.run if name in good}
    for turn, name in enumerate(schedule(dict.fromkeys(samples, ROUNDS + 2))):
        calls = iter([sets[(turn + i) % len(sets)] for i in range(CALLS)])
        samples[name].append(seconds(lambda name=name, calls=calls: case.run[name](*next(calls))))
    for name, times in samples.items():
        found[name].update(summary(times[2:]))
        s = found[name]["median_ms"] / 1e3
        found[name]["share"] = round(
            max(case.moved / limit["copy_bytes_per_s"], case.flops / limit["product_flops_per_s"]) / s, 4
        )
    return {
        "case": case.op,
        "direction": case.direction,
        "dtype": "bfloat16",
        "dims": case.dims,
        "providers": found,
        "best": compare(found),
    }


def main(folder: str = "benchmarks/results") -> int:
    device = torch.cuda.get_device_name()
    path = Path(folder) / f"gpu-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.jsonl"
    limit, shared = limits(), rows.context("benchmarks/gpu", None, torch.get_num_threads())
    shared |= {"kind": "gpu", "limits": limit, "cuda": torch.version.cuda, "device": backend.info()["cuda_devices"][:1]}
    copy, product = limit["copy_bytes_per_s"] / 1e12, limit["product_flops_per_s"] / 1e12
    print(f"{device}: copy {copy:.2f} TB/s, product {product:.0f} TFLOP/s")
    wrong = 0
    for cases in (norm_cases, rotary_cases, adamw_cases, linear_cases, attention_cases):
        for case in cases():
            row = measured(case, limit)
            rows.append(path, {**shared, **row})
            print(f"{row['case']} {row['direction']} {row['dims']}")
            for name, entry in row["providers"].items():
                note = " (fell back)" if entry.get("fell_back") else ""
                timing = (
                    f"{entry['median_ms']:9.4f} ms  {100 * entry['share']:5.1f}%"
                    if "median_ms" in entry
                    else entry["status"]
                )
                print(f"  {name:16s} {timing}{note}")
            wrong += row["providers"]["llmfast"]["status"] != "ok"
            torch.cuda.empty_cache()
    return wrong != 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
