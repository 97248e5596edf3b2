"""``scaled_dot_product_attention``: torch's signature and conventions on `attention`'s kernels."""

from __future__ import annotations

import torch
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.overrides import handle_torch_function

from llmfast import backend
from llmfast.ops._native_op import autocast, overrides_torch, stands_for_tensor, whole_calls
from llmfast.ops.attention import (
    _FLOATING,
    _attention,
    _differentiable,
    _score_options,
    _shapes_fit,
    _why_not_on_device,
    broadcasts,
)

__all__ = ["scaled_dot_product_attention"]

# Kept, for programs that put our function in torch's place.
_torchs_own = torch.nn.functional.scaled_dot_product_attention


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` on `attention`'s kernels: same arguments, results and errors.

    `is_causal` aligns top-left: query i sees keys 0..i. What the kernels do not take (dropout, float64, other devices,
    a mask that requires a gradient, tensor subclasses) goes to torch's own function, counted in
    ``llmfast.backend.info()``; so do arguments that do not fit, so that the error is torch's.

    Args:
        query: ``[..., Hq, L, E]``. key: ``[..., Hkv, S, E]``. value: ``[..., Hkv, S, Ev]``. Dimensions before the last
            two broadcast against each other; there may be none. Tensors of more than four dimensions run natively where
            they are contiguous.
        attn_mask: boolean (True: look) or additive, broadcastable to ``[..., Hq, L, S]``; not together with
            `is_causal`. A `torch.nn.attention.bias.CausalBias` is never materialised.
        enable_gqa: allows Hkv < Hq.

    Returns:
        ``[..., Hq, L, Ev]``, laid out as `query` is.

    Raises:
        RuntimeError: what torch's own function rejects. ValueError: `key` and `value` differ in length.

    Example:
        >>> q = torch.randn(2, 8, 16, 64)
        >>> llmfast.scaled_dot_product_attention(q, q, q, is_causal=True).shape
        torch.Size([2, 8, 16, 64])
    """
    if native := whole_calls(query):
        out = native.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, torch.is_grad_enabled()
        )
        if out is not None:
            return _differentiable(query, key, value, attn_mask, out) if type(out) is list else out
    if stands_for_tensor(*(tensors := (query, key, value, attn_mask))):
        options = {"scale": scale, "enable_gqa": enable_gqa}
        return handle_torch_function(scaled_dot_product_attention, tensors, *tensors, dropout_p, is_causal, **options)
    prepared = _prepare_twin(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if isinstance(prepared, str):
        backend.count_fallback("scaled_dot_product_attention", prepared)
        return _torchs_own(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    q, k, v, mask, right, shape = prepared
    out = _attention(q, k, v, mask, None, right, *_score_options(q, scale, None))[0]
    return out if len(shape) == 4 else out.view(shape)


def _prepare_twin(query, key, value, mask, dropout_p, is_causal, enable_gqa):
    """q, k and v as [B, H, T, D], the mask, how far right of the diagonal a query sees, and the shape of the result; or
    the reason why torch's own function has to do it."""
    if dropout_p != 0.0:
        return "dropout"
    if is_causal and mask is not None:
        return "both attn_mask and is_causal"
    variant = mask.variant if isinstance(mask, CausalBias) else None
    if not all(isinstance(t, torch.Tensor) for t in (query, key, value)):
        return "arguments that do not fit"
    if any(overrides_torch(t) for t in (query, key, value, None if variant is not None else mask)):
        return "a tensor subclass"
    if not query.device == key.device == value.device:
        return "arguments that do not fit"
    if not query.is_cpu and (reason := _why_not_on_device(query, value)):
        return reason
    if query.dtype not in _FLOATING:
        return f"dtype {query.dtype}"
    q, k, v = autocast(query, key, value)
    if not q.dtype == k.dtype == v.dtype:
        return "arguments that do not fit"
    if k.dim() > 1 and v.dim() > 1 and k.shape[-2] != v.shape[-2]:  # not left to torch, which reads past the end
        raise ValueError(f"value: got {v.shape[-2]} tokens, expected {k.shape[-2]} as key has")
    shape = q.shape[:-1] + v.shape[-1:]
    if not (q.dim() == k.dim() == v.dim() == 4 and _twin_shapes_fit(q, k, v, enable_gqa)):
        broadcast = _broadcast_heads(q, k, v, enable_gqa)
        if isinstance(broadcast, str):
            return broadcast
        q, k, v, shape = broadcast
    L, S = q.shape[2], k.shape[2]
    right = L - S if is_causal else None
    if variant is not None:
        upper_left = variant == CausalVariant.UPPER_LEFT or mask.seq_len_q == mask.seq_len_kv
        if not upper_left and (mask.seq_len_q, mask.seq_len_kv) != (L, S):
            return "arguments that do not fit"
        mask, right = None, L - S if upper_left else 0
    elif mask is not None:
        reason = _why_not_twin_mask(mask, query, (*shape[:-1], S))
        if reason:
            return reason
    return q, k, v, mask, right, shape


def _twin_shapes_fit(q, k, v, enable_gqa) -> bool:
    return _shapes_fit(q.shape, k.shape, v.shape) and (enable_gqa or q.shape[1] == k.shape[1])


def _broadcast_heads(q, k, v, enable_gqa):
    """As [B, H, T, D] by torch's broadcasting, without a copy; and the shape of the result."""
    own = 3 if enable_gqa else 2  # dimensions that do not broadcast
    if min(q.dim(), k.dim(), v.dim()) < own:
        return "arguments that do not fit"
    try:
        batch = torch.broadcast_shapes(q.shape[:-own], k.shape[:-own], v.shape[:-own])
    except RuntimeError:
        return "arguments that do not fit"
    q, k, v = (t.expand(*batch, *t.shape[-own:]) for t in (q, k, v))
    shape = q.shape[:-1] + v.shape[-1:]
    if len(shape) > 4:
        if not all(t.is_contiguous() for t in (q, k, v)):
            return f"{len(shape)} dimensions, not contiguous"
        q, k, v = (t.flatten(0, -4) for t in (q, k, v))
    else:
        q, k, v = (t[(None,) * (4 - t.dim())] for t in (q, k, v))
    return (q, k, v, shape) if _twin_shapes_fit(q, k, v, enable_gqa) else "arguments that do not fit"


def _why_not_twin_mask(mask: torch.Tensor, query: torch.Tensor, full: tuple[int, ...]) -> str | None:
    """`full`: the shape of the scores. Of the many dimensions before the last three, a mask may only broadcast."""
    if not isinstance(mask, torch.Tensor) or mask.device != query.device or not 2 <= mask.dim() <= len(full):
        return "arguments that do not fit"
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        return "arguments that do not fit"
    if not broadcasts(mask.shape, full):
        return "arguments that do not fit"
    if len(full) > 4 and mask.dim() > 3:
        return f"a mask of {mask.dim()} dimensions"
    if mask.requires_grad and torch.is_grad_enabled():
        return "a mask that requires a gradient"
    return None
