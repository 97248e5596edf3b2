"""What differs between the transformers 5.x that llmfast supports, found by looking for it, under one name each.

=========================  ====================  =======================================================================
since                      name here             before
=========================  ====================  =======================================================================
5.4                        `sdpa_mask`,          the position of every query, a tensor `cache_position`, in place of
                           `mask_interface`      their number and the first one's (`q_length`, `q_offset`, `device`)
5.23                       `packed_pattern`      packed sequences are an overlay after the causal or sliding pattern,
                                                 not one before that pattern in positions that start again
5.24                       `given_cache`,        a layer's cache was `past_key_values`, in GPT-NeoX `layer_past`
                           `with_cache`
=========================  ====================  =======================================================================
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import masking_utils
from transformers.masking_utils import and_masks, packed_sequence_mask_function

__all__ = ["closure", "given_cache", "is_and", "mask_interface", "packed_pattern", "sdpa_mask", "with_cache"]

_BY_POSITIONS = "cache_position" in inspect.signature(masking_utils.sdpa_mask).parameters
_AND = and_masks().__code__
_PACKED = packed_sequence_mask_function(None).__code__
_remap = getattr(masking_utils, "remap_positions_for_packed_sequence", None)
_REMAPPED = _remap and _remap(None, None).__code__


def _sdpa_mask_by_positions(
    batch_size: int, q_length: int, kv_length: int, q_offset=0, kv_offset: int = 0, *arguments, device="cpu", **options
) -> Tensor | None:
    positions = torch.arange(q_length, device=device) + q_offset
    return masking_utils.sdpa_mask(batch_size, positions, kv_length, kv_offset, *arguments, **options)


sdpa_mask = _sdpa_mask_by_positions if _BY_POSITIONS else masking_utils.sdpa_mask


def mask_interface(build: Callable) -> Callable:
    """`build`, which takes arguments as transformers >= 5.4 passes them, as the installed version calls it."""

    def build_by_positions(batch_size: int, cache_position: Tensor, kv_length: int, *arguments, **options):
        sizes = cache_position.shape[0], kv_length, cache_position[0]
        return build(batch_size, *sizes, *arguments, device=cache_position.device, **options)

    return build_by_positions if _BY_POSITIONS else build


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
    codes = [f.__code__ for f in functions]
    if _REMAPPED is None and len(codes) == 2 and codes[1] is _PACKED:
        pattern, packed = functions
    elif _REMAPPED is not None and codes == [_PACKED, _REMAPPED]:
        packed, pattern = functions[0], closure(functions[1])["mask_function"]
    else:
        return None
    return pattern, closure(packed)["packed_sequence_mask"]


_CACHE_NAMES = ("cache", "past_key_values", "layer_past")
_cache_name_of: dict[type[nn.Module], str] = {}


def given_cache(cache: object, kwargs: dict) -> object:
    """The cache of a call: `cache`, or what `kwargs` hold under another version's name for it, which is taken out."""
    for name in _CACHE_NAMES:
        other = kwargs.pop(name, None)
        cache = other if cache is None else cache
    return cache


def with_cache(module: nn.Module, cache: object) -> dict:
    """The keyword that hands `cache` to a module, ours or transformers' own."""
    kind = type(module)
    if kind not in _cache_name_of:
        parameters = inspect.signature(kind.forward).parameters
        _cache_name_of[kind] = next(name for name in _CACHE_NAMES if name in parameters)
    return {_cache_name_of[kind]: cache}
