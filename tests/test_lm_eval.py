"""lm-eval on llmfast: our own adapter against the one for transformers, on local tasks, offline."""

import json
import os

import pytest
import torch
from saved_models import SHAPE, TEMPLATE, wide
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from llmfast.data import ByteTokenizer, build_tokenizer, load_tokenizer
from llmfast.models import GPT

lm_eval = pytest.importorskip("lm_eval", reason="needs the package lm-eval")

SENTENCES = [f"the quick brown fox number {n} jumps over the lazy dog in {1900 + n}." for n in range(40)]
TASKS = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "local_perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "local_text": {
        "output_type": "generate_until",
        "doc_to_text": "{{question or 'the'}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["q"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks over one small file, and what lm-eval needs to find them without a network."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": text[:n], "choices": [text[n:], " a cat", " 12"], "answer": 0, "text": text}
        for n, text in zip(range(4, 24), SENTENCES)
    ]
    rows.append({"question": "", "choices": ["the", " a"], "answer": 0, "text": " ".join(SENTENCES[:8])})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "metadata": {"version": 1},
    }
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **source, **task}))  # JSON is YAML
    before = os.environ.get("HF_DATASETS_CACHE")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    from lm_eval.tasks import TaskManager

    yield TaskManager(include_path=str(folder), include_defaults=False)
    os.environ.pop("HF_DATASETS_CACHE") if before is None else os.environ.__setitem__("HF_DATASETS_CACHE", before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama and its tokenizer."""
    torch.manual_seed(4)
    folder = tmp_path_factory.mktemp("model")
    hf = build_tokenizer("bpe", SENTENCES, vocab_size=300).hf
    hf.add_special_tokens(["<s>"])
    theirs = PreTrainedTokenizerFast(tokenizer_object=hf, bos_token="<s>", eos_token="<|endoftext|>")
    theirs.chat_template = TEMPLATE
    theirs.save_pretrained(folder)
    shape = {**SHAPE, "vocab_size": len(theirs), "max_position_embeddings": 96, "eos_token_id": theirs.eos_token_id}
    wide(AutoModelForCausalLM.from_config(LlamaConfig(**shape))).save_pretrained(folder)
    return folder


def evaluate(model, tasks, **options):
    return lm_eval.simple_evaluate(
        model, tasks=list(TASKS), task_manager=tasks, bootstrap_iters=0, log_samples=True, verbosity="ERROR", **options
    )


def test_our_adapter_measures_what_lm_evals_own_does(folder, tasks, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    from llmfast.integrations.lm_eval import LlmfastLM

    monkeypatch.setenv("LLMFAST_STRICT", "1")
    ours = evaluate("llmfast", tasks, model_args={"path": str(folder), "batch_tokens": 90, "batch_size": 4})
    theirs = evaluate(HFLM(pretrained=str(folder), device="cpu", batch_size=4), tasks)
    assert isinstance(LlmfastLM(folder), LlmfastLM)
    for name in TASKS:
        for metric, value in theirs["results"][name].items():
            if isinstance(value, float):
                assert ours["results"][name][metric] == pytest.approx(value, rel=1e-4, abs=1e-6), (name, metric)
        for mine, other in zip(ours["samples"][name], theirs["samples"][name]):
            assert mine["doc_id"] == other["doc_id"]
            for a, b in zip(flat(mine["resps"]), flat(other["resps"])):
                expected = pytest.approx(b, rel=1e-4, abs=1e-4) if isinstance(b, float) else b
                assert a == expected, (name, mine["doc_id"])


def test_lm_evals_own_adapter_on_a_patched_model(folder, tasks):
    from lm_eval.models.huggingface import HFLM

    from llmfast.integrations.transformers import patch, unpatch

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    patch(model)
    ours = evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), tasks)["results"]
    unpatch(model)
    theirs = evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), tasks)["results"]
    for name in TASKS:
        for metric, value in theirs[name].items():
            if isinstance(value, float):
                assert ours[name][metric] == pytest.approx(value, rel=1e-4, abs=1e-6), (name, metric)


def flat(value):
    return [leaf for part in value for leaf in flat(part)] if isinstance(value, list | tuple) else [value]


def test_batches_change_nothing(folder, tasks):
    from lm_eval.api.instance import Instance

    from llmfast.integrations.lm_eval import LlmfastLM

    pairs = [(text[:n], text[n:]) for n, text in zip(range(1, 30), SENTENCES)]
    long = " ".join(SENTENCES)  # far more than the context
    pairs += [("", "the"), (long, " dog")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    alone = LlmfastLM(folder, batch_tokens=1).loglikelihood(requests, disable_tqdm=True)
    together = LlmfastLM(folder, batch_tokens=10**6).loglikelihood(requests, disable_tqdm=True)
    for (a, greedy_a), (b, greedy_b) in zip(alone, together):
        assert a == pytest.approx(b, rel=1e-4) and greedy_a == greedy_b
    rolling = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(["", "the fox", long])]
    empty, short, much = LlmfastLM(folder).loglikelihood_rolling(rolling, disable_tqdm=True)
    assert empty == 0 and much < short < 0


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
    ],
)
def test_device(folder, device):
    """The model goes where it is told, and its inputs with it: the same scores and text as without a word."""
    from lm_eval.api.instance import Instance

    from llmfast.integrations.lm_eval import LlmfastLM

    here, there = LlmfastLM(folder), LlmfastLM(folder, device=device)
    assert here.device.type == "cpu" and there.device.type == device
    scored = [Instance("loglikelihood", {}, (text[:9], text[9:]), i) for i, text in enumerate(SENTENCES[:5])]
    for (a, _), (b, _) in zip(here.loglikelihood(scored, True), there.loglikelihood(scored, True)):
        assert a == pytest.approx(b, rel=1e-4)
    asked = [Instance("generate_until", {}, (SENTENCES[0], {"max_gen_toks": 4}), 0)]
    assert here.generate_until(asked, True) == there.generate_until(asked, True)


def test_a_hooked_head_is_called(folder):
    """A head whose logits are all zero leaves nothing but the number of tokens."""
    from lm_eval.api.instance import Instance

    from llmfast.integrations.lm_eval import LlmfastLM

    adapter = LlmfastLM(folder)
    adapter.model.head.register_forward_hook(lambda module, args, logits: torch.zeros_like(logits))
    [(score, _)] = adapter.loglikelihood([Instance("loglikelihood", {}, (SENTENCES[0][:9], SENTENCES[0][9:]), 0)], True)
    tokens = score / -torch.tensor(float(adapter.model.config.vocab_size)).log().item()
    assert tokens == pytest.approx(round(tokens), abs=1e-4) and tokens > 5


def test_chat_template(folder):
    from llmfast.integrations.lm_eval import LlmfastLM

    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    adapter = LlmfastLM(folder)
    history = [{"role": "user", "content": "the fox?"}]
    assert adapter.apply_chat_template(history) == theirs.apply_chat_template(
        history, tokenize=False, add_generation_prompt=True
    )
    history.append({"role": "assistant", "content": "jumps"})
    assert adapter.apply_chat_template(history, add_generation_prompt=False).endswith("<|assistant|>jumps")


def test_what_it_does_not_take(folder):
    from lm_eval.api.instance import Instance

    from llmfast.integrations.lm_eval import LlmfastLM

    model = GPT.preset("gpt-nano", vocab_size=257, context=32)
    with pytest.raises(ValueError, match="path: got None, expected a path, or a model and a tokenizer"):
        LlmfastLM(model=model)
    for device, message in (
        ("tpu", "device: got 'tpu', expected auto, cpu, cuda or cuda:N$"),
        ("meta", "device: got 'meta', expected auto, cpu, cuda or cuda:N$"),
        ("cuda:97", "device: got 'cuda:97', but torch finds [0-9a-z]+ GPU"),
    ):
        with pytest.raises(ValueError, match=message):
            LlmfastLM(folder, device=device)
    with pytest.raises(ValueError, match="max_length: got 64, expected at most the context, 32"):
        LlmfastLM(model=model, tokenizer=ByteTokenizer(), max_length=64)
    adapter = LlmfastLM(model=model, tokenizer=ByteTokenizer(), max_length=16)
    with pytest.raises(ValueError, match="max_gen_toks: got 16, expected less than max_length = 16"):
        adapter.generate_until([Instance("generate_until", {}, ("a", {"max_gen_toks": 16}), 0)], disable_tqdm=True)
    (text,) = adapter.generate_until([Instance("generate_until", {}, ("a" * 99, {"max_gen_toks": 4}), 0)], True)
    assert isinstance(text, str)
    tokenizer = load_tokenizer(folder)
    assert adapter.tok_encode("ab") == [97, 98] and tokenizer.prefix_ids == ()
