"""Generation: the loop against plain forward passes, the filters against transformers', text and stop strings."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmfast.data import ByteTokenizer, CharTokenizer
from llmfast.generate import Sampling, TextTail, complete, generate, stream
from llmfast.generate.sampling import keep_min_p, keep_top_k, keep_top_p, penalise_repetition, pick
from llmfast.models import GPT

SMALL = dict(vocab_size=61, context=40, layers=2, heads=4, width=32)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models this small only get slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_model(name: str = "gpt-nano", **overrides) -> GPT:
    """Weights wide enough that the likeliest token is never a near tie."""
    model = GPT.preset(name, **{**SMALL, "ffn_width": 64, **overrides})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.25)
    return model


MODELS = {
    "gpt2": lambda: small_model("gpt-nano", bias=True),
    "llama, gqa": lambda: small_model("llama-nano", kv_heads=2),
    "window": lambda: small_model("llama-nano", kv_heads=1, window=5),
}


@pytest.fixture(params=MODELS)
def model(request) -> GPT:
    return MODELS[request.param]()


def greedy_without_cache(model: GPT, prompt: torch.Tensor, steps: int) -> torch.Tensor:
    """The definition: the whole sequence through the model each time."""
    ids = prompt[None]
    with torch.no_grad():
        for _ in range(steps):
            ids = torch.cat((ids, model(ids)[:, -1].argmax(-1, keepdim=True)), dim=1)
    return ids[0]


def prompts_of(*lengths: int, vocab_size: int = 61) -> list[torch.Tensor]:
    return [torch.randint(vocab_size, (length,)) for length in lengths]


def test_greedy_equals_the_full_forward_pass(model, isa):
    (prompt,) = prompts_of(7)
    ids = generate(model, prompt[None], max_new_tokens=20, temperature=0)
    assert torch.equal(ids[0], greedy_without_cache(model, prompt, 20))


def test_fills_the_context_to_the_last_place(model):
    (prompt,) = prompts_of(8)
    ids = generate(model, prompt[None], max_new_tokens=33, temperature=0)
    assert ids.shape == (1, 41)  # the 41st token is sampled from position 40 and never fed back
    with pytest.raises(ValueError, match=r"max_new_tokens: got 34, .* only 33 fit .* context of 40"):
        generate(model, prompt[None], max_new_tokens=34)


@pytest.mark.parametrize("temperature", [0, 1.3])
def test_batch_of_different_lengths_equals_each_alone(model, temperature):
    prompts = prompts_of(3, 11, 1, 8)
    options = dict(max_new_tokens=15, temperature=temperature, top_p=0.9, repetition_penalty=1.2)
    together = generate(model, prompts, seed=5, **options)
    for row, prompt in enumerate(prompts):
        alone = generate(model, [prompt], seed=5 + row, **options)
        assert torch.equal(together[row], alone[0])

    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=60)
    by_length = generate(model, padded, prompt_lengths=[3, 11, 1, 8], seed=5, **options)
    assert all(torch.equal(a, b) for a, b in zip(together, by_length))


def test_equal_lengths_as_tensor_and_as_list(model):
    prompts = prompts_of(6, 6)
    as_tensor = generate(model, torch.stack(prompts), max_new_tokens=5, seed=0)
    as_list = generate(model, [p.tolist() for p in prompts], max_new_tokens=5, seed=0)
    assert torch.equal(as_tensor, torch.stack(as_list))


def test_method_of_the_model():
    model = MODELS["gpt2"]()
    prompt = torch.stack(prompts_of(4))
    assert torch.equal(
        model.generate(prompt, max_new_tokens=6, seed=3), generate(model, prompt, max_new_tokens=6, seed=3)
    )


def test_seed_decides_and_the_global_generator_is_left_alone():
    model = MODELS["gpt2"]()
    prompt = torch.stack(prompts_of(4))
    state = torch.get_rng_state()
    first, again, other, short = (
        generate(model, prompt, max_new_tokens=n, seed=seed) for n, seed in ((30, 1), (30, 1), (30, 2), (12, 1))
    )
    free = [generate(model, prompt, max_new_tokens=30) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first[:, :16], short)  # asking for fewer tokens gives the beginning of the same text
    assert not torch.equal(*free)


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([0.0, 1.0, -math.inf, 2.0])
    n = 20000
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    counts = pick(logits.expand(n, 4), uniform).bincount(minlength=4) / n
    torch.testing.assert_close(counts, logits.softmax(0), atol=1e-4, rtol=0)


def test_ends_of_the_uniform_range_never_pick_an_excluded_token():
    logits = torch.full((1, 50000), -math.inf)
    logits[0, 17] = logits[0, 300] = 1.0
    largest = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert pick(logits, torch.zeros(1, dtype=torch.float64)) == 17
    assert pick(logits, largest) == 300


def test_finished_rows_are_padded_and_the_rest_go_on():
    model = MODELS["gpt2"]()
    prompt = torch.stack(prompts_of(4, 4, 4))
    free = generate(model, prompt, max_new_tokens=12, temperature=0)
    eot = free[0, 7].item()  # row 0 ends after at most four new tokens
    ids = generate(model, prompt, max_new_tokens=12, temperature=0, eot_id=eot)
    listed = generate(model, list(prompt), max_new_tokens=12, temperature=0, eot_id=eot)
    for row in range(3):
        new = free[row, 4:].tolist()
        kept = new[: new.index(eot) + 1] if eot in new else new
        assert listed[row].tolist() == prompt[row].tolist() + kept
        assert ids[row].tolist()[: 4 + len(kept)] == listed[row].tolist()
        assert set(ids[row].tolist()[4 + len(kept) :]) <= {eot}

    stopped = generate(model, prompt[:1], max_new_tokens=12, temperature=0, stop_ids=[eot])
    assert stopped.shape[1] < 4 + 12 and stopped[0, -1] == eot  # no step is run once every row has ended


def test_callback_sees_every_token_and_may_stop_a_row():
    model = MODELS["gpt2"]()
    prompt = torch.stack(prompts_of(4, 4))
    seen: list[list[int]] = [[], []]

    def on_token(row, token):
        seen[row].append(token)
        return row == 0 and len(seen[0]) == 3

    ids = generate(model, list(prompt), max_new_tokens=8, seed=0, on_token=on_token)
    assert [len(row) for row in seen] == [3, 8]
    assert [row[4:].tolist() for row in ids] == seen


def test_leaves_the_model_as_it_was():
    model = MODELS["llama, gqa"]().train()
    prompt = torch.stack(prompts_of(4))
    generate(model, prompt, max_new_tokens=3)
    assert model.training
    model(prompt, prompt).backward()  # tables made while generating must serve training
    assert model.head_weight.grad is not None


def test_padded_vocabulary_is_never_chosen():
    model = MODELS["gpt2"]()
    with torch.no_grad():
        model.embedding.weight[50:] *= 10
    prompt = torch.stack(prompts_of(4, vocab_size=50))
    free = generate(model, prompt, max_new_tokens=30, temperature=5.0, seed=0)
    capped = generate(model, prompt, max_new_tokens=30, temperature=5.0, seed=0, vocab_size=50)
    assert free.max() >= 50 > capped.max()


BAD = [
    (dict(temperature=-1), "temperature"),
    (dict(temperature=math.nan), "temperature"),
    (dict(top_k=0), "top_k"),
    (dict(top_p=0.0), "top_p"),
    (dict(top_p=1.5), "top_p"),
    (dict(min_p=-0.1), "min_p"),
    (dict(repetition_penalty=0), "repetition_penalty"),
    (dict(max_new_tokens=-1), "max_new_tokens"),
    (dict(stop_strings="x"), "tokenizer"),
    (dict(vocab_size=62), "vocab_size"),
    (dict(seed=2**64), "seed"),
    (dict(seed=2**64 - 1, input_ids=[[0], [0]]), "seed"),  # the second row's would be 2**64
    (dict(prompt_lengths=[9]), "prompt_lengths"),
    (dict(input_ids=[]), "input_ids"),
    (dict(input_ids=[[]]), "input_ids"),
    (dict(input_ids=torch.zeros(4)), "input_ids"),
    (dict(input_ids=[[61]]), "input_ids"),
    (dict(input_ids=[[0] * 41]), "input_ids"),
]


@pytest.mark.parametrize("arguments, name", BAD, ids=lambda value: repr(value)[:40])
def test_bad_arguments_are_named_before_any_work(arguments, name):
    model = MODELS["gpt2"]()
    model.forward = None
    with pytest.raises(ValueError, match=f"^{name}: "):
        generate(model, **{"input_ids": torch.zeros(1, 4, dtype=torch.int64), "max_new_tokens": 2, **arguments})


def test_a_prompt_without_batch_dimension_is_named(model):
    with pytest.raises(ValueError, match=r"input_ids: got shape \(4,\), expected \(B, T\)"):
        model(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"input_ids: got shape \(0, 5\), expected \(B, T\), both positive"):
        model(torch.zeros(0, 5, dtype=torch.int64))


def test_logits_that_are_not_finite_are_an_error():
    model = MODELS["gpt2"]()
    with torch.no_grad():
        model.embedding.weight[3, 0] = math.nan
    for temperature in (0, 1):
        with pytest.raises(FloatingPointError, match="not finite"):
            generate(model, torch.tensor([[1, 2]]), max_new_tokens=2, temperature=temperature)


def scores(rows=6, vocab=300) -> torch.Tensor:
    return torch.randn(rows, vocab) * 3


@pytest.mark.parametrize("value", [1, 7, 299, 300, 1000])
def test_top_k_as_transformers(value):
    logits = scores()
    logits[0, :20] = 9.0  # ties with the k-th stay
    assert torch.equal(keep_top_k(logits, value), TopKLogitsWarper(value)(None, logits))


@pytest.mark.parametrize("value", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_as_transformers(value):
    logits = scores()
    assert torch.equal(keep_top_p(logits, value), TopPLogitsWarper(value)(None, logits))


@pytest.mark.parametrize("value", [0.0, 0.05, 0.5, 1.0])
def test_min_p_as_transformers(value):
    logits = scores()
    assert torch.equal(keep_min_p(logits, value), MinPLogitsWarper(value)(None, logits))


@pytest.mark.parametrize("value", [0.5, 1.0, 1.3])
def test_repetition_penalty_as_transformers(value):
    logits, ids = scores(), torch.randint(300, (6, 40))
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(value)(ids, logits)
    torch.testing.assert_close(penalise_repetition(logits, seen, value), expected, rtol=0, atol=0)


def test_all_filters_in_transformers_order():
    logits, ids = scores(), torch.randint(300, (6, 40))
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
    chain = (RepetitionPenaltyLogitsProcessor(1.2), TemperatureLogitsWarper(0.7), TopKLogitsWarper(40))
    expected = logits
    for step in (*chain, TopPLogitsWarper(0.8), MinPLogitsWarper(0.02)):
        expected = step(ids, expected)
    ours = Sampling(0.7, top_k=40, top_p=0.8, min_p=0.02, repetition_penalty=1.2).filtered(logits, seen)
    torch.testing.assert_close(ours.softmax(-1), expected.softmax(-1))


def test_a_tiny_temperature_is_greedy():
    logits = scores()
    assert torch.equal(Sampling(1e-30).next(logits, torch.rand(6)), logits.argmax(-1))


# Text.


def byte_model() -> GPT:
    return small_model(vocab_size=272, context=80)  # wider than the tokenizer's 257 ids


def test_streamed_pieces_join_to_the_completion():
    model, tokenizer = byte_model(), ByteTokenizer()
    for seed in range(3):
        options = dict(max_new_tokens=40, seed=seed)
        pieces = list(stream(model, tokenizer, "naïve ", **options))
        assert all(pieces)
        ids = generate(
            model, [tokenizer.encode("naïve ")], **options, eot_id=tokenizer.eot_id, vocab_size=tokenizer.vocab_size
        )[0]
        text = tokenizer.decode(ids[len("naïve ".encode()) :])
        assert "".join(pieces) == text == complete(model, tokenizer, ["naïve "], **options)[0]


def test_completions_of_a_batch_equal_each_alone():
    model, tokenizer = byte_model(), ByteTokenizer()
    prompts = ["def ", "", "class Thing:"]
    texts = complete(model, tokenizer, prompts, max_new_tokens=30, seed=7, stop_strings=["e", "Q"])
    for row, prompt in enumerate(prompts):
        alone = complete(model, tokenizer, [prompt], max_new_tokens=30, seed=7 + row, stop_strings=["e", "Q"])
        assert texts[row] == alone[0]


def test_stop_strings_are_cut_exactly():
    model, tokenizer = small_model(context=200), CharTokenizer("".join(map(chr, range(40, 101))))
    whole = complete(model, tokenizer, ["AB"], max_new_tokens=100, seed=0)[0]
    stop = whole[37:40]
    cut = whole[: whole.index(stop)]
    options = dict(max_new_tokens=100, seed=0, stop_strings=["not there", stop])
    assert complete(model, tokenizer, ["AB"], **options) == [cut]
    assert "".join(stream(model, tokenizer, "AB", **options)) == cut
    ids = generate(model, [tokenizer.encode("AB")], tokenizer=tokenizer, **options)[0]
    assert tokenizer.decode(ids) == "AB" + cut + stop


class PieceTokenizer:
    """Token i is the i-th of some given byte strings."""

    def __init__(self, pieces):
        self.token_bytes = pieces.__getitem__

    def stream_decoder(self):
        from llmfast.data import StreamDecoder

        return StreamDecoder(self)


@settings(max_examples=300, deadline=None)
@given(
    st.text("abé😀", max_size=12),
    st.lists(st.text("abé", min_size=1, max_size=4), max_size=3),
    st.randoms(use_true_random=False),
)
def test_text_is_the_same_however_tokens_cut_it(text, stops, random):
    data = text.encode()
    cuts = sorted(random.sample(range(len(data) + 1), random.randint(0, len(data))))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)])]
    tail = TextTail(PieceTokenizer(pieces), stops)
    out = "".join(tail.feed(token) for token in range(len(pieces))) + tail.finish()
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert out == text and not tail.stopped
    else:
        first = min(ends)
        longest = max(len(stop) for stop in stops if text[:first].endswith(stop))
        assert out == text[: first - longest] and tail.stopped


def test_bad_text_arguments():
    model, tokenizer = byte_model(), ByteTokenizer()
    with pytest.raises(ValueError, match="stop_strings"):
        stream(model, tokenizer, "a", max_new_tokens=3, stop_strings=[""])
    with pytest.raises(ValueError, match="only 80 fit"):
        stream(model, tokenizer, "a", max_new_tokens=81)  # raised by the call, not by the first piece
    with pytest.raises(ValueError, match="prompt: got no text"):
        stream(model, CharTokenizer("ab"), "", max_new_tokens=1)
