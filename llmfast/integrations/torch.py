"""torch programs on llmfast's kernels, on and off by one line each: torch's own attention function, and its modules.

>>> llmfast.integrations.torch.enable_sdpa()          # from here on, in the whole process
>>> llmfast.integrations.torch.disable_sdpa()         # torch's own again
>>> with llmfast.integrations.torch.sdpa():           # or for a while
...     out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
>>> torch.nn.attention.activate_flash_attention_impl("llmfast")     # or torch's own switch for such providers
>>> torch.nn.attention.restore_flash_attention_impl()
>>> llmfast.integrations.torch.convert_modules(model)     # nn.Linear, LayerNorm, TransformerEncoderLayer ... of a model
>>> llmfast.integrations.torch.revert_modules(model)

How the attention switch works: SDPA picks one of torch's attention operators, and while the switch is on, the operator
has llmfast's function in torch's dispatcher instead of torch's. Everything above the operator stays torch's: which
operator is picked, autograd, autocast, functorch, `torch.compile`, export. A program compiled or exported with the switch
in one position runs with it in the other, and a forward pass may have its backward pass after the switch was turned. The
override keeps torch's own function and hands it what no kernel takes (float64), counted in ``llmfast.backend.info()``.

What never gets to the operator, because SDPA computes it in plain tensor operations: dropout, 3-D and 5-D inputs,
values with a head dim other than the queries', shapes to broadcast, a mask that requires a gradient, empty tensors, and
anything under ``sdpa_kernel(SDPBackend.MATH)``. `llmfast.scaled_dot_product_attention` takes most of these natively. The
inference fast path of `torch.nn.MultiheadAttention` and `TransformerEncoderLayer` (eval, no gradients, ``batch_first``)
does not call SDPA either; ``torch.backends.mha.set_fastpath_enabled(False)`` sends it there.

Importing this module registers the provider and activates nothing.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from llmfast import backend
from llmfast.nn.drop_in import TWINS, adopt
from llmfast.ops.attention import attention_backward_into, attention_into

__all__ = ["convert_modules", "disable_sdpa", "enable_sdpa", "revert_modules", "sdpa", "sdpa_enabled"]

_FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def enable_sdpa() -> None:
    """Runs `torch.nn.functional.scaled_dot_product_attention` on llmfast, in the whole process, until `disable_sdpa`.

    Calling it again changes nothing. Do it outside of compiled functions. The module's docstring says what gets there.

    Raises:
        ImportError: llmfast's compiled module is missing. RuntimeError: called while torch.compile traces.

    Example:
        >>> llmfast.integrations.torch.enable_sdpa()
        >>> out = F.scaled_dot_product_attention(q, k, v)
    """
    _switch.hold("enable_sdpa")


def disable_sdpa() -> None:
    """Takes `enable_sdpa` back; an enclosing `sdpa` block or an activated provider stays on. Without effect if off."""
    _switch.release("enable_sdpa")


@contextlib.contextmanager
def sdpa() -> Iterator[None]:
    """`enable_sdpa` for the length of a ``with`` block, or of a function that it decorates. Blocks nest.

    The switch belongs to the process: other threads' attention runs on llmfast meanwhile, too.

    Example:
        >>> with llmfast.integrations.torch.sdpa():
        ...     loss = model(inputs).sum()
    """
    holder = object()
    _switch.hold(holder)
    try:
        yield
    finally:
        _switch.release(holder)


def sdpa_enabled() -> bool:
    """Whether `torch.nn.functional.scaled_dot_product_attention` runs on llmfast now."""
    return _switch.library is not None


def convert_modules(model: torch.nn.Module) -> list[str]:
    """Turns the torch modules in `model` that have a twin in `llmfast.nn` into it, in place.

    These are exactly `torch.nn.Linear`, LayerNorm, RMSNorm, MultiheadAttention and TransformerEncoderLayer; subclasses
    stay what they are. Parameters, optimizer states, hooks, names and ``state_dict`` are not touched.

    Returns:
        Names of the modules that were converted, as in ``model.named_modules()``; empty the second time.

    Example:
        >>> model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(64, 4, batch_first=True), 2)
        >>> len(llmfast.integrations.torch.convert_modules(model))
        12
    """
    return _change_classes(model, TWINS)


def revert_modules(model: torch.nn.Module) -> list[str]:
    """Takes `convert_modules` back: every module of `llmfast.nn` that has a twin in torch becomes that one.

    Returns:
        Names of the modules that were changed.
    """
    return _change_classes(model, {ours: torchs for torchs, ours in TWINS.items()})


def _change_classes(model: torch.nn.Module, classes: dict[type, type]) -> list[str]:
    changed = []
    for name, module in model.named_modules():
        if type(module) in classes:
            adopt(module, classes[type(module)])
            changed.append(name)
    return changed


class _Override(NamedTuple):
    """One function of torch's dispatcher that is replaced: ``function(torchs_own, keyset, *args, **kwargs)``."""

    operator: str
    dispatch_key: str
    function: Callable


