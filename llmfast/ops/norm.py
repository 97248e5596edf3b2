"""``add_layer_norm`` and ``add_rms_norm``: the residual sum and its norm in one pass over memory."""

from __future__ import annotations

import torch
from torch.overrides import handle_torch_function

from llmfast import backend, reference
from llmfast.ops._native_op import NativeOp, check_floating, dense, eager_function, stands_for_tensor, whole_calls

__all__ = ["add_layer_norm", "add_rms_norm"]

_OUT_DTYPES = frozenset((None, torch.float32, torch.bfloat16, torch.float16))


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``summed = x + residual`` and ``normed = layer_norm(summed) * weight + bias`` over the last dimension.

    Args:
        x: ``[..., C]``, float32, bfloat16 or float16, any strides; a last dimension that is not contiguous is copied.
        residual: like `x` in shape, of any of these dtypes, or None.
        weight, bias: ``[C]``, of any of these dtypes, or None.
        eps: added to the variance.
        out_dtype: dtype of `normed`; default that of `x`.

    Returns:
        ``(normed, summed)``, both ``[..., C]`` and contiguous. `summed` has the dtype of `residual`; without a residual
        it is `x` itself. The sum is taken in float32; the norm is that of the float32 sum, before `summed` is rounded.
        The gradient is that of the norm of `summed` as rounded.

    Autocast casts nothing here, as it leaves `torch.nn.functional.layer_norm` alone on CPU: a bfloat16 sub-layer
    output, a float32 residual stream and float32 weights are what this op is made for.

    Raises:
        TypeError: a dtype is unsupported. ValueError: a shape or device does not fit.

    Example:
        >>> x, stream = torch.randn(2, 8, dtype=torch.bfloat16), torch.randn(2, 8)
        >>> normed, stream = llmfast.add_layer_norm(x, stream, torch.ones(8), torch.zeros(8))
        >>> normed.dtype, stream.dtype
        (torch.bfloat16, torch.float32)
    """
    if (native := whole_calls(x)) and out_dtype in _OUT_DTYPES:
        done = native.add_norm(x, residual, weight, bias, eps, out_dtype, True, torch.is_grad_enabled())
        if done is not None:
            return _differentiate(x, residual, weight, bias, eps, done) if type(done) is list else done
    if stands_for_tensor(*(tensors := (x, residual, weight, bias))):
        return handle_torch_function(add_layer_norm, tensors, *tensors, eps, out_dtype=out_dtype)
    _check(x, residual, weight, bias, out_dtype)
    if not x.is_cpu and (reason := backend.why_not_native(x.device)):
        backend.count_fallback("add_layer_norm", reason)
        return reference.add_layer_norm(x, residual, weight, bias, eps, out_dtype=out_dtype)
    normed, summed, _, _ = _layer_norm(x, residual, weight, bias, eps, out_dtype)
    return normed, x if residual is None else summed


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float = 1e-6,
    *,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``summed = x + residual`` and ``normed = summed / sqrt(mean(summed²) + eps) * weight`` over the last dimension.

    Arguments, results, rounding, autocast and errors are those of `add_layer_norm`, without a bias. The product with
    `weight` is taken in float32 too, before the one rounding to `out_dtype`.

    Example:
        >>> x, stream = torch.randn(2, 8, dtype=torch.bfloat16), torch.randn(2, 8)
        >>> normed, stream = llmfast.add_rms_norm(x, stream, torch.ones(8))
    """
    if (native := whole_calls(x)) and out_dtype in _OUT_DTYPES:
        done = native.add_norm(x, residual, weight, None, eps, out_dtype, False, torch.is_grad_enabled())
        if done is not None:
            return _differentiate(x, residual, weight, None, eps, done) if type(done) is list else done
    if stands_for_tensor(*(tensors := (x, residual, weight))):
        return handle_torch_function(add_rms_norm, tensors, *tensors, eps, out_dtype=out_dtype)
    _check(x, residual, weight, None, out_dtype)
    if not x.is_cpu and (reason := backend.why_not_native(x.device)):
        backend.count_fallback("add_rms_norm", reason)
        return reference.add_rms_norm(x, residual, weight, eps, out_dtype=out_dtype)
    normed, summed, _ = _rms_norm(x, residual, weight, eps, out_dtype)
    return normed, x if residual is None else summed


