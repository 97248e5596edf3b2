"""llmfast's ops against torch's on a GPU; run by ``benchmarks/gpu``, or alone:

    python benchmarks/gpu_ops.py [FOLDER] [--no-compile] [--only linear,attention] [--check]

One JSON line a case goes to FOLDER/gpu-<device>.jsonl (default: benchmarks/results); see gpu_harness.py for how cases
are checked and timed. The most telling cases come first. Attention's TFLOP/s count causal scores as half.
"""

from __future__ import annotations

import argparse
import sys

import gpu_peers as peers
import torch
from gpu_harness import Case, Progress, Report, backward, forward, forward_backward, measured, random

import llmfast
from llmfast import reference

COMPILE = True


def linear_cases():
    sizes = ((8192, 8192, 8192), (65536, 768, 3072), (65536, 3072, 768), (16384, 4096, 4096), (64, 4096, 4096))
    for M, K, N in sizes:
        inputs = lambda M=M, K=K, N=N: (random(M, K), random(N, K, scale=0.02))  # noqa: E731
        ours, cublas = (lambda x, w: (llmfast.linear(x, w),)), peers.linear
        for direction, prepare, products in (("forward", forward, 1), ("backward", backward, 2)):
            run = {"llmfast": prepare(ours), "cuBLAS": prepare(cublas)}
            moved = 2 * (M * K + N * K + M * N) * (2 if products == 2 else 1)
            dims = {"M": M, "K": K, "N": N}
            yield Case("linear", direction, dims, inputs, run, prepare(cublas), moved, 2 * products * M * N * K)


