"""Modules that hold parameters and call `llmfast.ops`; `models` is built from them."""

from llmfast.nn.attention import KVCache, SelfAttention
from llmfast.nn.drop_in import MLP, LayerNorm, MultiheadAttention, RMSNorm, TransformerEncoderLayer
from llmfast.nn.layers import FFN, AddLayerNorm, AddRMSNorm, Embedding, Linear

__all__ = [
    "FFN",
    "MLP",
    "AddLayerNorm",
    "AddRMSNorm",
    "Embedding",
    "KVCache",
    "LayerNorm",
    "Linear",
    "MultiheadAttention",
    "RMSNorm",
    "SelfAttention",
    "TransformerEncoderLayer",
]
