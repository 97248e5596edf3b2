"""GPT-2 (124M) on a GPU, llmfast against transformers: a training step, and decoding. Run by ``benchmarks/gpu``, or alone:

    python benchmarks/gpu_model.py [FOLDER] [--no-compile] [--static]

Both start from the same random weights and see the same tokens; losses have to agree. llmfast holds bfloat16 weights
with float32 masters; the peer float32 weights under autocast, compiled, with fused AdamW. MFU counts the model's
multiplications, attention's causal half included (`GPTConfig.flops_per_token`), against the product measured in the
same run. Decoding is greedy, in bfloat16, the prompts' pass included; with and without graphs float32 tokens must be
equal. One JSON line a part; see gpu_harness.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from unittest.mock import patch

import gpu_model_peers as peers
import torch
from gpu_harness import Progress, Report, limits

import llmfast
from llmfast import backend
from llmfast.bench.harness import compare, summary
from llmfast.models import GPT

ROUNDS, STEPS, WARM = 5, 4, 3


def llmfast_model(peer) -> GPT:
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        return GPT.from_pretrained(folder, torch.float32).cuda()


def llmfast_step(model: GPT, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    parameters = list(model.parameters())
    optimizer = llmfast.AdamW(parameters, **peers.ADAMW)
    optimizer.round_parameters(torch.bfloat16)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step() -> torch.Tensor:
        loss = model(inputs, targets)
        loss.backward()
        _, scale = llmfast.clip_grad_norm(parameters, 1.0)
        optimizer.step(grad_scale=scale)
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def in_turns(calls: dict[str, Callable], each: int) -> dict[str, list[float]]:
    """Seconds a call, by the clock: what somebody who waits for it waits."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(ROUNDS):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            torch.cuda.synchronize()
            begun = time.perf_counter()
            for _ in range(each):
                calls[name]()
            torch.cuda.synchronize()
            samples[name].append((time.perf_counter() - begun) / each)
    return samples


def started(name: str, make: Callable[[], Callable], found: dict, warm: Callable) -> Callable | None:
    """Prepares a provider and lets it warm up; says at once how fast it is, in case that the rest takes too long."""
    before, begun = backend.fallbacks(), time.perf_counter()
    try:
        call = make()
        found[name] = {"status": "ok", "ours": name.startswith("llmfast"), "result": warm(call)}
        torch.cuda.synchronize()
        ready = time.perf_counter()
        call()
        torch.cuda.synchronize()
    except Exception as problem:
        status = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
        found[name] = {"status": status, "ours": name.startswith("llmfast"), "result": None}
        torch.cuda.synchronize()
        return None
    found[name]["fell_back"] = backend.fallbacks() != before
    print(f"  {name}: {time.perf_counter() - ready:.4f} s, after {ready - begun:.1f} s", flush=True)
    return call


def row_of(case: str, direction: str, dims: dict, found: dict, samples: dict, tokens: int, flops: float = 0.0) -> dict:
    peak = limits()["product_flops_per_s"]
    for name, entry in found.items():
        entry.pop("result")
        if name in samples:
            entry.update(summary(samples[name]))
            seconds = entry["median_ms"] / 1e3
            entry["tokens_per_s"] = round(tokens / seconds, 1)
            if flops:
                entry["tflops"], entry["share"] = round(flops / seconds / 1e12, 1), round(flops / seconds / peak, 4)
            print(f"  {name}: {entry['tokens_per_s']:,.0f} tokens/s", flush=True)
    row = {"case": case, "direction": direction, "dtype": "bfloat16", "dims": dims, "providers": found}
    return {**row, "best": compare({name: e for name, e in found.items() if e["status"] == "ok"})}


