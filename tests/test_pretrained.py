"""Hugging Face folders and GGUF files of every family against transformers: logits, loss, text, files, and refusals.

One file above 500 lines: every family goes through the same checks, from a folder and from GGUF, on the same tiny models.
"""

import copy
import importlib.util
import json
import pickle

import pytest
import torch
from conftest import assert_as_accurate
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmfast import cli
from llmfast.data import build_tokenizer, load_tokenizer
from llmfast.generate import Sampling, chat, chat_ids, complete, generate, render_chat
from llmfast.models import GPT, GPTConfig, RotaryScaling
from llmfast.models.hf_config import config_from_hf, config_to_hf
from llmfast.models.rotary import rotary_frequencies
from llmfast.train import load_model

V, T = 97, 23
SHAPE = dict(
    vocab_size=V,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
GPT2 = dict(vocab_size=V, n_positions=64, n_embd=48, n_layer=2, n_head=4)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
FAMILIES = {
    "gpt2": GPT2Config(**GPT2),
    "gpt2 untied": GPT2Config(**GPT2, tie_word_embeddings=False, n_inner=100, activation_function="relu"),
    "llama": LlamaConfig(**SHAPE),
    "llama tied": LlamaConfig(**SHAPE, tie_word_embeddings=True, rms_norm_eps=1e-3),
    "llama biases": LlamaConfig(**SHAPE, attention_bias=True),
    "llama head_dim": LlamaConfig(**SHAPE, head_dim=16, hidden_act="gelu_pytorch_tanh"),
    "llama3 rotary": LlamaConfig(**SHAPE, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}),
    "linear rotary": LlamaConfig(**SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 1e5, "factor": 2.0}),
    "mistral": MistralConfig(**SHAPE, sliding_window=7),
    "mistral full": MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen2 window": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=0),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "qwen3 window": Qwen3Config(
        **SHAPE, head_dim=16, attention_bias=True, use_sliding_window=True, sliding_window=5, max_window_layers=0
    ),
    "phi3": Phi3Config(**SHAPE, pad_token_id=None),
    "phi3 window": Phi3Config(**SHAPE, pad_token_id=None, sliding_window=6, tie_word_embeddings=True),
}
# Saved as another architecture that is the same function: Mistral without a window, and Phi-3's fused weights.
SAVED_AS = {
    ("mistral", False): "llama",
    ("phi3", False): "llama",
    ("phi3", True): "mistral",
}


@pytest.fixture(autouse=True)
def _strict_and_one_thread(monkeypatch):
    """Everything here runs on the kernels; models this small only get slower with more threads."""
    monkeypatch.setenv("LLMFAST_STRICT", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def wide(model):
    """Weights and biases wide enough that logits differ clearly, none of them zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A transformers model and the folder that it was saved to."""
    torch.manual_seed(1)
    model = wide(AutoModelForCausalLM.from_config(FAMILIES[request.param]))
    folder = tmp_path_factory.mktemp("hf")
    model.generation_config.eos_token_id = None  # these models have none: any id may be the likeliest
    model.save_pretrained(folder, max_shard_size="40KB" if "llama" in request.param else "1GB")
    return model, folder


@torch.no_grad()
def logits(model, ids, dtype=None):
    if dtype is not None:
        model = model.to(dtype)
    out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_transformers(family, dtype):
    theirs, folder = family
    ids = torch.randint(V, (2, T))
    ours = GPT.from_pretrained(folder, dtype)
    assert all(parameter.dtype == dtype for parameter in ours.parameters())
    # the same rounded weights, in float64
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    peer = logits(exact, ids)
    assert_as_accurate(logits(ours, ids), peer, logits(exact, ids, torch.float64), what="logits")


def test_loss_and_its_gradient(family):
    theirs, folder = family
    ids = torch.randint(V, (2, T))
    ours = GPT.from_pretrained(folder)
    loss = ours(ids[:, :-1], ids[:, 1:])
    expected = theirs(ids, labels=ids).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss, [ours.embedding.weight])
    (peer,) = torch.autograd.grad(expected, [theirs.get_input_embeddings().weight])
    torch.testing.assert_close(gradient, peer, rtol=1e-4, atol=1e-6)


