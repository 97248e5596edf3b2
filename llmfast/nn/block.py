"""A transformer block as one node of the autograd graph: the kernels that its modules call, in one native call.

A fifth of a small model's training step, and more of a decoding step, is the cost of calling: each op checks its
arguments, allocates, and makes a graph node. Here a block is one native call (csrc/block), the gradients of queries, keys
and values land in the one tensor that the projection's backward pass reads (no concatenation), and the stream's gradient
is summed where a norm passes over it anyway. The kernels and their order are those of the modules.

`fused_block` declines whatever could tell the difference (hooks, replaced or parametrised modules, `torch.compile`,
autocast, dispatch modes, other devices); the modules then run one by one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from llmfast import backend
from llmfast.nn.attention import KVCache, SelfAttention
from llmfast.nn.layers import FFN, AddLayerNorm, AddRMSNorm, Linear
from llmfast.ops._native_op import _plain_eager, first_derivative
from llmfast.ops.attention import broadcasts
from llmfast.ops.ffn import ACTIVATIONS

__all__ = ["fused_block"]

_NORMS = (AddLayerNorm, AddRMSNorm)
_MASKS = (torch.bool, torch.float32, torch.bfloat16, torch.float16)


class Weights(NamedTuple):
    """A block's parameters in the order in which data meets them; None where the block has none."""

    norm1: Tensor
    norm1_bias: Tensor | None
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    norm2: Tensor
    norm2_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    gate: Tensor | None
    down: Tensor
    down_bias: Tensor | None


def fused_block(
    block: nn.Module,
    x: Tensor,
    stream: Tensor | None,
    rotary: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    cache: KVCache | None,
) -> tuple[Tensor, Tensor] | None:
    """``block(x, stream, ...)`` in one node, or None where its modules have to be called one by one.

    `block` has the submodules attention_norm, attention, ffn_norm and ffn, as `llmfast.models.Block` has; see there for
    the arguments, ``[B, T, C]``.
    """
    if torch.compiler.is_compiling() or not x.is_cpu or torch.is_autocast_enabled("cpu") or _has_any_global_hook():
        return None
    if cache is not None and type(cache) is not KVCache:
        return None
    weights = _weights(block)
    if weights is None or x.numel() == 0 or not x.is_contiguous():
        return None
    cos, sin = rotary or (None, None)
    if not _plain_eager((x, stream, cos, sin, mask, *weights)):
        return None
    dtype, differentiable = weights.qkv.dtype, False
    for tensor in weights:
        if tensor is not None:
            if tensor.dtype != dtype:
                return None
            differentiable = differentiable or tensor.requires_grad
    for tensor in (x, stream, cos, sin, mask):
        differentiable = differentiable or (tensor is not None and tensor.requires_grad)
    differentiable = differentiable and torch.is_grad_enabled()
    if differentiable and (cache is not None or (mask is not None and mask.requires_grad)):
        return None
    B, T, _ = x.shape
    cached = 0 if cache is None else cache.length
    if mask is not None:
        full = (B, block.attention.heads, T, cached + T)
        if mask.dim() > 4 or mask.dtype not in _MASKS or not broadcasts(mask.shape, full):
            return None  # the op says what is wrong with it
        mask = mask.expand(full)
    extras = (cos, sin, mask, cu_seqlens)
    if differentiable:
        return _BlockFunction.apply(_settings(block), extras, x, stream, *weights)
    out = torch.empty_like(x) if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
    stream_out = torch.empty_like(x if stream is None else stream)
    k = v = None
    if cache is not None:
        attention = block._modules["attention"]
        k, v = cache.reserve(B, attention.kv_heads, T, attention.head_dim, out)
    backend.native().block_forward(_settings(block), weights, (x, stream, *extras, k, v), cached, out, stream_out, None)
    if cache is not None:
        cache.length += T
    return out, stream_out


