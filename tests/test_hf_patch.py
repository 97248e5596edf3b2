"""`llmfast.patch`: every family against the unpatched model, on tiny random weights in float32."""

import copy
import io

import pytest
import torch
from tiny_models import PLAIN, TINY, V

transformers = pytest.importorskip("transformers", "5.4")

from transformers import AutoModelForCausalLM, AutoModelForMaskedLM  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402

from llmfast.integrations.transformers import layers, patch, unpatch  # noqa: E402
from llmfast.integrations.transformers.loss import LazyLogits  # noqa: E402

GPT2 = dict(
    vocab_size=V, n_embd=64, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2
)
GEMMA = dict(head_dim=16, sliding_window=5, layer_types=["sliding_attention", "full_attention"])
PHI_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
NEOX_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
OPT = {k: v for k, v in PLAIN.items() if k != "intermediate_size"} | dict(ffn_dim=96, word_embed_proj_dim=64)

DECODERS = {
    "gpt2": ("gpt2", GPT2),
    "opt": ("opt", OPT),
    "opt_post_norm": ("opt", OPT | dict(do_layer_norm_before=False, word_embed_proj_dim=32)),
    "llama": ("llama", TINY),
    "llama_biases": ("llama", TINY | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "mistral": ("mistral", TINY | dict(sliding_window=5)),
    "qwen2": ("qwen2", TINY),
    "qwen3": ("qwen3", TINY | dict(head_dim=16)),
    "smollm3": ("smollm3", TINY | dict(no_rope_layers=[1, 0])),
    "gemma2": ("gemma2", TINY | GEMMA | dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0)),
    "gemma3": ("gemma3_text", TINY | GEMMA),
    "phi3": ("phi3", TINY | dict(sliding_window=None, rope_parameters=PHI_ROPE)),
    "gpt_neox": ("gpt_neox", PLAIN | dict(rope_parameters=NEOX_ROPE)),
    "gpt_neox_serial": ("gpt_neox", PLAIN | dict(rope_parameters=NEOX_ROPE, use_parallel_residual=False)),
}
ENCODERS = {
    "bert": ("bert", PLAIN),
    "roberta": ("roberta", PLAIN | dict(max_position_embeddings=70)),
    "electra": ("electra", PLAIN),
}
# What a patch leaves in torch: embeddings, and the serial GPT-NeoX block's sums, which are not modules.
LEFT = {"Embedding", "OPTLearnedPositionalEmbedding", "Gemma2TextScaledWordEmbedding", "Gemma3TextScaledWordEmbedding"}


@pytest.fixture(autouse=True)
def _strict(monkeypatch):
    monkeypatch.setenv("LLMFAST_STRICT", "1")


def _model(name: str):
    kind, options = (DECODERS | ENCODERS)[name]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**options)
    for dropout in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "resid_pdrop", "embd_pdrop"):
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    auto = AutoModelForCausalLM if name in DECODERS else AutoModelForMaskedLM
    # Gemma 2 needs eager attention: torch's own kernel has no softcap
    model = auto.from_config(config, attn_implementation="eager" if name == "gemma2" else "sdpa")
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that attention is not uniform, and no norm is trivial
            parameter.normal_(std=0.2) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) / 5)
    return model.eval()


def _batch(B: int = 2, T: int = 13, side: str | None = None):
    ids = torch.randint(3, V, (B, T))
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, :4] = 0
    elif side == "right":
        mask[0, -4:] = 0
    return ids.masked_fill(mask == 0, 0), mask


def _step(model, side=None, seed=1):
    """Logits of real tokens, loss and gradients by name."""
    torch.manual_seed(seed)
    ids, mask = _batch(side=side)
    labels = ids.masked_fill((mask == 0) | (mask.roll(1, 1) == 0), -100)
    model.zero_grad()
    out = model(ids, attention_mask=mask, labels=labels)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.logits[mask == 1], out.loss, grads


