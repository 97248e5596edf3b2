"""The GEMM core on every instruction set: sizes around its tiles and blocks, every stride, nothing read beyond.

Every row runs where the machine has its instructions; the AMX and AVX-512 rows also in the emulated build (see
.ci/emulated). Products go through the native `linear`, with a float32 output so that only the accumulation rounds.
"""

import pytest
import torch
from conftest import assert_as_accurate

from llmfast import backend

DTYPES = [torch.bfloat16, torch.float32]
# (M, N, K): below, at and above tiles of 32 x 32 and depth 32; several sub-panels in L1 (K > 512); depth split into
# blocks (K > 2208 for bf16); several blocks of rows (M x K beyond L2); few rows, which skip packing; few rows of great
# depth, for which B is packed in parts; rows 4 KiB apart, which are packed where others are not; up to 8 rows across
SHAPES = [
    (1, 40, 70), (4, 33, 513), (5, 3, 2), (31, 32, 32), (32, 31, 33), (33, 65, 63), (64, 64, 64), (70, 40, 1025),
    (37, 45, 2300), (300, 34, 2240), (1030, 70, 64), (1100, 40, 600), (50, 75, 9001), (100, 40, 7000),
    (40, 35, 1017), (6, 70, 33), (7, 33, 40), (8, 100, 301),
]  # fmt: skip
LAYOUTS = ["rows", "columns", "strided"]


def surrounded(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same matrix as a view of a larger buffer that is NaN everywhere else, with the given contiguous direction."""
    rows, cols = values.shape
    if layout == "columns":
        return surrounded(values.t().contiguous(), "rows").t()
    step = 3 if layout == "strided" else 1
    buffer = torch.full((rows + 2, cols * step + 7), float("nan"), dtype=values.dtype)
    view = buffer[1 : rows + 1, 3 : 3 + cols * step : step]
    view.copy_(values)
    return view


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T (+ bias) in float32 from the native module; checks that it writes nothing else."""
    M, N = x.shape[0], weight.shape[0]
    buffer = torch.full((M + 2, N + 5), -7.0)
    out = buffer[1 : M + 1, 2 : N + 2]
    backend.native().linear_forward(out, x, weight, bias)
    result = out.clone()
    out.fill_(-7.0)
    assert (buffer == -7.0).all(), "wrote outside its output"
    return result


def assert_product(x: torch.Tensor, weight: torch.Tensor) -> None:
    assert_as_accurate(product(x, weight), x.float() @ weight.float().t(), x.double() @ weight.double().t())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes(isa, shape, dtype):
    M, N, K = shape
    x, weight = torch.randn(M, K, dtype=dtype), torch.randn(N, K, dtype=dtype)
    for x_layout, weight_layout in (("rows", "rows"), ("columns", "columns")):
        assert_product(surrounded(x, x_layout), surrounded(weight, weight_layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_layout", LAYOUTS)
@pytest.mark.parametrize("x_layout", LAYOUTS)
def test_strides(isa, x_layout, weight_layout, dtype):
    for M, N, K in ((3, 37, 45), (37, 34, 45), (65, 63, 97)):
        x, weight = torch.randn(M, K, dtype=dtype), torch.randn(N, K, dtype=dtype)
        assert_product(surrounded(x, x_layout), surrounded(weight, weight_layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_products(isa, dtype):
    M, N, K = 70, 41, 66
    grad, x, weight = (torch.randn(*s, dtype=dtype) for s in ((M, N), (M, K), (N, K)))
    grad_x, grad_weight, grad_bias = torch.empty(M, K), torch.empty(N, K), torch.empty(N)
    inputs = (surrounded(grad, "rows"), surrounded(x, "rows"), surrounded(weight, "rows"))
    backend.native().linear_backward(grad_x, grad_weight, grad_bias, *inputs)
    exact = grad.double(), x.double(), weight.double()
    single = grad.float(), x.float(), weight.float()
    for name, ours, formula in (
        ("grad_x", grad_x, lambda g, x, w: g @ w),
        ("grad_weight", grad_weight, lambda g, x, w: g.t() @ x),
        ("grad_bias", grad_bias, lambda g, x, w: g.sum(0)),
    ):
        assert_as_accurate(ours, formula(*single), formula(*exact), what=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_finite_values_stay_in_their_row_and_column(isa, dtype):
    x, weight = torch.randn(45, 40, dtype=dtype), torch.randn(43, 40, dtype=dtype)
    clean = product(x, weight)
    x[7, 39], x[40, 0], weight[5, 20] = float("nan"), float("inf"), float("nan")
    out = product(x, weight)
    hit = torch.zeros_like(out, dtype=torch.bool)
    hit[7], hit[40], hit[:, 5] = True, True, True
    assert not out[hit].isfinite().any()
    assert torch.equal(out[~hit], clean[~hit])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_share_the_work_and_give_the_same_result(isa, dtype):
    shapes = [(1100, 70, 40), (100, 300, 40), (2, 300, 40)]  # split by rows, by columns, few rows
    operands = [(torch.randn(M, K, dtype=dtype), torch.randn(N, K, dtype=dtype)) for M, N, K in shapes]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for x, weight in operands:
                assert_product(x, weight)
                assert torch.equal(product(x, weight), product(x, weight))
    finally:
        torch.set_num_threads(before)


def test_bf16_runs_on_the_best_row_and_rounds_to_nearest_even(isa):
    def calls():
        return {row["isa"]: row["calls"] for row in backend.implementations("linear")}

    x = torch.randn(33, 50, dtype=torch.bfloat16)
    weight, bias = torch.randn(35, 50, dtype=torch.bfloat16), torch.randn(35, dtype=torch.bfloat16)
    before = calls()
    out = torch.empty(33, 35, dtype=torch.bfloat16)
    backend.native().linear_forward(out, x, weight, bias)
    assert {name for name, n in calls().items() if n != before[name]} == {isa}
    assert torch.equal(out, product(x, weight, bias).bfloat16())


def test_denormal_results_round_like_torch_or_to_zero(isa):
    # AVX512_BF16 and AMX take denormals as zero; nothing else may happen to them.
    x = torch.full((32, 32), 2.0**-70, dtype=torch.bfloat16)
    weight = torch.full((32, 32), 2.0**-65, dtype=torch.bfloat16)
    out = product(x, weight)
    assert ((out == 0) | (out == 2.0**-130)).all()
