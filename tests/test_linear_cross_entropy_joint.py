"""linear_cross_entropy's loss and gradients in one pass (CPU, mean or sum), on every instruction set."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_as_accurate
from test_linear_cross_entropy import SHAPES, make, run, torch_logits

import llmfast
from llmfast import backend, reference
from llmfast.ops import linear_cross_entropy_joint as joint

DTYPES = [torch.float32, torch.bfloat16]


def calls(op: str) -> int:
    return sum(row["calls"] for row in backend.implementations(op))


@pytest.fixture(autouse=True)
def _however_small(monkeypatch):
    monkeypatch.setattr(joint, "LEAST_WORK", 0)
    monkeypatch.setattr(joint, "FEWEST_CLASSES", 0)


@pytest.fixture
def blocks(monkeypatch):
    """Blocks of 32 tokens, the fewest that every kernel takes, instead of hundreds."""
    monkeypatch.setattr(joint, "_rows", lambda M, C, V, sums: min(M, 32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [*SHAPES, (100, 40, 130), (129, 31, 2100)], ids=str)
def test_blocks_of_tokens(isa, blocks, shape, reduction, dtype):
    inputs = make(*shape, 20.0)
    before = calls("linear_cross_entropy_joint")
    ours = run(llmfast.linear_cross_entropy, *inputs, dtype, reduction=reduction)
    assert calls("linear_cross_entropy_joint") == before + 1
    theirs = run(torch_logits, *inputs, dtype, reduction=reduction)
    exact = run(reference.linear_cross_entropy, *inputs, dtype, exact=True, reduction=reduction)
    for name, *triple in zip(("loss", "grad_x", "grad_weight"), ours, theirs, exact):
        assert_as_accurate(*triple, what=name)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_passes_agree(isa, shape, dtype):
    """The other form, which a loss for each token takes."""

    def mean_of_losses(x, weight, target):
        return llmfast.linear_cross_entropy(x, weight, target, reduction="none").sum() / (target != -100).sum()

    inputs = make(*shape, 40.0)
    before = calls("linear_cross_entropy_joint")
    ours = run(mean_of_losses, *inputs, dtype)
    assert calls("linear_cross_entropy_joint") == before
    theirs = run(torch_logits, *inputs, dtype)
    exact = run(reference.linear_cross_entropy, *inputs, dtype, exact=True)
    for name, *triple in zip(("loss", "grad_x", "grad_weight"), ours, theirs, exact):
        assert_as_accurate(*triple, what=name)


def test_when_it_is_used(monkeypatch):
    x, weight, target = make(6, 8, 20)
    before = calls("linear_cross_entropy_joint")
    llmfast.linear_cross_entropy(x, weight, target)
    x.requires_grad_()
    with torch.no_grad():
        llmfast.linear_cross_entropy(x, weight, target)
    llmfast.linear_cross_entropy(x, weight, target, reduction="none").sum().backward()
    llmfast.linear_cross_entropy(x.half(), weight.half(), target).backward()
    assert calls("linear_cross_entropy_joint") == before
    monkeypatch.setattr(joint, "LEAST_WORK", 6 * 8 * 20 + 1)
    llmfast.linear_cross_entropy(x, weight, target).backward()
    assert calls("linear_cross_entropy_joint") == before
    monkeypatch.setattr(joint, "LEAST_WORK", 6 * 8 * 20)
    monkeypatch.setattr(joint, "FEWEST_CLASSES", 21)
    llmfast.linear_cross_entropy(x, weight, target).backward()
    assert calls("linear_cross_entropy_joint") == before
    monkeypatch.setattr(joint, "FEWEST_CLASSES", 20)
    llmfast.linear_cross_entropy(x, weight, target).backward()
    assert calls("linear_cross_entropy_joint") == before + 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_too_large_for_blocks_take_two_passes(monkeypatch, blocks, dtype):
    monkeypatch.setattr(joint, "MOST_SUMS", 20 * 8 - 1)
    for M, one_pass in ((40, dtype == torch.float32), (32, True)):
        x, weight, target = make(M, 8, 20)
        before = calls("linear_cross_entropy_joint")
        llmfast.linear_cross_entropy(x.to(dtype).requires_grad_(), weight.to(dtype), target).backward()
        assert calls("linear_cross_entropy_joint") == before + one_pass


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads(isa, blocks, threads):
    """Shares of classes and of tokens, ragged and empty ones; the same bits every time."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for shape in ((100, 260, 1030), (60, 260, 40), (3, 500, 2500)):
            inputs = make(*shape, 5.0)
            ours, again = (run(llmfast.linear_cross_entropy, *inputs, torch.float32) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(ours, again))
            exact = run(reference.linear_cross_entropy, *inputs, torch.float32, exact=True)
            theirs = run(torch_logits, *inputs, torch.float32)
            for name, *triple in zip(("loss", "grad_x", "grad_weight"), ours, theirs, exact):
                assert_as_accurate(*triple, what=name)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_gradient_alone(blocks, dtype):
    x, weight, target = make(70, 33, 65)
    x, weight = x.to(dtype), weight.to(dtype)
    both = [t.clone().requires_grad_() for t in (x, weight)]
    llmfast.linear_cross_entropy(*both, target).backward()
    for i in range(2):
        one = [t.clone().requires_grad_(i == j) for j, t in enumerate((x, weight))]
        llmfast.linear_cross_entropy(*one, target).backward()
        assert torch.equal(one[i].grad, both[i].grad) and one[1 - i].grad is None
    (alone,) = torch.autograd.grad(llmfast.linear_cross_entropy(*both, target), both[1])
    assert torch.equal(alone, both[1].grad)


