"""Generation by `llmfast.GPT` and by transformers from one checkpoint: tokens a second, decoding and reading the prompt.

    python benchmarks/generate.py [FOLDER] [--batch 1,8] [--prompt 64] [--new 64] [--rounds 5] [--dtype bfloat16]
                                  [--threads 2]

FOLDER is a Hugging Face folder; without one, random weights of SmolLM2-135M's sizes are saved and loaded by both. Greedy.
First their losses on the prompt must agree. Then whole calls take turns; shown are medians and, of a call for `--new` tokens
less one for a single token, the tokens a second of decoding alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from patched import llama
from transformers import AutoModelForCausalLM

from llmfast import backend
from llmfast.generate import generate
from llmfast.models import GPT

TOLERANCE = 5e-3  # of the loss: rounding to bfloat16


def check(model: GPT, plain, ids: torch.Tensor) -> None:
    """Holds their losses on the prompt against each other."""
    with torch.no_grad():
        ours, theirs = (f(ids).float() for f in (model, lambda ids: plain(input_ids=ids).logits))
    losses = [F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item() for logits in (ours, theirs)]
    if not abs(losses[0] - losses[1]) <= TOLERANCE * losses[1]:
        raise AssertionError(f"losses differ: llmfast {losses[0]:.5f}, transformers {losses[1]:.5f}")


def providers(model: GPT, plain, ids: torch.Tensor) -> dict[str, Callable[[int], object]]:
    def theirs(new: int) -> torch.Tensor:
        with torch.no_grad():
            return plain.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new,
                min_new_tokens=new,
                pad_token_id=0,
            )

    return {"llmfast": lambda new: generate(model, ids, max_new_tokens=new, temperature=0.0), "transformers": theirs}


def medians(ways: dict[str, Callable[[int], object]], lengths: tuple[int, ...], rounds: int) -> dict[str, list[float]]:
    """Seconds for each number of new tokens, in turns."""
    samples: dict[str, list[list[float]]] = {way: [[] for _ in lengths] for way in ways}
    for sample in range(-1, rounds):  # the first is warm-up
        for way, call in ways.items():
            for i, new in enumerate(lengths):
                begun = time.perf_counter()
                call(new)
                if sample >= 0:
                    samples[way][i].append(time.perf_counter() - begun)
    return {way: [statistics.median(times) for times in found] for way, found in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    options = parser.parse_args()
    if options.new < 2:
        parser.error(f"--new: got {options.new}, expected at least 2")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory() as made:
        if options.folder is None:
            llama().to(dtype).save_pretrained(made)
        folder = options.folder or made
        model = GPT.from_pretrained(folder, dtype)
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    info = backend.info()
    print(f"{info['cpu']}, {info['isa']}, {options.threads} threads, torch {torch.__version__}, {options.dtype}")
    for B in map(int, options.batch.split(",")):
        ids = torch.randint(plain.config.vocab_size, (B, options.prompt))
        check(model, plain, ids)
        ways = providers(model, plain, ids)
        found = medians(ways, (1, options.new), options.rounds)
        rate = {way: B * (options.new - 1) / (whole - first) for way, (first, whole) in found.items()}
        for way, (first, whole) in found.items():
            ratios = f"{rate['llmfast'] / rate[way]:5.2f}x decoding, {whole / found['llmfast'][1]:5.2f}x whole"
            print(
                f"B={B}  {way:12s} {rate[way]:7.1f} tokens/s  prompt and a token {1e3 * first:6.1f} ms  "
                f"whole call {1e3 * whole:7.1f} ms  {'' if way == 'llmfast' else ratios}",
                flush=True,
            )


if __name__ == "__main__":
    main()
