"""AdamW and the norm of gradients: parameters of any dense layout, gradients of any, against float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

import llmfast
from fuzz.layouts import embed, storage
from fuzz.problems import Maker
from fuzz.rule import compare

__all__ = ["gradients", "optimization", "run_norm", "run_steps"]


@dataclass
class Optimization:
    """Parameters, the gradients of each step, options of each group, and what gradients are scaled with."""

    parameters: list[torch.Tensor]
    steps: list[list[torch.Tensor | None]]
    options: list[dict]
    size: float
    grad_scale: float


def _shape(make: Maker) -> tuple[int, ...]:
    dims = make.integer(0, 3)
    return tuple(make.size(0, 2100 if dims == 1 else 33, (7, 8, 15, 17, 31, 33, 1023, 1025, 2100)) for _ in range(dims))


def optimization(make: Maker) -> Optimization:
    size = 10.0 ** make.integer(-6, 3)
    parameters = []
    for shape in [_shape(make) for _ in range(make.integer(1, 5))]:
        order = make.choose(list(itertools.permutations(range(len(shape)))))
        values = torch.randn([shape[d] for d in order], generator=make.generator).to(make.dtype())
        offset = make.integer(0, 5)
        values = torch.cat((values.new_zeros(offset), values.flatten()))[offset:].view(values.shape)
        parameters.append(values.permute([order.index(d) for d in range(len(shape))]))
    steps = [
        [make.normal(*p.shape, dtype=p.dtype, scale=size) if make.integer(0, 5) else None for p in parameters]
        for _ in range(make.integer(1, 3))
    ]
    options = [
        {
            "lr": make.choose([1e-2, 0.1]),
            "betas": make.choose([(0.9, 0.999), (0.8, 0.95), (0.0, 0.5)]),
            "eps": make.choose([1e-8, 1e-3]),
            "weight_decay": make.choose([0.0, 0.1]),
        }
        for _ in range(2)
    ]
    return Optimization(parameters, steps, options, size, make.choose([1.0, 0.25]))


def run_steps(case: Optimization) -> None:
    """The masters of half-precision parameters are held to the rule, and the parameters must be their rounding."""
    ours = [p.detach().clone(memory_format=torch.preserve_format).requires_grad_() for p in case.parameters]
    peer, exact = ([p.detach().to(wide).requires_grad_() for p in ours] for wide in (torch.float32, torch.float64))
    kinds = ((ours, llmfast.AdamW), (peer, torch.optim.AdamW), (exact, torch.optim.AdamW))
    optimizers = []
    for leaves, kind in kinds:
        groups = ((leaves[::2], case.options[0]), (leaves[1::2], case.options[1]))
        optimizers.append(kind([{"params": params, **options} for params, options in groups if params]))
    for grads in case.steps:
        before = [None if g is None else storage(g) for g in grads]
        for leaves, optimizer in zip((ours, peer, exact), optimizers):
            for p, grad in zip(leaves, grads):
                if leaves is ours or grad is None:
                    p.grad = grad
                else:
                    p.grad = grad.to(p.dtype) * case.grad_scale
            optimizer.step(**({"grad_scale": case.grad_scale} if leaves is ours else {}))
        assert all(g is None or torch.equal(storage(g), b) for g, b in zip(grads, before)), "a gradient was written to"
    size = case.size * case.grad_scale
    for i, (p, q, r) in enumerate(zip(ours, peer, exact)):
        state = optimizers[0].state[p]
        if not state:
            assert torch.equal(p.detach(), case.parameters[i]), f"parameter {i} has no gradient, and moved"
            continue
        master = state.get("master", p).detach()
        assert torch.equal(p.detach(), master.to(p.dtype)), f"parameter {i} is not its master rounded"
        lr, start = case.options[i % 2]["lr"], case.parameters[i].double()
        updates = [((t.detach().double() - start) / lr) for t in (master, q, r)]
        compare(f"update {i} over lr", updates[0].float(), updates[1].float(), updates[2])
        for name, scale in (("exp_avg", size), ("exp_avg_sq", size**2)):
            states = [(o.state[t][name].double() / scale) for o, t in zip(optimizers, (p, q, r))]
            compare(f"{name} {i}", states[0].float(), states[1].float(), states[2])


def gradients(make: Maker) -> tuple[list[torch.Tensor], float]:
    """Tensors of any layout, and a factor."""
    scale = 10.0 ** make.integer(-15, 15)
    found = []
    for shape in [_shape(make) for _ in range(make.integer(0, 5))]:
        dtype = make.dtype()
        values = torch.randn(shape, generator=make.generator) * (scale if dtype != torch.float16 else 1.0)
        found.append(embed(values.to(dtype), make.layout()))
    return found, make.choose([1.0, 0.125])


def run_norm(case: tuple[list[torch.Tensor], float]) -> None:
    """Squares are float32, in runs of at most 1,024; all else is float64."""
    grads, factor = case
    exact = factor * math.sqrt(sum(g.double().square().sum().item() for g in grads))
    norm, scale = llmfast.clip_grad_norm(grads, 1.0, grad_scale=factor)
    assert math.isclose(norm, exact, rel_tol=1e-6), (norm, exact)
    assert math.isclose(scale, factor * min(1.0, 1.0 / (exact + 1e-6)), rel_tol=1e-6), (scale, exact)