def _assert_close(ours, expected):
    torch.testing.assert_close(ours[0], expected[0], atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(ours[1], expected[1], atol=1e-5, rtol=1e-5)
    assert ours[2].keys() == expected[2].keys()
    for name, grad in expected[2].items():
        torch.testing.assert_close(ours[2][name], grad, atol=5e-5, rtol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert ours[2][name].stride() == grad.stride()


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_same_numbers(name, side):
    model = _model(name)
    for train in (False, True):
        model.train(train)
        expected = _step(model, side)
        report = patch(model)
        assert {what.split(":")[0] for what in report.left} <= LEFT, report
        _assert_close(_step(model, side), expected)
        unpatch(model)
        after = _step(model, side)
        assert torch.equal(after[0], expected[0]) and torch.equal(after[1], expected[1])
        assert all(torch.equal(after[2][n], g) for n, g in expected[2].items())


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}, {"num_beams": 3}])
@pytest.mark.parametrize("name", DECODERS)
def test_generate(name, how):
    model = _model(name)
    ids, mask = _batch(side="left")
    options = dict(attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, **how)
    expected = model.generate(ids, **options)
    patch(model)
    assert model.generate(ids, **options).tolist() == expected.tolist()


def test_report_and_repeat():
    model = _model("llama")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    pointers = [p.data_ptr() for p in model.parameters()]
    first = patch(model)
    second = patch(model)
    assert first.replaced == second.replaced and first.left == second.left
    assert "14 x Linear (linear)" in repr(first) and "1 x Embedding: no kernel in its place" in repr(first)
    assert model.config._attn_implementation == "llmfast"
    assert pointers == [p.data_ptr() for p in model.parameters()]
    assert state.keys() == model.state_dict().keys()
    unpatch(unpatch(model))
    assert model.config._attn_implementation == "sdpa"
    assert not any("forward" in module.__dict__ for module in model.modules())
    with pytest.raises(TypeError, match="model: got Linear"):
        patch(torch.nn.Linear(2, 2))


