"""rotary, embedding, AdamW and the gradient norm on CUDA kernels, emulated or real, against float64."""

import math

import pytest
import torch
from conftest import assert_as_accurate
from test_embedding import SHAPES as EMBEDDING_SHAPES
from test_embedding import plain_torch
from test_rotary import SHAPES as ROTARY_SHAPES
from test_rotary import half_rotation
from test_rotary import results_of as rotary_results_of

import llmfast
from llmfast import backend, reference

pytest_plugins = "cuda_emulated"

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


# ---- rotary ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", ROTARY_SHAPES, ids=str)
def test_rotary(cuda, shape, dtype):
    B, Hq, Hkv, T, D, R = shape
    q, k = torch.randn(B, Hq, T, D).to(cuda, dtype), torch.randn(B, Hkv, T, D).to(cuda, dtype)
    cos, sin = (table.to(cuda) for table in llmfast.rotary_tables(T, R))
    grads = torch.randn_like(q), torch.randn_like(k)
    ours = rotary_results_of(llmfast.rotary, q, k, cos, sin, grads)
    theirs = rotary_results_of(half_rotation, q, k, cos, sin, grads)
    exact = rotary_results_of(half_rotation, q.double(), k.double(), cos.double(), sin.double(), grads)
    for name, a, b, c in zip(("q", "k", "grad_q", "grad_k"), ours, theirs, exact):
        assert_as_accurate(a, b, c, what=name)


def test_rotary_layouts(cuda):
    """Heads inside tokens, unaligned heads, a batch dimension of stride 0, tables per batch and of half precision."""
    cos, sin = (table.to(cuda) for table in llmfast.rotary_tables(5, 16))
    tables = [
        (cos, sin),
        (cos[None], sin[None]),
        (torch.stack([cos, -cos]), torch.stack([sin, sin])),
        (cos.half(), sin.half()),
    ]
    packed = torch.randn(2, 5, 4, 24, device=cuda).transpose(1, 2)
    for q in (
        packed,
        packed[..., 3:21],
        packed[:1].expand(2, 4, 5, 24),
        torch.randn(2, 4, 5, 25, device=cuda)[..., :20],
    ):
        for c, s in tables:
            ours = llmfast.rotary(q, q[:, :2], c, s)
            exact = reference.rotary(q.double(), q[:, :2].double(), c.double(), s.double())
            torch.testing.assert_close([t.double() for t in ours], list(exact), rtol=1e-6, atol=1e-6)


# ---- embedding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (BF16, F32)], ids=str)
@pytest.mark.parametrize("positions", [None, "default", "given"])
def test_embedding(cuda, dtypes, positions):
    weight_dtype, out_dtype = dtypes
    for shape, V, C in EMBEDDING_SHAPES:
        ids = torch.randint(V, shape, device=cuda)
        weight = torch.randn(V, C).to(cuda, weight_dtype)
        table = None if positions is None else torch.randn(shape[-1] + 2, C).to(cuda, weight_dtype)
        position_ids = torch.arange(shape[-1], device=cuda)
        if positions == "given":
            position_ids = torch.randint(shape[-1] + 2, (*shape[:-2], 1, shape[-1])[-len(shape) :], device=cuda)
        grad = torch.randn(*shape, C).to(cuda, out_dtype)
        results = []
        for function, cast in ((llmfast.embedding, None), (plain_torch, None), (plain_torch, torch.float64)):
            tables = [t if t is None else t.to(cast or t.dtype, copy=True).requires_grad_() for t in (weight, table)]
            given = position_ids if table is not None and (positions == "given" or function is plain_torch) else None
            out = function(ids, *tables, given, out_dtype=cast or out_dtype)
            out.backward(grad.to(out.dtype))
            results.append([out.detach(), *(t.grad for t in tables if t is not None)])
        for name, a, b, c in zip(("out", "grad_weight", "grad_position_weight"), *results):
            assert a.dtype == b.dtype
            assert_as_accurate(a, b, c, what=name)


def test_embedding_of_repeated_and_strided_ids(cuda):
    ids = torch.tensor([[3, 3, 3, 0], [3, 1, 3, 3], [0, 3, 3, 3]], dtype=torch.int32, device=cuda).t()
    weight = torch.randn(5, 300, device=cuda, requires_grad=True)
    grad = torch.randn(4, 3, 300, device=cuda)
    llmfast.embedding(ids, weight).backward(grad)
    exact = torch.zeros(5, 300, dtype=torch.float64, device=cuda).index_add_(
        0, ids.reshape(-1), grad.double().view(12, 300)
    )
    torch.testing.assert_close(weight.grad.double(), exact, rtol=1e-6, atol=1e-6)


def test_ids_out_of_range_touch_nothing(cuda):
    ids = torch.tensor([1, -1, 7, 2], device=cuda)
    weight = torch.randn(5, 12, device=cuda, requires_grad=True)
    out = llmfast.embedding(ids, weight)
    assert torch.equal(out[[0, 3]], weight[[1, 2]]) and out[[1, 2]].isnan().all()
    out.backward(torch.ones_like(out))
    assert weight.grad.sum() == 24


# ---- AdamW -------------------------------------------------------------------------------------------------------------

