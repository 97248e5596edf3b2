"""AdamW and clip_grad_norm against torch, on every instruction set."""

import copy
import math

import pytest
import torch
from conftest import assert_as_accurate

import llmfast
from llmfast import backend

SHAPES = [(7,), (64, 33), (), (0, 4), (5, 3, 2), (2500,)]
OPTIONS = {"lr": 3e-3, "betas": (0.85, 0.98), "eps": 1e-7, "weight_decay": 0.1}


def groups_of(tensors, dtype):
    """Two parameter groups of fresh leaves; the second one overrides lr, betas and decay."""
    leaves = [t.to(dtype).clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    return leaves, [
        {"params": leaves[:3]},
        {"params": leaves[3:], "lr": 1e-2, "weight_decay": 0.0, "betas": (0.9, 0.999)},
    ]


def set_grads(leaves, step, scale=1.0):
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(leaves):
        grad = torch.randn(p.shape, generator=generator) * 10.0 ** (i - 3)
        p.grad = None if i == 1 and step % 3 == 0 else (grad * scale).to(p.dtype)


def start():
    tensors = [torch.randn(shape) for shape in SHAPES]
    tensors[4] = torch.randn(2, 5, 3).permute(1, 2, 0)  # dense in another order
    return tensors


def test_fifty_steps_as_torch(isa):
    tensors = start()
    ours, our_groups = groups_of(tensors, torch.float32)
    theirs, their_groups = groups_of(tensors, torch.float32)
    exact, exact_groups = groups_of(tensors, torch.float64)
    optimizers = (
        (ours, llmfast.AdamW(our_groups, **OPTIONS)),
        (theirs, torch.optim.AdamW(their_groups, **OPTIONS)),
        (exact, torch.optim.AdamW(exact_groups, **OPTIONS)),
    )
    for step in range(50):
        for leaves, optimizer in optimizers:
            set_grads(leaves, step)
            for group in optimizer.param_groups:
                group["lr"] *= 0.99
            optimizer.step()
    for i, (a, b, c) in enumerate(zip(ours, theirs, exact)):
        assert_as_accurate(a.detach(), b.detach(), c.detach(), what=f"parameter {i}")
        for name in ("exp_avg", "exp_avg_sq"):
            if a in optimizers[0][1].state:
                states = (o.state[t][name] for (_, o), t in zip(optimizers, (a, b, c)))
                assert_as_accurate(*states, what=f"{name} {i}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_master_weights_equal_a_float32_run(isa, dtype):
    """Same starting values and gradients: the master is the float32 run bit for bit, the parameter its rounding."""
    tensors = [t.to(dtype) for t in start()]
    half, half_groups = groups_of(tensors, dtype)
    full, full_groups = groups_of(tensors, torch.float32)
    half_optimizer, full_optimizer = llmfast.AdamW(half_groups, **OPTIONS), llmfast.AdamW(full_groups, **OPTIONS)
    for step in range(20):
        set_grads(half, step)
        for p, q in zip(half, full):
            q.grad = None if p.grad is None else p.grad.float()
        half_optimizer.step()
        full_optimizer.step()
    for p, q in zip(half, full):
        assert half_optimizer.state[p]["master"].dtype == torch.float32
        assert torch.equal(half_optimizer.state[p]["master"], q.detach())
        assert torch.equal(p.detach(), q.detach().to(dtype))


def test_float32_gradients_of_half_parameters(isa):
    """Gradients accumulated in float32 are not rounded on the way."""
    half = torch.randn(333).bfloat16().requires_grad_()
    full = half.detach().float().requires_grad_()
    half.grad_dtype = torch.float32
    half.grad = torch.randn(333)
    full.grad = half.grad.clone()
    optimizers = llmfast.AdamW([half], eps=1.0), llmfast.AdamW([full], eps=1.0)
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(optimizers[0].state[half]["master"], full.detach())


def test_grad_scale_multiplies_on_the_fly(isa):
    tensors = start()
    ours, our_groups = groups_of(tensors, torch.float32)
    twins, twin_groups = groups_of(tensors, torch.float32)
    a, b = llmfast.AdamW(our_groups, **OPTIONS), llmfast.AdamW(twin_groups, **OPTIONS)
    for step in range(5):
        set_grads(ours, step)
        set_grads(twins, step, scale=0.25)
        kept = [None if p.grad is None else p.grad.clone() for p in ours]
        a.step(grad_scale=0.25)
        b.step()
        assert all(p.grad is None or torch.equal(p.grad, k) for p, k in zip(ours, kept))
    for p, q in zip(ours, twins):
        assert torch.equal(p, q)


def test_gradient_of_another_layout(isa):
    p = torch.randn(6, 10).t().requires_grad_()
    twin = p.detach().clone().requires_grad_()
    grad = torch.randn(10, 6)
    p.grad, twin.grad = grad.clone(), grad.clone()
    assert p.grad.stride() != p.stride()
    llmfast.AdamW([p], **OPTIONS).step()
    torch.optim.AdamW([twin], **OPTIONS).step()
    torch.testing.assert_close(p, twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resume_is_bit_for_bit(dtype, tmp_path):
    leaves, groups = groups_of(start(), dtype)
    optimizer = llmfast.AdamW(groups, **OPTIONS)
    for step in range(3):
        set_grads(leaves, step)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    copies, copy_groups = groups_of([p.detach() for p in leaves], dtype)
    resumed = llmfast.AdamW(copy_groups, lr=1.0)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    for p, q in zip(leaves, copies):
        for name, value in optimizer.state[p].items():
            restored = resumed.state[q][name]
            assert restored.dtype == torch.float32 and torch.equal(restored, value), name
            assert restored.shape == () or restored.stride() == torch.empty_like(q).stride()
    for step in range(3, 6):
        for tensors, o in ((leaves, optimizer), (copies, resumed)):
            set_grads(tensors, step)
            o.step()
    assert all(torch.equal(p, q) for p, q in zip(leaves, copies))


def test_loading_copies_and_relays_state():
    p = torch.randn(4, 6).t().requires_grad_()
    optimizer = llmfast.AdamW([p])
    p.grad = torch.randn(6, 4).t().contiguous().t()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for name in ("exp_avg", "exp_avg_sq"):
        saved["state"][0][name] = saved["state"][0][name].contiguous()  # as safetensors stores it
    before = copy.deepcopy(saved["state"][0]["exp_avg"])
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert torch.equal(saved["state"][0]["exp_avg"], before)
    saved["state"][0]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"state_dict: exp_avg 0 has shape \(3,\), expected \(6, 4\)"):
        optimizer.load_state_dict(saved)


def test_takes_over_torch_state():
    leaves, groups = groups_of(start(), torch.float32)
    theirs = torch.optim.AdamW(groups, **OPTIONS)
    set_grads(leaves, 1)
    theirs.step()
    copies, copy_groups = groups_of([p.detach() for p in leaves], torch.float32)
    ours = llmfast.AdamW(copy_groups, **OPTIONS)
    ours.load_state_dict(theirs.state_dict())
    set_grads(leaves, 2)
    set_grads(copies, 2)
    theirs.step()
    ours.step()
    torch.testing.assert_close(copies, leaves)
    with pytest.raises(ValueError, match="amsgrad=True"):
        ours.load_state_dict(torch.optim.AdamW(copy_groups, amsgrad=True).state_dict())


def test_reset_master():
    p = torch.randn(5).bfloat16().requires_grad_()
    optimizer = llmfast.AdamW([p], lr=0.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    with torch.no_grad():
        p.fill_(3.0)
    optimizer.reset_master()
    optimizer.step()
    assert torch.equal(p, torch.full_like(p, 3.0))


def test_closure_and_scheduler_and_version():
    p = torch.randn(3, requires_grad=True)
    optimizer = llmfast.AdamW([p], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    kept = p.sin()  # needs p as it was
    assert optimizer.step(closure).item() > 0
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


def test_other_dtypes_run_in_torch(monkeypatch):
    p, twin = (torch.linspace(-1, 1, 9, dtype=torch.float64).requires_grad_() for _ in range(2))
    ours, theirs = llmfast.AdamW([p], **OPTIONS), torch.optim.AdamW([twin], **OPTIONS)
    for _ in range(3):
        for t, o in ((p, ours), (twin, theirs)):
            t.grad = t.detach().cos()
            o.step()
    torch.testing.assert_close(p, twin, rtol=1e-12, atol=1e-12)
    assert ours.state[p]["exp_avg"].dtype == torch.float64
    monkeypatch.setenv("LLMFAST_STRICT", "1")
    with pytest.raises(RuntimeError, match=r"adamw: no kernel for torch.float64 on cpu"):
        ours.step()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sharded_parameters_run_in_torch(tmp_path):
    """Those of FSDP are DTensors, whose memory no kernel sees."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain, x = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Linear(6, 3)), torch.randn(4, 5)
        sharded = torch.distributed.fsdp.fully_shard(copy.deepcopy(plain))
        optimizers = llmfast.AdamW(sharded.parameters(), lr=0.1), torch.optim.AdamW(plain.parameters(), lr=0.1)
        for _ in range(3):
            for model, optimizer in zip((sharded, plain), optimizers):
                optimizer.zero_grad()
                model(x).square().sum().backward()
            norm, scale = llmfast.clip_grad_norm(sharded.parameters(), 1.0)
            expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            assert norm == pytest.approx(expected.item(), rel=1e-5)
            optimizers[0].step(grad_scale=scale)
            optimizers[1].step()
        for ours, theirs in zip(sharded.parameters(), plain.parameters()):
            torch.testing.assert_close(ours.full_tensor(), theirs)
    finally:
        torch.distributed.destroy_process_group()


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"lr: got -1.0, expected >= 0"):
        llmfast.AdamW([torch.zeros(1, requires_grad=True)], lr=-1.0)
    with pytest.raises(ValueError, match=r"betas: got \(0.9, 1.0\)"):
        llmfast.AdamW([torch.zeros(1, requires_grad=True)], betas=(0.9, 1.0))
    with pytest.raises(ValueError, match=r"params: got shape \(3,\) with strides \(2,\), expected dense memory"):
        llmfast.AdamW([torch.zeros(6)[::2].requires_grad_()])
    with pytest.raises(TypeError, match=r"params: got dtype torch.complex64"):
        llmfast.AdamW([torch.zeros(1, dtype=torch.complex64, requires_grad=True)])
    table = torch.nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    optimizer = llmfast.AdamW(table.parameters())
    with pytest.raises(ValueError, match=r"gradient of layout torch.sparse_coo"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"exp_avgs\[0\]: got bfloat16\[2\]"):
        one = torch.zeros(2)
        backend.native().adamw_step(
            [one], [one], [one.bfloat16()], [one], [None], [torch.tensor(0.0)], [0], [(0,) * 5], 1.0
        )


@pytest.mark.parametrize("max_norm", [0.5, 1e6, math.inf])
def test_clip_grad_norm_as_torch(isa, max_norm):
    leaves, _ = groups_of([*start(), torch.randn(70000)], torch.float32)
    leaves.append(torch.randn(40).bfloat16().requires_grad_())
    set_grads(leaves, 3)
    grads = [p.grad.clone() for p in leaves if p.grad is not None]
    exact = torch.linalg.vector_norm(torch.cat([g.double().flatten() for g in grads])).item()
    norm, scale = llmfast.clip_grad_norm(leaves, max_norm)
    assert norm == pytest.approx(exact, rel=1e-6)
    assert (norm, scale) == llmfast.clip_grad_norm(grads, max_norm)
    assert scale == pytest.approx(min(1.0, max_norm / (exact + 1e-6)), rel=1e-6)
    peer = torch.nn.utils.clip_grad_norm_(leaves, max_norm).item()  # adds the bfloat16 norm in bfloat16
    assert norm == pytest.approx(peer, rel=1e-2)
    for g, p in zip(grads, (p for p in leaves if p.grad is not None)):
        torch.testing.assert_close(g * scale, p.grad, rtol=1e-2, atol=1e-6)


def test_clip_grad_norm_edges():
    grads = [torch.randn(100001), torch.randn(3, 5).t(), torch.randn(8)[::2], torch.randn(4, dtype=torch.float64)]
    exact = math.sqrt(sum(g.double().square().sum().item() for g in grads))
    assert llmfast.clip_grad_norm(grads, math.inf) == (pytest.approx(exact, rel=1e-6), 1.0)
    norm, scale = llmfast.clip_grad_norm(grads, 1.0, grad_scale=0.125)
    assert norm == pytest.approx(exact / 8, rel=1e-6) and scale == pytest.approx(1 / exact, rel=1e-5)
    assert llmfast.clip_grad_norm([], 1.0) == (0.0, 1.0)
    assert llmfast.clip_grad_norm(torch.tensor([3.0, 4.0]), math.inf)[0] == 5.0
    assert llmfast.clip_grad_norm(torch.tensor([1e30]), 1.0) == (math.inf, 0.0)  # squares are taken in float32
    assert math.isnan(llmfast.clip_grad_norm(torch.tensor([math.nan]), 1.0)[1])
    with pytest.raises(RuntimeError, match="the norm of the gradients is inf"):
        llmfast.clip_grad_norm(torch.tensor([math.inf]), 1.0, error_if_nonfinite=True)
    with pytest.raises(ValueError, match="max_norm: got -1"):
        llmfast.clip_grad_norm(grads, -1)


def test_norm_does_not_depend_on_threads():
    grads = [torch.randn(300000), torch.randn(70, 70), torch.randn(5)]
    before, norms = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            norms.add(llmfast.clip_grad_norm(grads, 1.0))
    finally:
        torch.set_num_threads(before)
    assert len(norms) == 1


def test_round_parameters_keeps_what_rounding_loses():
    model = torch.nn.Linear(7, 5)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = llmfast.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    optimizer.round_parameters(torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    model(torch.randn(3, 7).bfloat16()).sum().backward()
    optimizer.step()
    for p, value in zip(model.parameters(), before):
        assert torch.equal(optimizer.state[p]["master"], value)
        assert torch.equal(p.detach(), value.bfloat16())
    with pytest.raises(ValueError, match=r"dtype: got torch.float64"):
        optimizer.round_parameters(torch.float64)
