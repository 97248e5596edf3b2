"""``attn_implementation="llmfast"`` against transformers' own attention, on tiny random models.

One file above 500 lines: masks, caches, biases and sinks meet in one function, on the same few models.
"""

import subprocess
import sys
import types

import pytest
import torch

transformers = pytest.importorskip("transformers", "5.4")

import llmfast.integrations.transformers  # noqa: E402, F401
from llmfast import backend  # noqa: E402
from llmfast.integrations.transformers import masks  # noqa: E402
from llmfast.integrations.transformers.attention import attention_forward  # noqa: E402

from transformers import (  # noqa: E402  isort: skip
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertModel,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402  isort: skip

V = 96
TINY = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def _llama():
    return LlamaForCausalLM(LlamaConfig(**TINY))


def _mistral():
    return MistralForCausalLM(MistralConfig(**TINY, sliding_window=5))


def _gemma2():
    return Gemma2ForCausalLM(Gemma2Config(**TINY, head_dim=8, sliding_window=5, attn_logit_softcapping=2.0))


def _gemma3():
    types = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**TINY, head_dim=8, sliding_window=5, layer_types=types))


def _gpt_oss():
    config = GptOssConfig(
        **TINY, head_dim=8, sliding_window=5, num_local_experts=2, num_experts_per_tok=1, rope_parameters=None
    )
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    return GptOssForCausalLM(config)


MODELS = {"llama": _llama, "mistral": _mistral, "gemma2": _gemma2, "gemma3": _gemma3, "gpt_oss": _gpt_oss}
# Models whose layers do something to the mask, or ask for a part of the keys: (model_type, options).
SPARSE = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, index_topk=4)
INDEXER = dict(index_n_heads=4, index_head_dim=16)
EXPERTS = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16)
BLOCKS = dict(index_n_heads=2, index_head_dim=16, index_block_size=4, index_topk_blocks=1, index_local_blocks=1)
ENCODER_DECODER = dict(
    vocab_size=V, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48
) | dict(encoder_attention_heads=4, decoder_attention_heads=4, dropout=0.0, attention_dropout=0.0)
GEMMA4 = dict(
    head_dim=8,
    global_head_dim=8,
    sliding_window=5,
    num_hidden_layers=4,
    num_kv_shared_layers=2,
    hidden_size_per_layer_input=16,
    vocab_size_per_layer_input=V,
    layer_types=["sliding_attention", "full_attention"] * 2,
)
OWN_MASKS = {
    "deepseek_v32": ("deepseek_v32", SPARSE | INDEXER | EXPERTS | dict(num_key_value_heads=4, first_k_dense_replace=1)),
    "minimax_m3": (
        "minimax_m3_vl_text",
        BLOCKS
        | EXPERTS
        | dict(head_dim=8, layer_types=["minimax_m3_sparse"] * 2, num_local_experts=4, dense_intermediate_size=48),
    ),
    "deepseek_v4": (
        "deepseek_v4",
        EXPERTS
        | INDEXER
        | dict(
            head_dim=16,
            qk_rope_head_dim=8,
            q_lora_rank=16,
            index_topk=2,
            layer_types=["compressed_sparse_attention", "heavily_compressed_attention"],
            compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        ),
    ),
    "gemma4": ("gemma4_text", GEMMA4),
    "pegasus_x": ("pegasus_x", ENCODER_DECODER | dict(block_size=8, num_global_tokens=2)),
    "bigbird_pegasus": ("bigbird_pegasus", ENCODER_DECODER),
}
# What each is compared with: sdpa, or eager where sdpa lacks softcap or sinks.
PEER = {"llama": "sdpa", "mistral": "sdpa", "gemma2": "eager", "gemma3": "sdpa", "gpt_oss": "eager"}


@pytest.fixture(autouse=True)
def _strict(monkeypatch):
    monkeypatch.setenv("LLMFAST_STRICT", "1")


