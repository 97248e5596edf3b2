"""What differs between the transformers 5.x that llmfast supports, found by looking for it, under one name each.

=====  ============================  ==================================================================================
since  name here                     before
=====  ============================  ==================================================================================
5.4    `require_supported`           layers took a `cache_position` in the midst of their arguments, static caches and
                                     masks needed it, and blocks returned tuples: not supported
5.23   `packed_pattern`              packed sequences were an overlay on the causal or sliding pattern, not on that
                                     pattern in positions that start again; in either order
5.24   `given_cache`, `with_cache`   a layer's cache was `past_key_values`, in GPT-NeoX `layer_past`
=====  ============================  ==================================================================================
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import transformers
from torch import Tensor, nn
from transformers import masking_utils
from transformers.masking_utils import and_masks, packed_sequence_mask_function

__all__ = ["CACHE_NAMES", "closure", "given_cache", "is_and", "packed_pattern", "require_supported", "with_cache"]

_AND = and_masks().__code__
_PACKED = packed_sequence_mask_function(None).__code__
_remap = getattr(masking_utils, "remap_positions_for_packed_sequence", None)
_REMAPPED = _remap and _remap(None, None).__code__


def require_supported() -> None:
    """Raises ImportError: the installed transformers is older than 5.4."""
    if "cache_position" in inspect.signature(masking_utils.sdpa_mask).parameters:
        raise ImportError(f"transformers: got version {transformers.__version__}, expected 5.4 or later")


def closure(function: Callable) -> dict:
    """What an inner function has from the function around it, by name."""
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__)))


def is_and(mask_function: Callable) -> bool:
    """Whether it is made by transformers' `and_masks`."""
    return mask_function.__code__ is _AND


def packed_pattern(mask_function: Callable) -> tuple[Callable, Tensor] | None:
    """(pattern within a sequence, sequence of each token ``[B, T]``) of a mask over packed sequences; None for others."""
    if not is_and(mask_function):
        return None
    functions = closure(mask_function)["mask_functions"]
    packed = [f for f in functions if f.__code__ is _PACKED]
    others = [f for f in functions if f.__code__ is not _PACKED]
    if len(packed) != 1 or len(others) != 1:
        return None
    pattern = others[0]
    if _REMAPPED is not None:
        if pattern.__code__ is not _REMAPPED:
            return None
        pattern = closure(pattern)["mask_function"]
    return pattern, closure(packed[0])["packed_sequence_mask"]


CACHE_NAMES = ("cache", "past_key_values", "layer_past")
_cache_name_of: dict[type[nn.Module], str | None] = {}


def given_cache(cache: object, kwargs: dict) -> object:
    """The cache of a call: `cache`, or what `kwargs` hold under another version's name for it, which is taken out."""
    for name in CACHE_NAMES:
        other = kwargs.pop(name, None)
        cache = other if cache is None else cache
    return cache


def with_cache(module: nn.Module, cache: object) -> dict:
    """The keyword that hands `cache` to a module, ours or transformers' own; nothing if an encoder's takes none."""
    kind = type(module)
    if kind not in _cache_name_of:
        parameters = inspect.signature(kind.forward).parameters
        _cache_name_of[kind] = next((name for name in CACHE_NAMES if name in parameters), None)
    name = _cache_name_of[kind]
    return {} if name is None else {name: cache}
