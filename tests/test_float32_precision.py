"""float32 products as sums of two bfloat16 (AMX, on request): as exact as said, and nothing changes elsewhere."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_as_accurate
from test_gemm_targets import surrounded

import llmfast
from llmfast import backend, reference

# (M, N, K): a tile, odd ones, several blocks of rows, of columns, and of depth
SHAPES = [(32, 32, 32), (33, 31, 65), (70, 67, 129), (600, 65, 70), (66, 600, 100), (64, 70, 1300), (300, 40, 1200)]


@pytest.fixture
def high(isa):
    """Precision "high" on each instruction set; yields the instruction set."""
    backend.set_float32_matmul_precision("high")
    yield isa
    backend.set_float32_matmul_precision("highest")


def split_calls(op: str) -> int:
    return sum(row["calls"] for row in backend.implementations(op) if row["isa"] == "amx_split")


def gradients(function, tensors: dict[str, torch.Tensor], dtype: torch.dtype, grad: torch.Tensor) -> dict:
    leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in tensors.items()}
    out = function(**leaves)
    found = torch.autograd.grad(out, list(leaves.values()), grad.to(dtype))
    return {"out": out.detach(), **dict(zip(leaves, found))}


def assert_gradients(ours, theirs, tensors: dict[str, torch.Tensor], grad: torch.Tensor) -> None:
    """`ours` in float32 is within 3e-5 of `theirs` in float64: of the largest value, after a chain of products."""
    results, exact = gradients(ours, tensors, torch.float32, grad), gradients(theirs, tensors, torch.float64, grad)
    for name, result in results.items():
        error, largest = (result - exact[name]).abs().max().item(), exact[name].abs().max().item()
        assert error <= 3e-5 * largest, f"{name}: error {error:.2e} of {largest:.2e}"


@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(high, shape, layout):
    M, N, K = shape
    x, weight = torch.randn(M, K), torch.randn(N, K)
    bias, grad = torch.randn(N), surrounded(torch.randn(M, N), layout)
    results = []
    before = split_calls("linear"), split_calls("linear_backward")
    for function, dtype in ((llmfast.linear, torch.float32), (F.linear, torch.float32), (F.linear, torch.float64)):
        leaves = [surrounded(t.to(dtype), layout).requires_grad_() for t in (x, weight)]
        leaves.append(bias.to(dtype, copy=True).requires_grad_())
        out = function(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))])
    for name, *values in zip(("out", "x", "weight", "bias"), *results):
        assert_as_accurate(*values, what=name)
    taken = int(high == "amx")
    assert (split_calls("linear"), split_calls("linear_backward")) == (before[0] + taken, before[1] + taken)


@pytest.mark.parametrize("activation", ["gelu_tanh", "silu"])
@pytest.mark.parametrize("M", [40, 1100])
def test_ffn(high, M, activation):
    C, width = 48, 130
    tensors = {
        "x": torch.randn(M, C),
        "up_weight": torch.randn(width, C) / 7,
        "down_weight": torch.randn(C, width) / 11,
    }
    if activation == "silu":
        tensors["gate_weight"] = torch.randn(width, C) / 7
    before = split_calls("ffn"), split_calls("ffn_backward")
    functions = [
        lambda activation=activation, ffn=ffn, **t: ffn(
            t["x"],
            t["up_weight"],
            None,
            t["down_weight"],
            None,
            activation=activation,
            gate_weight=t.get("gate_weight"),
        )
        for ffn in (llmfast.ffn, reference.ffn)
    ]
    assert_gradients(*functions, tensors, torch.randn(M, C))
    taken = int(high == "amx")
    assert (split_calls("ffn"), split_calls("ffn_backward")) == (before[0] + taken, before[1] + taken)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_linear_cross_entropy(high, reduction):
    M, C, V = 70, 50, 2100  # beyond a chunk of the vocabulary
    target = torch.randint(V, (M,))
    target[::5] = -100
    tensors = {"x": torch.randn(M, C), "weight": torch.randn(V, C) / 7}
    ops = ("linear_cross_entropy", "linear_cross_entropy_backward", "linear_cross_entropy_joint")
    before = sum(map(split_calls, ops))
    functions = [
        lambda op=op, **t: op(t["x"], t["weight"], target, reduction=reduction)
        for op in (
            llmfast.linear_cross_entropy,
            lambda x, weight, target, **k: F.cross_entropy(x @ weight.T, target, **k),
        )
    ]
    assert_gradients(*functions, tensors, torch.randn(M) if reduction == "none" else torch.tensor(1.0))
    assert (sum(map(split_calls, ops)) > before) == (high == "amx")


def test_about_sixteen_bits(high):
    """The error is that of two halves: hundreds of times below bfloat16's, and with AMX above float32's."""
    x, weight = torch.randn(64, 512), torch.randn(64, 512)
    exact = x.double() @ weight.double().T
    error = (llmfast.linear(x, weight) - exact).abs().max() / exact.abs().max()
    one_half = (x.bfloat16().double() @ weight.bfloat16().double().T - exact).abs().max() / exact.abs().max()
    assert error < 1e-5 and error < one_half / 100
    backend.set_float32_matmul_precision("highest")
    highest = (llmfast.linear(x, weight) - exact).abs().max() / exact.abs().max()
    assert (error > highest) == (high == "amx")


def test_values_of_two_halves_are_exact(high):
    x = torch.randint(-(2**15), 2**15, (40, 3)).float()  # 16 bits: a product of two is exact but for low * low
    weight = torch.eye(3).repeat(14, 1)
    assert torch.equal(llmfast.linear(x, weight), x.repeat(1, 14))


def test_infinities_and_nan_spoil_their_row_or_column_only(high):
    x, weight = torch.randn(45, 40), torch.randn(43, 40)
    clean = llmfast.linear(x, weight)
    x[7, 39], x[40, 0], x[20, 5], weight[5, 20] = float("nan"), float("inf"), -3.4e38, float("-inf")
    out = llmfast.linear(x, weight)
    hit = torch.zeros_like(out, dtype=torch.bool)
    hit[[7, 40]], hit[:, 5] = True, True
    if high == "amx":
        hit[20] = True
        assert out[20].isnan().all()
    else:
        hit[20] = ~out[20].isfinite()
    assert not out[hit].isfinite().any()
    hit[20] = True
    assert torch.equal(out[~hit], clean[~hit])


def test_what_does_not_change(high):
    """Few rows, other dtypes and attention."""
    few, x, weight = torch.randn(16, 90), torch.randn(80, 90), torch.randn(100, 90)
    q = torch.randn(2, 2, 40, 16)
    calls = [
        lambda: llmfast.linear(few, weight),
        lambda: llmfast.linear(x.bfloat16(), weight.bfloat16()),
        lambda: llmfast.linear(x.half(), weight.half()),
        lambda: llmfast.attention(q, q, q, causal=True),
    ]
    asked = [call() for call in calls]
    backend.set_float32_matmul_precision("highest")
    assert all(torch.equal(before, call()) for before, call in zip(asked, calls))


def test_a_model_trains(high):
    torch.manual_seed(0)
    model = llmfast.models.GPT(llmfast.models.GPTConfig(vocab_size=67, layers=2, heads=2, width=32, context=48))
    tokens = torch.randint(67, (3, 48))

    def step() -> tuple[torch.Tensor, list[torch.Tensor]]:
        loss = model(tokens[:, :-1], tokens[:, 1:])
        return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))

    loss, grads = step()
    backend.set_float32_matmul_precision("highest")
    expected_loss, expected = step()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    for grad, other in zip(grads, expected):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


def test_setting():
    assert backend.get_float32_matmul_precision() == "highest"
    backend.set_float32_matmul_precision("high")
    assert backend.get_float32_matmul_precision() == "high"
    backend.set_float32_matmul_precision("highest")
    with pytest.raises(ValueError, match="precision: got 'medium', expected 'highest' or 'high'"):
        backend.set_float32_matmul_precision("medium")


def test_the_row_says_that_it_runs_on_request(isa):
    if not any(row["isa"] == "amx_split" for row in backend.implementations("linear")):
        return  # not an x86 processor
    [row] = [row for row in backend.implementations("linear") if row["isa"] == "amx_split"]
    assert row["dtypes"] == ["float32"] and not row["available"] and row["why_not"]
    backend.set_float32_matmul_precision("high")
    [row] = [row for row in backend.implementations("linear") if row["isa"] == "amx_split"]
    assert row["available"] == (isa == "amx")
    backend.set_float32_matmul_precision("highest")
