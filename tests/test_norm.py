"""add_layer_norm and add_rms_norm against float64, on every instruction set."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_as_accurate

import llmfast
from llmfast import backend, reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# One element, less than a register, every tail around 4, 8, 16 and 64, long rows, many rows
SHAPES = [(1, 1), (3, 7), (5, 16), (4, 31), (6, 65), (9, 130), (3, 2049), (700, 40)]
# x, residual, weight and bias, normed
MIXES = [
    (F32, F32, F32, F32),
    (BF16, BF16, BF16, BF16),
    (F16, F16, F16, F16),
    (BF16, F32, F32, BF16),
    (BF16, F32, BF16, F32),
    (F32, BF16, F32, F16),
    (BF16, None, F32, F32),
    (F32, None, F32, BF16),
]


def plain_norm(kind):
    """Same-dtype torch: the add in the tensors' own dtype, then the norm, as a model written in torch has it."""

    def run(x, residual, weight, bias, out_dtype):
        summed = x if residual is None else (x + residual).to(residual.dtype)
        if kind == "layer":
            normed = F.layer_norm(summed.to(weight.dtype), summed.shape[-1:], weight, bias, 1e-5)
        else:
            normed = F.rms_norm(summed.to(weight.dtype), summed.shape[-1:], weight, 1e-5)
        return normed.to(out_dtype), summed

    return run


def fused_norm(kind, module=llmfast):
    def run(x, residual, weight, bias, out_dtype):
        if kind == "layer":
            return module.add_layer_norm(x, residual, weight, bias, 1e-5, out_dtype=out_dtype)
        return module.add_rms_norm(x, residual, weight, 1e-5, out_dtype=out_dtype)

    return run


def results_of(function, inputs, out_dtype, grads):
    inputs = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    normed, summed = function(*inputs, out_dtype)
    torch.autograd.backward([normed, summed], [grads[0].to(normed.dtype), grads[1].to(summed.dtype)])
    return {
        "normed": normed.detach(),
        "summed": summed.detach(),
        **{f"grad {i}": t.grad for i, t in enumerate(inputs) if t is not None and t.grad is not None},
    }


def wide(tensors):
    return [None if t is None else t.double() for t in tensors]


def compare(kind, inputs, out_dtype, grads):
    ours = results_of(fused_norm(kind), inputs, out_dtype, grads)
    theirs = results_of(plain_norm(kind), inputs, out_dtype, grads)
    exact = results_of(fused_norm(kind, reference), wide(inputs), torch.float64, grads)
    assert ours["normed"].dtype == out_dtype
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert_as_accurate(ours[name], theirs[name], exact[name], what=name)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("mix", MIXES, ids=lambda m: "-".join(str(d).removeprefix("torch.") for d in m))
def test_forward_and_gradients(isa, kind, mix):
    x_dtype, residual_dtype, weight_dtype, out_dtype = mix
    for shape in SHAPES if mix in MIXES[:2] else SHAPES[3:6]:
        C = shape[-1]
        inputs = [
            torch.randn(shape, dtype=x_dtype),
            None if residual_dtype is None else torch.randn(shape).to(residual_dtype),
            torch.randn(C).to(weight_dtype),
            torch.randn(C).to(weight_dtype) if kind == "layer" else None,
        ]
        if kind == "rms" and C == 1:
            inputs[0] = torch.ones(shape, dtype=x_dtype)  # x / |x|: its gradient is a difference of equals
        grads = [torch.randn(shape).to(out_dtype), torch.randn(shape).to(residual_dtype or x_dtype)]
        compare(kind, inputs, out_dtype, grads)