def test_leading_dims_and_strides(isa):
    x, weight, target = make(12, 16, 50)
    expected = run(llmfast.linear_cross_entropy, x, weight, target, torch.float32)
    strided = torch.randn(4, 3, 32)
    strided[..., ::2] = x.view(4, 3, 16)
    strided.requires_grad_()
    sideways = weight.t().contiguous().requires_grad_()
    loss = llmfast.linear_cross_entropy(strided[..., ::2], sideways.t(), target.view(4, 3))
    loss.backward()
    for got, wanted in zip((loss, strided.grad[..., ::2].reshape(12, 16), sideways.grad.t()), expected):
        torch.testing.assert_close(got.detach(), wanted, rtol=1e-5, atol=1e-6)


def test_rising_logits_move_the_reference(isa):
    """Each later class is far likelier than all before, so that powers already kept must move along."""
    V = 5000
    weight = torch.linspace(-300, 300, V).view(-1, 1)
    x, target = torch.tensor([[1.0], [-1.0], [10.0], [0.3]]), torch.tensor([V - 1, V - 1, 0, 2500])
    inputs = x, weight, target
    ours = run(llmfast.linear_cross_entropy, *inputs, torch.float32)
    theirs = run(torch_logits, *inputs, torch.float32)
    exact = run(reference.linear_cross_entropy, *inputs, torch.float32, exact=True)
    for name, *triple in zip(("loss", "grad_x", "grad_weight"), ours, theirs, exact):
        assert_as_accurate(*triple, what=name)


def test_upstream_gradient_and_kept_graphs():
    """What is handed out may be written to without the graph's noticing."""
    x, weight, target = make(9, 16, 50)
    x.requires_grad_(), weight.requires_grad_()
    expected = torch.autograd.grad(llmfast.linear_cross_entropy(x, weight, target), (x, weight))
    loss = llmfast.linear_cross_entropy(x, weight, target)
    for _ in range(3):
        loss.backward(retain_graph=True)
    (loss / 4).backward(retain_graph=True)
    loss.backward()
    for tensor, gradient in zip((x, weight), expected):
        torch.testing.assert_close(tensor.grad, 4.25 * gradient)
    loss = llmfast.linear_cross_entropy(x, weight, target)
    scaled = torch.autograd.grad(2 * loss - 5 * loss, (x, weight))
    torch.testing.assert_close(scaled, tuple(-3 * gradient for gradient in expected))
    loss = llmfast.linear_cross_entropy(x, weight, target)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(torch.autograd.grad(loss, x, create_graph=True)[0].sum(), x)


