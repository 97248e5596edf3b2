"""float32 products through halves in bfloat16 (AMX, on request): as exact as said, everywhere else unchanged."""

import pytest
import torch
from conftest import assert_as_accurate

import llmfast
from llmfast import backend

# (M, N, K): the least, odd ones, and beyond the blocks of 2048 that are split at a time, in each direction
SHAPES = [(64, 64, 64), (70, 67, 129), (2100, 65, 70), (66, 2100, 100), (64, 70, 2100)]


@pytest.fixture
def high():
    backend.set_float32_matmul_precision("high")
    yield
    backend.set_float32_matmul_precision("highest")


def calls(op: str) -> int:
    return sum(row["calls"] for row in backend.implementations(op) if row["isa"] == "amx")


def as_view(values: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "rows":
        return values
    if layout == "columns":
        return values.t().contiguous().t()
    buffer = torch.full((values.shape[0], 3 * values.shape[1]), float("nan"))
    buffer[:, ::3] = values
    return buffer[:, ::3]


@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_and_gradients(isa, high, shape, layout):
    M, N, K = shape
    x, weight = as_view(torch.randn(M, K), layout), as_view(torch.randn(N, K), layout)
    bias, grad = torch.randn(N), torch.randn(M, N)
    before = calls("linear_split"), calls("linear_split_backward")
    results = []
    for function, dtype in (
        (llmfast.linear, torch.float32),
        (torch.nn.functional.linear, torch.float32),
        (torch.nn.functional.linear, torch.float64),
    ):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
        out = function(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))])
    for name, ours, theirs, exact in zip(("out", "grad_x", "grad_weight", "grad_bias"), *results):
        assert_as_accurate(ours, theirs, exact, what=name)
    taken = int(isa == "amx")
    assert (calls("linear_split"), calls("linear_split_backward")) == (before[0] + taken, before[1] + taken)


def test_only_amx_changes(isa, high):
    x, weight = torch.randn(80, 90), torch.randn(100, 90)
    halves = llmfast.linear(x, weight)
    backend.set_float32_matmul_precision("highest")
    assert torch.equal(halves, llmfast.linear(x, weight)) == (isa != "amx")


def test_small_products_stay_in_float32(isa, high):
    before = calls("linear_split")
    llmfast.linear(torch.randn(63, 64), torch.randn(64, 64))
    llmfast.linear(torch.randn(64, 64, dtype=torch.bfloat16), torch.randn(64, 64, dtype=torch.bfloat16))
    assert calls("linear_split") == before


def test_infinities_and_nan(isa, high):
    x, weight = torch.rand(64, 64) + 0.3, torch.rand(64, 64) + 0.3  # halves of both signs, sums without cancellation
    x[0, 0], x[1, 1], x[2, 2] = float("inf"), float("-inf"), float("nan")
    weight[3, 5] = float("inf")
    ours, theirs = llmfast.linear(x, weight), torch.nn.functional.linear(x, weight)
    assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isinf(), theirs.isinf())
    assert torch.equal(ours[ours.isinf()], theirs[theirs.isinf()])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_setting():
    assert backend.get_float32_matmul_precision() == "highest"
    backend.set_float32_matmul_precision("high")
    assert backend.get_float32_matmul_precision() == "high"
    backend.set_float32_matmul_precision("highest")
    with pytest.raises(ValueError, match="precision: got 'medium', expected 'highest' or 'high'"):
        backend.set_float32_matmul_precision("medium")
