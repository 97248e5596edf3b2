"""Interrupted, killed and resumed runs against uninterrupted ones: equal bit for bit."""

import os
import resource
import signal

import pytest
import torch
from rich.console import Console
from training import assert_same_tensors, records, start_script, tensors, tiny_config, train

from llmfast.cli import pretrain as cli
from llmfast.data import ShardError
from llmfast.train import pretrain, read_metrics
from llmfast.train.interrupt import StopRequest


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "grad_accumulation": 2, "loader": "random", "activation_checkpointing": True},
        {"preset": "llama-nano", "respect_documents": True, "separator": "\f", "schedule": "wsd", "val_every": 4},
    ],
    ids=["float32", "bfloat16", "accumulated", "llama-documents"],
)
def test_twenty_steps_equal_ten_and_ten(tmp_path, changes):
    whole = train(tiny_config(tmp_path, out=str(tmp_path / "whole"), **changes))
    parts = tiny_config(tmp_path, schedule_steps=20, **changes)
    parts.steps = 10
    first = train(parts)
    torch.manual_seed(99)  # what the process did meanwhile does not matter
    parts.steps, parts.resume = 20, "auto"
    second = train(parts)
    assert (whole.step, first.step, second.step) == (20, 10, 20)
    assert_same_tensors(tensors(second), tensors(whole))
    last_of_first = [{**r} for r in records(whole.out_dir) if r["step"] == 10 and r["kind"] == "val"]
    ours = [r for r in records(second.out_dir) if last_of_first or (r["kind"], r["step"]) != ("val", 10)]
    assert ours == records(whole.out_dir)
    assert second.val_loss == whole.val_loss and second.train_loss == whole.train_loss
    times = [r["time"] for r in read_metrics(second.out_dir / "metrics.jsonl") if "time" in r]
    assert times == sorted(times)


def test_resuming_from_an_earlier_checkpoint_cuts_the_records(tmp_path):
    config = tiny_config(tmp_path, steps=15, keep=5)
    whole = train(config)
    before, weights = records(whole.out_dir), tensors(whole)
    config.resume = str(whole.out_dir / "checkpoints" / "step-000005")
    again = train(config)
    assert records(again.out_dir) == before
    assert_same_tensors(tensors(again), weights)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    config = tiny_config(tmp_path, steps=5)
    first = train(config)
    before = (first.out_dir / "metrics.jsonl").read_bytes()
    config.resume = "auto"
    again = train(config)
    assert again.step == 5 and again.val_loss == first.val_loss
    assert (first.out_dir / "metrics.jsonl").read_bytes() == before


def test_a_changed_bit_of_the_data_ends_resumption(tmp_path):
    config = tiny_config(tmp_path, steps=5)
    shard = next(train(config).out_dir.glob("dataset/train*.bin"))
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    config.steps, config.resume = 10, "auto"
    with pytest.raises(ShardError, match=f"{shard.name}: the contents do not match"):
        train(config)


def test_auto_starts_a_run_where_none_is(tmp_path):
    assert train(tiny_config(tmp_path, resume="auto", steps=5)).step == 5


SIGNALLED = """
import sys
from llmfast.cli.pretrain import main
from llmfast.train import PretrainConfig
sys.exit(main({config!r}))
"""


def test_interrupt_saves_and_the_rest_can_follow(tmp_path):
    config = tiny_config(tmp_path, steps=100_000, val_every=0, save_every=0)
    process = start_script(SIGNALLED.format(config=config), tmp_path)
    for line in process.stdout:
        if line.startswith("step "):
            process.send_signal(signal.SIGINT)
            break
    output = process.stdout.read()
    error = process.stderr.read()
    assert process.wait() == 130, error
    assert f"resume with: llmfast pretrain --resume {config.out}" in output
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    step = int(saved.name.removeprefix("step-"))
    assert [r["step"] for r in records(config.out, "train")] == list(range(1, step + 1))
    config.steps, config.schedule_steps, config.resume = step + 3, 100_000, config.out
    assert train(config).step == step + 3


def test_sigterm_saves_too(tmp_path, monkeypatch):
    def terminate(record):
        if record["step"] == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(cli, "pretrain", lambda config: train(config, callback=terminate))
    assert cli.main(tiny_config(tmp_path)) == 143
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-000003"]


KILLED = """
import os, signal
from llmfast.train import PretrainConfig, checkpoint, pretrain
write_json = checkpoint.write_json
def kill_in_the_middle(path, value):
    if path.parent.name == ".tmp-step-000015" and path.name == "checksums.json":
        os.kill(os.getpid(), signal.SIGKILL)
    write_json(path, value)
checkpoint.write_json = kill_in_the_middle
pretrain({config!r})
"""


def test_killed_while_saving(tmp_path):
    """The checkpoint of step 10 is what is left, with records up to step 15 and half a folder of step 15."""
    config = tiny_config(tmp_path)
    process = start_script(KILLED.format(config=config), tmp_path)
    output, error = process.communicate()
    assert process.returncode == -signal.SIGKILL, output + error
    checkpoints = tmp_path / "run" / "checkpoints"
    assert (checkpoints / ".tmp-step-000015").is_dir()
    assert (checkpoints / "latest").read_text().strip() == "step-000010"
    with open(tmp_path / "run" / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "train", "ste')  # killed in the middle of a line, too
    config.resume = "auto"
    resumed = train(config)
    whole = train(tiny_config(tmp_path, out=str(tmp_path / "whole")))
    assert_same_tensors(tensors(resumed), tensors(whole))
    assert records(resumed.out_dir) == records(whole.out_dir)
    assert not list(checkpoints.glob(".*"))


def test_interrupted_before_the_first_step(tmp_path, monkeypatch):
    """Ctrl-C while the peak is measured, and a kill while environment.json is written: both can be started again."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    config = tiny_config(tmp_path, steps=5)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("llmfast.train.run.measure_peak_flops", interrupt)
        pretrain(config, console=Console(quiet=True))
    with pytest.raises(FileExistsError, match="--resume auto"):
        train(config)
    config.resume = "auto"
    assert train(config).step == 5
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / ".environment.json.123.tmp").write_text("{")
    assert train(tiny_config(tmp_path, steps=5, out=str(killed))).step == 5
    assert not list(killed.glob("*.tmp"))


def test_full_disk_while_saving(tmp_path):
    """A limit on the size of files stands in for it: the step and the last good checkpoint are named, nothing is left
    of the half-written one, and the run goes on from the good one."""
    config = tiny_config(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(record):
        if record["step"] == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))

    try:
        with pytest.raises(OSError, match=r"step 10: .*step-000010 cannot be written .*last good .*step-000005"):
            train(config, callback=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("*step*")) == ["step-000005"]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    config.resume = "auto"
    assert train(config).step == 20


def test_second_signal_ends_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with SIGINT ignored
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)
