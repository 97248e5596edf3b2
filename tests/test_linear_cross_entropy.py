"""linear_cross_entropy against float64 logits and torch's cross_entropy, on every instruction set."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_as_accurate

import llmfast
from llmfast import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (M, C, V): one row, sizes beside tiles, one and several chunks (2,048) of the vocabulary with ragged ends
SHAPES = [(1, 8, 5), (5, 24, 40), (70, 33, 65), (37, 16, 4500), (13, 300, 2049), (3, 8, 2048)]


def make(M, C, V, scale=1.0):
    torch.manual_seed(M + V)
    target = torch.randint(V, (M,))
    target[1::4] = -100
    return torch.randn(M, C) * scale / C**0.5, torch.randn(V, C), target


def run(function, x, weight, target, dtype, exact=False, **options):
    wide = torch.float64 if exact else dtype
    x, weight = (t.to(dtype).to(wide).clone().requires_grad_() for t in (x, weight))
    loss = function(x, weight, target, **options)
    loss.sum().backward()
    return [loss.detach(), x.grad, weight.grad]


def torch_logits(x, weight, target, **options):
    return F.cross_entropy(F.linear(x, weight).float(), target, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 40.0])  # 40: confident rows, the running maximum moves
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients(isa, shape, scale, dtype):
    inputs = make(*shape, scale)
    ours = run(llmfast.linear_cross_entropy, *inputs, dtype)
    theirs = run(torch_logits, *inputs, dtype)
    exact = run(reference.linear_cross_entropy, *inputs, dtype, exact=True)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
    for name, *triple in zip(("loss", "grad_x", "grad_weight"), ours, theirs, exact):
        assert_as_accurate(*triple, what=name)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_and_ignore_index(isa, reduction):
    x, weight, target = make(10, 8, 30)
    target[3] = 7
    options = dict(reduction=reduction, ignore_index=7)
    target[target == -100] = 1
    ours = run(llmfast.linear_cross_entropy, x, weight, target, torch.float32, **options)
    theirs = run(torch_logits, x, weight, target, torch.float32, **options)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert ours[1][3].abs().sum() == 0


def test_rising_logits_move_the_reference(isa):
    """Each later class is far likelier than all before: the running maximum moves at every step."""
    V, weight = 200, torch.linspace(-300, 300, 200).view(-1, 1)
    x = torch.tensor([[1.0], [-1.0], [10.0]])
    target = torch.tensor([V - 1, V - 1, 0])
    loss = llmfast.linear_cross_entropy(x, weight, target, reduction="none")
    exact = F.cross_entropy(x.double() @ weight.double().t(), target, reduction="none")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-4)


def test_leading_dims_and_strides(isa):
    x, weight, target = make(12, 16, 50)
    expected = llmfast.linear_cross_entropy(x, weight, target, reduction="none")
    strided = torch.randn(4, 3, 32)
    strided[..., ::2] = x.view(4, 3, 16)
    got = llmfast.linear_cross_entropy(
        strided[..., ::2], weight.t().contiguous().t(), target.view(4, 3), reduction="none"
    )
    torch.testing.assert_close(got, expected.view(4, 3), rtol=1e-5, atol=1e-5)


def test_nothing_to_learn_from():
    x, weight, target = make(4, 8, 10)
    target[:] = -100
    assert llmfast.linear_cross_entropy(x, weight, target).isnan()  # as torch: 0 / 0
    assert llmfast.linear_cross_entropy(x, weight, target, reduction="sum") == 0
    empty = llmfast.linear_cross_entropy(x[:0].requires_grad_(), weight, target[:0], reduction="sum")
    empty.backward()
    assert empty == 0


def test_nan_is_not_hidden(isa):
    x, weight, target = make(4, 8, 10)
    x[2, 3] = float("nan")
    losses = llmfast.linear_cross_entropy(x, weight, torch.zeros(4, dtype=torch.int64), reduction="none")
    assert losses.isnan().tolist() == [False, False, True, False]


def test_logits_are_never_materialised():
    """64 MiB of logits would show in the peak of the process; the op's own scratch is a few chunks."""
    x, weight = torch.randn(512, 16), torch.randn(1 << 15, 16)
    before = llmfast.backend.native().workspace_bytes()
    llmfast.linear_cross_entropy(x, weight, torch.zeros(512, dtype=torch.int64))
    assert llmfast.backend.native().workspace_bytes() - before < 16 << 20


def test_autocast_compile_and_opcheck():
    x, weight, target = make(6, 8, 20)
    with torch.autocast("cpu", torch.bfloat16):
        loss = llmfast.linear_cross_entropy(x, weight, target)
    torch.testing.assert_close(loss, llmfast.linear_cross_entropy(x.bfloat16(), weight.bfloat16(), target))
    x.requires_grad_(), weight.requires_grad_()
    torch.compile(llmfast.linear_cross_entropy, fullgraph=True)(x, weight, target).backward()
    compiled = x.grad.clone(), weight.grad.clone()
    x.grad = weight.grad = None
    llmfast.linear_cross_entropy(x, weight, target).backward()
    torch.testing.assert_close(compiled, (x.grad, weight.grad))
    torch.library.opcheck(torch.ops.llmfast.linear_cross_entropy.default, (x, weight, target, -100))


def test_errors_name_the_argument():
    x, weight, target = make(4, 8, 10)
    target[2] = 10
    with pytest.raises(ValueError, match=r"target: got 10 at position 2, expected 0 to 9 or ignore_index -100"):
        llmfast.linear_cross_entropy(x, weight, target)
    with pytest.raises(TypeError, match=r"target: got dtype torch.int32, expected int64"):
        llmfast.linear_cross_entropy(x, weight, target.int())
    with pytest.raises(ValueError, match=r"target: got shape \(3,\), expected \(4,\)"):
        llmfast.linear_cross_entropy(x, weight, target[:3])
    with pytest.raises(ValueError, match=r"reduction: got 'avg', expected mean, sum or none"):
        llmfast.linear_cross_entropy(x, weight, target, reduction="avg")
