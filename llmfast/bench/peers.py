"""How PyTorch does what each op does: the first of an op's peers is the plain way, whose error sets what is allowed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from llmfast import reference

__all__ = ["Function", "Peer", "compiled", "peers_of"]

NARROW = 64.0  # slack for peers that keep logits or the loss in the narrow dtype: rounding, not a wrong result


@dataclass(frozen=True)
class Peer:
    """A function of a case's inputs by name. `slack`: see `llmfast.bench.harness.Provider`."""

    function: Callable
    slack: float = 2.0
    differentiable: bool = True


class Function:
    """Calls `function` on `inputs` (tensors by keyword) in one direction; returns its results as a tuple.

    forward: outputs, without gradients. backward: gradients of all floating inputs, on one graph kept between calls.
    forward+backward: outputs and gradients. Gradients of outputs are random, the same for every provider.
    """

    def __init__(self, function: Callable, inputs: dict[str, torch.Tensor], direction: str) -> None:
        self.function, self.direction = function, direction
        self.inputs = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in inputs.items()}
        self.leaves = [t for t in self.inputs.values() if t.requires_grad]
        self.graph: tuple[torch.Tensor, ...] | None = None
        self.upstream: list[torch.Tensor] | None = None

    def __call__(self) -> tuple[torch.Tensor, ...]:
        if self.direction == "forward":
            with torch.no_grad():
                return _as_tuple(self.function(**self.inputs))
        if self.direction == "forward+backward":
            outputs = _as_tuple(self.function(**self.inputs))
            return (*outputs, *torch.autograd.grad(outputs, self.leaves, self._upstream(outputs)))
        if self.graph is None:
            self.graph = _as_tuple(self.function(**self.inputs))
        return torch.autograd.grad(self.graph, self.leaves, self._upstream(self.graph), retain_graph=True)

    def _upstream(self, outputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        if self.upstream is None:
            self.upstream = [_gradient(output, seed) for seed, output in enumerate(outputs)]
        return self.upstream


def _as_tuple(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _gradient(output: torch.Tensor, seed: int) -> torch.Tensor:
    if output.dim() == 0:
        return torch.ones_like(output)
    # rounded to bfloat16 first: the same values in every dtype, the oracle's included
    values = torch.randn(output.shape, generator=torch.Generator().manual_seed(1000 + seed)).bfloat16()
    return values.to(output.dtype)


def compiled(function: Callable) -> Callable:
    """``torch.compile`` of `function`, for fixed shapes, usable for repeated backward passes on one graph."""
    from torch._functorch import config

    config.donated_buffer = False
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def peers_of(op: str, call: dict[str, object], dtype: torch.dtype) -> dict[str, Peer | str]:
    """PyTorch's ways to compute `op` with the keyword arguments `call`; a string says why one cannot be had here."""
    makers = {
        "linear": _linear,
        "ffn": _ffn,
        "add_layer_norm": _add_layer_norm,
        "add_rms_norm": _add_rms_norm,
        "attention": _attention,
        "varlen_attention": _varlen_attention,
        "linear_cross_entropy": _linear_cross_entropy,
    }
    return makers[op](dtype, **call)


def _linear(dtype) -> dict[str, Peer | str]:
    kept: dict[tuple, torch.Tensor] = {}

    def eager(x, weight, bias):
        return F.linear(x, weight, bias)

    def reuse_output(x, weight, bias):
        shape = (x.shape[0], weight.shape[0])
        if shape not in kept:
            kept[shape] = x.new_empty(shape)
        return torch.addmm(bias, x, weight.t(), out=kept[shape])

    return {"torch F.linear": Peer(eager), "torch addmm(out=)": Peer(reuse_output, differentiable=False)}


def _ffn(dtype, activation, **no_biases) -> dict[str, Peer | str]:
    def plain(x, up_weight, down_weight, up_bias, down_bias):
        return F.linear(reference.activation(activation, F.linear(x, up_weight, up_bias)), down_weight, down_bias)

    def gated(x, up_weight, down_weight, gate_weight):
        hidden = reference.activation(activation, F.linear(x, gate_weight)) * F.linear(x, up_weight)
        return F.linear(hidden, down_weight)

    return {"torch eager": Peer(gated if no_biases else plain)}


def _add_layer_norm(dtype) -> dict[str, Peer | str]:
    def eager(x, residual, weight, bias):
        summed = x + residual
        return F.layer_norm(summed, weight.shape, weight, bias, 1e-5), summed

    return {"torch eager": Peer(eager)}


def _add_rms_norm(dtype) -> dict[str, Peer | str]:
    def eager(x, residual, weight):
        summed = x + residual
        return F.rms_norm(summed, weight.shape, weight, 1e-6), summed

    return {"torch eager": Peer(eager)}


def _attention(dtype, causal=False, window=None, mask=None) -> dict[str, Peer | str]:
    masks: dict[tuple[int, int], torch.Tensor] = {}

    def sdpa(q, k, v):
        sizes = q.shape[2], k.shape[2]
        allowed = None
        if mask is not None or window is not None or (causal and sizes[0] not in (1, sizes[1])):
            if sizes not in masks:  # made once: not part of what is timed
                masks[sizes] = reference.visible(*sizes, causal=causal, window=window)
                masks[sizes] = masks[sizes] if mask is None else masks[sizes] & mask
            allowed = masks[sizes]
        is_causal = causal and allowed is None and sizes[0] > 1
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, allowed, is_causal=is_causal, enable_gqa=gqa)

    return {"torch SDPA": Peer(sdpa)}


def _varlen_attention(dtype, causal) -> dict[str, Peer | str]:
    masks: dict[int, torch.Tensor] = {}

    def masked(q, k, v, cu_seqlens_q, cu_seqlens_k):
        """All documents at once, as SDPA's users do it: a mask keeps them apart."""
        T = q.shape[0]
        if T not in masks:
            document = torch.bucketize(torch.arange(T), cu_seqlens_q[1:], right=True)
            masks[T] = reference.visible(T, T, causal=causal) & (document[:, None] == document)
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, masks[T], enable_gqa=q.shape[1] != k.shape[1])
        return out[0].transpose(0, 1)

    def one_by_one(q, k, v, cu_seqlens_q, cu_seqlens_k):
        outs = []
        for a, b in itertools.pairwise(cu_seqlens_q.tolist()):
            piece = (t[a:b].transpose(0, 1)[None] for t in (q, k, v))
            out = F.scaled_dot_product_attention(*piece, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    return {"torch SDPA, mask": Peer(masked), "torch SDPA, one by one": Peer(one_by_one)}


def _linear_cross_entropy(dtype) -> dict[str, Peer | str]:
    def wide_logits(x, weight, target):
        return F.cross_entropy(F.linear(x, weight).float(), target)

    def narrow_logits(x, weight, target):
        return F.cross_entropy(F.linear(x, weight), target)

    def fused(x, weight, target):
        return F.linear_cross_entropy(x, weight, target, options=torch.nn.LinearCrossEntropyOptions())

    peers: dict[str, Peer | str] = {"torch float32 logits": Peer(wide_logits)}
    if hasattr(F, "linear_cross_entropy"):
        peers["torch F.linear_cross_entropy"] = Peer(fused, slack=NARROW)
    else:
        peers["torch F.linear_cross_entropy"] = f"torch {torch.__version__} has none"
    if dtype != torch.float32:
        peers[f"torch {str(dtype).removeprefix('torch.')} logits"] = Peer(narrow_logits, slack=NARROW)
    return peers
