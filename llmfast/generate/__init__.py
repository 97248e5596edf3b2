"""Sampling from a model, token by token with key/value caches.

`generate` works on token ids (also as ``model.generate``); `stream` and `complete` on text::

    ids = llmfast.generate.generate(model, input_ids, max_new_tokens=50, temperature=0.8, top_p=0.95, seed=1)
    for piece in llmfast.generate.stream(model, tokenizer, "def ", max_new_tokens=100):
        print(piece, end="", flush=True)

`chat` answers messages with a model that has a chat template.
"""

from llmfast.generate.chat import chat, chat_ids, render_chat
from llmfast.generate.decoding import Decoding, generate
from llmfast.generate.sampling import Sampling
from llmfast.generate.stopping import TextTail
from llmfast.generate.text import complete, stream

__all__ = [
    "Decoding",
    "Sampling",
    "TextTail",
    "chat",
    "chat_ids",
    "complete",
    "generate",
    "render_chat",
    "stream",
]
