"""Which replacement stands in for which class, by ``config.model_type``.

Linear layers, LayerNorm, the attention kernel and the LM-head loss need no row: they are the same in every model.
"""

from __future__ import annotations

__all__ = ["FAMILIES"]


def _decoder(prefix: str, **others: str) -> dict[str, str]:
    """Rows of a Llama-like decoder, whose class names start with `prefix`."""
    kinds = dict(
        Attention="rotary_attention", MLP="gated_mlp", RMSNorm="rms_norm", DecoderLayer="pre_norm_block", **others
    )
    return {prefix + name: kind for name, kind in kinds.items()}


def _bert(prefix: str) -> dict[str, str]:
    return {
        prefix + "SelfOutput": "bert_output",
        prefix + "Output": "bert_output",
        prefix + "Layer": "bert_feed_forward",
        prefix + "Encoder": "bert_encoder",
    }


_GEMMA2 = {
    "Gemma2Attention": "capped_rotary_attention",
    "Gemma2MLP": "gated_mlp",
    "Gemma2RMSNorm": "gemma_rms_norm",
    "Gemma2DecoderLayer": "gemma_block",
}
_GEMMA3 = {
    "Gemma3Attention": "rotary_attention",
    "Gemma3MLP": "gated_mlp",
    "Gemma3RMSNorm": "gemma_rms_norm",
    "Gemma3DecoderLayer": "gemma_block",
}
_PHI3 = {
    "Phi3Attention": "phi3_attention",
    "Phi3MLP": "phi3_mlp",
    "Phi3RMSNorm": "rms_norm",
    "Phi3DecoderLayer": "pre_norm_block",
}

FAMILIES: dict[str, dict[str, str]] = {
    "gpt2": {"GPT2MLP": "gpt2_mlp", "GPT2Block": "gpt2_block"},
    "opt": {"OPTDecoderLayer": "opt_block"},
    "llama": _decoder("Llama"),
    "mistral": _decoder("Mistral"),
    "qwen2": _decoder("Qwen2"),
    "qwen3": _decoder("Qwen3"),
    "smollm3": _decoder("SmolLM3"),
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "phi3": _PHI3,
    "falcon": {"FalconLinear": "linear"},
    "gpt_neox": {"GPTNeoXAttention": "gpt_neox_attention", "GPTNeoXMLP": "gpt_neox_mlp"},
    "bert": _bert("Bert"),
    "roberta": _bert("Roberta"),
    "xlm-roberta": _bert("XLMRoberta"),
    "camembert": _bert("Camembert"),
    "electra": _bert("Electra"),
}
