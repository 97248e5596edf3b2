"""The decoding loop: one forward pass over the prompts, then one token a step from the key/value caches.

Prompts of different lengths are padded on the left, so that all rows end at the same column. Padding is masked out for
every later query, and positions count from each row's first real token, so a row computes what it would alone.

On a GPU the steps after the prompts replay a CUDA graph (graphs.py), with the same results up to
rounding: attention walks over hidden columns too, which cuts its sums elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmfast.generate.graphs import GraphedStep, try_graphed, why_not_graphed
from llmfast.generate.sampling import Sampling
from llmfast.generate.stopping import TextTail

if TYPE_CHECKING:
    from llmfast.data import Tokenizer
    from llmfast.models import GPT

__all__ = ["Decoding", "generate"]


def generate(
    model: GPT,
    input_ids: Tensor | Sequence[Tensor | Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    eot_id: int | None = None,
    stop_ids: Iterable[int] | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Tokenizer | None = None,
    seed: int | None = None,
    on_token: Callable[[int, int], bool | None] | None = None,
    prompt_lengths: Tensor | Sequence[int] | None = None,
    vocab_size: int | None = None,
) -> Tensor | list[Tensor]:
    """Continues prompts by up to `max_new_tokens` tokens each.

    Args:
        model: a `llmfast.models.GPT`, in any dtype, on any device. Its training mode and gradients are not touched.
        input_ids: ``[B, T]`` int64, or a list of prompts of different lengths (1-D tensors or lists of ids).
        max_new_tokens: most tokens to add; fewer when every row has stopped.
        temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`; temperature 0 is greedy.
        eot_id: ends a row; also what stopped rows are padded with.
        stop_ids: more ids that end a row.
        stop_strings: end a row when the text of its new tokens contains one (needs `tokenizer`).
        tokenizer: turns ids into text for `stop_strings`.
        seed: row i draws from its own generator, seeded with ``seed + i``: the same seed gives the same tokens, and a
            row does not depend on the rest of its batch. None: different each time. Torch's global generator is
            never used.
        on_token: called as ``on_token(row, id)`` for each new token; a true result stops that row.
        prompt_lengths: ``[B]``: row i of the tensor `input_ids` is a prompt of that many tokens, then padding.
        vocab_size: only ids below this may be chosen; for models whose vocabulary is padded beyond the tokenizer's.

    Returns:
        For a tensor ``[B, T + n]`` int64: the prompts and n <= max_new_tokens new tokens, where each row keeps the
        token that ended it and is then padded with `eot_id` (else the first of `stop_ids`, else 0). For a list, or
        with `prompt_lengths`, a list of B 1-D tensors without padding.

    Raises:
        ValueError: an argument is out of range, or prompt and new tokens exceed the model's context (before any work).
        FloatingPointError: the model's logits are not finite.

    Example:
        >>> llmfast.generate.generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=20, temperature=0.8, seed=1)
    """
    prompts = _as_prompts(input_ids, prompt_lengths)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    if stop_strings and tokenizer is None:
        raise ValueError("tokenizer: got None, expected one, because stop_strings are given")
    tails = [TextTail(tokenizer, stop_strings) for _ in prompts] if stop_strings else None
    stop_ids = list(stop_ids or [])
    decoding = Decoding(
        model, prompts, max_new_tokens, sampling, seed=seed, eot_id=eot_id, stop_ids=stop_ids, vocab_size=vocab_size
    )
    new: list[list[int]] = [[] for _ in prompts]
    for tokens in decoding:
        for row, token in tokens:
            new[row].append(token)
            if tails is not None:
                tails[row].feed(token)
                if tails[row].stopped:
                    decoding.stop(row)
            if on_token is not None and on_token(row, token):
                decoding.stop(row)

    rows = [torch.cat((p, torch.tensor(n, dtype=p.dtype, device=p.device))) for p, n in zip(prompts, new)]
    if prompt_lengths is not None or not isinstance(input_ids, Tensor):
        return rows
    padding = eot_id if eot_id is not None else stop_ids[0] if stop_ids else 0
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)


class Decoding(Iterator[list[tuple[int, int]]]):
    """An iterator over steps; each is the list of (row, token id) of the rows that are still going.

    The consumer may end a row with `stop`. Iteration ends when no row is left or after `max_new_tokens` steps.
    Arguments as for `generate`; `prompts` are 1-D int64 tensors.
    """

    def __init__(
        self,
        model: GPT,
        prompts: Sequence[Tensor],
        max_new_tokens: int,
        sampling: Sampling,
        *,
        seed: int | None = None,
        eot_id: int | None = None,
        stop_ids: Iterable[int] = (),
        vocab_size: int | None = None,
    ) -> None:
        self._check(model, prompts, max_new_tokens, vocab_size)
        self.model, self.sampling, self.max_new_tokens = model, sampling, max_new_tokens
        self.vocab_size = vocab_size or model.config.vocab_size
        self.live = [True] * len(prompts)
        self.steps = 0
        self._ends = {*stop_ids, *([] if eot_id is None else [eot_id])}

        device = prompts[0].device
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        padding = torch.tensor([longest - length for length in lengths], device=device)
        # The token chosen last is never fed back, so the caches need one place less.
        capacity = longest + max_new_tokens - 1
        self._caches = model.caches(capacity)
        self._input = torch.zeros(len(prompts), longest, dtype=torch.int64, device=device)
        for row, prompt in enumerate(prompts):
            self._input[row, padding[row] :] = prompt
        self._positions = self._visible = None
        if min(lengths) < longest:
            column = torch.arange(capacity, device=device)
            self._positions = (column - padding[:, None]).clamp(min=0)  # [B, capacity]
            self._visible = (column >= padding[:, None])[:, None, None]  # [B, 1, 1, capacity]
        self._graphed: GraphedStep | None = None
        self._may_graph = why_not_graphed(model, device, max_new_tokens) is None
        self._seen = None
        if sampling.repetition_penalty is not None:
            self._seen = torch.zeros(len(prompts), self.vocab_size, dtype=torch.bool, device=device)
            for row, prompt in enumerate(prompts):
                self._seen[row, prompt[prompt < self.vocab_size]] = True
        self._uniform = None if sampling.greedy else _uniforms(len(prompts), max_new_tokens, seed).to(device)

    def stop(self, row: int) -> None:
        """Ends a row; its later steps are left out."""
        self.live[row] = False

    # Not inference mode: tables the model makes here and keeps (rotary) must stay usable in training.
    @torch.no_grad()
    def __next__(self) -> list[tuple[int, int]]:
        if self.steps == self.max_new_tokens or not any(self.live):
            raise StopIteration
        logits = self._next_logits()[:, : self.vocab_size]
        uniform = None if self._uniform is None else self._uniform[:, self.steps]
        chosen = self.sampling.next(logits, uniform, self._seen)
        if self._seen is not None:
            self._seen.scatter_(1, chosen[:, None], True)
        self._input = chosen[:, None]
        self.steps += 1
        tokens = [(row, token) for row, token in enumerate(chosen.tolist()) if self.live[row]]
        for row, token in tokens:
            if token in self._ends:
                self.stop(row)
        return tokens

    def _next_logits(self) -> Tensor:
        """``[B, V]``: the prompts' at first, then a token a row on top of the caches."""
        if self._graphed is not None:
            return self._graphed(self._input)
        start = self._caches[0].length
        if start and self._may_graph:
            self._may_graph = False
            position = self._positions[:, start : start + 1] if self._positions is not None else None
            if position is None:
                position = torch.full_like(self._input, start)
            made = try_graphed(self.model, self._caches, position, self._visible, self._input)
            if made is not None:
                self._graphed, logits = made
                return logits
        end = start + self._input.shape[1]
        return self.model(
            self._input,
            position_ids=None if self._positions is None else self._positions[:, start:end],
            mask=None if self._visible is None else self._visible[..., :end],
            caches=self._caches,
            last_only=True,
        )[:, -1]

    @staticmethod
    def _check(model: GPT, prompts: Sequence[Tensor], max_new_tokens: int, vocab_size: int | None) -> None:
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: got {max_new_tokens}, expected 0 or more")
        V, context = model.config.vocab_size, model.config.context
        if vocab_size is not None and not 1 <= vocab_size <= V:
            raise ValueError(f"vocab_size: got {vocab_size}, expected 1 to {V}, the model's vocabulary")
        if not prompts:
            raise ValueError("input_ids: got no prompt, expected at least one")
        for row, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"input_ids: prompt {row} is empty, expected at least one token (such as the eot id)")
            if int(prompt.min()) < 0 or int(prompt.max()) >= V:
                raise ValueError(f"input_ids: prompt {row} holds ids outside 0 to {V - 1}, the model's vocabulary")
        longest = max(len(prompt) for prompt in prompts)
        fit = context - longest + 1
        if longest > context:
            raise ValueError(
                f"input_ids: got a prompt of {longest} tokens, expected at most {context}, the model's context"
            )
        if max_new_tokens > fit:
            raise ValueError(
                f"max_new_tokens: got {max_new_tokens}, but after a prompt of {longest} tokens only {fit} fit into the "
                f"model's context of {context}"
            )


def _as_prompts(input_ids, prompt_lengths) -> list[Tensor]:
    if not isinstance(input_ids, Tensor):
        if prompt_lengths is not None:
            raise ValueError("prompt_lengths: got it with a list of prompts, expected it with a [B, T] tensor only")
        prompts = [p if isinstance(p, Tensor) else torch.tensor(p, dtype=torch.int64) for p in input_ids]
        for row, prompt in enumerate(prompts):
            if prompt.dim() != 1:
                raise ValueError(f"input_ids: prompt {row} has shape {tuple(prompt.shape)}, expected (T,)")
    elif input_ids.dim() != 2:
        raise ValueError(f"input_ids: got shape {tuple(input_ids.shape)}, expected (B, T)")
    else:
        prompts = list(input_ids)
    for prompt in prompts:
        if prompt.is_floating_point() or prompt.dtype == torch.bool:
            raise TypeError(f"input_ids: got dtype {prompt.dtype}, expected int64")
    if prompt_lengths is not None:
        lengths = [int(length) for length in prompt_lengths]
        if len(lengths) != len(prompts) or not all(0 < length <= input_ids.shape[1] for length in lengths):
            B, T = input_ids.shape
            raise ValueError(f"prompt_lengths: got {lengths}, expected {B} lengths from 1 to {T}")
        prompts = [prompt[:length] for prompt, length in zip(prompts, lengths)]
    return [prompt.long() for prompt in prompts]


def _uniforms(rows: int, steps: int, seed: int | None) -> Tensor:
    """Numbers in [0, 1), float64 ``[rows, steps]``: what each row's generator gives, step by step."""
    if seed is not None and not -(2**63) <= seed <= 2**64 - rows:
        raise ValueError(f"seed: got {seed}, expected a number of 64 bits, also after adding the row's")
    generators = [torch.Generator() for _ in range(rows)]
    for row, generator in enumerate(generators):
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed + row)
    numbers = [torch.rand(steps, generator=generator, dtype=torch.float64) for generator in generators]
    return torch.stack(numbers)