def _model(name: str):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # larger than the usual initialisation, so that attention is not uniform
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


def _batch(B: int = 2, T: int = 13, side: str | None = None):
    ids = torch.randint(3, V, (B, T))
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, :4] = 0
    elif side == "right":
        mask[0, -4:] = 0
    return ids.masked_fill(mask == 0, 0), mask


def _both(model, peer: str, call):
    model.set_attn_implementation(peer)
    expected = call()
    model.set_attn_implementation("llmfast")
    return call(), expected


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name, side):
    model = _model(name)
    ids, mask = _batch(side=side)
    labels = ids.masked_fill((mask == 0) | (mask.roll(1, 1) == 0), -100)  # nothing is predicted from padding

    def call():
        model.zero_grad()
        out = model(ids, attention_mask=mask, labels=labels)
        out.loss.backward()
        return out.logits[mask == 1], [p.grad.clone() for p in model.parameters() if p.grad is not None]

    ours, expected = _both(model, PEER[name], call)
    torch.testing.assert_close(ours[0], expected[0], atol=2e-5, rtol=1e-5)
    assert len(ours[1]) == len(expected[1])
    for a, b in zip(ours[1], expected[1]):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def _own_masks(name: str):
    kind, options = OWN_MASKS[name]
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**({} if "d_model" in options else TINY) | options)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("name", OWN_MASKS)
def test_layers_with_masks_of_their_own(name, side):
    model = _own_masks(name)
    ids, mask = _batch(side=side)
    labels = ids.masked_fill((mask == 0) | (mask.roll(1, 1) == 0), -100)

    def call():
        model.zero_grad()
        out = model(ids, attention_mask=mask, labels=labels)
        out.loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        text = model.generate(ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        return out.logits[mask == 1], grads, text

    ours, expected = _both(model, "eager", call)
    torch.testing.assert_close(ours[0], expected[0], atol=5e-5, rtol=1e-4)
    assert ours[1].keys() == expected[1].keys()
    largest = max(grad.abs().max().item() for grad in expected[1].values())
    for parameter, grad in expected[1].items():
        torch.testing.assert_close(ours[1][parameter], grad, atol=1e-5 * max(largest, 1), rtol=2e-4)
    assert ours[2].tolist() == expected[2].tolist()


OWN_ATTENTION = {  # which takes no other by `set_attn_implementation`, but is loaded with any
    "bloom": dict(hidden_size=32, n_layer=2, n_head=4),
    "mpt": dict(d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "xglm": dict(d_model=32, num_layers=2, attention_heads=4, ffn_dim=48, dropout=0.0, attention_dropout=0.0),
}


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_models_with_attention_of_their_own(name, side):
    """They are handed this integration's masks all the same, and apply them by themselves."""
    ids, mask = _batch(side=side)
    both = []
    for implementation in ("eager", "llmfast"):
        torch.manual_seed(0)
        config = CONFIG_MAPPING[name](vocab_size=V, pad_token_id=0, **OWN_ATTENTION[name])
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
        assert model.config._attn_implementation == implementation
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.2)
        text = model.generate(ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        both.append((model(ids, attention_mask=mask).logits[mask == 1], text))
    torch.testing.assert_close(both[1][0], both[0][0], atol=2e-5, rtol=1e-5)
    assert both[1][1].tolist() == both[0][1].tolist()


def _git():
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=16)
    options = {key: value for key, value in TINY.items() if key != "num_key_value_heads"}
    config = CONFIG_MAPPING["git"](**options, vision_config=vision | dict(patch_size=8))
    return AutoModelForCausalLM.from_config(config), dict(pixel_values=torch.randn(2, 3, 16, 16))


def _gemma4_audio():
    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, attention_chunk_size=4)
    config = CONFIG_MAPPING["gemma4_audio"](**small, attention_context_left=3, output_proj_dims=32)
    return AutoModel.from_config(config), {}


