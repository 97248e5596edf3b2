"""Products of few and medium many rows with a weight ``[out, in]``, which targets read in place or pack in small pieces.

The weight and x lie where reading beyond them shows: surrounded by NaN, or before a page that no one may touch.
"""

import ctypes
import mmap

import pytest
import torch
from conftest import assert_as_accurate
from test_gemm_targets import product, surrounded

from llmfast import backend

BF16 = torch.bfloat16
# Rows of x: below, at and above squares of dot products (4), tiles (16), panels (32), the last count that is few (48 or
# 64), and beyond, where the weight goes through L1 in pieces.
ROWS = [1, 4, 5, 15, 16, 17, 31, 32, 33, 48, 49, 63, 64, 65, 96, 129]
# (N, K): groups of 32 weight rows and steps of 32 of depth, one less and one more; pieces of 512 of depth; one row, one
# column; more than one group a thread
SIZES = [
    (1, 1),
    (15, 31),
    (16, 33),
    (31, 32),
    (32, 64),
    (33, 2),
    (65, 97),
    (100, 544),
    (64, 1056),
    (7, 1025),
    (257, 63),
]


@pytest.mark.parametrize("M", ROWS)
def test_sizes(isa, M):
    for N, K in SIZES:
        x, weight = torch.randn(M, K, dtype=BF16), torch.randn(N, K, dtype=BF16)
        ours = product(surrounded(x, "rows"), surrounded(weight, "rows"))
        assert_as_accurate(ours, x.float() @ weight.float().t(), x.double() @ weight.double().t(), what=f"N={N} K={K}")


@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
@pytest.mark.parametrize("M", [5, 33, 70])
def test_x_of_any_strides_and_weights_with_rows_far_apart(isa, M, layout):
    N, K = 75, 77
    x = surrounded(torch.randn(M, K, dtype=BF16), layout)
    for gap in (1, 51, 2048 - K):  # odd; rows of 256 bytes; rows of 4 KiB, which share a set of L1
        weight = torch.full((N, K + gap), float("nan"), dtype=BF16)[:, :K]
        weight.copy_(torch.randn(N, K))
        assert_as_accurate(product(x, weight), x.float() @ weight.float().t(), x.double() @ weight.double().t())


@pytest.mark.parametrize("M", [3, 20, 70, 200])
def test_bias_and_rounding_to_bf16(isa, M):
    N, K = 83, 160
    x, weight, bias = torch.randn(M, K, dtype=BF16), torch.randn(N, K, dtype=BF16), torch.randn(N, dtype=BF16)
    out = torch.empty(M, N, dtype=BF16)
    backend.native().linear_forward(out, x, weight, bias)
    exact = x.double() @ weight.double().t() + bias.double()
    assert_as_accurate(out, torch.nn.functional.linear(x, weight, bias), exact)


@pytest.mark.parametrize("M", [5, 40, 100])
def test_threads_do_not_change_the_result(isa, M):
    x, weight = torch.randn(M, 600, dtype=BF16), torch.randn(333, 600, dtype=BF16)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(product(x, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


class BeforeAGuard:
    """Tensors that end where a page begins that may not be read: a read beyond the end kills the process."""

    def __init__(self, bytes_at_most: int):
        page = mmap.PAGESIZE
        self.end = (bytes_at_most + page - 1) // page * page
        self.memory = mmap.mmap(-1, self.end + page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        no_access = 0  # PROT_NONE
        assert libc.mprotect(address + self.end, page, no_access) == 0, ctypes.get_errno()

    def randn(self, rows: int, cols: int) -> torch.Tensor:
        begin = self.end - rows * cols * BF16.itemsize
        tensor = torch.frombuffer(self.memory, dtype=BF16, count=rows * cols, offset=begin).view(rows, cols)
        return tensor.copy_(torch.randn(rows, cols))


@pytest.mark.parametrize("M", [1, 4, 5, 16, 33, 64, 65])
def test_nothing_is_read_beyond_the_end(isa, M):
    weights, rows = BeforeAGuard(1 << 18), BeforeAGuard(1 << 18)
    for N, K in [(1, 1), (31, 33), (32, 31), (33, 32), (48, 65), (64, 1000), (65, 513)]:
        weight, x = weights.randn(N, K), rows.randn(M, K)
        assert_as_accurate(product(x, weight), x.float() @ weight.float().t(), x.double() @ weight.double().t())
