"""How an op is made known to torch: schema, implementation, fake kernel and gradient, each given once.

The same four functions serve four ways in:

* ``torch.compile`` (and any dispatch mode or tensor subclass) sees ``torch.ops.llmfast.<name>``;
* `torch.func` transforms see an ``autograd.Function`` in the form that they ask for; `torch.vmap` runs a loop;
* eager code that needs gradients goes through one ``autograd.Function`` built from the same gradient functions;
* eager code without gradients calls the implementation directly, which saves about four microseconds a call.

In front of all that, ops try ``whole_calls(tensor).<name>``: a whole call of the plainest kind (no transform or mode,
nothing to copy or to complain about) in native code, with `eager_function` where a gradient is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import ClassVar

import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from llmfast import backend

__all__ = [
    "NativeOp",
    "as_matrix",
    "autocast",
    "check_dtype",
    "check_floating",
    "check_shape",
    "check_tensor",
    "dense",
    "eager_function",
    "first_derivative",
    "is_plain",
    "overrides_torch",
    "stands_for_tensor",
    "whole_calls",
]

_is_compiling = torch.compiler.is_compiling
_is_autocast_enabled = torch.is_autocast_enabled
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms_active = torch._C._are_functorch_transforms_active
_is_tracing = torch._C._is_tracing
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_FLOATING = (torch.float32, torch.bfloat16, torch.float16)
_NO_TANGENT = "llmfast::{} has no forward-mode derivative, and was called with a tangent"


class NativeOp:
    """A callable op ``torch.ops.llmfast.<name>``.

    Args:
        schema: ``"name(Tensor x, ...) -> Tensor"`` in torch's schema language.
        run: implementation on the tensors of `devices`; allocates its outputs, which never alias inputs. On a GPU it is
            called where `llmfast.backend.why_not_native` has no objection.
        fake: the same on shapes and dtypes alone.
        setup_context: ``(ctx, inputs, output)``, saves what the gradient needs. Given together with `backward`.
        backward: ``(ctx, *grads) -> gradients of the inputs``; calls ops only, so that it can be traced.
        devices: torch's dispatch keys.
    """

    all: ClassVar[list[NativeOp]] = []

    def __init__(
        self,
        schema: str,
        run: Callable,
        fake: Callable,
        setup_context: Callable | None = None,
        backward: Callable | None = None,
        *,
        devices: Sequence[str] = ("CPU", "CUDA"),
    ) -> None:
        self.name = schema.split("(", 1)[0].strip()
        qualified = f"llmfast::{self.name}"
        torch.library.define(qualified, schema.split(self.name, 1)[1], tags=(torch.Tag.pt2_compliant_tag,))
        for device in devices:
            torch.library.impl(qualified, device, run)
        torch.library.register_fake(qualified, fake)
        self.run = run
        self._gradient = (setup_context, backward)
        self._transformed: type[torch.autograd.Function] | None = None
        self._function: type[torch.autograd.Function] | None = None
        if backward is not None:
            torch.library.register_autograd(qualified, backward, setup_context=setup_context)
            self._function = _autograd_function(self, setup_context, backward)
        self.op = getattr(torch.ops.llmfast, self.name).default
        self.all.append(self)

    def __call__(self, *args):
        if _is_compiling() or not _plain_eager(args) or any_lazy(args):
            if _transforms_active() and not _is_compiling():
                self._transformed = self._transformed or _functorch_function(self.name, self.op, *self._gradient)
                return self._transformed.apply(*args)
            _refuse_tangents(self.name, args)
            return self.op(*args)
        if self._function is not None and torch.is_grad_enabled() and _any_requires_grad(args):
            return self._function.apply(*args)
        return self.run(*args)


def _autograd_function(op: NativeOp, setup_context: Callable, backward: Callable):
    """The eager gradient. Forward with `ctx` costs 40 us a call less than torch's separate ``setup_context``; a second
    derivative, which no kernel has, is an error instead of a wrong number."""

    def forward(ctx, *args):
        output = op.run(*args)
        setup_context(ctx, args, output)
        return output

    return type(
        op.name,
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(first_derivative(backward))},
    )


def first_derivative(backward: Callable) -> Callable:
    """`once_differentiable`, whose wrapping costs 5 us a call, only where a graph of the backward pass is wanted."""
    guarded = once_differentiable(backward)

    def run(ctx, *grads):
        return (guarded if _is_compiling() or torch.is_grad_enabled() else backward)(ctx, *grads)

    return run


def eager_function(name: str, keep: Callable, native: Callable, backward: Callable) -> Callable:
    """The graph node of a whole native call, an ``autograd.Function`` that has nothing left to compute.

    Args:
        keep: ``(ctx, *inputs, computed) -> outputs``: saves what the gradient needs; `computed` is the list that native
            code returns, results first.
        native: ``(ctx, saved tensors, *grads) -> gradients``, or None where they are not plain.
        backward: the same for any gradients; calls ops.

    Returns:
        Its ``apply``, without the part written in Python, which only looks for what is not plain.
    """
    guarded = once_differentiable(lambda ctx, *grads: backward(ctx, ctx.saved_tensors, *grads))

    def run(ctx, *grads):
        if _is_compiling() or torch.is_grad_enabled():
            return guarded(ctx, *grads)
        saved = ctx.saved_tensors  # once: under torch.utils.checkpoint it can be had no second time
        if not (_dispatch_modes() or _transforms_active() or forward_ad._current_level >= 0):
            done = native(ctx, saved, *grads)
            if done is not None:
                return done
        return backward(ctx, saved, *grads)

    methods = {"forward": staticmethod(keep), "backward": staticmethod(run)}
    function = type(name, (torch.autograd.Function,), methods)
    return super(torch.autograd.Function, function).apply


def _functorch_function(name: str, op: Callable, setup_context: Callable | None, backward: Callable | None):
    """What `torch.func.grad`, `vmap` and their kin need, which `torch.library.register_autograd` does not give them."""

    def no_derivative(ctx, *grads):
        raise RuntimeError(f"llmfast::{name} has no derivative (a second derivative was asked for)")

    def no_tangent(ctx, *tangents):
        raise NotImplementedError(_NO_TANGENT.format(name))

    methods = {
        "forward": staticmethod(op),
        "setup_context": staticmethod(setup_context or (lambda ctx, inputs, output: None)),
        "backward": staticmethod(backward or no_derivative),
        "jvp": staticmethod(no_tangent),
        "generate_vmap_rule": True,
    }
    return type(name, (torch.autograd.Function,), methods)


def whole_calls(tensor: object) -> ModuleType | None:
    """The native module that takes `tensor`, if an op is called by plain eager code: no compiler, dispatch mode, functorch
    transform, autocast, forward-mode AD or `torch.jit.trace` is on. It may be handed anything, and answers None to what it
    leaves to Python.
    """
    if _is_compiling() or _dispatch_modes() or _transforms_active() or _is_any_autocast_enabled():
        return None
    if forward_ad._current_level >= 0 or _is_tracing():
        return None
    return backend.native_for(tensor)


def _plain_eager(args: Sequence) -> bool:
    """Whether a native function may be handed these arguments directly."""
    if _dispatch_modes() or _transforms_active() or forward_ad._current_level >= 0 or _is_tracing():
        return False
    for a in args:  # noqa: SIM110  # all() takes twice as long, and this runs for each block of each token
        if type(a) not in _PLAIN and isinstance(a, torch.Tensor):
            return False
    return True


def any_lazy(args: Sequence) -> bool:
    """Whether a tensor's memory is not what it stands for (``z.conj().imag``, a zero tensor of autograd's, what outlives
    `torch.func.vjp`, the batch of ``is_grads_batched``): torch's dispatcher then hands real ones on."""
    return any(isinstance(a, torch.Tensor) and _is_lazy(a) for a in args)


