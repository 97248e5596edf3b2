"""Checkpoints: what they hold, what is kept, and which are refused."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from training import tensors, tiny_config, train, write_text

from llmfast.train import CheckpointError, load_model


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of ten steps with checkpoints at 5 and 10; tests copy it."""
    folder = tmp_path_factory.mktemp("finished")
    config = tiny_config(folder, steps=10, schedule_steps=20)
    train(config)
    return config


@pytest.fixture
def run(finished, tmp_path):
    """A configuration that resumes a copy of the finished run for ten more steps."""
    shutil.copytree(finished.out, tmp_path / "run")
    shutil.copy(finished.data, tmp_path / "input.txt")
    return tiny_config(tmp_path, schedule_steps=20, resume="auto")


def latest(config):
    from pathlib import Path

    return Path(config.out) / "checkpoints" / "step-000010"


FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "config.json", "llmfast_tokenizer.json"]


@pytest.mark.parametrize("name", [*FILES, "checksums.json"])
def test_flipped_byte(run, name):
    path = latest(run) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="corrupt") as error:
        train(run)
    assert str(latest(run)) in str(error.value)
    assert "step-000005" in str(error.value)  # what can be used instead


def test_truncated_file(run):
    path = latest(run) / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"model.safetensors: {size - 1:,} bytes, expected {size:,}"):
        train(run)


@pytest.mark.parametrize("name", [*FILES, "checksums.json"])
def test_missing_file(run, name):
    (latest(run) / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: missing"):
        train(run)


def test_pointer_to_nothing(run):
    shutil.rmtree(latest(run))
    with pytest.raises(CheckpointError, match="latest: names 'step-000010', which is not there"):
        train(run)
    (latest(run).parent / "latest").write_bytes(b"\xff\x00garbage")
    with pytest.raises(CheckpointError, match="not there"):
        train(run)
    (latest(run).parent / "latest").unlink()  # as after a kill between first checkpoint and pointer
    assert train(run).step == 20


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lr": 1e-2}, "lr: the checkpoint has 0.003, this run has 0.01"),
        ({"layers": 3}, "layers: the checkpoint has 2, this run has 3"),
        ({"batch_size": 2}, "batch_size: the checkpoint has 4, this run has 2"),
        ({"seed": 1}, "seed: the checkpoint has 1337, this run has 1"),
        ({"dtype": "bfloat16"}, "dtype: the checkpoint has 'float32', this run has 'bfloat16'"),
        ({"schedule_steps": None}, None),
        ({"schedule_steps": 30}, "to train longer on the same schedule: --schedule-steps 20"),
    ],
)
def test_other_configuration(run, changes, message):
    for name, value in changes.items():
        setattr(run, name, value)
    if message is None:  # the last step is the schedule's end anyway
        assert train(run).step == 20
        return
    with pytest.raises(CheckpointError) as error:
        train(run)
    assert message in str(error.value)


def test_other_text(run, tmp_path):
    shutil.rmtree(tmp_path / "run" / "dataset")
    write_text(tmp_path, documents=3)
    with pytest.raises(CheckpointError, match=r"train_data: the checkpoint has .*\n.*val_data: .*\n.*tokenizer"):
        train(run)


def test_other_words_for_the_text_are_compared_with_it(run, tmp_path):
    """--data, --tokenizer and --val-fraction of a resumption were passed over: it went on with the run's own text."""
    other = tmp_path / "other.txt"
    other.write_text((tmp_path / "input.txt").read_text() + "more")
    for name, value, message in (
        ("data", str(other), "its corpus .* has other content"),
        ("tokenizer", "byte", "its tokenizer is another one"),
        ("val_fraction", 0.2, "its val_fraction is 0.1, not 0.2"),
    ):
        with pytest.raises(FileExistsError, match=rf"holds a different dataset: {message}"):
            train(dataclasses.replace(run, **{name: value}))
    moved = shutil.move(tmp_path / "input.txt", tmp_path / "moved.txt")
    assert train(dataclasses.replace(run, data=str(moved))).step == 20


def test_text_that_is_gone_does_not_matter(run, tmp_path):
    (tmp_path / "input.txt").unlink()
    assert train(run).step == 20


def test_other_tensors(run):
    """Files that are whole but do not fit the model they are said to be of."""
    from safetensors.torch import save_file

    from llmfast.train.checkpoint import _digest

    path = latest(run) / "model.safetensors"
    weights = load_file(path)
    weights["norm.weight"] = torch.ones(7)
    save_file(weights, path)
    sums = json.loads((latest(run) / "checksums.json").read_bytes())
    sums["model.safetensors"] = _digest(path)
    (latest(run) / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(CheckpointError, match=r"norm.weight has shape \(7,\), expected \(32,\)"):
        train(run)


def test_not_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"resume: got .*expected the folder of a run or of a checkpoint"):
        train(tiny_config(tmp_path, resume=str(tmp_path)))


def test_keeps_the_last_and_the_best(tmp_path):
    # at this rate the model gets worse after a while, so the best is not among the last
    config = tiny_config(tmp_path, steps=30, val_every=3, keep=2, lr=0.3, warmup=0, schedule="constant", clip=0.0)
    result = train(config)
    from llmfast.train import read_metrics

    losses = {r["step"]: r["loss"] for r in read_metrics(result.out_dir / "metrics.jsonl", "val") if r["step"]}
    best = min(losses, key=losses.get)
    folder = result.out_dir / "checkpoints"
    assert (folder / "best").read_text().strip() == f"step-{best:06d}"
    assert {p.name for p in folder.glob("step-*")} == {f"step-{s:06d}" for s in (best, 27, 30)}
    assert (folder / "latest").read_text().strip() == "step-000030"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_model(tmp_path, dtype):
    result = train(tiny_config(tmp_path, steps=5, dtype=dtype))
    model, tokenizer = load_model(result.out_dir)
    assert tokenizer.fingerprint == result.tokenizer.fingerprint
    for (name, ours), theirs in zip(model.named_parameters(), result.model.parameters()):
        assert ours.dtype == getattr(torch, dtype) and torch.equal(ours, theirs), name
    masters = tensors(result)
    assert all(value.dtype == torch.float32 for value in masters.values())
    assert torch.equal(load_model(result.checkpoint, torch.float32)[0].norm.weight, masters["norm.weight"])
    if dtype == "bfloat16":  # the master copies are finer than the weights
        assert not torch.equal(masters["embedding.weight"], model.embedding.weight.float())
