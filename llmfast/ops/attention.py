"""``attention``: masked attention over dense batches or packed sequences; nothing of size Tq x Tk is ever stored.

One file above 500 lines: dense, packed, CPU and GPU calls share their checks and what they save.
"""

from __future__ import annotations

import math

import torch
from torch.overrides import handle_torch_function

from llmfast import backend, reference
from llmfast.ops._native_op import (
    NativeOp,
    any_lazy,
    autocast,
    check_dtype,
    check_floating,
    check_shape,
    check_tensor,
    dense,
    eager_function,
    stands_for_tensor,
    whole_calls,
)

__all__ = ["attention", "varlen_attention"]

_FLOATING = (torch.float32, torch.bfloat16, torch.float16)
_FAR = 1 << 62  # a distance that no sequence reaches
_MOST_CUDA_HEAD_DIM = 256

Window = int | tuple[int, int] | None


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
    window: Window = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Softmax attention: ``out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j]`` over the keys that query i sees.

    Query head h reads key/value head ``h // (Hq / Hkv)``. With Tq != Tk the queries are the last ones: query i stands
    at position ``i + Tk - Tq``.

    Args:
        q: ``[B, Hq, Tq, D]``, float32, bfloat16 or float16. Any strides; a last dimension whose stride is not 1 costs a
            copy, counted in ``llmfast.backend.info()``.
        k: ``[B, Hkv, Tk, D]``, dtype of `q`; Hq is a multiple of Hkv.
        v: ``[B, Hkv, Tk, Dv]``, dtype of `q`.
        causal: a query sees no key after its own position.
        mask: broadcastable to ``[B, Hq, Tq, Tk]`` (read by stride, never expanded in memory). Boolean: True where a
            query may look. Floating: added to the scores, -inf hides.
        window: ``w``: a query sees itself and the w - 1 keys before it. ``(left, right)``: that many keys before and
            after its position, and itself; -1 for no limit.
        scale: factor of the scores; default ``1 / sqrt(D)``.
        softcap: c > 0 turns scores s into ``c * tanh(s / c)``, before masks.

    Returns:
        ``[B, Hq, Tq, Dv]``, dtype of `q`. Its memory has the order of q's: where q is a transposed ``[B, Tq, Hq, D]``,
        ``out.transpose(1, 2).flatten(2)`` is a view.

    A query that sees nothing gives zeros, and so do its gradients. What a hidden key or value holds, NaN included, does
    not matter. A floating mask that requires a gradient runs in plain torch (counted). Under autocast, q, k and v are
    cast to its dtype.

    Raises:
        TypeError: a dtype is unsupported or differs from q's. ValueError: a shape, device, window or softcap does not
        fit.

    Example:
        >>> q, k, v = torch.randn(3, 2, 8, 16, 64)
        >>> llmfast.attention(q, k, v, causal=True).shape
        torch.Size([2, 8, 16, 64])
    """
    if native := whole_calls(q):
        out = native.attention(q, k, v, mask, causal, window, scale, softcap, torch.is_grad_enabled())
        if out is not None:
            return _differentiable(q, k, v, mask, out) if type(out) is list else out
    if stands_for_tensor(q, k, v, mask):
        options = {"causal": causal, "mask": mask, "window": window, "scale": scale, "softcap": softcap}
        return handle_torch_function(attention, (q, k, v, mask), q, k, v, **options)
    q, k, v = _checked(q, k, v, 4)
    _check_mask(mask, q, k)
    left, right = _band(causal, window)
    scale, softcap = _score_options(q, scale, softcap)
    reason = _why_not_native(q, v, mask)
    if reason:
        backend.count_fallback("attention", reason)
        return reference.attention(
            q, k, v, causal=causal, mask=mask, window=window, scale=scale, softcap=softcap if softcap else None
        )
    return _attention(q, k, v, mask, left, right, scale, softcap)[0]


def packed_attention(qkv: torch.Tensor, heads: int, *, causal: bool = False, window: Window = None) -> torch.Tensor:
    """`attention` of a projection's queries, keys and values, whose gradient comes as one tensor, too: its parts are
    written where they belong instead of being put together afterwards.

    Args:
        qkv: ``[B, T, heads + 2 Hkv, D]``: queries, keys, values. causal, window: as in `attention`.

    Returns:
        ``[B, heads, T, D]``.
    """
    if isinstance(qkv, torch.Tensor) and qkv.requires_grad and torch.is_grad_enabled() and (native := whole_calls(qkv)):
        parts = _parts_of(qkv.detach().requires_grad_(), heads)
        computed = native.attention(*parts, None, causal, window, None, None, True)
        if type(computed) is list:
            return _packed_differentiable(qkv, heads, computed)
    return attention(*_parts_of(qkv, heads), causal=causal, window=window)


def _parts_of(qkv: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kv_heads = (qkv.shape[2] - heads) // 2
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    causal: bool = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """`attention` within each of B sequences that lie one after another, without padding.

    Args:
        q: ``[total queries, Hq, D]``. k: ``[total keys, Hkv, D]``. v: ``[total keys, Hkv, Dv]``.
        cu_seqlens_q, cu_seqlens_k: ``[B + 1]``, int32 or int64: sequence s owns queries ``cu_seqlens_q[s]`` up to
            ``cu_seqlens_q[s + 1]``. They start at 0, never decrease and end at the total; lengths of 0 are fine.
        causal, window, scale, softcap: as in `attention`, for each sequence on its own.

    Returns:
        ``[total queries, Hq, Dv]``, contiguous.

    Raises:
        TypeError, ValueError: as `attention` does, and for offsets that do not fit.

    Example:
        >>> bounds = torch.tensor([0, 3, 10])
        >>> llmfast.varlen_attention(*torch.randn(3, 10, 8, 64), bounds, bounds, causal=True).shape
        torch.Size([10, 8, 64])
    """
    if native := whole_calls(q):
        out = native.varlen_attention(
            q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window, scale, softcap, torch.is_grad_enabled()
        )
        if out is not None:
            return _varlen_differentiable(q, k, v, cu_seqlens_q, cu_seqlens_k, out) if type(out) is list else out
    if stands_for_tensor(*(tensors := (q, k, v, cu_seqlens_q, cu_seqlens_k))):
        options = {"causal": causal, "window": window, "scale": scale, "softcap": softcap}
        return handle_torch_function(varlen_attention, tensors, *tensors, **options)
    q, k, v = _checked(q, k, v, 3)
    for name, bounds in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_tensor(name, bounds)
        if bounds.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: got dtype {bounds.dtype}, expected int32 or int64")
        if bounds.dim() != 1 or bounds.shape[0] < 1:
            raise ValueError(f"{name}: got shape {tuple(bounds.shape)}, expected (B + 1,)")
    check_shape("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape)
    left, right = _band(causal, window)
    scale, softcap = _score_options(q, scale, softcap)
    reason = _why_not_native(q, v, None)
    if reason:
        backend.count_fallback("varlen_attention", reason)
        return reference.varlen_attention(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            causal=causal,
            window=window,
            scale=scale,
            softcap=softcap if softcap else None,
        )
    return _varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, left, right, scale, softcap)[0]


def _why_not_native(q: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> str | None:
    reason = None if q.is_cpu else _why_not_on_device(q, v)
    if reason:
        return reason
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        return "a mask that requires a gradient"
    return None


def _why_not_on_device(q: torch.Tensor, v: torch.Tensor) -> str | None:
    if max(q.shape[-1], v.shape[-1]) > _MOST_CUDA_HEAD_DIM:
        return f"a head dim above {_MOST_CUDA_HEAD_DIM} on device {q.device.type}"
    return backend.why_not_native(q.device)


def _checked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dims: int):
    """q, k and v, cast if autocast is on. Good ones pass on a few comparisons; else `_explain` says what is wrong."""
    tensors = isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)
    if tensors and not q.is_meta and torch.is_autocast_enabled("cpu" if q.is_cpu else q.device.type):
        q, k, v = autocast(q, k, v)
    fit = tensors and q.dtype in _FLOATING and q.dtype == k.dtype == v.dtype and q.device == k.device == v.device
    fit = fit and q.layout == k.layout == v.layout == torch.strided and not (q.is_nested or k.is_nested or v.is_nested)
    if not (fit and q.dim() == k.dim() == v.dim() == dims and _shapes_fit(q.shape, k.shape, v.shape)):
        _explain(q, k, v, dims)
    return q, k, v


def _shapes_fit(q, k, v, heads: int = 1) -> bool:
    """Shapes with heads in dimension `heads`; batches are the dimensions before heads and tokens."""
    if q[-1] != k[-1] or q[-1] < 1 or v[-1] < 1 or k[:-1] != v[:-1] or (len(q) == 4 and q[0] != k[0]):
        return False
    return k[heads] > 0 and q[heads] > 0 and q[heads] % k[heads] == 0


def _explain(q, k, v, dims: int) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_floating(name, tensor)
        check_dtype(name, tensor, "q", q)
        if tensor.dim() != dims:
            layout = "[B, H, T, D]" if dims == 4 else "[T, H, D]"
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {dims} dimensions {layout}")
    if dims == 4:
        check_shape("k", k, (q.shape[0], "Hkv", "Tk", q.shape[3]))
        check_shape("v", v, (q.shape[0], k.shape[1], k.shape[2], "Dv"))
    else:
        check_shape("k", k, ("Tk", "Hkv", q.shape[2]))
        check_shape("v", v, (k.shape[0], k.shape[1], "Dv"))
    Hq, Hkv = q.shape[1], k.shape[1]
    if Hkv < 1 or Hq < 1 or Hq % Hkv:
        raise ValueError(f"q: got {Hq} heads, expected a multiple of k's {Hkv} heads, at least one")
    raise ValueError(f"q, v: got head dims {q.shape[-1]} and {v.shape[-1]}, expected at least 1")


def _check_mask(mask: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> None:
    if mask is None:
        return
    check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        if not mask.is_floating_point():
            raise TypeError(f"mask: got dtype {mask.dtype}, expected bool or a floating dtype")
        check_floating("mask", mask)
    if mask.device != q.device:
        raise ValueError(f"mask: got a tensor on {mask.device}, expected {q.device} as q is")
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if mask.dim() > 4 or not broadcasts(mask.shape, full):
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected one that broadcasts to {full}")


def broadcasts(shape, full) -> bool:
    # Not `m in (1, size)`: with a symbolic size, torch.compile traces that to False.
    return all(m == 1 or m == size for m, size in zip(reversed(shape), reversed(full)))


def _band(causal: bool, window: Window) -> tuple[int | None, int | None]:
    """How many keys before and after its position a query sees; None: no limit."""
    if window is None:
        return None, 0 if causal else None
    if isinstance(window, int) and not isinstance(window, bool):
        if window < 1:
            raise ValueError(f"window: got {window}, expected at least 1")
        left, right = None if window > _FAR else window - 1, 0
    else:
        if not (isinstance(window, tuple | list) and len(window) == 2 and all(isinstance(w, int) for w in window)):
            raise TypeError(f"window: got {window!r}, expected an int or a pair (left, right)")
        if min(window) < -1:
            raise ValueError(f"window: got {window!r}, expected distances of at least 0, or -1 for no limit")
        left, right = (None if w == -1 or w >= _FAR else w for w in window)
    return left, 0 if causal else right


def _score_options(q: torch.Tensor, scale: float | None, softcap: float | None) -> tuple[float, float]:
    if softcap is not None and not 1e-30 <= softcap <= 1e30:  # kernels divide by it, in float32
        raise ValueError(f"softcap: got {softcap}, expected a positive number from 1e-30 to 1e30, or None")
    return 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale), float(softcap or 0.0)


def _empty_like_heads(x: torch.Tensor, D: int | None = None) -> torch.Tensor:
    """An uninitialised tensor of x's shape (with last dimension D), dense, dimensions nested as x nests them."""
    if D is None:
        D = x.shape[-1]
    if x.dim() == 4 and x.stride(1) < x.stride(2):
        B, H, T, _ = x.shape
        if x.stride(1) <= x.stride(0) < x.stride(2):  # [T, B, H, D], as torch's modules have it
            return x.new_empty((T, B, H, D)).permute(1, 2, 0, 3)
        return x.new_empty((B, T, H, D)).transpose(1, 2)
    return x.new_empty((*x.shape[:-1], D))


