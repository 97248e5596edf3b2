"""Shards: the bytes on disk, llm.c's files, damage of every kind, and what is never overwritten."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfast.data import ShardError, TokenSplit, open_shard, write_shard
from llmfast.data.files import atomic_file

DOCUMENTS = [[5, 6, 7], [8], [9, 10]]
TOKENIZER, DATASET = "ab" * 16, "cd" * 16


def write(path: Path, documents=DOCUMENTS, vocab_size=100, dataset=DATASET) -> Path:
    with write_shard(path, vocab_size, TOKENIZER, dataset) as shard:
        for document in documents:
            shard.add(np.array(document), text_bytes=10 * len(document))
    return path


def write_llm_c(path: Path, tokens, magic=20240520, version=1, code="H") -> Path:
    header = struct.pack("<256i", magic, version, len(tokens), *[0] * 253)
    path.write_bytes(header + struct.pack(f"<{len(tokens)}{code}", *tokens))
    return path


@pytest.mark.parametrize(("vocab_size", "dtype"), [(100, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_what_is_written_is_read(tmp_path, vocab_size, dtype):
    documents = [*DOCUMENTS, [vocab_size - 1]]
    shard = open_shard(write(tmp_path / "a.bin", documents, vocab_size))
    assert shard.tokens.dtype == dtype and type(shard.tokens) is np.ndarray and not shard.tokens.flags.writeable
    assert shard.tokens.tolist() == [token for document in documents for token in document]
    assert shard.document_starts.tolist() == [0, 3, 4, 6]
    assert (shard.n_documents, shard.text_bytes) == (4, 70)
    assert (shard.tokenizer_fingerprint, shard.dataset_fingerprint) == (TOKENIZER, DATASET)
    shard.verify()


def test_the_bytes_are_as_documented(tmp_path):
    raw = write(tmp_path / "a.bin").read_bytes()
    assert struct.unpack_from("<8sII3Q", raw) == (b"LLMFTOKS", 1, 2, 6, 3, 60)
    assert raw[40:72].hex() == TOKENIZER + DATASET
    assert struct.unpack_from("<I", raw, 88) == (zlib.crc32(raw[:88]),) and not any(raw[92:1024])
    assert struct.unpack_from("<6H4x3q", raw, 1024) == (5, 6, 7, 8, 9, 10, 0, 3, 4) and len(raw) == 1024 + 16 + 24


def test_every_flipped_byte_is_found(tmp_path):
    good = write(tmp_path / "a.bin").read_bytes()
    file = tmp_path / "bad.bin"
    for position in [*range(92), *range(1024, len(good))]:
        file.write_bytes(good[:position] + bytes((good[position] ^ 1,)) + good[position + 1 :])
        with pytest.raises(ShardError, match=r"bad\.bin: "):
            open_shard(file).verify()


def test_damage_is_found_on_opening_and_named(tmp_path):
    good = write(tmp_path / "a.bin").read_bytes()
    file = tmp_path / "bad.bin"
    for cut in (0, 100, 1023, 1024, 1030, len(good) - 1):
        file.write_bytes(good[:cut])
        with pytest.raises(ShardError, match=r"bad\.bin: .*truncated"):
            open_shard(file)
    for content, message in [
        (good + b"\0", "not the file its header describes"),
        (good[:30] + b"\1" + good[31:], "header does not match its CRC"),
        (b"\x89PNG" + bytes(2000), "expected a token shard of llmfast or llm.c"),
    ]:
        file.write_bytes(content)
        with pytest.raises(ShardError, match=message):
            open_shard(file)
    header = good[:8] + struct.pack("<I", 9) + good[12:88]
    file.write_bytes(header + struct.pack("<I", zlib.crc32(header)) + good[92:])
    with pytest.raises(ShardError, match="shard version 9; this llmfast reads version 1"):
        open_shard(file)
    with pytest.raises(FileNotFoundError):
        open_shard(tmp_path / "none.bin")


def test_llm_c_shards(tmp_path):
    eot = 50256
    shard = open_shard(write_llm_c(tmp_path / "gpt2.bin", [eot, 1, 2, eot, 65535]))
    assert (shard.format, shard.tokens.dtype, shard.tokens.tolist()) == (
        "llm.c gpt-2",
        np.uint16,
        [eot, 1, 2, eot, 65535],
    )
    assert shard.document_starts.tolist() == [0, 3] and shard.text_bytes is None
    shard.verify()
    llama = open_shard(write_llm_c(tmp_path / "llama.bin", [7, 128000, 100_000], 20240801, 7, "I"))
    assert (llama.format, llama.tokens.tolist()) == ("llm.c llama-3", [7, 128000, 100_000])
    assert llama.document_starts.tolist() == [1]
    truncated = tmp_path / "truncated.bin"
    truncated.write_bytes((tmp_path / "gpt2.bin").read_bytes()[:-1])
    with pytest.raises(ShardError, match=r"truncated\.bin: 1,033 bytes long, the header says 1,034"):
        open_shard(truncated)
    with pytest.raises(ShardError, match="expected a token shard"):
        open_shard(write_llm_c(tmp_path / "version.bin", [1], version=2))


def test_writing_never_replaces_another_dataset(tmp_path):
    file = write(tmp_path / "a.bin")
    write(file, [[1, 2]])  # the same dataset again: as after a killed run
    assert open_shard(file).tokens.tolist() == [1, 2]
    before = file.read_bytes()
    with pytest.raises(FileExistsError, match=r"a\.bin exists and is no shard of this dataset"):
        write(file, dataset="ef" * 16)
    assert file.read_bytes() == before
    other = tmp_path / "notes.bin"
    other.write_text("something of the user's")
    with pytest.raises(FileExistsError):
        write(other)
    assert other.read_text() == "something of the user's"


def test_nothing_is_left_of_a_failed_write(tmp_path):
    file = write(tmp_path / "a.bin")
    before = file.read_bytes()
    with pytest.raises(KeyboardInterrupt), write_shard(file, 100, TOKENIZER, DATASET) as shard:
        shard.add(np.array([1]))
        raise KeyboardInterrupt
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_write_leaves_no_shard(tmp_path):
    file = tmp_path / "a.bin"
    pid = os.fork()
    if pid == 0:
        with atomic_file(file) as stream:
            stream.write(b"half")
            stream.flush()
            os._exit(9)
    os.waitpid(pid, 0)
    assert not file.exists()


@pytest.mark.parametrize(
    ("tokens", "message"), [([], "tokens is empty"), ([1, 100], "tokens span 1 to 100; expected ids from 0 to 99")]
)
def test_bad_documents_are_refused(tmp_path, tokens, message):
    with pytest.raises(ValueError, match=message), write_shard(tmp_path / "a.bin", 100) as shard:
        shard.add(np.array(tokens, np.int32))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=5), min_size=1, max_size=4), min_size=1))
def test_a_split_reads_as_one_stream(tmp_path_factory, shards):
    folder = tmp_path_factory.mktemp("split")
    for number, documents in enumerate(shards):
        write(folder / f"{number:03d}.bin", documents)
    split = TokenSplit.open(folder / "*.bin")
    stream = [token for documents in shards for document in documents for token in document]
    lengths = [len(document) for documents in shards for document in documents]
    assert len(split) == split.n_tokens == len(stream)
    assert split.document_starts.tolist() == [sum(lengths[:n]) for n in range(len(lengths))]
    assert split.bytes_per_token == 10
    for start in range(0, len(stream) + 1, 3):
        for stop in range(start, len(stream) + 1, 2):
            assert split.read(start, stop).tolist() == stream[start:stop]
    with pytest.raises(IndexError):
        split.read(0, len(stream) + 1)


def test_a_split_knows_its_shards_and_their_order(tmp_path):
    a, b = write(tmp_path / "a.bin"), write(tmp_path / "b.bin", [[1, 2]])
    c = write_llm_c(tmp_path / "c.bin", [1, 2, 3])
    assert TokenSplit.open([a, b]).fingerprint == TokenSplit.open(tmp_path / "[ab].bin").fingerprint
    assert TokenSplit.open([a, b]).fingerprint != TokenSplit.open([b, a]).fingerprint
    d = write_llm_c(tmp_path / "d.bin", [1, 2, 4])
    assert TokenSplit.open(c).fingerprint != TokenSplit.open(d).fingerprint
    assert TokenSplit.open(c).bytes_per_token is None
    with pytest.raises(ValueError, match="different tokenizers or formats"):
        TokenSplit.open([a, c])
    with pytest.raises(FileNotFoundError, match="no such file, and no file matches"):
        TokenSplit.open(tmp_path / "none*.bin")
    with pytest.raises(ValueError, match="no shards"):
        TokenSplit.open([])
    b.write_bytes(b.read_bytes()[:-8] + bytes(7) + b"\1")
    with pytest.raises(ShardError, match=r"b\.bin"):
        TokenSplit.open([a, b]).verify()