def test_large_mean_does_not_cancel(isa):
    x = torch.randn(4, 777) + 1000
    weight, bias = torch.ones(777), torch.zeros(777)
    normed, _ = llmfast.add_layer_norm(x, torch.zeros_like(x), weight, bias)
    exact = F.layer_norm(x.double(), (777,))
    assert_as_accurate(normed, F.layer_norm(x, (777,)), exact)
    assert (normed.double() - exact).abs().max() < 3e-4


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("C", [1, 31, 768])
def test_gradient_of_a_rounded_sum_with_a_large_mean(isa, dtype, C):
    step = torch.finfo(dtype).eps * 512  # between neighbours from 512 on
    summed = torch.full((6, C), 512 + 4 * step)
    summed[1] += step / 2  # rounds away from the mean that forward saves
    summed[2, -1] += step
    summed[3] += step * torch.randint(0, 3, (C,))
    summed[4] += torch.randn(C)
    summed[5] += 60 * torch.randn(C)
    summed[5, 0] = 30000
    residual = summed.to(dtype)
    x = (summed - residual.float()).requires_grad_()  # x + residual is `summed`, and rounds to itself or a neighbour
    weight, grad = torch.randn(C), torch.randn(6, C)
    normed, rounded = llmfast.add_layer_norm(x, residual, weight, None)
    (ours,) = torch.autograd.grad(normed, x, grad)

    def gradient(wide):
        leaf = rounded.to(wide).requires_grad_()
        out = F.layer_norm(leaf, (C,), weight.to(wide), None, 1e-5)
        return torch.autograd.grad(out, leaf, grad.to(wide))[0]

    exact, theirs = gradient(torch.float64), gradient(F32)
    for row in range(6):
        assert_as_accurate(ours[row], theirs[row], exact[row], what=f"row {row}")


def test_norm_is_of_the_unrounded_sum(isa):
    x, residual = torch.full((1, 256), 2.0**-9, dtype=BF16), torch.ones(1, 256, dtype=BF16)
    x[0, ::2] = 0  # 1 + 2^-9 rounds to 1 in bfloat16
    normed, summed = llmfast.add_layer_norm(x, residual, torch.ones(256), torch.zeros(256), 0.0)
    assert (summed == 1).all()
    torch.testing.assert_close(normed, torch.tensor([-1.0, 1.0]).repeat(128)[None].to(BF16))


def test_strides(isa):
    weight, bias = torch.randn(24), torch.randn(24)
    base = torch.randn(5, 3, 4, 24)
    views = {
        "row stride": torch.randn(6, 40)[:, :24],
        "permuted": base.permute(2, 0, 1, 3),
        "sliced": base[::2, :, 1:3],
        "expanded": torch.randn(1, 24).expand(7, 24),
        "columns": torch.randn(24, 6).t(),
        "one dimension": torch.randn(24),
        "seven dimensions": torch.randn(2, 1, 2, 1, 2, 1, 24),
    }
    for name, x in views.items():
        for residual in (None, torch.randn(x.shape), torch.randn(x.shape[::-1]).permute(*range(x.dim() - 1, -1, -1))):
            grads = [torch.randn(x.shape), torch.randn(x.shape[::-1]).permute(*range(x.dim() - 1, -1, -1))]
            ours = results_of(fused_norm("layer"), [x, residual, weight, bias], F32, grads)
            exact = results_of(fused_norm("layer", reference), wide([x, residual, weight, bias]), torch.float64, grads)
            for key in ours:
                torch.testing.assert_close(ours[key].double(), exact[key], rtol=1e-5, atol=2e-5, msg=f"{name}: {key}")
            normed, summed = llmfast.add_layer_norm(x, residual, weight, bias)
            assert normed.is_contiguous() and (summed is x if residual is None else summed.is_contiguous())


def test_only_some_gradients(isa):
    x, residual = torch.randn(6, 20, dtype=BF16), torch.randn(6, 20)
    weight, bias = torch.randn(20), torch.randn(20)
    for wanted in ("x", "residual", "weight", "bias", "x residual", "weight bias"):
        tensors = {"x": x, "residual": residual, "weight": weight, "bias": bias}
        ours = {n: t.clone().requires_grad_(n in wanted.split()) for n, t in tensors.items()}
        exact = {n: t.double().requires_grad_(n in wanted.split()) for n, t in tensors.items()}
        llmfast.add_layer_norm(*ours.values())[0].float().square().sum().backward()  # summed is unused
        reference.add_layer_norm(*exact.values())[0].square().sum().backward()
        for name in tensors:
            assert (ours[name].grad is not None) == (name in wanted.split())
            if ours[name].grad is not None:
                torch.testing.assert_close(ours[name].grad.double(), exact[name].grad, rtol=3e-2, atol=1e-1)


def test_gradient_of_the_sum_alone(isa):
    x, residual = torch.randn(3, 5, dtype=BF16, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    weight = torch.randn(5, requires_grad=True)
    llmfast.add_rms_norm(x, residual, weight)[1].sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x)) and torch.equal(residual.grad, torch.ones_like(residual))
    assert weight.grad is None or not weight.grad.any()


def test_without_weight_or_bias(isa):
    x = torch.randn(4, 19, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    normed, summed = llmfast.add_layer_norm(x, None, None, None)
    assert summed is x
    grad = torch.randn(4, 19)
    normed.backward(grad)
    F.layer_norm(exact, (19,)).backward(grad.double())
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
    normed, _ = llmfast.add_layer_norm(x, x, torch.ones(19), None)
    torch.testing.assert_close(normed, F.layer_norm(2 * x, (19,)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        llmfast.add_rms_norm(x, None, None)[0], F.rms_norm(x, (19,), eps=1e-6), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (3, 0)], ids=str)
def test_empty(shape):
    x, residual = (torch.randn(shape, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], requires_grad=True) for _ in range(2))
    normed, summed = llmfast.add_layer_norm(x, residual, weight, bias)
    assert normed.shape == summed.shape == x.shape
    (normed.sum() + summed.sum()).backward()
    assert x.grad.shape == residual.grad.shape == x.shape
    assert not weight.grad.any() and not bias.grad.any()


def test_used_twice_in_one_graph():
    x, weight, bias = torch.randn(4, 12), torch.randn(12), torch.randn(12)

    def network(module, x, weight, bias):
        first, stream = module.add_layer_norm(x, x, weight, bias)
        second, stream = module.add_layer_norm(first.sin(), stream, weight, bias)
        return (second * stream).sum()

    ours = [t.clone().requires_grad_() for t in (x, weight, bias)]
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    network(llmfast, *ours).backward()
    network(reference, *exact).backward()
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-4)


def test_streamed_outputs(isa):
    """Beyond 32 MiB of output the stores go around the caches."""
    x, residual = torch.randn(4200, 1024), torch.randn(4200, 1024)
    weight, bias = torch.randn(1024), torch.randn(1024)
    grads = [torch.randn(4200, 1024), torch.randn(4200, 1024)]
    big = results_of(fused_norm("layer"), [x, residual, weight, bias], F32, grads)
    some = [4111, 2, 17]
    small = results_of(fused_norm("layer"), [x[some], residual[some], weight, bias], F32, [g[some] for g in grads])
    for name in ("normed", "summed", "grad 0"):
        assert torch.equal(big[name][some], small[name]), name


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_any_number_of_threads(threads):
    x, residual, weight, bias = torch.randn(300, 200), torch.randn(300, 200), torch.randn(200), torch.randn(200)
    grads = [torch.randn(300, 200), torch.randn(300, 200)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        first = results_of(fused_norm("layer"), [x, residual, weight, bias], F32, grads)
        again = results_of(fused_norm("layer"), [x, residual, weight, bias], F32, grads)
    finally:
        torch.set_num_threads(before)
    exact = results_of(fused_norm("layer", reference), wide([x, residual, weight, bias]), torch.float64, grads)
    for name in first:
        assert torch.equal(first[name], again[name])
        torch.testing.assert_close(first[name].double(), exact[name], rtol=1e-4, atol=1e-4)


def test_autocast_casts_nothing():
    x, residual = torch.randn(3, 8, dtype=BF16), torch.randn(3, 8)
    with torch.autocast("cpu", BF16):
        normed, summed = llmfast.add_layer_norm(x, residual, torch.ones(8), torch.zeros(8))
        assert (normed.dtype, summed.dtype) == (BF16, F32)
        assert llmfast.add_rms_norm(residual, None, torch.ones(8))[0].dtype == F32


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_compile_and_opcheck(kind):
    x, residual = torch.randn(5, 6, dtype=BF16), torch.randn(5, 6)
    weight, bias = torch.randn(6), torch.randn(6)
    run = fused_norm(kind)

    def loss(x, residual, weight, bias):
        normed, summed = run(x, residual, weight, bias, None)
        return (normed.float() * summed.cos()).sum()

    inputs = [t.clone().requires_grad_() for t in (x, residual, weight, bias)]
    twins = [t.clone().requires_grad_() for t in (x, residual, weight, bias)]
    torch.compile(loss, fullgraph=True)(*inputs).backward()
    loss(*twins).backward()
    for a, b in zip(inputs[: 4 if kind == "layer" else 3], twins):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-2, atol=1e-2)
    op = getattr(torch.ops.llmfast, f"add_{kind}_norm").default
    affine = tuple(inputs[2:]) if kind == "layer" else (inputs[2],)
    torch.library.opcheck(op, (inputs[0], inputs[1], *affine, 1e-5, None))
    torch.library.opcheck(op, (inputs[0], None, *affine, 1e-5, F32))


def test_compiled_without_residual_and_with_a_lone_gradient():
    def loss(x, residual, weight):
        first, stream = llmfast.add_rms_norm(x, None, weight)
        return llmfast.add_rms_norm(first, stream + residual, weight)[0].sum()

    inputs = [torch.randn(4, 8, requires_grad=True), torch.randn(4, 8), torch.randn(8, requires_grad=True)]
    torch.compile(loss, fullgraph=True)(*inputs).backward()
    got = [t.grad.clone() for t in (inputs[0], inputs[2])]
    inputs[0].grad = inputs[2].grad = None
    loss(*inputs).backward()
    torch.testing.assert_close(got, [inputs[0].grad, inputs[2].grad], rtol=1e-4, atol=1e-5)


def test_errors_name_the_argument():
    x, weight, bias = torch.randn(2, 4), torch.randn(4), torch.randn(4)
    with pytest.raises(ValueError, match=r"residual: got shape \(2, 3\), expected \(2, 4\)"):
        llmfast.add_layer_norm(x, torch.randn(2, 3), weight, bias)
    with pytest.raises(ValueError, match=r"weight: got shape \(5,\), expected \(4,\)"):
        llmfast.add_rms_norm(x, None, torch.randn(5))
    with pytest.raises(ValueError, match=r"bias: got shape \(3,\), expected \(4,\)"):
        llmfast.add_layer_norm(x, None, weight, torch.randn(3))
    with pytest.raises(TypeError, match=r"x: got dtype torch.float64, expected float32, bfloat16 or float16"):
        llmfast.add_layer_norm(x.double(), None, weight, bias)
    with pytest.raises(TypeError, match=r"residual: got list, expected a torch.Tensor"):
        llmfast.add_layer_norm(x, [1.0], weight, bias)
    with pytest.raises(TypeError, match=r"out_dtype: got torch.int8"):
        llmfast.add_rms_norm(x, None, weight, out_dtype=torch.int8)
    with pytest.raises(ValueError, match=r"x: got a scalar"):
        llmfast.add_rms_norm(torch.tensor(1.0), None, weight)


def test_rows_are_counted(isa):
    def calls(op):
        return {row["isa"]: row["calls"] for row in backend.implementations(op)}

    before = calls("add_rms_norm"), calls("add_layer_norm")
    llmfast.add_rms_norm(torch.randn(2, 3), None, torch.randn(3))
    after = calls("add_rms_norm"), calls("add_layer_norm")
    row = min(isa, "avx512bf16", key=backend.ISAS.index)
    assert after[0][row] == before[0][row] + 1 and after[1] == before[1]
