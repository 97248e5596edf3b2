"""Whole models on CUDA kernels, emulated or real: the same losses and tokens as on the CPU's kernels."""

import copy
import math
import warnings

import pytest
import torch
from conftest import assert_as_accurate
from training import one_thread, tiny_config, train

import llmfast
from llmfast import backend
from llmfast.generate import decoding, graphs
from llmfast.models import GPT, GPTConfig
from llmfast.nn import Linear
from llmfast.train import NonFiniteError

pytest_plugins = "cuda_emulated"

SHAPE = {"vocab_size": 61, "context": 24, "layers": 2, "heads": 2, "width": 32}
OPS = (
    "adamw",
    "attention",
    "attention_backward",
    "attention_decode",
    "embedding",
    "ffn",
    "grad_norm",
    "linear_backward",
)
FAMILIES = {
    "gpt2": GPTConfig(**SHAPE),
    "llama": GPTConfig(
        **SHAPE, kv_heads=1, norm="rms_norm", activation="silu", gated=True, position="rotary", bias=False,
        tie_embeddings=False, ffn_width=48,
    ),
}  # fmt: skip


def trained(model: GPT, ids: torch.Tensor, steps: int, dtype: torch.dtype) -> tuple[list[float], GPT]:
    optimizer = llmfast.AdamW(model.parameters(), lr=1e-2)
    optimizer.round_parameters(dtype)
    losses = []
    for _ in range(steps):
        loss = model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        loss.backward()
        norm, scale = llmfast.clip_grad_norm(model.parameters(), 1.0)
        optimizer.step(grad_scale=scale)
        optimizer.zero_grad(set_to_none=True)
        losses += [loss.item(), float(norm)]
    return losses, model


@pytest.fixture(scope="module")
def on_the_cpu() -> dict:
    """Losses of training and greedy tokens by the CPU's kernels, and the weights that all start from."""
    found = {}
    for name, config in FAMILIES.items():
        torch.manual_seed(3)
        model, ids = GPT(config), torch.randint(61, (2, 21))
        start = copy.deepcopy(model.state_dict())
        for dtype in (torch.float32, torch.bfloat16):
            model = GPT(config)
            model.load_state_dict(start)
            losses, model = trained(model, ids, 3, dtype)
            tokens = model.generate(ids[:, :5], max_new_tokens=6, temperature=0)
            found[name, dtype] = ids, start, losses, tokens
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_and_decoding(cuda, on_the_cpu, family, dtype):
    ids, start, losses, tokens = on_the_cpu[family, dtype]
    model, before = GPT(FAMILIES[family]), backend.fallbacks()
    model.load_state_dict(start)
    found, model = trained(model.to(cuda), ids.to(cuda), 3, dtype)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(found, losses, **tolerance)
    ours = model.generate(ids[:, :5].to(cuda), max_new_tokens=6, temperature=0).cpu()
    if dtype == torch.float32:  # in bfloat16 a near tie may fall the other way
        assert torch.equal(ours, tokens)
    assert backend.fallbacks() == before
    assert all(sum(row["calls"] for row in backend.native_cuda().implementations(op)) for op in OPS)


def test_linear_layers_run_natively(cuda):
    """Modules ask the device, not whether it is the CPU."""
    before = backend.fallbacks()
    layer, x = Linear(16, 8).to(cuda), torch.randn(3, 16, device=cuda)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    assert backend.fallbacks() == before


def test_pretrain(cuda, tmp_path):
    """The trainer, with accumulation and a resumed run, which ends bit for bit where the uninterrupted one does."""
    changes = {"device": cuda, "steps": 4, "schedule_steps": 4, "val_every": 2, "grad_accumulation": 2, "batch_size": 2}
    whole = train(tiny_config(tmp_path, out=str(tmp_path / "whole"), **changes))
    part = tiny_config(tmp_path, out=str(tmp_path / "part"), **{**changes, "steps": 2})
    train(part)
    resumed = train(tiny_config(tmp_path, out=str(tmp_path / "part"), resume="auto", **changes))
    assert resumed.train_loss == whole.train_loss and resumed.val_loss == whole.val_loss
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters()):
        assert torch.equal(ours, theirs)
    assert str(whole.model.head_weight.device).startswith(cuda)


@pytest.mark.parametrize("clip, bad", [(0.0, math.nan), (0.0, math.inf), (1.0, math.inf), (1.0, math.nan)])
def test_pretrain_stops_before_a_gradient_that_is_not_finite_changes_weights(cuda, tmp_path, monkeypatch, clip, bad):
    """Though on a GPU the optimiser's step is enqueued before the host knows the norm."""
    models, reset = [], GPT.reset_parameters

    def hooked(self):
        reset(self)
        self.blocks[0].ffn.up.weight.register_hook(lambda grad: torch.full_like(grad, bad))
        models.append((self, copy.deepcopy(self.state_dict())))

    monkeypatch.setattr(GPT, "reset_parameters", hooked)
    with pytest.raises(NonFiniteError, match=f"gradient's norm {bad}; stopped before changing the weights"):
        train(tiny_config(tmp_path, device=cuda, clip=clip, warmup=0, val_every=0))
    ((model, before),) = models
    assert all(torch.equal(p.cpu(), before[name]) for name, p in model.state_dict().items())


