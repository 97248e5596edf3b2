"""Views of any layout: offsets, gaps, permuted and stepping dimensions, stride 0, with NaN in all memory around them."""

from __future__ import annotations

import math
import random

import torch

__all__ = ["embed", "storage"]


def embed(values: torch.Tensor, layout: int, *, broadcast: bool = True) -> torch.Tensor:
    """A view that holds `values`, laid out as the number `layout` says: 0 is contiguous in memory of its own.

    Everything in the storage that the view does not reach is NaN (for integers: the lowest number), so that a kernel
    which reads it shows. With `broadcast`, a dimension may get stride 0; it then repeats its first slice.
    """
    if layout == 0:
        return values.clone(memory_format=torch.contiguous_format)
    chance = random.Random(layout)
    dims = values.dim()
    order = list(range(dims))
    if chance.random() < 0.4:
        chance.shuffle(order)
    elif chance.random() < 0.5:  # the last dimension stays contiguous: what kernels read without a copy
        head = order[:-1]
        chance.shuffle(head)
        order = head + order[-1:]
    strides, extent = [0] * dims, 1
    for dim in reversed(order):
        step = 2 if chance.random() < 0.1 else 1
        strides[dim] = extent * step
        extent = max(1, strides[dim] * values.shape[dim]) + (chance.randint(0, 5) if chance.random() < 0.3 else 0)
        if broadcast and dims > 1 and values.shape[dim] > 1 and chance.random() < 0.07:
            strides[dim] = 0
    offset = chance.randint(0, 9)
    buffer = torch.empty(offset + extent + chance.randint(0, 9), dtype=values.dtype).fill_(_poison(values.dtype))
    view = buffer.as_strided(values.shape, strides, offset)
    _once(view, strides).copy_(_once(values, strides))
    return view


def storage(view: torch.Tensor) -> torch.Tensor:
    """A copy of all bytes of a view's storage: inputs and what lies around them must stay as they were."""
    return torch.empty(0, dtype=torch.uint8).set_(view.untyped_storage()).clone()


def _once(t: torch.Tensor, strides: list[int]) -> torch.Tensor:
    """`t` without the repetitions along dimensions of stride 0."""
    for dim, stride in enumerate(strides):
        if stride == 0 and t.shape[dim] > 1:
            t = t.narrow(dim, 0, 1)
    return t


def _poison(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return True
    return math.nan if dtype.is_floating_point else torch.iinfo(dtype).min
