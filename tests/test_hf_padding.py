"""``patch(skip_padding=True)``: encoders that leave padding out, against the plain model with it."""

import copy

import pytest
import torch
from conftest import assert_as_accurate
from test_hf_patch import ENCODERS, _model
from tiny_models import V

from llmfast.integrations.transformers import patch, unpatch


@pytest.fixture(autouse=True)
def _strict(monkeypatch):
    monkeypatch.setenv("LLMFAST_STRICT", "1")


@pytest.fixture
def encoder():
    """A bare BERT, patched to leave padding out, beside the plain one."""
    plain = _model("bert").base_model
    patched = copy.deepcopy(plain)
    assert patch(patched, skip_padding=True).replaced["BertEncoder (bert_encoder)"] == 1
    return plain, patched


def _ragged(B: int = 3, T: int = 13):
    """Ids and a mask of sequences with padding right, left, and in the midst."""
    ids = torch.randint(3, V, (B, T))
    mask = torch.ones_like(ids)
    mask[0, 5:], mask[1, :4], mask[2, 3:6] = 0, 0, 0
    return ids, mask


@pytest.mark.parametrize("name", list(ENCODERS))
def test_skipped_padding_leaves_the_rest_as_it_was(name):
    plain = _model(name).base_model
    patched = copy.deepcopy(plain)
    patch(patched, skip_padding=True)
    ids, mask = _ragged()
    seen = []
    hook = patched.encoder.layer[0].attention.self.query.forward

    def query(x):
        seen.append(x.shape)
        return hook(x)

    patched.encoder.layer[0].attention.self.query.forward = query
    results = []
    for model in (patched, plain, copy.deepcopy(plain).double()):
        out = model(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
        (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert seen == [(1, int(mask.sum()), 64)]
    assert len(results[0]) == len(results[1]) > 10
    for ours, theirs, exact in zip(*results):
        assert_as_accurate(ours, theirs, exact)


def test_skipped_padding_is_zero_and_a_row_of_nothing_too(encoder):
    plain, patched = encoder
    ids, mask = _ragged()
    mask[1] = 0
    out = patched(input_ids=ids, attention_mask=mask)
    assert (out.last_hidden_state[mask == 0] == 0).all() and out.last_hidden_state.shape == (*ids.shape, 64)
    expected = plain(input_ids=ids, attention_mask=mask)
    present = mask.bool()
    torch.testing.assert_close(
        out.last_hidden_state[present], expected.last_hidden_state[present], rtol=1e-5, atol=1e-5
    )
    assert (out[0] is out.last_hidden_state) and out.to_tuple()[0] is out.last_hidden_state


def test_padding_is_computed_where_somebody_may_look(encoder):
    """Hidden states, hooks, training, a mask of one's own, compiled calls: as transformers has it, everywhere."""
    plain, patched = encoder
    ids, mask = _ragged()
    expected = plain(input_ids=ids, attention_mask=mask, output_hidden_states=True)

    def same(model, **inputs):
        out = model(input_ids=ids, **inputs)
        torch.testing.assert_close(out.last_hidden_state, expected.last_hidden_state, rtol=1e-5, atol=1e-5)
        return out

    table = mask[:, None, None, :].bool().expand(-1, 1, 13, -1).contiguous()
    same(patched, attention_mask=table)
    same(copy.deepcopy(patched).train(), attention_mask=mask)
    same(torch.compile(copy.deepcopy(patched), backend="aot_eager"), attention_mask=mask)
    shapes = []
    hook = patched.encoder.layer[1].register_forward_hook(lambda module, args, out: shapes.append(args[0].shape))
    same(patched, attention_mask=mask)
    assert shapes == [(3, 13, 64)]
    hook.remove()
    out = same(patched, attention_mask=mask, output_hidden_states=True)
    for ours, theirs in zip(out.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_skip_padding_says_what_cannot_and_unpatch_takes_it_back(encoder):
    plain, patched = encoder
    unpatch(patched)
    ids, mask = _ragged()
    assert torch.equal(patched(input_ids=ids, attention_mask=mask)[0], plain(input_ids=ids, attention_mask=mask)[0])
    assert "forward" not in vars(patched.encoder)
    assert not patch(patched).replaced["BertEncoder (bert_encoder)"]
    assert patch(_model("llama"), skip_padding=True).left["padding: no encoder that can leave it out"] == 1
