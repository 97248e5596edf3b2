"""Forward methods that stand in for those of transformers' modules, one for each kind of module.

Each is bound to an instance, reads that instance's own weights when it runs, and takes a module's submodules together
in one kernel only while those are what they were when patched: a LoRA adapter, a hook or another forward on one of them
turns the fused call back into the separate ones (`_plain`). Functions are called ``forward``, as what they replace, so
that pickling a patched model stores a plain one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import activations
from transformers.pytorch_utils import Conv1D
from transformers.utils.import_utils import is_tracing

from llmfast import ops
from llmfast.integrations.transformers.attention import attention_forward
from llmfast.integrations.transformers.compat import CACHE_NAMES, given_cache, with_cache
from llmfast.integrations.transformers.masks import Mask, MaskTensor, read
from llmfast.ops._native_op import is_plain, overrides_torch

__all__ = ["ACTIVATIONS", "REPLACEMENTS", "is_ours"]

_FLOATING = (torch.float32, torch.bfloat16, torch.float16)

ACTIVATIONS = {
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    activations.FastGELUActivation: "gelu_tanh",
    activations.ReLUSquaredActivation: "relu2",
    activations.SiLUActivation: "silu",
    nn.GELU: "gelu",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
}

REPLACEMENTS: dict[str, Callable] = {}  # by the name that the table in `families` uses


def _replacement(function: Callable) -> Callable:
    REPLACEMENTS[function.__name__] = function
    function.kind = function.__name__
    function.__name__ = "forward"
    return function


def is_ours(method: object) -> bool:
    return hasattr(getattr(method, "__func__", None), "kind")


def _plain(*modules: nn.Module) -> bool:
    """Whether calling each module would do nothing but our replacement of its forward."""
    for m in modules:
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return False
        if not is_ours(m.forward):
            return False
    return True


def _takes(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether the kernels take these; float64, quantized weights, DTensor and the like stay with torch."""
    return x.dtype in _FLOATING and not overrides_torch(x) and not any(overrides_torch(w) for w in weights)


def _unhooked(module: nn.Module) -> bool:
    return not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _activation(function: object) -> str | None:
    if type(function) is nn.GELU:
        return "gelu" if function.approximate == "none" else "gelu_tanh"
    return ACTIVATIONS.get(type(function))


# Linear layers


@_replacement
def linear(self: nn.Linear, input: Tensor) -> Tensor:
    weight, bias = self.weight, self.bias
    if not _takes(input, weight, bias):
        return nn.Linear.forward(self, input)
    return ops.linear(input, weight, bias)


@_replacement
def conv1d(self: Conv1D, x: Tensor) -> Tensor:
    weight, bias = self.weight, self.bias
    if not _takes(x, weight, bias):
        return Conv1D.forward(self, x)
    trains = torch.is_grad_enabled() and weight.requires_grad and x.is_cpu
    if not trains or not (is_plain(x) and is_plain(weight)) or torch.is_autocast_enabled(x.device.type):
        return ops.linear(x, _weight(self, x), bias)
    return _Conv1D.apply(x, weight, bias)


