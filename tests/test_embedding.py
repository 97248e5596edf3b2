"""embedding against torch and float64, on every instruction set."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_as_accurate

import llmfast
from llmfast import reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# ids, V, C: every tail of C, one row, one column, a vocabulary larger and smaller than the input
SHAPES = [((1, 1), 1, 1), ((3, 7), 11, 5), ((2, 9), 1000, 33), ((4, 33), 5, 130), ((2, 3, 4), 50, 64), ((6,), 9, 16)]


def results_of(function, ids, weight, position_weight, grad, **options):
    weight = weight.clone().requires_grad_()
    position_weight = None if position_weight is None else position_weight.clone().requires_grad_()
    out = function(ids, weight, position_weight, **options)
    out.backward(grad.to(out.dtype))
    return [out.detach(), weight.grad, None if position_weight is None else position_weight.grad]


def plain_torch(ids, weight, position_weight, position_ids=None, out_dtype=None):
    out = F.embedding(ids, weight)
    if position_weight is not None:
        position_ids = torch.arange(ids.shape[-1]) if position_ids is None else position_ids
        out = out + F.embedding(position_ids, position_weight)
    return out.to(out_dtype or weight.dtype)


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (BF16, F32)], ids=str)
@pytest.mark.parametrize("positions", [None, "default", "given"])
def test_forward_and_gradients(isa, dtypes, positions):
    weight_dtype, out_dtype = dtypes
    for shape, V, C in SHAPES:
        ids = torch.randint(V, shape)
        weight = torch.randn(V, C).to(weight_dtype)
        position_weight = None if positions is None else torch.randn(shape[-1] + 2, C).to(weight_dtype)
        options = {"out_dtype": out_dtype}
        if positions == "given":
            options["position_ids"] = torch.randint(shape[-1] + 2, (*shape[:-2], 1, shape[-1])[-len(shape) :])
        grad = torch.randn(*shape, C).to(out_dtype)
        ours = results_of(llmfast.embedding, ids, weight, position_weight, grad, **options)
        theirs = results_of(plain_torch, ids, weight, position_weight, grad, **options)
        wide = weight.double(), None if position_weight is None else position_weight.double()
        exact = results_of(plain_torch, ids, *wide, grad, **{**options, "out_dtype": torch.float64})
        for name, a, b, c in zip(("out", "grad_weight", "grad_position_weight"), ours, theirs, exact):
            if a is not None:
                assert a.dtype == b.dtype
                assert_as_accurate(a, b, c, what=f"{name} {shape}")


def test_ids_of_any_kind_and_stride(isa):
    weight, grad_weight = torch.randn(20, 24), torch.randn(20, 24)
    base = torch.randint(20, (4, 6, 5))
    for ids in (
        base.int(),
        base.permute(2, 0, 1),
        base[:, ::2, 1],
        base[0, 0, :1].expand(3, 7),
        base[0, 0, 0],
        base.view(2, 2, 1, 2, 3, 5)[:, :, None],
    ):
        grad = torch.randn(*ids.shape, 24)
        ours = results_of(llmfast.embedding, ids, weight, None, grad)
        torch.testing.assert_close(ours, results_of(plain_torch, ids.long(), weight, None, grad))
    ids = torch.randint(20, (3, 8))
    strided = torch.randn(20, 60)[:, 7:31]
    torch.testing.assert_close(llmfast.embedding(ids, strided), F.embedding(ids, strided))
    torch.testing.assert_close(llmfast.embedding(ids, grad_weight.t().contiguous().t()), F.embedding(ids, grad_weight))
    out = llmfast.embedding(ids, weight.requires_grad_())
    out.sum().backward()  # the incoming gradient has stride 0
    torch.testing.assert_close(weight.grad, torch.bincount(ids.flatten(), minlength=20)[:, None].float().expand(20, 24))


def test_gradient_is_the_same_for_any_number_of_threads(isa):
    ids = (torch.rand(2000).pow(4) * 300).long().view(4, 500)  # small ids are frequent
    weight, positions = torch.randn(300, 96, requires_grad=True), torch.randn(500, 96, requires_grad=True)
    grad = torch.randn(4, 500, 96)
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            weight.grad = positions.grad = None
            llmfast.embedding(ids, weight, positions).backward(grad)
            seen.append((weight.grad, positions.grad))
    finally:
        torch.set_num_threads(before)
    for weight_grad, position_grad in seen[1:]:
        assert torch.equal(weight_grad, seen[0][0]) and torch.equal(position_grad, seen[0][1])


def test_large_gradient_is_streamed(isa):
    ids = torch.randint(40000, (3, 50))
    weight = torch.randn(40000, 256, requires_grad=True)
    grad = torch.randn(3, 50, 256)
    llmfast.embedding(ids, weight).backward(grad)
    expected = torch.zeros(40000, 256).index_add_(0, ids.flatten(), grad.view(-1, 256))
    torch.testing.assert_close(weight.grad, expected)


def test_only_some_gradients():
    ids = torch.randint(5, (2, 3))
    weight, positions = torch.randn(5, 4), torch.randn(3, 4, requires_grad=True)
    llmfast.embedding(ids, weight, positions).sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(positions.grad, torch.full((3, 4), 2.0))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=str)
def test_empty(shape):
    weight, positions = torch.randn(5, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    out = llmfast.embedding(torch.zeros(shape, dtype=torch.int64), weight, positions)
    assert out.shape == (*shape, 4)
    out.sum().backward()
    assert not weight.grad.any() and not positions.grad.any()
    assert llmfast.embedding(torch.zeros(2, 3, dtype=torch.int64), torch.randn(5, 0)).shape == (2, 3, 0)


def test_used_twice_in_one_graph_and_autocast():
    ids, weight = torch.randint(6, (2, 5)), torch.randn(6, 4)
    ours, exact = weight.clone().requires_grad_(), weight.double().requires_grad_()
    for t, embedding in ((ours, llmfast.embedding), (exact, reference.embedding)):
        (embedding(ids, t) * embedding(ids.flip(0), t).sin()).sum().backward()
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert llmfast.embedding(ids, weight).dtype == torch.float32


def test_compile_and_opcheck():
    ids, weight, positions = torch.randint(6, (2, 5)), torch.randn(6, 4), torch.randn(7, 4)

    def loss(ids, weight, positions):
        return llmfast.embedding(ids, weight, positions, out_dtype=torch.bfloat16).float().square().sum()

    got = []
    for run in (torch.compile(loss, fullgraph=True), loss):
        leaves = [weight.clone().requires_grad_(), positions.clone().requires_grad_()]
        run(ids, *leaves).backward()
        got.append([t.grad for t in leaves])
    torch.testing.assert_close(got[0], got[1])
    inputs = ids, weight.requires_grad_(), positions.requires_grad_()
    torch.library.opcheck(torch.ops.llmfast.embedding.default, (*inputs, None, None))
    torch.library.opcheck(torch.ops.llmfast.embedding.default, (*inputs, ids.flip(0), torch.bfloat16))
    torch.library.opcheck(torch.ops.llmfast.embedding.default, (ids.int(), weight, None, None, None))


def test_out_of_range_ids_are_named(isa):
    weight, positions = torch.randn(10, 4), torch.randn(3, 4)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    for value in (10, -1, 2**40):
        bad = ids.clone()
        bad[1, 2] = value
        with pytest.raises(ValueError, match=rf"input_ids: got {value} at position \(1, 2\), expected 0 <= id < 10"):
            llmfast.embedding(bad, weight)
    with pytest.raises(ValueError, match=r"input_ids: got 11 at position \(0, 1\)"):
        llmfast.embedding(torch.tensor([[0, 11, 12]], dtype=torch.int32), weight)
    with pytest.raises(ValueError, match=r"position_ids: got 3 at position \(0, 1\), expected 0 <= id < 3"):
        llmfast.embedding(ids, weight, positions, torch.tensor([0, 3, 1]))


def test_errors_name_the_argument():
    weight, positions, ids = torch.randn(10, 4), torch.randn(3, 4), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"input_ids: got dtype torch.float32, expected int64 or int32"):
        llmfast.embedding(ids.float(), weight)
    with pytest.raises(TypeError, match=r"weight: got dtype torch.float64"):
        llmfast.embedding(ids, weight.double())
    with pytest.raises(ValueError, match=r"weight: got shape \(4,\), expected \(V, C\)"):
        llmfast.embedding(ids, weight[0])
    with pytest.raises(ValueError, match=r"position_weight: got shape \(3, 5\), expected \(P, 4\)"):
        llmfast.embedding(ids, weight, torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"position_weight: got shape \(2, 4\), expected at least 3 rows"):
        llmfast.embedding(ids, weight, positions[:2])
    with pytest.raises(ValueError, match=r"position_ids: got shape \(2, 2\), expected one that broadcasts to \(2, 3\)"):
        llmfast.embedding(ids, weight, positions, ids[:, :2])
    with pytest.raises(ValueError, match="position_ids: got a tensor, expected None without position_weight"):
        llmfast.embedding(ids, weight, None, ids)
