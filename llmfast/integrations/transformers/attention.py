"""transformers' attention interface on `llmfast.attention`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from llmfast import backend, ops
from llmfast.integrations.transformers.masks import Mask, dense, read, same_segment
from llmfast.ops._flops import attention as attention_flops
from llmfast.ops._native_op import NativeOp, autocast, overrides_torch
from llmfast.ops.attention import attention_backward

__all__ = ["attention_forward"]

_FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    position_ids: Tensor | None = None,
    sinks: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """What a model calls as ``attn_implementation="llmfast"``.

    Args:
        module: the attention layer; its `is_causal` holds where neither `is_causal` nor a mask says otherwise. One
            without it sees everything without a mask, as in eager attention (Splinter, the texts of CLAP and ALIGN).
        query: ``[B, Hq, Tq, D]``. key: ``[B, Hkv, Tk, D]``. value: ``[B, Hkv, Tk, Dv]``, heads not repeated.
        attention_mask: from `masks.build`, or a caller's own boolean or additive mask ``[B or 1, Hq or 1, Tq, Tk]``.
        dropout: of attention weights. Above 0 the layer runs in plain torch, counted; so do other dtypes than float32,
            bfloat16 and float16, and tensors of a class with its own idea of torch's functions.
        sliding_window: a query sees itself and the sliding_window - 1 keys before it (causal layers).
        s_aux: ``[Hq]``, a sink per head: one more score in the softmax, with no value.
        sinks: ``[B, Hq, Tq, 1]``, the same of each query (Inkling 2).
        position_bias: added to the scores, broadcastable to ``[B, Hq, Tq, Tk]``.
        cu_seq_lens_q, cu_seq_lens_k: bounds of packed sequences in the B * T tokens; a mask of a caller's own or
            padding goes before them.
        indices: ``[B, Tq, n]``, the only keys that a query may look at (DeepSeek's sparse attention).
        block_indices: blocks of keys, of which the layer's indexer makes a mask from `position_ids` (MiniMax M3).

    Returns:
        ``([B, Tq, Hq, Dv], None)``: attention weights are never stored.
    """
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    mask = read(attention_mask, causal)
    if sinks is not None:
        sinks = sinks[..., 0]
    elif s_aux is not None:
        sinks = s_aux[:, None]
    if block_indices is not None:
        visible = dense(mask, query.shape[2], mask.keys or key.shape[2], query.device)
        made = (block_indices, visible, mask.keys or key.shape[2], query.dtype, query.device, position_ids)
        mask = Mask(False, keys=mask.keys, visible=module.indexer.build_block_mask(*made))
    if indices is not None:
        mask = Mask(False, visible=_selected(indices, dense(mask, query.shape[2], key.shape[2], query.device), key))
    if mask.keys is not None and mask.keys != key.shape[2]:
        key, value = key[:, :, : mask.keys], value[:, :, : mask.keys]
    if sliding_window is not None and mask.causal and mask.window is None:
        mask = mask._replace(window=sliding_window)
    if cu_seq_lens_q is not None and mask.visible is None:
        return _packed(query, key, value, mask, cu_seq_lens_q, cu_seq_lens_k, dropout, scaling, softcap, sinks), None
    if mask.cu_seqlens is not None:
        bounds = mask.cu_seqlens
        return _packed(query, key, value, mask, bounds, bounds, dropout, scaling, softcap, sinks), None
    if position_bias is not None:
        mask = Mask(False, visible=_add_bias(position_bias, dense(mask, query.shape[2], key.shape[2], query.device)))
    if query.shape[0] != key.shape[0]:  # learned queries, shared by the batch
        query = query.expand(key.shape[0], -1, -1, -1)
    reason = _why_plain(query, dropout, sinks, mask.visible)
    if reason:
        out = _plain(reason, query, key, value, mask, dropout, scaling, softcap, sinks)
    elif sinks is not None:
        out = _with_sinks(query, key, value, mask, scaling, softcap, sinks)
    else:
        out = ops.attention(
            query,
            key,
            value,
            causal=mask.causal,
            mask=mask.visible,
            window=mask.window,
            scale=scaling,
            softcap=softcap,
        )
    return out.transpose(1, 2).contiguous(), None


def _packed(query, key, value, mask: Mask, bounds_q, bounds_k, dropout, scaling, softcap, sinks) -> Tensor:
    """Packed sequences: the batch is one stream of tokens. ``[B, Tq, Hq, Dv]``."""
    B, _, Tq, _ = query.shape
    reason = _why_plain(query, dropout, sinks)
    if reason or sinks is not None:
        visible = same_segment(bounds_q, bounds_k, B, Tq, key.shape[2])
        if mask.causal:
            visible = visible & dense(Mask(True, mask.window), Tq, key.shape[2], query.device)
        mask = Mask(False, visible=visible)
        if reason:
            out = _plain(reason, query, key, value, mask, dropout, scaling, softcap, sinks)
        else:
            out = _with_sinks(query, key, value, mask, scaling, softcap, sinks)
        return out.transpose(1, 2).contiguous()
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    window = mask.window if mask.causal else None
    out = ops.varlen_attention(
        q, k, v, bounds_q, bounds_k, causal=mask.causal, window=window, scale=scaling, softcap=softcap
    )
    return out.view(B, Tq, *out.shape[1:])


def _selected(indices: Tensor, mask: Tensor | None, key: Tensor) -> Tensor:
    """The part of `mask` at the keys in `indices`."""
    shape = (*indices.shape[:2], key.shape[2])
    left_out = torch.ones(shape, dtype=torch.bool, device=key.device).scatter(-1, indices.long(), False)[:, None]
    if mask is None:
        return ~left_out
    return mask.masked_fill(left_out, float("-inf")) if mask.is_floating_point() else mask & ~left_out


def _add_bias(bias: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return bias
    return bias + mask if mask.is_floating_point() else bias.masked_fill(~mask, float("-inf"))


def _why_plain(query: Tensor, dropout: float, sinks: Tensor | None, visible: Tensor | None = None) -> str | None:
    if dropout > 0:
        return "dropout"
    if query.dtype not in _FLOATING:
        return f"dtype {query.dtype}"
    if overrides_torch(query):
        return f"a {type(query).__name__}"
    if sinks is not None and not query.is_cpu:
        return f"sinks on {query.device.type}"
    if sinks is not None and visible is not None and visible.requires_grad and torch.is_grad_enabled():
        return "a mask that requires a gradient"
    return None


def _plain(reason: str, query, key, value, mask: Mask, dropout, scaling, softcap, sinks) -> Tensor:
    backend.count_fallback("attention", reason)
    visible = dense(mask, query.shape[2], key.shape[2], query.device)
    if not softcap and sinks is None:
        gqa = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, dropout_p=dropout, scale=scaling, enable_gqa=gqa
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if visible is not None:
        scores = _add_bias(scores, visible)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).expand(scores.shape[:3])[..., None]], -1)
    weights = scores.softmax(-1, torch.float32).to(query.dtype)[..., : key.shape[2]]
    return F.dropout(weights, dropout) @ value


def _with_sinks(query, key, value, mask: Mask, scaling, softcap, sinks) -> Tensor:
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    visible = mask.visible
    left = mask.window - 1 if mask.window else None
    right = 0 if mask.causal else None
    query, key, value = autocast(query, key, value)
    return _attention_with_sinks(query, key, value, sinks, visible, left, right, scale, float(softcap or 0.0))[0]


# Attention whose softmax has one more score s, without a value; `sinks` broadcasts to [B, Hq, Tq].
#
# With lse' = log(exp(lse) + exp(s)) the weights are exp(score - lse'): the output is out * exp(lse - lse'), and the
# kernel's backward pass, which recomputes weights from lse, is exact when handed lse' and that output. The sink's own
# weight exp(s - lse') has gradient -sum(weight * (grad . out)).


def _forward(q, k, v, sinks, mask, left, right, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """The output and lse'."""
    out, lse = torch.ops.llmfast.attention_forward(q, k, v, mask, left, right, scale, softcap)
    total = torch.logaddexp(lse, sinks.float())
    return out * (lse - total).exp()[..., None].to(out.dtype), total


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, sinks, mask, *ctx.options = inputs
    out, total = output
    ctx.mark_non_differentiable(total)
    ctx.save_for_backward(q, k, v, out, total, sinks, mask)


def _gradient(ctx, grad, _):
    q, k, v, out, total, sinks, mask = ctx.saved_tensors
    d_q, d_k, d_v = attention_backward(grad, q, k, v, out, total, mask, *ctx.options)
    d_sinks = None
    if ctx.needs_input_grad[3]:
        weight = (sinks.float() - total).exp()
        d_sinks = -(weight * (grad.float() * out.float()).sum(-1)).sum_to_size(sinks.shape).to(sinks.dtype)
    return d_q, d_k, d_v, d_sinks, None, None, None, None, None


_attention_with_sinks = NativeOp(
    "attention_with_sinks(Tensor q, Tensor k, Tensor v, Tensor sinks, Tensor? mask, SymInt? left, SymInt? right,"
    " float scale, float softcap) -> (Tensor, Tensor)",
    _forward,
    _forward,
    _setup_context,
    _gradient,
    devices=("CPU",),
)
register_flop_formula(torch.ops.llmfast.attention_with_sinks)(attention_flops)