def _unit_stride(op: str, name: str, x: torch.Tensor) -> torch.Tensor:
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        return x
    backend.count_fallback(op, f"copies {name}, whose last dimension has stride {x.stride(-1)}")
    return dense(x)


def _rows(op: str, q, k, v):
    return _unit_stride(op, "q", q), _unit_stride(op, "k", k), _unit_stride(op, "v", v)


def _rows_of_gradient(grad: torch.Tensor) -> torch.Tensor:
    """Gradients come in any layout (that of a sum has strides 0); the copy is as small as the output."""
    return grad if grad.stride(-1) == 1 or grad.shape[-1] == 1 else dense(grad)


def _full_mask(mask: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    return None if mask is None else mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


def _forward(q, k, v, mask, left, right, scale: float, softcap: float):
    out, lse = _forward_fake(q, k, v, mask, left, right, scale, softcap)
    attention_into(out, lse, q, k, v, mask, left, right, scale, softcap)
    return out, lse


def attention_into(out, lse, q, k, v, mask, left, right, scale: float, softcap: float) -> None:
    """Writes ``out [B, Hq, Tq, Dv]`` and ``lse [B, Hq, Tq]`` of any strides, out's last one 1."""
    q, k, v = _rows("attention", q, k, v)
    backend.native_for(q).attention_forward(
        out, lse, q, k, v, _full_mask(mask, q, k), None, None, left, right, scale, softcap
    )


def _forward_fake(q, k, v, mask, left, right, scale: float, softcap: float):
    return _empty_like_heads(q, v.shape[-1]), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _backward(grad, q, k, v, out, lse, mask, left, right, scale: float, softcap: float):
    grads = _backward_fake(grad, q, k, v, out, lse, mask, left, right, scale, softcap)
    attention_backward_into(*grads, grad, q, k, v, out, lse, mask, left, right, scale, softcap)
    return grads


def attention_backward_into(
    grad_q, grad_k, grad_v, grad, q, k, v, out, lse, mask, left, right, scale: float, softcap: float
) -> None:
    """Writes the gradients, shaped as q, k and v; any strides, the last one 1."""
    q, k, v = _rows("attention_backward", q, k, v)
    backend.native_for(q).attention_backward(
        grad_q,
        grad_k,
        grad_v,
        _rows_of_gradient(grad),
        _rows_of_gradient(out),
        lse,
        q,
        k,
        v,
        _full_mask(mask, q, k),
        None,
        None,
        left,
        right,
        scale,
        softcap,
    )


def _backward_fake(grad, q, k, v, out, lse, mask, left, right, scale: float, softcap: float):
    return _empty_like_heads(q), _empty_like_heads(k), _empty_like_heads(v)


def _varlen_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, left, right, scale: float, softcap: float):
    out, lse = _varlen_forward_fake(q, k, v, cu_seqlens_q, cu_seqlens_k, left, right, scale, softcap)
    q, k, v = _rows("varlen_attention", q, k, v)
    offsets = _offsets(q, cu_seqlens_q), _offsets(q, cu_seqlens_k)
    backend.native_for(q).attention_forward(out, lse, q, k, v, None, *offsets, left, right, scale, softcap)
    return out, lse


