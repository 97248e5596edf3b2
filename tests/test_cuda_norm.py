"""add_layer_norm and add_rms_norm on CUDA kernels, emulated or real, against float64."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_as_accurate
from test_norm import MIXES, fused_norm, plain_norm, results_of, wide

import llmfast
from llmfast import backend, reference

pytest_plugins = "cuda_emulated"

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# One element; less than eight; every tail; a warp's and a block's rows; more rows than blocks of the backward pass
SHAPES = [(1, 1), (3, 7), (5, 16), (4, 31), (9, 264), (6, 777), (2, 1032), (3, 2051), (50, 40), (7, 44)]


def random(*shape, dtype=F32, device="cpu"):
    return torch.randn(*shape).to(dtype).to(device)


def compare(kind, inputs, out_dtype, grads):
    ours = results_of(fused_norm(kind), inputs, out_dtype, grads)
    theirs = results_of(plain_norm(kind), inputs, out_dtype, grads)
    exact = results_of(fused_norm(kind, reference), wide(inputs), torch.float64, grads)
    assert ours.keys() == theirs.keys() and ours["normed"].dtype == out_dtype
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert_as_accurate(ours[name], theirs[name], exact[name], what=name)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("mix", MIXES, ids=lambda m: "-".join(str(d).removeprefix("torch.") for d in m))
def test_forward_and_gradients(cuda, kind, mix):
    x_dtype, residual_dtype, weight_dtype, out_dtype = mix
    for shape in SHAPES if mix in MIXES[:2] else SHAPES[3:6]:
        C = shape[-1]
        inputs = [
            random(*shape, dtype=x_dtype, device=cuda),
            None if residual_dtype is None else random(*shape, dtype=residual_dtype, device=cuda),
            random(C, dtype=weight_dtype, device=cuda),
            random(C, dtype=weight_dtype, device=cuda) if kind == "layer" else None,
        ]
        if kind == "rms" and C == 1:
            inputs[0] = torch.ones_like(inputs[0])  # x / |x|: its gradient is a difference of equals
        grads = [
            random(*shape, dtype=out_dtype, device=cuda),
            random(*shape, dtype=residual_dtype or x_dtype, device=cuda),
        ]
        compare(kind, inputs, out_dtype, grads)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("C", [4096, 6160, 8208, 16400])
def test_wide_rows(cuda, kind, C):
    """Two groups of columns to a thread, rows that the backward pass and that neither pass keeps in registers."""
    inputs = [random(6, C, dtype=BF16, device=cuda), random(6, C, device=cuda), random(C, device=cuda), None]
    inputs[3] = random(C, device=cuda) if kind == "layer" else None
    compare(kind, inputs, BF16, [random(6, C, dtype=BF16, device=cuda), random(6, C, device=cuda)])


@pytest.mark.parametrize("C", [40, 1100])
def test_any_order_of_threads(thread_order, cuda, C):
    if cuda == "cuda" and thread_order != "forward":
        pytest.skip("a GPU has an order of its own")
    inputs = [random(17, C, device=cuda), random(17, C, device=cuda), random(C, device=cuda), random(C, device=cuda)]
    compare("layer", inputs, F32, [random(17, C, device=cuda), random(17, C, device=cuda)])


def test_constant_rows_in_half_precision(cuda):
    """The mean of the rounded sum differs from the saved one; without its own, xhat would be 316 times the difference."""
    x = torch.full((4, 320), 1.001, dtype=BF16, device=cuda)
    residual = torch.full((4, 320), 1000.0, dtype=BF16, device=cuda)
    inputs = [x, residual, random(320, dtype=BF16, device=cuda), random(320, dtype=BF16, device=cuda)]
    compare("layer", inputs, BF16, [random(4, 320, dtype=BF16, device=cuda) for _ in range(2)])


def test_large_mean_does_not_cancel(cuda):
    x = random(4, 777, device=cuda) + 1000
    normed, _ = llmfast.add_layer_norm(x, torch.zeros_like(x), torch.ones(777, device=cuda), None)
    exact = F.layer_norm(x.double(), (777,))
    assert_as_accurate(normed, F.layer_norm(x, (777,)), exact)


def test_strides(cuda):
    weight, bias = random(24, device=cuda), random(24, device=cuda)
    base = random(5, 3, 4, 24, device=cuda)
    views = {
        "row stride": random(6, 40, device=cuda)[:, :24],
        "unaligned start": random(6, 40, device=cuda)[:, 3:27],
        "odd row stride": random(6, 27, device=cuda)[:, :24],
        "permuted": base.permute(2, 0, 1, 3),
        "sliced": base[::2, :, 1:3],
        "expanded": random(1, 24, device=cuda).expand(7, 24),
        "columns": random(24, 6, device=cuda).t(),
        "one dimension": random(24, device=cuda),
        "seven dimensions": random(2, 1, 2, 1, 2, 1, 24, device=cuda),
    }
    for name, x in views.items():
        backwards = list(range(x.dim() - 1, -1, -1))
        for residual in (None, random(*x.shape, device=cuda), random(*x.shape[::-1], device=cuda).permute(backwards)):
            grads = [random(*x.shape, device=cuda), random(*x.shape[::-1], device=cuda).permute(backwards)]
            ours = results_of(fused_norm("layer"), [x, residual, weight, bias], F32, grads)
            exact = results_of(fused_norm("layer", reference), wide([x, residual, weight, bias]), torch.float64, grads)
            for key in ours:
                torch.testing.assert_close(ours[key].double(), exact[key], rtol=1e-5, atol=2e-5, msg=f"{name}: {key}")


def test_strided_weights(cuda):
    x, weight = random(4, 24, device=cuda), random(24, 2, device=cuda)[:, 0]
    ours, _ = llmfast.add_rms_norm(x, None, weight)
    torch.testing.assert_close(ours, reference.add_rms_norm(x, None, weight)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (3, 0)], ids=str)
def test_empty(cuda, shape):
    x, residual = (random(*shape, device=cuda).requires_grad_() for _ in range(2))
    weight, bias = (random(shape[-1], device=cuda).requires_grad_() for _ in range(2))
    normed, summed = llmfast.add_layer_norm(x, residual, weight, bias)
    assert normed.shape == summed.shape == x.shape
    (normed.sum() + summed.sum()).backward()
    assert x.grad.shape == residual.grad.shape == x.shape
    assert not weight.grad.any() and not bias.grad.any()


def test_bitwise_repeatable(cuda):
    inputs = [random(90, 136, dtype=BF16, device=cuda), random(90, 136, device=cuda)]
    inputs += [random(136, device=cuda), random(136, device=cuda)]
    grads = [random(90, 136, dtype=BF16, device=cuda), random(90, 136, device=cuda)]
    first, again = (results_of(fused_norm("layer"), inputs, BF16, grads) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], again[name]), name


def test_memory_is_read_and_written_once(cuda):
    if cuda == "cuda":
        pytest.skip("only the emulation counts bytes")
    module, M, C = backend.native_cuda(), 12, 768
    x, residual = random(M, C, dtype=BF16), random(M, C)
    weight, bias = random(C), random(C)
    module.reset_counters()
    llmfast.add_layer_norm(x, residual, weight, bias)
    counted = module.counters()
    assert counted["bytes_loaded"] == M * C * (2 + 4 + 4 + 4) and counted["bytes_stored"] == M * C * (2 + 4)
    assert counted["launches"] == 1


def test_native_checks_guard_memory(cuda):
    module = backend.native_cuda()
    x, rstd = random(4, 8, device=cuda), random(4, device=cuda)
    with pytest.raises(ValueError, match="normed: got float32"):
        module.norm_forward(random(4, 9, device=cuda), None, None, rstd, x, None, None, None, 1e-5, False)
