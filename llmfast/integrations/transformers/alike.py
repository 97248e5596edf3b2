"""Which replacement stands in for a class without a row in `families`: the one of a class with the same code.

transformers writes each architecture out whole, so that dozens of them have Llama's norm, feed-forward network,
attention or block under another name. A class counts as such only if its forward method compiles to the same bytecode,
names and constants, the functions that it calls do too (a rotary embedding of neighbouring pairs is another function),
and the instance has none of the attributes by which a replacement tells its variants apart.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from importlib import import_module
from types import FunctionType

from torch import nn

__all__ = ["kind_of"]

_REFERENCES = {  # kind: classes, all in transformers.models
    "rms_norm": ("llama.modeling_llama.LlamaRMSNorm",),
    "olmo_rms_norm": ("olmo2.modeling_olmo2.Olmo2RMSNorm",),
    "gemma_rms_norm": ("gemma2.modeling_gemma2.Gemma2RMSNorm",),
    "t5_rms_norm": ("t5.modeling_t5.T5LayerNorm",),
    "gated_mlp": ("llama.modeling_llama.LlamaMLP",),
    "rotary_attention": (
        "llama.modeling_llama.LlamaAttention",
        "mistral.modeling_mistral.MistralAttention",
        "qwen2.modeling_qwen2.Qwen2Attention",
        "qwen3.modeling_qwen3.Qwen3Attention",
    ),
    "pre_norm_block": ("llama.modeling_llama.LlamaDecoderLayer",),
}
# Methods that a forward calls on itself, and attributes that change what a replacement does.
_METHODS = ("_norm",)
_VARIANTS = ("q_norm", "k_norm", "use_rope", "resid_attn_dropout", "resid_mlp_dropout")
_ANY = ("eager_attention_forward",)  # never called: the replacement runs under the implementation "llmfast" alone


def kind_of(module: nn.Module) -> str | None:
    """The replacement for `module`, by its class's code; None if there is none."""
    kind = type(module)
    if not kind.__module__.startswith("transformers."):
        return None
    found = _kind_of_class(kind)
    if found is None or any(hasattr(module, name) and name not in _names(kind.forward) for name in _VARIANTS):
        return None
    return found


@functools.cache
def _kind_of_class(kind: type[nn.Module]) -> str | None:
    for name, references in _references().items():
        for reference in references:
            if _same(kind.forward, reference.forward) and all(_same_method(kind, reference, m) for m in _METHODS):
                return name
    return None


@functools.cache
def _references() -> dict[str, list[type[nn.Module]]]:
    found: dict[str, list[type[nn.Module]]] = {}
    for name, paths in _REFERENCES.items():
        for path in paths:
            module, kind = path.rsplit(".", 1)
            found.setdefault(name, []).append(getattr(import_module(f"transformers.models.{module}"), kind))
    return found


def _same_method(a: type, b: type, name: str) -> bool:
    if not hasattr(b, name):
        return True
    return hasattr(a, name) and _same(getattr(a, name), getattr(b, name))


def _same(a: Callable, b: Callable) -> bool:
    """Whether two functions do the same: code, defaults, and every global that they name."""
    a, b = inspect.unwrap(a), inspect.unwrap(b)
    if a is b:
        return True
    if not isinstance(a, FunctionType) or not isinstance(b, FunctionType):
        return False
    return _description(a) == _description(b) and all(
        _same(a.__globals__.get(name), b.__globals__.get(name)) for name in _names(a) - set(_ANY)
    )


def _description(function: FunctionType) -> tuple:
    code = function.__code__
    constants = tuple((type(c), None if c is function.__doc__ else c) for c in code.co_consts)
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return code.co_code, constants, code.co_names, arguments, code.co_flags, function.__defaults__, code.co_freevars


def _names(function: Callable) -> set[str]:
    return set(inspect.unwrap(function).__code__.co_names)
