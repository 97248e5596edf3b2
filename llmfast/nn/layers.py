"""Linear, FFN, embedding, and the norms that add the residual as they go. Weights are ``[out, in]`` as in torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from llmfast import ops, reference
from llmfast.nn._fallback import autocast_is_on, call_in_graph, is_hooked, left_to_torch

__all__ = ["FFN", "AddLayerNorm", "AddRMSNorm", "Embedding", "Linear"]


class Linear(nn.Linear):
    """`torch.nn.Linear` on `llmfast.linear`. What no kernel takes, float64 for one, is torch's own (counted)."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and (call := call_in_graph(self, input)) is not None:
            return call
        if (
            left_to_torch("Linear", input, self.weight, self.bias)
            or input.dim() == 0
            or input.shape[-1] != self.in_features
        ):
            return super().forward(input)
        if input.dtype != self.weight.dtype and not autocast_is_on(input):
            return super().forward(input)
        return ops.linear(input, self.weight, self.bias)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether nothing happens but the product with its weight: it is no adapter around another, and nobody hooked it."""
    return type(module) in (nn.Linear, Linear) and not is_hooked(module)


class Embedding(nn.Module):
    """Token embedding, plus learned positions if `positions` > 0, in one pass: ids ``[..., T]`` -> ``[..., T, C]``.

    The output is float32 whatever the weights are: it starts the residual stream, which is kept in float32.
    """

    def __init__(self, vocabulary: int, width: int, positions: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width))
        self.position_weight = nn.Parameter(torch.empty(positions, width)) if positions else None

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        if self.position_weight is None:
            position_ids = None
        return ops.embedding(input_ids, self.weight, self.position_weight, position_ids, out_dtype=torch.float32)


class AddLayerNorm(nn.Module):
    """``(x, residual) -> (LayerNorm(x + residual), x + residual)``; the first in the weights' dtype."""

    def __init__(self, width: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps, out_dtype=self.weight.dtype)


class AddRMSNorm(nn.Module):
    """``(x, residual) -> (RMSNorm(x + residual), x + residual)``; the first in the weights' dtype."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.add_rms_norm(x, residual, self.weight, self.eps, out_dtype=self.weight.dtype)


class FFN(nn.Module):
    """``down(activation(up(x)))``, or gated: ``down(activation(gate(x)) * up(x))``, the nonlinearity fused. Linears that
    were replaced (by adapters) or have hooks are called."""

    def __init__(self, width: int, hidden: int, activation: str = "gelu_tanh", gated: bool = False, bias: bool = True):
        super().__init__()
        self.activation = activation
        self.up = Linear(width, hidden, bias=bias)
        self.gate = Linear(width, hidden, bias=False) if gated else None
        self.down = Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if not all(linear is None or is_plain_linear(linear) for linear in (self.up, self.gate, self.down)):
            if self.gate is None:
                return self.down(reference.activation(self.activation, self.up(x)))
            return self.down(reference.activation(self.activation, self.gate(x)) * self.up(x))
        return ops.ffn(
            x,
            self.up.weight,
            self.up.bias,
            self.down.weight,
            self.down.bias,
            activation=self.activation,
            gate_weight=None if self.gate is None else self.gate.weight,
        )
