"""A GGUF file's model: its configuration, and its tensors under the names of `llmfast.models.tensor_names.GGUF`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmfast.data.gguf_file import GGUFFile
from llmfast.models.config import GPTConfig, RotaryScaling
from llmfast.models.rotary import rotary_frequencies
from llmfast.models.tensor_names import GGUF, GGUF_PHI3, Part, parts

__all__ = ["GGUFModel"]

ARCHITECTURES = ("gpt2", "llama", "qwen2", "qwen3", "phi3")
ROTARY_FACTORS = "rope_freqs.weight"  # what each frequency is divided by: Llama 3.1's scaling
LONG_FACTORS = "rope_factors_long.weight"  # the same for Phi-3 beyond its first context
LLAMA3_CONTEXT = 8192
PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GGUFModel:
    """The tensors of a GGUF file by name, dequantised as they are read.

    Attributes:
        path: of the file.
        config: of the `GPT` that it holds.
        dtype: of its matrices if they all have the same, unquantised one; else float32.

    Raises:
        ValueError: it is not a model that a `GPT` can be; the message names the field.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GGUFFile(path)
        try:
            self.config = self._config()
        except (ValueError, KeyError, TypeError) as error:
            missing = isinstance(error, KeyError)
            raise ValueError(f"{path}: {f'lacks {error.args[0]}' if missing else error}") from None
        kinds = {self._file.kind_name(name) for name, tensor in self._file.tensors.items() if len(tensor.shape) > 1}
        self.dtype = PLAIN_DTYPES.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32

    def names(self) -> set[str]:
        return set(self._file.tensors) - {ROTARY_FACTORS}

    def read(self, name: str) -> Tensor:
        array = self._file.read(name)
        return torch.from_numpy(array if array.flags.writeable else array.copy())  # torch wants no read-only map

    def parts(self) -> dict[str, list[Part]]:
        """llama.cpp's converter leaves rotary pairs as neighbours for Llama alone."""
        architecture = self._file.fields["general.architecture"]
        return parts(self.config, GGUF_PHI3 if architecture == "phi3" else GGUF, interleaved=architecture == "llama")

    def _config(self) -> GPTConfig:
        fields, tensors = self._file.fields, self._file.tensors
        architecture = fields.get("general.architecture")
        if architecture not in ARCHITECTURES:
            expected = ", ".join(ARCHITECTURES)
            raise ValueError(f"general.architecture: got {architecture!r}, expected one of {expected}")

        def field(name: str) -> Any:
            return fields[f"{architecture}.{name}"]

        V, C = tensors["token_embd.weight"].shape
        heads = field("attention.head_count")
        shape: dict[str, Any] = {
            "vocab_size": V,
            "width": C,
            "context": field("context_length"),
            "layers": field("block_count"),
            "heads": heads,
            "ffn_width": field("feed_forward_length"),
            "tie_embeddings": "output.weight" not in tensors,
        }
        if architecture == "gpt2":
            return GPTConfig(**shape, norm_eps=_shortest(field("attention.layer_norm_epsilon")))
        if fields.get(f"{architecture}.expert_count"):
            raise ValueError(f"{architecture}.expert_count: got {field('expert_count')}, expected none")
        if LONG_FACTORS in tensors:
            raise ValueError(f"{LONG_FACTORS}: got factors of rope type longrope, expected default, linear or llama3")
        D = fields.get(f"{architecture}.attention.key_length", C // heads)
        for name in ("attention.value_length", "rope.dimension_count"):
            if fields.get(f"{architecture}.{name}", D) != D:
                raise ValueError(f"{architecture}.{name}: got {field(name)}, expected the head's width {D}")
        config = GPTConfig(
            **shape,
            kv_heads=fields.get(f"{architecture}.attention.head_count_kv", heads),
            head_dim=D,
            norm="rms_norm",
            norm_eps=_shortest(field("attention.layer_norm_rms_epsilon")),
            activation="silu",
            gated=True,
            position="rotary",
            rotary_theta=_shortest(fields.get(f"{architecture}.rope.freq_base", 10000.0)),
            bias="blk.0.ffn_up.bias" in tensors,
            qkv_bias="blk.0.attn_q.bias" in tensors,
            out_bias="blk.0.attn_output.bias" in tensors,
            qk_norm="blk.0.attn_q_norm.weight" in tensors,
            window=fields.get(f"{architecture}.attention.sliding_window") or None,
        )
        return config.replace(rotary_scaling=self._scaling(config, architecture))

    def _scaling(self, config: GPTConfig, architecture: str) -> RotaryScaling | None:
        fields = self._file.fields
        kind = fields.get(f"{architecture}.rope.scaling.type", "none")
        if kind == "linear":
            return RotaryScaling("linear", _shortest(fields[f"{architecture}.rope.scaling.factor"]))
        if kind != "none":
            raise ValueError(f"{architecture}.rope.scaling.type: got {kind!r}, expected none or linear")
        if ROTARY_FACTORS not in self._file.tensors:
            return None
        factors = self.read(ROTARY_FACTORS).float()
        context = fields.get(f"{architecture}.rope.scaling.original_context_length", LLAMA3_CONTEXT)
        scaling = RotaryScaling("llama3", float(factors.max()), original_context=context)
        implied = rotary_frequencies(config) / rotary_frequencies(config.replace(rotary_scaling=scaling))
        if factors.shape != implied.shape or not torch.allclose(factors, implied, rtol=1e-4):
            raise ValueError(f"{ROTARY_FACTORS}: got factors that are not those of Llama 3.1's scaling")
        return scaling


def _shortest(value: float) -> float:
    """The shortest decimal of a float32: 1e-05, where the exact value is 9.999999747378752e-06."""
    return float(str(np.float32(value)))