def test_greedy_text_is_theirs(family):
    theirs, folder = family
    ids = torch.randint(V, (3, 6))
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    ours = GPT.from_pretrained(folder).generate(ids, max_new_tokens=12, temperature=0)
    assert torch.equal(ours, expected)


def test_saved_again_it_is_the_same_model(family, tmp_path):
    theirs, folder = family
    ours = GPT.from_pretrained(folder)
    ours.save_pretrained(tmp_path / "again", max_shard_bytes=50_000)
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    kind, window = theirs.config.model_type, bool(getattr(theirs.config, "sliding_window", None))
    assert again.config.model_type == SAVED_AS.get((kind, window), kind)
    ids = torch.randint(V, (2, T))
    if kind == "phi3":  # torch's product of the fused weights rounds in another order
        torch.testing.assert_close(logits(again, ids), logits(theirs, ids), rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(logits(again, ids), logits(theirs, ids))
    # and back, by our own reader
    back = GPT.from_pretrained(tmp_path / "again")
    for name, parameter in ours.named_parameters():
        assert torch.equal(back.get_parameter(name), parameter), name
    assert config_from_hf(config_to_hf(back.config)) == back.config


@pytest.mark.parametrize(
    "config",
    [
        GPTConfig(vocab_size=V, context=32, layers=2, heads=2, width=32, bias=False, activation="relu2"),
        GPTConfig(vocab_size=V, context=32, layers=2, heads=2, width=32, qkv_bias=False, tie_embeddings=False),
        GPTConfig(
            vocab_size=V, context=32, layers=2, heads=2, width=32, norm="rms_norm", gated=True, position="rotary",
            bias=True, activation="gelu",
        ),
        GPTConfig(
            vocab_size=V, context=32, layers=2, heads=4, kv_heads=1, width=32, norm="rms_norm", gated=True,
            position="rotary", bias=False, out_bias=True,
        ),
    ],
    ids=["gpt2 without biases", "gpt2 without qkv bias", "llama with all biases", "llama with out bias"],
)  # fmt: skip
def test_own_models_become_transformers_ones(config, tmp_path):
    ours = wide(GPT(config))
    ours.save_pretrained(tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.randint(V, (2, T))
    exact = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64), ids)
    assert_as_accurate(logits(ours, ids), logits(theirs, ids), exact)
    assert torch.equal(logits(GPT.from_pretrained(tmp_path / "hf"), ids), logits(ours, ids))


@pytest.mark.parametrize("family", ["gpt2 untied", "llama3 rotary"], indirect=True)
def test_dtype_is_the_files_unless_given(family, tmp_path):
    GPT.from_pretrained(family[1], torch.bfloat16).save_pretrained(tmp_path / "bf16")
    assert GPT.from_pretrained(tmp_path / "bf16").norm.weight.dtype == torch.bfloat16
    description = json.loads((tmp_path / "bf16" / "config.json").read_text())
    for name in ("dtype", "torch_dtype"):
        description.pop(name, None)
    (tmp_path / "bf16" / "config.json").write_text(json.dumps(description))
    assert GPT.from_pretrained(tmp_path / "bf16").norm.weight.dtype == torch.bfloat16
    assert GPT.from_pretrained(tmp_path / "bf16", torch.float32).norm.weight.dtype == torch.float32
    with pytest.raises(ValueError, match=r"dtype: got torch.float64, expected"):
        GPT.from_pretrained(tmp_path / "bf16", torch.float64)