def test_save_copy_pickle(tmp_path):
    model = _model("gpt2")
    expected = _step(model)
    patch(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(_step(loaded)[0], expected[0])

    copied = copy.deepcopy(model)
    _assert_close(_step(copied), expected)
    assert copied.lm_head.forward.__self__ is copied.lm_head
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    _assert_close(_step(model), expected)

    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    pickled = torch.load(buffer, weights_only=False)
    unpatch(pickled)
    assert torch.equal(_step(pickled)[0], expected[0])


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3", "bert"])
def test_gradient_checkpointing(name):
    model = _model(name).train()
    expected = _step(model)
    patch(model)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        calls = []
        layer = next(m for m in model.modules() if getattr(m, "gradient_checkpointing", False) and m is not model)
        inner = next(m for m in layer.modules() if type(m).__name__ in ("Linear", "Conv1D"))
        handle = inner.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        _assert_close(_step(model), expected)
        handle.remove()
        assert len(calls) >= 2, "the layer was not run again"


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt", "bert"])
def test_hooks_are_called(name):
    """A hook on a module that the patch runs inside a larger kernel is called, and what it changes counts."""
    model = _model(name)

    def with_hooks():
        seen, handles = [], []
        for path, module in model.named_modules():
            if type(module).__name__ in ("Linear", "Conv1D", "LayerNorm", "LlamaRMSNorm", "Phi3RMSNorm"):
                handles.append(
                    module.register_forward_hook(lambda m, _, out, path=path: seen.append(path) or out * 1.1)
                )
        result = _step(model)
        for handle in handles:
            handle.remove()
        return result, seen

    expected, seen = with_hooks()
    patch(model)
    ours, called = with_hooks()
    assert sorted(seen) == sorted(called)
    _assert_close(ours, expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_hidden_states(name):
    model = _model(name)
    ids, mask = _batch()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        patch(model)
        ours = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert len(ours) == len(expected) == 3
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_autocast_and_bfloat16(name):
    model = _model(name).train()

    def steps():  # one loss alone may be exact by chance
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return [_step(model, seed=seed) for seed in range(1, 9)]

    double = copy.deepcopy(model).double()
    exact = [_step(double, seed=seed) for seed in range(1, 9)]
    plain = steps()
    patch(model)
    ours = steps()
    for of_step in (0, 1):
        a, b, e = (torch.stack([step[of_step].detach() for step in run]) for run in (ours, plain, exact))
        assert a.dtype == b.dtype
        assert (a.double() - e).abs().max() <= 2 * (b.double() - e).abs().max() + 1e-5 * e.abs().max()
    exact = exact[0]
    unpatch(model)
    model.bfloat16()
    plain = _step(model)
    patch(model)
    ours = _step(model)
    assert ours[0].dtype == torch.bfloat16
    assert (ours[0].double() - exact[0]).norm() <= 2 * (plain[0].double() - exact[0]).norm()
    for grad_name, grad in plain[2].items():
        assert ours[2][grad_name].dtype == grad.dtype
        exact_grad = exact[2][grad_name]
        error = (ours[2][grad_name].double() - exact_grad).norm()
        assert error <= 2 * (grad.double() - exact_grad).norm() + 1e-5 * exact_grad.norm(), grad_name


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_double_runs_in_torch(name, monkeypatch):
    """What no kernel takes runs as it did, and only the attention, which was asked for by name, counts it."""
    model = _model(name).double()
    expected = _step(model)
    patch(model)
    with pytest.raises(RuntimeError, match="attention: dtype"):
        _step(model)
    monkeypatch.setenv("LLMFAST_STRICT", "0")
    ours = _step(model)
    torch.testing.assert_close(ours[0], expected[0])
    torch.testing.assert_close(ours[1], expected[1])


class TestLazyLogits:
    """In training, logits come into being when somebody looks."""

    def _output(self):
        model = _model("llama").train()
        ids, _ = _batch()
        expected = model(ids, labels=ids)
        patch(model)
        return model(ids, labels=ids), expected, model

    def test_not_computed(self):
        ours, _, _ = self._output()
        ours.loss.backward()
        assert type(ours.logits) is LazyLogits and ours.logits.value is None
        assert ours.logits.shape == (2, 13, V) and ours.logits.dtype == torch.float32
        assert ours.logits.value is None

    def test_same_when_used(self):
        ours, expected, model = self._output()
        torch.testing.assert_close(ours.logits.softmax(-1), expected.logits.softmax(-1))
        torch.testing.assert_close(ours["logits"][:, -1], expected["logits"][:, -1], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(ours[1].detach().numpy(), expected[1].detach().numpy(), atol=2e-5, rtol=1e-5)
        with torch.no_grad():
            assert torch.equal(ours.logits.argmax(-1), expected.logits.argmax(-1))

    def test_gradient(self):
        ours, expected, model = self._output()
        model.zero_grad()
        (ours.loss + ours.logits.square().mean()).backward()
        got = model.lm_head.weight.grad.clone()
        model.zero_grad()
        (expected.loss + expected.logits.square().mean()).backward()
        torch.testing.assert_close(got, model.lm_head.weight.grad, atol=1e-5, rtol=1e-4)

    def test_reductions(self):
        model = _model("llama").train()
        ids, _ = _batch()
        variants = [dict(num_items_in_batch=7), dict(num_items_in_batch=torch.tensor(5)), dict(ignore_index=4)]
        variants.append(dict(shift_labels=ids.roll(-1, 1)))
        expected = [model(ids, labels=ids, **v).loss for v in variants]
        patch(model)
        for variant, loss in zip(variants, expected):
            torch.testing.assert_close(model(ids, labels=ids, **variant).loss, loss)

    def test_another_loss_of_the_users(self):
        model = _model("llama").train()
        ids, _ = _batch()
        model.loss_function = lambda logits, labels, **_: logits.square().mean()
        expected = model(ids, labels=ids).loss
        patch(model)
        torch.testing.assert_close(model(ids, labels=ids).loss, expected)
        unpatch(model)
        assert model(ids, labels=ids).loss == expected


def test_new_head_after_the_patch():
    model = _model("llama").train()
    patch(model)
    model.resize_token_embeddings(V + 8)
    ids, _ = _batch()
    ours = model(ids, labels=ids)
    unpatch(model)
    torch.testing.assert_close(ours.loss, model(ids, labels=ids).loss)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_compile(name):
    model = _model(name).train()
    expected = _step(model)
    patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    ids, mask = _batch()
    labels = ids.masked_fill(mask.roll(1, 1) == 0, -100)
    model.zero_grad()
    out = compiled(ids, attention_mask=mask, labels=labels)
    out.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    _assert_close((out.logits[mask == 1], out.loss, grads), expected)


def test_layout_of_conv1d():
    """The processor reads [in, out] as it is; other devices get a copy where there are rows enough to pay for it."""
    conv = transformers.pytorch_utils.Conv1D(6, 4)
    assert layers._weight(conv, torch.empty(100, 4)).data_ptr() == conv.weight.data_ptr()
    conv = conv.to("meta")
    few, many = (layers._weight(conv, torch.empty(2, rows // 2, 4, device="meta")) for rows in (32, 64))
    assert few.stride() == (1, 6) and many.stride() == (4, 1)
    assert few.shape == many.shape == (6, 4)


def test_unknown_architecture():
    """No row in the table: attention, linear layers and LayerNorm are replaced, the rest is named."""
    config = transformers.StableLmConfig(**TINY)
    torch.manual_seed(0)
    model = transformers.StableLmForCausalLM(config).eval()
    ids, mask = _batch(side="left")
    expected = model(ids, attention_mask=mask).logits[mask == 1]
    patch(model)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[mask == 1], expected, atol=2e-5, rtol=1e-4)


def test_parts_with_other_attention():
    """A model whose parts differ in attention gets each one's back; so do models side by side in a module."""
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.LlavaConfig(
        vision_config=dict(vision, model_type="clip_vision_model", image_size=16, patch_size=8),
        text_config=dict(TINY, model_type="llama"),
    )
    both = torch.nn.ModuleList([transformers.LlavaForConditionalGeneration(config), _model("llama")])
    both[0].set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    models = [m for m in both.modules() if isinstance(m, transformers.PreTrainedModel)]
    before = [m.config._attn_implementation for m in models]
    assert {"eager", "sdpa"} <= set(before)
    for _ in range(2):
        patch(both)
    assert {m.config._attn_implementation for m in models} == {"llmfast"}
    unpatch(both)
    assert [m.config._attn_implementation for m in models] == before


def test_part_of_a_model_with_attention_of_its_own():
    """GOT-OCR 2's vision tower does not use the attention interface, its language model does."""
    text = dict(TINY, model_type="qwen2")
    vision = dict(hidden_size=32, output_channels=16, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    config = transformers.GotOcr2Config(
        text_config=text, vision_config=dict(vision, patch_size=8, mlp_dim=48, global_attn_indexes=[0])
    )
    model = transformers.GotOcr2ForConditionalGeneration(config).eval()
    ids, mask = _batch(side="left")
    expected = model(input_ids=ids, attention_mask=mask).logits
    language = model.model.language_model.config
    assert language._attn_implementation == "sdpa"
    assert "attention of GotOcr2ForConditionalGeneration" in repr(patch(model))
    assert language._attn_implementation == "llmfast"
    unpatch(model)
    assert language._attn_implementation == "sdpa"
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)


def test_part_that_takes_no_other_attention():
    """DETR's ResNet allows "eager" alone: transformers refuses to set the whole back to the "sdpa" that it has."""
    backbone = dict(model_type="resnet", embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], out_features=["stage2"])
    small = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    config = transformers.DetrConfig(backbone_config=backbone, num_queries=3, **small)
    model = transformers.DetrModel(config).eval()
    pixels = torch.randn(1, 3, 32, 32)
    expected = model(pixels).last_hidden_state
    models = [m for m in model.modules() if isinstance(m, transformers.PreTrainedModel)]
    before = [m.config._attn_implementation for m in models]
    assert set(before) == {"eager", "sdpa"}
    patch(model)
    torch.testing.assert_close(model(pixels).last_hidden_state, expected, atol=2e-5, rtol=1e-4)
    unpatch(model)
    assert [m.config._attn_implementation for m in models] == before
    assert torch.equal(model(pixels).last_hidden_state, expected)
