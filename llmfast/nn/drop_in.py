"""torch.nn's transformer modules on llmfast's kernels: same constructors, parameters, state_dict keys and results.

>>> from llmfast.nn import TransformerEncoderLayer            # instead of torch.nn's
>>> layer = TransformerEncoderLayer(512, 8, batch_first=True)

Each is a subclass of torch's module and hands it, counted in ``llmfast.backend.info()``, what no kernel takes: float64,
other devices, nested tensors, tensor subclasses, and arguments that do not fit, so that the error is torch's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from llmfast import backend, ops
from llmfast.nn._fallback import FLOATING, autocast_is_on, call_in_graph, is_hooked, left_to_torch
from llmfast.nn.layers import Linear, is_plain_linear

__all__ = ["MLP", "LayerNorm", "MultiheadAttention", "RMSNorm", "TransformerEncoderLayer"]


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` on the kernels of `llmfast.add_layer_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        return _norm(self, input, super().forward)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` on the kernels of `llmfast.add_rms_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        return _norm(self, x, super().forward)


def _norm(norm: LayerNorm | RMSNorm, x: Tensor, torchs_own: Callable[[Tensor], Tensor]) -> Tensor:
    if isinstance(x, Proxy) and (call := call_in_graph(norm, x)) is not None:
        return call
    weight, bias, dims = norm.weight, getattr(norm, "bias", None), len(norm.normalized_shape)
    fits = isinstance(x, Tensor) and x.shape[-dims:] == norm.normalized_shape and _dtypes_fit(x, norm)
    if not fits or left_to_torch(type(norm).__name__, x, weight, bias):
        return torchs_own(x)
    if dims > 1:
        x = x.flatten(-dims)
        weight, bias = (None if t is None else t.flatten() for t in (weight, bias))
    normed = _add_norm(norm, x, None, weight, bias, x.dtype)[0]
    return normed.unflatten(-1, norm.normalized_shape) if dims > 1 else normed


def _dtypes_fit(x: Tensor, norm: LayerNorm | RMSNorm) -> bool:
    """LayerNorm takes parameters of x's dtype or, all of them, float32."""
    if isinstance(norm, nn.RMSNorm) or norm.weight is None:
        return True
    return norm.weight.dtype in (x.dtype, torch.float32) and (norm.bias is None or norm.bias.dtype == norm.weight.dtype)


