"""The ops: each file holds one op's schema, implementation, fake kernel, gradient and public function; sdpa.py is a second
face of attention."""

from llmfast.ops import _flops
from llmfast.ops.attention import attention, varlen_attention
from llmfast.ops.embedding import embedding
from llmfast.ops.ffn import ffn
from llmfast.ops.linear import linear
from llmfast.ops.linear_cross_entropy import linear_cross_entropy
from llmfast.ops.norm import add_layer_norm, add_rms_norm
from llmfast.ops.rotary import rotary, rotary_tables
from llmfast.ops.sdpa import scaled_dot_product_attention

_flops.register()

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "embedding",
    "ffn",
    "linear",
    "linear_cross_entropy",
    "rotary",
    "rotary_tables",
    "scaled_dot_product_attention",
    "varlen_attention",
]
