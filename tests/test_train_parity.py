"""The same network in plain torch, trained from the same weights on the same batches: the loss curves agree."""

import pytest
import torch
import torch.nn.functional as F
from training import one_thread  # noqa: F401

import llmfast
from llmfast.models import GPT, GPTConfig
from llmfast.optim import clip_grad_norm
from llmfast.train import learning_rate

STEPS, B, T, V = 60, 4, 32, 50
GPT2 = GPTConfig(vocab_size=V, context=T, layers=2, heads=4, width=64, activation="gelu")
LLAMA = GPTConfig(
    vocab_size=V, context=T, layers=2, heads=4, kv_heads=2, width=64, ffn_width=176, norm="rms_norm", activation="silu",
    gated=True, position="rotary", bias=False, tie_embeddings=False,
)  # fmt: skip


def gpt2_loss(p, ids, targets):
    x = F.embedding(ids, p["embedding.weight"]) + p["embedding.position_weight"][: ids.shape[1]]
    for i in range(2):
        b = f"blocks.{i}."
        h = F.layer_norm(x, (64,), p[b + "attention_norm.weight"], p[b + "attention_norm.bias"])
        qkv = F.linear(h, p[b + "attention.qkv.weight"], p[b + "attention.qkv.bias"])
        q, k, v = (t.view(*ids.shape, 4, 16).transpose(1, 2) for t in qkv.split(64, dim=-1))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + F.linear(h, p[b + "attention.out.weight"], p[b + "attention.out.bias"])
        h = F.layer_norm(x, (64,), p[b + "ffn_norm.weight"], p[b + "ffn_norm.bias"])
        h = F.gelu(F.linear(h, p[b + "ffn.up.weight"], p[b + "ffn.up.bias"]))
        x = x + F.linear(h, p[b + "ffn.down.weight"], p[b + "ffn.down.bias"])
    logits = F.linear(F.layer_norm(x, (64,), p["norm.weight"], p["norm.bias"]), p["embedding.weight"])
    return F.cross_entropy(logits.view(-1, V), targets.view(-1))


def rms_norm(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def rotate(x):
    """Half-split rotary embedding (Su et al. 2021, in Llama's layout)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2]).float()[:, None] * 10000.0 ** (-torch.arange(half).float() / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)


def llama_loss(p, ids, targets):
    x = F.embedding(ids, p["embedding.weight"])
    for i in range(2):
        b = f"blocks.{i}."
        qkv = F.linear(rms_norm(x, p[b + "attention_norm.weight"]), p[b + "attention.qkv.weight"])
        q, k, v = (t.unflatten(-1, (-1, 16)).transpose(1, 2) for t in qkv.split((64, 32, 32), dim=-1))
        h = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, enable_gqa=True)
        x = x + F.linear(h.transpose(1, 2).flatten(2), p[b + "attention.out.weight"])
        h = rms_norm(x, p[b + "ffn_norm.weight"])
        h = F.silu(F.linear(h, p[b + "ffn.gate.weight"])) * F.linear(h, p[b + "ffn.up.weight"])
        x = x + F.linear(h, p[b + "ffn.down.weight"])
    return F.cross_entropy(F.linear(rms_norm(x, p["norm.weight"]), p["head.weight"]).view(-1, V), targets.view(-1))


def batches():
    """Text with structure to learn: each token follows its predecessor by a fixed rule, most of the time."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        ids = torch.randint(0, V, (B, T + 1), generator=generator)
        follow = torch.rand(B, T, generator=generator) < 0.8
        for t in range(T):
            ids[:, t + 1] = torch.where(follow[:, t], (3 * ids[:, t] + 1) % V, ids[:, t + 1])
        yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def lr(step):
    return learning_rate(step, peak=3e-3, floor=3e-4, warmup=5, total=STEPS)


def groups(parameters):
    parameters = list(parameters)
    matrices, vectors = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def losses_of_torch(initial, loss_of):
    p = {name: value.clone().requires_grad_() for name, value in initial.items()}
    optimizer = torch.optim.AdamW(groups(p.values()), betas=(0.9, 0.95))
    losses = []
    for step, (ids, targets) in enumerate(batches()):
        for group in optimizer.param_groups:
            group["lr"] = lr(step)
        loss = loss_of(p, ids, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(p.values(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def losses_of_llmfast(model):
    optimizer = llmfast.optim.AdamW(groups(model.parameters()), betas=(0.9, 0.95))
    losses = []
    for step, (ids, targets) in enumerate(batches()):
        for group in optimizer.param_groups:
            group["lr"] = lr(step)
        loss = model(ids, targets)
        optimizer.zero_grad()
        loss.backward()
        _, scale = clip_grad_norm(model.parameters(), 1.0)
        optimizer.step(grad_scale=scale)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("config, loss_of", [(GPT2, gpt2_loss), (LLAMA, llama_loss)], ids=["gpt2", "llama"])
def test_loss_curves_agree(isa, config, loss_of):
    model = GPT(config)
    initial = {name: value.detach().clone() for name, value in model.named_parameters()}
    theirs = losses_of_torch(initial, loss_of)
    ours = losses_of_llmfast(model)
    assert theirs[-1] < theirs[0] - 0.5  # it learns, so agreement means something
    differences = [abs(a - b) for a, b in zip(ours, theirs)]
    assert max(differences) < 1e-3
    assert max(differences[:5]) < 2e-5