def test_upstream_gradient_is_not_rounded_to_the_operands_dtype():
    x, weight, target = (t.bfloat16() if t.is_floating_point() else t for t in make(40, 32, 50))
    x.requires_grad_()
    (whole,) = torch.autograd.grad(llmfast.linear_cross_entropy(x, weight, target), x)
    (third,) = torch.autograd.grad(llmfast.linear_cross_entropy(x, weight, target) / 3, x)
    assert torch.equal(third, (whole.float() / 3).bfloat16())


def test_nothing_to_learn_from(isa):
    x, weight, target = make(4, 8, 10)
    target[:] = -100
    loss, *gradients = run(llmfast.linear_cross_entropy, x, weight, target, torch.float32)
    assert loss.isnan() and all((gradient == 0).all() for gradient in gradients)  # the loss as torch: 0 / 0
    loss, *gradients = run(llmfast.linear_cross_entropy, x, weight, target, torch.float32, reduction="sum")
    assert loss == 0 and all((gradient == 0).all() for gradient in gradients)
    for rows, columns in ((0, 8), (4, 0)):
        empty = x[:rows, :columns], weight[:, :columns], target[:rows]
        loss, _, grad_weight = run(llmfast.linear_cross_entropy, *empty, torch.float32, reduction="sum")
        assert loss == 0 and (grad_weight == 0).all()
    target[:] = 3
    loss, *_ = run(llmfast.linear_cross_entropy, x[:, :0], weight[:, :0], target, torch.float32)
    torch.testing.assert_close(loss, torch.tensor(10.0).log())


def test_nan_is_not_hidden(isa):
    x, weight, _ = make(4, 8, 10)
    x[2, 3] = float("nan")
    loss, grad_x, grad_weight = run(
        llmfast.linear_cross_entropy, x, weight, torch.zeros(4, dtype=torch.int64), torch.float32
    )
    assert loss.isnan() and grad_weight.isnan().all()
    assert grad_x.isnan().any(dim=1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compile_functorch_and_opcheck(dtype):
    x, weight, target = make(6, 8, 20)
    x, weight = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()

    def half(x, weight):
        return llmfast.linear_cross_entropy(x, weight, target) / 2

    expected = torch.autograd.grad(half(x, weight), (x, weight))
    compiled = torch.autograd.grad(torch.compile(half, fullgraph=True)(x, weight), (x, weight))
    torch.testing.assert_close(compiled, expected)
    transformed = torch.func.grad(half, argnums=(0, 1))(x.detach(), weight.detach())
    torch.testing.assert_close(transformed, expected)
    one = torch.func.grad(half)(x.detach(), weight.detach())
    torch.testing.assert_close(one, expected[0])
    each = torch.func.vmap(torch.func.grad(half), in_dims=(0, None))(torch.stack([x, 2 * x]).detach(), weight.detach())
    torch.testing.assert_close(each[0], expected[0])
    arguments = (x, weight, target, -100, True, True, True)
    torch.library.opcheck(torch.ops.llmfast.linear_cross_entropy_joint.default, arguments)


def test_learned_as_torch_learns():
    """Steps with an optimizer that changes gradients in place."""
    x, weight, target = make(30, 16, 40)
    trained = []
    for function in (llmfast.linear_cross_entropy, lambda x, w, t: F.cross_entropy(F.linear(x, w), t)):
        parameter = weight.clone().requires_grad_()
        optimizer = torch.optim.SGD([parameter], lr=0.5, momentum=0.9, weight_decay=0.1)
        for _ in range(5):
            optimizer.zero_grad(set_to_none=False)
            function(x, parameter, target).backward()
            torch.nn.utils.clip_grad_norm_([parameter], 0.1)
            optimizer.step()
        trained.append(parameter.detach())
    torch.testing.assert_close(*trained)


def test_errors_name_the_argument():
    x, weight, target = make(4, 8, 10)
    target[2] = 10
    with pytest.raises(ValueError, match=r"target: got 10 at position 2, expected 0 to 9 or ignore_index -100"):
        llmfast.linear_cross_entropy(x.requires_grad_(), weight, target)
