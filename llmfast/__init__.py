"""llmfast: hand-written CPU and CUDA kernels for transformers, and a thin layer to train, run and align models with them.

>>> import llmfast
>>> model = llmfast.models.GPT.preset("gpt2")
>>> loss = model(input_ids, targets)          # fused LM head and cross-entropy: logits are never materialised
>>> out = llmfast.attention(q, k, v, causal=True)
"""

from importlib import import_module

from llmfast import backend
from llmfast.ops import linear

__version__ = "0.1.0"

__all__ = ["backend", "data", "linear", "models", "nn", "reference"]

_LAZY = {"data", "generate", "models", "nn", "reference", "train"}


def __getattr__(name: str):
    if name in _LAZY:
        return import_module(f"llmfast.{name}")
    raise AttributeError(f"module 'llmfast' has no attribute {name!r}")
