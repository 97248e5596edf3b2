"""GGUF files: the same models as from a Hugging Face folder, their tokenizers, and refusals."""

import importlib.util
import json

import pytest
import torch
from conftest import assert_as_accurate
from saved_models import FAMILIES, SHAPE, TEMPLATE, T, V, logits, save_family, strict_and_one_thread, wide
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmfast.data import build_tokenizer, load_tokenizer
from llmfast.models import GPT, GPTConfig
from llmfast.models.rotary import rotary_frequencies

gguf = __import__("gguf") if importlib.util.find_spec("gguf") else None
needs_gguf = pytest.mark.skipif(gguf is None, reason="needs the package gguf")


@pytest.fixture(autouse=True)
def _strict():
    with strict_and_one_thread():
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A transformers model and the folder that it was saved to."""
    folder = tmp_path_factory.mktemp("hf")
    return save_family(request.param, folder), folder


def swapped(weight, heads):
    """llama.cpp's order of query and key rows: rotary pairs beside each other."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, kind="F32", more=(), **fields):
    """What llama.cpp's converter makes of a transformers model; `more`: names of vectors to add."""
    config = model.config
    architecture = {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    gpt2 = architecture == "gpt2"
    writer.add_feed_forward_length(4 * config.n_embd if gpt2 else config.intermediate_size)
    if gpt2:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        if architecture == "qwen3":
            writer.add_key_length(config.head_dim)
            writer.add_value_length(config.head_dim)
    for name, value in fields.items():
        writer.add_key_value(name.replace("__", "."), *value)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.numpy()
        if gpt2 and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            data = data.T
        if architecture == "llama" and ".q_proj." in name:
            data = swapped(data, config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in name:
            data = swapped(data, config.num_key_value_heads)
        data = data.copy()
        if kind == "F32" or data.ndim == 1:
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), data)
        else:
            quantised = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(
                names.get_name(name, try_suffixes=(".weight", ".bias")),
                gguf.quants.quantize(data, quantised),
                raw_dtype=quantised,
            )
    if "llama3" in str(config.rope_parameters if not gpt2 else ""):
        plain = rotary_frequencies(GPTConfig(heads=6, width=48, position="rotary", rotary_theta=5e5))
        scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
        writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy())
    for name in more:
        writer.add_tensor(name, torch.ones(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@needs_gguf
@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "llama tied", "llama3 rotary", "qwen2", "qwen3", "phi3", "phi3 window"], indirect=True
)
def test_gguf_holds_the_same_model(family, tmp_path):
    theirs, folder = family
    extra = {}
    if "llama3" in str(theirs.config):
        number = gguf.GGUFValueType.UINT32
        extra["llama__rope__scaling__original_context_length"] = (16, number)
    if getattr(theirs.config, "sliding_window", None) and theirs.config.model_type == "phi3":
        extra["phi3__attention__sliding_window"] = (theirs.config.sliding_window, gguf.GGUFValueType.UINT32)
    path = write_gguf(tmp_path / "model.gguf", theirs, **extra)
    ours, from_folder = GPT.from_pretrained(path), GPT.from_pretrained(folder)
    assert ours.config == from_folder.config.replace(ffn_width=ours.config.F, head_dim=ours.config.head_dim)
    for name, parameter in from_folder.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter), name
    assert GPT.from_pretrained(tmp_path).config == ours.config  # a folder of one


