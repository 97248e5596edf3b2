"""Text in, text out: prompts are tokenised, results decoded, and stop strings cut off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmfast.generate.decoding import Decoding
from llmfast.generate.sampling import Sampling
from llmfast.generate.stopping import TextTail

if TYPE_CHECKING:
    from llmfast.data import Tokenizer
    from llmfast.models import GPT

__all__ = ["complete", "stream"]


def stream(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    stop_strings: str | Sequence[str] | None = None,
    seed: int | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Iterator[str]:
    """The continuation of `prompt`, piece by piece as it is sampled, without the prompt.

    Pieces hold whole characters. Ends at one of the tokenizer's `stop_ids`, before a stop string, or after
    `max_new_tokens`. A text follows the tokenizer's `prefix_ids`; an empty one starts a new document; a list of token ids
    is taken as it is. Seeds as in `llmfast.generate.generate`. `on_step(n)` is called after each step, with how many
    there have been.

    Raises:
        ValueError: when called, not at the first piece: an argument is out of range, or the context too short.

    Example:
        >>> for piece in stream(model, tokenizer, "def ", max_new_tokens=100, stop_strings="\\n\\n"):
        ...     print(piece, end="", flush=True)
    """
    tail = TextTail(tokenizer, stop_strings)
    decoding = _decoding(model, tokenizer, [prompt], max_new_tokens, sampling, seed)

    def pieces() -> Iterator[str]:
        for step in decoding:
            for _, token in step:
                if piece := tail.feed(token):
                    yield piece
            if on_step is not None:
                on_step(decoding.steps)
            if tail.stopped:
                return
        if piece := tail.finish():
            yield piece

    return pieces()


def complete(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    stop_strings: str | Sequence[str] | None = None,
    seed: int | None = None,
    on_step: Callable[[int], None] | None = None,
) -> list[str]:
    """The continuations of several prompts, computed as one batch; each as `stream` gives it, seeds ``seed + i``.

    Example:
        >>> complete(model, tokenizer, ["def ", "class "], max_new_tokens=50, seed=0)
    """
    if isinstance(prompts, str):
        raise TypeError("prompts: got str, expected a list of str")
    tails = [TextTail(tokenizer, stop_strings) for _ in prompts]
    texts = [""] * len(prompts)
    decoding = _decoding(model, tokenizer, prompts, max_new_tokens, sampling, seed)
    for step in decoding:
        for row, token in step:
            texts[row] += tails[row].feed(token)
            if tails[row].stopped:
                decoding.stop(row)
        if on_step is not None:
            on_step(decoding.steps)
    return [text + tail.finish() for text, tail in zip(texts, tails)]


def _decoding(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int | None,
) -> Decoding:
    device = next(model.parameters()).device
    return Decoding(
        model,
        [_encode(tokenizer, prompt).to(device) for prompt in prompts],
        max_new_tokens,
        sampling,
        seed=seed,
        eot_id=tokenizer.eot_id,
        stop_ids=tokenizer.stop_ids,
        vocab_size=min(tokenizer.vocab_size, model.config.vocab_size),
    )


def _encode(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> Tensor:
    if not isinstance(prompt, str):
        return torch.tensor(list(prompt), dtype=torch.int64)
    ids = [*tokenizer.prefix_ids, *tokenizer.encode(prompt)]
    if not ids:
        start = tokenizer.eot_id if tokenizer.bos_id is None else tokenizer.bos_id
        if start is None:
            raise ValueError(
                "prompt: got no text, expected some: this tokenizer has no end-of-document token to start at"
            )
        ids = [start]
    return torch.tensor(ids, dtype=torch.int64)
