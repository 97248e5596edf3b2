"""A transformer block as one node of the autograd graph: the kernels that its modules call, in one native call.

A fifth of a small model's training step, and more of a decoding step, is the cost of calling: each op checks its
arguments, allocates, and makes a graph node. Here a block is one native call (csrc/block), the gradients of queries, keys
and values land in the one tensor that the projection's backward pass reads (no concatenation), and the stream's gradient
is summed where a norm passes over it anyway. The kernels and their order are those of the modules.

Without gradients, `fused_stack` does so for all blocks of a model: beside weights that stream through the caches, what
Python touches for a block comes from memory each time, and cost a fifth of a small model's token.

Both decline whatever could tell the difference (hooks, replaced or parametrised modules, `torch.compile`, autocast,
dispatch modes, other devices); the modules then run one by one. What they found out about a block they keep, with a list of
all that it depends on, which native code compares at every call. Parameters that were replaced live until the next one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.flop_counter import register_flop_formula

from llmfast import backend
from llmfast.nn._fallback import HOOKS, is_hooked
from llmfast.nn.attention import KVCache, SelfAttention
from llmfast.nn.layers import FFN, AddLayerNorm, AddRMSNorm, Linear
from llmfast.ops._flops import ffn_backward as ffn_backward_flops
from llmfast.ops._native_op import NativeOp, _plain_eager, any_lazy, first_derivative
from llmfast.ops.attention import broadcasts
from llmfast.ops.ffn import ACTIVATIONS

__all__ = ["fused_block", "fused_stack", "without_plan"]

_NORMS = (AddLayerNorm, AddRMSNorm)
_MASKS = (torch.bool, torch.float32, torch.bfloat16, torch.float16)
_SETTINGS = ("heads", "kv_heads", "head_dim", "window", "eps", "activation")  # attributes, of modules that have them


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


class Plan(NamedTuple):
    """What native code has to know of a block, valid while `watch` holds (see `_watch`)."""

    settings: object  # BlockSettings
    weights: Weights
    watch: tuple
    heads: int
    kv_heads: int
    head_dim: int
    arguments: tuple  # what `settings` was made of


class StackPlan(NamedTuple):
    """The same of all blocks of a model."""

    blocks: tuple[Plan, ...]
    watch: tuple


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
    if not _plain_input(x) or (cache is not None and type(cache) is not KVCache):
        return None
    plan = _block_plan(block)
    cos, sin = rotary or (None, None)
    if plan is None or not _plain_eager((x, stream, cos, sin, mask)):
        return None
    weights = plan.weights
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
    if mask is not None and (mask := _expanded(mask, (B, plan.heads, T, cached + T))) is None:
        return None
    extras = (cos, sin, mask, cu_seqlens)
    if differentiable:
        return _BlockFunction.apply(plan, extras, x, stream, *weights)
    out = torch.empty_like(x) if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
    stream_out = torch.empty_like(x if stream is None else stream)
    k = v = None
    if cache is not None:
        k, v = cache.reserve(B, plan.kv_heads, T, plan.head_dim, out)
    backend.native().block_forward(plan.settings, weights, (x, stream, *extras, k, v), cached, out, stream_out, None)
    if cache is not None:
        cache.length += T
    return out, stream_out


def fused_stack(
    model: nn.Module,
    kind: type,
    x: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    caches: list[KVCache] | None,
) -> tuple[Tensor, Tensor] | None:
    """`fused_block` of all of ``model.blocks``, one after the other, without gradients: what the last one returns.

    None where a block is not exactly a `kind`, or has to be called by itself for another reason.
    """
    if not _plain_input(x):
        return None
    if torch.is_grad_enabled():  # what the plan keeps alive may have been replaced, and training asks nobody about it
        model.__dict__.pop("_plan", None)
        return None
    plan = _stack_plan(model, kind)
    cos, sin = rotary or (None, None)
    if plan is None or not _plain_eager((x, cos, sin, mask)):
        return None
    B, T, _ = x.shape
    cached = caches[0].length if caches else 0
    if caches is not None and not (
        len(caches) == len(plan.blocks) and all(type(c) is KVCache and c.length == cached for c in caches)
    ):
        return None
    if mask is not None:
        heads = plan.blocks[0].heads
        mask = _expanded(mask, (B, heads, T, cached + T)) if all(b.heads == heads for b in plan.blocks) else None
        if mask is None:
            return None
    dtype = plan.blocks[0].weights.qkv.dtype
    out, stream_out = torch.empty_like(x, dtype=dtype), torch.empty_like(x)
    buffers = ()
    if caches is not None:
        buffers = tuple(c.reserve(B, b.kv_heads, T, b.head_dim, out) for c, b in zip(caches, plan.blocks))
    extras = (cos, sin, mask, cu_seqlens)
    if not backend.native().blocks_forward(plan.blocks, x, extras, buffers, cached, out, stream_out):
        return None
    for cache in caches or ():
        cache.length += T
    return out, stream_out


def without_plan(state: dict) -> dict:
    """A module's ``__dict__`` without what is kept here, for copies and pickles: it can be made again."""
    return {name: value for name, value in state.items() if name != "_plan"}


