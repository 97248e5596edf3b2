"""Tiny transformers models of every family that `GPT.from_pretrained` reads, saved as folders, for tests that read them."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

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
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'nobody' %}{{ raise_exception('who?') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@contextlib.contextmanager
def strict_and_one_thread() -> Iterator[None]:
    """Everything runs on the kernels; models this small only get slower with more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LLMFAST_STRICT", "1")
            yield
    finally:
        torch.set_num_threads(before)


def wide(model):
    """Weights and biases wide enough that logits differ clearly, none of them zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def save_family(name, folder):
    """A transformers model, which it saves to the folder."""
    torch.manual_seed(1)
    model = wide(AutoModelForCausalLM.from_config(FAMILIES[name]))
    model.generation_config.eos_token_id = None  # these models have none: any id may be the likeliest
    model.save_pretrained(folder, max_shard_size="40KB" if "llama" in name else "1GB")
    return model


@torch.no_grad()
def logits(model, ids, dtype=None):
    if dtype is not None:
        model = model.to(dtype)
    out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits
