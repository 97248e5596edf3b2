"""``rotary``: rotary position embedding of queries and keys, and ``rotary_tables``."""

from __future__ import annotations

import torch
from torch.overrides import handle_torch_function

from llmfast import backend, reference
from llmfast.ops._native_op import (
    NativeOp,
    check_dtype,
    check_floating,
    check_shape,
    dense,
    eager_function,
    stands_for_tensor,
    whole_calls,
)

__all__ = ["rotary", "rotary_tables"]


def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    rotary_dim: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates the pairs ``(x[j], x[j + R/2])``, j < R/2, of each head by the angle of its position.

    This is the half-split ("rotate_half") convention of Llama and Hugging Face, computed in float32 and rounded once.

    Args:
        q: ``[B, Hq, T, D]``, float32, bfloat16 or float16, any strides; a D that is not contiguous is copied.
        k: ``[B, Hkv, T, D]``, dtype of `q`.
        cos, sin: ``[T, R/2]``, ``[B, T, R/2]`` or ``[1, T, R/2]`` with R <= D, float32 (better) or any other of these
            dtypes; elements from R on are copied. Tables of duplicated halves ``[..., R]``, as Hugging Face passes
            them, are recognised by a width above D/2, where that many pairs would not fit the head, or by `rotary_dim`;
            their first half is used. They get no gradient.
        rotary_dim: R, needed only for duplicated tables with R <= D/2.

    Returns:
        ``(q, k)`` rotated: new tensors with the memory layout of `q` and `k` (a dense transposed view stays one).

    Autocast casts nothing here.

    Raises:
        TypeError: a dtype is unsupported or differs. ValueError: a shape or device does not fit.

    Example:
        >>> cos, sin = llmfast.rotary_tables(16, 64)
        >>> q, k = llmfast.rotary(torch.randn(1, 8, 16, 64), torch.randn(1, 2, 16, 64), cos, sin)
    """
    if (native := whole_calls(q)) and q is not None and k is not None:
        done = native.rotary_pair(q, k, cos, sin, rotary_dim, False, torch.is_grad_enabled())
        if done is not None:
            return _differentiable(q, k, cos, sin, rotary_dim, done) if type(done) is list else done
    if stands_for_tensor(*(tensors := (q, k, cos, sin))):
        return handle_torch_function(rotary, tensors, *tensors, rotary_dim=rotary_dim)
    cos, sin = _check(q, k, cos, sin, rotary_dim)
    if not q.is_cpu and (reason := backend.why_not_native(q.device)):
        backend.count_fallback("rotary", reason)
        return reference.rotary(q, k, cos, sin)
    return _rotary(q, k, cos, sin, False)


def rotary_tables(
    positions: int | torch.Tensor,
    dim: int,
    theta: float = 10000.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of ``position * theta^(-2j/dim)``, j < dim/2, computed in float64.

    Args:
        positions: a length T, which stands for 0 .. T-1, or a tensor of positions, usually ``[T]`` or ``[B, T]``.
        dim: R, the even number of elements of a head that are rotated.
        theta: base of the frequencies.

    Returns:
        ``(cos, sin)``, each float32 ``[..., dim/2]`` on the device of `positions`.

    Raises:
        ValueError: `dim` is odd or negative.

    Example:
        >>> cos, sin = llmfast.rotary_tables(1024, 64, theta=500000.0)
    """
    if dim % 2 or dim < 0:
        raise ValueError(f"dim: got {dim}, expected an even number >= 0")
    if not isinstance(positions, torch.Tensor):
        positions = torch.arange(positions)
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / max(dim, 1)
    angles = positions.to(torch.float64)[..., None] * theta**-exponents
    return angles.cos().float(), angles.sin().float()