def _plain_input(x: Tensor) -> bool:
    """Whether x and the state that torch is in allow a native call."""
    return not (
        torch.compiler.is_compiling()
        or not x.is_cpu
        or torch.is_autocast_enabled("cpu")
        or _has_any_global_hook()
        or x.numel() == 0
        or not x.is_contiguous()
    )


def _expanded(mask: Tensor, shape: tuple[int, int, int, int]) -> Tensor | None:
    """None: the op says what is wrong with it."""
    if mask.dim() > 4 or mask.dtype not in _MASKS or not broadcasts(mask.shape, shape):
        return None
    return mask.expand(shape)


def _block_plan(block: nn.Module) -> Plan | None:
    """The plan kept in `block`, made anew where something in it has changed; None: its modules have to be called."""
    plan = block.__dict__.get("_plan")
    if plan is None or not backend.native().unchanged(plan.watch):
        plan = block.__dict__["_plan"] = _make_plan(block)
    return plan


def _stack_plan(model: nn.Module, kind: type) -> StackPlan | None:
    plan = model.__dict__.get("_plan")
    if plan is not None:
        if backend.native().unchanged(plan.watch):
            return plan
        del plan, model.__dict__["_plan"]
    blocks = model.blocks
    if not blocks or any(type(block) is not kind or is_hooked(block) for block in blocks):
        return None
    found = [_block_plan(block) for block in blocks]
    if None in found:
        return None
    watch = (model._modules, "blocks", blocks, *_watch([blocks, *blocks]))
    for plan in found:
        watch += plan.watch
    plan = model.__dict__["_plan"] = StackPlan(tuple(found), watch)
    return plan


def _watch(modules: list[nn.Module]) -> tuple:
    """All that a plan of these modules depends on, for ``native.unchanged``: a flat tuple of (dict, key, its value),
    (dict, key, ...) for a key that is not there, (dict, size, None), and (object, None, its type)."""
    found: list = []
    for module in modules:
        state = module.__dict__
        found += (module, None, type(module), state, "forward", ...)
        for hooks in HOOKS:
            found += (state[hooks], 0, None)
        for content in (module._modules, module._parameters):
            found += (content, len(content), None)
            for name, value in content.items():
                found += (content, name, value)
        for name in _SETTINGS:
            if name in state:
                found += (state, name, state[name])
    return tuple(found)


def _make_plan(block: nn.Module) -> Plan | None:
    """If every submodule is of a class that we know, nobody hooked into it, and its parameters are plain."""
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
    parts = [m for m in (norm1, attention, q_norm, k_norm, norm2, ffn, *linears) if m is not None]
    if any(is_hooked(part) for part in parts):
        return None
    n1, n2, q, o, u, d = (m._parameters for m in (norm1, norm2, qkv, out, up, down))
    weights = Weights(
        n1["weight"], n1.get("bias"), q["weight"], q["bias"],
        None if q_norm is None else q_norm._parameters["weight"],
        None if k_norm is None else k_norm._parameters["weight"],
        o["weight"], o["bias"],
        n2["weight"], n2.get("bias"), u["weight"], u["bias"], None if gate is None else gate._parameters["weight"],
        d["weight"], d["bias"],
    )  # fmt: skip
    if not _plain_eager(weights):
        return None
    arguments = (
        attention.heads,
        attention.kv_heads,
        attention.head_dim,
        None if attention.window is None else attention.window - 1,
        type(norm1) is AddLayerNorm,
        norm1.eps,
        norm2.eps,
        0.0 if q_norm is None else q_norm.eps,
        attention.head_dim**-0.5,
        ACTIVATIONS.index(ffn.activation),
    )
    watch = (modules, len(modules), None)
    for name in ("attention_norm", "attention", "ffn_norm", "ffn"):
        watch += (modules, name, modules[name])
    settings = backend.native().BlockSettings(*arguments)
    return Plan(settings, weights, watch + _watch(parts), *arguments[:3], arguments)


