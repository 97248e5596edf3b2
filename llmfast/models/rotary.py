"""Rotary frequencies of a configuration, in transformers' arithmetic."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmfast.models.config import GPTConfig, RotaryScaling

__all__ = ["rotary_frequencies"]


def rotary_frequencies(config: GPTConfig) -> Tensor:
    """Radians per position of each pair of a head's elements, float32 ``[D / 2]``, on the CPU.

    ``theta^(-2j / D)``, changed by `config.rotary_scaling`. Every step rounds to float32 where transformers' does, so
    that models loaded from it turn by the same angles at any position.
    """
    exponents = torch.arange(0, config.D, 2, dtype=torch.float32, device="cpu") / config.D
    frequencies = 1.0 / (config.rotary_theta**exponents)
    scaling = config.rotary_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    return _llama3(frequencies, scaling)


def _llama3(frequencies: Tensor, scaling: RotaryScaling) -> Tensor:
    """Llama 3.1's (Grattafiori et al. 2024): long waves stretched, short ones kept, a linear blend between them."""
    low, high, context = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_context
    wavelength = 2 * math.pi / frequencies
    long = wavelength > context / low
    short = wavelength < context / high
    stretched = torch.where(long, frequencies / scaling.factor, frequencies)
    kept = (context / wavelength - low) / (high - low)
    blended = (1 - kept) * stretched / scaling.factor + kept * stretched
    return torch.where(~long & ~short, blended, stretched)