def _add_norm(norm, x: Tensor, residual: Tensor | None, weight, bias, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if isinstance(norm, nn.LayerNorm):
        return ops.add_layer_norm(x, residual, weight, bias, norm.eps, out_dtype=out_dtype)
    eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
    return ops.add_rms_norm(x, residual, weight, eps, out_dtype=out_dtype)


def activation_name(activation: object) -> str | None:
    """What `llmfast.ffn` calls a function of torch or one of its modules; None if it has no such activation."""
    if isinstance(activation, nn.Module):
        if is_hooked(activation):
            return None
        if type(activation) is nn.GELU:
            return "gelu" if activation.approximate == "none" else "gelu_tanh"
        return {nn.ReLU: "relu", nn.SiLU: "silu"}.get(type(activation))
    for function, name in ((F.relu, "relu"), (torch.relu, "relu"), (F.gelu, "gelu"), (F.silu, "silu")):
        if activation is function:
            return name
    return None


class MLP(nn.Module):
    """``fc2(drop(act(fc1(x))))``, the feed-forward block of transformers, in one op while nothing is dropped.

    Names, arguments and state_dict keys (``fc1.weight`` ...) are those of the `Mlp` that vision transformers share.

    Args:
        in_features, hidden_features, out_features: widths; the latter two default to `in_features`.
        act_layer: the activation's class; `torch.nn.GELU`, ReLU and SiLU are fused.
        bias: of both linears. drop: probability of dropout after the activation and after `fc2`, in training.

    Example:
        >>> MLP(8, 32)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        bias: bool = True,
        drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        hidden_features, out_features = hidden_features or in_features, out_features or in_features
        self.fc1 = Linear(in_features, hidden_features, bias=bias, device=device, dtype=dtype)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = Linear(hidden_features, out_features, bias=bias, device=device, dtype=dtype)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy) and (call := call_in_graph(self, x)) is not None:
            return call
        return self.drop2(_feed_forward(x, self.fc1, self.act, self.drop1, self.fc2))


def _feed_forward(x: Tensor, up: nn.Module, activation: Callable, dropout: nn.Module, down: nn.Module) -> Tensor:
    """``down(dropout(activation(up(x))))``: fused where nothing happens in between and nobody replaced the linears."""
    name = activation_name(activation)
    idle = type(dropout) is nn.Dropout and (dropout.p == 0.0 or not dropout.training)
    plain = isinstance(x, Tensor) and is_plain_linear(up) and is_plain_linear(down)
    fused = plain and idle and name is not None and _same_dtype(x, up, down)
    if not fused or x.shape[-1] != up.in_features or down.out_features != up.in_features:
        return down(dropout(activation(up(x))))
    if left_to_torch("ffn", x, up.weight, up.bias, down.weight, down.bias):
        return down(dropout(activation(up(x))))
    return ops.ffn(x, up.weight, up.bias, down.weight, down.bias, activation=name)


def _same_dtype(x: Tensor, *modules: nn.Module) -> bool:
    return autocast_is_on(x) or all(m.weight.dtype == x.dtype for m in modules)


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` on `llmfast.linear` and `llmfast.scaled_dot_product_attention`.

    Masks are read as they are: padding masks are not expanded to heads and queries, nor boolean masks turned into
    numbers. ``is_causal=True`` is believed, and `attn_mask` not read.

    The attention weights are never in memory, so a call with ``need_weights=True`` (torch's default) is torch's own,
    counted; pass ``need_weights=False``. Dropout of attention weights, in training, leaves attention to torch, counted;
    the projections stay native.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(query, Proxy):
            masks = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            if (call := call_in_graph(self, query, key, value, *masks)) is not None:
                return call
        if need_weights:
            backend.count_fallback("MultiheadAttention", "need_weights=True")
        elif not left_to_torch("MultiheadAttention", query, key, value, self.in_proj_weight, self.out_proj.weight):
            if self._arguments_fit(query, key, value, key_padding_mask, attn_mask, is_causal):
                return self._attend(query, key, value, key_padding_mask, attn_mask, is_causal), None
            backend.count_fallback("MultiheadAttention", "arguments that do not fit")
        return super().forward(
            query,
            key,
            value,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )

    def _arguments_fit(self, query, key, value, key_padding_mask, attn_mask, is_causal) -> bool:
        if not (isinstance(key, Tensor) and isinstance(value, Tensor) and query.dim() in (2, 3)):
            return False
        if not query.dim() == key.dim() == value.dim() or key.shape[:-1] != value.shape[:-1]:
            return False
        if (query.shape[-1], key.shape[-1], value.shape[-1]) != (self.embed_dim, self.kdim, self.vdim):
            return False
        same_dtype = query.dtype == key.dtype == value.dtype == self.out_proj.weight.dtype
        if not (same_dtype or autocast_is_on(query)):
            return False
        B, L, S = _sizes(query, key, self.batch_first)
        if query.dim() == 3 and key.shape[0 if self.batch_first else 1] != B:
            return False
        for mask in (key_padding_mask, attn_mask):
            if mask is not None and not (mask.dtype == torch.bool or mask.is_floating_point()):
                return False
        if key_padding_mask is not None and key_padding_mask.shape != ((B, S) if query.dim() == 3 else (S,)):
            return False
        if attn_mask is None:
            return not is_causal
        # Not `in`: with symbolic sizes, torch.compile traces that to False.
        return attn_mask.shape == (L, S) or attn_mask.shape == (B * self.num_heads, L, S)

    def _attend(self, query, key, value, key_padding_mask, attn_mask, is_causal) -> Tensor:
        tokens = -2 if self.batch_first or query.dim() == 2 else 0
        B, L, S = _sizes(query, key, self.batch_first)
        q, k, v = self._project(query, key, value)
        extra = 0
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (_append(t, b.to(t.dtype), tokens) for t, b in ((k, self.bias_k), (v, self.bias_v)))
            extra += 1
        if self.add_zero_attn:
            k, v = (_append(t, t.new_zeros(1, 1, self.embed_dim), tokens) for t in (k, v))
            extra += 1
        dropout_p = self.dropout if self.training else 0.0
        q, k, v = (self._heads(t) for t in (q, k, v))
        if is_causal and key_padding_mask is not None and L == S and not extra and not dropout_p:
            mask, _ = self._mask(q, key_padding_mask, None, False, B, L, S, 0)
            out = ops.attention(q, k, v, causal=True, mask=mask)
        else:
            mask, is_causal = self._mask(q, key_padding_mask, attn_mask, is_causal, B, L, S, extra)
            out = ops.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)
        out = out.permute(2, 0, 1, 3) if tokens == 0 else out.transpose(1, 2)
        out = out.flatten(2) if query.dim() == 3 else out.flatten(2)[0]
        return ops.linear(out, self.out_proj.weight, self.out_proj.bias)

    def attend_packed(self, x: Tensor, bounds: Tensor) -> Tensor:
        """Self-attention of sequences that lie one after another in ``x [tokens, E]``; `bounds` as `cu_seqlens`."""
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)) for t in self._project(x, x, x))
        out = ops.varlen_attention(q, k, v, bounds, bounds)
        return ops.linear(out.flatten(1), self.out_proj.weight, self.out_proj.bias)

    def _project(self, query, key, value) -> tuple[Tensor, Tensor, Tensor]:
        """The input projections, in one product where inputs are the same tensor."""
        bias = self.in_proj_bias
        if self._qkv_same_embed_dim and query is key and key is value:
            return ops.linear(query, self.in_proj_weight, bias).chunk(3, dim=-1)
        b_q, b_k, b_v = (None, None, None) if bias is None else bias.chunk(3)
        if not self._qkv_same_embed_dim:
            w_q, w_k, w_v = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            return ops.linear(query, w_q, b_q), ops.linear(key, w_k, b_k), ops.linear(value, w_v, b_v)
        E = self.embed_dim
        q = ops.linear(query, self.in_proj_weight[:E], b_q)
        if key is value:
            kv = ops.linear(key, self.in_proj_weight[E:], None if bias is None else bias[E:])
            return q, *kv.chunk(2, dim=-1)
        k = ops.linear(key, self.in_proj_weight[E : 2 * E], b_k)
        return q, k, ops.linear(value, self.in_proj_weight[2 * E :], b_v)

    def _heads(self, x: Tensor) -> Tensor:
        """``[B, L, E]``, ``[L, B, E]`` or ``[L, E]`` as ``[B, H, L, D]``, a view."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if x.dim() == 3:
            return x.transpose(0, 1)[None]
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _mask(self, q, key_padding_mask, attn_mask, is_causal, B, L, S, extra) -> tuple[Tensor | None, bool]:
        """(mask in the sense of SDPA, broadcastable to [B, H, L, S + extra]; whether to mask causally instead)"""
        if is_causal and key_padding_mask is None:
            return None, True
        masks = []
        if attn_mask is not None:
            masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.view(B, self.num_heads, L, S))
        if key_padding_mask is not None:
            masks.append(key_padding_mask.view(B, 1, 1, S))
        if extra:
            masks = [F.pad(m, (0, extra)) for m in masks]
        if not masks:
            return None, False
        if all(m.dtype == torch.bool for m in masks):
            hidden = masks[0] if len(masks) == 1 else masks[0] | masks[1]
            return ~hidden, False
        masks = [m if m.is_floating_point() else _additive(m, q.dtype) for m in masks]
        return masks[0] if len(masks) == 1 else masks[0] + masks[1], False


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, -torch.inf)