class _Conv1D(torch.autograd.Function):
    """``x @ weight + bias`` with weight ``[in, out]``; its gradient is made in that layout instead of transposed."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return ops.linear(x, weight.t(), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        backward = torch.ops.llmfast.linear_backward
        d_x, _, d_bias = backward(grad, x, weight.t(), need_x, False, need_bias)
        d_weight = None
        if need_weight:  # x^T grad is the weight's gradient of a product of x and grad in each other's places
            d_weight = backward(x, grad, weight, False, True, False)[1]
        return d_x if need_x else None, d_weight, d_bias if need_bias else None


# Norms


@_replacement
def layer_norm(self: nn.LayerNorm, input: Tensor) -> Tensor:
    if not _takes(input, self.weight, self.bias):
        return nn.LayerNorm.forward(self, input)
    return ops.add_layer_norm(input, None, self.weight, self.bias, self.eps)[0]


@_replacement
def rms_norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    return _rms_norm(self, "rms_norm", hidden_states)


@_replacement
def olmo_rms_norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    return _rms_norm(self, "olmo_rms_norm", hidden_states)


@_replacement
def t5_rms_norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    return _rms_norm(self, "t5_rms_norm", hidden_states)


@_replacement
def gemma_rms_norm(self: nn.Module, x: Tensor) -> Tensor:
    return _rms_norm(self, "gemma_rms_norm", x)


def _rms_norm(norm: nn.Module, kind: str, x: Tensor) -> Tensor:
    if not _takes(x, norm.weight):
        return type(norm).forward(norm, x)
    weight, eps, dtype = _rms_settings(norm, kind, x.dtype)
    return ops.add_rms_norm(x, None, weight, eps, out_dtype=dtype)[0]


def _rms_settings(norm: nn.Module, kind: str, dtype: torch.dtype) -> tuple[Tensor, float, torch.dtype]:
    """(weight, eps, dtype of the result) of an RMSNorm of input of `dtype`, as each architecture has it."""
    if kind == "gemma_rms_norm":
        return 1.0 + norm.weight.float(), norm.eps, dtype
    if kind == "olmo_rms_norm":
        return norm.weight, norm.variance_epsilon, dtype
    if kind == "t5_rms_norm":
        return norm.weight, norm.variance_epsilon, norm.weight.dtype
    return norm.weight, norm.variance_epsilon, torch.promote_types(dtype, norm.weight.dtype)


def _add_norm(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """``(norm(x + residual), x + residual)``."""
    dtype = torch.promote_types(x.dtype, residual.dtype)
    if dtype != residual.dtype or not _plain(norm) or not (_takes(x, norm.weight) and _takes(residual)):
        summed = residual + x
        return norm(summed), summed
    kind = norm.forward.__func__.kind
    if kind == "layer_norm":
        return ops.add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, out_dtype=dtype)
    weight, eps, out_dtype = _rms_settings(norm, kind, dtype)
    return ops.add_rms_norm(x, residual, weight, eps, out_dtype=out_dtype)


# Feed-forward networks


# Rows of x from which a GPU gets Conv1D's weight as a copy in the other layout: its kernels load 16 bytes along K and take
# anything else element by element, Hopper's not at all. The number is a guess that no device has confirmed.
COPIED_FROM_ROWS = 64


def _weight(layer: nn.Module, x: Tensor) -> Tensor:
    """``[out, in]``; of Conv1D, which has ``[in, out]``, a view that the processor's kernels take as it is."""
    if not isinstance(layer, Conv1D):
        return layer.weight
    weight = layer.weight.t()
    many = x.numel() >= COPIED_FROM_ROWS * x.shape[-1]
    return weight if x.is_cpu or not many else weight.contiguous()


def _two_layers(x: Tensor, up: nn.Module, activation: Callable, down: nn.Module) -> Tensor:
    """``down(activation(up(x)))``."""
    name = _activation(activation)
    if name is None or not _plain(up, down) or not _takes(x, up.weight, down.weight):
        return down(activation(up(x)))
    return ops.ffn(x, _weight(up, x), up.bias, _weight(down, x), down.bias, activation=name)


@_replacement
def gated_mlp(self: nn.Module, x: Tensor) -> Tensor:
    gate, up, down = self.gate_proj, self.up_proj, self.down_proj
    name = _activation(self.act_fn)
    fused = name is not None and _plain(gate, up, down) and _takes(x, gate.weight, up.weight, down.weight)
    if not fused or gate.bias is not None:
        return down(self.act_fn(gate(x)) * up(x))
    return ops.ffn(x, up.weight, up.bias, down.weight, down.bias, activation=name, gate_weight=gate.weight)