def test_choose_device(monkeypatch):
    if not torch.cuda.is_available():
        assert backend.choose_device() == torch.device("cpu")
        with pytest.raises(ValueError, match="device: got 'cuda', but torch finds no GPU here"):
            backend.choose_device("cuda")
    with pytest.raises(ValueError, match="device: got 'tpu', expected auto, cpu, cuda or cuda:N"):
        backend.choose_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(backend, "why_not_native", lambda device: None if device.index else "too old")
    assert backend.choose_device() == torch.device("cuda", 1)
    assert backend.choose_device("cuda") == torch.device("cuda", 0)
    with pytest.raises(ValueError, match="device: got 'cuda:2', but torch finds 2 GPUs here"):
        backend.choose_device("cuda:2")


@pytest.mark.parametrize("prompts", [[[1, 2, 3, 4], [5, 6]], [[7, 8, 9]]], ids=["padded", "one"])
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_by_graph(cuda, monkeypatch, family, prompts):
    """The step that a graph holds, replayed on a GPU and simply called under the emulation, over several buckets."""
    monkeypatch.setattr(graphs, "BUCKET", 8)
    captured = []
    if cuda == "cpu":
        monkeypatch.setattr(graphs.GraphedStep, "_capture", lambda self: captured.append(self._columns) or self._step)
    else:
        capture = graphs.GraphedStep._capture
        monkeypatch.setattr(
            graphs.GraphedStep, "_capture", lambda self: captured.append(self._columns) or capture(self)
        )
    model = GPT(FAMILIES[family]).to(cuda)
    options = {"max_new_tokens": 18, "temperature": 0.7, "seed": 5}
    monkeypatch.setattr(decoding, "why_not_graphed", lambda *_: "for comparison")
    expected = [row.tolist() for row in model.generate([torch.tensor(p, device=cuda) for p in prompts], **options)]
    assert not captured
    monkeypatch.setattr(decoding, "why_not_graphed", lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [row.tolist() for row in model.generate([torch.tensor(p, device=cuda) for p in prompts], **options)]
    assert found == expected
    assert captured == [8, 16, len(prompts[0]) + 17]


def test_graphed_steps_are_as_accurate(cuda, monkeypatch):
    """Attention walks over hidden columns too and cuts its sums elsewhere, so bfloat16 logits may round differently."""
    if cuda == "cpu":  # the emulation has no graphs: the step itself
        monkeypatch.setattr(graphs.GraphedStep, "_capture", lambda self: self._step)
    torch.manual_seed(0)
    exact = GPT(FAMILIES["gpt2"].replace(context=300)).to(cuda)
    model, B, T = copy.deepcopy(exact).bfloat16(), 8, 130
    ids = torch.randint(model.config.vocab_size, (B, T + 2)).to(cuda)
    graphed, plain = model.caches(300), model.caches(300)
    with torch.no_grad():
        for caches in (graphed, plain):
            model(ids[:, :T], caches=caches, last_only=True)
        step = graphs.GraphedStep(model, graphed, torch.full((B, 1), T, device=cuda), None)
        for end in (T + 1, T + 2):
            ours = step(ids[:, end - 1 : end])
            theirs = model(ids[:, end - 1 : end], caches=plain, last_only=True)[:, -1]
            truth = exact(ids[:, :end], last_only=True)[:, -1].double()
            assert_as_accurate(ours, theirs, truth, what=f"logits after {end} tokens")


def test_when_graphs_are_used(monkeypatch):
    gpu, model = torch.device("cuda", 0), GPT(FAMILIES["gpt2"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert graphs.why_not_graphed(model, gpu, 100) is None
    assert graphs.why_not_graphed(model, torch.device("cpu"), 100) == "not a GPU"
    assert graphs.why_not_graphed(model, gpu, 3) == "too few tokens"
    assert "window" in graphs.why_not_graphed(GPT(FAMILIES["gpt2"].replace(window=4)), gpu, 100)
    model.norm.register_forward_hook(lambda *_: None)
    assert "hooks" in graphs.why_not_graphed(model, gpu, 100)


def test_capture_that_fails_leaves_decoding_as_it_was(monkeypatch):
    def fail(self):
        raise RuntimeError("operation not permitted when stream is capturing")

    model, prompt = GPT(FAMILIES["gpt2"]), torch.tensor([[1, 2, 3]])
    expected = model.generate(prompt, max_new_tokens=16, temperature=0)
    monkeypatch.setattr(decoding, "why_not_graphed", lambda *_: None)
    monkeypatch.setattr(graphs.GraphedStep, "_capture", fail)
    with pytest.warns(UserWarning, match="decoding without a CUDA graph: operation not permitted"):
        assert torch.equal(model.generate(prompt, max_new_tokens=16, temperature=0), expected)


__all__ = ["one_thread"]