def _check(x, residual, weight, bias, out_dtype) -> None:
    check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x: got a scalar, expected at least one dimension")
    shape, device = x.shape, x.device
    for name, tensor, expected in (
        ("residual", residual, shape),
        ("weight", weight, shape[-1:]),
        ("bias", bias, shape[-1:]),
    ):
        if tensor is None:
            continue
        check_floating(name, tensor)
        if tensor.shape != expected:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {tuple(expected)}")
        if tensor.device != device:
            raise ValueError(f"{name}: got a tensor on {tensor.device}, expected {device} as x is")
    if out_dtype not in _OUT_DTYPES:
        raise TypeError(f"out_dtype: got {out_dtype}, expected float32, bfloat16 or float16")


def _rows(t: torch.Tensor | None) -> torch.Tensor | None:
    """As the kernels take it: contiguous rows, at most six dimensions."""
    if t is None:
        return None
    if t.dim() > 6:
        t = t.reshape(-1, t.shape[-1])
    return t if t.stride(-1) == 1 else dense(t)


def _layer_norm_outputs(x, residual, weight, bias, eps: float, out_dtype: torch.dtype | None):
    normed, summed, rstd = _rms_norm_outputs(x, residual, weight, eps, out_dtype)
    return normed, summed, torch.empty_like(rstd), rstd


def _rms_norm_outputs(x, residual, weight, eps: float, out_dtype: torch.dtype | None):
    shape = x.shape
    normed = x.new_empty(shape, dtype=out_dtype)
    summed = x.new_empty(0) if residual is None else residual.new_empty(shape)
    return normed, summed, x.new_empty(shape[:-1], dtype=torch.float32)


def _layer_norm_forward(x, residual, weight, bias, eps: float, out_dtype: torch.dtype | None):
    outputs = normed, summed, mean, rstd = _layer_norm_outputs(x, residual, weight, bias, eps, out_dtype)
    _forward(normed, summed, mean, rstd, x, residual, weight, bias, eps)
    return outputs


def _rms_norm_forward(x, residual, weight, eps: float, out_dtype: torch.dtype | None):
    outputs = normed, summed, rstd = _rms_norm_outputs(x, residual, weight, eps, out_dtype)
    _forward(normed, summed, None, rstd, x, residual, weight, None, eps)
    return outputs


def _forward(normed, summed, mean, rstd, x, residual, weight, bias, eps: float) -> None:
    backend.native_for(x).norm_forward(
        _rows(normed),
        None if residual is None else _rows(summed),
        mean,
        rstd,
        _rows(x),
        _rows(residual),
        _rows(weight),
        _rows(bias),
        eps,
        mean is not None,
    )


def _backward(grad_normed, grad_summed, summed, weight, mean, rstd, eps, need_total, x_dtype, need_weight, bias_dtype):
    grads = grad_total, grad_x, grad_weight, grad_bias = _gradient_outputs(
        grad_normed, grad_summed, summed, weight, mean, rstd, eps, need_total, x_dtype, need_weight, bias_dtype
    )
    backend.native_for(summed).norm_backward(
        _rows(grad_total) if need_total else None,
        _rows(grad_x) if x_dtype is not None else None,
        grad_weight if need_weight else None,
        grad_bias if bias_dtype is not None else None,
        _rows(grad_normed),
        _rows(grad_summed),
        _rows(summed),
        _rows(weight),
        None if mean is None else mean.contiguous(),
        rstd.contiguous(),
        eps,
        mean is not None,
    )
    return grads


def _gradient_outputs(
    grad_normed, grad_summed, summed, weight, mean, rstd, eps, need_total, x_dtype, need_weight, bias_dtype
):
    C = summed.shape[-1]
    return (
        summed.new_empty(summed.shape if need_total else 0),
        summed.new_empty(summed.shape if x_dtype is not None else 0, dtype=x_dtype),
        summed.new_empty(C if need_weight else 0, dtype=weight.dtype if need_weight else None),
        summed.new_empty(C if bias_dtype is not None else 0, dtype=bias_dtype),
    )


