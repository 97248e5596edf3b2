"""Tokenizers: text to ids and back. Bytes and characters here, byte-pair encoding in `bpe`.

All share `Tokenizer`'s surface. Encoding never turns text into special tokens unless asked: a document that quotes
``<|endoftext|>`` stays one document. For tokenizers made here ``decode(encode(text)) == text`` for every text.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .files import Progress, fingerprint_of, write_json

TOKENIZER_KINDS = ("byte", "char", "bpe")
OWN_FILE = "llmfast_tokenizer.json"  # bytes and characters; BPE is saved as tokenizer.json, which other tools read too


class Tokenizer:
    """What every tokenizer has.

    `kind`; `vocab_size`, one more than the largest id; `eot_id`, the end-of-document token, or None; `fingerprint`,
    32 hex digits: equal tokenizers give equal ids. `decode` leaves special tokens out.

    Tokenizers of pretrained models may also have `bos_id`, the token that a document begins with; `prefix_ids`, what the
    model expects before every text (`encode` does not add it); `stop_ids`, all tokens that end an answer, `eot_id`
    among them; `chat_template`, Jinja source (see `llmfast.generate.chat`).
    """

    kind: str
    vocab_size: int
    eot_id: int | None
    bos_id: int | None = None
    prefix_ids: tuple[int, ...] = ()
    chat_template: str | None = None

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return () if self.eot_id is None else (self.eot_id,)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array a text, without special tokens: the fast way to encode much text."""
        raise NotImplementedError

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes a token stands for (perhaps part of a character); none for special tokens."""
        raise NotImplementedError

    def _description(self) -> dict[str, Any]:
        """All that decides the ids, JSON-able: what is saved, and what the fingerprint is of."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without special tokens. TypeError unless `text` is str."""
        if not isinstance(text, str):
            raise TypeError(f"text is {type(text).__name__}; expected str")
        return self.encode_batch([text])[0].tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` (ints, an array or a tensor); bytes that are not UTF-8 come out as U+FFFD."""
        return b"".join(map(self.token_bytes, as_ints(ids))).decode("utf-8", "replace")

    def stream_decoder(self) -> StreamDecoder:
        """A new decoder for ids that come one at a time; see `decode_stream`."""
        return StreamDecoder(self)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Decode `ids` as they come: pieces of whole characters, whose concatenation is ``decode(ids)``.

        Example::

            for piece in tokenizer.decode_stream(model_ids):
                print(piece, end="", flush=True)
        """
        decoder = self.stream_decoder()
        for token_id in ids:
            if piece := decoder.feed(int(token_id)):
                yield piece
        if piece := decoder.finish():
            yield piece

    def save(self, folder: str | os.PathLike) -> None:
        """Write the tokenizer into `folder` (made if absent); `load_tokenizer(folder)` gives it back."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / OWN_FILE, self._description())

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint_of(self._description())

    def _check_id(self, token_id: int) -> int:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        return token_id

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size}, eot_id={self.eot_id})"


class StreamDecoder:
    """Turns ids into text one by one, holding back the bytes of an unfinished character."""

    def __init__(self, tokenizer: Tokenizer):
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """The characters that `token_id` completes; perhaps none."""
        return self._utf8.decode(self._token_bytes(token_id))

    def finish(self) -> str:
        """What is left at the end: U+FFFD when the ids stopped inside a character, else nothing."""
        return self._utf8.decode(b"", final=True)


class ByteTokenizer(Tokenizer):
    """Ids 0-255 are the UTF-8 bytes; 256 ends a document. Needs no training and knows every text."""

    kind = "byte"
    vocab_size = 257
    eot_id = 256

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def token_bytes(self, token_id: int) -> bytes:
        return b"" if self._check_id(token_id) == self.eot_id else bytes((token_id,))

    def _description(self) -> dict[str, Any]:
        return {"kind": self.kind}


class CharTokenizer(Tokenizer):
    """One id a character, in code point order, of a fixed set; with `eot`, one more id that ends a document.

    Encoding a character outside the set raises ValueError.

    Example::

        tokenizer = CharTokenizer.fit(["to be or not to be"])   # vocab_size 7, eot_id None
    """

    kind = "char"

    def __init__(self, characters: Iterable[str], *, eot: bool = False):
        self.characters = "".join(sorted(set(characters)))
        self.vocab_size = len(self.characters) + eot
        self.eot_id = len(self.characters) if eot else None
        codes = _code_points(self.characters)
        self._id_of = np.full(int(codes.max(initial=0)) + 1, -1, np.int32)
        self._id_of[codes] = np.arange(codes.size, dtype=np.int32)
        self._bytes = [character.encode() for character in self.characters] + [b""] * eot

    @classmethod
    def fit(cls, documents: Iterable[str]) -> CharTokenizer:
        """The characters of `documents`; an end-of-document id only when there are several, as there is nothing
        to end in a single text (so Shakespeare gets nanoGPT's 65 ids)."""
        characters: set[str] = set()
        n_documents = 0
        for document in documents:
            characters.update(document)
            n_documents += 1
        if not characters:
            raise ValueError("the corpus holds no characters; expected at least one")
        return cls(characters, eot=n_documents > 1)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode_one(text) for text in texts]

    def _encode_one(self, text: str) -> np.ndarray:
        codes = _code_points(text)
        ids = self._id_of.take(codes, mode="clip")
        ids[codes >= self._id_of.size] = -1
        if ids.size and ids.min() < 0:
            position = int(np.argmin(ids))
            character = text[position]
            raise ValueError(
                f"character {character!r} (U+{ord(character):04X}) at position {position} is not among the "
                f"{len(self.characters)} characters this tokenizer was fitted on"
            )
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[self._check_id(token_id)]

    def _description(self) -> dict[str, Any]:
        return {"kind": self.kind, "characters": self.characters, "eot": self.eot_id is not None}


def build_tokenizer(
    kind: str, corpus: Iterable[str] | None = None, vocab_size: int = 4096, progress: Progress | None = None
) -> Tokenizer:
    """Make a tokenizer: ``"byte"`` (needs no corpus), ``"char"`` or ``"bpe"``, fitted on `corpus`.

    `vocab_size` is for BPE: how many ids to learn, the end-of-document token among them; bytes and characters have
    the size they have. Training is deterministic. `progress(stage, done, total)` counts bytes of the corpus.

    Errors: ValueError for an unknown kind, a missing or empty corpus, or a vocab_size below 257.

    Example::

        tokenizer = build_tokenizer("bpe", open_corpus("stdlib"), vocab_size=8192)
    """
    if kind not in TOKENIZER_KINDS:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(TOKENIZER_KINDS)}, or use load_tokenizer(path)")
    if kind == "byte":
        return ByteTokenizer()
    if corpus is None:
        raise ValueError(f"corpus is None; a {kind} tokenizer is fitted on one")
    if isinstance(corpus, str):  # whose items are characters: it would train, on nonsense
        raise TypeError("corpus is str; expected documents, as open_corpus gives")
    documents = _reported(corpus, f"reading for the {kind} tokenizer", progress)
    if kind == "char":
        return CharTokenizer.fit(documents)
    from .bpe import BPETokenizer

    return BPETokenizer.train(documents, vocab_size, progress)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer in `path`: a folder written by `save`, a Hugging Face ``tokenizer.json`` or its folder, a folder
    of GPT-2's ``vocab.json`` + ``merges.txt`` (or ``encoder.json`` + ``vocab.bpe``), or a ``.gguf`` file (or a folder
    of one; needs the extra ``hf``).

    Errors: FileNotFoundError when none is there, ValueError when what is there cannot be read.
    """
    from .bpe import BPETokenizer

    path = Path(path)
    files = [path] if path.suffix.lower() == ".gguf" else sorted(path.glob("*.gguf"))
    if len(files) == 1 and not (path / "tokenizer.json").is_file():
        from .gguf_tokenizer import load_gguf_tokenizer

        return load_gguf_tokenizer(files[0])
    own = path / OWN_FILE if path.is_dir() else path
    if own.name != OWN_FILE or not own.is_file():
        return BPETokenizer.load(path)
    try:
        saved = json.loads(own.read_bytes())
        if saved["kind"] == "byte":
            return ByteTokenizer()
        if saved["kind"] == "char":
            return CharTokenizer(saved["characters"], eot=saved["eot"])
        raise ValueError(f"kind {saved['kind']!r} is none of byte, char")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{own}: not a tokenizer that llmfast saved ({error!r})") from None


def as_ints(ids: Iterable[int]) -> list[int]:
    """Plain ints from ints, an array or a tensor (whose elements would each cost a conversion)."""
    return ids.tolist() if hasattr(ids, "tolist") else [int(token_id) for token_id in ids]


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)


def _reported(corpus: Iterable[str], stage: str, progress: Progress | None) -> Iterator[str]:
    documents = iter(corpus)
    for document in documents:
        yield document
        if progress is not None and hasattr(documents, "bytes_read"):  # a Corpus; other iterables know no size
            progress(stage, documents.bytes_read, documents.corpus.size)