def _is_lazy(tensor: torch.Tensor) -> bool:
    return tensor.is_neg() or tensor._is_zerotensor() or _is_wrapped(tensor) or _is_legacy_batched(tensor)


def _refuse_tangents(name: str, args: Sequence) -> None:
    if _is_compiling() or forward_ad._current_level < 0:
        return
    if any(isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args):
        raise NotImplementedError(_NO_TANGENT.format(name))


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is one that eager code may look into: no compiler, mode or transform sees it."""
    return not torch.compiler.is_compiling() and _plain_eager((tensor,))


def overrides_torch(value: object) -> bool:
    """Whether `value` is of a class with its own idea of torch's functions, or wraps other tensors (DTensor, quantized
    weights). `torch.overrides.has_torch_function` also says yes to every tensor inside ``with torch.device(...)``."""
    if type(value) in _PLAIN or value is None:
        return False
    override = getattr(type(value), "__torch_function__", None)
    return override not in (None, torch._C._disabled_torch_function_impl) or hasattr(value, "__tensor_flatten__")


def stands_for_tensor(*values: object) -> bool:
    """Whether one of `values` is no tensor and yet takes part in torch's functions, as a `torch.fx.Proxy` does. An op then
    hands it the whole call (`torch.overrides.handle_torch_function`)."""
    return any(not isinstance(v, torch.Tensor) and hasattr(type(v), "__torch_function__") for v in values)


def _any_requires_grad(args: Sequence) -> bool:
    return any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)


def autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Casts floating tensors to the autocast dtype of their device while autocast is on there; else returns them."""
    device = next(t.device.type for t in tensors if t is not None)
    if device == "meta" or not _is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors)


def as_matrix(x: torch.Tensor) -> torch.Tensor:
    """``[..., K] -> [M, K]``: a view wherever strides allow one."""
    return x if x.dim() == 2 else x.flatten(0, -2) if x.dim() > 2 else x[None]


def dense(x: torch.Tensor) -> torch.Tensor:
    """`x.contiguous()`, which also gives an empty tensor the strides of its shape; torch leaves it whatever it has."""
    return x.contiguous() if x.numel() else x.new_empty(x.shape)


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"a tensor of layout {value.layout}"
        raise TypeError(f"{name}: got {kind}, expected a dense one")


def check_floating(name: str, tensor: torch.Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in _FLOATING:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected float32, bfloat16 or float16")


def check_dtype(name: str, tensor: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {like.dtype} as {like_name} has")
    if tensor.device != like.device:
        raise ValueError(f"{name}: got a tensor on {tensor.device}, expected {like.device} as {like_name} is")


def check_shape(name: str, tensor: torch.Tensor, expected: Sequence[int | str]) -> None:
    """`expected` holds sizes, or names for sizes that may be anything."""
    shape = tensor.shape
    if len(shape) != len(expected) or any(isinstance(e, int) and s != e for s, e in zip(shape, expected)):
        wanted = ", ".join(str(e) for e in expected) + ("," if len(expected) == 1 else "")
        raise ValueError(f"{name}: got shape {tuple(shape)}, expected ({wanted})")