def _append(x: Tensor, token: Tensor, tokens: int) -> Tensor:
    """x with one more token, ``[1, 1, E]``, along dimension `tokens`."""
    shape = list(x.shape)
    shape[tokens] = 1
    return torch.cat((x, token.expand(shape) if x.dim() == 3 else token[0]), dim=tokens)


def _sizes(query: Tensor, key: Tensor, batch_first: bool) -> tuple[int, int, int]:
    """(B, L, S)"""
    if query.dim() == 2:
        return 1, query.shape[0], key.shape[0]
    if batch_first:
        return query.shape[0], query.shape[1], key.shape[1]
    return query.shape[1], query.shape[0], key.shape[0]


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` with attention, residual sums with their norms, and feed-forward as llmfast's ops.

    Sub-modules are llmfast's, too. Where one was replaced (by an adapter, say) or has hooks, it is called as torch would
    call it, and the rest stays fused. The nested tensors that `torch.nn.TransformerEncoder` makes of padded batches (eval,
    without gradients) run as packed sequences. With dropout in training, feed-forward runs in separate ops, and the
    product of attention weights and values in torch (counted).
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        adopt(self.self_attn, MultiheadAttention)
        for linear in (self.linear1, self.linear2):
            adopt(linear, Linear)
        for norm in (self.norm1, self.norm2):
            adopt(norm, LayerNorm)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if isinstance(src, Proxy):
            call = call_in_graph(self, src, src_mask, src_key_padding_mask, is_causal)
            if call is not None:
                return call
        if self._takes_packed(src, src_mask, src_key_padding_mask):
            return self._forward_packed(src)
        if left_to_torch("TransformerEncoderLayer", src):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        return self._blocks(src, lambda x: self._sa_block(x, src_mask, src_key_padding_mask, is_causal))

    def _blocks(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        if self.norm_first:
            normed, x = _residual_norm(self.norm2, attend(self.norm1(x)), x)
            return x + self._ff_block(normed)
        x, _ = _residual_norm(self.norm1, attend(x), x)
        return _residual_norm(self.norm2, self._ff_block(x), x)[0]

    def _takes_packed(self, src, src_mask, src_key_padding_mask) -> bool:
        """A nested tensor is what `torch.nn.TransformerEncoder` makes of a padded batch in its fast path."""
        if not (isinstance(src, Tensor) and src.is_nested and src.layout == torch.strided and src.is_cpu):
            return False
        idle = not self.self_attn.training or self.self_attn.dropout == 0.0
        native = idle and src.dtype in FLOATING and src.dim() == 3 and src.size(2) == self.self_attn.embed_dim
        return (
            native and src_mask is None and src_key_padding_mask is None and type(self.self_attn) is MultiheadAttention
        )

    def _forward_packed(self, src: Tensor) -> Tensor:
        """Sequence after sequence, without padding."""
        sequences = src.unbind()
        lengths = [len(sequence) for sequence in sequences]
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        out = self._blocks(torch.cat(sequences), lambda x: self.dropout1(self.self_attn.attend_packed(x, bounds)))
        return torch.nested.as_nested_tensor(list(out.split(lengths)))

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout2(_feed_forward(x, self.linear1, self.activation, self.dropout, self.linear2))


def _residual_norm(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """(norm(residual + x), residual + x), in one pass where `norm` is a plain one."""
    plain = type(norm) in (nn.LayerNorm, LayerNorm, nn.RMSNorm, RMSNorm) and not is_hooked(norm)
    bias = getattr(norm, "bias", None)
    dtype = torch.promote_types(x.dtype, residual.dtype)
    if not plain or len(norm.normalized_shape) != 1 or residual.dtype != dtype or not _dtypes_fit(residual, norm):
        total = residual + x
        return norm(total), total
    if x.shape != residual.shape or x.shape[-1] != norm.normalized_shape[0]:
        total = residual + x
        return norm(total), total
    if left_to_torch(type(norm).__name__, x, norm.weight, bias):
        total = residual + x
        return norm(total), total
    return _add_norm(norm, x, residual, norm.weight, bias, dtype)


TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: LayerNorm,
    nn.Linear: Linear,
    nn.MultiheadAttention: MultiheadAttention,
    nn.RMSNorm: RMSNorm,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
}


def adopt(module: nn.Module, cls: type[nn.Module]) -> None:
    """Makes `module` an instance of `cls`, its twin in `TWINS` or back: the twins add methods only, so parameters, buffers,
    hooks and names stay, and nothing is initialised a second time."""
    module.__class__ = cls
