"""The tokenizer inside a GGUF file, as the `tokenizers` library would have it from ``tokenizer.json``."""

from __future__ import annotations

import os
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HFTokenizer

from .bpe import BPETokenizer
from .gguf_file import GGUFFile

__all__ = ["load_gguf_tokenizer"]

CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type

# How text is cut before merging, by tokenizer.ggml.pre: "digits" one by one and then as GPT-2 does, or by one pattern.
GPT2_PATTERN = ("gpt-2", "mpt", "olmo", "jais")
DIGITS_THEN_GPT2 = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
PATTERNS = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _LLAMA3.replace("{1,3}", ""),
    "deepseek-r1-qwen": _LLAMA3.replace("{1,3}", ""),
}
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")


def load_gguf_tokenizer(path: str | os.PathLike) -> BPETokenizer:
    """The tokenizer and chat template of a GGUF file whose ``tokenizer.ggml.model`` is ``gpt2`` (byte-level BPE) or
    ``llama`` (SentencePiece BPE).

    Raises:
        FileNotFoundError: it is not there. ValueError: not GGUF, or another kind of tokenizer; names the field.

    Example::

        tokenizer = load_gguf_tokenizer("SmolLM2-135M-Instruct.Q4_1.gguf")
    """
    file = GGUFFile(path)
    fields = {name.removeprefix("tokenizer."): value for name, value in file.fields.items()}
    kind = fields.get("ggml.model")
    try:
        if kind == "gpt2":
            hf = _byte_level(fields)
        elif kind == "llama":
            hf = _sentencepiece(fields)
        else:
            raise ValueError(f"tokenizer.ggml.model: got {kind!r}, expected gpt2 or llama")
        tokens = fields["ggml.tokens"]
        _add_marked_tokens(hf, tokens, fields.get("ggml.token_type", []))
        eos, bos = fields.get("ggml.eos_token_id"), fields.get("ggml.bos_token_id")
        if bos is not None and fields.get("ggml.add_bos_token", _begins_with_bos(fields)):
            hf.post_processor = processors.TemplateProcessing(
                single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
            )
    except (ValueError, KeyError, IndexError, TypeError) as error:
        missing = isinstance(error, KeyError)
        raise ValueError(f"{file.path}: {f'lacks tokenizer.{error.args[0]}' if missing else error}") from None
    return BPETokenizer(
        hf,
        eot=None if eos is None else tokens[eos],
        bos=None if bos is None else tokens[bos],
        stops=[fields[name] for name in ("ggml.eot_token_id", "ggml.eom_token_id") if name in fields],
        chat_template=fields.get("chat_template"),
    )


def _begins_with_bos(fields: dict[str, Any]) -> bool:
    """What llama.cpp does when ``add_bos_token`` is absent."""
    return fields["ggml.model"] == "llama" or fields.get("ggml.pre") in LLAMA3_NAMES


def _byte_level(fields: dict[str, Any]) -> HFTokenizer:
    vocabulary = {token: index for index, token in enumerate(fields["ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in fields["ggml.merges"]]
    for merge in merges:
        if "".join(merge) not in vocabulary:  # the library would panic
            raise ValueError(f"tokenizer.ggml.merges: makes {''.join(merge)!r}, which is not among the tokens")
    name = fields.get("ggml.pre")
    before = _pre_tokenizer(name)
    hf = HFTokenizer(models.BPE(vocabulary, merges, ignore_merges=name in LLAMA3_NAMES))
    hf.pre_tokenizer = before
    hf.decoder = decoders.ByteLevel()
    return hf


def _pre_tokenizer(name: str | None) -> pre_tokenizers.PreTokenizer:
    if name in GPT2_PATTERN:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in DIGITS_THEN_GPT2:
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if name in PATTERNS:
        pattern = pre_tokenizers.Split(Regex(PATTERNS[name]), behavior="isolated")
        return pre_tokenizers.Sequence([pattern, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    known = ", ".join((*GPT2_PATTERN, *DIGITS_THEN_GPT2, *PATTERNS))
    raise ValueError(f"tokenizer.ggml.pre: got {name!r}, expected one of {known}")


def _sentencepiece(fields: dict[str, Any]) -> HFTokenizer:
    """SentencePiece merges the neighbours whose union has the best score: BPE with the unions ranked by score."""
    tokens, scores = fields["ggml.tokens"], fields["ggml.scores"]
    id_of = {token: index for index, token in enumerate(tokens)}
    ranked = []
    for index, token in enumerate(tokens):
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        pairs = sorted((id_of[left], id_of[right]) for left, right in cuts if left in id_of and right in id_of)
        ranked += [(-scores[index], index, pair) for pair in pairs]
    ranked.sort(key=lambda entry: entry[:2])
    merges = [(tokens[left], tokens[right]) for _, _, (left, right) in ranked]
    unknown = tokens[fields.get("ggml.unknown_token_id", 0)]
    hf = HFTokenizer(models.BPE(id_of, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = fields.get("ggml.add_space_prefix", True)
    space = normalizers.Replace(" ", "▁")
    hf.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefix else space
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    hf.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return hf


def _add_marked_tokens(hf: HFTokenizer, tokens: list[str], kinds: list[int]) -> None:
    """Control tokens are special; those a user defined are found in text before merging."""
    control = [
        AddedToken(token, special=True, normalized=False) for token, kind in zip(tokens, kinds) if kind == CONTROL
    ]
    defined = [AddedToken(token, normalized=False) for token, kind in zip(tokens, kinds) if kind == USER_DEFINED]
    hf.add_special_tokens(control)
    hf.add_tokens(defined)
