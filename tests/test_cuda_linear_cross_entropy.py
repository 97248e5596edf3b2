"""linear_cross_entropy on CUDA kernels, emulated or real, against float64 logits."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_as_accurate
from test_linear_cross_entropy import make, run, torch_logits

import llmfast
from llmfast import reference

pytest_plugins = "cuda_emulated"

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# (M, C, V): one row; beside tiles; several chunks of the vocabulary (4,096 forward, 2,048 and more backward), ragged
SHAPES = [(1, 8, 5), (70, 33, 65), (37, 16, 4500), (5, 24, 40)]


def check(device, x, weight, target, dtype, **options):
    x, weight, target = x.to(device), weight.to(device), target.to(device)
    ours = run(llmfast.linear_cross_entropy, x, weight, target, dtype, **options)
    theirs = run(torch_logits, x, weight, target, dtype, **options)
    exact = run(reference.linear_cross_entropy, x, weight, target, dtype, exact=True, **options)
    assert ours[0].dtype == F32 and ours[1].dtype == dtype
    for name, *triple in zip(("loss", "grad_x", "grad_weight"), ours, theirs, exact):
        assert_as_accurate(*triple, what=name)
    return ours


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients(cuda, shape, dtype):
    check(cuda, *make(*shape, 1.0 if shape[0] == 37 else 40.0), dtype)  # 40: confident rows


def test_wide_tiles(cuda):
    x, weight, target = make(1921, 8, 4000)
    loss = llmfast.linear_cross_entropy(x.to(BF16).to(cuda), weight.to(BF16).to(cuda), target.to(cuda))
    exact = reference.linear_cross_entropy(x.to(BF16).double(), weight.to(BF16).double(), target)
    torch.testing.assert_close(loss.cpu().double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_and_ignore_index(cuda, reduction):
    x, weight, target = make(10, 8, 30)
    target[target == -100] = 1
    target[3] = 7
    ours = check(cuda, x, weight, target, F32, reduction=reduction, ignore_index=7)
    assert ours[1][3].abs().sum() == 0


def test_rising_logits_move_the_maximum(cuda):
    """Each later class is far likelier than all before."""
    V, weight = 200, torch.linspace(-300, 300, 200).view(-1, 1).to(cuda)
    x, target = torch.tensor([[1.0], [-1.0], [10.0]]).to(cuda), torch.tensor([V - 1, V - 1, 0]).to(cuda)
    loss = llmfast.linear_cross_entropy(x, weight, target, reduction="none")
    exact = F.cross_entropy(x.double() @ weight.double().t(), target, reduction="none")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-4)


def test_nan_is_not_hidden_and_wrong_targets_show(cuda):
    x, weight, target = make(5, 8, 10)
    x[2, 3] = float("nan")
    target[:] = torch.tensor([0, 10, 0, -1, -100])
    losses = llmfast.linear_cross_entropy(x.to(cuda), weight.to(cuda), target.to(cuda), reduction="none")
    assert losses.isnan().tolist() == [False, True, True, True, False] and losses[4] == 0


def test_strides_and_threads(cuda, thread_order):
    x, weight, target = make(12, 16, 50)
    expected = check(cuda, x, weight, target, BF16, reduction="none")
    strided = torch.randn(4, 3, 32).to(BF16).to(cuda)
    strided[..., ::2] = x.to(BF16).view(4, 3, 16).to(cuda)
    got = llmfast.linear_cross_entropy(
        strided[..., ::2],
        weight.to(BF16).to(cuda).t().contiguous().t(),
        target.view(4, 3).to(cuda),
        reduction="none",
    )
    torch.testing.assert_close(got, expected[0].view(4, 3), rtol=1e-6, atol=1e-6)
