"""A block in one native call against its modules, one by one: values, gradients, caches, and when it steps aside."""

import copy
import pickle
import warnings
import weakref

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import llmfast
from llmfast.models import GPT, GPTConfig
from llmfast.models.gpt import Block
from llmfast.nn.block import fused_block, fused_stack

FAMILIES = {
    "gpt2": {"norm": "layer_norm", "position": "learned", "activation": "gelu_tanh", "bias": True},
    "llama": {
        "norm": "rms_norm",
        "position": "rotary",
        "activation": "silu",
        "gated": True,
        "bias": False,
        "kv_heads": 2,
    },
    "no biases, window": {
        "norm": "layer_norm",
        "position": "rotary",
        "activation": "relu2",
        "bias": False,
        "window": 5,
    },
}
FAMILIES["qwen3"] = FAMILIES["llama"] | {"head_dim": 20, "qk_norm": True}


def make(family: str, dtype=torch.float32, **changes) -> GPT:
    torch.manual_seed(1)
    config = GPTConfig(vocab_size=31, context=32, layers=2, heads=4, width=48, ffn_width=72, **FAMILIES[family])
    model = GPT(config.replace(**changes)).to(dtype)
    for name, parameter in model.named_parameters():
        if "_norm.weight" in name:  # ones would hide a weight that is left out
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def by_modules(monkeypatch) -> None:
    """Makes every block call its modules."""
    for name in ("fused_block", "fused_stack"):
        monkeypatch.setattr(f"llmfast.models.gpt.{name}", lambda *_: None)


