"""When a drop-in module leaves a call to torch's own."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.fx import Proxy

from llmfast import backend
from llmfast.ops._native_op import overrides_torch

FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def left_to_torch(op: str, x: torch.Tensor, *weights: torch.Tensor | None) -> bool:
    """Whether torch's own module has to compute `op`, counted. Its errors are torch's, too: anything odd goes there."""
    reason = _why_not_native(x, weights)
    if reason is not None:
        backend.count_fallback(op, reason)
    return reason is not None


def call_in_graph(module: torch.nn.Module, proxy: Proxy, *args) -> Proxy | None:
    """A call of `module` in the graph that `torch.fx` is making, which keeps modules of torch.nn whole and would take their
    twins apart. None if `module` is what is being traced."""
    tracer = proxy.tracer
    if tracer.root is module:
        return None
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (proxy, *args), {})


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_hooked(module: torch.nn.Module) -> bool:
    """By torch's hooks, or by a forward of its own, as accelerate's are."""
    return any(getattr(module, hooks) for hooks in HOOKS) or "forward" in module.__dict__


def autocast_is_on(x: torch.Tensor) -> bool:
    """For the device of `x`."""
    return not x.is_meta and torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type)


def _why_not_native(x, weights) -> str | None:
    if not isinstance(x, torch.Tensor):
        return "arguments that do not fit"
    if not x.is_cpu and (reason := backend.why_not_native(x.device)):
        return reason
    if x.dtype not in FLOATING:
        return f"dtype {x.dtype}"
    if x.is_nested:
        return "a nested tensor"
    if x.layout != torch.strided or any(w is not None and w.layout != torch.strided for w in weights):
        return "a sparse tensor"
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        return "forward-mode AD"
    if overrides_torch(x) or any(overrides_torch(w) for w in weights):
        return "a tensor subclass"
    return None