class _Switch:
    """Counts who wants the overrides: the first one installs them, the last one to leave takes them out."""

    def __init__(self, overrides: tuple[_Override, ...]) -> None:
        self.overrides = overrides
        self.holders: set[Any] = set()
        self.library: torch.library.Library | None = None
        self._lock = threading.Lock()

    def hold(self, holder: Any) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError("the switch of scaled_dot_product_attention cannot be turned inside a compiled function")
        backend.native()
        with self._lock:
            if not self.holders:
                self._install()
            self.holders.add(holder)

    def release(self, holder: Any) -> None:
        with self._lock:
            self.holders.discard(holder)
            if not self.holders and self.library is not None:
                self.library._destroy()
                self.library = None

    def _install(self) -> None:
        library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*[Oo]verrid(ing|den)")
            for operator, dispatch_key, function in self.overrides:
                own = torch.library.get_kernel(f"aten::{operator}", dispatch_key)
                library.impl(operator, functools.partial(function, own), dispatch_key, with_keyset=True)
        self.library = library


def _cpu_forward(own, keyset, query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    """(output, logsumexp) as torch's operator returns them: output with query's layout, logsumexp [B, H, L] over memory
    [B, L, H], 0 where a query sees nothing."""
    reason = _why_not_native(query, key, value, dropout_p)
    if reason:
        backend.count_fallback("torch SDPA", reason)
        return own.call_boxed(keyset, query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
    B, H, L, E = query.shape
    out = torch.empty_like(query)
    logsumexp = query.new_empty((B, L, H), dtype=torch.float32).transpose(1, 2)
    attention_into(out, logsumexp, query, key, value, attn_mask, *_options(query, key, is_causal, scale))
    if attn_mask is not None:
        logsumexp.masked_fill_(logsumexp == -math.inf, 0.0)
    return out, logsumexp


def _cpu_backward(
    own, keyset, grad, query, key, value, out, logsumexp, dropout_p, is_causal, *, attn_mask=None, scale=None
):
    """Gradients of query, key and value, each [B, H, T, E] over memory [B, T, H, E]."""
    reason = _why_not_native(query, key, value, dropout_p)
    if reason:
        backend.count_fallback("torch SDPA backward", reason)
        return own.call_boxed(
            keyset,
            grad,
            query,
            key,
            value,
            out,
            logsumexp,
            dropout_p,
            is_causal,
            attn_mask=attn_mask,
            scale=scale,
        )
    grads = tuple(torch.empty_permuted(t.shape, (0, 2, 1, 3), dtype=t.dtype) for t in (query, key, value))
    options = _options(query, key, is_causal, scale)
    attention_backward_into(*grads, grad, query, key, value, out, logsumexp, attn_mask, *options)
    return grads


def _why_not_native(query, key, value, dropout_p: float) -> str | None:
    """Most of this SDPA sees to before it calls the operator; a direct call of the operator may bring anything."""
    if query.dtype not in _FLOATING:
        return f"dtype {query.dtype}"
    if dropout_p != 0.0:
        return "dropout"
    if not query.dtype == key.dtype == value.dtype or not query.dim() == key.dim() == value.dim() == 4:
        return "arguments that do not fit"
    q, k, v = query.shape, key.shape, value.shape
    if k[2] != v[2]:  # not left to torch, which reads past the end
        raise ValueError(f"value: got {v[2]} tokens, expected {k[2]} as key has")
    if k != v or q[0] != k[0] or q[3] != k[3] or not k[1] or q[1] % k[1] or not q[3]:
        return "shapes that do not fit"
    return None if query.stride(3) == 1 else "a last dimension whose stride is not 1"


def _options(query, key, is_causal: bool, scale: float | None):
    """(left, right, scale, softcap) of llmfast's attention. Top-left causal: query i sees keys 0..i."""
    right = query.shape[2] - key.shape[2] if is_causal else None
    return None, right, 1 / math.sqrt(query.shape[3]) if scale is None else scale, 0.0


_switch = _Switch(
    (
        _Override("_scaled_dot_product_flash_attention_for_cpu", "CPU", _cpu_forward),
        _Override("_scaled_dot_product_flash_attention_for_cpu_backward", "CPU", _cpu_backward),
    )
)


class _Activation:
    """What `torch.nn.attention.activate_flash_attention_impl` keeps, to call `remove` when another takes over."""

    def __init__(self) -> None:
        _switch.hold(self)

    def remove(self) -> None:
        _switch.release(self)


if hasattr(torch.nn.attention, "register_flash_attention_impl"):
    torch.nn.attention.register_flash_attention_impl("llmfast", register_fn=_Activation)
