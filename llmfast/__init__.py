"""llmfast: hand-written kernels for transformers, and a thin layer to train and run models with them.

>>> import llmfast
>>> model = llmfast.models.GPT.preset("gpt2")
>>> loss = model(input_ids, targets)          # fused LM head and cross-entropy: logits are never materialised
>>> out = llmfast.attention(q, k, v, causal=True)
"""

from importlib import import_module

from llmfast import backend
from llmfast.ops import (
    add_layer_norm,
    add_rms_norm,
    attention,
    embedding,
    ffn,
    linear,
    linear_cross_entropy,
    rotary,
    rotary_tables,
    scaled_dot_product_attention,
    varlen_attention,
)
from llmfast.optim import AdamW, clip_grad_norm

__version__ = "0.1.0"

__all__ = [
    "AdamW",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "backend",
    "clip_grad_norm",
    "data",
    "embedding",
    "ffn",
    "generate",
    "integrations",
    "linear",
    "linear_cross_entropy",
    "models",
    "nn",
    "patch",
    "reference",
    "rotary",
    "rotary_tables",
    "scaled_dot_product_attention",
    "train",
    "unpatch",
    "varlen_attention",
]

_LAZY = {"data", "generate", "integrations", "models", "nn", "reference", "train"}


def __getattr__(name: str):
    if name in _LAZY:
        return import_module(f"llmfast.{name}")
    if name in ("patch", "unpatch"):
        return getattr(import_module("llmfast.integrations.transformers"), name)
    raise AttributeError(f"module 'llmfast' has no attribute {name!r}")
