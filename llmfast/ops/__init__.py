"""The ops: each file holds one op's schema, implementation, fake kernel, gradient and public function."""

import torch as _torch

from llmfast.ops.linear import linear
from llmfast.reference import (
    add_layer_norm,
    add_rms_norm,
    attention,
    embedding,
    ffn,
    linear_cross_entropy,
    rotary,
    varlen_attention,
)


def rotary_tables(length, dim, theta=10000.0):
    f = theta ** (-_torch.arange(0, dim, 2, dtype=_torch.float64) / dim)
    a = _torch.arange(length, dtype=_torch.float64)[:, None] * f
    return a.cos().float(), a.sin().float()


__all__ = ["linear", "add_layer_norm", "add_rms_norm", "attention", "embedding", "ffn", "linear_cross_entropy", "rotary", "rotary_tables", "varlen_attention"]