def rewritten(folder, tmp_path, change):
    """The folder's weights as one file, changed."""
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file({name: tensor.contiguous() for name, tensor in change(weights).items()}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("family", ["gpt2", "llama tied"], indirect=True)
def test_old_and_bare_files(family, tmp_path):
    """GPT-2's own file has no "transformer." and carries its mask; Llama's older ones carry rotary tables."""

    def old(weights):
        bare = {name.removeprefix("transformer.").removeprefix("model."): t for name, t in weights.items()}
        return bare | {
            "h.0.attn.bias": torch.ones(1, 1, 8, 8),
            "h.0.attn.masked_bias": torch.ones(1),
            "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        }

    ids = torch.randint(V, (1, T))
    expected = logits(GPT.from_pretrained(family[1]), ids)
    assert torch.equal(logits(GPT.from_pretrained(rewritten(family[1], tmp_path, old)), ids), expected)


@pytest.mark.parametrize("family", ["llama tied"], indirect=True)
@pytest.mark.parametrize("equal", [True, False])
def test_a_head_beside_tied_embeddings(family, equal, tmp_path):
    """As transformers has it: the same is tied, another one is used."""

    def with_head(weights):
        embedding = weights["model.embed_tokens.weight"]
        return weights | {"lm_head.weight": embedding.clone() if equal else embedding + 1}

    folder = rewritten(family[1], tmp_path, with_head)
    ours, ids = GPT.from_pretrained(folder), torch.randint(V, (1, T))
    assert ours.config.tie_embeddings is equal
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: {k: v for k, v in w.items() if "up_proj" not in k}, "lacks model.layers.0.mlp.up_proj.weight, mod"),
        (lambda w: w | {"score.weight": torch.ones(2, 2)}, "holds tensors that the model has no place for: score.weig"),
        (lambda w: w | {"model.norm.weight": torch.ones(47)}, r"model.norm.weight has shape \(47,\), expected \(48,\)"),
        (
            lambda w: w | {"lm_head.weight": torch.ones(96, 48)},
            r"lm_head.weight has shape \(96, 48\), expected \(97, 4",
        ),
        (lambda w: w | {"model.layers.0.mlp.gate_proj.bias": torch.ones(80)}, "no place for: .*gate_proj.bias"),
    ],
)
def test_files_that_do_not_fit(family, change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(rewritten(family[1], tmp_path, change))


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_damaged_folders(family, tmp_path):
    folder = rewritten(family[1], tmp_path, lambda weights: weights)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors: not a whole safetensors file"):
        GPT.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin is in torch's pickle format"):
        GPT.from_pretrained(folder)
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names '../model.safetensors', expected files of this folder"):
        GPT.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not JSON"):
        GPT.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"expected a folder with config.json or a .gguf file"):
        GPT.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "base, change, message",
    [
        (
            "llama",
            {"model_type": "gpt_neox"},
            "model_type: got 'gpt_neox', expected one of gpt2, llama, mistral, qwen2, qwen3, phi3",
        ),
        ("llama", {"hidden_act": "mish"}, "hidden_act: got 'mish', expected one of"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config: got"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: got rope_type 'yarn', expected def"),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "rope_scaling: got rope_type 'dyn"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: got a part of the head, expected 1.0"),
        ("llama", {"num_key_value_heads": 4}, "kv_heads: got 4, expected a divisor of heads = 6"),
        ("qwen2 window", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: got layers with and"),
        ("qwen2 window", {"layer_types": None, "max_window_layers": 1}, "max_window_layers: got layers with and"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters: got rope_type 'longrope', expected"),
        ("mistral", {"layer_types": ["full_attention"]}, "layer_types: got .*, expected None"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: got True, expected Fal"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights: got False, expected True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention: got True, expected False"),
    ],
)
def test_what_the_model_cannot_represent_is_refused_by_name(base, change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**FAMILIES[base].to_dict(), **change})


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(position="rotary"), "norm: got 'layer_norm', expected 'rms_norm': transformers has no architecture with"),
        (dict(position="rotary", norm="rms_norm"), "gated: got False, expected True"),
        (dict(window=8), "window: got 8, expected None"),
        (dict(kv_heads=2), "kv_heads, head_dim: expected"),
        (dict(position="rotary", norm="rms_norm", gated=True, bias=True, window=8), "window: got 8 together with bias"),
        (dict(qk_norm=True), "qk_norm: got True, expected False"),
        (
            dict(position="rotary", norm="rms_norm", gated=True, bias=True, qk_norm=True),
            "qk_norm: got True, expected no",
        ),
    ],
)
def test_what_transformers_has_no_architecture_for(changes, message, tmp_path):
    model = GPT(GPTConfig(vocab_size=V, context=32, layers=1, heads=4, width=32).replace(**changes))
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_saving_overwrites_only_when_told(tmp_path):
    model = GPT(GPTConfig(vocab_size=V, context=16, layers=1, heads=2, width=16))
    model.save_pretrained(tmp_path / "hf", max_shard_bytes=4000)
    (tmp_path / "hf" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"is not empty, expected an empty or new one, or overwrite=True"):
        model.save_pretrained(tmp_path / "hf")
    model.save_pretrained(tmp_path / "hf", overwrite=True)
    names = {file.name for file in (tmp_path / "hf").iterdir()}
    assert names == {"config.json", "model.safetensors", "notes.txt"}
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match=r"is a file"):
        model.save_pretrained(tmp_path / "file", overwrite=True)
    with pytest.raises(ValueError, match=r"max_shard_bytes: got 0"):
        model.save_pretrained(tmp_path / "other", max_shard_bytes=0)


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_rotary_frequencies_bit_for_bit(kind):
    scaling = RotaryScaling("llama3", 8.0, 1.0, 4.0, 8192) if kind == "llama3" else RotaryScaling("linear", 4.0)
    config = GPTConfig(heads=2, width=256, position="rotary", rotary_theta=5e5, rotary_scaling=scaling)
    rope = {"rope_type": kind, "rope_theta": 5e5, "factor": scaling.factor}
    if kind == "llama3":
        rope |= {**LLAMA3, "original_max_position_embeddings": 8192}
    theirs = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=rope, max_position_embeddings=131072)
    expected, _ = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")
    assert torch.equal(rotary_frequencies(config), expected)
    as_json = json.loads(json.dumps({"kind": kind, "factor": scaling.factor}))
    assert config.replace(rotary_scaling=as_json).rotary_scaling == RotaryScaling(kind, scaling.factor)
    with pytest.raises(ValueError, match="rotary_scaling: got kind 'yarn'"):
        RotaryScaling("yarn", 2.0)


