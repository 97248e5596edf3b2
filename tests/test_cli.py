"""The command ``llmfast`` from outside: each subcommand in a process of its own, in a temporary folder."""

import html.parser
import io
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmfast import backend, cli
from llmfast.cli import demo_report
from llmfast.cli.demo_peer import PlainGPT, compare_steps
from llmfast.models import GPT, GPTConfig

TEXT = "".join(f"line {i}: the quick brown fox jumps over the lazy dog, {i * i} times\n" for i in range(400))
# One thread: models this small only get slower with more, above all where tests share a processor.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", "PYTHONUTF8": "1"}


def start(*arguments: str, cwd: Path, **options) -> subprocess.Popen:
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    command = [sys.executable, "-m", "llmfast", *arguments]
    return subprocess.Popen(command, cwd=cwd, env={**ENVIRONMENT, **pipes.pop("env", {})}, text=True, **pipes)


def llmfast(*arguments: str, cwd: Path, text: str | None = None, **options) -> subprocess.CompletedProcess:
    process = start(*arguments, cwd=cwd, **({"stdin": subprocess.PIPE} if text is not None else {}), **options)
    out, err = process.communicate(text, timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A folder with a byte-level model trained for a few steps in ``run``."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "input.txt").write_text(TEXT)
    flags = "--data input.txt --tokenizer byte --preset gpt-nano --layers 1 --heads 2 --width 32 --context 48 --out run"
    done = llmfast("pretrain", *flags.split(), "--steps", "6", "--warmup", "1", "--batch-size", "2", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "validation loss" in done.stdout
    return folder


@pytest.fixture
def here(run, monkeypatch, capfd):
    """Runs the command in this process, in the folder of `run`; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(run)
    monkeypatch.delenv("LLMFAST_DEBUG", raising=False)

    def call(*arguments: str, text: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        try:
            code = cli.main(arguments)
        except SystemExit as exit:  # how tyro refuses flags
            code = exit.code
        return code, *capfd.readouterr()

    return call


def test_help_names_every_command_and_imports_none(capsys):
    modules = {command.module for command in cli.COMMANDS.values()}
    before = modules & sys.modules.keys()
    assert cli.main(["--help"]) == 0
    assert cli.main([]) == 2
    assert cli.main(["--version"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)
    assert modules & sys.modules.keys() == before
    assert re.search(r"^llmfast \d+\.\d+", out, re.MULTILINE)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_each_command(command, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([command, "--help"])
    assert exit.value.code == 0
    assert f"usage: llmfast {command}" in capsys.readouterr().out


def test_info_as_json_and_as_tables(tmp_path, capsys):
    assert cli.main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["isa"] in {*backend.ISAS, *(f"{isa} (emulated)" for isa in backend.ISAS)}
    for op, rows in info["dispatch"].items():
        for dtype, chosen in info["implementations"][op].items():
            best = next((row["isa"] for row in rows if row["available"] and dtype in row["dtypes"]), None)
            assert best == chosen
        assert all(row["why_not"] for row in rows if not row["available"])

    done = llmfast("info", cwd=tmp_path, env={"LLMFAST_CPU_ISA": "ref"})
    assert done.returncode == 0, done.stderr
    assert "LLMFAST_CPU_ISA=ref" in done.stdout
    assert "linear_backward" in done.stdout
    if info["isa_detected"] != "ref":
        assert f"not {info['isa_detected']}: " in done.stdout


def test_generate_streams_the_same_text_for_the_same_seed(here):
    arguments = ("generate", "run", "--prompt", "line 7", "--seed", "3", "--max-new-tokens", "20")
    code, text, errors = here(*arguments)
    assert (code, errors) == (0, "")
    assert text.startswith("line 7") and len(text) > len("line 7\n")
    assert here(*arguments)[1] == text
    assert here(*arguments, "--no-echo")[1] == text.removeprefix("line 7")
    assert here(*arguments[:2], "--prompt", "-", *arguments[4:], text="line 7\n")[1] == text


def test_the_smallest_temperature_takes_the_likeliest(here):
    arguments = ("generate", "run", "--prompt", "line 7", "--max-new-tokens", "20", "--temperature")
    assert here(*arguments, "1e-300") == here(*arguments, "0")


def test_generate_reads_a_pipe(run):
    done = llmfast("generate", "run", "--prompt", "-", "--temperature", "0", cwd=run, text="line 7\n")
    assert done.returncode == 0 and done.stdout.startswith("line 7") and not done.stderr, done.stderr


def test_generate_computes_several_prompts_and_samples_as_a_batch(run, here):
    checkpoint = next((run / "run" / "checkpoints").glob("step-*"))
    flags = "--num-samples 2 --seed 1 --max-new-tokens 10 --top-k 5 --stop e --no-echo"
    code, out, errors = here("generate", str(checkpoint), "--prompt", "the", "--prompt", "line 12", *flags.split())
    assert (code, errors) == (0, "")
    headings = re.findall(r"^--- (.*)$", out, re.MULTILINE)
    assert headings == [f"prompt {p}, sample {s}" for p in (1, 2) for s in (1, 2)]
    assert "e" not in re.sub(r"^---.*$", "", out, flags=re.MULTILINE)


BAD = [
    (["nonsense"], "unknown command 'nonsense'"),
    (["generate", "nowhere"], "'nowhere', expected the folder of a run or of a checkpoint, of a Hugging Face model"),
    (["generate", "run", "--threads", "100000"], "threads: got 100000, expected 1 to 1024"),
    (["generate", "run", "--temperature", "-1"], "temperature: got -1.0"),
    (["generate", "run", "--max-new-tokens", "100"], "only 48 fit"),
    (["generate", "run", "--stop", ""], "stop_strings"),
    (["generate", "run", "--num-samples", "1000000000"], "num_samples: got 1000000000, and the keys and values of"),
    (["generate", "run", "--repetition-penalty", "1e-300"], "repetition_penalty: got 1e-300"),
    (["pretrain", "--layers", "1000000000"], "layers: got a model of 1,"),
    (["pretrain", "--width", "6" + "0" * 18], "width: got a model of"),
    (["pretrain", "--batch-size", "1000000000"], "batch_size: got 1000000000, and a step over that many sequences of"),
    (["pretrain", "--batch-size", "1", "--grad-accumulation", "1000000000"], "grad_accumulation: got 1000000000"),
    (
        ["bench", "model", "--preset", "gpt-nano", "--batch", "1000000000"],
        "batch: got 1000000000, and a step of gpt-nano",
    ),
    (["bench", "model", "--preset", "gpt-nano", "--batch", "0"], "batch: got 0, expected a positive number"),
    (["bench", "model", "--preset", "gpt-nano", "--sequence", "-1"], "sequence: got -1, expected a positive number"),
    (["bench", "--timeout", "nan"], "timeout: got nan"),
    (["bench", "--json", "."], "json: got the folder"),
    (["bench", "--plot", "input.txt"], "plot: got the file"),
    (["demo", "--seed", "9223372036854775808"], "seed: got 9223372036854775808"),
    (["generate", "run", "--sead", "1"], "--sead"),
    (["demo", "--minutes", "0"], "minutes: got 0"),
    (["demo", "--out", "run"], "'run' exists and is not an empty folder"),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=lambda value: str(value)[:40])
def test_bad_input_gives_one_clear_message_and_code_2(here, arguments, message):
    code, out, err = here(*arguments)
    assert code == 2 and not out
    assert message in err and "Traceback" not in err
    if err.startswith("llmfast: error: "):
        assert err.count("\n") == 1


def test_debug_shows_the_traceback(run, monkeypatch):
    monkeypatch.setenv("LLMFAST_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        cli.main(["generate", str(run / "nowhere")])


def test_faults_of_ours_keep_their_traceback(monkeypatch, capfd):
    from llmfast.cli import info

    class Broken(Exception):
        pass

    def broken(config):
        raise Broken

    monkeypatch.setattr(info, "main", broken)
    with pytest.raises(Broken):
        cli.main(["info"])
    Broken.__module__ = "llmfast.train.pretrain"  # what llmfast defines is for people
    assert cli.main(["info"]) == 2
    assert capfd.readouterr().err == "llmfast: error: Broken\n"


def test_closed_pipe_ends_quietly(run):
    process = start("generate", "run", "--seed", "0", "--num-samples", "40", cwd=run)
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 141
    assert error == ""


def test_interrupt_ends_quietly(monkeypatch, capfd):
    from llmfast.cli import info

    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "main", interrupted)
    assert cli.main(["info"]) == 130
    assert capfd.readouterr() == ("", "")


# The demo's parts, then the whole.


def tiny(**changes) -> GPTConfig:
    base = GPTConfig(vocab_size=97, context=24, layers=2, heads=2, width=32, bias=False)
    return base.replace(**changes)


@pytest.mark.parametrize("bias", [False, True])
def test_the_peer_is_the_same_network(bias):
    model = GPT(tiny(bias=bias))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ids = torch.randint(97, (3, 25))
    plain = PlainGPT.like(model)
    assert sum(p.numel() for p in plain.parameters()) == model.config.parameters()
    ours, peer = model(ids[:, :-1], ids[:, 1:]), plain(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(ours, peer, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_comparison_checks_that_both_sides_train_alike(dtype):
    ids = torch.randint(97, (2, 25))
    comparison = compare_steps(tiny(), dtype, ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), rounds=3)
    assert comparison.losses_agree
    assert comparison.losses["llmfast"][1] < comparison.losses["llmfast"][0]
    assert all(len(seconds) == 3 for seconds in comparison.seconds.values())
    for row in demo_report.comparison_rows(comparison):
        assert len(row) == 6
    comparison.losses["PyTorch"][1] += 0.5
    assert "DIFFER" in demo_report.comparison_note(comparison)


@pytest.mark.parametrize(
    "train, validation",
    [
        ([(i, 9 * 0.99**i) for i in range(1, 300)], [(0, 9.0), (299, 0.5)]),
        ([(1, 3.0)], []),
        ([], [(0, 2.0)]),
        ([(1, 2.0), (2, 2.0)], [(0, 2.0)]),
    ],
)
def test_loss_curve_is_an_image_whose_points_lie_inside(train, validation):
    root = xml.etree.ElementTree.fromstring(demo_report.loss_curve(train, validation, 1024))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    numbers = [point.split(",") for line in root.iter() for point in line.get("points", "").split()]
    assert len(numbers) == 2 * len(train) + len(validation)
    assert all(0 <= float(x) <= demo_report.WIDTH and 0 <= float(y) <= demo_report.HEIGHT for x, y in numbers)


@given(st.floats(-1e3, 1e3), st.just(0.0) | st.floats(1e-6, 1e6))
def test_ticks_cover_the_range_with_few_round_numbers(low, span):
    ticks = demo_report._ticks(low, low + span)
    assert 2 <= len(ticks) <= 11
    slack = 1e-9 * max(1.0, abs(low), span)
    assert ticks[0] <= low + slack and ticks[-1] >= low + span - slack


class _Page(html.parser.HTMLParser):
    """Collects a page's text, and whatever would make a browser fetch something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.references = "", []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_demo_end_to_end(tmp_path, monkeypatch, capsys):
    (tmp_path / "llmfast-demo").mkdir()
    (tmp_path / "llmfast-demo" / "precious").touch()
    done = llmfast("demo", "--minutes", "0.1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "llmfast-demo-2"  # nothing is written where something is
    assert os.listdir(tmp_path / "llmfast-demo") == ["precious"]
    assert {"report.html", "metrics.jsonl", "loss.svg", "checkpoints"} <= set(os.listdir(out))
    assert str(out / "report.html") in done.stdout
    assert "times the speed of eager PyTorch" in done.stdout

    page = _Page((out / "report.html").read_text())
    assert page.references == []
    assert "DIFFER" not in page.text
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "val"]
    assert losses[-1] < losses[0]
    assert f"{losses[-1]:.2f} after" in page.text

    command = re.search(r"llmfast (generate .*) --prompt", done.stdout)[1].split()
    monkeypatch.chdir(tmp_path)
    assert cli.main([*command, "--prompt", "def main(", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("def main(")
