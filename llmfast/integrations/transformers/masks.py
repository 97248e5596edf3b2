"""What transformers asks of a mask, handed to the attention function without a dense ``[B, 1, Tq, Tk]`` tensor.

transformers builds one mask per forward pass and hands it to every layer as an opaque 4-D tensor. Causality, a sliding
window and padding need no such table: the kernel takes the first two as numbers and padding as one row per sequence.
`build` says so in a `Mask`, inside a tensor that has the shape and dtype of eager attention's mask and no memory,
`MaskTensor`; `read` takes it out. Not every layer that is handed a mask calls the attention function with it: some have
attention of their own (BLOOM, Falcon, a part of GIT), some add columns or take rows away (DeepSeek-V4, Gemma 4). To
whatever else than `read` it is given, a `MaskTensor` is the mask that such code was written for, made at that moment.

Whatever is not recognised (chunks, blocks, a caller's own mask function) is built densely by transformers' own
`sdpa_mask`, which is always right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
    sliding_window_overlay,
)
from transformers.utils.import_utils import is_tracing

from llmfast.integrations.transformers.compat import closure, is_and, packed_pattern

__all__ = ["Mask", "MaskTensor", "build", "dense", "read", "same_segment"]

_SLIDING = sliding_window_overlay(1).__code__


class Mask(NamedTuple):
    """What a query may look at. `causal` is aligned bottom-right, on the first `keys` keys.

    window: a query sees itself and the window - 1 keys before it. keys: how many of the keys count (None: all).
    visible: bool, True where a query may look, or float, added to the scores; broadcasts to ``[B, Hq, Tq, keys]``.
    cu_seqlens: bounds of packed sequences in the B * T tokens.
    """

    causal: bool
    window: int | None = None
    keys: int | None = None
    visible: Tensor | None = None
    cu_seqlens: Tensor | None = None


class MaskTensor(Tensor):
    """A `Mask` in the place of the mask ``[B, 1, Tq, Tk]`` that eager attention adds to its scores.

    Shape, dtype and device are that mask's; every other use makes it. torch.compile, checkpointing and moves between
    devices keep the `Mask`.
    """

    mask: Mask

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _DESCRIBES:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        if function in _KEEPS:
            return args[0]
        if function is Tensor.to and not any(isinstance(given, Tensor) for given in args[1:]):
            like = torch.empty(0, dtype=args[0].dtype, device=args[0].device).to(*args[1:], **kwargs)
            if like.is_floating_point():
                return _present(_moved(args[0].mask, like.device), args[0].shape, like.dtype, like.device)
        plain_args, kwargs = tree_map_only(MaskTensor, _additive, (args, kwargs))
        result = function(*plain_args, **kwargs)
        if _writes(function.__name__) and type(args[0]) is MaskTensor:
            args[0].mask = Mask(False, visible=plain_args[0])
        return result


def _writes(name: str) -> bool:
    """Whether a method of that name changes its tensor: ``masked_fill_``, ``__setitem__``, ``__iadd__``."""
    return name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


_KEEPS = {Tensor.contiguous, Tensor.detach}
_DESCRIBES = {
    Tensor.device.__get__,
    Tensor.dim,
    Tensor.dtype.__get__,
    Tensor.grad.__get__,
    Tensor.grad_fn.__get__,
    Tensor.is_cpu.__get__,
    Tensor.is_cuda.__get__,
    Tensor.is_floating_point,
    Tensor.is_leaf.__get__,
    Tensor.is_sparse.__get__,
    Tensor.layout.__get__,
    Tensor.ndim.__get__,
    Tensor.numel,
    Tensor.requires_grad.__get__,
    Tensor.requires_grad.__set__,
    Tensor.shape.__get__,
    Tensor.size,
    Tensor.stride,
}


def _present(mask: Mask, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    # what reads it past __torch_function__ shall notice
    tensor = torch.full((), float("nan"), dtype=dtype, device=device).expand(shape)
    if type(tensor) is not Tensor:  # a fake tensor of torch.export, which cannot be another class too
        return _as_additive(mask, shape, dtype, tensor.device)
    tensor = tensor.as_subclass(MaskTensor)
    tensor.mask = mask
    return tensor


def _moved(mask: Mask, device: torch.device) -> Mask:
    parts = {name: getattr(mask, name) for name in ("visible", "cu_seqlens")}
    return mask._replace(**{name: None if part is None else part.to(device) for name, part in parts.items()})


def _additive(tensor: MaskTensor) -> Tensor:
    return _as_additive(tensor.mask, tensor.shape, tensor.dtype, tensor.device)


def _as_additive(mask: Mask, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `transformers.masking_utils.eager_mask` makes it."""
    B, _, Tq, Tk = shape
    keys = Tk if mask.keys is None else mask.keys
    visible = dense(mask, Tq, keys, device)
    if visible.is_floating_point():  # written into
        return visible
    if mask.cu_seqlens is not None:
        visible = visible & same_segment(mask.cu_seqlens, mask.cu_seqlens, B, Tq, Tk)
    visible = F.pad(visible, (0, Tk - keys)).expand(shape)
    return torch.where(visible, torch.zeros((), dtype=dtype, device=device), torch.finfo(dtype).min)


