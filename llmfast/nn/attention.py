"""Causal self-attention with one projection for queries, keys and values, and the cache that decoding uses."""

from __future__ import annotations

from torch import Tensor, nn

from llmfast import ops
from llmfast.nn.layers import AddRMSNorm, Linear
from llmfast.ops.attention import packed_attention

__all__ = ["KVCache", "SelfAttention"]


class KVCache:
    """Keys and values of the tokens seen so far, for one layer: two buffers ``[B, Hkv, capacity, D]``.

    Buffers are allocated at the first `append`, in the dtype of what is appended.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds ``[B, Hkv, T, D]`` and returns views of everything so far, ``[B, Hkv, length, D]``.

        Raises:
            ValueError: the cache is full, or the batch differs from the first call's.
        """
        B, H, T, D = k.shape
        buffer_k, buffer_v = self.reserve(B, H, T, D, k)
        start, self.length = self.length, self.length + T
        buffer_k[:, :, start : self.length] = k
        buffer_v[:, :, start : self.length] = v
        return buffer_k[:, :, : self.length], buffer_v[:, :, : self.length]

    def reserve(self, B: int, H: int, T: int, D: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Both buffers, with room for T more tokens behind the `length` that they hold. The caller writes them there and
        adds T to `length`.

        Raises:
            ValueError: as `append` does.
        """
        if self.k is None or self.v is None:
            self.k, self.v = (like.new_empty(B, H, self.capacity, D) for _ in range(2))
        start, end = self.length, self.length + T
        if end > self.capacity:
            raise ValueError(f"k: got {T} more tokens on top of {start}, expected at most {self.capacity} in all")
        if self.k.shape[0] != B:
            raise ValueError(f"k: got batch {B}, expected {self.k.shape[0]} as before")
        return self.k, self.v


class SelfAttention(nn.Module):
    """``x [B, T, C] -> [B, T, C]``. With `kv_heads` < `heads`, groups of query heads share keys and values (GQA).

    `qk_norm_eps`: queries and keys go through an RMSNorm over `head_dim` with this epsilon; None: they do not.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        bias: bool,
        out_bias: bool,
        window: int | None,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.window = heads, kv_heads, head_dim, window
        self.qkv = Linear(width, (heads + 2 * kv_heads) * head_dim, bias=bias)
        self.out = Linear(heads * head_dim, width, bias=out_bias)
        self.q_norm = None if qk_norm_eps is None else AddRMSNorm(head_dim, qk_norm_eps)
        self.k_norm = None if qk_norm_eps is None else AddRMSNorm(head_dim, qk_norm_eps)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """`rotary`: (cos, sin) of the tokens' positions. `mask`: as in `llmfast.attention`, on top of causal.
        `cu_seqlens`: document bounds in the B*T tokens, taken as one stream; excludes `mask` and `cache`."""
        B, T, _ = x.shape
        D = self.head_dim
        qkv = self.qkv(x).view(B, T, -1, D)
        if self.q_norm is None and rotary is None and mask is None and cu_seqlens is None and cache is None:
            out = packed_attention(qkv, self.heads, causal=True, window=self.window).transpose(1, 2)
            return self.out(out.reshape(B, T, self.heads * D))
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q)[0], self.k_norm(k)[0]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if rotary is not None:
            q, k = ops.rotary(q, k, *rotary)
        if cu_seqlens is not None:
            q, k, v = (t.transpose(1, 2).reshape(B * T, -1, D) for t in (q, k, v))
            out = ops.varlen_attention(q, k, v, cu_seqlens, cu_seqlens, causal=True, window=self.window)
        else:
            if cache is not None:
                k, v = cache.append(k, v)
            out = ops.attention(q, k, v, causal=True, mask=mask, window=self.window).transpose(1, 2)
        return self.out(out.reshape(B, T, self.heads * D))
