"""A training step of the demo's model by llmfast and by plain PyTorch, timed in turns in one process.

The peer is the network as one writes it in PyTorch: `F.scaled_dot_product_attention`, fused AdamW, and autocast where
llmfast computes in bfloat16. Both start from the same weights and see the same batch.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmfast.models import GPT, GPTConfig
from llmfast.optim import AdamW, clip_grad_norm
from llmfast.train import measure_peak_flops

__all__ = ["Comparison", "PlainGPT", "compare_steps", "llmfast_step"]

MAX_NORM = 1.0
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


class PlainBlock(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C, bias = config.width, config.bias
        self.heads = config.heads
        self.gelu = {"gelu": "none", "gelu_tanh": "tanh"}[config.activation]
        self.attention_norm = nn.LayerNorm(C, config.norm_eps, bias=bias)
        self.attention = nn.ModuleDict({"qkv": nn.Linear(C, 3 * C, bias=bias), "out": nn.Linear(C, C, bias=bias)})
        self.ffn_norm = nn.LayerNorm(C, config.norm_eps, bias=bias)
        self.ffn = nn.ModuleDict({"up": nn.Linear(C, config.F, bias=bias), "down": nn.Linear(config.F, C, bias=bias)})

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.attention["qkv"](self.attention_norm(x)).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention["out"](attended.transpose(1, 2).reshape(B, T, C))
        hidden = F.gelu(self.ffn["up"](self.ffn_norm(x)), approximate=self.gelu)
        return x + self.ffn["down"](hidden)


class PlainGPT(nn.Module):
    """`llmfast.models.GPT` of the GPT-2 family in plain PyTorch, with the same names of parameters but one."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, config.norm_eps, bias=config.bias)

    @classmethod
    def like(cls, model: GPT) -> PlainGPT:
        """A copy of `model`."""
        plain = cls(model.config)
        weights = dict(model.state_dict())
        weights["positions.weight"] = weights.pop("embedding.position_weight")
        plain.load_state_dict(weights)
        return plain

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(input_ids) + self.positions.weight[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@dataclass(frozen=True)
class Comparison:
    """Seconds of each timed step, and the losses of the first steps, of which the first is before any update."""

    tokens: int
    flops: int
    peak_flops: float
    dtype: str
    seconds: dict[str, list[float]]
    losses: dict[str, list[float]]

    def tokens_per_s(self, name: str) -> float:
        return self.tokens / statistics.median(self.seconds[name])

    def peak_share(self, name: str) -> float:
        return self.flops / statistics.median(self.seconds[name]) / self.peak_flops

    @property
    def ratio(self) -> float:
        """How many times the peer's speed llmfast has."""
        ours, peer = (self.tokens_per_s(name) for name in self.seconds)
        return ours / peer

    @property
    def losses_agree(self) -> bool:
        ours, peer = self.losses.values()
        allowed = 1e-3 if self.dtype == "float32" else 2e-2
        return all(abs(a - b) <= allowed * max(1.0, abs(b)) for a, b in zip(ours, peer))


def llmfast_step(model: GPT, inputs: Tensor, targets: Tensor) -> Callable[[], float]:
    """A function that does one training step on this batch and returns its loss."""
    parameters = list(model.parameters())
    optimizer = AdamW(parameters, **ADAMW)

    def step() -> float:
        loss = model(inputs, targets)
        loss.backward()
        _, scale = clip_grad_norm(parameters, MAX_NORM)
        optimizer.step(grad_scale=scale)
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def torch_step(model: PlainGPT, inputs: Tensor, targets: Tensor, autocast: torch.dtype | None) -> Callable[[], float]:
    """The same in plain PyTorch."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, fused=True, **ADAMW)

    def step() -> float:
        with torch.autocast(inputs.device.type, autocast) if autocast else contextlib.nullcontext():
            loss = model(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def compare_steps(
    config: GPTConfig,
    dtype: torch.dtype,
    inputs: Tensor,
    targets: Tensor,
    *,
    rounds: int,
) -> Comparison:
    """Times `rounds` steps of each side, the sides taking turns at going first, after two steps to warm up."""
    device = inputs.device
    model = GPT(config).to(device)
    plain = PlainGPT.like(model).to(device)
    narrow = None if dtype == torch.float32 else dtype
    name = str(dtype).removeprefix("torch.")
    steps = {
        "llmfast": llmfast_step(model.to(dtype), inputs, targets),
        "PyTorch": torch_step(plain, inputs, targets, narrow),
    }
    losses: dict[str, list[float]] = {side: [] for side in steps}
    seconds: dict[str, list[float]] = {side: [] for side in steps}
    for side, step in steps.items():
        losses[side] += [step(), step()]
    for number in range(rounds):
        for side in list(steps)[:: -1 if number % 2 else 1]:
            start = time.perf_counter()
            steps[side]()
            seconds[side].append(time.perf_counter() - start)
    peak = max(measure_peak_flops(dtype, device=device), _torch_peak_flops(dtype, device))
    tokens = inputs.numel()
    return Comparison(tokens, tokens * config.flops_per_token(inputs.shape[1]), peak, name, seconds, losses)


@torch.no_grad()
def _torch_peak_flops(dtype: torch.dtype, device: torch.device, seconds: float = 0.3) -> float:
    """The best rate of torch's own product of square matrices: the peak is the better of both sides'."""
    gpu = device.type == "cuda"
    size, wait = (8192, torch.cuda.synchronize) if gpu else (1024, lambda _: None)
    x, weight = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    F.linear(x, weight)
    wait(device)
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        F.linear(x, weight)
        wait(device)
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            return 2 * size**3 / best
