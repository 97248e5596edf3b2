"""Decoder-only models: the GPT-2 and Llama families in one class."""

from llmfast.models.config import PRESETS, GPTConfig, RotaryScaling
from llmfast.models.gpt import GPT

__all__ = ["GPT", "PRESETS", "GPTConfig", "RotaryScaling"]