OPTIONS = {"lr": 3e-3, "betas": (0.85, 0.98), "eps": 1e-7, "weight_decay": 0.1}


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_adamw_steps(cuda, dtype):
    """Forty tensors, more than a launch takes, of all sizes around eight elements and a block's piece."""
    sizes = [*range(36), 250, 16384, 16391, 40000]
    start = [torch.randn(n).to(cuda, dtype) for n in sizes]
    start[30] = torch.randn(5, 6).to(cuda, dtype).t()  # dense in another order
    ours = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in start]
    exact = [t.double().requires_grad_() for t in start]
    theirs = [t.float().requires_grad_() for t in start]
    optimizers = (
        llmfast.AdamW(ours, **OPTIONS),
        torch.optim.AdamW(theirs, **OPTIONS),
        torch.optim.AdamW(exact, **OPTIONS),
    )
    for _ in range(4):
        for a, b, c in zip(ours, theirs, exact):
            grad = torch.randn(a.shape).to(cuda, dtype) * 1e-2
            a.grad, b.grad, c.grad = torch.empty_like(a).copy_(grad), grad.float() * 0.5, grad.double() * 0.5
        optimizers[0].step(grad_scale=0.5)
        optimizers[1].step()
        optimizers[2].step()
    for n, a, b, c in zip(sizes, ours, theirs, exact):
        master = a if dtype == F32 else optimizers[0].state[a]["master"]
        assert_as_accurate(master.detach(), b.detach(), c.detach(), what=f"{n} elements")
        if dtype != F32:
            assert torch.equal(a.detach(), master.to(dtype))


def test_gradient_norm(cuda):
    for dtype in (F32, BF16, F16):
        grads = [torch.randn(n).to(cuda, dtype) for n in (*range(40), 16384, 40001)]
        exact = math.sqrt(sum(g.double().square().sum().item() for g in grads))
        norm, scale = llmfast.clip_grad_norm(grads, 1.0)
        assert math.isclose(norm, exact, rel_tol=1e-6) and math.isclose(scale, 1 / (exact + 1e-6), rel_tol=1e-6)
        norm, scale = llmfast.clip_grad_norm(grads, exact, grad_scale=-0.5)
        assert math.isclose(norm, exact / 2, rel_tol=1e-6) and scale == -0.5
        assert norm.untyped_storage().nbytes() == 8  # who keeps a norm for a log keeps no scratch
    norm, scale = llmfast.clip_grad_norm([torch.full((3,), math.inf, device=cuda)], 1.0)
    assert norm == math.inf and scale == 0
    assert llmfast.clip_grad_norm([torch.full((3,), math.inf, device=cuda)], math.inf)[1] == 1
    assert llmfast.clip_grad_norm([torch.full((3,), math.nan, device=cuda)], 1.0)[1].isnan()
    with pytest.raises(RuntimeError, match="norm of the gradients is inf"):
        llmfast.clip_grad_norm([torch.full((3,), math.inf, device=cuda)], 1.0, error_if_nonfinite=True)


def test_a_step_takes_its_scale_from_the_device(cuda):
    """As `clip_grad_norm` returns it; and with one that is not finite all but the step stays as it was."""
    start, grad = torch.randn(300).to(cuda), torch.randn(300).to(cuda)
    results = []
    for as_number in (False, True):
        p = start.clone().requires_grad_()
        p.grad = grad.clone()
        optimizer = llmfast.AdamW([p], **OPTIONS)
        norm, scale = llmfast.clip_grad_norm([p], 0.25)
        assert isinstance(scale, torch.Tensor) and scale.dim() == 0 and scale.device.type == start.device.type
        optimizer.step(grad_scale=scale.item() if as_number else scale)
        results.append([p.detach().clone(), *(optimizer.state[p][name].clone() for name in ("exp_avg", "exp_avg_sq"))])
        for bad in (math.nan, math.inf, -math.inf):
            optimizer.step(grad_scale=torch.tensor(bad, device=cuda))
        now = [p, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]]
        assert all(torch.equal(a, b) for a, b in zip(now, results[-1])) and optimizer.state[p]["step"] == 4
    assert all(torch.equal(a, b) for a, b in zip(*results)) and not torch.equal(results[0][0], start)


def test_each_element_is_read_and_written_once(cuda):
    if cuda == "cuda":
        pytest.skip("only the emulation counts bytes")
    module = backend.native_cuda()
    p = torch.randn(1000, 24, requires_grad=True)
    p.grad = torch.randn(1000, 24)
    optimizer = llmfast.AdamW([p])
    module.reset_counters()
    optimizer.step()
    assert module.counters()["bytes_loaded"] == 16 * p.numel() and module.counters()["bytes_stored"] == 12 * p.numel()
    module.reset_counters()
    q = torch.randn(2, 4, 8, 64, dtype=BF16)
    llmfast.rotary(q, q[:, :0], *llmfast.rotary_tables(8, 64))
    assert module.counters()["bytes_stored"] == 2 * q.numel()


@pytest.mark.parametrize(
    "op", ["add_layer_norm", "add_rms_norm_backward", "rotary", "embedding", "embedding_backward", "adamw"]
)
def test_rows_are_listed(cuda, op):
    (row,) = (row for row in backend.native_cuda().implementations(op) if row["isa"] == "sm80")
    assert row["available"] and row["dtypes"] == ["float32", "bfloat16", "float16"] and row["calls"] >= 0
