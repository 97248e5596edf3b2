"""What transformers asks of a mask, handed to the attention function without a dense ``[B, 1, Tq, Tk]`` tensor.

transformers builds one mask per forward pass and hands it to every layer as an opaque 4-D tensor. Causality, a sliding
window and padding need no such table: the kernel takes the first two as numbers and padding as one row per sequence.
`causal_mask` says so in tensors that no caller's own mask can be, and `read` takes them apart:

======  ===============================  ==============================================================================
dtype   shape                            meaning
======  ===============================  ==============================================================================
int8    ``[B or 0, 1 + window, Tq, n]``  causal, bottom-right aligned on the first n keys; the last dimension is 1 where
                                         a key may be seen, the first one empty if all may. window 0: no limit.
int32   ``[1, 1 + window, 1, S + 1]``    packed sequences: offsets of S sequences in the B * T tokens, each causal
bool    broadcasts to [B, Hq, Tq, Tk]    True where a query may look; nothing is implied
float   broadcasts to [B, Hq, Tq, Tk]    added to the scores; nothing is implied
======  ===============================  ==============================================================================

Dimensions 1 and 2 have stride 0: they carry numbers in a form that torch.compile, checkpointing and accelerate's moves
between devices keep. Sliced to the last queries (Gemma 4 does that), a mask is the mask of these. Whatever is not
recognised (chunks, blocks, a caller's own mask function) is built densely by transformers' own `sdpa_mask`, which is
always right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    eager_mask,
    prepare_padding_mask,
    sdpa_mask,
    sliding_window_overlay,
)
from transformers.utils.import_utils import is_tracing

from llmfast.integrations.transformers.compat import closure, is_and, packed_pattern

__all__ = ["Mask", "build", "dense", "read"]

_SLIDING = sliding_window_overlay(1).__code__
# Written for eager attention alone, which always has a dense additive mask: DeepSeek-V4's layers append columns to it,
# Gemma 4's audio encoder cuts it into blocks, GIT adds it to scores of its own, the others' causal layers do not say
# that they are causal.
_EAGER_ONLY = ("bigbird_pegasus", "deepseek_v4", "gemma4_audio", "git", "informer", "nllb-moe", "pegasus_x")


class Mask(NamedTuple):
    """A mask taken apart. `keys`: how many of the keys count (None: all); `visible`: bool or float, broadcastable."""

    causal: bool
    window: int | None = None
    keys: int | None = None
    visible: Tensor | None = None
    cu_seqlens: Tensor | None = None


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
    config=None,
    **kwargs,
) -> Tensor | None:
    """transformers' mask interface; arguments as `transformers.masking_utils.sdpa_mask` has them."""
    asked = (batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask)
    if getattr(config, "model_type", None) in _EAGER_ONLY:
        skip = allow_is_bidirectional_skip
        return eager_mask(*asked, allow_is_bidirectional_skip=skip, use_vmap=use_vmap, device=device, **kwargs)
    tracing = is_tracing(attention_mask)
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length]
        if not tracing and bool(padding.all()):
            padding = None

    if mask_function is bidirectional_mask_function:
        if padding is not None:
            return padding[:, None, None, :].expand(-1, -1, q_length, -1)
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
                return _pack(window, segments.expand(batch_size, -1))
            if not tracing and window >= keys:
                window = 0
            if padding is not None:
                return _band(window, q_length, padding[:, :keys])
            if window or keys != kv_length:
                return _band(window, q_length, torch.empty(0, keys, dtype=torch.bool, device=device))
            return None
    return sdpa_mask(*asked, local_size, allow_is_causal_skip=False, use_vmap=use_vmap, device=device)


def read(mask: Tensor | None, causal: bool) -> Mask:
    """Takes apart what `build` or a caller made; `causal` is what the layer is where there is no mask."""
    if mask is None:
        return Mask(causal)
    if mask.dtype == torch.int8:
        visible = mask[:, :1, :1].view(torch.bool) if mask.shape[0] else None
        return Mask(True, mask.shape[1] - 1 or None, mask.shape[3], visible)
    if mask.dtype == torch.int32:
        return Mask(True, mask.shape[1] - 1 or None, cu_seqlens=mask[0, 0, 0])
    return Mask(False, visible=mask)


def dense(mask: Mask, Tq: int, Tk: int, device: torch.device) -> Tensor | None:
    """The mask as one tensor ``[.., Tq, Tk]``, for code that knows nothing else; no packed sequences."""
    visible = mask.visible
    if not mask.causal and mask.window is None:
        return visible
    position = torch.arange(Tk - Tq, Tk, device=device)[:, None]
    key = torch.arange(Tk, device=device)
    band = key <= position
    if mask.window is not None:
        band = band & (key > position - mask.window)
    return band[None, None] if visible is None else visible & band


def _causal(mask_function: Callable, local_size: int | None, config, tracing: bool) -> tuple[int, None] | None:
    """(window or 0, None) of a causal or sliding pattern without overlays; None for any other."""
    if mask_function is causal_mask_function:
        return 0, None
    if tracing:  # closures cannot be read here; `local_size` is either a window or a chunk
        is_window = local_size is not None and local_size == getattr(config, "sliding_window", None)
        return (local_size, None) if is_window and getattr(config, "attention_chunk_size", None) is None else None
    if is_and(mask_function):
        functions = closure(mask_function)["mask_functions"]
        if len(functions) == 2 and functions[1] is causal_mask_function and functions[0].__code__ is _SLIDING:
            return closure(functions[0])["sliding_window"], None
    return None


def _packed(mask_function: Callable) -> tuple[int, Tensor] | None:
    """(window or 0, segment of each token) of a causal or sliding pattern over packed sequences."""
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


def _band(window: int, q_length: int, visible: Tensor) -> Tensor:
    visible = visible.contiguous().view(torch.int8)
    return visible[:, None, None, :].expand(-1, 1 + window, q_length, -1)


def _pack(window: int, segments: Tensor) -> Tensor:
    """Sequence bounds from each token's segment ``[B, T]``; a sequence ends with its row."""
    B, T = segments.shape
    starts = torch.ones(B, T, dtype=torch.bool, device=segments.device)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    bounds = torch.cat([starts.flatten().nonzero()[:, 0], torch.tensor([B * T], device=segments.device)])
    return bounds.to(torch.int32).expand(1, 1 + window, 1, -1)
