"""``ffn``: the feed-forward network, plain or gated, its nonlinearity fused into the product that feeds it."""

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

__all__ = ["ACTIVATIONS", "ffn"]

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "relu2", "silu")  # in the order of csrc/simd/activations.h


def ffn(
    x: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    *,
    activation: str = "gelu_tanh",
    gate_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """``down(activation(up(x)))``; with `gate_weight`: ``down(activation(gate(x)) * up(x))`` (SwiGLU, GeGLU).

    Args:
        x: ``[..., C]``, float32, bfloat16 or float16, any strides.
        up_weight: ``[F, C]``. up_bias: ``[F]`` or None.
        down_weight: ``[C, F]``. down_bias: ``[C]`` or None.
        activation: gelu (erf), gelu_tanh, relu, relu2 (squared ReLU) or silu.
        gate_weight: ``[F, C]`` or None.

    All tensors share x's dtype; products accumulate in float32 and the nonlinearity is computed in float32.

    Returns:
        ``[..., C]``, contiguous, dtype of `x`. Keeps the pre-activations ``[..., F]`` for the backward pass.

    Under autocast, inputs are cast to its dtype.

    Raises:
        TypeError: a dtype is unsupported or differs. ValueError: a shape, device or the activation does not fit.

    Example:
        >>> llmfast.ffn(torch.randn(2, 8), torch.randn(32, 8), None, torch.randn(8, 32), None, activation="silu").shape
        torch.Size([2, 8])
    """
    if (native := whole_calls(x)) and activation in ACTIVATIONS:
        arguments = x, up_weight, up_bias, gate_weight, down_weight, down_bias, ACTIVATIONS.index(activation)
        out = native.ffn(*arguments, torch.is_grad_enabled())
        if out is not None:
            return _differentiable(*arguments, out) if type(out) is list else out
    if stands_for_tensor(*(tensors := (x, up_weight, up_bias, down_weight, down_bias)), gate_weight):
        options = {"activation": activation, "gate_weight": gate_weight}
        return handle_torch_function(ffn, (*tensors, gate_weight), *tensors, **options)
    for name, tensor in (("x", x), ("up_weight", up_weight), ("down_weight", down_weight)):
        check_floating(name, tensor)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    x, up_weight, up_bias, down_weight, down_bias, gate_weight = autocast(
        x, up_weight, up_bias, down_weight, down_bias, gate_weight
    )
    _check(x, up_weight, up_bias, down_weight, down_bias, gate_weight)
    if x.device.type != "cpu" and (reason := backend.why_not_native(x.device)):
        backend.count_fallback("ffn", reason)
        return reference.ffn(
            x, up_weight, up_bias, down_weight, down_bias, activation=activation, gate_weight=gate_weight
        )
    tensors = (x, up_weight, up_bias, gate_weight, down_weight, down_bias)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    save = save or torch.jit.is_tracing()  # a trace may be run with gradients, wherever it was made
    return _ffn(*tensors, ACTIVATIONS.index(activation), save)[0]


def _check(x, up_weight, up_bias, down_weight, down_bias, gate_weight) -> None:
    if x.dim() == 0:
        raise ValueError("x: got a scalar, expected at least one dimension")
    C, F = x.shape[-1], up_weight.shape[0] if up_weight.dim() else 0
    for name, tensor, shape in (
        ("up_weight", up_weight, ("F", C)),
        ("up_bias", up_bias, (F,)),
        ("gate_weight", gate_weight, (F, C)),
        ("down_weight", down_weight, (C, F)),
        ("down_bias", down_bias, (C,)),
    ):
        if tensor is not None:
            check_dtype(name, tensor, "x", x)
            check_shape(name, tensor, shape)


def _forward(x, up_weight, up_bias, gate_weight, down_weight, down_bias, activation: int, save: bool):
    out, up, gate = _forward_fake(x, up_weight, up_bias, gate_weight, down_weight, down_bias, activation, save)
    if x.numel() == 0:
        return out, up, gate
    up_bias, down_bias = (None if b is None else b.contiguous() for b in (up_bias, down_bias))
    backend.native_for(x).ffn_forward(
        out.view(-1, out.shape[-1]),
        up if save else None,
        gate if save and gate_weight is not None else None,
        as_matrix(x),
        up_weight,
        up_bias,
        gate_weight,
        down_weight,
        down_bias,
        activation,
    )
    return out, up, gate


def _forward_fake(x, up_weight, up_bias, gate_weight, down_weight, down_bias, activation: int, save: bool):
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    F = up_weight.shape[0]
    return (
        x.new_empty(x.shape),
        x.new_empty((rows, F) if save else (0,)),
        x.new_empty((rows, F) if save and gate_weight is not None else (0,)),
    )


def _backward(grad, x, up_weight, gate_weight, down_weight, up, gate, activation: int, needed: list[bool]):
    grads = _backward_fake(grad, x, up_weight, gate_weight, down_weight, up, gate, activation, needed)
    if x.numel() == 0:
        return tuple(g.zero_() for g in grads)
    grad_x, *rest = (g if need else None for g, need in zip(grads, needed))
    backend.native_for(x).ffn_backward(
        None if grad_x is None else grad_x.view(-1, x.shape[-1]),
        *rest,
        as_matrix(grad),
        as_matrix(x),
        up_weight,
        gate_weight,
        down_weight,
        up.contiguous(),
        gate.contiguous() if gate_weight is not None else None,
        activation,
    )
    return grads


def _backward_fake(grad, x, up_weight, gate_weight, down_weight, up, gate, activation: int, needed: list[bool]):
    F, C = up_weight.shape
    shapes = (x.shape, (F, C), (F,), (F, C), (C, F), (C,))
    return tuple(x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needed))


