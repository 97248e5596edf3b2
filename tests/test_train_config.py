"""Schedules against their closed forms; configuration from Python, files and flags."""

import dataclasses
import json
import math
import re

import pytest
import tyro
from training import tiny_config, train

from llmfast.cli import main
from llmfast.cli import pretrain as cli
from llmfast.train import PretrainConfig, learning_rate
from llmfast.train.config import read_config_file


def nanogpt_lr(it, warmup, decay_iters, peak, floor):
    if it < warmup:
        return peak * (it + 1) / (warmup + 1)
    if it > decay_iters:
        return floor
    ratio = (it - warmup) / (decay_iters - warmup)
    return floor + 0.5 * (1 + math.cos(math.pi * ratio)) * (peak - floor)


@pytest.mark.parametrize("warmup", [0, 1, 100])
def test_cosine_is_nanogpts(warmup):
    for step in (0, 1, 50, 99, 100, 101, 1000, 1999, 2000, 2001, 5000):
        ours = learning_rate(step, peak=1e-3, floor=1e-4, warmup=warmup, total=2000)
        assert ours == pytest.approx(nanogpt_lr(step, warmup, 2000, 1e-3, 1e-4), rel=1e-12)


def test_wsd_is_stable_then_falls_on_a_line():
    def lr(step):
        options = dict(warmup=10, total=100, decay_fraction=0.25)
        return learning_rate(step, schedule="wsd", peak=2.0, floor=0.5, **options)

    assert lr(0) == pytest.approx(2 / 11)
    assert [lr(step) for step in (10, 40, 75)] == [2.0, 2.0, 2.0]
    assert lr(87) == pytest.approx(0.5 + 1.5 * 13 / 25)
    assert lr(99) == pytest.approx(0.5 + 1.5 / 25)
    assert lr(100) == lr(1000) == 0.5


def test_wsd_decay_does_not_reach_into_the_warmup():
    options = dict(schedule="wsd", peak=1.0, warmup=50, total=100, decay_fraction=1.0)
    assert learning_rate(50, **options) == 1.0
    assert learning_rate(75, **options) == 0.5


def test_constant():
    assert learning_rate(10**6, schedule="constant", peak=0.3, warmup=5, total=10) == 0.3
    assert learning_rate(0, schedule="constant", peak=0.3, warmup=5, total=10) == pytest.approx(0.05)