def _save(ctx, x, residual, weight, bias, eps, output, mean, rstd) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if residual is None else output[1], weight, mean, rstd)
    ctx.has_residual = residual is not None
    ctx.eps = eps
    ctx.x_dtype = x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients_of(ctx, grad_normed, grad_summed, needs):
    # Without a residual, the output `summed` is an empty tensor.
    options = ctx.eps, ctx.x_dtype, ctx.bias_dtype
    return _gradients(ctx.saved_tensors, options, grad_normed, grad_summed if ctx.has_residual else None, needs)


def _gradients(saved, options, grad_normed, grad_summed, needs):
    """Gradients of x, residual, weight and bias; `needs` says of which."""
    need_x, need_residual, need_weight, need_bias = needs
    summed, weight, mean, rstd = saved
    eps, x_dtype, bias_dtype = options
    if grad_normed is None:
        if grad_summed is None:
            return None, None, None, None
        return grad_summed.to(x_dtype) if need_x else None, grad_summed, None, None
    separate_x = need_x and x_dtype != summed.dtype
    need_total = need_residual or (need_x and not separate_x)
    total, grad_x, grad_weight, grad_bias = _norm_backward(
        grad_normed,
        grad_summed,
        summed,
        weight,
        mean,
        rstd,
        eps,
        need_total,
        x_dtype if separate_x else None,
        need_weight,
        bias_dtype if need_bias else None,
    )
    return (
        (grad_x if separate_x else total) if need_x else None,
        total if need_residual else None,
        grad_weight if need_weight else None,
        grad_bias if need_bias else None,
    )


def _layer_norm_setup(ctx, inputs, output) -> None:
    x, residual, weight, bias, eps, _ = inputs
    _save(ctx, x, residual, weight, bias, eps, output, output[2], output[3])


def _layer_norm_gradient(ctx, grad_normed, grad_summed, _mean, _rstd):
    return *_gradients_of(ctx, grad_normed, grad_summed, ctx.needs_input_grad[:4]), None, None


def _rms_norm_setup(ctx, inputs, output) -> None:
    x, residual, weight, eps, _ = inputs
    _save(ctx, x, residual, weight, None, eps, output, None, output[2])


def _rms_norm_gradient(ctx, grad_normed, grad_summed, _rstd):
    grads = _gradients_of(ctx, grad_normed, grad_summed, (*ctx.needs_input_grad[:3], False))
    return *grads[:3], None, None


def _differentiate(x, residual, weight, bias, eps: float, computed: list):
    outputs = _differentiable(x, residual, weight, bias, eps, computed)
    return (outputs, x) if residual is None else outputs


def _keep(ctx, x, residual, weight, bias, eps: float, computed):
    normed, summed, statistics = computed
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(summed, weight, statistics)
    ctx.options = eps, x.dtype, None if bias is None else bias.dtype
    return normed if residual is None else (normed, summed)


def _eager_gradient(ctx, saved, grad_normed, grad_summed=None):
    native = backend.native_for(saved[0])
    return native.add_norm_gradient(grad_normed, grad_summed, *saved, *ctx.options, ctx.needs_input_grad)


def _eager_gradient_by_ops(ctx, saved, grad_normed, grad_summed=None):
    summed, weight, statistics = saved
    *means, rstd = statistics.view(-1, *summed.shape[:-1])
    saved = summed, weight, means[0] if means else None, rstd
    return *_gradients(saved, ctx.options, grad_normed, grad_summed, ctx.needs_input_grad[:4]), None, None


_differentiable = eager_function("add_norm", _keep, _eager_gradient, _eager_gradient_by_ops)

_norm_backward = NativeOp(
    "add_norm_backward(Tensor grad_normed, Tensor? grad_summed, Tensor summed, Tensor? weight, Tensor? mean,"
    " Tensor rstd, float eps, bool need_total, ScalarType? x_dtype, bool need_weight, ScalarType? bias_dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _gradient_outputs,
)
_layer_norm = NativeOp(
    "add_layer_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, ScalarType? out_dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _layer_norm_forward,
    _layer_norm_outputs,
    _layer_norm_setup,
    _layer_norm_gradient,
)
_rms_norm = NativeOp(
    "add_rms_norm(Tensor x, Tensor? residual, Tensor? weight, float eps, ScalarType? out_dtype)"
    " -> (Tensor, Tensor, Tensor)",
    _rms_norm_forward,
    _rms_norm_outputs,
    _rms_norm_setup,
    _rms_norm_gradient,
)