def _varlen_forward_fake(q, k, v, cu_seqlens_q, cu_seqlens_k, left, right, scale: float, softcap: float):
    T, Hq, _ = q.shape
    return q.new_empty((T, Hq, v.shape[-1])), q.new_empty((Hq, T), dtype=torch.float32)


def _varlen_backward(grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, left, right, scale: float, softcap: float):
    grads = _empty_like_heads(q), _empty_like_heads(k), _empty_like_heads(v)
    q, k, v = _rows("varlen_attention_backward", q, k, v)
    backend.native_for(q).attention_backward(
        *grads,
        _rows_of_gradient(grad),
        _rows_of_gradient(out),
        lse,
        q,
        k,
        v,
        None,
        _offsets(q, cu_seqlens_q),
        _offsets(q, cu_seqlens_k),
        left,
        right,
        scale,
        softcap,
    )
    return grads


def _varlen_backward_fake(grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, left, right, scale, softcap):
    return _empty_like_heads(q), _empty_like_heads(k), _empty_like_heads(v)


def _offsets(q: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    return cu_seqlens.to(q.device, torch.int64).contiguous()


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, mask, *ctx.options = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, mask)


def _gradient(ctx, grad, _):
    grads = attention_backward(grad, *ctx.saved_tensors, *ctx.options)
    return *_needed(ctx, grads), None, None, None, None, None


