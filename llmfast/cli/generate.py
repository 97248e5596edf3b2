"""``llmfast generate``: continues text, or answers, with a model trained here, a Hugging Face folder or a GGUF file."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from tyro.conf import Positional, UseAppendAction

from llmfast import backend
from llmfast.data import Tokenizer, load_tokenizer
from llmfast.generate import Sampling, chat_ids, complete, stream
from llmfast.models import GPT
from llmfast.models.pretrained import gguf_file
from llmfast.train import load_model

DEFAULT_NEW_TOKENS = 200


@dataclass
class GenerateConfig:
    """Continue text, or answer, with a trained model.

    Example: llmfast generate runs/pretrain --prompt "def main(" --temperature 0.7 --stop "\\n\\n"

    Example: llmfast generate SmolLM2-135M-Instruct.Q4_1.gguf --chat --prompt "What is the capital of France?"
    """

    model: Positional[str]
    """Folder of a run (its latest checkpoint is taken), of one checkpoint, or of a Hugging Face model; or a .gguf file."""
    prompt: UseAppendAction[list[str]] = field(default_factory=list)
    """Text to continue; - reads it from standard input; several are computed as one batch; default: a new document."""
    chat: bool = False
    """Prompts are questions to an instruction-tuned model, written as its chat template wants; without any, a
    conversation on the terminal, a line a question."""
    system: str | None = None
    """What the model is told before the conversation (with --chat)."""
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
    """Of the weights; auto: what the run computed in or the folder names; bfloat16 for GGUF."""
    device: str = "auto"
    """cpu, cuda or cuda:N. auto: a GPU, where there is one and llmfast was built with kernels for it."""
    threads: int | None = None
    """Threads; default: torch's."""

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples: got {self.num_samples}, expected at least 1")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: got {self.max_new_tokens}, expected at least 1")
        backend.check_threads(self.threads)
        if self.prompt.count("-") > 1:
            raise ValueError("prompt: got - twice, expected standard input once")
        if self.system is not None and not self.chat:
            raise ValueError("system: got it without chat, expected both")
        if self.chat and not self.prompt and self.num_samples > 1:
            raise ValueError("num_samples: got several in a conversation, expected 1 or a prompt")
        self.sampling = Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)


def main(config: GenerateConfig) -> int:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = backend.choose_device(config.device)
    model, tokenizer = _load(config)
    model = model.to(device)
    if config.chat and not config.prompt:
        return _converse(model, tokenizer, config)
    texts = [_from_stdin() if prompt == "-" else prompt for prompt in config.prompt or [""]]
    prompts = [chat_ids(tokenizer, _messages(config, text)) for text in texts] if config.chat else texts
    options = _options(config, model, tokenizer, prompts)
    rows, of, itemsize = len(prompts) * config.num_samples, model.config, model.head_weight.itemsize
    backend.check_memory(
        f"num_samples: got {config.num_samples}, and the keys and values of {rows:,} texts take",
        rows * options["max_new_tokens"] * of.layers * 2 * of.Hkv * of.D * itemsize,
        device,
    )
    count = _Count()
    if len(prompts) * config.num_samples == 1:
        _print_stream(model, tokenizer, prompts[0], config.echo and not config.chat, count, options)
    else:
        _print_batch(model, tokenizer, prompts, texts, config, count, options)
    sys.stdout.flush()
    if sys.stderr.isatty():
        print(f"[{count.steps} steps, {count.steps / count.seconds:.1f} a second]", file=sys.stderr)
    return 0


def _load(config: GenerateConfig) -> tuple[GPT, Tokenizer]:
    path = Path(config.model)
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    gguf = gguf_file(path)
    ours = (path / "checkpoints").is_dir() or (path / "state.json").is_file()
    if gguf is not None or ((path / "config.json").is_file() and not ours):
        model = GPT.from_pretrained(path, dtype or (torch.bfloat16 if gguf else None))
        return model, load_tokenizer(path)
    try:
        model, tokenizer = load_model(path, dtype)
    except FileNotFoundError as error:
        if (path / "checkpoints").is_dir():
            raise
        raise FileNotFoundError(f"{error}, of a Hugging Face model, or a .gguf file") from None
    if tokenizer is None:
        raise ValueError(f"model: {path} was trained on token shards without a tokenizer, so it cannot speak text")
    return model, tokenizer


def _messages(config: GenerateConfig, text: str) -> list[dict[str, str]]:
    system = [{"role": "system", "content": config.system}] if config.system is not None else []
    return [*system, {"role": "user", "content": text}]


def _options(config: GenerateConfig, model: GPT, tokenizer: Tokenizer, prompts: list[str | list[int]]) -> dict:
    return {
        "max_new_tokens": _new_tokens(config, model, tokenizer, prompts),
        "sampling": config.sampling,
        "stop_strings": [stop.replace("\\n", "\n") for stop in config.stop],
        "seed": config.seed,
    }


def _converse(model: GPT, tokenizer: Tokenizer, config: GenerateConfig) -> int:
    """Questions from the terminal, a line each, until it ends; every answer sees what was said before."""
    messages = _messages(config, "")[:-1]
    asking = "> " if sys.stdin.isatty() else ""
    while True:
        print(asking, end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return 0
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.rstrip("\n")})
        ids = chat_ids(tokenizer, messages)
        answer = ""
        for piece in stream(model, tokenizer, ids, **_options(config, model, tokenizer, [ids])):
            answer += piece
            print(piece, end="", flush=True)
        print(flush=True)
        messages.append({"role": "assistant", "content": answer})


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


def _new_tokens(config: GenerateConfig, model: GPT, tokenizer: Tokenizer, prompts: list[str | list[int]]) -> int:
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    prefix = len(tokenizer.prefix_ids)
    lengths = [prefix + len(tokenizer.encode(p)) if isinstance(p, str) else len(p) for p in prompts]
    longest = max(1, max(lengths))
    return max(1, min(DEFAULT_NEW_TOKENS, model.config.context - longest + 1))


def _print_stream(model, tokenizer, prompt: str | list[int], echo: bool, count: _Count, options: dict) -> None:
    pieces = stream(model, tokenizer, prompt, on_step=count, **options)
    if echo:
        sys.stdout.write(prompt)
        sys.stdout.flush()
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _print_batch(model, tokenizer, prompts, texts: list[str], config, count: _Count, options: dict) -> None:
    """`texts` are the prompts as the user wrote them."""
    samples = config.num_samples
    answers = complete(model, tokenizer, [p for p in prompts for _ in range(samples)], on_step=count, **options)
    for row, answer in enumerate(answers):
        number, sample = divmod(row, samples)
        shown = "" if not config.echo else f"{texts[number]}\n" if config.chat else texts[number]
        sys.stdout.write(f"--- prompt {number + 1}, sample {sample + 1}\n{shown}{answer}\n")
