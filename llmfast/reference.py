"""The maths of every op in plain torch: the tests' oracle, the benchmarks' baseline, and the fallback.

Each function has the signature and the semantics of its twin in `llmfast.ops`, works on any device and in any floating
dtype (float64 included), and is differentiable by autograd. Clarity first: nothing here is fast.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

__all__ = [
    "activation",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "embedding",
    "ffn",
    "linear",
    "linear_cross_entropy",
    "rotary",
    "varlen_attention",
    "visible",
]


def linear(x, weight, bias=None):
    return F.linear(x, weight, bias)


def activation(name: str, x: torch.Tensor) -> torch.Tensor:
    """The FFN nonlinearities by name."""
    match name:
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
        case "relu2":
            return F.relu(x).square()
        case "silu":
            return F.silu(x)
    raise ValueError(f"activation: got {name!r}, expected gelu, gelu_tanh, relu, relu2 or silu")


def ffn(x, up_weight, up_bias, down_weight, down_bias, *, activation="gelu_tanh", gate_weight=None):
    up = F.linear(x, up_weight, up_bias)
    if gate_weight is None:
        hidden = globals()["activation"](activation, up)
    else:
        hidden = globals()["activation"](activation, F.linear(x, gate_weight)) * up
    return F.linear(hidden, down_weight, down_bias)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def add_layer_norm(x, residual, weight, bias, eps=1e-5, *, out_dtype=None):
    wide = _accumulation_dtype(x.dtype)
    total = x.to(wide) if residual is None else x.to(wide) + residual.to(wide)
    normed = F.layer_norm(
        total,
        total.shape[-1:],
        None if weight is None else weight.to(wide),
        None if bias is None else bias.to(wide),
        eps,
    )
    summed = x if residual is None else total.to(residual.dtype)
    return normed.to(out_dtype or x.dtype), summed


def add_rms_norm(x, residual, weight, eps=1e-6, *, out_dtype=None):
    wide = _accumulation_dtype(x.dtype)
    total = x.to(wide) if residual is None else x.to(wide) + residual.to(wide)
    normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * weight.to(wide)
    summed = x if residual is None else total.to(residual.dtype)
    return normed.to(out_dtype or x.dtype), summed


def visible(Tq: int, Tk: int, *, causal=False, window=None, device=None) -> torch.Tensor:
    """Bool [Tq, Tk]: which keys a query sees by position. `causal` and `window` align bottom-right: query i stands at
    position i + Tk - Tq. An int window w means the query itself and the w - 1 keys before it; a pair (left, right)
    counts keys on either side, -1 for no limit."""
    position = torch.arange(Tq, device=device)[:, None] + (Tk - Tq)
    key = torch.arange(Tk, device=device)[None, :]
    allowed = torch.ones(Tq, Tk, dtype=torch.bool, device=device)
    if causal:
        allowed &= key <= position
    if window is not None:
        left, right = (window - 1, 0) if isinstance(window, int) else window
        if left >= 0:
            allowed &= key >= position - left
        if right >= 0:
            allowed &= key <= position + right
    return allowed


def attention(q, k, v, *, causal=False, mask=None, window=None, scale=None, softcap=None):
    """Scores in float32 (or float64), one softmax over each row; a row that sees nothing gives zeros."""
    Hq, Tq, D = q.shape[1:]
    Hkv, Tk = k.shape[1], k.shape[2]
    wide = _accumulation_dtype(q.dtype)
    k = k.repeat_interleave(Hq // Hkv, dim=1)
    v = v.repeat_interleave(Hq // Hkv, dim=1)
    scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * (1 / math.sqrt(D) if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    allowed = visible(Tq, Tk, causal=causal, window=window, device=q.device)
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        scores = scores + mask.to(wide).masked_fill(mask == -math.inf, 0)
        allowed = allowed & (mask != -math.inf)
    allowed = allowed.expand(scores.shape)
    sees_any = allowed.any(-1, keepdim=True)
    scores = scores.masked_fill(~allowed & sees_any, -math.inf)
    weights = torch.softmax(scores, dim=-1) * allowed
    return (weights @ v.to(wide)).to(q.dtype)


def varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, *, causal=False, window=None, scale=None, softcap=None):
    pieces = []
    q_bounds, k_bounds = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(q_bounds, q_bounds[1:], k_bounds, k_bounds[1:]):
        out = attention(
            q[q0:q1].transpose(0, 1)[None],
            k[k0:k1].transpose(0, 1)[None],
            v[k0:k1].transpose(0, 1)[None],
            causal=causal,
            window=window,
            scale=scale,
            softcap=softcap,
        )
        pieces.append(out[0].transpose(0, 1))
    return torch.cat(pieces) if pieces else torch.zeros_like(q)


def rotary(q, k, cos, sin):
    """Half-split rotation of the first R = 2 * cos.shape[-1] elements of each head (of R when cos has D-wide halves)."""

    def rotate(x):
        half = cos.shape[-1]
        c, s = (t.to(_accumulation_dtype(x.dtype)) for t in (cos, sin))
        if c.dim() == 3:
            c, s = c[:, None], s[:, None]
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat((a * c - b * s, b * c + a * s, rest), dim=-1).to(x.dtype)

    if 2 * cos.shape[-1] > q.shape[-1]:  # duplicated halves, as Hugging Face passes them
        cos, sin = cos[..., : cos.shape[-1] // 2], sin[..., : sin.shape[-1] // 2]
    return rotate(q), rotate(k)


def embedding(input_ids, weight, position_weight=None, position_ids=None, *, out_dtype=None):
    out = F.embedding(input_ids, weight).to(_accumulation_dtype(weight.dtype))
    if position_weight is not None:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[-1], device=input_ids.device)
        out = out + F.embedding(position_ids, position_weight).to(out.dtype)
    return out.to(out_dtype or weight.dtype)


def linear_cross_entropy(x, weight, target, *, ignore_index=-100, reduction="mean"):
    wide = _accumulation_dtype(x.dtype)
    logits = F.linear(x, weight).to(wide) if x.dtype == torch.float64 else F.linear(x.to(wide), weight.to(wide))
    V = weight.shape[0]
    losses = F.cross_entropy(logits.reshape(-1, V), target.reshape(-1), ignore_index=ignore_index, reduction="none")
    if reduction == "none":
        return losses.view(target.shape)
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (target != ignore_index).sum()
