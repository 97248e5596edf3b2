"""Corpora: what is read from each kind of source, fingerprints, and the errors."""

import json
import os
import sys
import warnings
from pathlib import Path

import pytest

from llmfast.data import DocumentList, open_corpus


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_standard_library_is_code_without_tests():
    corpus = open_corpus("stdlib")
    names = [file.as_posix() for file in corpus.files]
    assert len(names) > 300 and all(name.endswith(".py") for name in names)
    assert not any(f"/{part}/" in name for name in names for part in ("test", "tests", "idle_test", "site-packages"))
    assert any(name.endswith("/argparse.py") for name in names)
    assert names == [file.as_posix() for file in open_corpus("stdlib").files]
    first = next(iter(corpus))
    assert first == next(file.read_text("utf-8") for file in corpus.files if file.stat().st_size)


def test_text_file_whole_and_split_on_a_separator(tmp_path):
    file = write(tmp_path / "t.txt", "\ufeffone\r\n<|sep|>two <|sep|><|sep|>três")
    assert list(open_corpus(file)) == ["one\r\n<|sep|>two <|sep|><|sep|>três"]
    assert list(open_corpus(file, separator="<|sep|>")) == ["one\r\n", "two ", "três"]
    assert list(open_corpus(write(tmp_path / "empty.txt", ""), separator="x")) == []


def test_folder_is_read_recursively_in_order_without_hidden_files(tmp_path):
    for name in ("b.txt", "a/z.md", "a/a.py", ".git/x.txt", "a/.hidden.txt", "image.png"):
        write(tmp_path / name, name)
    os.mkfifo(tmp_path / "pipe.txt")
    assert list(open_corpus(tmp_path)) == ["a/a.py", "a/z.md", "b.txt"]
    assert list(open_corpus(str(tmp_path / "**" / "*.md"))) == ["a/z.md"]


def test_jsonl(tmp_path):
    lines = [{"text": "one", "body": "1"}, {"text": None, "body": "2"}, {"text": "zwölf", "body": "3"}]
    file = write(tmp_path / "d.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    assert list(open_corpus(file)) == ["one", "zwölf"]
    assert list(open_corpus(file, text_field="body")) == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"d\.jsonl:2: not JSON"),
        ('{"body": "a"}', r"d\.jsonl:2: no field 'text' .*'body'"),
        ('["text"]', r"d\.jsonl:2: no field 'text' .*list"),
        ('{"text": 3}', r"d\.jsonl:2: field 'text' is int; expected a string"),
    ],
)
def test_bad_jsonl_names_file_and_line(tmp_path, line, message):
    corpus = open_corpus(write(tmp_path / "d.jsonl", f'{{"text": "fine"}}\n{line}\n'))
    with pytest.raises(ValueError, match=message):
        list(corpus)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = ["one", None, "", "zwölf"] * 700  # more than one batch
    dictionary = pyarrow.array(texts).dictionary_encode()
    table = pyarrow.table({"text": texts, "n": list(range(2800)), "coded": dictionary})
    parquet.write_table(table, tmp_path / "d.parquet")
    expected = [text for text in texts if text]
    assert list(open_corpus(tmp_path / "d.parquet")) == expected
    assert list(open_corpus(tmp_path, text_field="coded")) == expected
    documents = iter(open_corpus(tmp_path / "d.parquet"))
    assert list(documents) and documents.bytes_read == documents.corpus.size
    with pytest.raises(ValueError, match=r"no column 'body' .*'text', 'n', 'coded'"):
        list(open_corpus(tmp_path / "d.parquet", text_field="body"))
    with pytest.raises(ValueError, match="column 'n' is int64; expected strings"):
        list(open_corpus(tmp_path / "d.parquet", text_field="n"))
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        list(open_corpus(write(tmp_path / "bad.parquet", b"PAR1 nothing")))


def test_parquet_without_pyarrow_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    corpus = open_corpus(write(tmp_path / "d.parquet", b"PAR1"))
    with pytest.raises(ImportError, match="pip install pyarrow"):
        list(corpus)


