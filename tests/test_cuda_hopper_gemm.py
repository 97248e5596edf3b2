"""linear, ffn and linear_cross_entropy on the kernels for compute capability 9.0, emulated or real, against float64."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_as_accurate
from test_cuda_ffn import check as check_ffn
from test_cuda_linear import check as check_linear
from test_cuda_linear_cross_entropy import check as check_cross_entropy
from test_ffn import make as make_ffn
from test_linear_cross_entropy import make as make_cross_entropy

import llmfast
from llmfast import backend
from llmfast.ops.ffn import ACTIVATIONS

pytest_plugins = "cuda_emulated"

BF16, F16 = torch.bfloat16, torch.float16


# (M, N, K): a few rows, with narrow tiles once around their ring, and with more of them than the emulation has
# multiprocessors; ragged in M, N and K; more large tiles than multiprocessors
SHAPES = [(3, 16, 8), (64, 104, 1160), (33, 536, 72), (65, 72, 136), (300, 528, 72)]


def calls(op: str, isa: str = "sm90a") -> int:
    return next(row["calls"] for row in backend.native_cuda().implementations(op) if row["isa"] == isa)


@contextlib.contextmanager
def on_sm90a(*ops: str):
    """Within it the ops run on the sm90a row and not on sm80's."""
    before = [(calls(op), calls(op, "sm80")) for op in ops]
    yield
    for op, (ours, others) in zip(ops, before):
        assert calls(op) > ours and calls(op, "sm80") == others, op


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(hopper, shape, dtype):
    M, N, K = shape
    inputs = [torch.randn(*s).to(dtype).to(hopper) for s in ((M, K), (N, K), (N,))]
    with on_sm90a("linear", "linear_backward"):
        check_linear(inputs, torch.randn(M, N).to(dtype).to(hopper))


def test_depth_in_parts(hopper, thread_order):
    """A depth of 1,100 tokens for the gradient of a small weight; the same input gives the same bits."""
    inputs = [torch.randn(*s).to(BF16).to(hopper) for s in ((1100, 40), (24, 40), (24,))]
    grad = torch.randn(1100, 24).to(BF16).to(hopper)
    with on_sm90a("linear", "linear_backward"):
        first = check_linear(inputs, grad)
        assert all(torch.equal(a, b) for a, b in zip(first, check_linear(inputs, grad)))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_few_rows_need_no_second_kernel(hopper, bias, thread_order):
    x, weight, offset = (torch.randn(*s).to(BF16).to(hopper) for s in ((17, 2048), (520, 2048), (520,)))
    offset = offset if bias else None
    if hopper == "cpu":
        backend.native_cuda().reset_counters()
    with on_sm90a("linear"):
        out = llmfast.linear(x, weight, offset)
    if hopper == "cpu":
        assert backend.native_cuda().counters()["launches"] == 1
    exact = F.linear(x.double(), weight.double(), offset.double() if bias else None)
    assert_as_accurate(out, F.linear(x, weight, offset), exact)


def test_wide_tiles(hopper):
    """Enough of them for a whole device, in one step of depth."""
    x, weight = torch.randn(1537, 16).to(BF16).to(hopper), torch.randn(2824, 16).to(BF16).to(hopper)
    with on_sm90a("linear"):
        out = llmfast.linear(x, weight)
    assert_as_accurate(out, F.linear(x, weight), F.linear(x.double(), weight.double()))


def test_rows_of_the_result_that_the_copy_engine_cannot_address(hopper):
    x, weight, bias = (torch.randn(*s).to(BF16).to(hopper) for s in ((70, 40), (133, 40), (133,)))
    with on_sm90a("linear"):
        out = llmfast.linear(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert_as_accurate(out, F.linear(x, weight, bias), exact)


def test_what_the_copy_engine_cannot_address_runs_elsewhere(hopper):
    before = calls("linear")
    x, weight = torch.randn(40, 52).to(BF16).to(hopper), torch.randn(24, 52).to(BF16).to(hopper)  # rows of 104 bytes
    check_linear([x, weight, None], torch.randn(40, 24).to(BF16).to(hopper))
    check_linear([x[:, 1:49], weight[:, 1:49], None], torch.randn(40, 24).to(BF16).to(hopper))
    assert calls("linear") == before
    wide = torch.randn(40, 96).to(BF16).to(hopper)
    check_linear([wide[:, 8:56], weight[:, :48].contiguous(), None], torch.randn(40, 24).to(BF16).to(hopper))
    assert calls("linear") == before + 1


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("shape", [(3, 8, 16), (130, 72, 264)], ids=str)
def test_ffn(hopper, shape, gated):
    with on_sm90a("ffn", "ffn_backward"):
        check_ffn(hopper, make_ffn(*shape, gated=gated), "silu" if gated else "gelu_tanh", BF16)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(hopper, activation):
    with on_sm90a("ffn", "ffn_backward"):
        for gated in (False, True):
            check_ffn(hopper, make_ffn(7, 24, 40, gated=gated), activation, F16)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(1, 8, 5), (70, 40, 65), (37, 16, 4500)], ids=str)
def test_cross_entropy(hopper, shape, dtype):
    with on_sm90a("linear_cross_entropy", "linear_cross_entropy_backward"):
        check_cross_entropy(hopper, *make_cross_entropy(*shape, 1.0 if shape[0] == 37 else 40.0), dtype)


@pytest.fixture
def real_hopper(hopper):
    """For what takes hours emulated: many tiles a block, every tile size, depths in parts, chunks of the vocabulary."""
    if hopper == "cpu":
        pytest.skip("no CUDA device of compute capability 9.0")
    return hopper


@pytest.mark.parametrize("shape", [(8200, 3072, 768), (8192, 768, 3000), (64, 4096, 4096), (8, 4096, 4096)], ids=str)
def test_linear_of_a_model(real_hopper, shape):
    M, N, K = shape
    inputs = [torch.randn(*s).to(BF16).to(real_hopper) for s in ((M, K), (N, K), (N,))]
    with on_sm90a("linear", "linear_backward"):
        check_linear(inputs, torch.randn(M, N).to(BF16).to(real_hopper))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_ffn_of_a_model(real_hopper, gated):
    with on_sm90a("ffn", "ffn_backward"):
        check_ffn(real_hopper, make_ffn(8200, 768, 3072, gated=gated), "silu" if gated else "gelu_tanh", BF16)


def test_cross_entropy_of_a_model(real_hopper):
    with on_sm90a("linear_cross_entropy", "linear_cross_entropy_backward"):
        check_cross_entropy(real_hopper, *make_cross_entropy(8200, 768, 30000), BF16)