def test_a_model_that_has_run_can_be_copied_and_pickled():
    model, ids = GPT(GPTConfig(vocab_size=V, context=16, layers=1, heads=2, width=16)), torch.randint(V, (1, 4))
    expected = logits(model, ids)
    assert torch.equal(logits(copy.deepcopy(model), ids), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), ids), expected)


# Tokenizers and chat templates

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'nobody' %}{{ raise_exception('who?') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    """A random Llama with a tokenizer that has a beginning, an end and a chat template, as transformers saves it."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("chat")
    texts = [f"the quick brown fox number {n} jumps over the lazy dog in {1900 + n}\n" for n in range(50)]
    hf = build_tokenizer("bpe", texts, vocab_size=320).hf
    hf.add_special_tokens(["<s>", "<|user|>", "<|assistant|>", "<|system|>"])
    from tokenizers.processors import TemplateProcessing

    hf.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", hf.token_to_id("<s>"))])
    theirs = PreTrainedTokenizerFast(tokenizer_object=hf, bos_token="<s>", eos_token="<|endoftext|>")
    theirs.chat_template = TEMPLATE
    theirs.save_pretrained(folder)
    model = wide(AutoModelForCausalLM.from_config(LlamaConfig(**{**SHAPE, "vocab_size": len(theirs)})))
    model.generation_config.eos_token_id = [theirs.eos_token_id, theirs.convert_tokens_to_ids("<|user|>")]
    model.save_pretrained(folder)
    return folder, model, theirs


def test_tokenizer_of_a_folder(chat_folder):
    folder, _, theirs = chat_folder
    ours = load_tokenizer(folder)
    text = "the fox of 1912 <s> jumps\n"
    assert [*ours.prefix_ids, *ours.encode(text, parse_special=True)] == theirs.encode(text)
    assert (ours.bos_id, ours.eot_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.stop_ids == (theirs.eos_token_id, theirs.convert_tokens_to_ids("<|user|>"))
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the fox?"}]
    for prompt in (True, False):
        expected = theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
        assert render_chat(ours, messages, add_generation_prompt=prompt) == expected
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert chat_ids(ours, messages) == expected


def test_save_with_the_tokenizer(chat_folder, tmp_path):
    folder, model, theirs = chat_folder
    tokenizer = load_tokenizer(folder)
    GPT.from_pretrained(folder).save_pretrained(tmp_path / "again", tokenizer)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "again")
    text = "the lazy dog\n"
    assert again.encode(text) == theirs.encode(text) and again.chat_template == TEMPLATE
    ids = AutoModelForCausalLM.from_pretrained(tmp_path / "again").generation_config.eos_token_id
    assert ids == model.generation_config.eos_token_id
    back = load_tokenizer(tmp_path / "again")
    assert (back.stop_ids, back.bos_id, back.prefix_ids) == (tokenizer.stop_ids, tokenizer.bos_id, tokenizer.prefix_ids)


def test_answers_start_where_the_template_ends_and_stop_at_any_stop_id(chat_folder):
    folder, model, theirs = chat_folder
    ours, tokenizer = GPT.from_pretrained(folder), load_tokenizer(folder)
    messages = [{"role": "user", "content": "the dog?"}]
    ids = torch.tensor([chat_ids(tokenizer, messages)])
    whole = generate(ours, ids, max_new_tokens=20, temperature=0)[0, ids.shape[1] :].tolist()
    ends = [at for at, token in enumerate(whole) if token in tokenizer.stop_ids]
    expected = tokenizer.decode(whole[: ends[0]] if ends else whole)
    answer = "".join(chat(ours, tokenizer, messages, max_new_tokens=20, sampling=Sampling(temperature=0)))
    assert answer == expected
    tokenizer._stops = (whole[3],)
    cut = whole.index(whole[3]) if not ends else min(ends[0], whole.index(whole[3]))
    answer = "".join(chat(ours, tokenizer, messages, max_new_tokens=20, sampling=Sampling(temperature=0)))
    assert answer == tokenizer.decode(whole[: cut + 1])
    # a text follows the beginning that the model expects
    (text,) = complete(ours, tokenizer, ["the"], max_new_tokens=5, sampling=Sampling(temperature=0))
    prompt = torch.tensor([theirs.encode("the")])
    assert text == tokenizer.decode(generate(ours, prompt, max_new_tokens=5, temperature=0)[0, prompt.shape[1] :])


def test_templates_cannot_reach_out(chat_folder):
    tokenizer = load_tokenizer(chat_folder[0])
    tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ValueError, match=r"chat_template: .*unsafe"):
        render_chat(tokenizer, [])
    tokenizer.chat_template = "{% for %}"
    with pytest.raises(ValueError, match="chat_template: "):
        render_chat(tokenizer, [])
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(ValueError, match=r"chat_template: who\?"):
        render_chat(tokenizer, [{"role": "nobody", "content": ""}])
    with pytest.raises(ValueError, match="messages: got 'hello', expected a mapping"):
        render_chat(tokenizer, ["hello"])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="tokenizer: has no chat_template"):
        render_chat(tokenizer, [])


def test_the_command_takes_folders(chat_folder, capsys, monkeypatch):
    folder, _, _ = chat_folder
    start = ["generate", str(folder), "--temperature", "0", "--max-new-tokens", "4"]
    assert cli.main([*start, "--prompt", "the quick", "--threads", "1"]) == 0
    assert capsys.readouterr().out.startswith("the quick")
    assert cli.main([*start, "--chat", "--system", "be brief", "--prompt", "the fox?", "--prompt", "the dog?"]) == 0
    assert "--- prompt 2, sample 1\nthe dog?\n" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", __import__("io").StringIO("the fox?\n\nthe dog?\n"))
    assert cli.main([*start, "--chat"]) == 0
    assert capsys.readouterr().out.count("\n") >= 2
    with pytest.raises(SystemExit, match="2"):
        cli.main([*start, "--system", "be brief"])
    assert "system: got it without chat" in capsys.readouterr().err
    assert cli.main(["generate", str(folder / "nowhere")]) == 2
    assert "path: got" in capsys.readouterr().err


def test_checkpoints_of_llmfast(tmp_path):
    """A folder with our own names, which `load_model` checks and `from_pretrained` reads."""
    from training import tiny_config, train

    result = train(tiny_config(tmp_path, steps=2, warmup=1))
    checked, _ = load_model(result.out_dir)
    read = GPT.from_pretrained(result.checkpoint)
    assert read.config == checked.config
    for name, parameter in checked.named_parameters():
        assert torch.equal(read.get_parameter(name), parameter), name


# GGUF

gguf = __import__("gguf") if importlib.util.find_spec("gguf") else None
needs_gguf = pytest.mark.skipif(gguf is None, reason="needs the package gguf")


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
