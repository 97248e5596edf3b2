"""``AdamW`` as one native pass over all parameters, and ``clip_grad_norm`` that leaves the gradients alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import chain
from types import ModuleType
from typing import Any

import torch

from llmfast import backend
from llmfast.ops._native_op import overrides_torch

__all__ = ["AdamW", "clip_grad_norm"]

_NATIVE = (torch.float32, torch.bfloat16, torch.float16)
_STATE = ("exp_avg", "exp_avg_sq", "master")


class AdamW(torch.optim.Optimizer):
    """AdamW (decoupled weight decay) with the arithmetic of `torch.optim.AdamW`: every step is one native call that
    reads each gradient once and writes parameter and state in the same pass, threads sharing all elements evenly.

    Args:
        params: tensors or parameter groups, as for every torch optimizer; float32, bfloat16, float16 (or float64 and
            DTensors, as FSDP has them, which run in plain torch), dense, any order of dimensions. Gradients have the
            parameter's dtype or float32.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`; a group may override each.

    State per parameter: ``step``, ``exp_avg``, ``exp_avg_sq`` and, for bfloat16 and float16 parameters, ``master``, the
    float32 value whose rounding the parameter is; all of them float32. `load_state_dict` restores every bit of it and
    takes the state of `torch.optim.AdamW` too. Whoever writes half-precision parameters by hand afterwards calls
    `reset_master`, or the next step overwrites them.

    Raises:
        TypeError: a parameter is not floating. ValueError: a hyperparameter is out of range, or a parameter has gaps or
        overlaps in memory.

    Example:
        >>> optimizer = llmfast.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
        >>> norm, scale = llmfast.clip_grad_norm(model.parameters(), 1.0)
        >>> optimizer.step(grad_scale=scale)
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "eps", "weight_decay"):
            if not group[name] >= 0:
                raise ValueError(f"{name}: got {group[name]}, expected >= 0")
        if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas: got {group['betas']}, expected two numbers in [0, 1)")
        for p in group["params"]:
            if p.dtype not in (*_NATIVE, torch.float64):
                raise TypeError(f"params: got dtype {p.dtype}, expected float32, bfloat16, float16 or float64")
            if (module := _module_for(p)) and not module.is_dense(p):
                raise ValueError(f"params: got shape {tuple(p.shape)} with strides {p.stride()}, expected dense memory")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, grad_scale: float | torch.Tensor = 1.0) -> Any:
        """Updates every parameter that has a gradient, which counts as ``grad * grad_scale``.

        Args:
            closure: re-evaluates the model and returns the loss, which is then this method's result.
            grad_scale: for clipping (see `clip_grad_norm`), accumulation or a scaled loss, without a pass of its own. A
                tensor of one element on a GPU is not waited for; where it is not finite, kernels there leave parameters
                and averages as they are, and the step still counts.

        Raises:
            ValueError: a gradient is sparse. TypeError: a gradient's dtype is neither float32 nor its parameter's.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rows: dict[torch.device, list[tuple]] = {}
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad, state = _checked_grad(p), self._state_of(p)
                if _module_for(p):
                    master = state.get("master")
                    row = (p, grad, state["exp_avg"], state["exp_avg_sq"], master, state["step"], index)
                    rows.setdefault(p.device, []).append(row)
                else:
                    backend.count_fallback("adamw", _why_not_native(p))
                    _step_in_torch(p, grad, state, group, grad_scale)
        hyper = [(float(g["lr"]), *g["betas"], g["eps"], g["weight_decay"]) for g in self.param_groups]
        for device, of_device in rows.items():
            columns = [list(column) for column in zip(*of_device)]
            (_step_on_cpu if device.type == "cpu" else _step_on_gpu)(*columns, hyper, grad_scale)
            torch.autograd.graph.increment_version(columns[0])
        return loss

    @torch.no_grad()
    def round_parameters(self, dtype: torch.dtype) -> None:
        """Rounds all float32 parameters to `dtype` and keeps their present values as masters: mixed-precision training.

        Masters made from parameters that were rounded before would start up to half a unit in the last place off.

        Raises:
            ValueError: `dtype` is not bfloat16, float16 or float32 (which changes nothing).

        Example:
            >>> optimizer = llmfast.AdamW(model.parameters())
            >>> optimizer.round_parameters(torch.bfloat16)
        """
        if dtype not in _NATIVE:
            raise ValueError(f"dtype: got {dtype}, expected torch.float32, torch.bfloat16 or torch.float16")
        for group in self.param_groups:
            for p in group["params"]:
                if p.dtype == torch.float32 and dtype != torch.float32:
                    self.state[p]["master"] = p.detach().clone()
                    p.data = p.data.to(dtype)

    def reset_master(self) -> None:
        """Makes the float32 master copies equal to the parameters, after those were written by other means."""
        with torch.no_grad():
            for p, state in self.state.items():
                if "master" in state:
                    state["master"].copy_(p)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a `state_dict`, copying its tensors; float state stays float32 whatever the parameter's dtype.

        Raises:
            ValueError: it does not fit these parameters, or is of an AMSGrad or maximising optimizer.
        """
        if any(group.get("amsgrad") or group.get("maximize") for group in state_dict["param_groups"]):
            raise ValueError("state_dict: got amsgrad=True or maximize=True, which AdamW here does not have")
        super().load_state_dict(state_dict)  # casts floating state to the parameter's dtype: redone below
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for saved_id, p in zip(saved_ids, chain.from_iterable(group["params"] for group in self.param_groups)):
            saved = state_dict["state"].get(saved_id)
            if saved is None:
                continue
            state = self.state[p]
            state["step"] = torch.full((), float(saved["step"]), dtype=torch.float32, device="cpu")
            for name in _STATE:
                if name not in saved:
                    continue
                if saved[name].shape != p.shape:
                    shape = tuple(saved[name].shape)
                    raise ValueError(f"state_dict: {name} {saved_id} has shape {shape}, expected {tuple(p.shape)}")
                state[name] = torch.empty_like(p, dtype=_state_dtype(p), requires_grad=False).copy_(saved[name])

    def _state_of(self, p: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            state["exp_avg"] = torch.zeros_like(p, dtype=_state_dtype(p))
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=_state_dtype(p))
        if "master" not in state and p.dtype in (torch.bfloat16, torch.float16):
            state["master"] = p.detach().to(torch.float32)
        return state