def _weights(block: nn.Module) -> Weights | None:
    """The parameters, if every submodule is of the class that we know and nobody hooked into it."""
    modules = block._modules
    norm1, attention, norm2, ffn = (modules[n] for n in ("attention_norm", "attention", "ffn_norm", "ffn"))
    if type(norm1) not in _NORMS or type(norm2) is not type(norm1):
        return None
    if type(attention) is not SelfAttention or type(ffn) is not FFN:
        return None
    q_norm, k_norm = attention._modules.get("q_norm"), attention._modules.get("k_norm")
    normed = q_norm is not None or k_norm is not None
    if normed and not (type(q_norm) is type(k_norm) is AddRMSNorm and q_norm.eps == k_norm.eps):
        return None
    qkv, out, up, down, gate = linears = (
        attention._modules["qkv"],
        attention._modules["out"],
        ffn._modules["up"],
        ffn._modules["down"],
        ffn._modules.get("gate"),
    )
    for linear in linears:
        if linear is not None and type(linear) is not Linear:
            return None
    for m in (norm1, attention, q_norm, k_norm, norm2, ffn, *linears):
        if m is not None and (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks):
            return None
    n1, n2, q, o, u, d = (m._parameters for m in (norm1, norm2, qkv, out, up, down))
    return Weights(
        n1["weight"], n1.get("bias"), q["weight"], q["bias"],
        None if q_norm is None else q_norm._parameters["weight"],
        None if k_norm is None else k_norm._parameters["weight"],
        o["weight"], o["bias"],
        n2["weight"], n2.get("bias"), u["weight"], u["bias"], None if gate is None else gate._parameters["weight"],
        d["weight"], d["bias"],
    )  # fmt: skip


def _settings(block: nn.Module):
    """The native description of all in `block` that is not a tensor, made again only when that changes."""
    modules = block._modules
    attention, norm1, norm2 = modules["attention"], modules["attention_norm"], modules["ffn_norm"]
    description = (
        attention.heads,
        attention.kv_heads,
        attention.head_dim,
        None if attention.window is None else attention.window - 1,
        type(norm1) is AddLayerNorm,
        norm1.eps,
        norm2.eps,
        0.0 if attention._modules.get("q_norm") is None else attention._modules["q_norm"].eps,
        attention.head_dim**-0.5,
        ACTIVATIONS.index(modules["ffn"].activation),
    )
    made = block.__dict__.get("_native_settings")
    if made is None or made[0] != description:
        made = block.__dict__["_native_settings"] = description, backend.native().BlockSettings(*description)
    return made[1]


class _BlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, extras, x: Tensor, stream: Tensor | None, *weights: Tensor | None):
        native = backend.native()
        inputs = (x, stream, *extras, None, None)
        saved = torch.empty(native.block_saved_bytes(settings, weights, inputs) // 4, dtype=torch.float32)
        out = x.new_empty(x.shape, dtype=weights[2].dtype)
        stream_out = torch.empty_like(x if stream is None else stream)
        native.block_forward(settings, weights, inputs, 0, out, stream_out, saved)
        ctx.settings, ctx.first = settings, stream is None
        ctx.save_for_backward(x, *extras, stream_out, saved, *weights)
        return out, stream_out

    @staticmethod
    @first_derivative
    def backward(ctx, d_out: Tensor, d_stream_out: Tensor):
        x, cos, sin, mask, cu_seqlens, stream_out, saved, *weights = ctx.saved_tensors
        needs = ctx.needs_input_grad[4:]
        d_weights = tuple(torch.empty_like(w) if need else None for w, need in zip(weights, needs))
        d_stream = torch.empty_like(stream_out)
        narrow = x.dtype != stream_out.dtype
        d_x = torch.empty_like(x) if narrow else None
        # stream_out stands for the incoming stream, of which only the shape and dtype still matter
        inputs = (x, None if ctx.first else stream_out, cos, sin, mask, cu_seqlens, None, None)
        backend.native().block_backward(
            ctx.settings,
            tuple(weights),
            inputs,
            stream_out,
            saved,
            d_out.contiguous(),
            d_stream_out.contiguous(),
            d_x,
            d_stream,
            d_weights,
        )
        return None, None, d_x if narrow else d_stream, None if ctx.first else d_stream, *d_weights