def test_unknown_schedule():
    with pytest.raises(ValueError, match="schedule: got 'linear', expected one of cosine, wsd, constant"):
        learning_rate(0, schedule="linear", peak=1.0, total=10)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"preset": "gpt5"}, "preset: got 'gpt5', expected one of gpt2"),
        ({"steps": 0}, "steps: got 0, expected a positive number"),
        ({"lr": -1.0}, "lr: got -1.0"),
        ({"lr": math.nan}, "lr: got nan"),
        ({"min_lr": 1.0}, "min_lr: got 1.0, expected a number from 0 to lr"),
        ({"beta2": 1.0}, "beta2: got 1.0"),
        ({"dtype": "float16"}, "dtype: got 'float16', expected one of auto, float32, bfloat16"),
        ({"warmup": 20, "steps": 10}, "warmup: got 20, expected less than the schedule's 10"),
        ({"threads": 100_000}, "threads: got 100000, expected 1 to 1024"),
        ({"heads": 5}, "heads: got 5, expected a divisor of width"),
        ({"kv_heads": 0}, "kv_heads: got 0, expected a positive number"),
        ({"head_dim": -2}, "head_dim: got -2, expected a positive number"),
        ({"ffn_width": 0}, "ffn_width: got 0, expected a positive number"),
        ({"window": 0}, "window: got 0, expected a positive number"),
        ({"norm_eps": -1.0}, "norm_eps: got -1.0, expected a number from 0"),
        ({"rotary_theta": math.nan}, "rotary_theta: got nan, expected a positive number"),
        ({"seed": 2**63}, "seed: got 9223372036854775808, expected a number of 64 bits"),
        ({"seq_len": 128, "context": 64}, "seq_len: got 128, expected at most context = 64"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PretrainConfig(**changes)


def test_tokens_become_steps_and_context_grows_with_seq_len():
    config = PretrainConfig(preset="gpt-nano", tokens=10_001, batch_size=5, grad_accumulation=2, seq_len=100)
    assert config.tokens_per_step == 1000 and config.total_steps == 11
    assert config.model_config(65).context == 100 and config.model_config(65).vocab_size == 65


def test_toml_file_with_tables(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('data = "x.txt"\nlr = 1\n[model]\nlayers = 3\nkv-heads = 2\n')
    assert read_config_file(path) == {"data": "x.txt", "lr": 1, "layers": 3, "kv_heads": 2}


def test_config_file_errors_name_file_and_value(tmp_path):
    path = tmp_path / "run.json"
    for content, message in [
        ('{"layer": 3}', "'layer', unknown; did you mean 'layers'"),
        ('{"layers": "three"}', "layers: got 'three', expected int or none"),
        ('{"bias": 1}', "bias: got 1, expected bool or none"),
        ('{"schedule": "linear"}', "schedule: got 'linear', expected 'cosine' or 'wsd' or 'constant'"),
        ("{", "is not valid JSON"),
        ("[1]", "holds a list"),
    ]:
        path.write_text(content)
        with pytest.raises(ValueError, match=re.escape(message)):
            read_config_file(path)
    with pytest.raises(ValueError, match=r"expected a \.toml or \.json file"):
        read_config_file(tmp_path / "run.yaml")


def parse(arguments):
    return tyro.cli(PretrainConfig, args=arguments, default=cli.defaults(arguments))


def test_flags_override_the_file(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"layers": 3, "lr": 0.5, "steps": 7, "warmup": 2}))
    config = parse(["--config", str(path), "--steps", "1000", "--bias", "False"])
    assert (config.layers, config.lr, config.steps, config.bias) == (3, 0.5, 1000, False)
    assert parse([f"--config={path}"]).steps == 7


def test_shakespeare_recipe_is_nanogpts(request):
    config = parse(["--config", str(request.config.rootpath / "configs" / "shakespeare_char.toml")])
    model = config.model_config(65)
    assert (model.layers, model.heads, model.width, model.context, model.bias) == (4, 4, 128, 64, False)
    assert (config.batch_size, config.total_steps, config.beta2, config.floor_lr) == (12, 2000, 0.99, 1e-4)
    assert model.parameters() - 64 * 128 == 795_904  # nanoGPT prints 0.80M, without positions


def test_resume_takes_the_runs_own_values(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, steps=2, warmup=1, schedule_steps=4)
    train(config)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    resumed = parse(["--resume", str(moved), "--steps", "4"])
    assert dataclasses.replace(resumed, resume=None, steps=2, out=config.out) == config
    assert train(resumed).step == 4
    assert parse(["--resume", "auto", "--out", str(moved)]).data == config.data
    assert parse(["--resume", "auto", "--out", "elsewhere"]).data == "stdlib"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        parse(["--resume", str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="out: got 'elsewhere', expected none, as resume continues the run in"):
        parse(["--resume", str(moved), "--out", "elsewhere"])
    monkeypatch.chdir(moved / "checkpoints")
    assert parse(["--resume", "step-000004", "--out", str(moved)]).data == config.data


def test_command_line_from_end_to_end(tmp_path, capsys):
    config = tiny_config(tmp_path, steps=2, warmup=0)
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("config", "steps")}
    (tmp_path / "run.json").write_text(json.dumps(values))
    arguments = ["pretrain", "--config", str(tmp_path / "run.json"), "--steps", "2"]
    assert main(arguments) == 0
    assert "step 2: validation loss" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "is not empty" in capsys.readouterr().err