def _setup_context(ctx, inputs, output) -> None:
    x, up_weight, _, gate_weight, down_weight, _, activation, _ = inputs
    _, up, gate = output
    ctx.mark_non_differentiable(up, gate)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, up_weight, gate_weight, down_weight, up, gate)
    ctx.activation = activation


def _gradient(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    x_, up_w, up_b, gate_w, down_w, down_b = ctx.needs_input_grad[:6]
    needed = [x_, up_w, up_b, gate_w, down_w, down_b]
    d_x, d_up, d_up_bias, d_gate, d_down, d_down_bias = (
        g if need else None for g, need in zip(ffn_backward(grad, *ctx.saved_tensors, ctx.activation, needed), needed)
    )
    return d_x, d_up, d_up_bias, d_gate, d_down, d_down_bias, None, None


def _keep(ctx, x, up_weight, up_bias, gate_weight, down_weight, down_bias, activation: int, computed):
    out, up, gate = computed
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, up_weight, gate_weight, down_weight, up, gate)
    ctx.activation = activation
    return out


def _eager_gradient(ctx, saved, grad):
    return backend.native_for(grad).ffn_gradient(grad, *saved, ctx.activation, ctx.needs_input_grad)


def _eager_gradient_by_ops(ctx, saved, grad):
    if grad is None:
        return (None,) * 8
    x, up_weight, gate_weight, down_weight, up, gate = saved
    gate = x.new_empty(0) if gate is None else gate
    needed = list(ctx.needs_input_grad[:6])
    grads = ffn_backward(grad, x, up_weight, gate_weight, down_weight, up, gate, ctx.activation, needed)
    return *(g if need else None for g, need in zip(grads, needed)), None, None


_differentiable = eager_function("ffn", _keep, _eager_gradient, _eager_gradient_by_ops)

ffn_backward = NativeOp(
    "ffn_backward(Tensor grad, Tensor x, Tensor up_weight, Tensor? gate_weight, Tensor down_weight, Tensor up,"
    " Tensor gate, int activation, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_ffn = NativeOp(
    "ffn(Tensor x, Tensor up_weight, Tensor? up_bias, Tensor? gate_weight, Tensor down_weight, Tensor? down_bias,"
    " int activation, bool save) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _setup_context,
    _gradient,
)
