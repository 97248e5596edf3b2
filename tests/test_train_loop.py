"""The loop: accumulation, records, refusals, what stops it, and the kinds of data it takes."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from training import one_thread, records, tensors, tiny_config, train, write_text  # noqa: F401

from llmfast.data import Batch
from llmfast.models import GPT, GPTConfig
from llmfast.train import NonFiniteError, accumulate_gradients, measure_peak_flops, plot_losses, pretrain, read_metrics

SMALL = GPTConfig(vocab_size=40, context=16, layers=2, heads=2, width=32, bias=True)

FIELDS = {"kind", "step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "mfu", "time"}


def random_batches(count, B=2, T=16, ignored=False):
    generator = torch.Generator().manual_seed(3)
    for i in range(count):
        ids = torch.randint(0, 40, (B, T + 1), generator=generator)
        inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        if not ignored:
            yield Batch(inputs, targets)
            continue
        targets[:, : 8 * i] = -100  # all of the third batch's
        bounds = torch.arange(0, B * T + 1, T, dtype=torch.int32)
        yield Batch(inputs, targets, bounds, torch.arange(T).expand(B, T))


def reference_loss(p, ids, targets):
    """The mean loss of SMALL in plain torch, in the dtype of `p`."""
    B, T = ids.shape
    x = p["embedding.weight"][ids] + p["embedding.position_weight"][:T]

    def norm(x, name):
        return F.layer_norm(x, (32,), p[name + ".weight"], p[name + ".bias"], 1e-5)

    for i in range(2):
        b = f"blocks.{i}."
        qkv = F.linear(norm(x, b + "attention_norm"), p[b + "attention.qkv.weight"], p[b + "attention.qkv.bias"])
        q, k, v = (t.view(B, T, 2, 16).transpose(1, 2) for t in qkv.split(32, dim=-1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, 32)
        x = x + F.linear(out, p[b + "attention.out.weight"], p[b + "attention.out.bias"])
        hidden = F.linear(norm(x, b + "ffn_norm"), p[b + "ffn.up.weight"], p[b + "ffn.up.bias"])
        hidden = F.gelu(hidden, approximate="tanh")
        x = x + F.linear(hidden, p[b + "ffn.down.weight"], p[b + "ffn.down.bias"])
    logits = norm(x, "norm") @ p["embedding.weight"].T
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


@pytest.mark.parametrize("ignored", [False, True], ids=["all-targets", "uneven-targets"])
def test_accumulation_is_one_large_batch(ignored):
    """Against the gradient of the large batch in float64: no farther from it than float32 torch is, twice."""
    model = GPT(SMALL)
    batches = list(random_batches(3, ignored=ignored))
    loss = accumulate_gradients(model, iter(batches), 3)
    ids, targets = (torch.cat([getattr(b, name) for b in batches]) for name in ("inputs", "targets"))
    oracle = {}
    for dtype in (torch.float64, torch.float32):
        p = {name: value.detach().to(dtype).requires_grad_() for name, value in model.named_parameters()}
        value = reference_loss(p, ids, targets)
        value.backward()
        oracle[dtype] = (value.item(), {name: t.grad for name, t in p.items()})
    exact_loss, exact = oracle[torch.float64]
    assert loss == pytest.approx(exact_loss, abs=1e-5)
    for name, parameter in model.named_parameters():
        error = (parameter.grad.double() - exact[name]).abs().max()
        peer = (oracle[torch.float32][1][name].double() - exact[name]).abs().max()
        assert error <= 2 * peer + 1e-5, name


def test_accumulated_bfloat16_gradients_are_float32():
    model = GPT(SMALL).to(torch.bfloat16)
    for p in model.parameters():
        p.grad_dtype = torch.float32
    batches = list(random_batches(8))
    accumulate_gradients(model, iter(batches), 8)
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    summed = {name: p.grad.clone() for name, p in model.named_parameters()}
    for batch in batches:
        for p in model.parameters():
            p.grad = None
        accumulate_gradients(model, iter([batch]), 1)
        for name, p in model.named_parameters():
            total[name] += p.grad.double() / 8
    for name, value in summed.items():
        assert value.dtype == torch.float32
        # one rounding to bfloat16 a micro-batch (2^-9 of it), none of the sum
        assert (value.double() - total[name]).abs().max() <= 2**-7 * total[name].abs().max() + 1e-6, name


def test_accumulated_run_equals_large_batch_run(tmp_path):
    large = train(tiny_config(tmp_path, out=str(tmp_path / "large"), batch_size=8, steps=5))
    small = train(tiny_config(tmp_path, out=str(tmp_path / "small"), batch_size=2, grad_accumulation=4, steps=5))
    for ours, theirs in zip(records(small.out_dir, "train"), records(large.out_dir, "train")):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["tokens"] == theirs["tokens"]


def test_loss_falls_and_records_are_whole(tmp_path):
    seen = []
    config = tiny_config(tmp_path, steps=23, log_every=5, val_every=10, sample_every=20, sample_tokens=7)
    result = train(config, callback=seen.append)
    lines = (result.out_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == seen == list(read_metrics(result.out_dir / "metrics.jsonl"))
    by_kind = {kind: [r for r in seen if r["kind"] == kind] for kind in ("train", "val", "sample")}
    assert [r["step"] for r in by_kind["train"]] == [5, 10, 15, 20, 23]
    assert [r["step"] for r in by_kind["val"]] == [0, 10, 20, 23]
    assert [r["step"] for r in by_kind["sample"]] == [20, 23]
    for record in by_kind["train"]:
        assert record.keys() == FIELDS
        assert record["tokens"] == record["step"] * 4 * 32 and record["mfu"] > 0
    first, *_, last = by_kind["val"]
    assert first["loss"] == pytest.approx(math.log(result.model.config.vocab_size), abs=0.3)
    assert last["loss"] < first["loss"] - 0.3
    # one byte a character and a token
    assert last["bits_per_byte"] == pytest.approx(last["loss"] / math.log(2))
    assert (result.val_loss, result.bits_per_byte) == (last["loss"], last["bits_per_byte"])
    assert all(len(r["text"]) == 8 for r in by_kind["sample"])
    assert plot_losses(result.out_dir) == f"loss plot: {result.out_dir / 'loss.png'}"
    assert (result.out_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((result.out_dir / "config.json").read_text())
    assert (written["steps"], written["dtype"]) == (23, "float32")
    assert json.loads((result.out_dir / "environment.json").read_text())["llmfast"]


def test_refuses_a_folder_that_is_not_empty(tmp_path):
    config = tiny_config(tmp_path, steps=2, warmup=0)
    train(config)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(FileExistsError, match=r"out: .* is not empty .*--resume auto.*--out"):
        train(config)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("")
    for resume in (None, "auto"):
        config.out, config.resume = str(foreign), resume
        with pytest.raises(FileExistsError, match=r"it holds thesis\.tex"):
            train(config)
    assert [p.name for p in foreign.iterdir()] == ["thesis.tex"]


def test_one_process_a_folder(tmp_path):
    config = tiny_config(tmp_path, steps=2, warmup=0)

    def start_another(record):
        with pytest.raises(BlockingIOError, match="another process is training in"):
            train(tiny_config(tmp_path, resume="auto"))

    train(config, callback=start_another)


def test_exploding_loss_stops_with_step_and_checkpoint(tmp_path):
    config = tiny_config(tmp_path, lr=1e30, clip=0.0, warmup=0, schedule="constant", save_every=1, val_every=0)
    with pytest.raises(NonFiniteError, match=r"step 2: the loss is .*last good checkpoint is .*step-000001"):
        train(config)
    assert all(value.isfinite().all() for value in tensors(tmp_path / "run" / "checkpoints" / "step-000001").values())
    assert [r["step"] for r in records(config.out)] == [1]


@pytest.mark.parametrize(
    "val_every, message", [(0, "step 1: the loss is nan"), (5, "step 0: the validation loss is nan")]
)
def test_non_finite_parameter_stops_before_the_first_step(tmp_path, monkeypatch, val_every, message):
    reset = GPT.reset_parameters

    def poisoned(self):
        reset(self)
        with torch.no_grad():
            self.blocks[0].ffn.up.weight[3, 4] = math.inf

    monkeypatch.setattr(GPT, "reset_parameters", poisoned)
    with pytest.raises(NonFiniteError, match=f"{message}; .*there is no checkpoint yet"):
        train(tiny_config(tmp_path, val_every=val_every))


def test_exit_code_of_a_non_finite_run(tmp_path, capsys):
    from llmfast.cli.pretrain import main

    assert main(tiny_config(tmp_path, lr=1e30, clip=0.0, warmup=0, schedule="constant", val_every=0)) == 1
    assert "llmfast pretrain: step 2: the loss is" in capsys.readouterr().err


def test_plain_lines_without_a_terminal(tmp_path):
    import io

    out = io.StringIO()
    pretrain(tiny_config(tmp_path, steps=5), console=Console(file=out, width=80))
    text = out.getvalue()
    assert "step 1/5  loss " in text and "step 5/5  loss " in text and "MFU" in text and "ETA 0:00" in text
    assert "step 5: validation loss" in text and "bits per byte" in text
    assert "\x1b" not in text


def test_bar_on_a_terminal(tmp_path):
    import io

    out = io.StringIO()
    pretrain(tiny_config(tmp_path, steps=5), console=Console(file=out, width=200, force_terminal=True))
    assert "training" in out.getvalue() and "5/5" in out.getvalue()


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(tiny_config(tmp_path, steps=4, tensorboard=True))
    board = EventAccumulator(str(result.out_dir / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4]
    assert "val/bits_per_byte" in board.Tags()["scalars"]


def test_plot_never_fails(tmp_path, monkeypatch):
    assert plot_losses(tmp_path).startswith("no loss plot: ")  # nothing there
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert "matplotlib is not installed" in plot_losses(tmp_path)


def test_broken_metrics_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a metrics record"):
        list(read_metrics(tmp_path / "metrics.jsonl"))


def test_documents_are_respected(tmp_path):
    write_text(tmp_path, documents=40)
    options = dict(separator="\f", steps=10, val_every=5, schedule_steps=50)
    apart = train(tiny_config(tmp_path, out=str(tmp_path / "apart"), respect_documents=True, **options))
    joined = train(tiny_config(tmp_path, out=str(tmp_path / "joined"), **options))
    assert apart.val_loss != joined.val_loss
    assert apart.val_loss == pytest.approx(joined.val_loss, abs=0.3)


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_tokenizers_and_prepared_data(tmp_path, tokenizer):
    options = dict(steps=3, tokenizer=tokenizer, vocab_size=300 if tokenizer == "bpe" else None, warmup=0)
    first = train(tiny_config(tmp_path, out=str(tmp_path / "a"), dataset_dir=str(tmp_path / "data"), **options))
    assert not (first.out_dir / "dataset").exists()
    again = train(tiny_config(tmp_path, out=str(tmp_path / "b"), dataset_dir=str(tmp_path / "data"), **options))
    prepared = train(tiny_config(tmp_path, out=str(tmp_path / "c"), data=str(tmp_path / "data"), steps=3, warmup=0))
    assert first.val_loss == again.val_loss == prepared.val_loss
    saved = train(
        tiny_config(
            tmp_path, out=str(tmp_path / "d"), steps=3, warmup=0, tokenizer=str(tmp_path / "data" / "tokenizer")
        )
    )
    assert saved.val_loss == first.val_loss
    with pytest.raises(FileExistsError, match="different dataset"):
        train(tiny_config(tmp_path, out=str(tmp_path / "e"), dataset_dir=str(tmp_path / "data"), tokenizer="char"))


def test_llm_c_shards(tmp_path):
    generator = np.random.default_rng(0)
    for name in ("train", "val"):
        tokens = generator.integers(0, 50, 2000, dtype=np.uint16)
        header = np.zeros(256, np.int32)
        header[:3] = 20240520, 1, tokens.size
        (tmp_path / f"{name}_0.bin").write_bytes(header.tobytes() + tokens.tobytes())
    shards = dict(data=str(tmp_path / "train_*.bin"), val_data=str(tmp_path / "val_0.bin"), steps=2, warmup=0)
    result = train(tiny_config(tmp_path, out=str(tmp_path / "a"), **shards, width=16))
    assert result.model.config.vocab_size == 50257 and result.tokenizer is None
    assert result.val_loss is not None and result.bits_per_byte is None
    small = train(tiny_config(tmp_path, out=str(tmp_path / "b"), tokenizer="byte", vocab_size=50, **shards))
    assert small.model.config.vocab_size == 50


def test_unknown_character_in_the_prompt_is_found_at_once(tmp_path):
    with pytest.raises(ValueError, match="character '7'"):
        train(tiny_config(tmp_path, sample_every=10, sample_prompt="7"))
    train(tiny_config(tmp_path, steps=2, warmup=0))  # nothing is left that would be in the way


def test_without_validation(tmp_path):
    result = train(tiny_config(tmp_path, steps=3, warmup=0, val_fraction=0.0))
    assert result.val_loss is None and result.checkpoint.is_dir()


def test_peak_is_measured_and_finite():
    peaks = {dtype: measure_peak_flops(dtype, seconds=0.1) for dtype in (torch.float32, torch.bfloat16)}
    assert all(1e8 < peak < 1e16 for peak in peaks.values())
