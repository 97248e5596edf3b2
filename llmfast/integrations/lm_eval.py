"""lm-eval's tasks on a `llmfast.models.GPT`: the model ``llmfast`` of its registry, once this module is imported.

>>> import lm_eval, llmfast.integrations.lm_eval
>>> lm_eval.simple_evaluate(model="llmfast", model_args="path=SmolLM2-135M-Instruct.Q4_1.gguf", tasks=["hellaswag"])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from llmfast import backend
from llmfast.data import Tokenizer, load_tokenizer
from llmfast.generate import Sampling, complete, render_chat
from llmfast.models import GPT

__all__ = ["LlmfastLM"]

LOGIT_ROWS = 256  # positions whose logits exist at a time: V of 49 thousand makes 50 MB of them


@register_model("llmfast")
class LlmfastLM(TemplateLM):
    """Scores and continues texts with a `GPT`; texts are encoded as transformers' tokenizers do, so that results are
    comparable with lm-eval's ``hf``.

    Requests are sorted by length and scored several at a time, one after another in a packed row: no padding, and only
    the positions that count reach the head.

    Args:
        path: what `GPT.from_pretrained` takes; or give `model` and `tokenizer`.
        dtype: ``float32``, ``bfloat16`` or ``float16``; default: the files'.
        max_length: longest input; default: the model's context.
        max_gen_toks: most tokens to generate where a task does not say.
        batch_size: texts that are continued at a time.
        batch_tokens: tokens that are scored at a time (at least one request).
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto`` (see `llmfast.backend.choose_device`), to which the model is
            moved; default: where it is, the processor for a path.

    Raises:
        ValueError: neither a path nor a model and tokenizer, or one that has no token to begin a text with; a device
            that is not one of these, or not there.

    Example:
        >>> lm_eval.simple_evaluate(LlmfastLM(model=model, tokenizer=tokenizer), tasks=["lambada_openai"])
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        model: GPT | None = None,
        tokenizer: Tokenizer | None = None,
        dtype: str | torch.dtype | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str | None = 8,
        max_batch_size: int | None = None,
        batch_tokens: int = 2048,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__()
        place = None if device is None else backend.choose_device(str(device))
        if path is not None:
            dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
            model, tokenizer = GPT.from_pretrained(path, dtype), load_tokenizer(path)
        if model is None or tokenizer is None:
            raise ValueError("path: got None, expected a path, or a model and a tokenizer")
        if tokenizer.bos_id is None and tokenizer.eot_id is None:
            raise ValueError("tokenizer: has neither bos_id nor eot_id, expected one to begin texts with")
        self.model, self.tokenizer = (model if place is None else model.to(place)).eval(), tokenizer
        self.max_length = int(max_length or model.config.context)
        if self.max_length > model.config.context:
            raise ValueError(f"max_length: got {max_length}, expected at most the context, {model.config.context}")
        self.max_gen_toks = int(max_gen_toks)
        self.batch_size = 8 if batch_size in (None, "auto") else int(batch_size)
        self.batch_tokens = int(batch_tokens)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eot_id

    @property
    def prefix_token_id(self) -> int:
        bos, eot = self.tokenizer.bos_id, self.tokenizer.eot_id
        return eot if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.fingerprint

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Without a generation prompt, the last message is left open, to be continued."""
        text = render_chat(self.tokenizer, chat_history, add_generation_prompt=add_generation_prompt)
        if not add_generation_prompt and chat_history:
            last = chat_history[-1]["content"].strip()
            text = text[: text.rindex(last) + len(last)]
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """With the tokens that the model expects before a text, unless told not to or the text begins with them."""
        ids = self._ids(string)
        prefix = list(self.tokenizer.prefix_ids)
        if add_special_tokens is False or (add_special_tokens is None and prefix and ids[: len(prefix)] == prefix):
            return ids
        return prefix + ids

    def _ids(self, text: str) -> list[int]:
        """Special tokens are recognised in the text, as transformers does: chat templates write them."""
        if self.tokenizer.kind == "bpe":
            return self.tokenizer.encode(text, parse_special=True)
        return self.tokenizer.encode(text)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        """For each (texts, context ids, continuation ids): the continuation's log-probability, and whether greedy
        decoding would give it. What is too long loses tokens of its context, on the left."""
        pairs = [self._fit(context, continuation) for _, context, continuation in requests]
        results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]))
        bar = tqdm(total=len(pairs), disable=disable_tqdm, desc="Running loglikelihood requests")
        for batch in self._batches(order, pairs):
            for i, result in zip(batch, self._score([pairs[i] for i in batch])):
                results[i] = result
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], result)
            bar.update(len(batch))
        bar.close()
        return results

    def _fit(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """The model's input, which lacks the last token, and the tokens to be scored."""
        if not context or not len(continuation) <= self.max_length:
            raise ValueError(
                f"request: got {len(context)} tokens of context and {len(continuation)} to score, expected at least one "
                f"and at most {self.max_length}"
            )
        return (context + continuation)[-(self.max_length + 1) :][:-1], continuation

    def _batches(self, order: Sequence[int], pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[list[int]]:
        """Runs of `order` that together have at most `batch_tokens` (and fit the context: a packed row's length)."""
        most = min(self.batch_tokens, self.model.config.context)
        batch: list[int] = []
        tokens = 0
        for i in order:
            if batch and tokens + len(pairs[i][0]) > most:
                yield batch
                batch, tokens = [], 0
            batch.append(i)
            tokens += len(pairs[i][0])
        if batch:
            yield batch

    @torch.no_grad()
    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        lengths = [len(inputs) for inputs, _ in pairs]
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        device = self.device
        hidden = self.model.hidden(
            torch.tensor([[token for inputs, _ in pairs for token in inputs]], device=device),
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None].to(device),
            cu_seqlens=bounds.to(device),
        )[0]
        ends = bounds[1:].tolist()
        rows = torch.cat([torch.arange(end - len(scored), end) for end, (_, scored) in zip(ends, pairs)])
        rows, targets = rows.to(device), torch.tensor([token for _, scored in pairs for token in scored], device=device)
        logprobs, greedy = [], []
        for some, wanted in zip(rows.split(LOGIT_ROWS), targets.split(LOGIT_ROWS)):
            logits = self.model.logits(hidden[some]).float()
            chosen = logits.gather(1, wanted[:, None])[:, 0]
            logprobs.append(chosen - logits.logsumexp(-1))
            greedy.append(logits.argmax(-1) == wanted)
        counts = [len(scored) for _, scored in pairs]
        logprob, agrees = torch.cat(logprobs).cpu(), torch.cat(greedy).cpu()
        sums = [part.double().sum().item() for part in logprob.split(counts)]
        return list(zip(sums, (bool(part.all()) for part in agrees.split(counts))))

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, in windows that do not overlap where they are longer than `max_length`."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm)):
            totals[owner] += logprob
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Continuations, each cut before the first of its stop strings; sorted by length into batches that share
        their settings. Prompts that leave no room lose tokens on the left."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests")
        for members in groups.values():
            options = self._options(requests[members[0]].args[1])
            room = self.max_length - options["max_new_tokens"]
            if room < 1:
                raise ValueError(
                    f"max_gen_toks: got {options['max_new_tokens']}, expected less than max_length = {self.max_length}"
                )
            prompts = {i: self.tok_encode(requests[i].args[0])[-room:] or [self.prefix_token_id] for i in members}
            members.sort(key=lambda i: -len(prompts[i]))
            for start in range(0, len(members), self.batch_size):
                batch = members[start : start + self.batch_size]
                answers = complete(self.model, self.tokenizer, [prompts[i] for i in batch], **options)
                for i, answer in zip(batch, answers):
                    texts[i] = answer
                    self.cache_hook.add_partial("generate_until", requests[i].args, answer)
                bar.update(len(batch))
        bar.close()
        return texts

    def _options(self, gen_kwargs: dict) -> dict:
        """lm-eval's settings as `llmfast.generate.complete` takes them; the seed makes runs repeatable."""
        given = normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)
        sampling = Sampling(
            given.get("temperature", 0.0) if given["do_sample"] else 0.0,
            given.get("top_k"),
            given.get("top_p"),
            given.get("min_p"),
            given.get("repetition_penalty"),
        )
        stops = [stop for stop in given["until"] if stop]
        return {"max_new_tokens": given["max_gen_toks"], "sampling": sampling, "stop_strings": stops, "seed": 0}