class _BlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: Plan, extras, x: Tensor, stream: Tensor | None, *weights: Tensor | None):
        native = backend.native()
        inputs = (x, stream, *extras, None, None)
        saved = torch.empty(native.block_saved_bytes(plan.settings, weights, inputs) // 4, dtype=torch.float32)
        out = x.new_empty(x.shape, dtype=weights[2].dtype)
        stream_out = torch.empty_like(x if stream is None else stream)
        native.block_forward(plan.settings, weights, inputs, 0, out, stream_out, saved)
        ctx.settings, ctx.arguments, ctx.first = plan.settings, plan.arguments, stream is None
        ctx.save_for_backward(x, *extras, stream_out, saved, *weights)
        return out, stream_out

    @staticmethod
    @first_derivative
    def backward(ctx, d_out: Tensor, d_stream_out: Tensor):
        x, cos, sin, mask, cu_seqlens, stream_out, saved, *weights = ctx.saved_tensors
        needs = ctx.needs_input_grad[4:]
        arrived = (d_out, d_stream_out, x, stream_out, saved)
        tensors = (*arrived, cos, sin, mask, cu_seqlens)
        if _plain_eager(arrived) and not any_lazy(arrived):
            d_x, d_stream, *d_weights = _native_backward(ctx.settings, *tensors, weights, needs, ctx.first)
        else:
            d_x, d_stream, *d_weights = _block_backward(*tensors, *weights, needs, ctx.first, *ctx.arguments)
            d_weights = (d if need else None for d, need in zip(d_weights, needs))
        narrow = x.dtype != stream_out.dtype
        return None, None, d_x if narrow else d_stream, None if ctx.first else d_stream, *d_weights


def _native_backward(
    settings, d_out, d_stream_out, x, stream_out, saved, cos, sin, mask, cu_seqlens, weights, needs, first
) -> tuple[Tensor | None, ...]:
    """Gradients of x, where its dtype is not the stream's, of the stream, and of the weights that need one."""
    x, stream_out, saved = (t.contiguous() for t in (x, stream_out, saved))  # hooks may hand back other strides
    d_x = torch.empty_like(x) if x.dtype != stream_out.dtype else None
    d_stream = torch.empty_like(stream_out)
    d_weights = tuple(torch.empty_like(w) if need else None for w, need in zip(weights, needs))
    # stream_out stands for the incoming stream, of which only the shape and dtype still matter
    inputs = (x, None if first else stream_out, cos, sin, mask, cu_seqlens, None, None)
    of_out, of_stream_out = d_out.contiguous(), d_stream_out.contiguous()
    backend.native().block_backward(
        settings, tuple(weights), inputs, stream_out, saved, of_out, of_stream_out, d_x, d_stream, d_weights
    )
    return d_x, d_stream, *d_weights


# The same as an op, for what hands it other tensors than those of memory; empty ones stand for None.


def _backward(*args) -> tuple[Tensor, ...]:
    tensors, weights = args[:9], args[9 : 9 + len(Weights._fields)]
    needs, first, *arguments = args[9 + len(Weights._fields) :]
    settings = backend.native().BlockSettings(*arguments)
    grads = _native_backward(settings, *tensors, weights, needs, first)
    return tuple(args[0].new_empty(0) if grad is None else grad for grad in grads)


def _gradients(d_out, d_stream_out, x, stream_out, saved, cos, sin, mask, cu_seqlens, *others):
    """What `_backward` returns, on shapes alone."""
    *weights, needs = others[: len(Weights._fields) + 1]
    return (
        torch.empty_like(x) if x.dtype != stream_out.dtype else x.new_empty(0),
        torch.empty_like(stream_out),
        *(torch.empty_like(w) if need else x.new_empty(0) for w, need in zip(weights, needs)),
    )


_block_backward = NativeOp(
    "block_backward(Tensor d_out, Tensor d_stream_out, Tensor x, Tensor stream_out, Tensor saved, Tensor? cos,"
    f" Tensor? sin, Tensor? mask, Tensor? cu_seqlens, {', '.join(f'Tensor? {name}' for name in Weights._fields)},"
    " bool[] needs, bool first, int heads, int kv_heads, int head_dim, int? left, bool centred, float eps1, float eps2,"
    f" float eps_qk, float scale, int activation) -> ({', '.join(['Tensor'] * (2 + len(Weights._fields)))})",
    _backward,
    _gradients,
    devices=("CPU",),
)


@register_flop_formula(torch.ops.llmfast.block_backward, get_raw=True)
def _flops_of_backward(d_out, d_stream_out, x, stream_out, saved, cos, sin, mask, cu_seqlens, *others, **_) -> int:
    """As many as its modules' ops have."""
    count = len(Weights._fields)
    weights, needs = Weights(*others[:count]), Weights(*others[count])
    heads, head_dim = others[count + 2], others[count + 4]
    B, T, _ = x.shape
    products = weights.qkv.numel() * (1 + needs.qkv) + weights.out.numel() * (1 + needs.out)
    inner = needs.up, needs.up_bias, needs.gate, needs.down, needs.down_bias
    ffn = ffn_backward_flops(d_out.shape, x.shape, weights.up.shape, weights.gate, None, None, None, 0, [True, *inner])
    squares = B * T * T if cu_seqlens is None else int(cu_seqlens.diff().long().square().sum())
    return 2 * B * T * products + ffn + 2 * 5 * heads * head_dim * squares