def clip_grad_norm(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    *,
    grad_scale: float = 1.0,
    error_if_nonfinite: bool = False,
) -> tuple[float, float] | tuple[torch.Tensor, torch.Tensor]:
    """The L2 norm of all gradients together, and the factor that brings it down to `max_norm`.

    Nothing is written: hand the factor to ``AdamW.step(grad_scale=...)``, which multiplies while it reads. The norm is
    summed in float64 (of runs of 1,024, on a GPU 16,384, whose own sum is float32), in an order that does not depend on
    the number of threads.

    Args:
        parameters: parameters, of which those with a gradient count, or gradients (tensors that do not require grad).
        max_norm: largest norm allowed; ``math.inf`` only measures.
        grad_scale: what the gradients have yet to be multiplied with, for example 1 / accumulation steps. The norm is
            that of the scaled gradients, and the factor includes it.
        error_if_nonfinite: raise if the norm is infinite or NaN.

    Returns:
        ``(norm, scale)`` with ``scale = grad_scale * min(1, max_norm / (norm + 1e-6))`` as
        `torch.nn.utils.clip_grad_norm_` has it: 0 for an infinite norm, NaN for NaN. Floats; where all gradients are on
        one GPU, float32 tensors there without dimensions, so that nobody waits for it.

    Raises:
        ValueError: `max_norm` is negative or a gradient is sparse. RuntimeError: see `error_if_nonfinite`.

    Example:
        >>> norm, scale = llmfast.clip_grad_norm(model.parameters(), 1.0)
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm: got {max_norm}, expected >= 0")
    tensors = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    grads = [t.grad if t.requires_grad else t.detach() for t in tensors]
    native: dict[torch.device, list[torch.Tensor]] = {}
    squares = 0.0
    for grad in grads:
        if grad is None:
            continue
        if grad.layout != torch.strided:
            raise ValueError(f"parameters: got a gradient of layout {grad.layout}, expected a dense one")
        if module := _module_for(grad):
            native.setdefault(grad.device, []).append(grad if module.is_dense(grad) else grad.contiguous())
        else:
            backend.count_fallback("grad_norm", _why_not_native(grad))
            square = grad.double().square().sum()
            squares += (square.full_tensor() if hasattr(square, "full_tensor") else square).item()  # a DTensor's parts
    on_gpu = [of_device for device, of_device in native.items() if _runs_on_gpu(device)]
    if len(on_gpu) == len(native) == 1 and squares == 0.0:
        norm, scale = _clip_on_gpu(on_gpu[0], grad_scale, max_norm)
    else:
        squares += sum(_squares_on_cpu(of_device) for device, of_device in native.items() if not _runs_on_gpu(device))
        squares += sum(_clip_on_gpu(of_device, 1.0, math.inf)[0].item() ** 2 for of_device in on_gpu)
        norm = abs(grad_scale) * math.sqrt(squares)
        ratio = max_norm / (norm + 1e-6)
        scale = grad_scale * (1.0 if ratio >= 1 or math.isinf(max_norm) else ratio)
    if error_if_nonfinite and not math.isfinite(norm):
        raise RuntimeError(f"parameters: the norm of the gradients is {float(norm)}")
    return norm, scale


def _runs_on_gpu(device: torch.device) -> bool:
    return device.type != "cpu"


def _module_for(t: torch.Tensor) -> ModuleType | None:
    """The native module that takes `t`, if one does."""
    if t.dtype not in _NATIVE or t.dim() > 6 or overrides_torch(t):
        return None
    if t.is_cpu:
        return backend.native()
    return None if backend.why_not_native(t.device) else backend.native_cuda()


def _why_not_native(t: torch.Tensor) -> str:
    return f"a {type(t).__name__}" if overrides_torch(t) else f"no kernel for {t.dtype} on {t.device.type}"


def _step_on_cpu(params, grads, exp_avgs, exp_avg_sqs, masters, steps, group_of, hyper, grad_scale) -> None:
    scale = float(grad_scale)
    backend.native().adamw_step(params, grads, exp_avgs, exp_avg_sqs, masters, steps, group_of, hyper, scale)


def _step_on_gpu(params, grads, exp_avgs, exp_avg_sqs, masters, steps, group_of, hyper, grad_scale) -> None:
    if params[0].is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "AdamW.step: cannot be captured in a CUDA graph, whose replays would repeat one step's numbers"
        )
    torch._foreach_add_(steps, 1)
    numbers = [step.item() for step in steps]  # on the CPU, like every step
    scale, on_device = grad_scale, None
    if isinstance(grad_scale, torch.Tensor):
        scale, on_device = 1.0, grad_scale.detach().reshape(()).to(params[0].device, torch.float32)
    stream = backend.stream_of(params[0])
    backend.native_cuda().adamw_step(
        params, grads, exp_avgs, exp_avg_sqs, masters, numbers, group_of, hyper, scale, on_device, stream
    )


def _squares_on_cpu(grads: list[torch.Tensor]) -> float:
    return backend.native().grad_norm(grads) ** 2


def _clip_on_gpu(grads: list[torch.Tensor], grad_scale: float, max_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
    native = backend.native_cuda()
    numbers = grads[0].new_empty(2, dtype=torch.float32)  # kept for as long as the caller keeps either
    sums = grads[0].new_empty(native.norm_pieces(grads), dtype=torch.float32)
    native.clip_norm(grads, grad_scale, max_norm, numbers, sums, backend.stream_of(numbers))
    return numbers[0], numbers[1]


def _state_dtype(p: torch.Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def _checked_grad(p: torch.Tensor) -> torch.Tensor:
    grad = p.grad
    if grad.layout != torch.strided:
        raise ValueError(f"params: got a gradient of layout {grad.layout}, expected a dense one")
    if grad.dtype not in (p.dtype, torch.float32):
        raise TypeError(f"params: got a gradient of dtype {grad.dtype}, expected {p.dtype} or torch.float32")
    if grad.stride() != p.stride():  # the state has the parameter's layout
        grad = torch.empty_like(p, dtype=grad.dtype, requires_grad=False).copy_(grad)
    return grad


def _step_in_torch(p, grad, state, group, grad_scale: float) -> None:
    beta1, beta2 = group["betas"]
    value = state.get("master", p)
    grad = grad.to(value.dtype) * grad_scale
    state["step"] += 1
    step = state["step"].item()
    state["exp_avg"].lerp_(grad, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denom = state["exp_avg_sq"].sqrt() / math.sqrt(1 - beta2**step) + group["eps"]
    value.mul_(1 - float(group["lr"]) * group["weight_decay"])
    value.addcdiv_(state["exp_avg"], denom, value=-float(group["lr"]) / (1 - beta1**step))
    if value is not p:
        p.copy_(value)