def build(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    config=None,
    **kwargs,
) -> Tensor | None:
    """transformers' mask interface; arguments as `transformers.masking_utils.sdpa_mask` has them."""
    asked = (batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask)
    shape = (batch_size, 1, q_length, kv_length)
    tracing = is_tracing(attention_mask)
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length]
        if not tracing and bool(padding.all()):
            padding = None

    if mask_function is bidirectional_mask_function:
        if padding is not None:
            return _present(Mask(False, visible=padding[:, None, None]), shape, dtype, device)
        if allow_is_bidirectional_skip:
            return None
    elif not use_vmap:
        found = None
        if allow_is_causal_skip:
            found = _causal(mask_function, local_size, config, tracing)
        elif not tracing and attention_mask is None:
            found = _packed(mask_function)
        keys = _aligned_keys(q_length, kv_length, q_offset, kv_offset, tracing)
        if found is not None and keys is not None:
            window, segments = found
            if segments is not None:
                bounds = _bounds(segments.expand(batch_size, -1))
                return _present(Mask(True, window, cu_seqlens=bounds), shape, dtype, device)
            if window is not None and not tracing and window >= keys:
                window = None
            visible = None if padding is None else padding[:, None, None, :keys]
            limit = None if keys == kv_length else keys
            return _present(Mask(True, window, limit, visible), shape, dtype, device)
    visible = sdpa_mask(*asked, local_size, allow_is_causal_skip=False, use_vmap=use_vmap, device=device)
    return _present(Mask(False, visible=visible), shape, dtype, device)


def read(mask: Tensor | None, causal: bool) -> Mask:
    """What `build` put into `mask`, or a caller's own mask; `causal` is what the layer is where there is no mask."""
    if mask is None:
        return Mask(causal)
    return mask.mask if type(mask) is MaskTensor else Mask(False, visible=mask)


def dense(mask: Mask, Tq: int, Tk: int, device: torch.device) -> Tensor | None:
    """The mask as one tensor ``[.., Tq, Tk]``, for code that knows nothing else; without `cu_seqlens`."""
    visible = mask.visible
    if not mask.causal and mask.window is None:
        return visible
    position = torch.arange(Tk - Tq, Tk, device=device)[:, None]
    key = torch.arange(Tk, device=device)
    band = key <= position
    if mask.window is not None:
        band = band & (key > position - mask.window)
    return band[None, None] if visible is None else visible & band


def _causal(mask_function: Callable, local_size: int | None, config, tracing: bool) -> tuple[int | None, None] | None:
    """(window, None) of a causal or sliding pattern without overlays; None for any other."""
    if mask_function is causal_mask_function:
        return None, None
    if tracing:  # closures cannot be read here; `local_size` is either a window or a chunk
        is_window = local_size is not None and local_size == getattr(config, "sliding_window", None)
        return (local_size, None) if is_window and getattr(config, "attention_chunk_size", None) is None else None
    if is_and(mask_function):
        functions = closure(mask_function)["mask_functions"]
        if len(functions) == 2 and functions[1] is causal_mask_function and functions[0].__code__ is _SLIDING:
            return closure(functions[0])["sliding_window"], None
    return None


def _packed(mask_function: Callable) -> tuple[int | None, Tensor] | None:
    """(window, segment of each token) of a causal or sliding pattern over packed sequences."""
    found = packed_pattern(mask_function)
    if found is None:
        return None
    pattern, segments = found
    inner = _causal(pattern, None, None, False)
    return None if inner is None else (inner[0], segments)


def _aligned_keys(q_length: int, kv_length: int, q_offset: int | Tensor, kv_offset: int, tracing: bool) -> int | None:
    """How many keys there are up to the last query's own; None if a tensor holds that number and may not be read.

    A static cache hands out all its slots, filled or not: only the first ones count."""
    if isinstance(q_offset, Tensor):
        if tracing or is_tracing(q_offset):
            return None
        q_offset = int(q_offset)
    keys = q_offset + q_length - kv_offset
    return keys if keys <= kv_length else None


def same_segment(bounds_q: Tensor, bounds_k: Tensor, B: int, Tq: int, Tk: int) -> Tensor:
    """Whether a query and a key belong to the same packed sequence: bool ``[B, 1, Tq, Tk]``."""
    segment_q, segment_k = _segments(bounds_q, B, Tq), _segments(bounds_k, B, Tk)
    return (segment_q[:, :, None] == segment_k[:, None, :])[:, None]


def _segments(bounds: Tensor, B: int, T: int) -> Tensor:
    """Which sequence each of the B * T tokens belongs to: ``[B, T]``."""
    return torch.bucketize(torch.arange(B * T, device=bounds.device), bounds[1:], right=True).view(B, T)


def _bounds(segments: Tensor) -> Tensor:
    """Sequence bounds from each token's segment ``[B, T]``; a sequence ends with its row."""
    B, T = segments.shape
    starts = torch.ones(B, T, dtype=torch.bool, device=segments.device)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    bounds = torch.cat([starts.flatten().nonzero()[:, 0], torch.tensor([B * T], device=segments.device)])
    return bounds.to(torch.int32)