def attention_case(
    B, Hq, Hkv, T, D, direction, *, which=("flash", "cuDNN"), name="attention", share=0.5, mask=None, **o
):
    """`share` of all scores are wanted. `mask`: makes llmfast's mask and the peers', which may differ in what is causal."""
    prepare, products = {"forward": (forward, 2), "backward": (backward, 5)}[direction]
    limit = 3 if mask is not None else 99

    def inputs():
        tensors = random(B, Hq, T, D), random(B, Hkv, T, D), random(B, Hkv, T, D)
        return tensors if mask is None else (*tensors, mask())

    def pick(tensors):  # the first sequence's first group of heads
        return tuple(t[:1, : t.shape[1] // Hkv] if t.dim() == 4 and t.shape[1] >= Hkv else t[:1] for t in tensors)

    ours = lambda q, k, v, *m: (llmfast.attention(q, k, v, mask=m[0] if m else None, **o),)  # noqa: E731
    exact = lambda q, k, v, *m: (reference.attention(q, k, v, mask=m[0] if m else None, **o),)  # noqa: E731
    wrap = (lambda f: prepare(f)) if prepare is forward else (lambda f: prepare(f, limit))
    options = {"grouped": Hq != Hkv, "is_causal": o.get("causal", False) and mask is None}
    run = {"llmfast": wrap(ours), **{n: wrap(peers.sdpa(n, **options)) for n in which}}
    dims = {"B": B, "Hq": Hq, "Hkv": Hkv, "T": T, "D": D}
    flops = 2 * products * B * Hq * T * T * D * share
    return Case(name, direction, dims, inputs, run, wrap(exact), flops=flops, pick=pick)


def attention_cases():
    for D, H in ((128, 16), (64, 32)):
        for T in (2048, 8192, 4096, 16384) if D == 128 else (1024, 4096, 16384):
            for direction in ("forward", "backward"):
                yield attention_case(max(1, 16384 // T), H, H, T, D, direction, causal=True)


def attention_variants():
    both = ("forward", "backward")
    for direction in both:
        yield attention_case(4, 16, 16, 4096, 128, direction, name="attention full", share=1.0)
        yield attention_case(4, 32, 8, 4096, 128, direction, name="attention grouped", causal=True)

        def band():
            i = torch.arange(4096, device="cuda")
            return ((i[:, None] >= i) & (i[:, None] - i < 128))[None, None]

        # The peers have no window: they read it as a mask, and so does the reference.
        case = attention_case(
            4, 16, 16, 4096, 128, direction, name="attention window 128", which=("efficient",), share=1 / 32, mask=band
        )
        ours = lambda q, k, v, m: (llmfast.attention(q, k, v, window=128),)  # noqa: E731
        case.run["llmfast"] = forward(ours) if direction == "forward" else backward(ours, 3)
        yield case

        def padding():
            return (torch.arange(2048, device="cuda") < torch.tensor([[2048], [1500], [700], [31]], device="cuda"))[
                :, None, None
            ]

        yield attention_case(
            4, 16, 16, 2048, 64, direction, name="attention padding mask", which=("efficient",), share=1.0, mask=padding
        )


def decode_cases():
    for B, Hq, Hkv, Tk, D in ((8, 32, 8, 4096, 128), (1, 32, 8, 16384, 128), (8, 12, 12, 1024, 64)):

        def inputs(B=B, Hq=Hq, Hkv=Hkv, Tk=Tk, D=D):
            return random(B, Hq, 1, D), random(B, Hkv, Tk, D), random(B, Hkv, Tk, D)

        ours = lambda q, k, v: (llmfast.attention(q, k, v, causal=True),)  # noqa: E731
        exact = lambda q, k, v: (reference.attention(q, k, v, causal=True),)  # noqa: E731
        run = {"llmfast": forward(ours)}
        run |= {name: forward(peers.sdpa(name, grouped=Hq != Hkv)) for name in ("flash", "cuDNN", "efficient")}
        dims = {"B": B, "Hq": Hq, "Hkv": Hkv, "Tk": Tk, "D": D}
        yield Case("attention decode", "forward", dims, inputs, run, forward(exact), 4 * B * Hkv * Tk * D)


def ffn_cases():
    def gelu(x, up, up_bias, down, down_bias):
        return (llmfast.ffn(x, up, up_bias, down, down_bias),)

    def swiglu(x, up, gate, down):
        return (llmfast.ffn(x, up, None, down, None, activation="silu", gate_weight=gate),)

    for name, ours, plain, inputs, (M, C, H), products in (
        ("ffn gelu", gelu, peers.ffn_gelu, peers.gelu_inputs, peers.GELU_SIZE, 2),
        ("ffn swiglu", swiglu, peers.ffn_swiglu, peers.swiglu_inputs, peers.SWIGLU_SIZE, 3),
    ):
        for direction, prepare, passes in (("forward", forward, 1), ("forward+backward", forward_backward, 3)):
            run = {"llmfast": prepare(ours), "torch": prepare(plain), **compiled(prepare, plain)}
            flops = 2 * passes * products * M * C * H
            yield Case(name, direction, {"M": M, "C": C, "F": H}, inputs, run, prepare(plain), flops=flops)


def head_cases():
    M, C, V = peers.HEAD_SIZE
    ours = lambda x, w, t: (llmfast.linear_cross_entropy(x, w, t),)  # noqa: E731
    plain = peers.linear_cross_entropy
    wrap = lambda f: forward_backward(f, 2)  # noqa: E731

    def exact(x, w, t):
        return (torch.nn.functional.cross_entropy(x @ w.t(), t),)

    run = {"llmfast": wrap(ours), "torch": wrap(plain), **compiled(wrap, plain)}
    dims = {"M": M, "C": C, "V": V}
    yield Case(
        "linear_cross_entropy", "forward+backward", dims, peers.head_inputs, run, wrap(exact), flops=6 * M * C * V
    )


def norm_cases():
    for M, C in peers.NORM_SIZES:
        inputs = lambda M=M, C=C: peers.norm_inputs(M, C)  # noqa: E731
        for direction, prepare, moved in (("forward", forward, 12), ("forward+backward", forward_backward, 30)):
            run = {"llmfast": prepare(llmfast.add_layer_norm), "torch": prepare(peers.add_layer_norm)}
            run |= compiled(prepare, peers.add_layer_norm)
            exact = prepare(reference.add_layer_norm)
            yield Case("add_layer_norm", direction, {"M": M, "C": C}, inputs, run, exact, moved * M * C)


def rotary_cases():
    for B, H, T, D in ((16, 32, 1024, 128), (64, 12, 1024, 64)):
        tables = tuple(t.cuda() for t in llmfast.rotary_tables(T, D))
        inputs = lambda B=B, H=H, T=T, D=D: tuple(random(B, T, H, D).transpose(1, 2) for _ in range(2))  # noqa: E731
        ours = lambda q, k, tables=tables: llmfast.rotary(q, k, *tables)  # noqa: E731
        plain = lambda q, k, tables=tables: reference.rotary(q, k, *tables)  # noqa: E731
        exact = lambda q, k, tables=tables: reference.rotary(q, k, *(t.double() for t in tables))  # noqa: E731
        run = {"llmfast": forward(ours), "torch": forward(plain)}
        yield Case(
            "rotary", "forward", {"B": B, "H": H, "T": T, "D": D}, inputs, run, forward(exact), 8 * B * H * T * D
        )


def adamw_cases():
    """One optimiser step on GPT-2's parameters; correctness is the tests' business."""

    def stepper(optimizer_class, **options):
        def prepare(parameters):
            optimizer = optimizer_class(parameters, lr=1e-6, **options)

            def call():
                optimizer.step()
                return ()

            return call

        return prepare

    def inputs():
        parameters = tuple(torch.randn(n, device="cuda").requires_grad_() for n in sizes)
        for p in parameters:
            p.grad = torch.full_like(p, 1e-3)
        return parameters

    sizes = [50257 * 768, 1024 * 768, *[768 * 2304, 768 * 768, 768 * 3072, 768 * 3072, 768, 768] * 12]
    run = {"llmfast": stepper(llmfast.AdamW), "torch fused": stepper(torch.optim.AdamW, fused=True)}
    yield Case("adamw", "step", {"parameters": sum(sizes)}, inputs, run, None, 28 * sum(sizes))


def compiled(prepare, function) -> dict:
    return {"torch.compile": prepare(peers.compiled(function))} if COMPILE else {}


GROUPS = {
    "linear": linear_cases,
    "attention": attention_cases,
    "ffn": ffn_cases,
    "head": head_cases,
    "decode": decode_cases,
    "norm": norm_cases,
    "rotary": rotary_cases,
    "adamw": adamw_cases,
    "variants": attention_variants,
}


def main() -> int:
    global COMPILE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="benchmarks/results")
    parser.add_argument("--no-compile", action="store_true", help="no peer through torch.compile")
    parser.add_argument("--only", default=",".join(GROUPS), help=f"of {','.join(GROUPS)}")
    parser.add_argument("--check", action="store_true", help="correctness alone")
    options = parser.parse_args()
    COMPILE = not options.no_compile
    torch._functorch.config.donated_buffer = False  # compiled peers keep their graph for the backward pass alone
    progress, report, wrong = Progress(), Report(options.folder, "benchmarks/gpu"), 0
    for group in options.only.split(","):
        for case in GROUPS[group]():
            if not progress.begin(case.name):
                continue
            row = measured(case, timed=not options.check)
            report.add(row)
            wrong += row["providers"]["llmfast"]["status"] != "ok"
            torch.cuda.empty_cache()
    progress.finish()
    return wrong != 0


if __name__ == "__main__":
    sys.exit(main())
