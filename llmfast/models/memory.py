"""Where the parameters of a model that is read from files lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmfast import backend

if TYPE_CHECKING:
    from llmfast.models.config import GPTConfig
    from llmfast.models.gpt import GPT

__all__ = ["uninitialised"]

BLOCK = 64 << 20  # bytes: what stays in use at most when only one of its parameters is still needed
ALIGNMENT = 64  # bytes, as torch's allocator has it


def uninitialised(cls: type[GPT], config: GPTConfig, dtype: torch.dtype) -> GPT:
    """``cls(config)`` with memory of the CPU that nothing has written, the parameters side by side in large blocks.

    Decoding reads every weight once a token, and 4 KiB pages slow that down. Most weights are smaller than a page of
    2 MiB; a block of many is not, and asks for such pages before it is touched. Each parameter has a storage of its own.
    """
    with torch.device("meta"):
        model = cls(config).to(dtype)
    tensors = [*model.parameters(), *model.buffers()]
    left = sum(_aligned(t.nbytes) for t in tensors)
    block = torch.UntypedStorage(0)
    used = 0

    def take(meta: Tensor) -> Tensor:
        nonlocal block, used, left
        size = _aligned(meta.nbytes)
        if size > len(block) - used:
            fresh = torch.empty(max(size, min(BLOCK, left)) // 4, dtype=torch.float32, device="cpu")
            backend.native().ask_for_large_pages(fresh)
            block, used = fresh.untyped_storage(), 0
        part = block[used : used + meta.nbytes]
        used, left = used + size, left - size
        return torch.empty(0, dtype=meta.dtype, device="cpu").set_(part, 0, meta.shape)

    return model._apply(take)  # as nn.Module.to_empty does it


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
