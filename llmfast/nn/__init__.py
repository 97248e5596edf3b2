"""Modules that hold parameters and call `llmfast.ops`; `models` is built from them."""

from llmfast.nn.attention import KVCache, SelfAttention
from llmfast.nn.layers import FFN, AddLayerNorm, AddRMSNorm, Embedding, Linear

__all__ = ["FFN", "AddLayerNorm", "AddRMSNorm", "Embedding", "KVCache", "Linear", "SelfAttention"]
