"""The rule that fuzzed results are held to, and how a problem is run.

The house rule compares our largest error against float64 with twice that of same-dtype PyTorch. On a tensor of a few
elements that is a comparison of a few random roundings, and PyTorch's are sometimes all lucky (its error is 0 where
the true result happens to be representable): about one tensor in forty breaks the rule with nothing wrong. So here:

* largest error <= 2 * PyTorch's largest + floor, root mean square error <= 2 * PyTorch's + floor / 2, where
* floor = 1e-5 * max(1, s) + 4 u s: a few units of rounding (u = 2^-24, 2^-9, 2^-12) at the scale of the result;
* s, the scale, is the largest |exact value| of the tensor; with fewer than 16 elements all of them may be small because
  their terms cancel, so there s is at least 1, the scale of all inputs. Problems whose terms are larger than that by
  nature (1 / sqrt(variance) in gradients of norms) say so themselves: `Problem.units`.

The root mean square sees what the maximum allows: an error of a few units in every element at once. NaN and infinities
must be where the exact result has them. Inputs, and all memory around them, must not change.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fuzz.layouts import embed, storage

__all__ = ["Problem", "compare", "run", "solve"]

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float64: 2.0**-53}
FEW = 16
Results = dict[str, torch.Tensor]


@dataclass(repr=False)
class Problem:
    """One call of an op.

    Attributes:
        ours, peer, exact: functions of the inputs by keyword: llmfast, same-dtype PyTorch, and float64.
        inputs: tensors as laid out in memory, or None.
        wanted: inputs whose gradients are asked for.
        layout: of the gradients that come in from above.
        clean: values that `peer` and `exact` get for some inputs: ours may hold NaN where nothing looks.
        units: scale of the terms of a result, by name (``output 0``, ``grad x``), where it is above 1.
        narrow: dtypes that results are rounded to on the way, if narrower than the result itself.
        about: the sizes and options, for the report of a failure.
    """

    ours: Callable
    peer: Callable
    exact: Callable
    inputs: dict[str, torch.Tensor | None]
    wanted: tuple[str, ...] = ()
    layout: int = 0
    clean: dict[str, torch.Tensor] = field(default_factory=dict)
    units: dict[str, float] = field(default_factory=dict)
    narrow: torch.dtype = torch.float32
    about: str = ""

    def _repr_pretty_(self, printer, cycle: bool) -> None:
        printer.text(repr(self))

    def __repr__(self) -> str:
        tensors = ", ".join(
            f"{name}: {str(t.dtype).removeprefix('torch.')} {tuple(t.shape)} strides {t.stride()} + {t.storage_offset()}"
            for name, t in self.inputs.items()
            if t is not None
        )
        return f"Problem({self.about}; {tensors}; gradients of {', '.join(self.wanted) or 'nothing'})"


def solve(function: Callable, inputs: dict, wanted: tuple[str, ...], layout: int) -> Results:
    """Outputs, and gradients of the `wanted` inputs for random gradients of the outputs laid out as `layout` says."""
    leaves = {
        name: t if t is None or not t.is_floating_point() else t.detach().requires_grad_(name in wanted)
        for name, t in inputs.items()
    }
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    attached = [(i, output) for i, output in enumerate(outputs) if output.requires_grad]
    if attached:
        upstream = [_upstream(output, layout, i) for i, output in attached]
        grads = torch.autograd.grad(
            [output for _, output in attached], [leaves[name] for name in wanted], upstream, allow_unused=True
        )
        found |= {f"grad {name}": grad for name, grad in zip(wanted, grads) if grad is not None}
    return found


def _upstream(output: torch.Tensor, layout: int, i: int) -> torch.Tensor:
    """Values that every dtype can hold."""
    values = torch.randint(-64, 65, output.shape, generator=torch.Generator().manual_seed(layout + i)) / 32
    return embed(values.to(output.dtype), layout)


def run(problem: Problem) -> None:
    """Calls all three and raises AssertionError if ours breaks the rule or touches its inputs."""
    before = {name: storage(t) for name, t in problem.inputs.items() if t is not None}
    ours = solve(problem.ours, problem.inputs, problem.wanted, problem.layout)
    for name, bytes_before in before.items():
        assert torch.equal(storage(problem.inputs[name]), bytes_before), f"{name}, or memory around it, was written to"
    inputs = {**problem.inputs, **problem.clean}
    theirs = solve(problem.peer, inputs, problem.wanted, problem.layout)
    wide = {n: t.double() if t is not None and t.is_floating_point() else t for n, t in inputs.items()}
    exact = solve(problem.exact, wide, problem.wanted, problem.layout)
    assert ours.keys() == exact.keys(), f"got {sorted(ours)}, expected {sorted(exact)}"
    for name, truth in exact.items():
        compare(name, ours[name], theirs[name], truth, problem.units.get(name, 0.0), problem.narrow)


def compare(
    name: str,
    ours: torch.Tensor,
    theirs: torch.Tensor,
    exact: torch.Tensor,
    unit: float = 0.0,
    narrow: torch.dtype = torch.float32,
) -> None:
    """The rule at the top of this file, for one result."""
    assert ours.shape == exact.shape, f"{name}: got shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == theirs.dtype, f"{name}: got {ours.dtype}, expected {theirs.dtype}"
    finite = exact.isfinite()
    same = (ours.double() == exact) | (ours.isnan() & exact.isnan())
    assert (same | finite).all(), f"{name}: got other NaN or infinite values than expected"
    if not finite.any():
        return
    mine, peer, truth = ours.double()[finite], theirs.double()[finite], exact[finite]
    assert mine.isfinite().all(), (
        f"{name}: got NaN or infinity for finite values, {int((~mine.isfinite()).sum())} times"
    )
    scale = truth.abs().max().item()
    if truth.numel() < FEW:
        scale = max(scale, 1.0)
    scale = max(scale, unit)
    rounding = max(ROUNDING[ours.dtype], ROUNDING[narrow])
    floor = 1e-5 * max(1.0, scale) + 4 * rounding * scale
    error, allowed = (mine - truth).abs(), 2 * _largest(peer - truth) + floor
    worst = error.max().item()
    assert worst <= allowed, (
        f"{name}: error {worst:.3e} at flat position {error.argmax().item()} of {error.numel()}, "
        f"PyTorch's {_largest(peer - truth):.3e}, allowed {allowed:.3e}"
    )
    spread, allowed = _rms(mine - truth), 2 * _rms(peer - truth) + floor / 2
    assert spread <= allowed, (
        f"{name}: rms error {spread:.3e}, PyTorch's {_rms(peer - truth):.3e}, allowed {allowed:.3e}"
    )


def _largest(difference: torch.Tensor) -> float:
    value = difference.abs().max().item()
    return value if math.isfinite(value) else 0.0  # a peer that fails allows nothing


def _rms(difference: torch.Tensor) -> float:
    value = difference.square().mean().sqrt().item()
    return value if math.isfinite(value) else 0.0
