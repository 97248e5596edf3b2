"""``llmfast generate``: continues text with a model that ``llmfast pretrain`` or ``llmfast demo`` has trained."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Literal

import torch
from tyro.conf import Positional, UseAppendAction

from llmfast.data import Tokenizer
from llmfast.generate import Sampling, complete, stream
from llmfast.models import GPT
from llmfast.train import load_model

DEFAULT_NEW_TOKENS = 200


@dataclass
class GenerateConfig:
    """Continue text with a trained model.

    Example: llmfast generate runs/pretrain --prompt "def main(" --temperature 0.7 --stop "\\n\\n"
    """

    run: Positional[str]
    """Folder of a run (its latest checkpoint is taken) or of one checkpoint."""
    prompt: UseAppendAction[list[str]] = field(default_factory=list)
    """Text to continue; - reads it from standard input; several are computed as one batch; default: a new document."""
    max_new_tokens: int | None = None
    """Most tokens to add; default: 200, or what still fits into the model's context."""
    num_samples: int = 1
    """Continuations of each prompt."""
    temperature: float = 0.8
    """0 always takes the likeliest token; 1 samples from the model's own distribution."""
    top_k: int | None = None
    """Only the k likeliest tokens."""
    top_p: float | None = None
    """Only the fewest likeliest tokens whose probabilities reach this sum."""
    min_p: float | None = None
    """Only tokens at least this many times as likely as the likeliest."""
    repetition_penalty: float | None = None
    """Above 1 makes tokens that have occurred less likely."""
    stop: UseAppendAction[list[str]] = field(default_factory=list)
    """End before this text; may be given several times. \\n is a line feed."""
    seed: int | None = None
    """The same seed gives the same text; default: different each time."""
    echo: bool = True
    """Print the prompt before its continuation."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights; auto: what the run computed in."""
    threads: int | None = None
    """Threads; default: torch's."""

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples: got {self.num_samples}, expected at least 1")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: got {self.max_new_tokens}, expected at least 1")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads: got {self.threads}, expected at least 1")
        if self.prompt.count("-") > 1:
            raise ValueError("prompt: got - twice, expected standard input once")
        self.sampling = Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)


def main(config: GenerateConfig) -> int:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    model, tokenizer = load_model(config.run, dtype)
    if tokenizer is None:
        raise ValueError(f"run: {config.run} was trained on token shards without a tokenizer, so it cannot speak text")
    prompts = [_from_stdin() if prompt == "-" else prompt for prompt in config.prompt or [""]]
    options = {
        "max_new_tokens": _new_tokens(config, model, tokenizer, prompts),
        "sampling": config.sampling,
        "stop_strings": [stop.replace("\\n", "\n") for stop in config.stop],
        "seed": config.seed,
    }
    count = _Count()
    if len(prompts) * config.num_samples == 1:
        _print_stream(model, tokenizer, prompts[0], config.echo, count, options)
    else:
        _print_batch(model, tokenizer, prompts, config, count, options)
    sys.stdout.flush()
    if sys.stderr.isatty():
        print(f"[{count.steps} steps, {count.steps / count.seconds:.1f} a second]", file=sys.stderr)
    return 0


class _Count:
    def __init__(self) -> None:
        self.steps = 0
        self._start = time.perf_counter()
        self.seconds = 1e-9

    def __call__(self, steps: int) -> None:
        self.steps = steps
        self.seconds = time.perf_counter() - self._start


def _from_stdin() -> str:
    """All of standard input, but for the line feed that ends its last line (as echo and editors add it)."""
    return sys.stdin.read().removesuffix("\n")


def _new_tokens(config: GenerateConfig, model: GPT, tokenizer: Tokenizer, prompts: list[str]) -> int:
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    longest = max(1, max(len(tokenizer.encode(prompt)) for prompt in prompts))
    return max(1, min(DEFAULT_NEW_TOKENS, model.config.context - longest + 1))


def _print_stream(model, tokenizer, prompt: str, echo: bool, count: _Count, options: dict) -> None:
    pieces = stream(model, tokenizer, prompt, on_step=count, **options)
    if echo:
        sys.stdout.write(prompt)
        sys.stdout.flush()
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _print_batch(model, tokenizer, prompts: list[str], config: GenerateConfig, count: _Count, options: dict) -> None:
    rows = [prompt for prompt in prompts for _ in range(config.num_samples)]
    texts = complete(model, tokenizer, rows, on_step=count, **options)
    for row, (prompt, text) in enumerate(zip(rows, texts)):
        number, sample = divmod(row, config.num_samples)
        sys.stdout.write(f"--- prompt {number + 1}, sample {sample + 1}\n{prompt if config.echo else ''}{text}\n")