def test_invalid_utf8_is_replaced_counted_and_reported(tmp_path):
    write(tmp_path / "a.txt", "fine, with a \ufffd of its own")
    write(tmp_path / "b.txt", b"bad \xff, cut short \xe2\x82, and \xef\xbf\xbd meant")
    documents = iter(open_corpus(tmp_path))
    with pytest.warns(UserWarning, match=r"2 invalid UTF-8 sequences .* the first in .*b\.txt"):
        texts = list(documents)
    assert texts[1] == "bad \ufffd, cut short \ufffd, and \ufffd meant"
    assert documents.replaced == 2

    lone = open_corpus(write(tmp_path / "c.jsonl", r'{"text": "lone \ud800, pair \ud83d\ude00"}'))
    with pytest.warns(UserWarning, match="1 invalid"):
        assert list(lone) == ["lone \ufffd, pair 😀"]


def test_valid_text_raises_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(open_corpus(write(tmp_path / "a.txt", "grün"))) == ["grün"]


def test_position_reaches_the_size(tmp_path):
    for number in range(3):
        write(tmp_path / f"{number}.txt", f"text {number}|more")
    documents = iter(open_corpus(tmp_path, separator="|"))
    positions = [documents.bytes_read for _ in documents]
    assert positions == sorted(positions)
    assert positions[-1] == documents.corpus.size == 33


def test_fingerprint_follows_content_and_stamp_follows_the_file(tmp_path):
    one, two = write(tmp_path / "x" / "a.txt", "same"), write(tmp_path / "y" / "renamed.txt", "same")
    assert open_corpus(one).fingerprint == open_corpus(two).fingerprint
    assert open_corpus(one).stamp != open_corpus(two).stamp
    before = open_corpus(one)
    fingerprint, stamp = before.fingerprint, before.stamp
    os.utime(one, ns=(1, 1))
    assert open_corpus(one).fingerprint == fingerprint and open_corpus(one).stamp != stamp
    write(one, "sane")
    assert open_corpus(one).fingerprint != fingerprint
    assert open_corpus(two, separator="m").fingerprint != fingerprint


def test_files_that_join_alike_differ(tmp_path):
    write(tmp_path / "x" / "a.txt", "ab"), write(tmp_path / "x" / "b.txt", "c")
    write(tmp_path / "y" / "a.txt", "a"), write(tmp_path / "y" / "b.txt", "bc")
    assert open_corpus(tmp_path / "x").fingerprint != open_corpus(tmp_path / "y").fingerprint


def test_a_list_of_documents_is_a_corpus():
    corpus = DocumentList("notes", ["a", "", "ü\ud800"])
    with pytest.warns(UserWarning, match="1 invalid"):
        assert list(corpus) == ["a", "ü\ufffd"]
    assert open_corpus(corpus) is corpus
    assert corpus.fingerprint == DocumentList("other", ["a", "", "ü\ud800"]).fingerprint


def test_errors_name_what_came_and_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'nowhere\.txt': expected 'stdlib', or an existing"):
        open_corpus("nowhere.txt")
    write(tmp_path / "only" / "image.png", b"")
    with pytest.raises(FileNotFoundError, match=r"holds no file ending in one of .*txt"):
        open_corpus(tmp_path / "only")
    with pytest.raises(ValueError, match="NUL bytes; expected UTF-8"):
        open_corpus(write(tmp_path / "utf16.txt", "text".encode("utf-16")))
    write(tmp_path / "folder" / "a.txt", "text"), write(tmp_path / "folder" / "b.txt", "text".encode("utf-16-be"))
    for spec in (tmp_path / "folder", tmp_path / "folder" / "*.txt"):
        with pytest.raises(ValueError, match=r"b\.txt': holds NUL bytes; expected UTF-8"):
            list(open_corpus(spec))
    assert list(open_corpus(tmp_path / "folder" / "*.txt", separator="\0"))[:3] == ["text", "t", "e"]
    with pytest.raises(ValueError, match=r"expected JSON lines in a \.jsonl"):
        open_corpus(write(tmp_path / "array.json", "[]"))
    write(tmp_path / "mixed" / "README.md", "about"), write(tmp_path / "mixed" / "d.jsonl", "{}")
    with pytest.raises(ValueError, match="mixes jsonl and text files"):
        open_corpus(tmp_path / "mixed")
    with pytest.raises(ValueError, match="separator is empty"):
        open_corpus("stdlib", separator="")
