"""What `torch.utils.flop_counter.FlopCounterMode` counts for llmfast's ops: a multiplication and its addition are two, as
in torch's own formulas, which also count attention as if no key were hidden, and in its backward the scores once more."""

from __future__ import annotations

from math import prod

import torch
from torch.utils.flop_counter import register_flop_formula


def register() -> None:
    """Once, when all ops are defined."""
    for name, formula in _OF_SHAPES.items():
        register_flop_formula(getattr(torch.ops.llmfast, name))(formula)
    for name, formula in _OF_TENSORS.items():
        register_flop_formula(getattr(torch.ops.llmfast, name), get_raw=True)(formula)


def _linear(x, weight, *_, **__) -> int:
    return 2 * prod(x[:-1]) * prod(weight)


def _linear_backward(grad, x, weight, need_x, need_weight, *_, **__) -> int:
    return _linear(x, weight) * (need_x + need_weight)


def _ffn(x, up_weight, up_bias, gate_weight, *_, **__) -> int:
    return _linear(x, up_weight) * (2 if gate_weight is None else 3)


def ffn_backward(grad, x, up_weight, gate_weight, down_weight, up, gate, activation, needed, **_) -> int:
    """`needed`: of x, up_weight, up_bias, gate_weight, down_weight, down_bias."""
    need_x, need_up, need_up_bias, need_gate, need_down, _ = needed
    products = (need_x or need_up or need_up_bias or need_gate) + need_down  # hidden's gradient; down_weight's
    products += need_up + need_gate + need_x * (1 if gate_weight is None else 2)
    return _linear(x, up_weight) * products


def _loss_backward(grad, x, weight, target, lse, ignore_index, need_x, need_weight, **_) -> int:
    return _linear(x, weight) * (need_x + need_weight)


def _loss_and_gradients(x, weight, target, ignore_index, mean, need_x, need_weight, **_) -> int:
    return _linear(x, weight) * (1 + need_x + need_weight)


def attention(q, k, v, *_, **__) -> int:
    return 2 * _pairs(q, k) * (q[-1] + v[-1])


def _attention_backward(grad, q, k, v, *_, **__) -> int:
    return 2 * _pairs(q, k) * (3 * q[-1] + 2 * v[-1])


def _pairs(q: torch.Size, k: torch.Size) -> int:
    return prod(q[:-1]) * k[-2]


def _varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, *_, **__) -> int:
    return 2 * _packed_pairs(q, cu_seqlens_q, cu_seqlens_k) * (q.shape[-1] + v.shape[-1])


def _varlen_attention_backward(grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *_, **__) -> int:
    return 2 * _packed_pairs(q, cu_seqlens_q, cu_seqlens_k) * (3 * q.shape[-1] + 2 * v.shape[-1])


def _packed_pairs(q: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor) -> int:
    return q.shape[1] * int((cu_seqlens_q.diff().long() * cu_seqlens_k.diff().long()).sum())


_OF_SHAPES = {
    "linear": _linear,
    "linear_backward": _linear_backward,
    "ffn": _ffn,
    "ffn_backward": ffn_backward,
    "linear_cross_entropy": _linear,
    "linear_cross_entropy_backward": _loss_backward,
    "linear_cross_entropy_joint": _loss_and_gradients,
    "attention_forward": attention,
    "attention_backward": _attention_backward,
}
_OF_TENSORS = {
    "varlen_attention_forward": _varlen_attention,
    "varlen_attention_backward": _varlen_attention_backward,
}
