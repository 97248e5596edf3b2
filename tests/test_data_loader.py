"""Batches: coverage, determinism, resuming, ranks, and document boundaries against a brute-force computation."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfast.data import BatchLoader, TokenSplit, eval_batches, write_shard
from llmfast.data.shuffle import mix, permuted


def make_split(folder, lengths, shards=1, vocab_size=1000):
    """Documents of the given lengths, whose tokens count up through the stream, so that a token tells its place."""
    starts = np.cumsum([0, *lengths])
    parts = np.array_split(np.arange(len(lengths)), shards)
    for number, part in enumerate(parts):
        with write_shard(folder / f"{number}.bin", vocab_size) as shard:
            for index in part:
                shard.add(np.arange(starts[index], starts[index + 1]))
    return TokenSplit.open([folder / f"{number}.bin" for number in range(shards)])


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    rng = np.random.default_rng(0)
    return make_split(tmp_path_factory.mktemp("split"), rng.integers(1, 12, 120).tolist(), shards=3)


def places(batch):
    return batch.inputs[:, 0].tolist()


def equal(one, other):
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(one, other, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permuted_is_a_permutation(n, seed):
    key = np.full(n, seed, np.uint64)
    assert np.array_equal(np.sort(permuted(np.arange(n), n, key)), np.arange(n))


def test_permutations_send_any_place_anywhere():
    n, n_keys = 50, 20_000
    keys = mix(1, np.arange(n_keys))
    first, second = (permuted(np.full(n_keys, place), n, keys) for place in (0, 1))
    for images, cells in ((first, n), ((second - first) % n, n - 1)):
        counts = np.bincount(images, minlength=n)
        assert (counts > 0).sum() == cells
        expected = n_keys / cells
        assert np.sum((counts[counts > 0] - expected) ** 2) / expected < 86  # chi-square, 49 degrees, p = 0.001


def test_the_random_sequence_is_fixed_for_good():
    """Runs resume on other machines and numpy versions only if these never change."""
    assert permuted(np.arange(8), 8, mix(7, np.zeros(8, int))).tolist() == [4, 5, 6, 7, 3, 2, 1, 0]
    assert (mix(7, np.arange(4)) % np.uint64(1000)).tolist() == [221, 174, 827, 45]


def test_a_batch_is_the_stream_and_its_shift(split):
    batch = next(BatchLoader(split, 4, 7, seed=1))
    for tensor in batch[:2]:
        assert tensor.shape == (4, 7) and tensor.dtype == torch.int64 and tensor.is_contiguous()
    assert torch.equal(batch.targets, batch.inputs + 1)
    assert torch.equal(batch.inputs, batch.inputs[:, :1] + torch.arange(7))
    assert batch.cu_seqlens is None and batch.position_ids is None


@pytest.mark.parametrize(("batch_size", "seq_len"), [(1, 1), (4, 7), (3, 64), (50, 10)])
def test_packed_epochs_cover_every_target_once(split, batch_size, seq_len):
    loader = BatchLoader(split, batch_size, seq_len, seed=3)
    n_windows = (len(split) - 1) // seq_len
    rows = itertools.chain.from_iterable(batch.targets.tolist() for batch in loader)
    orders = []
    for _ in range(3):
        epoch = list(itertools.islice(rows, n_windows))
        targets = sorted(itertools.chain.from_iterable(epoch))
        assert targets == list(range(1, n_windows * seq_len + 1))
        orders.append([row[0] for row in epoch])
    assert len({tuple(order) for order in orders}) == 3 or n_windows < 5
    assert loader.n_windows == n_windows


def test_epoch_and_tokens_are_counted(split):
    loader = BatchLoader(split, 4, 7, world_size=2, rank=1)
    assert loader.tokens_per_step == 56 and loader.epoch == 0
    next(loader)
    assert loader.step == 1 and loader.epoch == 8 / loader.n_windows


def test_random_mode_draws_offsets_from_the_whole_range(split):
    seq_len = len(split) - 4  # four possible offsets: 0 to 3
    loader = BatchLoader(split, 16, seq_len, seed=1, mode="random")
    seen = np.bincount([place for batch in itertools.islice(loader, 50) for place in places(batch)], minlength=4)
    assert seen.size == 4 and seen.min() > 150 and torch.equal(next(loader).targets, next(loader).targets) is False
    exact = BatchLoader(split, 2, len(split) - 1, mode="random")
    assert places(next(exact)) == [0, 0]


@pytest.mark.parametrize("mode", ["packed", "random"])
@pytest.mark.parametrize("respect_documents", [False, True])
def test_resuming_is_exact(split, mode, respect_documents):
    options = {"seed": 5, "mode": mode, "respect_documents": respect_documents}
    whole = list(itertools.islice(BatchLoader(split, 4, 7, **options), 40))
    stopped = BatchLoader(split, 4, 7, **options)
    for _ in range(17):
        next(stopped)
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = BatchLoader(split, 4, 7, **options)
    resumed.load_state_dict(state)
    assert resumed.step == 17
    assert all(equal(a, b) for a, b in zip(whole[17:], resumed))
    assert equal(resumed.batch(3), whole[3]) and not equal(whole[3], whole[4])


def test_other_seeds_give_other_orders(split):
    first = [places(next(BatchLoader(split, 16, 7, seed=seed))) for seed in (0, 1, 2, -1, 2**40)]
    assert len({tuple(order) for order in first}) == 5


@pytest.mark.parametrize("mode", ["packed", "random"])
def test_ranks_share_the_rows_of_one_process(split, mode):
    alone = BatchLoader(split, 6, 7, seed=2, mode=mode)
    ranks = [BatchLoader(split, 2, 7, seed=2, mode=mode, rank=rank, world_size=3) for rank in range(3)]
    for _ in range(30):
        together = [next(loader).inputs for loader in ranks]
        assert torch.equal(torch.cat(together), next(alone).inputs)
    moved = BatchLoader(split, 3, 7, seed=2, mode=mode, rank=1, world_size=2)
    moved.load_state_dict(ranks[0].state_dict())
    assert torch.equal(next(moved).inputs, next(alone).inputs[3:])


def test_a_state_that_does_not_fit_is_refused(split, tmp_path):
    state = BatchLoader(split, 4, 7, seed=5).state_dict()
    other = make_split(tmp_path, [500])
    for loader, message in [
        (BatchLoader(other, 4, 7, seed=5), "state has split"),
        (BatchLoader(split, 4, 8, seed=5), "state has seq_len 7, this loader has 8"),
        (BatchLoader(split, 4, 7, seed=6), "state has seed 5, this loader has 6"),
        (BatchLoader(split, 4, 7, seed=5, mode="random"), "state has mode 'packed'"),
        (BatchLoader(split, 4, 7, seed=5, respect_documents=True), "state has respect_documents False"),
    ]:
        with pytest.raises(ValueError, match=message):
            loader.load_state_dict(state)
    with pytest.raises(ValueError, match="state is at row 4; expected a multiple of 8"):
        BatchLoader(split, 8, 7, seed=5).load_state_dict({**state, "rows": 4})


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    shards=st.integers(1, 3),
    batch_size=st.integers(1, 4),
    seq_len=st.integers(1, 12),
    mode=st.sampled_from(["packed", "random"]),
)
def test_document_boundaries_against_brute_force(tmp_path_factory, lengths, shards, batch_size, seq_len, mode):
    if sum(lengths) < seq_len + 1:
        return
    split = make_split(tmp_path_factory.mktemp("documents"), lengths, min(shards, len(lengths)))
    document_of = [number for number, length in enumerate(lengths) for _ in range(length)]
    loader = BatchLoader(split, batch_size, seq_len, seed=1, mode=mode, respect_documents=True)
    for batch in itertools.islice(loader, 4):
        segments, previous, position = [0], None, 0
        for row, column in itertools.product(range(batch_size), range(seq_len)):
            place = int(batch.inputs[row, column])  # the token is its place in the stream
            same = document_of[place] == document_of[place + 1]
            assert batch.targets[row, column] == (place + 1 if same else -100)
            starts = column == 0 or document_of[place] != previous
            position = 0 if starts else position + 1
            assert batch.position_ids[row, column] == position
            if starts and (row, column) != (0, 0):
                segments.append(row * seq_len + column)
            previous = document_of[place]
        assert batch.cu_seqlens.tolist() == [*segments, batch_size * seq_len]
        assert batch.cu_seqlens.dtype == torch.int32 and batch.position_ids.dtype == torch.int64


def test_evaluation_is_fixed_and_covers_the_split(split):
    n_windows = (len(split) - 1) // 7
    batches = list(eval_batches(split, 4, 7))
    assert [place for batch in batches for place in places(batch)] == [7 * n for n in range(n_windows)]
    assert all(equal(a, b) for a, b in zip(batches, eval_batches(split, 4, 7), strict=True))
    some = list(eval_batches(split, 4, 7, max_batches=3))
    offsets = [place for batch in some for place in places(batch)]
    assert len(some) == 3 and len(set(offsets)) == 12 and offsets == sorted(offsets)
    assert offsets[0] == 0 and offsets[-1] > 0.8 * len(split)
    assert len(list(eval_batches(split, 4, 7, max_batches=10**6))) == len(batches)
    masked = next(eval_batches(split, 4, 7, respect_documents=True))
    assert (masked.targets == -100).any() and masked.cu_seqlens[-1] == 28


def test_uint32_shards_and_llm_c_work_alike(tmp_path):
    wide = make_split(tmp_path, [50], vocab_size=100_000)
    assert wide.shards[0].tokens.dtype == np.uint32
    assert torch.equal(next(BatchLoader(wide, 2, 7)).targets, next(BatchLoader(wide, 2, 7)).inputs + 1)


def test_bad_arguments_are_refused(split, tmp_path):
    short = make_split(tmp_path, [3, 5])
    for make in (lambda: BatchLoader(short, 1, 8), lambda: eval_batches(short, 1, 8)):
        with pytest.raises(ValueError, match=r"has 8 tokens; expected at least seq_len \+ 1 = 9"):
            make()
    for options, message in [
        ({"mode": "sorted"}, "mode is 'sorted'; expected one of packed, random"),
        ({"rank": 2, "world_size": 2}, "rank is 2; expected 0 to world_size - 1"),
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"seq_len": 0}, "seq_len is 0; expected at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            BatchLoader(split, **{"batch_size": 1, "seq_len": 1, **options})
    with pytest.raises(ValueError, match="max_batches is 0"):
        eval_batches(split, 1, 1, max_batches=0)
