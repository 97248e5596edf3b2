"""``embedding``: token (and position) embedding lookup in one pass, with a deterministic gradient."""

from __future__ import annotations

import torch
from torch.overrides import handle_torch_function

from llmfast import backend, reference
from llmfast.ops._native_op import (
    NativeOp,
    check_dtype,
    check_floating,
    check_shape,
    check_tensor,
    dense,
    eager_function,
    stands_for_tensor,
    whole_calls,
)

__all__ = ["embedding"]


def embedding(
    input_ids: torch.Tensor,
    weight: torch.Tensor,
    position_weight: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``weight[input_ids] + position_weight[position_ids]``, added in float32 and rounded once.

    Args:
        input_ids: ``[..., T]``, int64 or int32, any strides.
        weight: ``[V, C]``, float32, bfloat16 or float16; rows that are not contiguous are copied.
        position_weight: ``[P, C]``, dtype of `weight`, or None for no positions.
        position_ids: int64 or int32, broadcastable to the shape of `input_ids`; default 0 .. T-1 along the last
            dimension.
        out_dtype: dtype of the result; default that of `weight`.

    Returns:
        ``[..., T, C]``, contiguous. The gradients of both weights are dense, summed in float32 in the order of the ids
        (bitwise the same for any number of threads) and rounded once.

    Autocast casts nothing here.

    Raises:
        ValueError: an id is out of range (its value and position are named, before any memory is touched), or a shape
        or device does not fit. TypeError: a dtype is unsupported. On a GPU, where finding out about ids would mean to
        wait for the device, one out of range gives a row of NaN and no gradient.

    Example:
        >>> llmfast.embedding(torch.tensor([[1, 2]]), torch.randn(10, 4), torch.randn(8, 4)).shape
        torch.Size([1, 2, 4])
    """
    if native := whole_calls(weight):
        out = native.embedding(input_ids, weight, position_weight, position_ids, out_dtype, torch.is_grad_enabled())
        if out is not None:
            if type(out) is not list:
                return out
            if position_ids is not None:
                position_ids = position_ids.expand(input_ids.shape)
            return _differentiable(input_ids, weight, position_weight, position_ids, out_dtype, out)
    if stands_for_tensor(*(tensors := (input_ids, weight, position_weight, position_ids))):
        return handle_torch_function(embedding, tensors, *tensors, out_dtype=out_dtype)
    _check(input_ids, weight, position_weight, position_ids, out_dtype)
    if position_ids is not None:
        position_ids = position_ids.expand(input_ids.shape)
    if not weight.is_cpu and (reason := backend.why_not_native(weight.device)):
        backend.count_fallback("embedding", reason)
        return reference.embedding(input_ids, weight, position_weight, position_ids, out_dtype=out_dtype)
    return _embedding(input_ids, weight, position_weight, position_ids, out_dtype)


def _check_ids(name: str, ids: torch.Tensor, weight: torch.Tensor) -> None:
    check_tensor(name, ids)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: got dtype {ids.dtype}, expected int64 or int32")
    if ids.device != weight.device:
        raise ValueError(f"{name}: got a tensor on {ids.device}, expected {weight.device} as weight is")


def _check(input_ids, weight, position_weight, position_ids, out_dtype) -> None:
    check_floating("weight", weight)
    check_shape("weight", weight, ("V", "C"))
    _check_ids("input_ids", input_ids, weight)
    if position_weight is None:
        if position_ids is not None:
            raise ValueError("position_ids: got a tensor, expected None without position_weight")
    else:
        check_dtype("position_weight", position_weight, "weight", weight)
        check_shape("position_weight", position_weight, ("P", weight.shape[1]))
        if position_ids is None:
            T = input_ids.shape[-1] if input_ids.dim() else 1
            if position_weight.shape[0] < T:
                shape = tuple(position_weight.shape)
                raise ValueError(f"position_weight: got shape {shape}, expected at least {T} rows, one per position")
        else:
            _check_ids("position_ids", position_ids, weight)
            _check_broadcast(position_ids.shape, input_ids.shape)
    if out_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"out_dtype: got {out_dtype}, expected float32, bfloat16 or float16")


def _check_broadcast(shape: torch.Size, target: torch.Size) -> None:
    if len(shape) > len(target) or any(s != 1 and s != t for s, t in zip(reversed(shape), reversed(target))):
        raise ValueError(f"position_ids: got shape {tuple(shape)}, expected one that broadcasts to {tuple(target)}")


def _contiguous_rows(t: torch.Tensor | None) -> torch.Tensor | None:
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] <= 1 else dense(t)


def _ids(t: torch.Tensor | None) -> torch.Tensor | None:
    """As the kernels take them: one to five dimensions."""
    if t is None or 1 <= t.dim() <= 5:
        return t
    return t.reshape(-1, t.shape[-1]) if t.dim() else t.view(1)


def _output(input_ids, weight, position_weight, position_ids, out_dtype: torch.dtype | None) -> torch.Tensor:
    return weight.new_empty((*input_ids.shape, weight.shape[1]), dtype=out_dtype)


def _forward(input_ids, weight, position_weight, position_ids, out_dtype: torch.dtype | None) -> torch.Tensor:
    out = _output(input_ids, weight, position_weight, position_ids, out_dtype)
    ids = _ids(input_ids)
    backend.native_for(weight).embedding_forward(
        out.view(*ids.shape, weight.shape[1]),
        ids,
        _contiguous_rows(weight),
        _contiguous_rows(position_weight),
        _ids(position_ids),
    )
    return out


def _grad_output(grad: torch.Tensor, ids: torch.Tensor | None, V: int, dtype: torch.dtype) -> torch.Tensor:
    return grad.new_empty((V, grad.shape[-1]), dtype=dtype)


def _backward(grad: torch.Tensor, ids: torch.Tensor | None, V: int, dtype: torch.dtype) -> torch.Tensor:
    """Gradient of a table [V, C]; without ids, of the rows 0 .. T-1 for each sequence of grad."""
    grad_weight = _grad_output(grad, ids, V, dtype)
    grad, ids = _matching(grad, ids)
    native = backend.native_for(grad)
    sort = native.wants_sorted_ids and ids is not None
    values, order = torch.sort(ids.reshape(-1), stable=True) if sort else (None, None)
    native.embedding_backward(grad_weight, grad, ids, values, order)
    return grad_weight


def _matching(grad: torch.Tensor, ids: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As the kernels take them: at most six dimensions, contiguous rows."""
    C = grad.shape[-1]
    if ids is not None and ids.dim() != grad.dim() - 1:
        raise ValueError(f"ids: got shape {tuple(ids.shape)} for a gradient of shape {tuple(grad.shape)}")
    if ids is not None:
        ids = _ids(ids)
        grad = grad.reshape(*ids.shape, C)
    elif not 2 <= grad.dim() <= 6:
        grad = grad.reshape(-1, grad.shape[-2] if grad.dim() > 1 else 1, C)
    return _contiguous_rows(grad), ids


def _setup_context(ctx, inputs, output) -> None:
    input_ids, weight, position_weight, position_ids, _ = inputs
    ctx.save_for_backward(input_ids, position_ids)
    ctx.V = weight.shape[0]
    ctx.P = 0 if position_weight is None else position_weight.shape[0]
    ctx.dtype = weight.dtype


def _gradient(ctx, grad):
    return _gradients(ctx, ctx.saved_tensors, grad)


def _gradients(ctx, saved, grad):
    input_ids, position_ids = saved
    need_weight, need_position = ctx.needs_input_grad[1:3]
    return (
        None,
        _embedding_backward(grad, input_ids, ctx.V, ctx.dtype) if need_weight else None,
        _embedding_backward(grad, position_ids, ctx.P, ctx.dtype) if need_position else None,
        None,
        None,
    )


def _keep(ctx, *args):
    _setup_context(ctx, args[:-1], None)
    return args[-1][0]


def _eager_gradient(ctx, saved, grad):
    native = backend.native_for(grad).embedding_gradient
    input_ids, position_ids = saved
    need_weight, need_position = ctx.needs_input_grad[1:3]
    grad_weight = grad_position = None
    if need_weight and (grad_weight := native(grad, input_ids, ctx.V, ctx.dtype)) is None:
        return None
    if need_position and (grad_position := native(grad, position_ids, ctx.P, ctx.dtype)) is None:
        return None
    return None, grad_weight, grad_position, None, None, None


def _eager_gradient_by_ops(ctx, saved, grad):
    return *_gradients(ctx, saved, grad), None


_differentiable = eager_function("embedding", _keep, _eager_gradient, _eager_gradient_by_ops)

_embedding_backward = NativeOp(
    "embedding_backward(Tensor grad, Tensor? ids, SymInt V, ScalarType dtype) -> Tensor",
    _backward,
    _grad_output,
)
_embedding = NativeOp(
    "embedding(Tensor input_ids, Tensor weight, Tensor? position_weight, Tensor? position_ids, ScalarType? out_dtype)"
    " -> Tensor",
    _forward,
    _output,
    _setup_context,
    _gradient,
)
