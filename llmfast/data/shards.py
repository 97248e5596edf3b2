"""Token shards: memory-mapped files of uint16 or uint32 token ids.

An llmfast shard, little-endian throughout::

    offset 0      header, 1024 bytes, zero-padded:
                    magic "LLMFTOKS" | version u32 | bytes per token u32 (2 or 4)
                    tokens u64 | documents u64 | bytes of source text u64
                    tokenizer fingerprint, 16 bytes | dataset fingerprint, 16 bytes
                    BLAKE2b-128 of all after the header, 16 bytes | CRC-32 of the header up to here, u32
    offset 1024   token ids
    then          zeros up to a multiple of 8, then where each document starts: i64, in tokens, first 0, ascending

Opening checks the header's own CRC and the file's exact length, which costs the same for any size; `Shard.verify`
reads everything. llm.c's shards (256 int32: magic, version, tokens; then tokens) are read too; they have no checksum,
and their documents start where the end-of-text token stands.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .files import atomic_file, new_digest

HEADER_BYTES = 1024
MAGIC = b"LLMFTOKS"
VERSION = 1
_HEADER = struct.Struct("<8sIIQQQ16s16s16s")
_CRC = struct.Struct("<I")

# (magic, version) -> (name, bytes per token, the token that stands before each document), as llm.c's
# dev/data/data_common.py and fineweb.py write them
LLM_C_FORMATS = {(20240520, 1): ("llm.c gpt-2", 2, 50256), (20240801, 7): ("llm.c llama-3", 4, 128000)}


class ShardError(ValueError):
    """A shard that is truncated, corrupt, or not a shard; the message names the file and the reason."""


@dataclass(frozen=True, eq=False)
class Shard:
    """An open shard. `tokens` is a read-only memory map, uint16 or uint32 [n_tokens].

    `n_documents` and `text_bytes` are None and the fingerprints empty when the format does not say (llm.c).
    """

    path: Path
    format: str
    tokens: np.ndarray = field(repr=False)
    n_documents: int | None = None
    text_bytes: int | None = None
    tokenizer_fingerprint: str = ""
    dataset_fingerprint: str = ""
    checksum: bytes = field(default=b"", repr=False)
    eot_id: int | None = None

    @cached_property
    def document_starts(self) -> np.ndarray:
        """int64, ascending: the positions in `tokens` where a document starts."""
        if self.n_documents is None:
            return np.flatnonzero(self.tokens == self.eot_id)
        offset = _starts_offset(self.tokens.size, self.tokens.itemsize)
        return _map(self.path, np.dtype("<i8"), offset, self.n_documents)

    def verify(self) -> None:
        """Read the whole file and compare its checksum; ShardError if it differs. llm.c shards carry none."""
        if not self.checksum:
            return
        digest = new_digest()
        with open(self.path, "rb") as file:
            file.seek(HEADER_BYTES)
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.digest() != self.checksum:
            raise ShardError(f"{self.path}: the contents do not match the checksum in the header; the file is corrupt")


def open_shard(path: str | os.PathLike) -> Shard:
    """Map the shard at `path`, an llmfast or llm.c one, after checking its header and length.

    Errors: FileNotFoundError; ShardError for anything that is not a whole shard.
    """
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = file.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        raise ShardError(f"{path}: {size} bytes is less than the {HEADER_BYTES}-byte header; truncated or not a shard")
    if header[: len(MAGIC)] == MAGIC:
        return _open_own(path, size, header)
    magic, version, n_tokens = struct.unpack_from("<3i", header)
    if (magic, version) in LLM_C_FORMATS:
        name, width, eot_id = LLM_C_FORMATS[magic, version]
        _check_length(path, size, HEADER_BYTES + width * n_tokens)
        return Shard(path, name, _map(path, _dtype(width), HEADER_BYTES, n_tokens), eot_id=eot_id)
    raise ShardError(f"{path}: starts with {header[:8]!r}; expected a token shard of llmfast or llm.c")


def _open_own(path: Path, size: int, header: bytes) -> Shard:
    (crc,) = _CRC.unpack_from(header, _HEADER.size)
    if crc != zlib.crc32(header[: _HEADER.size]):
        raise ShardError(f"{path}: the header does not match its CRC; the file is corrupt")
    _, version, width, n_tokens, n_documents, text_bytes, tokenizer, dataset, checksum = _HEADER.unpack_from(header)
    if version != VERSION:
        raise ShardError(f"{path}: shard version {version}; this llmfast reads version {VERSION}")
    _check_length(path, size, _starts_offset(n_tokens, width) + 8 * n_documents)
    tokens = _map(path, _dtype(width), HEADER_BYTES, n_tokens)
    return Shard(path, "llmfast", tokens, n_documents, text_bytes, tokenizer.hex(), dataset.hex(), checksum)


def _check_length(path: Path, size: int, expected: int) -> None:
    if size != expected:
        state = "truncated" if size < expected else "not the file its header describes"
        raise ShardError(f"{path}: {size:,} bytes long, the header says {expected:,}; the file is {state}")


def _starts_offset(n_tokens: int, width: int) -> int:
    return HEADER_BYTES + -(-n_tokens * width // 8) * 8


def _dtype(width: int) -> np.dtype:
    return np.dtype(f"<u{width}")


def _map(path: Path, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
    if count == 0:  # which mmap refuses
        return np.empty(0, dtype)
    # a plain array over the map: slicing np.memmap itself costs microseconds a slice
    return np.memmap(path, dtype, "r", offset, (count,)).view(np.ndarray)


class ShardWriter:
    """Collects the documents of one shard; made by `write_shard`. Counts `n_tokens` and `text_bytes` so far."""

    def __init__(self, file: BinaryIO, vocab_size: int, tokenizer_fingerprint: str, dataset_fingerprint: str):
        self.n_tokens = 0
        self.text_bytes = 0
        self.vocab_size = vocab_size
        self.dtype = _dtype(2 if vocab_size <= 1 << 16 else 4)
        self._fingerprints = bytes.fromhex(tokenizer_fingerprint), bytes.fromhex(dataset_fingerprint)
        self._starts = array("q")
        self._digest = new_digest()
        self._file = file
        file.write(bytes(HEADER_BYTES))  # room for the header, which is known last

    def add(self, tokens: np.ndarray, text_bytes: int = 0) -> None:
        """Append one document of at least one token, made from `text_bytes` bytes of UTF-8.

        Errors: ValueError for no tokens, or ids outside the vocabulary.
        """
        if tokens.size == 0:
            raise ValueError("tokens is empty; expected a document of at least one token")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(f"tokens span {low} to {high}; expected ids from 0 to {self.vocab_size - 1}")
        self._starts.append(self.n_tokens)
        self._write(tokens.astype(self.dtype).tobytes())
        self.n_tokens += tokens.size
        self.text_bytes += text_bytes

    def finish(self) -> None:
        """Write where the documents start, then the header."""
        self._write(bytes(-self.n_tokens * self.dtype.itemsize % 8))
        self._write(np.array(self._starts, "<i8").tobytes())
        counts = self.n_tokens, len(self._starts), self.text_bytes
        header = _HEADER.pack(MAGIC, VERSION, self.dtype.itemsize, *counts, *self._fingerprints, self._digest.digest())
        self._file.seek(0)
        self._file.write(header + _CRC.pack(zlib.crc32(header)))

    def _write(self, block: bytes) -> None:
        self._file.write(block)
        self._digest.update(block)


@contextlib.contextmanager
def write_shard(
    path: str | os.PathLike, vocab_size: int, tokenizer_fingerprint: str = "", dataset_fingerprint: str = ""
) -> Iterator[ShardWriter]:
    """Write the shard `path`, a document at a time; it appears, whole, when the ``with`` block ends well.

    `vocab_size` decides the width: uint16 up to 65,536 ids. What exists at `path` is replaced only if it is a shard
    of the same dataset.

    Errors: FileExistsError on entering, when `path` is anything else.

    Example::

        with write_shard("train_000.bin", tokenizer.vocab_size, tokenizer.fingerprint) as shard:
            shard.add(tokenizer.encode_batch([text])[0], text_bytes=len(text.encode()))
    """
    path = Path(path)
    if path.exists() and not _is_shard_of(path, dataset_fingerprint):
        raise FileExistsError(f"{path} exists and is no shard of this dataset; delete it or choose another folder")
    with atomic_file(path) as file:
        writer = ShardWriter(file, vocab_size, tokenizer_fingerprint, dataset_fingerprint)
        yield writer
        writer.finish()


def _is_shard_of(path: Path, dataset_fingerprint: str) -> bool:
    try:
        return open_shard(path).dataset_fingerprint == dataset_fingerprint.ljust(32, "0")
    except ShardError:
        return False
