"""`llmfast.patch` on architectures that it has no table for: what is replaced by likeness, and that nothing changes."""

import types

import pytest
import torch
from tiny_models import PLAIN, TINY, V

transformers = pytest.importorskip("transformers", "5.4")

from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm  # noqa: E402

from llmfast.integrations.transformers import alike, layers, patch, unpatch  # noqa: E402

EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
T5 = dict(vocab_size=V, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0)

# name: (model_type, options, kinds of replacement found by likeness with how many modules)
ARCHITECTURES = {
    "granite": (
        "granite",
        TINY | dict(residual_multiplier=0.5, attention_multiplier=0.3, logits_scaling=2.0),
        {"rms_norm": 5, "gated_mlp": 2, "rotary_attention": 2},
    ),
    "gemma": (
        "gemma",
        TINY | dict(head_dim=16),
        {"gemma_rms_norm": 5, "gated_mlp": 2, "rotary_attention": 2, "pre_norm_block": 2},
    ),
    "olmo2": ("olmo2", TINY, {"olmo_rms_norm": 9, "gated_mlp": 2}),
    "mixtral": ("mixtral", TINY | EXPERTS, {"rms_norm": 5, "rotary_attention": 2}),
    "qwen3_moe": (
        "qwen3_moe",
        TINY | EXPERTS | dict(head_dim=16, mlp_only_layers=[0]),
        {"rms_norm": 9, "gated_mlp": 1, "rotary_attention": 2, "pre_norm_block": 2},
    ),
    "glm": ("glm", TINY | dict(head_dim=16), {"rms_norm": 5, "pre_norm_block": 2}),  # rotary pairs are neighbours
    "stablelm": ("stablelm", TINY, {"gated_mlp": 2}),
    "falcon": ("falcon", PLAIN | dict(alibi=True), {}),
    "phi": ("phi", TINY, {}),
    "eurobert": (
        "eurobert",
        TINY,
        {"rms_norm": 5, "gated_mlp": 2, "rotary_attention": 2, "pre_norm_block": 2},
    ),
    "ultrabert": (
        "ultrabert",
        TINY,
        {"rms_norm": 5, "gated_mlp": 2, "pre_norm_block": 2},
    ),  # its attention has no cache
    "t5": ("t5", T5 | dict(pad_token_id=0, eos_token_id=1), {"t5_rms_norm": 12}),
}
# transformers 5.4 declares this field of these as a number and refuses its own default.
UNTIED = {"tie_word_embeddings": 0} if transformers.__version__.startswith("5.4.") else {}
AUTO = {"t5": AutoModelForSeq2SeqLM, "eurobert": AutoModelForMaskedLM, "ultrabert": AutoModelForMaskedLM}


def _model(name: str):
    kind, options, _ = ARCHITECTURES[name]
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**options, **(UNTIED if name in ("olmo2", "eurobert") else {}))
    for dropout in ("attention_dropout", "hidden_dropout", "dropout_rate", "resid_pdrop", "embd_pdrop"):
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    model = AUTO.get(name, AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that attention is not uniform, and no norm is trivial
            parameter.normal_(std=0.2) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) / 5)
    return model.eval()


def _batch(side: str | None):
    torch.manual_seed(1)
    ids = torch.randint(3, V, (2, 13))
    mask = torch.ones_like(ids)
    if side is not None:
        mask[0, slice(4) if side == "left" else slice(-4, None)] = 0
    return ids.masked_fill(mask == 0, 0), mask