@pytest.mark.parametrize("name", ["git", "gemma4_audio"])
def test_layers_that_apply_the_mask_themselves(name):
    """Attention other than transformers' interface in a model whose configuration names "llmfast"."""
    kind = {"git": _git, "gemma4_audio": _gemma4_audio}[name]
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    model, inputs = kind()
    if name == "git":
        inputs["input_ids"], inputs["attention_mask"] = _batch(side="left")
    else:
        inputs["input_features"], inputs["attention_mask"] = torch.randn(2, 60, 128), torch.ones(2, 60).bool()
        inputs["attention_mask"][0, -20:] = False

    def call():
        with torch.no_grad():
            return model.eval()(**inputs)[0]

    ours, expected = _both(model, "eager", call)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)


GENERATE = {
    "greedy": {},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "no_cache": {"use_cache": False},
    "chunked": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("how", GENERATE)
@pytest.mark.parametrize("name", MODELS)
def test_generate(name, how):
    model = _model(name)
    ids, mask = _batch(side="left")

    def call():
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=9, do_sample=False, min_new_tokens=9, **GENERATE[how]
        )

    ours, expected = _both(model, PEER[name], call)
    assert ours.tolist() == expected.tolist()


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_prefill_in_pieces(name, cache):
    """More than one query on top of a cache: queries are the last ones, in static caches not the last slots."""
    model = _model(name)
    ids, _ = _batch(T=14)

    def call():
        options = {"max_cache_len": 20} if cache is StaticCache else {}
        past = cache(config=model.config, **options)
        with torch.no_grad():
            return torch.cat([model(part, past_key_values=past).logits for part in ids.split([7, 1, 4, 2], 1)], 1)

    ours, expected = _both(model, PEER[name], call)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours, model(ids).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_packed_sequences(name):
    """Position ids that start again, and cu_seq_lens, separate documents; the result is that of each alone."""
    model = _model(name)
    lengths = [3, 9, 1, 7]
    ids, _ = _batch(B=1, T=sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    varlen = dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=9, max_length_k=9)
    model.set_attn_implementation(PEER[name])
    expected = torch.cat([model(part).logits for part in ids.split(lengths, 1)], 1)
    model.set_attn_implementation("llmfast")
    if name != "gpt_oss":  # whose own code builds its mask without position ids
        from_positions = model(ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(from_positions, expected, atol=2e-5, rtol=1e-5)
    with_bounds = model(ids, position_ids=positions, use_cache=False, **varlen).logits
    torch.testing.assert_close(with_bounds, expected, atol=2e-5, rtol=1e-5)


def test_packed_batch():
    model = _model("mistral")
    ids, _ = _batch(B=2, T=16)
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in ((7, 9), (16,))])

    ours, expected = _both(model, "sdpa", lambda: model(ids, position_ids=positions, use_cache=False).logits)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)


def test_sink_gradients():
    model = _model("gpt_oss")
    lengths = [6, 10]
    ids, _ = _batch(B=1, T=16)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]

    def call():
        model.zero_grad()
        model(ids, position_ids=positions, labels=ids, use_cache=False).loss.backward()
        return [layer.self_attn.sinks.grad.clone() for layer in model.model.layers]

    ours, expected = _both(model, "eager", call)
    for a, b in zip(ours, expected):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("bias", [False, True, "trained"])
