"""transformers' GPT-2, as `gpu_model.py` measures it. Knows nothing of llmfast, so that torch.compile's cache can be
filled while llmfast is built: ``python benchmarks/gpu_model_peers.py [--static]`` does."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import GPT2Config, GPT2LMHeadModel

# A vocabulary that tensor cores like, as nanoGPT pads it; batches of training, prompt and answer of decoding.
VOCABULARY, CONTEXT, BATCH, PROMPT, NEW = 50304, 1024, 32, 128, 128
ADAMW = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}


def gpt2() -> GPT2LMHeadModel:
    """Random weights, always the same; no dropout, which llmfast's models do not have."""
    torch.manual_seed(0)
    none = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, attn_implementation="sdpa", **none)
    return GPT2LMHeadModel(config)


def batch(B: int = BATCH) -> torch.Tensor:
    return torch.randint(VOCABULARY, (B, CONTEXT + 1), device="cuda", generator=torch.Generator("cuda").manual_seed(2))


def training_step(model: GPT2LMHeadModel, ids: torch.Tensor, compiled: bool) -> Callable[[], torch.Tensor]:
    """Weights in float32, products in bfloat16 by autocast, fused AdamW: how such models are trained in PyTorch."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def loss_of(inputs, targets):
        logits = model(input_ids=inputs, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    loss_of = torch.compile(loss_of, dynamic=False) if compiled else loss_of

    def step() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def decoder(model: GPT2LMHeadModel, prompt: torch.Tensor, static: bool = False) -> Callable[[], torch.Tensor]:
    """Greedy; `static`: a cache of fixed size, and the step through torch.compile."""
    extra = {"cache_implementation": "static"} if static else {}
    mask = torch.ones_like(prompt)

    @torch.no_grad()
    def decode() -> torch.Tensor:
        return model.generate(
            prompt,
            attention_mask=mask,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            **extra,
        )

    return decode


def prompts(B: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(4)
    return torch.randint(VOCABULARY, (B, PROMPT), device="cuda", generator=generator)


def main() -> None:
    begun = time.perf_counter()
    model = gpt2().cuda()
    step = training_step(model, batch(), compiled=True)
    for _ in range(2):
        step().item()
    print(f"training step: {time.perf_counter() - begun:.0f} s", flush=True)
    if "--static" in sys.argv[1:]:
        decode = decoder(gpt2().cuda().bfloat16().eval(), prompts(1), static=True)
        for _ in range(2):
            decode()
        print(f"decoding, static cache: {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