def _step(model, side):
    """Logits of real tokens, loss, gradients by name."""
    ids, mask = _batch(side)
    labels = ids.masked_fill((mask == 0) | (mask.roll(1, 1) == 0), -100)
    model.zero_grad()
    out = model(input_ids=ids, attention_mask=mask, labels=labels)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.logits[mask == 1], out.loss, grads


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_same_numbers(name, side):
    model = _model(name).train(side is None)
    expected = _step(model, side)
    report = patch(model)
    found: dict[str, int] = {}
    for module in model.modules():
        kind = alike.kind_of(module)
        if kind is not None:
            assert layers.is_ours(module.forward) and module.forward.__func__.kind == kind
            found[kind] = found.get(kind, 0) + 1
    assert found == ARCHITECTURES[name][2], report
    ours = _step(model, side)
    torch.testing.assert_close(ours[0], expected[0], atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(ours[1], expected[1], atol=1e-5, rtol=1e-5)
    assert ours[2].keys() == expected[2].keys()
    largest = max(grad.abs().max().item() for grad in expected[2].values())
    for parameter, grad in expected[2].items():
        torch.testing.assert_close(
            ours[2][parameter], grad, atol=1e-5 * max(largest, 1), rtol=2e-4, msg=lambda m, n=parameter: f"{n}: {m}"
        )
    unpatch(model)
    assert torch.equal(_step(model, side)[0], expected[0])


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if AUTO.get(name) is not AutoModelForMaskedLM])
def test_greedy_text(name):
    model = _model(name)
    ids, mask = _batch("left")
    options = dict(attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    expected = model.generate(ids, **options)
    patch(model)
    assert model.generate(ids, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["olmo2", "gemma", "t5"])
def test_half_precision_rounds_where_the_class_does(name):
    """The three kinds of RMSNorm differ in when they round, and in the dtype of what they return."""
    kinds = [k for k in ARCHITECTURES[name][2] if k.endswith("rms_norm")]
    norm = next(m for m in _model(name).modules() if alike.kind_of(m) in kinds)
    x = torch.randn(5, 64)
    for dtype, weight_dtype in ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)):
        norm.to(weight_dtype)
        expected = norm(x.to(dtype))
        ours = layers.REPLACEMENTS[kinds[0]](norm, x.to(dtype))
        exact = norm.to(torch.float64)(x.to(dtype).double())
        assert ours.dtype == expected.dtype
        assert (ours.double() - exact).norm() <= 2 * (expected.double() - exact).norm() + 1e-5 * exact.norm()


class TestLikeness:
    """Only the same code counts."""

    @staticmethod
    def _copy(original, **globals_changed):
        """A class of transformers with `original`'s forward, some of its globals changed."""
        function = original.forward
        while hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        changed = types.FunctionType(function.__code__, {**function.__globals__, **globals_changed})
        changed.__defaults__, changed.__doc__ = function.__defaults__, function.__doc__
        kind = type("Copy", (torch.nn.Module,), {"forward": changed})
        kind.__module__ = "transformers.models.copy.modeling_copy"
        return kind

    def test_copies(self):
        assert alike.kind_of(self._copy(LlamaRMSNorm)()) == "rms_norm"
        assert alike.kind_of(self._copy(LlamaMLP)()) == "gated_mlp"
        assert alike.kind_of(self._copy(LlamaAttention)()) == "rotary_attention"

    def test_another_function_of_the_same_name(self):
        kind = self._copy(LlamaAttention, apply_rotary_pos_emb=lambda q, k, cos, sin, unsqueeze_dim=1: (q, k))
        assert alike.kind_of(kind()) is None

    def test_another_constant(self):
        kind = self._copy(LlamaRMSNorm)
        code = kind.forward.__code__
        constants = tuple(3 if c == 2 else c for c in code.co_consts)
        assert constants != code.co_consts
        kind.forward = types.FunctionType(code.replace(co_consts=constants), kind.forward.__globals__)
        assert alike.kind_of(kind()) is None

    def test_an_attribute_that_the_code_does_not_read(self):
        attention = self._copy(LlamaAttention)()
        attention.q_norm = torch.nn.Identity()
        assert alike.kind_of(attention) is None

    def test_classes_of_others(self):
        kind = self._copy(LlamaRMSNorm)
        kind.__module__ = "my_model"
        assert alike.kind_of(kind()) is None