def _varlen_setup_context(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.options = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)


def _varlen_gradient(ctx, grad, _):
    grads = varlen_attention_backward(grad, *ctx.saved_tensors, *ctx.options)
    return *_needed(ctx, grads), None, None, None, None, None, None


def _needed(ctx, grads):
    return (g if need else None for g, need in zip(grads, ctx.needs_input_grad))


def _keep(ctx, q, k, v, mask, computed):
    out, lse, ctx.options = computed
    ctx.save_for_backward(q, k, v, out, lse, mask)
    return out


def _eager_gradient(ctx, saved, grad):
    return backend.native_for(grad).attention_gradient(grad, *saved, None, None, *ctx.options, ctx.needs_input_grad)


def _eager_gradient_by_ops(ctx, saved, grad):
    return *attention_backward(grad, *saved, *ctx.options), None, None


def _packed_keep(ctx, qkv, heads, computed):
    out, lse, ctx.options = computed
    ctx.heads = heads
    ctx.save_for_backward(qkv, out, lse)
    return out


def _packed_eager_gradient(ctx, saved, grad):
    qkv, out, lse = saved
    if any_lazy((grad,)):
        return None
    grads = torch.empty_like(qkv)
    attention_backward_into(
        *_parts_of(grads, ctx.heads), grad, *_parts_of(qkv, ctx.heads), out, lse, None, *ctx.options
    )
    return grads, None, None


