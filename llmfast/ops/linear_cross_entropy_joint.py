"""Loss and gradients of ``linear_cross_entropy`` in one pass, for losses that are one number, on the CPU.

The gradient of a sum or mean is known up to one factor, the upstream gradient, before ``backward`` runs. So the forward
pass computes it while it has the logits, which saves computing them again: three products instead of four.
"""

from __future__ import annotations

import torch

from llmfast import backend
from llmfast.ops._native_op import NativeOp, as_matrix, is_plain

__all__ = ["is_worthwhile", "linear_cross_entropy_joint"]

# Logits of a block of rows, in float32: 128 MiB. Each further block costs a pass over grad_weight's float32 sums and two
# packings of the weight, as much time as the products of some 90 rows: hence the fewest rows, whatever the vocabulary.
BLOCK_LOGITS = 1 << 25
FEWEST_ROWS = 256
# One pass packs x twice, where two passes in one native call compute the logits twice: the logits of few classes, or of
# little work (in multiplications), are the cheaper ones.
FEWEST_CLASSES = 80
LEAST_WORK = 1 << 22
# float32 sums for bfloat16 gradients of the weight, which several blocks need: 1 GiB, beyond it two passes are taken.
MOST_SUMS = 1 << 28
# The kernel counts classes in float32.
MOST_CLASSES = 1 << 24


def linear_cross_entropy_joint(x, weight, target, ignore_index: int, mean: bool) -> torch.Tensor:
    """The loss, whose ``backward`` has next to nothing left to do."""
    # functorch hides whose gradient is wanted
    both = torch._C._are_functorch_transforms_active()
    need_x, need_weight = both or x.requires_grad, both or weight.requires_grad
    return _joint(x, weight, target, ignore_index, mean, need_x, need_weight)[0]


def is_worthwhile(x: torch.Tensor, weight: torch.Tensor, reduction: str) -> bool:
    """Whether these arguments call for loss and gradients in one pass.

    float16 is left out: there the upstream gradient is what keeps small gradients from vanishing (loss scaling).
    """
    return (
        reduction != "none"
        and torch.is_grad_enabled()
        and x.numel() * weight.shape[0] >= max(1, LEAST_WORK)
        and weight.shape[0] >= FEWEST_CLASSES
        and (x.requires_grad or weight.requires_grad)
        and x.device.type == "cpu"
        and x.dtype != torch.float16
        and weight.shape[0] < MOST_CLASSES
        and (x.dtype == torch.float32 or weight.numel() <= MOST_SUMS or _one_block(x, weight))
    )


def _rows(M: int, C: int, V: int, sums: bool) -> int:
    """Rows to a block. One block needs no `sums` ``[V, C]``, whose memory then serves its logits."""
    most = max(FEWEST_ROWS, BLOCK_LOGITS // V)
    in_one = most + (C if sums else 0)
    if in_one >= M:
        return M
    blocks = -(-M // most)
    return -(-M // blocks)


def _one_block(x: torch.Tensor, weight: torch.Tensor) -> bool:
    (V, C), M = weight.shape, x.numel() // x.shape[-1]
    return _rows(M, C, V, sums=True) == M


def _forward(x, weight, target, ignore_index: int, mean: bool, need_x: bool, need_weight: bool):
    loss, grad_x, grad_weight = _fake(x, weight, target, ignore_index, mean, need_x, need_weight)
    (V, C), M = weight.shape, target.numel()
    sums = need_weight and x.dtype != torch.float32
    rows = _rows(M, C, V, sums)
    backend.native().linear_cross_entropy_joint(
        loss.view(1),
        grad_x.view(-1, C) if need_x else None,
        grad_weight if need_weight else None,
        as_matrix(x),
        weight,
        target.reshape(-1).contiguous(),
        ignore_index,
        mean,
        rows,
        x.new_empty(weight.shape, dtype=torch.float32) if sums and rows < M else None,
    )
    return loss, grad_x, grad_weight


def _fake(x, weight, target, ignore_index: int, mean: bool, need_x: bool, need_weight: bool):
    return (
        x.new_empty((), dtype=torch.float32),
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty(weight.shape if need_weight else (0,)),
    )


def _setup_context(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.needed = inputs[5:]


def _gradient(ctx, grad, *_):
    if grad is None:
        return (None,) * 7
    # What was saved may be handed on as it is if nobody will ask for it again: whoever gets it may write to it.
    as_is = is_plain(grad) and not _graph_is_kept() and grad.item() == 1
    scaled = (
        (saved if as_is else (saved * grad).to(saved.dtype)) if needed and asked else None
        for saved, needed, asked in zip(ctx.saved_tensors, ctx.needed, ctx.needs_input_grad)
    )
    return *scaled, None, None, None, None, None


def _graph_is_kept() -> bool:
    """Whether ``backward`` was told to ``retain_graph``; yes where this torch does not say."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


_joint = NativeOp(
    "linear_cross_entropy_joint(Tensor x, Tensor weight, Tensor target, int ignore_index, bool mean, bool need_x,"
    " bool need_weight) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    _setup_context,
    _gradient,
    devices=("CPU",),
)
