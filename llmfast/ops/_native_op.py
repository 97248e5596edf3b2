"""How an op is made known to torch: schema, CPU implementation, fake kernel and gradient, each given once.

The same four functions serve three ways in:

* ``torch.compile`` (and any dispatch mode, tensor subclass or functorch transform) sees ``torch.ops.llmfast.<name>``;
* eager code that needs gradients goes through one ``autograd.Function`` built from the same gradient functions;
* eager code without gradients calls the implementation directly, which saves about four microseconds a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.autograd.function import once_differentiable

__all__ = ["NativeOp", "as_matrix", "autocast", "check_dtype", "check_floating", "check_shape", "check_tensor"]

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_FLOATING = (torch.float32, torch.bfloat16, torch.float16)


class NativeOp:
    """A callable op ``torch.ops.llmfast.<name>``.

    Args:
        schema: ``"name(Tensor x, ...) -> Tensor"`` in torch's schema language.
        cpu: implementation on CPU tensors; allocates its outputs, which never alias inputs.
        fake: the same on shapes and dtypes alone.
        setup_context: ``(ctx, inputs, output)``, saves what the gradient needs. Given together with `backward`.
        backward: ``(ctx, *grads) -> gradients of the inputs``; calls ops only, so that it can be traced.
    """

    def __init__(
        self,
        schema: str,
        cpu: Callable,
        fake: Callable,
        setup_context: Callable | None = None,
        backward: Callable | None = None,
    ) -> None:
        self.name = schema.split("(", 1)[0].strip()
        qualified = f"llmfast::{self.name}"
        torch.library.define(qualified, schema.split(self.name, 1)[1], tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(qualified, "CPU", cpu)
        torch.library.register_fake(qualified, fake)
        self._cpu = cpu
        self._function: type[torch.autograd.Function] | None = None
        if backward is not None:
            torch.library.register_autograd(qualified, backward, setup_context=setup_context)
            self._function = _autograd_function(self.name, cpu, setup_context, backward)
        self.op = getattr(torch.ops.llmfast, self.name).default

    def __call__(self, *args):
        if torch.compiler.is_compiling() or not _plain_eager(args):
            return self.op(*args)
        if self._function is not None and torch.is_grad_enabled() and _any_requires_grad(args):
            return self._function.apply(*args)
        return self._cpu(*args)


def _autograd_function(name: str, cpu: Callable, setup_context: Callable, backward: Callable):
    """The eager gradient. Forward with `ctx` costs 40 us a call less than torch's separate ``setup_context``; a second
    derivative, which no kernel has, is an error instead of a wrong number."""

    def forward(ctx, *args):
        output = cpu(*args)
        setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(backward))}
    return type(name, (torch.autograd.Function,), methods)


def _plain_eager(args: Sequence) -> bool:
    """Whether a native function may be handed these arguments directly."""
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    return all(type(a) in _PLAIN for a in args if isinstance(a, torch.Tensor))


def _any_requires_grad(args: Sequence) -> bool:
    return any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)


def autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Casts floating tensors to the autocast dtype of their device while autocast is on there; else returns them."""
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors)


def as_matrix(x: torch.Tensor) -> torch.Tensor:
    """``[..., K] -> [M, K]``: a view wherever strides allow one."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")


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