def _packed_eager_gradient_by_ops(ctx, saved, grad):
    qkv, out, lse = saved
    grads = attention_backward(grad, *_parts_of(qkv, ctx.heads), out, lse, None, *ctx.options)
    return torch.cat([part.transpose(1, 2) for part in grads], dim=2), None, None


def _varlen_keep(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, computed):
    out, lse, ctx.options = computed
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)
    return out


def _varlen_eager_gradient(ctx, saved, grad):
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k = saved
    return backend.native_for(grad).attention_gradient(
        grad, q, k, v, out, lse, None, cu_seqlens_q, cu_seqlens_k, *ctx.options, ctx.needs_input_grad
    )


def _varlen_eager_gradient_by_ops(ctx, saved, grad):
    return *varlen_attention_backward(grad, *saved, *ctx.options), None, None, None


_differentiable = eager_function("attention", _keep, _eager_gradient, _eager_gradient_by_ops)
_packed_differentiable = eager_function(
    "packed_attention", _packed_keep, _packed_eager_gradient, _packed_eager_gradient_by_ops
)
_varlen_differentiable = eager_function(
    "varlen_attention", _varlen_keep, _varlen_eager_gradient, _varlen_eager_gradient_by_ops
)

_OPTIONS = "SymInt? left, SymInt? right, float scale, float softcap"

attention_backward = NativeOp(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? mask, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_attention = NativeOp(
    f"attention_forward(Tensor q, Tensor k, Tensor v, Tensor? mask, {_OPTIONS}) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    _setup_context,
    _gradient,
)
varlen_attention_backward = NativeOp(
    "varlen_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q, "
    f"Tensor cu_seqlens_k, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _varlen_backward,
    _varlen_backward_fake,
)
_varlen_attention = NativeOp(
    "varlen_attention_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    f"{_OPTIONS}) -> (Tensor, Tensor)",
    _varlen_forward,
    _varlen_forward_fake,
    _varlen_setup_context,
    _varlen_gradient,
)