@needs_gguf
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_gguf_types(kind, tmp_path):
    torch.manual_seed(3)
    shape = {**SHAPE, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    theirs = wide(AutoModelForCausalLM.from_config(LlamaConfig(**shape)))
    path = write_gguf(tmp_path / "model.gguf", theirs, kind)
    ours = GPT.from_pretrained(path)
    expected_dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    assert ours.norm.weight.dtype == expected_dtype
    # transformers reads the same file, on its own
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    ids = torch.randint(V, (2, T))
    exact = logits(loaded, ids, torch.float64)
    peer = logits(loaded, ids, torch.float32)
    assert_as_accurate(logits(GPT.from_pretrained(path, torch.float32), ids), peer, exact)


@needs_gguf
def test_gguf_that_does_not_fit(tmp_path):
    theirs = AutoModelForCausalLM.from_config(FAMILIES["llama"])
    text, number = gguf.GGUFValueType.STRING, gguf.GGUFValueType.UINT32
    for field, value, message in (
        ("llama__rope__scaling__type", ("yarn", text), "llama.rope.scaling.type: got 'yarn', expected none or linear"),
        ("llama__expert_count", (8, number), "llama.expert_count: got 8, expected none"),
        ("llama__rope__dimension_count", (4, number), "llama.rope.dimension_count: got 4, expected the head's width 8"),
    ):
        path = write_gguf(tmp_path / "odd.gguf", theirs, **{field: value})
        with pytest.raises(ValueError, match=message):
            GPT.from_pretrained(path)
    phi3 = AutoModelForCausalLM.from_config(FAMILIES["phi3"])
    path = write_gguf(tmp_path / "odd.gguf", phi3, more=("rope_factors_long.weight", "rope_factors_short.weight"))
    with pytest.raises(
        ValueError, match=r"rope_factors_long.weight: got factors of rope type longrope, expected default"
    ):
        GPT.from_pretrained(path)
    writer = gguf.GGUFWriter(tmp_path / "bert.gguf", "bert")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(
        ValueError, match=r"general.architecture: got 'bert', expected one of gpt2, llama, qwen2, qwen3, phi3"
    ):
        GPT.from_pretrained(tmp_path / "bert.gguf")
    with pytest.raises(ValueError, match=r"holds 2 .gguf files, expected one; name it"):
        GPT.from_pretrained(tmp_path)
    whole = write_gguf(tmp_path / "cut.gguf", theirs).read_bytes()
    for length, message in ((0, "empty"), (3, "empty"), (40, "not a whole GGUF file"), (-2000, "file is truncated")):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=message):
            GPT.from_pretrained(tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes(b"PK" + whole)
    with pytest.raises(ValueError, match=r"begins with b'PKGG', expected b'GGUF'"):
        GPT.from_pretrained(tmp_path / "cut.gguf")
    with pytest.raises(FileNotFoundError, match="which is not there"):
        GPT.from_pretrained(tmp_path / "none.gguf")


def write_gguf_tokenizer(path, kind, tokens, kinds, **lists):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for name, value in lists.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


TEXTS = [
    "The year 2024, isn't it?  Two spaces\n\n",
    "naïve 漢字 😀 12345",
    "",
    "\tdef f(x):\r\n    return 'x'",
    "<|end|>",
]


@needs_gguf
@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_gguf_byte_level_tokenizer(pre, tmp_path):
    """Against the same vocabulary with a pre-tokenizer as these models' own tokenizer.json has it."""
    from tokenizers import Regex, pre_tokenizers

    texts = [f"The year {1900 + n} isn't one of {n} spaces in return: f(x)\n" for n in range(80)]
    trained = build_tokenizer("bpe", texts, vocab_size=400)
    vocabulary = json.loads(trained.hf.to_str())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    tokens += ["<|begin|>", "<|end|>", "<think>"]
    kinds = [1] * (len(tokens) - 3) + [3, 3, 4]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in vocabulary["merges"]]
    path = write_gguf_tokenizer(
        tmp_path / "tokenizer.gguf", "gpt2", tokens, kinds, token_merges=merges, tokenizer_pre=pre,
        bos_token_id=len(tokens) - 3, eos_token_id=len(tokens) - 2, chat_template=TEMPLATE,
    )  # fmt: skip
    ours = load_tokenizer(path)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("gpt-2", "smollm"))
    digits = "1,3" if pre == "llama-bpe" else "1"
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{" + digits + r"}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    before = {"gpt-2": [], "smollm": [pre_tokenizers.Digits(individual_digits=True)]}.get(
        pre, [pre_tokenizers.Split(Regex(pattern), "isolated")]
    )
    trained.hf.pre_tokenizer = pre_tokenizers.Sequence([*before, byte_level])
    for text in TEXTS:
        assert ours.encode(text) == trained.hf.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    begin, end, think = range(len(tokens) - 3, len(tokens))
    assert (ours.bos_id, ours.stop_ids, ours.chat_template) == (begin, (end,), TEMPLATE)
    assert ours.prefix_ids == ((begin,) if pre == "llama-bpe" else ())
    assert ours.encode("<|end|>", parse_special=True) == [end] and ours.encode("<think>") == [think]
    assert ours.decode([end, think]) == "<think>"
    ours.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode(TEXTS[0]) == ours.encode(TEXTS[0])


@needs_gguf
def test_gguf_sentencepiece_tokenizer(tmp_path):
    """Merges by score, not by length or order; what is not in the vocabulary becomes bytes."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [2, 3, 3] + [6] * 256
    scores = [0.0] * len(tokens)
    pieces = {"▁": -9, "a": -9, "b": -9, "c": -9, "ab": -2, "bc": -1, "▁a": -3, "abc": -4, "▁abc": -5, "▁bc": -6}
    tokens += pieces
    kinds += [1] * len(pieces)
    scores += [float(score) for score in pieces.values()]
    path = write_gguf_tokenizer(
        tmp_path / "tokenizer.gguf", "llama", tokens, kinds, token_scores=scores, bos_token_id=1, eos_token_id=2
    )
    ours = load_tokenizer(path)

    def spelled(text):
        return [tokens[token] for token in ours.encode(text)]

    assert spelled("abc") == ["▁abc"]  # "bc" first, then "▁a" + "bc"
    assert spelled("ab") == ["▁", "ab"] or spelled("ab") == ["▁ab"]
    assert spelled("bc é") == ["▁bc", "▁", "<0xC3>", "<0xA9>"]
    assert ours.prefix_ids == (1,) and ours.stop_ids == (2,)
    for text in ("abc", "bc é 漢", "a  b"):
        assert ours.decode(ours.encode(text)) == text
        assert "".join(ours.decode_stream(ours.encode(text))) == text


@needs_gguf
def test_gguf_tokenizers_that_are_not_known(tmp_path):
    path = tmp_path / "tokenizer.gguf"
    with pytest.raises(ValueError, match=r"tokenizer.ggml.pre: got 'viking', expected one of gpt-2, "):
        load_tokenizer(
            write_gguf_tokenizer(path, "gpt2", ["a", "aa"], [1, 1], token_merges=["a a"], tokenizer_pre="viking")
        )
    with pytest.raises(ValueError, match=r"tokenizer.ggml.merges: makes 'aa', which is not among the tokens"):
        load_tokenizer(write_gguf_tokenizer(path, "gpt2", ["a"], [1], token_merges=["a a"], tokenizer_pre="gpt-2"))
    with pytest.raises(ValueError, match=r"tokenizer.ggml.model: got 'bert', expected gpt2 or llama"):
        load_tokenizer(write_gguf_tokenizer(path, "bert", ["a"], [1]))
    with pytest.raises(ValueError, match=r"lacks tokenizer.ggml.merges"):
        load_tokenizer(write_gguf_tokenizer(path, "gpt2", ["a"], [1], tokenizer_pre="gpt-2"))
