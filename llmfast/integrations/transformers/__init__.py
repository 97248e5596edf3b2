"""Hugging Face transformers on llmfast's kernels.

Importing this module registers the attention implementation, after which any model takes it by name:

>>> import llmfast.integrations.transformers
>>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="llmfast")
>>> model.set_attn_implementation("llmfast")    # or later; back: model.set_attn_implementation("sdpa")

`patch` goes further and replaces norms, linear layers, feed-forward networks, rotary embeddings and the loss too:

>>> llmfast.patch(model)
"""

try:
    from transformers import AttentionInterface, AttentionMaskInterface
except ModuleNotFoundError as error:
    raise ImportError("transformers: not installed, expected version 5.4 or later: pip install transformers") from error

from llmfast.integrations.transformers import compat, masks
from llmfast.integrations.transformers.attention import attention_forward
from llmfast.integrations.transformers.patching import Patched, patch, unpatch

__all__ = ["Patched", "attention_forward", "patch", "unpatch"]

compat.require_supported()
AttentionInterface.register("llmfast", attention_forward)
AttentionMaskInterface.register("llmfast", masks.build)
