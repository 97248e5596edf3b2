"""Byte-pair encoding, by the `tokenizers` library: training, loading what others saved, encoding, decoding."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from .files import Progress, atomic_file, write_json
from .tokenizers import StreamDecoder, Tokenizer, as_ints

END_OF_TEXT = "<|endoftext|>"
END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")  # looked for when no tokenizer_config.json says
TEMPLATE_FILE = "chat_template.jinja"
GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))

# Measured on 12 MB of Python sources, 2 cores: one long text takes 13.9 s to encode, cut into pieces 3.7 s.
PIECE_CHARACTERS = 1 << 16
PIECES_AT_A_TIME = 256  # the library's result takes over 100 bytes a token until it is dropped
# GPT-2's pre-tokenizer always ends a token at a line feed between a visible character and a letter, so that
# cutting there leaves the ids as they are.
_SAFE_CUT = re.compile(r"(?<=[!-~]\n)(?=[A-Za-z])")


class BPETokenizer(Tokenizer):
    """A wrapper of a `tokenizers.Tokenizer` (kept as `.hf`): byte-level BPE when trained here; whatever the file
    says when loaded.

    `eot` names the end-of-document token; without it, ``tokenizer_config.json`` or the usual names decide. `bos` names
    the token that documents begin with, `stops` further tokens that end an answer.

    Example::

        tokenizer = BPETokenizer.train(open_corpus("stdlib"), vocab_size=8192)
        tokenizer.save("tokenizer"); load_tokenizer("tokenizer").encode("def f(x):")
    """

    kind = "bpe"

    def __init__(
        self,
        hf: HFTokenizer,
        eot: str | None = None,
        *,
        bos: str | None = None,
        stops: Iterable[int] = (),
        chat_template: str | None = None,
    ):
        self.hf = hf
        hf.no_truncation()  # files of encoder models carry both, and would cut documents without a word
        hf.no_padding()
        hf.encode_special_tokens = True  # that is: as the ordinary text they are
        self._vocab = hf.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocab.values()) + 1
        names = END_NAMES if eot is None else (eot,)
        self.eot_id = next((self._vocab[name] for name in names if name in self._vocab), None)
        if eot is not None and self.eot_id is None:
            raise ValueError(f"eot is {eot!r}, which is not among the {self.vocab_size} tokens of the vocabulary")
        self.bos_id = None if bos is None else self._vocab.get(bos)
        marked = hf.encode("x", add_special_tokens=True)
        ours = marked.special_tokens_mask.index(0) if 0 in marked.special_tokens_mask else 0
        self.prefix_ids = tuple(marked.ids[:ours])
        self.chat_template = chat_template
        self._stops = tuple(stops)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys([*super().stop_ids, *self._stops]))

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int, progress: Progress | None = None) -> BPETokenizer:
        """Learn `vocab_size` ids from `documents`: 256 bytes, merges, and ``<|endoftext|>`` as the last id.

        A small corpus may have fewer merges to learn: see `vocab_size` of the result.
        """
        if vocab_size < 257:
            raise ValueError(f"vocab_size is {vocab_size}; expected at least 257 (256 bytes and {END_OF_TEXT})")
        hf = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            min_frequency=2,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        hf.train_from_iterator((piece for document in documents for piece in _pieces(document)), trainer)
        hf.add_special_tokens([END_OF_TEXT])
        if progress is not None:
            progress("learning merges", vocab_size, vocab_size)
        return cls(hf, END_OF_TEXT)

    @classmethod
    def load(cls, path: str | os.PathLike) -> BPETokenizer:
        """Read a ``tokenizer.json``, its folder, or a folder of GPT-2's vocabulary and merges."""
        path = Path(path)
        folder = path if path.is_dir() else path.parent
        file = path / "tokenizer.json" if path.is_dir() else path
        pair = next((pair for pair in GPT2_FILES if all((folder / name).is_file() for name in pair)), None)
        try:
            if file.is_file():
                hf = HFTokenizer.from_file(str(file))
            elif path.is_dir() and pair is not None:
                hf = _byte_level(models.BPE.from_file(*(str(folder / name) for name in pair)))
                if END_OF_TEXT in hf.get_vocab():
                    hf.add_special_tokens([END_OF_TEXT])  # marks the id it has as special
            else:
                raise FileNotFoundError(
                    f"no tokenizer at {path}; expected tokenizer.json, llmfast_tokenizer.json, "
                    "vocab.json + merges.txt, or encoder.json + vocab.bpe"
                )
            config = _read_json(folder / "tokenizer_config.json")
            found = {
                "eot": _token_text(config.get("eos_token")),
                "bos": _token_text(config.get("bos_token")),
                "stops": _stops(_read_json(folder / "generation_config.json")),
                "chat_template": _chat_template(folder, config),
            }
        except FileNotFoundError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path}: not a readable tokenizer ({error})") from None
        return cls(hf, **found)

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """The ids of `text`. With `parse_special`, special tokens written in it (chat markers) become their ids."""
        if not parse_special:
            return super().encode(text)
        self.hf.encode_special_tokens = False
        try:
            return self.hf.encode(text, add_special_tokens=False).ids
        finally:
            self.hf.encode_special_tokens = True

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        pieces: list[str] = []
        ends = []  # of each text, in pieces
        for text in texts:
            pieces.extend(_pieces(text) if self._may_cut else [text])
            ends.append(len(pieces))
        ids: list[np.ndarray] = []
        for first in range(0, len(pieces), PIECES_AT_A_TIME):
            some = pieces[first : first + PIECES_AT_A_TIME]
            encodings = self.hf.encode_batch_fast(some, add_special_tokens=False)
            ids += [np.array(encoding.ids, np.int32) for encoding in encodings]
        return [np.concatenate(ids[start:end]) for start, end in zip([0, *ends], ends)]

    def token_bytes(self, token_id: int) -> bytes:
        if self._bytes is None:
            return b"" if token_id in self._special else self.hf.decode([token_id]).encode()
        return self._bytes[self._check_id(token_id)]

    def decode(self, ids: Iterable[int]) -> str:
        if self._bytes is None:
            return self.hf.decode(list(map(self._check_id, as_ints(ids))), skip_special_tokens=True)
        return super().decode(ids)

    def stream_decoder(self) -> StreamDecoder:
        return StreamDecoder(self) if self._bytes is not None else _LibraryStreamDecoder(self)

    def save(self, folder: str | os.PathLike) -> None:
        """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja`` (if there is one), as Hugging
        Face reads them, into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / "tokenizer.json") as file:
            file.write(self.hf.to_str(pretty=True).encode())
        eot = None if self.eot_id is None else self.hf.id_to_token(self.eot_id)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eot, "clean_up_tokenization_spaces": False}
        if self.bos_id is not None:
            config["bos_token"] = self.hf.id_to_token(self.bos_id)
        write_json(folder / "tokenizer_config.json", config)
        if self.chat_template is not None:
            with atomic_file(folder / TEMPLATE_FILE) as file:
                file.write(self.chat_template.encode())

    @cached_property
    def _json(self) -> dict[str, Any]:
        return json.loads(self.hf.to_str())

    @cached_property
    def _special(self) -> set[int]:
        return {token["id"] for token in self._json["added_tokens"] if token["special"]}

    @cached_property
    def _may_cut(self) -> bool:
        before = self._json["pre_tokenizer"] or {}
        plain = before.get("type") == "ByteLevel" and before["use_regex"] and not before["add_prefix_space"]
        return plain and self._json["normalizer"] is None

    @cached_property
    def _bytes(self) -> list[bytes] | None:
        """The bytes of each id, when the vocabulary spells bytes as GPT-2's does; else None."""
        if (self._json["decoder"] or {}).get("type") != "ByteLevel":
            return None
        table = [b""] * self.vocab_size
        for token, token_id in self._vocab.items():
            table[token_id] = b"".join(_BYTE_OF[character] for character in token if character in _BYTE_OF)
        for added in self._json["added_tokens"]:
            table[added["id"]] = b"" if added["special"] else added["content"].encode()
        return table

    def _description(self) -> dict[str, Any]:
        model = dict(self._json["model"])
        # the library has written a merge both as "a b" and as ["a", "b"]
        model["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
        added = [(token["id"], token["content"], token["special"]) for token in self._json["added_tokens"]]
        parts = {name: self._json[name] for name in ("normalizer", "pre_tokenizer")}
        return {"kind": self.kind, "model": model, "added": added, "eot": self.eot_id, **parts}


class _LibraryStreamDecoder(StreamDecoder):
    """For vocabularies that are not byte-level, whose decoders look at neighbouring tokens."""

    def __init__(self, tokenizer: BPETokenizer):
        self._tokenizer = tokenizer
        self._stream = decoders.DecodeStream(skip_special_tokens=True)
        self._held: list[int] = []

    def feed(self, token_id: int) -> str:
        self._held.append(self._tokenizer._check_id(token_id))
        piece = self._stream.step(self._tokenizer.hf, token_id)
        if piece is None:
            return ""
        self._held.clear()
        return piece

    def finish(self) -> str:
        return self._tokenizer.decode(self._held)


def _byte_level(model: models.BPE) -> HFTokenizer:
    hf = HFTokenizer(model)
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = decoders.ByteLevel()
    return hf


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE_CHARACTERS and (cut := _SAFE_CUT.search(text, start + PIECE_CHARACTERS)):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_bytes()) if file.is_file() else {}


def _token_text(token: str | dict[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _stops(generation: dict[str, Any]) -> list[int]:
    ids = generation.get("eos_token_id")
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """A file of its own, or the field of ``tokenizer_config.json``: one template, or several with names."""
    file = folder / TEMPLATE_FILE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        found = next((entry["template"] for entry in found if entry["name"] == "default"), None)
    return found


def _gpt2_byte_spelling() -> dict[str, bytes]:
    """GPT-2 spells the bytes that print as themselves and the other 68 as the code points from 256 on."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    spelling = {chr(byte): bytes((byte,)) for byte in printing}
    return spelling | {chr(256 + index): bytes((byte,)) for index, byte in enumerate(others)}


_BYTE_OF = _gpt2_byte_spelling()
