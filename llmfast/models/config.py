"""What a `GPT` is made of, the presets, and counts of parameters and arithmetic."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["PRESETS", "GPTConfig", "RotaryScaling"]


@dataclass(frozen=True)
class RotaryScaling:
    """Rotary frequencies changed for a longer context than the model was first trained with.

    Attributes:
        kind: ``linear`` divides every frequency by `factor`; ``llama3`` (Llama 3.1) only those that turn fewer than
            `low_freq_factor` times in `original_context` positions, none of those that turn more than
            `high_freq_factor` times, and the ones between in part.
        factor: above 0.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"rotary_scaling: got kind {self.kind!r}, expected linear or llama3")
        if not self.factor > 0:
            raise ValueError(f"rotary_scaling: got factor {self.factor}, expected a number above 0")


@dataclass(frozen=True)
class GPTConfig:
    """A decoder-only transformer. The defaults are GPT-2 124M; `llama` differs in norm, position, gate and biases.

    Attributes:
        vocab_size: V, rows of the embedding and of the head.
        context: most positions a sequence may have.
        layers: number of blocks.
        heads: query heads Hq.
        kv_heads: key/value heads Hkv; None means `heads`. Divides `heads`.
        width: C, of the residual stream.
        ffn_width: F; None means 4 C.
        head_dim: D; None means C / heads.
        norm: ``layer_norm`` or ``rms_norm``.
        norm_eps: added to the variance.
        activation: gelu, gelu_tanh, relu, relu2 or silu.
        gated: FFN with a gate (SwiGLU when the activation is silu).
        position: ``learned`` (added to the embedding) or ``rotary``.
        rotary_theta: base of the rotary frequencies.
        rotary_scaling: how they are changed for long contexts, or None.
        bias: biases in linear layers and LayerNorm.
        qkv_bias: biases of the query, key and value projection; None means `bias`.
        out_bias: bias of attention's output projection; None means `bias`.
        qk_norm: RMSNorm of every head's queries and keys, with one weight ``[D]`` each, before rotary positions (Qwen 3).
        tie_embeddings: the head uses the embedding's weight.
        window: sliding-window attention over this many tokens (each token and those before it), or None.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
    """

    vocab_size: int = 50257
    context: int = 1024
    layers: int = 12
    heads: int = 12
    kv_heads: int | None = None
    width: int = 768
    ffn_width: int | None = None
    head_dim: int | None = None
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    norm_eps: float = 1e-5
    activation: Literal["gelu", "gelu_tanh", "relu", "relu2", "silu"] = "gelu_tanh"
    gated: bool = False
    position: Literal["learned", "rotary"] = "learned"
    rotary_theta: float = 10000.0
    rotary_scaling: RotaryScaling | None = None
    bias: bool = True
    qkv_bias: bool | None = None
    out_bias: bool | None = None
    qk_norm: bool = False
    tie_embeddings: bool = True
    window: int | None = None
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.rotary_scaling, Mapping):  # as it comes from JSON
            object.__setattr__(self, "rotary_scaling", RotaryScaling(**self.rotary_scaling))
        for name in ("vocab_size", "context", "layers", "heads", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a positive number")
        for name in ("kv_heads", "ffn_width", "head_dim", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, expected a positive number")
        if not 0 <= self.norm_eps < math.inf:
            raise ValueError(f"norm_eps: got {self.norm_eps}, expected a number from 0")
        if not 0 < self.rotary_theta < math.inf:
            raise ValueError(f"rotary_theta: got {self.rotary_theta}, expected a positive number")
        if self.heads % self.Hkv:
            raise ValueError(f"kv_heads: got {self.kv_heads}, expected a divisor of heads = {self.heads}")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"heads: got {self.heads}, expected a divisor of width = {self.width} (or give head_dim)")
        if self.position == "rotary" and self.D % 2:
            raise ValueError(f"head_dim: got {self.D}, expected an even number for rotary positions")
        choices = {
            "norm": ("layer_norm", "rms_norm"),
            "position": ("learned", "rotary"),
            "activation": ("gelu", "gelu_tanh", "relu", "relu2", "silu"),
        }
        for name, expected in choices.items():
            if getattr(self, name) not in expected:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(expected)}")

    @property
    def Hkv(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def D(self) -> int:
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def F(self) -> int:
        return 4 * self.width if self.ffn_width is None else self.ffn_width

    @property
    def has_qkv_bias(self) -> bool:
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def has_out_bias(self) -> bool:
        return self.bias if self.out_bias is None else self.out_bias

    def replace(self, **changes) -> GPTConfig:
        return dataclasses.replace(self, **changes)

    def block_matmul_parameters(self) -> int:
        """Weights of one block that take part in matrix products."""
        C, D = self.width, self.D
        attention = C * (self.heads + 2 * self.Hkv) * D + self.heads * D * C
        return attention + (3 if self.gated else 2) * C * self.F

    def parameters(self) -> int:
        """All trainable parameters; a tied head counts once."""
        C, D = self.width, self.D
        norm = C * (2 if self.norm == "layer_norm" and self.bias else 1)
        biases = (self.F + C if self.bias else 0) + (C if self.has_out_bias else 0)
        biases += (self.heads + 2 * self.Hkv) * D if self.has_qkv_bias else 0
        block = self.block_matmul_parameters() + 2 * norm + biases + (2 * D if self.qk_norm else 0)
        embedding = self.vocab_size * C * (1 if self.tie_embeddings else 2)
        positions = self.context * C if self.position == "learned" else 0
        return embedding + positions + self.layers * block + norm

    def training_bytes(self) -> int:
        """Of parameters, their gradients and the state of AdamW, whatever the dtype: 16 a parameter."""
        return 16 * self.parameters()

    def activation_bytes(self, tokens: int) -> int:
        """The least that a training step keeps of `tokens`: ids, targets, and the float32 stream as each block gets it."""
        return tokens * (16 + 4 * self.width * self.layers)

    def flops_per_token(self, sequence: int | None = None) -> int:
        """Multiplies and adds of one training step per token: forward and twice that backward.

        Counted: every matrix product (the head too, embedding look-ups not) and attention's two products over the keys
        a query really sees (the causal half, or the window), in sequences of `sequence` tokens (default: `context`).
        Recomputation (activation checkpointing, attention, cross-entropy) is not counted, as usual for MFU.
        """
        T = self.context if sequence is None else sequence
        w = T if self.window is None else min(self.window, T)
        seen = (w * (w + 1) / 2 + (T - w) * w) / T  # keys per query, on average
        matmul = self.layers * self.block_matmul_parameters() + self.vocab_size * self.width
        attention = self.layers * 2 * self.heads * self.D * seen
        return int(6 * (matmul + attention))


def _llama(**values) -> GPTConfig:
    family = dict(norm="rms_norm", activation="silu", gated=True, position="rotary", bias=False)
    return GPTConfig(**{**family, **values})


PRESETS: dict[str, GPTConfig] = {
    # GPT-2 (Radford et al. 2019)
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(layers=24, heads=16, width=1024),
    "gpt2-large": GPTConfig(layers=36, heads=20, width=1280),
    "gpt2-xl": GPTConfig(layers=48, heads=25, width=1600),
    # small enough for a laptop's processor
    "gpt-nano": GPTConfig(vocab_size=256, context=64, layers=4, heads=4, width=128, bias=False),
    "gpt-micro": GPTConfig(vocab_size=4096, context=128, layers=4, heads=4, width=256, bias=False),
    "gpt-mini": GPTConfig(vocab_size=8192, context=256, layers=6, heads=6, width=384, bias=False),
    "llama-nano": _llama(vocab_size=256, context=128, layers=4, heads=4, kv_heads=2, width=128, ffn_width=384),
    "llama-micro": _llama(vocab_size=4096, context=256, layers=6, heads=6, kv_heads=2, width=288, ffn_width=768),
    # Llama family; 135m and 360m have the shapes of SmolLM2, 1b those of Llama 3.2
    "llama-135m": _llama(
        vocab_size=49152, context=8192, layers=30, heads=9, kv_heads=3, width=576, ffn_width=1536, rotary_theta=1e5
    ),
    "llama-360m": _llama(
        vocab_size=49152, context=8192, layers=32, heads=15, kv_heads=5, width=960, ffn_width=2560, rotary_theta=1e5
    ),
    "llama-1b": _llama(
        vocab_size=128256, context=8192, layers=16, heads=32, kv_heads=8, width=2048, ffn_width=8192, rotary_theta=5e5
    ),
    "llama-7b": _llama(
        vocab_size=32000, context=4096, layers=32, heads=32, width=4096, ffn_width=11008, tie_embeddings=False
    ),
}