def training(B: int, options) -> dict:
    """Losses of the first three steps agree to 2%: later ones depend on how each rounds."""
    ids = peers.batch(B)
    warm = lambda step: [step().item() for _ in range(WARM)]  # noqa: E731
    config = GPT.preset("gpt2", vocab_size=peers.VOCABULARY).config
    peer = f"transformers{'' if options.no_compile else ', torch.compile'}"
    makers = {"llmfast": lambda: llmfast_step(llmfast_model(peers.gpt2()), ids)}
    if B == peers.BATCH:  # compiled for one size alone
        makers[peer] = lambda: peers.training_step(peers.gpt2().cuda(), ids, not options.no_compile)
    found, calls = {}, {}
    for name, make in makers.items():
        if (call := started(name, make, found, warm)) is not None:
            calls[name] = call
    losses = {name: entry["result"] for name, entry in found.items() if entry["result"]}
    print("  losses", {name: [round(x, 4) for x in values] for name, values in losses.items()}, flush=True)
    if len(losses) == 2 and any(abs(a - b) > 0.02 * b for a, b in zip(losses["llmfast"], losses[peer])):
        found["llmfast"]["status"] = "wrong"
    tokens = B * peers.CONTEXT
    memory = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    dims = {"B": B, "T": peers.CONTEXT}
    flops = tokens * config.flops_per_token(peers.CONTEXT)
    row = row_of("gpt2 training", "step", dims, found, in_turns(calls, STEPS), tokens, flops)
    return {**row, "losses": losses, "peak_memory_gib": memory}


def decoding(B: int, options) -> dict:
    prompt = peers.prompts(B)
    peer = peers.gpt2().cuda().bfloat16().eval()
    ours = llmfast_model(peer).bfloat16()

    def plain():
        with patch("llmfast.generate.decoding.why_not_graphed", return_value="measured without"):
            return ours.generate(prompt, max_new_tokens=peers.NEW, temperature=0)

    makers = {
        "llmfast": lambda: lambda: ours.generate(prompt, max_new_tokens=peers.NEW, temperature=0),
        "llmfast without graph": lambda: plain,
        "transformers": lambda: peers.decoder(peer, prompt),
    }
    if options.static and B == 1:  # compiled for one size alone
        makers["transformers, static cache, torch.compile"] = lambda: peers.decoder(peer, prompt, static=True)
    found, calls = {}, {}
    for name, make in makers.items():
        if (call := started(name, make, found, lambda call: call())) is not None:
            calls[name] = call
    tokens = {name: entry["result"] for name, entry in found.items() if entry["result"] is not None}
    for name in tokens.keys() - {"llmfast"}:  # in bfloat16 near ties make texts of random weights part sooner or later
        same = (tokens["llmfast"] == tokens[name]).float().cumprod(1).mean().item()
        print(f"  {same:.0%} of the tokens before the first difference from {name}", flush=True)
    exact = llmfast_model(peer)
    with patch("llmfast.generate.decoding.why_not_graphed", return_value="checked without"):
        expected = exact.generate(prompt, max_new_tokens=24, temperature=0)
    if not torch.equal(exact.generate(prompt, max_new_tokens=24, temperature=0), expected):
        found["llmfast"]["status"] = "wrong"
    dims = {"B": B, "prompt": peers.PROMPT, "new": peers.NEW}
    return row_of("gpt2 decoding", "greedy", dims, found, in_turns(calls, 1), B * peers.NEW)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="benchmarks/results")
    parser.add_argument("--no-compile", action="store_true", help="the peer's training step as it is")
    parser.add_argument("--static", action="store_true", help="compiled decoding of transformers too, for B=1")
    options = parser.parse_args()
    progress, report, wrong = Progress(), Report(options.folder, "benchmarks/gpu"), 0
    parts = [
        (f"training {peers.BATCH}", lambda: training(peers.BATCH, options), 110),
        ("decoding 1", lambda: decoding(1, options), 60),
        ("decoding 8", lambda: decoding(8, options), 60),
        (f"training {2 * peers.BATCH}", lambda: training(2 * peers.BATCH, options), 60),
    ]
    for name, part, limit in parts:
        if not progress.begin(name, limit):
            continue
        print(name, flush=True)
        torch.cuda.reset_peak_memory_stats()
        row = part()
        report.add(row)
        wrong += row["providers"]["llmfast"]["status"] != "ok"
        torch.cuda.empty_cache()
    progress.finish()
    return wrong != 0


if __name__ == "__main__":
    sys.exit(main())
