"""``linear_cross_entropy``: LM head and loss in one op that never materialises the logits."""

from __future__ import annotations

import torch
from torch.overrides import handle_torch_function

from llmfast import backend, reference
from llmfast.ops._native_op import (
    NativeOp,
    as_matrix,
    autocast,
    check_dtype,
    check_floating,
    check_shape,
    check_tensor,
    eager_function,
    stands_for_tensor,
    whole_calls,
)
from llmfast.ops.linear_cross_entropy_joint import is_worthwhile, linear_cross_entropy_joint

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """``cross_entropy(x @ weight.T, target)`` in O(tokens + a block of logits) extra memory.

    Logits are float32 sums that live in registers; the backward pass computes them again, a chunk of the vocabulary at
    a time. On the CPU, where a gradient is wanted and the loss is one number, both are computed in one pass over blocks
    of rows, and ``backward`` only multiplies by the upstream gradient; use ``torch.no_grad`` for a loss alone.

    Args:
        x: ``[..., C]``, float32, bfloat16 or float16, any strides.
        weight: ``[V, C]``, dtype of `x`.
        target: ``[...]`` int64, class of each row, in ``[0, V)`` or `ignore_index`.
        ignore_index: rows with this target have loss 0 and no gradient.
        reduction: ``mean`` over the rows that are not ignored (NaN if there is none, as in torch), ``sum`` or ``none``.

    Returns:
        The loss in nats, float32: a scalar, or ``[...]`` for ``none``.

    Under autocast, `x` and `weight` are cast to its dtype.

    Raises:
        TypeError: a dtype is unsupported or differs. ValueError: a shape or device does not fit, or a target is out of
        range (its position and value are named). On a GPU, whose targets the host does not see, such a target gives a
        loss of NaN instead.

    Example:
        >>> loss = llmfast.linear_cross_entropy(hidden, model.head_weight, targets)
    """
    tensors = isinstance(x, torch.Tensor) and isinstance(weight, torch.Tensor) and weight.dim() == 2
    if (native := whole_calls(x)) and not (tensors and is_worthwhile(x, weight, reduction)):
        arguments = x, weight, target, ignore_index, reduction
        loss = native.linear_cross_entropy(*arguments, torch.is_grad_enabled())
        if loss is not None:
            return _differentiable(*arguments, loss) if type(loss) is list else loss
    if stands_for_tensor(*(arguments := (x, weight, target))):
        options = {"ignore_index": ignore_index, "reduction": reduction}
        return handle_torch_function(linear_cross_entropy, arguments, *arguments, **options)
    check_floating("x", x)
    check_floating("weight", weight)
    check_tensor("target", target)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: got {reduction!r}, expected mean, sum or none")
    x, weight = autocast(x, weight)
    _check(x, weight, target)
    if x.device.type != "cpu" and (reason := backend.why_not_native(x.device)):
        backend.count_fallback("linear_cross_entropy", reason)
        return reference.linear_cross_entropy(x, weight, target, ignore_index=ignore_index, reduction=reduction)
    if is_worthwhile(x, weight, reduction):
        return linear_cross_entropy_joint(x, weight, target, ignore_index, reduction == "mean")
    losses = _linear_cross_entropy(x, weight, target, ignore_index)[0]
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (target != ignore_index).sum()


def _check(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> None:
    if x.dim() == 0:
        raise ValueError("x: got a scalar, expected at least one dimension")
    check_dtype("weight", weight, "x", x)
    check_shape("weight", weight, ("V", x.shape[-1]))
    if target.dtype != torch.int64:
        raise TypeError(f"target: got dtype {target.dtype}, expected int64")
    check_shape("target", target, tuple(x.shape[:-1]))


def _forward(x, weight, target, ignore_index: int):
    losses, lse = _forward_fake(x, weight, target, ignore_index)
    if losses.numel():
        backend.native_for(x).linear_cross_entropy_forward(
            losses.view(-1), lse, as_matrix(x), weight, target.reshape(-1).contiguous(), ignore_index
        )
    return losses, lse


def _forward_fake(x, weight, target, ignore_index: int):
    return x.new_empty(target.shape, dtype=torch.float32), x.new_empty(target.numel(), dtype=torch.float32)


def _backward(grad, x, weight, target, lse, ignore_index: int, need_x: bool, need_weight: bool):
    grad_x, grad_weight = _backward_fake(grad, x, weight, target, lse, ignore_index, need_x, need_weight)
    if target.numel() == 0 or weight.numel() == 0:
        return grad_x.zero_(), grad_weight.zero_()
    backend.native_for(x).linear_cross_entropy_backward(
        grad_x.view(-1, x.shape[-1]) if need_x else None,
        grad_weight if need_weight else None,
        grad.reshape(-1).contiguous(),
        as_matrix(x),
        weight,
        target.reshape(-1).contiguous(),
        lse.contiguous(),
        ignore_index,
    )
    return grad_x, grad_weight


def _backward_fake(grad, x, weight, target, lse, ignore_index: int, need_x: bool, need_weight: bool):
    return x.new_empty(x.shape if need_x else (0,)), x.new_empty(weight.shape if need_weight else (0,))


def _setup_context(ctx, inputs, output) -> None:
    x, weight, target, ignore_index = inputs
    lse = output[1]
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, target, lse)
    ctx.ignore_index = ignore_index


def _gradient(ctx, grad, _):
    if grad is None:
        return None, None, None, None
    need_x, need_weight = ctx.needs_input_grad[:2]
    grad_x, grad_weight = linear_cross_entropy_backward(grad, *ctx.saved_tensors, ctx.ignore_index, need_x, need_weight)
    return grad_x if need_x else None, grad_weight if need_weight else None, None, None


def _keep(ctx, x, weight, target, ignore_index: int, reduction: str, computed):
    loss, lse = computed
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, target, lse)
    ctx.options = ignore_index, reduction
    return loss


def _eager_gradient(ctx, saved, grad):
    return backend.native_for(saved[0]).linear_cross_entropy_gradient(grad, *saved, *ctx.options, ctx.needs_input_grad)


def _eager_gradient_by_ops(ctx, saved, grad):
    if grad is None:
        return (None,) * 6
    x, weight, target, lse = saved
    ignore_index, reduction = ctx.options
    if reduction == "mean":
        grad = grad / (target != ignore_index).sum()
    needs = ctx.needs_input_grad[:2]
    grads = linear_cross_entropy_backward(grad.expand(target.shape), x, weight, target, lse, ignore_index, *needs)
    return *(g if need else None for g, need in zip(grads, needs)), None, None, None, None


_differentiable = eager_function("linear_cross_entropy", _keep, _eager_gradient, _eager_gradient_by_ops)

linear_cross_entropy_backward = NativeOp(
    "linear_cross_entropy_backward(Tensor grad, Tensor x, Tensor weight, Tensor target, Tensor lse, int ignore_index,"
    " bool need_x, bool need_weight) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_linear_cross_entropy = NativeOp(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor target, int ignore_index) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    _setup_context,
    _gradient,
)
