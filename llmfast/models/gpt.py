"""`GPT`: a decoder-only transformer of the GPT-2 or Llama family, whole, in the order in which data flows.

The residual stream is float32; sub-layers work in the parameters' dtype. Each norm also adds the sub-layer's output to
the stream (one fused pass), so a block hands on two tensors: its last output, not yet added, and the stream.
"""

from __future__ import annotations

import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmfast import ops
from llmfast.models.config import PRESETS, GPTConfig
from llmfast.models.rotary import rotary_frequencies
from llmfast.nn import FFN, AddLayerNorm, AddRMSNorm, Embedding, KVCache, Linear, SelfAttention
from llmfast.nn.block import fused_block, fused_stack, without_plan
from llmfast.nn.layers import is_plain_linear

__all__ = ["GPT", "Block"]


def _norm(config: GPTConfig) -> nn.Module:
    if config.norm == "layer_norm":
        return AddLayerNorm(config.width, config.norm_eps, config.bias)
    return AddRMSNorm(config.width, config.norm_eps)


class Block(nn.Module):
    """Pre-norm block: attention, then FFN, each reading a norm of the stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = SelfAttention(
            config.width,
            config.heads,
            config.Hkv,
            config.D,
            config.has_qkv_bias,
            config.has_out_bias,
            config.window,
            config.norm_eps if config.qk_norm else None,
        )
        self.ffn_norm = _norm(config)
        self.ffn = FFN(config.width, config.F, config.activation, config.gated, config.bias)

    def forward(self, x: Tensor, stream: Tensor | None, rotary, mask, cu_seqlens, cache) -> tuple[Tensor, Tensor]:
        done = fused_block(self, x, stream, rotary, mask, cu_seqlens, cache)
        if done is not None:
            return done
        normed, stream = self.attention_norm(x, stream)
        x = self.attention(normed, rotary, mask, cu_seqlens, cache)
        normed, stream = self.ffn_norm(x, stream)
        return self.ffn(normed), stream

    def __getstate__(self) -> dict:
        return without_plan(self.__dict__)


class GPT(nn.Module):
    """A language model of `GPTConfig`'s shape, freshly initialised as GPT-2 is (Radford et al. 2019, section 2.3).

    Example:
        >>> model = GPT.preset("gpt2", layers=2)
        >>> loss = model(input_ids, targets)
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        positions = config.context if config.position == "learned" else 0
        self.embedding = Embedding(config.vocab_size, config.width, positions)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = _norm(config)
        self.head = None if config.tie_embeddings else Linear(config.width, config.vocab_size, bias=False)
        self._frequencies = rotary_frequencies(config) if config.position == "rotary" else None
        self.reset_parameters()

    @classmethod
    def preset(cls, name: str, **overrides) -> GPT:
        """A model by name (see `llmfast.models.PRESETS`), with fields of `GPTConfig` overridden.

        Raises:
            ValueError: no preset has that name.
        """
        if name not in PRESETS:
            raise ValueError(f"name: got {name!r}, expected one of {', '.join(PRESETS)}")
        return cls(PRESETS[name].replace(**overrides))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, dtype: torch.dtype | None = None) -> GPT:
        """A model with the weights in a Hugging Face folder, a GGUF file or an llmfast checkpoint.

        See `llmfast.models.pretrained.load_pretrained`; ``llmfast.data.load_tokenizer(path)`` gives the tokenizer.

        Args:
            path: folder with ``config.json`` and safetensors (one file or shards) of a GPT-2, Llama, Mistral, Qwen2,
                Qwen3 or Phi-3 model; a ``.gguf`` file of one of these but Phi-3 (needs the extra ``hf``), or a folder
                with exactly one.
            dtype: of the parameters: float32, bfloat16 or float16. Default: the one that the files name; float32 for a
                quantised GGUF, whose numbers it holds exactly.

        Raises:
            FileNotFoundError: no model is there. ValueError: it is one that `GPT` cannot represent (the message names
            the field), or a file is damaged.

        Example:
            >>> model = GPT.from_pretrained("SmolLM2-135M-Instruct", torch.bfloat16)
        """
        from llmfast.models.pretrained import load_pretrained

        return load_pretrained(path, dtype, cls)

    def save_pretrained(
        self, folder: str | os.PathLike, tokenizer=None, *, max_shard_bytes: int = 5 * 10**9, overwrite: bool = False
    ) -> None:
        """Writes a folder that ``transformers.AutoModelForCausalLM`` loads, with the same logits.

        See `llmfast.models.pretrained.save_pretrained`.

        Args:
            folder: made if absent; one that holds anything is refused unless `overwrite`.
            tokenizer: a `llmfast.data.Tokenizer` to save beside the weights.
            max_shard_bytes: larger models are split into several files.

        Raises:
            FileExistsError: the folder is not empty. ValueError: no transformers architecture has this configuration.
        """
        from llmfast.models.pretrained import save_pretrained

        save_pretrained(self, folder, tokenizer, max_shard_bytes=max_shard_bytes, overwrite=overwrite)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal(0, 0.02) weights, zero biases; outputs into the stream scaled down by the square root of their number."""
        into_stream = 0.02 / math.sqrt(2 * self.config.layers)
        for name, parameter in self.named_parameters():
            if "norm" in name:
                nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                narrow = name.endswith(("attention.out.weight", "ffn.down.weight"))
                nn.init.normal_(parameter, std=into_stream if narrow else 0.02)

    @property
    def head_weight(self) -> Tensor:
        """``[V, C]``."""
        return self.embedding.weight if self.head is None else self.head.weight

    def caches(self, capacity: int) -> list[KVCache]:
        """Empty key/value caches for `capacity` tokens, one a layer."""
        return [KVCache(capacity) for _ in self.blocks]

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        caches: list[KVCache] | None = None,
        last_only: bool = False,
        reduction: str = "mean",
    ) -> Tensor:
        """Logits, or the loss if `targets` are given (then logits are never materialised).

        Args:
            input_ids: ``[B, T]`` int64.
            targets: ``[B, T]`` int64, the token that follows each input; -100 is ignored.
            position_ids: ``[T]`` or ``[B, T]`` int64; default: from 0, or from what the caches hold.
            mask: bool (True = visible) or additive, broadcastable to ``[B, H, T, Tk]``, on top of causal masking.
            cu_seqlens: ``[n + 1]`` int32, bounds of documents in the B*T tokens as one stream: attention stays inside.
            caches: from `caches()`: input_ids follow the tokens they hold.
            last_only: logits of the last position alone.
            reduction: of the loss: mean, sum or none.

        Returns:
            ``[B, T, V]`` logits in the parameters' dtype (``[B, 1, V]`` if last_only), or the loss in float32.

        Raises:
            ValueError: more positions than `config.context`, or arguments that exclude each other.
        """
        normed = self.hidden(
            input_ids,
            position_ids=position_ids,
            mask=mask,
            cu_seqlens=cu_seqlens,
            caches=caches,
            last_only=last_only,
        )
        if targets is None:
            return self.logits(normed)
        if self._head_is_plain():
            return ops.linear_cross_entropy(normed, self.head_weight, targets, reduction=reduction)
        losses = F.cross_entropy(self.logits(normed).float().flatten(0, 1), targets.flatten(), reduction=reduction)
        return losses.view(targets.shape) if reduction == "none" else losses

    def logits(self, hidden: Tensor) -> Tensor:
        """``[..., V]`` logits of what `hidden` returns. A head that was replaced (by an adapter) or has hooks is called."""
        return ops.linear(hidden, self.head_weight) if self._head_is_plain() else self.head(hidden)

    def _head_is_plain(self) -> bool:
        return self.head is None or is_plain_linear(self.head)

    def hidden(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        caches: list[KVCache] | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """What the head reads: the final norm's output ``[B, T, C]``, in the parameters' dtype. Arguments as `forward`."""
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise ValueError(f"input_ids: got shape {tuple(input_ids.shape)}, expected (B, T), both positive")
        B, T = input_ids.shape
        seen = caches[0].length if caches else 0
        if seen + T > self.config.context:
            raise ValueError(f"input_ids: got {seen + T} positions, expected at most {self.config.context}")
        if cu_seqlens is not None and (mask is not None or caches is not None):
            raise ValueError("cu_seqlens: got it together with mask or caches, expected it alone")
        if position_ids is None:
            position_ids = torch.arange(seen, seen + T, device=input_ids.device)
        rotary = self._rotary_at(position_ids) if self.config.position == "rotary" else None

        x: Tensor = self.embedding(input_ids, position_ids)
        done = fused_stack(self, Block, x, rotary, mask, cu_seqlens, caches)
        x, stream = done or self._block_by_block(x, rotary, mask, cu_seqlens, caches)
        if last_only:
            x, stream = x[:, -1:], stream[:, -1:]
        return self.norm(x, stream)[0]

    def _block_by_block(self, x: Tensor, rotary, mask, cu_seqlens, caches) -> tuple[Tensor, Tensor]:
        stream = None
        for i, block in enumerate(self.blocks):
            arguments = (x, stream, rotary, mask, cu_seqlens, caches[i] if caches else None)
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                x, stream = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x, stream = block(*arguments)
        return x, stream

    def __getstate__(self) -> dict:
        return without_plan(self.__dict__)

    def generate(self, input_ids: Tensor, *, max_new_tokens: int, **options) -> Tensor:
        """Continues ``[B, T]`` by up to `max_new_tokens`; see `llmfast.generate.generate` for the options."""
        from llmfast.generate import generate

        return generate(self, input_ids, max_new_tokens=max_new_tokens, **options)

    def _rotary_at(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin ``[..., T, D / 2]`` at the given positions."""
        if self._frequencies.device != position_ids.device:
            self._frequencies = self._frequencies.to(position_ids.device)
        # In float32, as transformers computes it: what checkpoints were trained with.
        angles = position_ids[..., None].float() * self._frequencies
        return angles.cos(), angles.sin()
