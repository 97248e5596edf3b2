"""Pre-training: configuration, schedules, the loop, metrics and checkpoints.

>>> from llmfast.train import PretrainConfig, load_model, pretrain
>>> result = pretrain(PretrainConfig(data="stdlib", preset="gpt-micro", steps=500, out="runs/micro"))
>>> model, tokenizer = load_model(result.out_dir)
"""

from llmfast.train.checkpoint import CheckpointError, load_model
from llmfast.train.config import PretrainConfig
from llmfast.train.metrics import plot_losses, read_metrics
from llmfast.train.pretrain import NonFiniteError, PretrainResult, accumulate_gradients, pretrain
from llmfast.train.schedule import learning_rate
from llmfast.train.throughput import measure_peak_flops

__all__ = [
    "CheckpointError",
    "NonFiniteError",
    "PretrainConfig",
    "PretrainResult",
    "accumulate_gradients",
    "learning_rate",
    "load_model",
    "measure_peak_flops",
    "plot_losses",
    "pretrain",
    "read_metrics",
]