@_replacement
def phi3_mlp(self: nn.Module, hidden_states: Tensor) -> Tensor:
    both, down = self.gate_up_proj, self.down_proj
    name = _activation(self.activation_fn)
    if name is None or not _plain(both, down) or not _takes(hidden_states, both.weight, down.weight):
        gate, up = both(hidden_states).chunk(2, dim=-1)
        return down(up * self.activation_fn(gate))
    gate_weight, up_weight = both.weight.chunk(2)
    return ops.ffn(hidden_states, up_weight, None, down.weight, None, activation=name, gate_weight=gate_weight)


@_replacement
def gpt2_mlp(self: nn.Module, hidden_states: Tensor) -> Tensor:
    return self.dropout(_two_layers(hidden_states, self.c_fc, self.act, self.c_proj))


@_replacement
def gpt_neox_mlp(self: nn.Module, hidden_states: Tensor) -> Tensor:
    return _two_layers(hidden_states, self.dense_h_to_4h, self.act, self.dense_4h_to_h)


# Attention layers with rotary positions


def _rotated(q: Tensor, k: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    cos, sin = position_embeddings
    return ops.rotary(q, k, cos, sin, rotary_dim=cos.shape[-1])


def _attend(self: nn.Module, q, k, v, attention_mask, cache, softcap=None, **kwargs) -> Tensor:
    """``[B, Tq, Hq * D]`` on top of the cache."""
    if cache is not None:
        k, v = cache.update(k, v, self.layer_idx)
    dropout = self.attention_dropout if self.training else 0.0
    out, _ = attention_forward(
        self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, softcap=softcap, **kwargs
    )
    return out.flatten(2)


def _runs_elsewhere(self: nn.Module, hidden_states: Tensor) -> bool:
    """Another attention implementation was chosen since the patch, or the kernels do not take these tensors."""
    return self.config._attn_implementation != "llmfast" or not _takes(hidden_states)


@_replacement
def rotary_attention(
    self: nn.Module, hidden_states, position_embeddings=None, attention_mask=None, cache=None, **kwargs
):
    """Llama, Mistral, Qwen 2 and 3, Gemma 3, SmolLM 3: four projections, perhaps norms of queries and keys."""
    return _rotary_attention(self, hidden_states, position_embeddings, attention_mask, cache, **kwargs)


@_replacement
def capped_rotary_attention(
    self: nn.Module, hidden_states, position_embeddings=None, attention_mask=None, cache=None, **kwargs
):
    """Gemma 2: the same with soft-capped scores."""
    kwargs["softcap"] = self.attn_logit_softcapping
    return _rotary_attention(self, hidden_states, position_embeddings, attention_mask, cache, **kwargs)


def _rotary_attention(self, hidden_states, position_embeddings, attention_mask, cache=None, **kwargs):
    cache = given_cache(cache, kwargs)
    if _runs_elsewhere(self, hidden_states):
        kwargs.pop("softcap", None)
        return type(self).forward(self, hidden_states, position_embeddings, attention_mask, cache, **kwargs)
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    q = self.q_proj(hidden_states).view(shape)
    k = self.k_proj(hidden_states).view(shape)
    v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
    if hasattr(self, "q_norm"):
        q, k = self.q_norm(q), self.k_norm(k)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    if getattr(self, "use_rope", True):
        q, k = _rotated(q, k, position_embeddings)
    return self.o_proj(_attend(self, q, k, v, attention_mask, cache, **kwargs)), None


@_replacement
def phi3_attention(self: nn.Module, hidden_states, position_embeddings=None, attention_mask=None, cache=None, **kwargs):
    cache = given_cache(cache, kwargs)
    if _runs_elsewhere(self, hidden_states):
        return type(self).forward(self, hidden_states, position_embeddings, attention_mask, cache, **kwargs)
    heads, kv_heads = self.config.num_attention_heads, self.num_key_value_heads
    qkv = self.qkv_proj(hidden_states).view(*hidden_states.shape[:-1], -1, self.head_dim)
    q, k, v = (t.transpose(1, 2) for t in qkv.split((heads, kv_heads, kv_heads), dim=2))
    q, k = _rotated(q, k, position_embeddings)
    return self.o_proj(_attend(self, q, k, v, attention_mask, cache, **kwargs)), None


@_replacement
def gpt_neox_attention(
    self: nn.Module, hidden_states, attention_mask=None, cache=None, position_embeddings=None, **kwargs
):
    cache = given_cache(cache, kwargs)
    if _runs_elsewhere(self, hidden_states):
        return type(self).forward(self, hidden_states, attention_mask, cache, position_embeddings, **kwargs)
    qkv = self.query_key_value(hidden_states).view(*hidden_states.shape[:-1], -1, 3 * self.head_size)
    q, k, v = qkv.transpose(1, 2).chunk(3, dim=-1)
    q, k = _rotated(q, k, position_embeddings)
    return self.dense(_attend(self, q, k, v, attention_mask, cache, **kwargs)), None


# Blocks: the first residual sum goes into the norm that follows it


def _as_written(self: nn.Module) -> bool:
    """Gradient checkpointing lives in the class's own forward."""
    return self.gradient_checkpointing and self.training


@_replacement
def pre_norm_block(
    self: nn.Module,
    hidden_states,
    attention_mask=None,
    position_ids=None,
    cache=None,
    use_cache=False,
    position_embeddings=None,
    **kwargs,
):
    cache = given_cache(cache, kwargs)
    kwargs.update(
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
    )
    if _as_written(self):
        return type(self).forward(self, hidden_states, **with_cache(self, cache), **kwargs)
    residual = hidden_states
    hidden_states, _ = self.self_attn(
        hidden_states=self.input_layernorm(hidden_states), **with_cache(self.self_attn, cache), **kwargs
    )
    if hasattr(self, "resid_attn_dropout"):
        hidden_states = self.resid_attn_dropout(hidden_states)
    hidden_states, residual = _add_norm(self.post_attention_layernorm, hidden_states, residual)
    hidden_states = self.mlp(hidden_states)
    if hasattr(self, "resid_mlp_dropout"):
        hidden_states = self.resid_mlp_dropout(hidden_states)
    return residual + hidden_states


@_replacement
def gemma_block(
    self: nn.Module,
    hidden_states,
    position_embeddings=None,
    attention_mask=None,
    position_ids=None,
    cache=None,
    **kwargs,
):
    cache = given_cache(cache, kwargs)
    kwargs.update(
        position_embeddings=position_embeddings,
        attention_mask=attention_mask,
        position_ids=position_ids,
    )
    if _as_written(self):
        return type(self).forward(self, hidden_states, **with_cache(self, cache), **kwargs)
    residual = hidden_states
    hidden_states, _ = self.self_attn(
        hidden_states=self.input_layernorm(hidden_states), **with_cache(self.self_attn, cache), **kwargs
    )
    hidden_states = self.post_attention_layernorm(hidden_states)
    hidden_states, residual = _add_norm(self.pre_feedforward_layernorm, hidden_states, residual)
    return residual + self.post_feedforward_layernorm(self.mlp(hidden_states))


@_replacement
def gpt2_block(
    self: nn.Module,
    hidden_states,
    cache=None,
    attention_mask=None,
    encoder_hidden_states=None,
    encoder_attention_mask=None,
    use_cache=False,
    **kwargs,
):
    cache = given_cache(cache, kwargs)
    kwargs.update(attention_mask=attention_mask, use_cache=use_cache)
    if encoder_hidden_states is not None or _as_written(self):
        kwargs.update(encoder_hidden_states=encoder_hidden_states, encoder_attention_mask=encoder_attention_mask)
        return type(self).forward(self, hidden_states, **with_cache(self, cache), **kwargs)
    attention, _ = self.attn(self.ln_1(hidden_states), **with_cache(self.attn, cache), **kwargs)
    normed, residual = _add_norm(self.ln_2, attention, hidden_states)
    return residual + self.mlp(normed)


@_replacement
def opt_block(
    self: nn.Module,
    hidden_states,
    attention_mask=None,
    cache=None,
    use_cache=False,
    position_ids=None,
    **kwargs,
):
    cache = given_cache(cache, kwargs)
    kwargs.update(attention_mask=attention_mask, position_ids=position_ids)
    if _as_written(self):
        return type(self).forward(self, hidden_states, use_cache=use_cache, **with_cache(self, cache), **kwargs)
    before = self.do_layer_norm_before
    residual = hidden_states
    if before:
        hidden_states = self.self_attn_layer_norm(hidden_states)
    hidden_states, _ = self.self_attn(hidden_states=hidden_states, **with_cache(self.self_attn, cache), **kwargs)
    hidden_states = nn.functional.dropout(hidden_states, self.dropout, self.training)
    norm = self.final_layer_norm if before else self.self_attn_layer_norm
    hidden_states, summed = _add_norm(norm, hidden_states, residual)
    residual = summed if before else hidden_states
    hidden_states = _two_layers(hidden_states, self.fc1, self.activation_fn, self.fc2)
    hidden_states = nn.functional.dropout(hidden_states, self.dropout, self.training)
    return residual + hidden_states if before else _add_norm(self.final_layer_norm, hidden_states, residual)[0]


@_replacement
def bert_output(self: nn.Module, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    """The end of both halves of a BERT layer: ``LayerNorm(dropout(dense(x)) + input)``."""
    return _add_norm(self.LayerNorm, self.dropout(self.dense(hidden_states)), input_tensor)[0]


@_replacement
def bert_feed_forward(self: nn.Module, attention_output: Tensor) -> Tensor:
    intermediate, output = self.intermediate, self.output
    if not (_unhooked(intermediate) and _plain(output)):
        return output(intermediate(attention_output), attention_output)
    x = _two_layers(attention_output, intermediate.dense, intermediate.intermediate_act_fn, output.dense)
    return _add_norm(output.LayerNorm, output.dropout(x), attention_output)[0]


bert_feed_forward.__name__ = "feed_forward_chunk"


_WORTH_SKIPPING = 0.95  # share of the tokens that are there, above which the padding is computed with them


@_replacement
def bert_encoder(self: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None = None, *args, **kwargs):
    """All layers on the tokens that are there, as one stream of packed sequences; the padding's results are zeros."""
    whole = type(self).forward
    present = None
    if not (self.training or any(x is not None for x in args) or kwargs.get("encoder_hidden_states") is not None):
        present = _present(self, hidden_states, attention_mask, kwargs)
    if present is None:
        return whole(self, hidden_states, attention_mask, *args, **kwargs)
    places = present.flatten().nonzero()[:, 0]
    bounds = F.pad(present.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    stream = hidden_states.flatten(0, 1)[places][None]
    out = whole(self, stream, None, *args, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, **kwargs)
    found = out.last_hidden_state[0]
    padded = found.new_zeros(present.numel(), found.shape[-1]).index_copy(0, places, found)
    out.last_hidden_state = padded.view(*present.shape, -1)
    return out


def _present(encoder: nn.Module, x: Tensor, mask: Tensor | None, kwargs: dict) -> Tensor | None:
    """Which tokens are there, ``[B, T]``, if that is all that `mask` says and nobody looks at what is between the layers."""
    if type(mask) is not MaskTensor or torch.compiler.is_compiling() or is_tracing(x):
        return None
    present = read(mask, False).visible
    if present is None or mask.mask != Mask(False, visible=present) or present.dtype != torch.bool:
        return None
    if present.shape != (x.shape[0], 1, 1, x.shape[1]):  # a mask of each query's own
        return None
    if encoder.config.chunk_size_feed_forward or not all(_unhooked(m) for m in encoder.layer.modules()):
        return None
    if kwargs.get("cu_seq_lens_q") is not None or any(kwargs.get(name) is not None for name in CACHE_NAMES):
        return None
    return present[:, 0, 0] if 0 < int(present.sum()) <= _WORTH_SKIPPING * present.numel() else None
