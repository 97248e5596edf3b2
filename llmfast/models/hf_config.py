"""Hugging Face's ``config.json`` <-> `GPTConfig`. What a `GPT` cannot represent is refused, by the field's name."""

from __future__ import annotations

from typing import Any

from llmfast.models.config import GPTConfig, RotaryScaling

__all__ = ["config_from_hf", "config_to_hf"]

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}
HF_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2", "silu": "silu"}
ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
# What a config.json may leave out, by the defaults of transformers' classes.
LLAMA_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "num_key_value_heads": None},
    "mistral": {"max_position_embeddings": 4096 * 32, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
    },
    "phi3": {
        "max_position_embeddings": 4096,
        "num_key_value_heads": None,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
}
BIASED = ("llama", "qwen3")  # have the field attention_bias


def config_from_hf(hf: dict[str, Any]) -> GPTConfig:
    """The `GPTConfig` of a model that a ``config.json`` (parsed) describes. Dropout is ignored: `GPT` has none.

    Raises:
        ValueError: it describes something else; the message names the field.
    """
    model_type = hf.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ValueError(f"model_type: got {model_type!r}, expected one of {', '.join(ARCHITECTURES)}")
    _expect(hf, "quantization_config", None)
    return _from_gpt2(hf) if model_type == "gpt2" else _from_llama(hf, model_type)


def _from_gpt2(hf: dict[str, Any]) -> GPTConfig:
    _expect(hf, "scale_attn_weights", True)
    _expect(hf, "scale_attn_by_inverse_layer_idx", False)
    _expect(hf, "add_cross_attention", False)
    return GPTConfig(
        vocab_size=hf.get("vocab_size", 50257),
        context=hf.get("n_positions", 1024),
        layers=hf.get("n_layer", 12),
        heads=hf.get("n_head", 12),
        width=hf.get("n_embd", 768),
        ffn_width=hf.get("n_inner"),
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        activation=_activation(hf, "activation_function", "gelu_new"),
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )


def _from_llama(hf: dict[str, Any], model_type: str) -> GPTConfig:
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        if name not in hf:
            raise ValueError(f"{name}: missing, expected a number")
    hf = {**LLAMA_DEFAULTS[model_type], **hf}
    theta, scaling = _rotary(hf)
    llama = model_type == "llama"
    return GPTConfig(
        vocab_size=hf["vocab_size"],
        context=hf["max_position_embeddings"],
        layers=hf["num_hidden_layers"],
        heads=hf["num_attention_heads"],
        kv_heads=hf["num_key_value_heads"],
        width=hf["hidden_size"],
        ffn_width=hf["intermediate_size"],
        head_dim=hf.get("head_dim"),
        norm="rms_norm",
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        activation=_activation(hf, "hidden_act", "silu"),
        gated=True,
        position="rotary",
        rotary_theta=theta,
        rotary_scaling=scaling,
        bias=llama and hf.get("mlp_bias", False),
        qkv_bias=model_type == "qwen2" or (model_type in BIASED and hf.get("attention_bias", False)),
        out_bias=model_type in BIASED and hf.get("attention_bias", False),
        qk_norm=model_type == "qwen3",
        tie_embeddings=hf.get("tie_word_embeddings", False),
        window=None if llama else _window(hf, model_type),
    )


def _expect(hf: dict[str, Any], name: str, expected: Any) -> None:
    if hf.get(name, expected) != expected:
        raise ValueError(f"{name}: got {hf[name]!r}, expected {expected!r}; llmfast's GPT has nothing for it")


