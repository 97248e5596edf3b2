"""The loss of a language model from hidden states and head, without logits unless somebody looks at them.

In training the patched LM head hands on `LazyLogits`, which know how to become logits. The patched loss function takes
the hidden states and the weight out of them and never asks for logits. Whoever else touches them (a metric, another
loss, a model that caps its logits) makes them ordinary logits at that moment, with gradients: results and types are those
of the unpatched model either way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers.loss.loss_utils import ForCausalLMLoss

from llmfast import ops
from llmfast.integrations.transformers.layers import _replacement, _takes
from llmfast.ops._native_op import autocast

__all__ = ["LazyLogits", "causal_lm_loss"]


class LazyLogits(torch.Tensor):
    """``hidden @ weight.T`` of shape ``[..., V]``, computed when first used. Shape, dtype and device are known before."""

    @staticmethod
    def __new__(cls, hidden: Tensor, weight: Tensor, dtype: torch.dtype | None = None):
        shape = (*hidden.shape[:-1], weight.shape[0])
        lazy = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype or hidden.dtype, device=hidden.device)
        lazy.hidden, lazy.weight, lazy.value = hidden, weight, None
        return lazy

    def materialized(self) -> Tensor:
        if self.value is None:
            with torch.enable_grad():
                self.value = ops.linear(self.hidden, self.weight).to(self.dtype)
        return self.value

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in _DESCRIBES:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs or {})
        if function in _KEEPS and len(args) == 1 and not kwargs and args[0].value is None:
            lazy = args[0]
            if function is Tensor.float and lazy.dtype != torch.float32:
                return LazyLogits(lazy.hidden, lazy.weight, torch.float32)
            return lazy
        args, kwargs = tree_map_only(LazyLogits, LazyLogits.materialized, (args, kwargs or {}))
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(LazyLogits, LazyLogits.materialized, (args, kwargs or {}))
        return function(*args, **kwargs)


_KEEPS = {Tensor.contiguous, Tensor.float}
_DESCRIBES = {
    Tensor.shape.__get__,
    Tensor.dtype.__get__,
    Tensor.device.__get__,
    Tensor.ndim.__get__,
    Tensor.dim,
    Tensor.size,
    Tensor.numel,
    Tensor.is_floating_point,
}


@_replacement
def lm_head(self: nn.Linear, input: Tensor) -> Tensor:
    if not _takes(input, self.weight):
        return nn.Linear.forward(self, input)
    if not (self.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return ops.linear(input, self.weight, self.bias)
    return LazyLogits(*autocast(input, self.weight))


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs,
) -> Tensor:
    """`transformers.loss.loss_utils.ForCausalLMLoss`: mean over tokens, or sum over `num_items_in_batch`."""
    if type(logits) is not LazyLogits or logits.value is not None or logits.weight.shape[0] != vocab_size:
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = shift_labels.to(logits.hidden.device).reshape(logits.hidden.shape[:-1])
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = ops.linear_cross_entropy(
        logits.hidden, logits.weight, shift_labels, ignore_index=ignore_index, reduction=reduction
    )
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch
