"""What only a real GPU can show: streams, graphs, compilers, autocast, large tensors, several devices. Skipped elsewhere."""

import pytest
import torch
import torch.nn.functional as F

import llmfast
from llmfast import backend
from llmfast.models import GPT, GPTConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

BF16 = torch.bfloat16
CONFIG = GPTConfig(vocab_size=512, context=64, layers=2, heads=4, width=128)


@pytest.fixture(autouse=True)
def native():
    """Every test runs on llmfast's kernels, none in plain torch."""
    if backend.native_cuda() is None or backend.why_not_native(torch.device("cuda", 0)):
        pytest.skip("no kernels for this GPU")
    before = backend.fallbacks()
    yield
    assert backend.fallbacks() == before


def model_and_ids(dtype=BF16) -> tuple[GPT, torch.Tensor]:
    torch.manual_seed(0)
    return GPT(CONFIG).cuda().to(dtype), torch.randint(512, (3, 49), device="cuda")


def loss_and_gradients(model, ids) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss = model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def test_this_gpu_is_known():
    first = backend.info()["cuda_devices"][0]
    assert first["name"] == torch.cuda.get_device_name(0) and first["supported"]
    assert tuple(first["capability"]) == torch.cuda.get_device_capability(0)
    assert backend.choose_device() == torch.device("cuda", 0)


def test_ops_follow_the_current_stream():
    """The operand is written late, on a side stream: an op that ran elsewhere would read what was there before."""
    x, weight = torch.zeros(256, 256, device="cuda"), torch.eye(256, device="cuda")
    side = torch.cuda.Stream()
    llmfast.linear(x, weight)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        x.fill_(3.0)
        out = llmfast.linear(x, weight)
    assert not side.query()  # nothing waited for the device
    side.synchronize()
    assert (out == 3.0).all()


def test_gradients_follow_the_stream_of_the_forward_pass():
    model, ids = model_and_ids()
    expected = loss_and_gradients(model, ids)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        found = loss_and_gradients(model, ids)
    side.synchronize()
    for ours, theirs in zip(found, expected):
        assert torch.equal(ours, theirs)


def test_training_is_deterministic():
    model, ids = model_and_ids()
    for first, second in zip(loss_and_gradients(model, ids), loss_and_gradients(model, ids)):
        assert torch.equal(first, second)


def test_forward_and_backward_in_a_graph():
    model, ids = model_and_ids()
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    expected = loss_and_gradients(model, ids)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            model(inputs, targets).backward()
    torch.cuda.synchronize()
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = model(inputs, targets)
        loss.backward()
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    for ours, theirs in zip([loss, *(p.grad for p in model.parameters())], expected):
        assert torch.equal(ours, theirs)
    inputs.copy_(torch.randint_like(inputs, 512))
    graph.replay()
    with torch.no_grad():
        torch.testing.assert_close(loss, model(inputs, targets))


def test_model_compiles_whole():
    model, ids = model_and_ids()
    expected = loss_and_gradients(model, ids)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(loss_and_gradients(compiled, ids), expected):
        torch.testing.assert_close(ours, theirs)


def test_autocast():
    model, ids = model_and_ids(torch.float32)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    with torch.autocast("cuda", BF16):
        loss = model(inputs, targets)
    loss.backward()
    torch.testing.assert_close(loss, model(inputs, targets), rtol=1e-2, atol=1e-2)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_devices_do_not_mix():
    x, weight = torch.randn(4, 8, device="cuda"), torch.randn(6, 8)
    with pytest.raises(ValueError, match="weight: got a tensor on cpu, expected cuda:0 as x is"):
        llmfast.linear(x, weight)
    with pytest.raises(ValueError, match="k: got a tensor on cpu"):
        llmfast.attention(torch.randn(1, 1, 4, 8, device="cuda"), *torch.randn(2, 1, 1, 4, 8))
    with pytest.raises(ValueError, match="expected cuda:0"):
        llmfast.add_rms_norm(x, None, torch.ones(8))


def test_more_than_two_to_the_31_elements():
    free, _ = torch.cuda.mem_get_info()
    if free < 24 << 30:
        pytest.skip("needs 24 GiB")
    M, K, N = 70_001, 64, 32_768
    x, weight = torch.randn(M, K, device="cuda", dtype=BF16), torch.randn(N, K, device="cuda", dtype=BF16)
    out = llmfast.linear(x, weight)
    for rows in (slice(0, 3), slice(M // 2, M // 2 + 3), slice(M - 3, M)):
        torch.testing.assert_close(out[rows].float(), x[rows].float() @ weight.float().t(), rtol=1e-2, atol=1e-2)
    normed, _ = llmfast.add_rms_norm(out, None, torch.ones(N, device="cuda", dtype=BF16))
    expected = F.rms_norm(out[-3:].float(), (N,), eps=1e-6)
    torch.testing.assert_close(normed[-3:].float(), expected, rtol=1e-2, atol=1e-2)


def test_more_than_65535_sequences():
    B = 66_001
    q, k, v = (torch.randn(B, 1, 20, 16, device="cuda", dtype=BF16, requires_grad=True) for _ in range(3))
    out = llmfast.attention(q, k, v, causal=True)
    out.sum().backward()
    some = [t.detach()[-5:].float().requires_grad_() for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(*some, is_causal=True)
    expected.sum().backward()
    torch.testing.assert_close(out[-5:].float(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(q.grad[-5:].float(), some[0].grad, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(v.grad[-5:].float(), some[2].grad, rtol=3e-2, atol=3e-2)


def test_optimizer_steps_as_torch_does():
    torch.manual_seed(1)
    ours = [torch.randn(n, device="cuda").requires_grad_() for n in (3, 1000, 70_000)]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    options = {"lr": 1e-2, "weight_decay": 0.1}
    pair = llmfast.AdamW(ours, **options), torch.optim.AdamW(theirs, fused=True, **options)
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        norm, _ = llmfast.clip_grad_norm(ours, 1e9)
        assert float(norm) == pytest.approx(torch.nn.utils.clip_grad_norm_(theirs, 1e9).item(), rel=1e-5)
        for optimizer in pair:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_clipping_and_stepping_wait_for_nothing():
    parameters = [torch.randn(n, device="cuda").requires_grad_() for n in (3, 70_000)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer = llmfast.AdamW(parameters)
    optimizer.step()  # makes the state
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm, scale = llmfast.clip_grad_norm(parameters, 1.0)
        optimizer.step(grad_scale=scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = torch.cat([p.grad for p in parameters]).double().norm().item()
    assert float(norm) == pytest.approx(exact, rel=1e-5) and float(scale) == pytest.approx(1 / exact, rel=1e-5)


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    x, weight = torch.randn(40, 64, device="cuda:1"), torch.randn(32, 64, device="cuda:1")
    out = llmfast.linear(x, weight)
    assert torch.cuda.current_device() == 0 and out.device == x.device
    torch.testing.assert_close(out, F.linear(x, weight), rtol=1e-4, atol=1e-4)
