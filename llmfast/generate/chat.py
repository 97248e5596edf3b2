"""Conversations with instruction-tuned models: messages -> the tokens their chat template makes of them."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmfast.generate.text import stream

if TYPE_CHECKING:
    from llmfast.data import Tokenizer
    from llmfast.models import GPT

__all__ = ["chat", "chat_ids", "render_chat"]

Messages = Sequence[Mapping[str, Any]]


def render_chat(tokenizer: Tokenizer, messages: Messages, *, add_generation_prompt: bool = True, **values: Any) -> str:
    """The conversation as the model's template writes it.

    The template (Jinja, from the model's files) runs sandboxed: it reads what it is given and can change or reach
    nothing else.

    Args:
        tokenizer: one with a `chat_template`.
        messages: ``{"role": "system" | "user" | "assistant", "content": text}``, oldest first.
        add_generation_prompt: end where the assistant's answer begins.
        values: further names for the template, such as ``tools``.

    Raises:
        ValueError: there is no template, or it refuses the messages.

    Example:
        >>> render_chat(tokenizer, [{"role": "user", "content": "Hello"}])
        '<|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\n'
    """
    if tokenizer.chat_template is None:
        raise ValueError("tokenizer: has no chat_template, expected that of an instruction-tuned model")
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(f"messages: got {message!r}, expected a mapping with role and content")
    try:
        return _compiled(tokenizer.chat_template).render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            bos_token=_text(tokenizer, tokenizer.bos_id),
            eos_token=_text(tokenizer, tokenizer.eot_id),
            **{"tools": None, "documents": None, **values},
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"chat_template: {error}") from None


def chat_ids(tokenizer: Tokenizer, messages: Messages, *, add_generation_prompt: bool = True) -> list[int]:
    """Token ids of `render_chat`. Markers are recognised in the messages' text too, as transformers does: strip them
    from what strangers write."""
    text = render_chat(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    return tokenizer.encode(text, parse_special=True)


def chat(model: GPT, tokenizer: Tokenizer, messages: Messages, *, max_new_tokens: int, **options) -> Iterator[str]:
    """The assistant's answer, piece by piece; options as for `llmfast.generate.stream`.

    Example:
        >>> question = {"role": "user", "content": "What is the capital of France?"}
        >>> "".join(chat(model, tokenizer, [question], max_new_tokens=50, sampling=Sampling(temperature=0)))
        'The capital of France is Paris.'
    """
    return stream(model, tokenizer, chat_ids(tokenizer, messages), max_new_tokens=max_new_tokens, **options)


def _text(tokenizer: Tokenizer, token_id: int | None) -> str:
    return "" if token_id is None else tokenizer.hf.id_to_token(token_id)


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    """With the settings and the additions that Hugging Face's templates are written for."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def _raise(message: str):
    raise jinja2.TemplateError(message)
