"""Patched models under PEFT, Trainer, accelerate and TRL: the same losses as unpatched, step by step."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", "5.4")

from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig  # noqa: E402

from llmfast.integrations.transformers import patch, unpatch  # noqa: E402

V = 96


def _model(name: str = "llama"):
    torch.manual_seed(0)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if name == "gpt2":
        sizes = dict(n_embd=64, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
        config = GPT2Config(vocab_size=V, **sizes, **special)
    else:
        sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
        config = LlamaConfig(vocab_size=V, num_key_value_heads=2, max_position_embeddings=64, **sizes, **special)
    return AutoModelForCausalLM.from_config(config)


def _texts(n: int = 12):
    generator = torch.Generator().manual_seed(3)
    return [
        " ".join(f"w{i}" for i in torch.randint(3, V, (length,), generator=generator).tolist())
        for length in torch.randint(4, 20, (n,), generator=generator).tolist()
    ]


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, V)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


def _arguments(tmp_path, **more):
    return dict(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=4,
        learning_rate=1e-2,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=1,
        **more,
    )


def _losses(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _assert_same_run(build):
    """`build(patched)` makes a trainer; both runs log the same losses, and those change."""
    expected = _losses(build(False))
    ours = _losses(build(True))
    assert len(set(expected)) > 1
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(expected), atol=2e-4, rtol=1e-4)


@pytest.fixture(autouse=True)
def _strict(monkeypatch):
    monkeypatch.setenv("LLMFAST_STRICT", "1")


@pytest.mark.parametrize("first", ["patch", "peft"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_lora(name, first):
    """Adapters put on before or after the patch act, and their gradients are right."""
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "gate_proj", "down_proj"] if name == "llama" else ["c_attn", "c_fc"]
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    ids = torch.randint(3, V, (2, 11))

    def step(model):
        model.train()
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return out.loss, out.logits, grads

    base = _model(name)
    torch.manual_seed(7)
    plain = peft.get_peft_model(copy.deepcopy(base), config)
    expected = step(plain)
    if first == "patch":
        patch(base)
    torch.manual_seed(7)
    model = peft.get_peft_model(base, config)
    if first == "peft":
        patch(model)
    ours = step(model)
    torch.testing.assert_close(ours[0], expected[0])
    torch.testing.assert_close(ours[1] + 0, expected[1], atol=2e-5, rtol=1e-4)
    assert ours[2].keys() == expected[2].keys() and all("lora" in n for n in ours[2])
    for n, grad in expected[2].items():
        torch.testing.assert_close(ours[2][n], grad, atol=2e-5, rtol=1e-4)
    unpatch(model)
    model.zero_grad()
    assert torch.equal(step(model)[1], expected[1])
    patch(model)
    merged, wanted = model.merge_and_unload().eval(), plain.merge_and_unload().eval()
    torch.testing.assert_close(merged(ids).logits, wanted(ids).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_trainer(name, tmp_path):
    pytest.importorskip("accelerate")
    tokenizer = _tokenizer()
    rows = [dict(tokenizer(text)) for text in _texts()]
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)

    def build(patched):
        model = _model(name)
        if patched:
            patch(model)
        arguments = transformers.TrainingArguments(**_arguments(tmp_path, gradient_accumulation_steps=2))
        return transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:3], data_collator=collator)

    _assert_same_run(build)
    ours, expected = build(True).evaluate()["eval_loss"], build(False).evaluate()["eval_loss"]
    assert ours == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(
        torch.tensor(build(True).predict(rows[:2]).predictions),
        torch.tensor(build(False).predict(rows[:2]).predictions),
        atol=2e-5,
        rtol=1e-4,
    )


def test_trainer_packed(tmp_path):
    """Documents without padding, one after another in one row, kept apart by position ids."""
    pytest.importorskip("accelerate")
    rows = [dict(input_ids=_tokenizer()(text)["input_ids"]) for text in _texts()]
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)

    def build(patched):
        model = _model()
        if patched:
            patch(model)
        arguments = transformers.TrainingArguments(**_arguments(tmp_path), remove_unused_columns=False)
        return transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collator)

    _assert_same_run(build)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_transforms_and_batched_gradients(name):
    """Gradients of each sample by torch.func, and of several losses at once."""
    plain = _model(name)
    patched = copy.deepcopy(plain)
    patch(patched)
    ids = torch.randint(3, V, (2, 7))

    def gradients(model):
        def loss(parameters, row):
            out = torch.func.functional_call(model, parameters, (), dict(input_ids=row[None], use_cache=False))
            return out.logits.square().mean()

        parameters = dict(model.named_parameters())
        per_sample = [torch.func.grad(loss)({n: p.detach() for n, p in parameters.items()}, row) for row in ids]
        logits = model(input_ids=ids, use_cache=False).logits
        losses = torch.stack((torch.ones_like(logits), logits.detach()))
        batched = torch.autograd.grad(logits, list(parameters.values()), losses, is_grads_batched=True)
        return [*per_sample[0].values(), *per_sample[1].values(), *batched]

    for ours, theirs in zip(gradients(patched), gradients(plain), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_accelerate_mixed_precision():
    accelerate = pytest.importorskip("accelerate")
    ids = torch.randint(3, V, (2, 11))

    def losses(patched):
        model = _model()
        if patched:
            patch(model)
        accelerate.state.AcceleratorState._reset_state(
            reset_partial_state=True
        )  # other tests have set another precision
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        model, optimizer = accelerator.prepare(model.train(), torch.optim.SGD(model.parameters(), lr=0.5))
        result = []
        for _ in range(3):
            out = model(input_ids=ids, labels=ids)
            assert out.logits.dtype == torch.float32 and out.logits.shape == (2, 11, V)
            accelerator.backward(out.loss)
            optimizer.step()
            optimizer.zero_grad()
            result.append(out.loss.item())
        return torch.tensor(result)

    torch.testing.assert_close(losses(True), losses(False), atol=0.02, rtol=0.005)


@pytest.mark.parametrize("packing", [False, True])
def test_sft(packing, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": _texts()})

    def build(patched):
        model = _model()
        if patched:
            patch(model)
        arguments = trl.SFTConfig(**_arguments(tmp_path), max_length=32, packing=packing)
        return trl.SFTTrainer(model, args=arguments, train_dataset=data, processing_class=_tokenizer())

    _assert_same_run(build)


@pytest.mark.parametrize("lora", [False, True])
def test_dpo(lora, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    peft = pytest.importorskip("peft")
    texts = _texts(18)
    data = datasets.Dataset.from_dict({"prompt": texts[:6], "chosen": texts[6:12], "rejected": texts[12:]})

    def build(patched):
        model = _model()
        if patched:
            patch(model)
        arguments = trl.DPOConfig(**_arguments(tmp_path), max_length=48)
        config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
        return trl.DPOTrainer(
            model,
            None if lora else copy.deepcopy(model),
            args=arguments,
            train_dataset=data,
            processing_class=_tokenizer(),
            peft_config=config,
        )

    _assert_same_run(build)