def _activation(hf: dict[str, Any], name: str, default: str) -> str:
    found = hf.get(name, default)
    if found not in ACTIVATIONS:
        raise ValueError(f"{name}: got {found!r}, expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[found]


def _rotary(hf: dict[str, Any]) -> tuple[float, RotaryScaling | None]:
    """Base and scaling, from transformers 5's ``rope_parameters`` or 4's ``rope_theta`` and ``rope_scaling``."""
    field = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    found = hf.get(field) or {}
    if any(isinstance(value, dict) for value in found.values()):
        raise ValueError(f"{field}: got different ones for {', '.join(found)}, expected one for all layers")
    if found.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("partial_rotary_factor: got a part of the head, expected 1.0")
    theta = float(found.get("rope_theta", hf.get("rope_theta", 10000.0)))
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RotaryScaling("linear", float(found["factor"]))
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        numbers = (float(found[name]) for name in names)
        return theta, RotaryScaling("llama3", *numbers, int(found["original_max_position_embeddings"]))
    raise ValueError(f"{field}: got rope_type {kind!r}, expected default, linear or llama3")


def _window(hf: dict[str, Any], model_type: str) -> int | None:
    window = hf["sliding_window"]
    if model_type in ("qwen2", "qwen3"):
        window = window if hf.get("use_sliding_window", False) else None
        first = hf.get("max_window_layers", 28)
        layers = hf["num_hidden_layers"]
        kinds = hf.get("layer_types") or ["sliding" if window and i >= first else "full" for i in range(layers)]
        sliding = {kind.startswith("sliding") for kind in kinds}
        if len(sliding) > 1:
            name = "layer_types" if hf.get("layer_types") else "max_window_layers"
            raise ValueError(f"{name}: got layers with and without a window, expected the same for all")
        return window if True in sliding else None
    _expect(hf, "layer_types", None)
    return window


def config_to_hf(config: GPTConfig) -> dict[str, Any]:
    """The ``config.json`` (without tokens) of the transformers architecture that computes what `config` describes.

    Raises:
        ValueError: none does; the message names the field.
    """
    gpt2 = config.position == "learned"
    if gpt2:
        wanted = {"norm": "layer_norm", "gated": False, "window": None, "qk_norm": False}
    else:
        wanted = {"norm": "rms_norm", "gated": True}
    for name, expected in wanted.items():
        if getattr(config, name) != expected:
            found = getattr(config, name)
            raise ValueError(
                f"{name}: got {found!r}, expected {expected!r}: transformers has no architecture with "
                f"{config.position} positions and that"
            )
    if gpt2 and (config.Hkv != config.heads or config.D * config.heads != config.width):
        raise ValueError("kv_heads, head_dim: expected as many key as query heads, that together have the width")
    return _to_gpt2(config) if gpt2 else _to_llama(config)


def _to_gpt2(config: GPTConfig) -> dict[str, Any]:
    return {
        "architectures": [ARCHITECTURES["gpt2"]],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_embd": config.width,
        "n_inner": config.F,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else HF_ACTIVATIONS[config.activation],
        "tie_word_embeddings": config.tie_embeddings,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def _to_llama(config: GPTConfig) -> dict[str, Any]:
    model_type = _llama_type(config)
    hf = {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.Hkv,
        "hidden_size": config.width,
        "intermediate_size": config.F,
        "head_dim": config.D,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": HF_ACTIVATIONS[config.activation],
        "rope_theta": config.rotary_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
    }
    if model_type == "llama":
        hf |= {"attention_bias": config.has_qkv_bias or config.has_out_bias, "mlp_bias": config.bias}
    elif model_type in ("qwen2", "qwen3"):
        hf |= {"use_sliding_window": config.window is not None, "sliding_window": config.window, "max_window_layers": 0}
        if model_type == "qwen3":
            hf["attention_bias"] = config.has_qkv_bias
    else:
        hf |= {"sliding_window": config.window}
    scaling = config.rotary_scaling
    if scaling is not None:
        hf["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            hf["rope_scaling"] |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_context,
            }
    return hf


def _llama_type(config: GPTConfig) -> str:
    """Llama has every bias or none around attention, and no window; Mistral a window; Qwen2 biases into attention; Qwen3
    norms of queries and keys. Phi-3's fused weights are the same function as Llama's or Mistral's."""
    if config.qk_norm:
        if config.bias or config.has_qkv_bias != config.has_out_bias:
            raise ValueError("qk_norm: got True, expected no biases with it but all of attention's")
        return "qwen3"
    if config.has_qkv_bias and not config.has_out_bias and not config.bias:
        return "qwen2"
    if config.window is None:
        return "llama"
    if config.bias or config.has_qkv_bias or config.has_out_bias:
        raise ValueError(f"window: got {config.window} together with biases, expected one of them")
    return "mistral"
