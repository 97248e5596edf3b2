"""`PretrainConfig`: everything a pre-training run is decided by, from Python, from flags, or from a file."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmfast import backend
from llmfast.models import PRESETS, GPTConfig
from llmfast.train.schedule import SCHEDULES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["PretrainConfig", "read_config_file"]

# vocab_size is the tokenizer's; the others are there for loaded checkpoints.
_NO_FLAG = ("vocab_size", "qkv_bias", "out_bias", "rotary_scaling", "qk_norm")
MODEL_FIELDS = tuple(f.name for f in dataclasses.fields(GPTConfig) if f.name not in _NO_FLAG)


@dataclass
class PretrainConfig:
    """Pre-train a GPT on text with the language-modelling objective.

    Example: llmfast pretrain --data input.txt --tokenizer char --preset gpt-nano --steps 2000 --out runs/shakespeare
    """

    config: str | None = None
    """File (.toml or .json) with values for the flags below; flags override it."""
    out: str = "runs/pretrain"
    """Folder of the run: checkpoints, metrics, plot. A new run wants it empty."""
    resume: str | None = None
    """Continue: a run's folder, one of its checkpoints, or "auto" (the run in --out; a new one if there is none). Values
    come from that run; the file and flags override them."""

    data: str = "stdlib"
    """"stdlib" (Python's own sources), a text file, folder, glob, .jsonl or .parquet file, a prepared dataset's folder,
    or token shards (.bin of llmfast or llm.c)."""
    val_data: str | None = None
    """Validation shards (.bin), when --data names shards."""
    text_field: str = "text"
    """Field of JSONL, or column of Parquet, that holds the text."""
    separator: str | None = None
    """What separates documents inside text files; without it a file is one document."""
    val_fraction: float = 0.1
    """Share of the text kept for validation."""
    dataset_dir: str | None = None
    """Where the tokenised text is kept and found again; default: OUT/dataset."""
    tokenizer: str = "bpe"
    """"byte", "char", "bpe" (trained on the data), or the path of a saved tokenizer."""
    vocab_size: int | None = None
    """Size of a trained BPE vocabulary; default: the preset's, at least 512."""

    preset: str = "gpt-mini"
    """Model shape to start from (see llmfast.models.PRESETS); the fields below override it."""
    layers: int | None = None
    """Number of blocks."""
    heads: int | None = None
    """Query heads."""
    kv_heads: int | None = None
    """Key/value heads."""
    width: int | None = None
    """Width of the residual stream."""
    ffn_width: int | None = None
    """Width of the FFN's hidden layer."""
    head_dim: int | None = None
    """Width of a head."""
    context: int | None = None
    """Most positions a sequence may have; default: the preset's, and at least --seq-len."""
    norm: Literal["layer_norm", "rms_norm"] | None = None
    """Normalisation."""
    norm_eps: float | None = None
    """Added to the variance."""
    activation: Literal["gelu", "gelu_tanh", "relu", "relu2", "silu"] | None = None
    """FFN nonlinearity."""
    gated: bool | None = None
    """FFN with a gate (SwiGLU with silu)."""
    position: Literal["learned", "rotary"] | None = None
    """Position encoding."""
    rotary_theta: float | None = None
    """Base of the rotary frequencies."""
    bias: bool | None = None
    """Biases in linear layers and LayerNorm."""
    tie_embeddings: bool | None = None
    """The head uses the embedding's weight."""
    window: int | None = None
    """Sliding-window attention over this many tokens."""
    activation_checkpointing: bool | None = None
    """Recompute each block in the backward pass: less memory, more work."""

    device: str = "auto"
    """cpu, cuda or cuda:N. auto: a GPU, where there is one and llmfast was built with kernels for it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and activations (the optimiser and the residual stream are float32 always). auto: bfloat16 on a GPU and
    where the processor multiplies it (AMX, AVX512-BF16), else float32, which is faster there."""
    threads: int | None = None
    """Threads; default: torch's."""
    torch_compile: bool = False
    """Run the model through torch.compile."""
    seed: int = 1337
    """Of the initial weights, the order of the data, and the samples."""

    steps: int = 1000
    """Optimiser steps."""
    tokens: int | None = None
    """Train on this many tokens instead of a number of steps (rounded up to whole steps)."""
    batch_size: int = 8
    """Sequences in a micro-batch."""
    seq_len: int | None = None
    """Tokens in a sequence; default: the model's context."""
    grad_accumulation: int = 1
    """Micro-batches in a step; with more than one, gradients add up in float32."""
    loader: Literal["packed", "random"] = "packed"
    """packed: every token once an epoch, in shuffled windows; random: windows at random offsets."""
    respect_documents: bool = False
    """No attention, and no prediction, across the border between two documents."""

    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float | None = None
    """Learning rate at the end of the schedule; default: a tenth of --lr."""
    warmup: int | None = None
    """Steps of linear warm-up; default: 100, or a tenth of the schedule if that is less."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """What follows the warm-up; wsd: stable, then a linear decay."""
    schedule_steps: int | None = None
    """Step at which the schedule reaches min_lr; default: the last."""
    decay_fraction: float = 0.2
    """wsd: share of the schedule that decays."""
    beta1: float = 0.9
    """AdamW's decay of the gradient's mean."""
    beta2: float = 0.95
    """AdamW's decay of the gradient's mean square."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """On matrices only: not on norms and biases."""
    clip: float = 1.0
    """Largest norm of the gradient; 0: no clipping."""

    log_every: int = 10
    """Steps between two records in metrics.jsonl."""
    val_every: int = 250
    """Steps between validations (also before the first step and after the last); 0: never."""
    val_batches: int = 20
    """Batches of a validation: always the same ones, spread over the validation split."""
    sample_every: int | None = None
    """Steps between samples; default: with each validation; 0: never."""
    sample_tokens: int = 100
    """Length of a sample."""
    sample_prompt: str = ""
    """What samples continue; default: the start of a document."""
    save_every: int | None = None
    """Steps between checkpoints; default: with each validation; 0: only at the end."""
    keep: int = 2
    """Checkpoints kept: the last ones, and the one with the lowest validation loss."""
    tensorboard: bool = False
    """Write TensorBoard events too (needs the tensorboard package)."""

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset: got {self.preset!r}, expected one of {', '.join(PRESETS)}")
        for name in ("steps", "batch_size", "grad_accumulation", "log_every", "val_batches", "keep"):
            self._require(name, getattr(self, name) >= 1, "a positive number")
        for name in ("tokens", "seq_len", "schedule_steps", "vocab_size"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "a positive number")
        backend.check_threads(self.threads)
        for name in ("warmup", "val_every", "sample_every", "save_every", "sample_tokens", "weight_decay", "clip"):
            value = getattr(self, name)
            self._require(name, value is None or 0 <= value < math.inf, "a number from 0")
        self._require("seed", -(2**63) <= self.seed < 2**63, "a number of 64 bits")
        self._require("lr", 0 < self.lr < math.inf, "a positive number")
        self._require(
            "min_lr", self.min_lr is None or 0 <= self.min_lr <= self.lr, f"a number from 0 to lr = {self.lr}"
        )
        self._require("eps", 0 < self.eps < math.inf, "a positive number")
        self._require("decay_fraction", 0 <= self.decay_fraction <= 1, "a number from 0 to 1")
        self._require("val_fraction", 0 <= self.val_fraction < 1, "a number from 0, below 1")
        for name in ("beta1", "beta2"):
            self._require(name, 0 <= getattr(self, name) < 1, "a number from 0, below 1")
        for name, choices in (
            ("dtype", ("auto", "float32", "bfloat16")),
            ("loader", ("packed", "random")),
            ("schedule", SCHEDULES),
        ):
            self._require(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        if self.schedule != "constant":
            total = self.total_schedule
            self._require("warmup", self.warmup_steps < total, f"less than the schedule's {total} steps")
        self.model_config(self.vocab_size or 1)

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {expected}")

    def model_config(self, vocab_size: int) -> GPTConfig:
        """The model that the preset and the overrides describe, for a tokenizer of `vocab_size` ids."""
        overrides = {name: getattr(self, name) for name in MODEL_FIELDS if getattr(self, name) is not None}
        config = PRESETS[self.preset].replace(**overrides, vocab_size=vocab_size)
        if self.seq_len is not None and self.seq_len > config.context:
            if self.context is not None:
                raise ValueError(f"seq_len: got {self.seq_len}, expected at most context = {self.context}")
            config = config.replace(context=self.seq_len)
        return config

    @property
    def sequence(self) -> int:
        """Tokens in a training sequence, T."""
        return self.seq_len or self.model_config(1).context

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.grad_accumulation * self.sequence

    @property
    def total_steps(self) -> int:
        return self.steps if self.tokens is None else math.ceil(self.tokens / self.tokens_per_step)

    @property
    def total_schedule(self) -> int:
        return self.schedule_steps or self.total_steps

    @property
    def warmup_steps(self) -> int:
        return min(100, self.total_schedule // 10) if self.warmup is None else self.warmup

    @property
    def floor_lr(self) -> float:
        return self.lr / 10 if self.min_lr is None else self.min_lr

    @property
    def bpe_vocab_size(self) -> int:
        return self.vocab_size or max(512, PRESETS[self.preset].vocab_size)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with a run that continues from it, for the two to be one training run.

        Left out: where things lie, what is recorded, and what changes speed but not the arithmetic's definition
        (device, threads, torch_compile, activation_checkpointing). `steps` counts only through the length of the schedule.
        """
        model = dataclasses.asdict(self.model_config(1))
        del model["vocab_size"], model["activation_checkpointing"]
        names = ["dtype", "batch_size", "grad_accumulation", "loader", "respect_documents", "seed", "lr", "schedule"]
        names += ["decay_fraction", "beta1", "beta2", "eps", "weight_decay", "clip"]
        derived = {"seq_len": self.sequence, "warmup": self.warmup_steps, "min_lr": self.floor_lr}
        if self.schedule == "constant":
            derived.pop("min_lr")
        else:
            derived["schedule_steps"] = self.total_schedule
        return {**model, **{name: getattr(self, name) for name in names}, **derived}


def read_config_file(path: str | os.PathLike) -> dict[str, Any]:
    """Values for `PretrainConfig` from a .toml or .json file; tables only group: ``[model] layers = 4`` is ``layers``.

    Raises:
        FileNotFoundError, ValueError: malformed, an unknown name or a value of the wrong type, named.
    """
    path = Path(path)
    if path.suffix == ".json":
        parse = json.loads
    elif path.suffix == ".toml":
        parse = tomllib.loads
    else:
        raise ValueError(f"config: got {str(path)!r}, expected a .toml or .json file")
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"config: {path} is not valid {path.suffix[1:].upper()} ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"config: {path} holds a {type(content).__name__}, expected names and values")
    values: dict[str, Any] = {}
    for name, value in content.items():
        for inner, inner_value in value.items() if isinstance(value, dict) else [(name, value)]:
            if inner in values:
                raise ValueError(f"config: {path} gives {inner!r} twice")
            values[inner.replace("-", "_")] = inner_value
    return checked_values(values, str(path))


def checked_values(values: dict[str, Any], source: str) -> dict[str, Any]:
    """`values` if each is a field of `PretrainConfig` and of its type (an int passes for a float)."""
    hints = typing.get_type_hints(PretrainConfig)
    for name, value in values.items():
        if name not in hints or name == "config":
            close = difflib.get_close_matches(name, hints, n=1)
            raise ValueError(
                f"config: {source} has {name!r}, unknown" + (f"; did you mean {close[0]!r}?" if close else "")
            )
        if not _fits(value, hints[name]):
            expected = _readable(hints[name])
            raise ValueError(f"config: {source}: {name}: got {value!r}, expected {expected}")
    return values


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if hint is float:
        return type(value) in (int, float)
    return type(value) is (types.NoneType if hint is None else hint)


def _readable(hint: Any) -> str:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(_readable(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return "none" if hint is types.NoneType else hint.__name__