def test_a_sink_of_each_query(bias, monkeypatch):
    """As Inkling 2's layers call: one more score in the softmax, without a value."""
    q, k, v, sinks = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 4, 6, 1)
    leaves = [t.requires_grad_() for t in (q, k, v, sinks)]
    layer, position_bias = types.SimpleNamespace(is_causal=True), torch.randn(2, 4, 6, 6) if bias else None
    if bias == "trained":
        monkeypatch.setenv("LLMFAST_STRICT", "0")  # no kernel computes a bias's gradient
        leaves.append(position_bias.requires_grad_())
    out = attention_forward(layer, q, k, v, None, scaling=0.3, position_bias=position_bias, sinks=sinks)[0]
    scores = q @ k.repeat_interleave(2, 1).mT * 0.3 + (position_bias if bias else 0)
    scores = scores.masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), float("-inf"))
    weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    expected = (weights @ v.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    for a, b in zip(torch.autograd.grad(out.pow(2).sum(), leaves), torch.autograd.grad(expected.pow(2).sum(), leaves)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_attention_with_sinks():
    B, H, T, D = 2, 4, 5, 8
    arguments = torch.randn(B, H, T, D), torch.randn(B, 2, T, D), torch.randn(B, 2, T, D), torch.randn(H)
    hidden = ~torch.ones(T, T, dtype=torch.bool).tril()

    def ours(q, k, v, sinks):
        return attention_forward(torch.nn.Module(), q, k, v, None, s_aux=sinks, is_causal=True)[0]

    def plain(q, k, v, sinks):
        scores = (q @ k.repeat_interleave(2, 1).mT * D**-0.5).masked_fill(hidden, float("-inf"))
        scores = torch.cat([scores, sinks[:, None, None].expand(len(q), H, T, 1)], -1)
        return (scores.softmax(-1)[..., :-1] @ v.repeat_interleave(2, 1)).transpose(1, 2)

    cotangents = torch.randn(3, B, T, H, D)

    def results(attend):
        def loss(*sample):
            q, k, v, sinks = sample
            return attend(q[None], k[None], v[None], sinks).square().sum()

        yield from torch.func.vjp(attend, *arguments)[1](cotangents[0])
        yield from torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2, 3)), in_dims=(0, 0, 0, None))(*arguments)
        yield torch.func.jacrev(attend, argnums=3)(*arguments)
        leaves = [a.clone().requires_grad_() for a in arguments]
        yield from torch.autograd.grad(attend(*leaves), leaves, cotangents, is_grads_batched=True)

    for a, b in zip(results(ours), results(plain), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    leaves = [a.clone().requires_grad_() for a in arguments]
    (grad,) = torch.autograd.grad(ours(*leaves).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not require grad|once_differentiable"):
        grad.sum().backward()


def test_sinks_under_autocast():
    """Queries and keys that rotary embeddings made float32 meet values that a linear layer made bfloat16."""
    q, k, v, sinks = (
        torch.randn(2, 4, 6, 8),
        torch.randn(2, 2, 6, 8),
        torch.randn(2, 2, 6, 8).bfloat16(),
        torch.randn(4),
    )
    with torch.autocast("cpu", torch.bfloat16):
        out = attention_forward(torch.nn.Module(), q, k, v, None, s_aux=sinks)[0]
    assert out.dtype == torch.bfloat16
    expected = attention_forward(torch.nn.Module(), q.bfloat16(), k.bfloat16(), v, None, s_aux=sinks)[0]
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_own_mask(kind):
    """A caller's 4-D mask is taken as it is, whatever its shape."""
    model = _model("llama")
    ids, _ = _batch(T=8)
    visible = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril()
    visible[0, :, 4:, 1] = False
    mask = visible if kind == "bool" else torch.where(visible, 0.0, float("-inf"))

    ours, expected = _both(model, "sdpa", lambda: model(ids, attention_mask=mask, use_cache=False).logits)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", ["bert", "modernbert", "splinter"])
def test_encoders(name, side):
    small = {**TINY, "type_vocab_size": 2}
    small.pop("num_key_value_heads")
    torch.manual_seed(0)
    if name == "bert":
        model = BertModel(BertConfig(**small)).eval()
    elif name == "splinter":  # its attention does not say that it is not causal
        model = AutoModel.from_config(CONFIG_MAPPING[name](**small)).eval()
    else:
        model = ModernBertModel(ModernBertConfig(**small, local_attention=6, cls_token_id=1, sep_token_id=2)).eval()
    ids, mask = _batch(side=side)

    ours, expected = _both(model, "eager", lambda: model(ids, attention_mask=mask).last_hidden_state[mask == 1])
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)


def test_position_bias_and_cross_attention(monkeypatch):
    monkeypatch.setenv("LLMFAST_STRICT", "0")  # the bias requires a gradient, which no kernel computes
    torch.manual_seed(0)
    config = T5Config(vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    ids, mask = _batch(side="right")

    def call():
        model.zero_grad()
        out = model(input_ids=ids, attention_mask=mask, labels=ids)
        out.loss.backward()
        return out.logits, [p.grad.clone() for p in model.parameters()]

    ours, expected = _both(model, "sdpa", call)
    torch.testing.assert_close(ours[0], expected[0], atol=2e-5, rtol=1e-5)
    for a, b in zip(ours[1], expected[1]):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_dropout_is_counted_and_same_as_sdpa(monkeypatch):
    config = GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=32, attn_pdrop=0.3)
    model = GPT2LMHeadModel(config).train()
    ids, _ = _batch()
    model.set_attn_implementation("llmfast")
    with pytest.raises(RuntimeError, match="dropout"):
        model(ids)
    monkeypatch.setenv("LLMFAST_STRICT", "0")
    before = backend.fallbacks().get("attention: dropout", 0)

    def call():
        torch.manual_seed(1)
        return model(ids).logits

    ours, expected = _both(model, "sdpa", call)
    torch.testing.assert_close(ours, expected)
    assert backend.fallbacks()["attention: dropout"] == before + 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_low_precision(dtype):
    model = _model("llama")
    ids, mask = _batch(side="left")

    def call():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(ids, attention_mask=mask).logits[mask == 1]

    ours, expected = _both(model, "sdpa", call)
    torch.testing.assert_close(ours, expected, atol=0.05, rtol=0.05)
    model = model.to(dtype)
    ours, expected = _both(model, "sdpa", lambda: model(ids, attention_mask=mask).logits[mask == 1])
    torch.testing.assert_close(ours, expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", ["mistral", "gpt_oss"])
def test_compile(name):
    model = _model(name)
    model.set_attn_implementation("llmfast")
    ids, mask = _batch(side="left")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=name != "gpt_oss", backend="aot_eager")
    for options in ({}, {"attention_mask": mask}):
        ours = compiled(ids, labels=ids, use_cache=False, **options)
        expected = model(ids, labels=ids, use_cache=False, **options)
        keep = mask == 1
        torch.testing.assert_close(ours.logits[keep], expected.logits[keep], atol=2e-5, rtol=1e-5)
        grads = torch.autograd.grad(ours.loss, model.model.layers[0].self_attn.q_proj.weight)
        wanted = torch.autograd.grad(expected.loss, model.model.layers[0].self_attn.q_proj.weight)
        torch.testing.assert_close(grads, wanted, atol=2e-5, rtol=1e-4)


def _build(q=8, k=8, q_offset=0, kv_offset=0, padding=None, window=None, **options):
    function = masks.causal_mask_function
    if window:
        function = transformers.masking_utils.sliding_window_causal_mask_function(window)
    return masks.build(
        2, q, k, q_offset, kv_offset, function, attention_mask=padding, local_size=window, device="cpu", **options
    )


def test_masks_stay_small():
    padding = torch.ones(2, 8, dtype=torch.bool)
    cut = padding.clone()
    cut[0, :3] = False
    for mask, window, keys, seen in (
        (_build(), None, 8, None),
        (_build(padding=padding), None, 8, None),
        (_build(q=2, q_offset=6), None, 8, None),
        (_build(window=9), None, 8, None),
        (_build(padding=cut), None, 8, cut),
        (_build(padding=cut, window=3), 3, 8, cut),
        (_build(window=3), 3, 8, None),
        (_build(k=20, q=3, q_offset=4), None, 7, None),  # a static cache: 20 slots, 7 filled
        (_build(k=20, q=3, q_offset=torch.tensor(4)), None, 7, None),
        (_build(k=9, q=3, q_offset=17, kv_offset=11, window=7), 7, 9, None),  # a sliding cache
    ):
        found = masks.read(mask, causal=False)
        assert (found.causal, found.window, found.keys or mask.shape[3]) == (True, window, keys)
        assert found.visible is seen or torch.equal(found.visible[:, 0, 0], seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("sizes", [(8, 8, 0, 0), (3, 20, 4, 0), (3, 9, 17, 11), (1, 12, 11, 0)])
def test_masks_mean_what_transformers_says(sizes, window, dtype):
    """To layers that do not know it, a mask is the one that transformers makes for eager attention."""
    q, k, q_offset, kv_offset = sizes
    padding = torch.ones(2, q_offset + q, dtype=torch.bool)
    function = masks.causal_mask_function
    if window:
        function = transformers.masking_utils.sliding_window_causal_mask_function(window)
    for cut in (0, kv_offset + 2):
        padding[0, :cut] = False
        options = dict(attention_mask=padding, local_size=window, device="cpu", dtype=dtype)
        expected = transformers.masking_utils.eager_mask(2, *sizes, function, **options)
        mask = masks.build(2, *sizes, function, **options)
        assert (mask.shape, mask.dtype, mask.device) == (expected.shape, dtype, expected.device)
        torch.testing.assert_close(mask + 0, expected, atol=0, rtol=0)
        assert torch.equal(mask[:, :, -1:], expected[:, :, -1:])
        assert torch.equal(torch.cat([mask, mask], -1), torch.cat([expected, expected], -1))


def test_masks_of_packed_sequences_and_both_directions():
    bidirectional = masks.bidirectional_mask_function
    padding = torch.ones(2, 6, dtype=torch.bool)
    padding[1, 4:] = False
    options = dict(attention_mask=padding, mask_function=bidirectional)
    assert torch.equal(masks.build(2, 6, 6, **options) + 0, transformers.masking_utils.eager_mask(2, 6, 6, **options))
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    config, embeds, both = LlamaConfig(**TINY), torch.zeros(2, 6, 32), []
    for implementation in ("eager", "llmfast"):
        config._attn_implementation = implementation
        both.append(transformers.masking_utils.create_causal_mask(config, embeds, None, None, position_ids=positions))
    assert both[1].mask.cu_seqlens.tolist() == [0, 3, 5, 6, 12]
    assert torch.equal(both[1] + 0, both[0])


def test_masks_take_what_a_layer_writes():
    for write in (
        lambda mask: mask.masked_fill_(torch.eye(8, dtype=torch.bool), -5.0),
        lambda mask: mask.__setitem__((..., 0), -5.0),
        lambda mask: mask.__iadd__(torch.eye(8)),
    ):
        mask, expected = (
            _build(window=3),
            transformers.masking_utils.eager_mask(
                2, 8, 8, mask_function=transformers.masking_utils.sliding_window_causal_mask_function(3)
            ).contiguous(),
        )
        write(mask)
        write(expected)
        assert torch.equal(masks.read(mask, True).visible, expected) and torch.equal(mask + 0, expected)


def test_masks_survive_moves_and_casts():
    padding = torch.ones(2, 8, dtype=torch.bool)
    padding[0, :3] = False
    mask = _build(padding=padding, window=3)
    assert mask.detach() is mask and mask.contiguous() is mask
    narrow = mask.to(torch.bfloat16)
    assert narrow.dtype == torch.bfloat16 and narrow.mask == mask.mask
    moved = mask.to(device="meta", non_blocking=True)
    assert moved.device.type == moved.mask.visible.device.type == "meta" and moved.mask.window == 3
    assert type(mask.to(torch.zeros(1, dtype=torch.float64))) is torch.Tensor
    assert torch.equal(mask.to(torch.bool), (mask + 0) != 0)  # as MPT does


def test_import_stays_lazy():
    code = "import llmfast, sys; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
