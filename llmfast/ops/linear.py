"""``linear``: matrix product with a weight, plus bias, on the shared GEMM core."""

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
    eager_function,
    stands_for_tensor,
    whole_calls,
)

__all__ = ["linear"]


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias``, accumulated in float32.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16, any strides.
        weight: ``[N, K]``, dtype of `x`, any strides.
        bias: ``[N]``, dtype of `x`, or None.

    Returns:
        ``[..., N]``, contiguous, dtype of `x`. Empty inputs give empty or (K = 0) bias-only outputs.

    Under autocast, inputs are cast to its dtype, as `torch.nn.functional.linear` does.

    Raises:
        TypeError: a dtype is unsupported or differs from x's. ValueError: a shape or device does not fit.

    Example:
        >>> llmfast.linear(torch.randn(2, 8), torch.randn(4, 8)).shape
        torch.Size([2, 4])
    """
    if native := whole_calls(x):
        out = native.linear(x, weight, bias, torch.is_grad_enabled())
        if out is not None:
            return _differentiable(x, weight, bias, out) if type(out) is list else out
    if stands_for_tensor(x, weight, bias):
        return handle_torch_function(linear, (x, weight, bias), x, weight, bias)
    check_floating("x", x)
    check_floating("weight", weight)
    x, weight, bias = autocast(x, weight, bias)
    _check(x, weight, bias)
    if x.device.type != "cpu" and (reason := backend.why_not_native(x.device)):
        backend.count_fallback("linear", reason)
        return reference.linear(x, weight, bias)
    return _linear(x, weight, bias)


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    if x.dim() == 0:
        raise ValueError("x: got a scalar, expected at least one dimension")
    check_dtype("weight", weight, "x", x)
    check_shape("weight", weight, ("N", x.shape[-1]))
    if bias is not None:
        check_dtype("bias", bias, "x", x)
        check_shape("bias", bias, (weight.shape[0],))


def _forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out = _forward_fake(x, weight, bias)
    if out.numel():
        bias = None if bias is None else bias.contiguous()
        backend.native_for(x).linear_forward(out.view(-1, weight.shape[0]), as_matrix(x), weight, bias)
    return out


def _forward_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _backward(grad, x, weight, need_x: bool, need_weight: bool, need_bias: bool):
    grad_x, grad_weight, grad_bias = _backward_fake(grad, x, weight, need_x, need_weight, need_bias)
    N, K = weight.shape
    if x.numel() == 0 or N == 0:
        if need_bias:
            grad_bias = grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad.clone()
        return grad_x.zero_(), grad_weight.zero_(), grad_bias
    backend.native_for(x).linear_backward(
        grad_x.view(-1, K) if need_x else None,
        grad_weight if need_weight else None,
        grad_bias if need_bias else None,
        as_matrix(grad),
        as_matrix(x),
        weight,
    )
    return grad_x, grad_weight, grad_bias


def _backward_fake(grad, x, weight, need_x: bool, need_weight: bool, need_bias: bool):
    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty(weight.shape if need_weight else (0,)),
        x.new_empty(weight.shape[0] if need_bias else 0),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _gradient(ctx, grad):
    needed = ctx.needs_input_grad
    grads = linear_backward(grad, *ctx.saved_tensors, *needed)
    return tuple(g if need else None for g, need in zip(grads, needed))


def _keep(ctx, x, weight, bias, computed):
    ctx.save_for_backward(x, weight)
    return computed[0]


def _eager_gradient(ctx, saved, grad):
    return backend.native_for(grad).linear_gradient(grad, *saved, ctx.needs_input_grad)


def _eager_gradient_by_ops(ctx, saved, grad):
    needed = ctx.needs_input_grad[:3]
    grads = linear_backward(grad, *saved, *needed)
    return *(g if need else None for g, need in zip(grads, needed)), None


_differentiable = eager_function("linear", _keep, _eager_gradient, _eager_gradient_by_ops)

linear_backward = NativeOp(
    "linear_backward(Tensor grad, Tensor x, Tensor weight, bool need_x, bool need_weight, bool need_bias)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_linear = NativeOp(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _forward,
    _forward_fake,
    _setup_context,
    _gradient,
)