def losses_and_gradients(model: GPT, **arguments):
    ids = torch.randint(31, (3, 18), generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    loss = model(ids[:, :-1], ids[:, 1:], **arguments)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def nodes(tensor: torch.Tensor) -> list[str]:
    """Names of the nodes of `tensor`'s graph."""
    names, queue, seen = [], [tensor.grad_fn], set()
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.append(node.name())
        queue += [following for following, _ in node.next_functions]
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_its_modules(family, dtype, isa, monkeypatch):
    model = make(family, dtype)
    loss, grads = losses_and_gradients(model)
    assert nodes(model(torch.ones(1, 4, dtype=torch.int64))).count("_BlockFunctionBackward") == 2
    by_modules(monkeypatch)
    expected_loss, expected = losses_and_gradients(model)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
    for name, grad in grads.items():
        # the same kernels in the same order: only sums of gradients may be rounded once less
        torch.testing.assert_close(
            grad, expected[name], rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5, msg=name
        )


def test_saved_tensors_may_come_back_with_other_strides():
    model = make("gpt2")
    expected = losses_and_gradients(model)[1]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: torch.stack((t, t), -1)[..., 0]):
        grads = losses_and_gradients(model)[1]
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents(family, monkeypatch):
    model = make(family)
    bounds = torch.tensor([0, 5, 6, 30, 51], dtype=torch.int32)
    loss, grads = losses_and_gradients(model, cu_seqlens=bounds)
    by_modules(monkeypatch)
    expected_loss, expected = losses_and_gradients(model, cu_seqlens=bounds)
    torch.testing.assert_close(loss, expected_loss)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_mask(kind, monkeypatch):
    model = make("llama")
    visible = torch.rand(3, 1, 1, 17, generator=torch.Generator().manual_seed(3)) > 0.3
    mask = visible if kind == "bool" else torch.zeros(3, 1, 1, 17).masked_fill(~visible, -1e9)
    loss, grads = losses_and_gradients(model, mask=mask)
    by_modules(monkeypatch)
    expected_loss, expected = losses_and_gradients(model, mask=mask)
    torch.testing.assert_close(loss, expected_loss)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_caches(family, dtype, isa):
    """Token by token and in pieces, a cache gives what the whole sequence gives."""
    model = make(family, dtype)
    ids = torch.randint(31, (2, 19), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        whole = model(ids).float()
        caches = model.caches(19)
        pieces = [model(ids[:, a:b], caches=caches) for a, b in ((0, 7), (7, 8), (8, 9), (9, 16), (16, 17), (17, 19))]
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(torch.cat(pieces, 1).float(), whole, rtol=bound, atol=bound)


def test_a_full_cache_is_refused():
    model = make("llama")
    caches = model.caches(4)
    with torch.no_grad():
        model(torch.ones(1, 3, dtype=torch.int64), caches=caches)
        with pytest.raises(ValueError, match="at most 4"):
            model(torch.ones(1, 2, dtype=torch.int64), caches=caches)
        with pytest.raises(ValueError, match="batch 2"):
            model(torch.ones(2, 1, dtype=torch.int64), caches=caches)


def test_frozen_weights(monkeypatch):
    model = make("gpt2")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("blocks.1.attention" in name)
    _, grads = losses_and_gradients(model)
    by_modules(monkeypatch)
    _, expected = losses_and_gradients(model)
    assert {n for n, g in grads.items() if g is not None} == {n for n, g in expected.items() if g is not None}
    for name, grad in grads.items():
        if grad is not None:
            torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_activation_checkpointing():
    plain, saving = make("llama"), make("llama", activation_checkpointing=True)
    for (loss, grads), (expected_loss, expected) in [(losses_and_gradients(saving), losses_and_gradients(plain))]:
        assert torch.equal(loss, expected_loss)
        assert all(torch.equal(grad, expected[name]) for name, grad in grads.items())


class Doubled(llmfast.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "how", ["forward hook", "backward hook", "replaced", "parametrised", "autocast", "mode", "dtypes"]
)
def test_steps_aside(how):
    """Whatever the modules would have noticed, they notice."""
    model = make("gpt2")
    block, ids = model.blocks[0], torch.ones(1, 3, dtype=torch.int64)
    x = model.embedding(ids, torch.arange(3))
    assert fused_block(block, x, None, None, None, None, None) is not None
    if how == "forward hook":
        block.attention.qkv.register_forward_hook(lambda *_: None)
    elif how == "backward hook":
        block.ffn.down.register_full_backward_hook(lambda *_: None)
    elif how == "replaced":
        block.ffn.up = Doubled(48, 72)
    elif how == "parametrised":
        torch.nn.utils.parametrizations.weight_norm(block.attention.out)
    elif how == "dtypes":
        block.attention.qkv.to(torch.bfloat16)
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert fused_block(block, x, None, None, None, None, None) is None
    elif how == "mode":
        with FlopCounterMode(display=False):
            assert fused_block(block, x, None, None, None, None, None) is None
    else:
        assert fused_block(block, x, None, None, None, None, None) is None


class Adapted(torch.nn.Module):
    """A linear layer and a change of its weight, as LoRA has them; `weight` is what the layer alone has."""

    def __init__(self, base):
        super().__init__()
        self.base, self.delta = base, torch.nn.Parameter(torch.randn_like(base.weight) * 0.1)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + x @ self.delta.T


@pytest.mark.parametrize("name", ["attention.qkv", "attention.out", "ffn.up", "ffn.gate", "ffn.down", "head"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapted_and_hooked_linears_are_called(family, name):
    model = make(family, tie_embeddings=False)
    parent = model if name == "head" else model.blocks[1].get_submodule(name.split(".")[0])
    name = name.split(".")[-1]
    linear = getattr(parent, name)
    if linear is None:  # no gate
        return
    ids, calls = torch.randint(31, (2, 9)), []
    expected, losses = model(ids), {r: model(ids, ids, reduction=r) for r in ("mean", "sum", "none")}
    linear.register_forward_hook(lambda *_: calls.append(name))
    torch.testing.assert_close(model(ids), expected, rtol=1e-5, atol=1e-5)
    for reduction, loss in losses.items():
        torch.testing.assert_close(model(ids, ids, reduction=reduction), loss, rtol=1e-5, atol=1e-5)
    assert len(calls) == 4
    linear._forward_hooks.clear()
    setattr(parent, name, Adapted(linear))
    with torch.no_grad():
        adapted = model(ids)
        linear.weight += getattr(parent, name).delta
    setattr(parent, name, linear)
    torch.testing.assert_close(adapted, model(ids), rtol=1e-4, atol=1e-5)


def test_compiles_through_the_modules():
    model = make("gpt2")
    ids = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(5))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), model(ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_several_losses_at_once(family):
    """``is_grads_batched`` and `torch.vmap` hand the backward pass tensors without memory of their own."""
    model, ids = make(family), torch.randint(31, (2, 9))
    logits, leaves = model(ids), list(model.parameters())
    assert "_BlockFunctionBackward" in nodes(logits)
    losses = torch.randn(3, *logits.shape)
    expected = [torch.autograd.grad(logits, leaves, loss, retain_graph=True) for loss in losses]
    expected = [torch.stack(grads) for grads in zip(*expected)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: loops where an op has no batching rule
        batched = torch.autograd.grad(logits, leaves, losses, is_grads_batched=True, retain_graph=True)
        mapped = torch.vmap(lambda loss: torch.autograd.grad(logits, leaves, loss, retain_graph=True))(losses)
    torch.testing.assert_close(list(batched), expected)
    torch.testing.assert_close(list(mapped), expected)


@pytest.mark.parametrize("frozen", [(), ("qkv.weight", "up.weight"), ("out.weight", "gate.weight", "down.bias")])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_flop_counter_counts_the_modules_backward_passes(family, packed, frozen, monkeypatch):
    model, ids = make(family), torch.randint(31, (2, 9))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(frozen))
    bounds = torch.tensor([0, 5, 6, 18], dtype=torch.int32) if packed else None

    def flops_of_backward() -> int:
        loss = model(ids, ids, cu_seqlens=bounds)
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        return counter.get_total_flops()

    ours = flops_of_backward()
    by_modules(monkeypatch)
    assert ours == flops_of_backward() > 0


def test_second_derivatives_are_refused():
    model = make("gpt2")
    loss = model(torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64))
    (grad,) = torch.autograd.grad(loss, model.blocks[0].ffn.up.weight, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not require grad|once_differentiable"):
        grad.sum().backward()


def test_norms_replaced_between_calls(monkeypatch):
    """What the native side knows of a block follows the block."""
    model, ids = make("gpt2"), torch.ones(1, 4, dtype=torch.int64)
    with torch.no_grad():
        before = model(ids)
        for block in model.blocks:
            block.attention_norm, block.ffn_norm = llmfast.nn.AddRMSNorm(48), llmfast.nn.AddRMSNorm(48)
        after = model(ids)
        by_modules(monkeypatch)
        torch.testing.assert_close(after, model(ids))
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("mask", [torch.ones(1, 1, 4, 9, dtype=torch.bool), torch.ones(1, 1, 4, 4, dtype=torch.int64)])
def test_masks_that_do_not_fit_are_named(mask):
    with pytest.raises((ValueError, TypeError), match="mask: got"):
        make("gpt2")(torch.ones(1, 4, dtype=torch.int64), mask=mask)


def stack(model: GPT, caches=None) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What `fused_stack` makes of three tokens."""
    with torch.no_grad():
        x = model.embedding(torch.ones(1, 3, dtype=torch.int64), torch.arange(3))
        rotary = model._rotary_at(torch.arange(3)) if model.config.position == "rotary" else None
        return fused_stack(model, Block, x, rotary, None, None, caches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_stack_equals_its_blocks(family, dtype, isa, monkeypatch):
    """All blocks in one call, without gradients: the same bits, with and without masks, documents and caches."""
    model = make(family, dtype)
    ids = torch.randint(31, (2, 11), generator=torch.Generator().manual_seed(6))
    mask = torch.rand(2, 1, 11, 11, generator=torch.Generator().manual_seed(7)) < 0.8
    bounds = torch.tensor([0, 5, 5, 12, 22], dtype=torch.int32)

    def results():
        caches = model.caches(11)
        with torch.no_grad():
            return (
                model(ids),
                model(ids, mask=mask),
                model(ids, cu_seqlens=bounds),
                *(model(ids[:, a:b], mask=mask[:, :, a:b, :b], caches=caches) for a, b in ((0, 9), (9, 10), (10, 11))),
                *(cache.k for cache in caches),
            )

    assert stack(model) is not None
    found = results()
    monkeypatch.setattr("llmfast.models.gpt.fused_stack", lambda *_: None)
    for ours, expected in zip(found, results(), strict=True):
        assert torch.equal(ours, expected)


class Skipped(torch.nn.Module):
    """A block that somebody put in the place of one, with nothing that ours have."""

    def forward(self, x, stream, rotary, mask, cu_seqlens, cache):
        return torch.zeros_like(x), x if stream is None else stream + x


def test_foreign_blocks_are_called():
    model, ids = make("gpt2"), torch.randint(31, (1, 9), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        both = model(ids)
        model.blocks[0] = Skipped()
        without_first = model(ids)
        model.blocks = model.blocks[1:]
        torch.testing.assert_close(without_first, model(ids), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(both, without_first)


def other_forward(module: torch.nn.Module) -> None:
    """As accelerate's hooks do it."""
    forward = module.forward
    module.forward = lambda *arguments: forward(*arguments)


CHANGES = {
    "hook of a block": lambda model: model.blocks[1].register_forward_hook(lambda *_: None),
    "hook within a block": lambda model: model.blocks[1].ffn.up.register_forward_pre_hook(lambda *_: None),
    "another forward": lambda model: other_forward(model.blocks[1].attention.out),
    "another forward of a block": lambda model: other_forward(model.blocks[0]),
    "replaced": lambda model: setattr(model.blocks[1].ffn, "down", Doubled(72, 48)),
    "another class": lambda model: setattr(model.blocks[1].ffn.up, "__class__", Doubled),
    "block of another class": lambda model: model.blocks.__setitem__(0, Skipped()),
    "dtype of a weight": lambda model: model.blocks[1].ffn.up.to(torch.bfloat16),
}


@pytest.mark.parametrize("before", [False, True], ids=["at first", "after a call"])
@pytest.mark.parametrize("change", CHANGES)
def test_stack_steps_aside(change, before):
    model = make("gpt2")
    if before:
        assert stack(model) is not None
    CHANGES[change](model)
    assert stack(model) is None


def test_stack_steps_aside_for_gradients():
    model = make("gpt2")
    x = model.embedding(torch.ones(1, 3, dtype=torch.int64), torch.arange(3))
    assert fused_stack(model, Block, x, None, None, None, None) is None


def pruned(model: GPT) -> None:
    model.blocks = torch.nn.ModuleList([model.blocks[1]])


@torch.no_grad()
def other_memory(model: GPT) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.5


FOLLOWED = {
    "weights in place": lambda model: model.blocks[0].ffn.up.weight.data.mul_(2),
    "weights in other memory": other_memory,
    "another parameter": lambda model: setattr(
        model.blocks[0].ffn.up, "weight", torch.nn.Parameter(torch.ones(72, 48))
    ),
    "another bias": lambda model: setattr(model.blocks[0].ffn.up, "bias", torch.nn.Parameter(torch.ones(72))),
    "epsilon": lambda model: setattr(model.blocks[1].ffn_norm, "eps", 0.5),
    "window": lambda model: setattr(model.blocks[1].attention, "window", 2),
    "activation": lambda model: setattr(model.blocks[1].ffn, "activation", "relu"),
    "blocks left out": pruned,
    "blocks in other order": lambda model: setattr(model, "blocks", torch.nn.ModuleList(reversed(model.blocks))),
    "a block replaced": lambda model: model.blocks.__setitem__(0, copy.deepcopy(model.blocks[1])),
    "all in another dtype": lambda model: model.bfloat16(),
}


@pytest.mark.parametrize("change", FOLLOWED)
def test_stack_follows_the_model(change, monkeypatch):
    """What it keeps of a model is looked at again where the model has changed."""
    model, ids = make("gpt2"), torch.randint(31, (1, 9), generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        before = model(ids)
        FOLLOWED[change](model)
        assert stack(model) is not None
        after = model(ids)
        by_modules(monkeypatch)
        torch.testing.assert_close(after, model(ids), rtol=1e-4, atol=1e-5)
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_keep_nothing(how):
    model, ids = make("gpt2"), torch.ones(1, 5, dtype=torch.int64)
    with torch.no_grad():
        expected = model(ids)
        copied = how(model)
        with_other_weights = how(model)
        with_other_weights.blocks[0].ffn.up.weight.mul_(2)
        assert torch.equal(copied(ids), expected)
        assert not torch.equal(with_other_weights(ids), expected)
        assert torch.equal(model(ids), expected)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_replaced_parameters_are_freed_by_the_next_call(grad, hooked):
    model, ids = make("gpt2"), torch.ones(1, 4, dtype=torch.int64)
    for before in (True, False):
        with torch.set_grad_enabled(before):
            model(ids)
    parameters = [weakref.ref(p) for p in model.parameters()]
    model.load_state_dict(make("gpt2").state_dict(), assign=True)
    if hooked:
        model.blocks[0].register_forward_hook(lambda *_: None)
    with torch.set_grad_enabled(grad):
        model(ids)
    assert not any(p() is not None for p in parameters)


def test_stack_with_caches_of_different_lengths():
    """Left to the blocks, each of which knows its own."""
    model = make("llama")
    caches = model.caches(8)
    assert stack(model, caches=caches) is not None
    caches[1].length = 1
    assert stack(model, caches=caches) is None
    assert [cache.length for cache in caches] == [3, 1]
