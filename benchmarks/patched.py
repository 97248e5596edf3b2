"""Hugging Face models with and without `llmfast.patch`: training step, prompt, decoding, embedding.

    python benchmarks/patched.py [--only gpt2,llama,bert] [--rounds 5] [--threads 2] [--dtype bfloat16] [--compile]

Random weights of the real sizes (GPT-2 124M, SmolLM2 135M, MiniLM-L6), no dropout. Medians of calls that take turns, after
a check that losses, logits' best tokens or embeddings agree; `--compile` adds torch.compile of the plain model. Of the
embeddings, texts of a quarter to all of T tokens, also with `patch(skip_padding=True)`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import llmfast
from llmfast import backend


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0))


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
    )


def bert() -> BertModel:
    return BertModel(
        BertConfig(
            hidden_size=384,
            num_hidden_layers=6,
            num_attention_heads=12,
            intermediate_size=1536,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ).eval()


def training(model, forward, B: int = 1, T: int = 1024) -> Callable[[], torch.Tensor]:
    ids = torch.randint(model.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> torch.Tensor:
        loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach().float()

    return step


def prompt(model, forward, T: int = 1024) -> Callable[[], torch.Tensor]:
    ids = torch.randint(model.config.vocab_size, (1, T), generator=torch.Generator().manual_seed(2))

    @torch.no_grad()
    def run() -> torch.Tensor:
        return forward(input_ids=ids, use_cache=True, logits_to_keep=1).logits.float()

    return run


def decoding(model, forward, B: int, new: int = 24) -> Callable[[], torch.Tensor]:
    ids = torch.randint(model.config.vocab_size, (B, 64), generator=torch.Generator().manual_seed(3))
    options = dict(attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0)

    @torch.no_grad()
    def run() -> torch.Tensor:
        return model.generate(ids, max_new_tokens=new, min_new_tokens=new, **options)[:, 64:66].float()

    return run


def embedding(model, forward, B: int = 32, T: int = 128) -> Callable[[], torch.Tensor]:
    ids = torch.randint(model.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(4))
    mask = (torch.arange(T) < torch.linspace(T // 4, T, B)[:, None]).long()

    @torch.no_grad()
    def run() -> torch.Tensor:
        return forward(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0].float()

    return run


CASES = {
    "gpt2": (gpt2, {"training step B=1 T=1024": training, "prompt T=1024": prompt}),
    "llama": (llama, {"training step B=1 T=1024": training, "prompt T=1024": prompt}),
    "bert": (bert, {"embedding B=32 T=128": embedding}),
}
for _, tasks in (CASES["gpt2"], CASES["llama"]):
    tasks["decoding B=1, 24 tokens"] = lambda model, forward: decoding(model, forward, 1)
    tasks["decoding B=8, 24 tokens"] = lambda model, forward: decoding(model, forward, 8)


def compare(name: str, task: str, make, plain, patched, options) -> str:
    calls = {"llmfast": make(patched, patched), "transformers": make(plain, plain)}
    if options.compile and "decoding" not in task:
        other = copy.deepcopy(plain)  # a training step changes its weights
        calls["compiled"] = make(other, torch.compile(other, dynamic=False))
    if make is embedding:
        without_padding = copy.deepcopy(plain)
        llmfast.patch(without_padding, skip_padding=True)
        calls["llmfast, no padding"] = make(without_padding, without_padding)
    results = {way: call() for way, call in calls.items()}
    truth = results["transformers"]
    error = max((found - truth).abs().max() for found in results.values()) / truth.abs().max()
    times: dict[str, list[float]] = {way: [] for way in calls}
    for _ in range(options.rounds):
        for way, call in calls.items():
            begun = time.perf_counter()
            call()
            times[way].append(time.perf_counter() - begun)
    medians = {way: 1e3 * statistics.median(found) for way, found in times.items()}
    cells = "  ".join(f"{way} {ms:.0f} ms" for way, ms in medians.items())
    ratios = ", ".join(
        f"{medians[way] / medians[ours]:.2f}x {way}" + ours.removeprefix("llmfast")
        for ours in medians
        if ours.startswith("llmfast")
        for way in medians
        if not way.startswith("llmfast")
    )
    return f"{name} {task}: {cells}  {ratios}  (largest difference {error:.1e} of the largest value)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES), help=f"of {','.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = f"{backend.info()['cpu']}, {options.threads} threads, {backend.info()['isa']}"
    print(f"{machine}, torch {torch.__version__}, {options.dtype}")
    for name in options.only.split(","):
        build, tasks = CASES[name]
        torch.manual_seed(0)
        plain = build().to(getattr(torch, options.dtype))
        patched = copy.deepcopy(plain)
        llmfast.patch(patched)
        for task, make in tasks.items():
            print(compare(name, task, make, plain, patched, options), flush=True)


if __name__ == "__main__":
    main()
