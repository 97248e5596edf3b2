"""Hugging Face folders of every family against transformers: logits, loss, text, files, and refusals."""

import copy
import json
import pickle

import pytest
import torch
from conftest import assert_as_accurate
from safetensors.torch import load_file, save_file
from saved_models import FAMILIES, LLAMA3, SHAPE, TEMPLATE, T, V, logits, save_family, strict_and_one_thread, wide
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmfast import cli
from llmfast.data import build_tokenizer, load_tokenizer
from llmfast.generate import Sampling, chat, chat_ids, complete, generate, render_chat
from llmfast.models import GPT, GPTConfig, RotaryScaling
from llmfast.models.hf_config import config_from_hf, config_to_hf
from llmfast.models.rotary import rotary_frequencies
from llmfast.train import load_model

# Saved as another architecture that is the same function: Mistral without a window, and Phi-3's fused weights.
SAVED_AS = {
    ("mistral", False): "llama",
    ("phi3", False): "llama",
    ("phi3", True): "mistral",
}


@pytest.fixture(autouse=True)
def _strict():
    with strict_and_one_thread():
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A transformers model and the folder that it was saved to."""
    folder = tmp_path_factory.mktemp("hf")
    return save_family(request.param, folder), folder


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


def test_parameters_lie_side_by_side_and_are_tensors_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("llmfast.models.memory.BLOCK", 20_000)  # several blocks, and tensors larger than one
    torch.manual_seed(1)
    config = GPTConfig(vocab_size=97, context=16, layers=2, heads=2, width=62, ffn_width=50)
    made = GPT(config)
    made.save_pretrained(tmp_path / "model")
    model = GPT.from_pretrained(tmp_path / "model")
    assert [p.dtype for p in model.parameters()] == [p.dtype for p in made.parameters()]
    for (name, parameter), original in zip(model.named_parameters(), made.parameters()):
        assert torch.equal(parameter, original) and parameter.is_contiguous() and parameter.data_ptr() % 64 == 0, name
        assert parameter.requires_grad and parameter.untyped_storage().nbytes() == parameter.nbytes, name
    starts = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(starts)) == len(starts)
    model.save_pretrained(tmp_path / "again")
    ids = torch.arange(12)[None]
    expected = made(ids)
    for copied in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        model.double().float(),
        model.share_memory(),
    ):
        assert torch.equal(copied(ids), expected)
    weight = GPT.from_pretrained(tmp_path / "again").blocks[1].ffn.up.weight  # the only thing that is left of it
    assert torch.equal(weight, made.blocks[1].ffn.up.weight)


def test_a_model_that_has_run_can_be_copied_and_pickled():
    model, ids = GPT(GPTConfig(vocab_size=V, context=16, layers=1, heads=2, width=16)), torch.randint(V, (1, 4))
    expected = logits(model, ids)
    assert torch.equal(logits(copy.deepcopy(model), ids), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), ids), expected)


# Tokenizers and chat templates


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