def _check(q, k, cos, sin, rotary_dim: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Raises on what does not fit; returns the tables with R/2 columns."""
    check_floating("q", q)
    check_dtype("k", k, "q", q)
    check_shape("q", q, ("B", "Hq", "T", "D"))
    B, _, T, D = q.shape
    check_shape("k", k, (B, "Hkv", T, D))
    check_floating("cos", cos)
    check_dtype("sin", sin, "cos", cos)
    if cos.device != q.device:
        raise ValueError(f"cos: got a tensor on {cos.device}, expected {q.device} as q is")
    if cos.dim() not in (2, 3):
        raise ValueError(f"cos: got shape {tuple(cos.shape)}, expected (T, R/2) or (B, T, R/2)")
    width = cos.shape[-1]
    rotary_dim = _rotated(width, D, rotary_dim)
    if rotary_dim % 2 or not 0 <= rotary_dim <= D or width not in (rotary_dim, rotary_dim // 2):
        raise ValueError(
            f"cos: got shape {tuple(cos.shape)}, expected a last dimension of R/2 or R for an even R <= D = {D}"
            + (f", here R = {rotary_dim}" if rotary_dim != width else "")
        )
    batch = () if cos.dim() == 2 else (1 if cos.shape[0] == 1 else B,)
    check_shape("cos", cos, (*batch, T, width))
    check_shape("sin", sin, cos.shape)
    half = rotary_dim // 2
    return (cos, sin) if width == half else (cos[..., :half], sin[..., :half])


def _rotated(width: int, D: int, rotary_dim: int | None) -> int:
    """R, from the width of the tables unless it was given."""
    if rotary_dim is not None:
        return rotary_dim
    return width if 2 * width > D else 2 * width


def _contiguous_rows(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else dense(t)


def _empty_like_rows(x: torch.Tensor) -> torch.Tensor:
    """In x's layout, unless that has gaps or stride 0 and torch's replacement for it puts the heads apart."""
    out = torch.empty_like(x)
    return out if out.stride(-1) == 1 or out.shape[-1] <= 1 else x.new_empty(x.shape)


def _forward(q, k, cos, sin, inverse: bool):
    cos, sin = _contiguous_rows(cos), _contiguous_rows(sin)
    outputs = []
    for x in (q, k):
        x = _contiguous_rows(x)
        out = _empty_like_rows(x)
        backend.native_for(x).rotary(out, x, cos, sin, inverse)
        outputs.append(out)
    return tuple(outputs)


def _forward_fake(q, k, cos, sin, inverse):
    return _empty_like_rows(_contiguous_rows(q)), _empty_like_rows(_contiguous_rows(k))


def _setup_context(ctx, inputs, output) -> None:
    q, k, cos, sin, ctx.inverse = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cos, sin)
    ctx.shapes = q.shape, k.shape


def _gradient(ctx, grad_q, grad_k):
    return *_rotate_back(ctx, grad_q, grad_k, *ctx.saved_tensors, not ctx.inverse), None, None, None


def _rotate_back(ctx, grad_q, grad_k, cos, sin, inverse: bool):
    if grad_q is None and grad_k is None:
        return None, None
    B, _, T, D = ctx.shapes[0]
    some = grad_k if grad_q is None else grad_q
    nothing = some.new_empty(B, 0, T, D)  # no heads: costs nothing
    rotated_q, rotated_k = _rotary(
        nothing if grad_q is None else grad_q,
        nothing if grad_k is None else grad_k,
        cos,
        sin,
        inverse,
    )
    return None if grad_q is None else rotated_q, None if grad_k is None else rotated_k


def _keep(ctx, q, k, cos, sin, rotary_dim: int | None, computed):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cos, sin)
    ctx.shapes = q.shape, k.shape
    ctx.rotary_dim = rotary_dim
    return tuple(computed)


def _eager_gradient(ctx, saved, grad_q, grad_k):
    grads = backend.native_for(saved[0]).rotary_pair(grad_q, grad_k, *saved, ctx.rotary_dim, True, False)
    return None if grads is None else (*grads, None, None, None, None)


def _eager_gradient_by_ops(ctx, saved, grad_q, grad_k):
    cos, sin = saved
    half = _rotated(cos.shape[-1], ctx.shapes[0][3], ctx.rotary_dim) // 2
    return *_rotate_back(ctx, grad_q, grad_k, cos[..., :half], sin[..., :half], True), None, None, None, None


_differentiable = eager_function("rotary", _keep, _eager_gradient, _eager_gradient_by_ops)


_rotary = NativeOp(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    _setup_context,
    _gradient,
)
