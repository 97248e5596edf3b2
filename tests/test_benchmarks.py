"""The benchmark suite: it checks before it times, times in turns, and reports what it measured.

One file above 500 lines: harness, cases, tables and report are tried on the same few made-up rows.
"""

import json
import math
import platform
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from llmfast import backend
from llmfast.bench import cases, harness, plots, report, rows, scale, steps, tables
from llmfast.bench.harness import Budget, Case, Contest, Provider
from llmfast.bench.limits import Limits
from llmfast.bench.peers import Function
from llmfast.cli.bench import BenchConfig, main

README = Path(__file__).resolve().parents[1] / "README.md"
BRIEFLY = Budget(seconds=1.0, rounds=(3, 3))
LIMITS = Limits({"float32": 1e9}, {2**20: 1e9, 2**24: 1e8}, 1e9)


def contest_of(providers: dict, baseline: str = "torch") -> Case:
    truth = torch.arange(10, dtype=torch.float64)
    return Case(
        "toy", "forward", torch.float32, {"N": 10}, 100, 80, lambda: Contest(lambda: (truth,), baseline, providers)
    )


class Clock:
    """Stands still but for what providers add to it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(harness, "perf_counter", clock)
    return clock


@pytest.fixture
def one_thread():
    """For work too small to share: on a busy machine threads wait for each other at every step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Counting:
    """Returns a fixed result, notes each call in a list that providers share, and takes `seconds` by the clock."""

    def __init__(self, name: str, calls: list, offset: float = 0.0, seconds: float = 0.01) -> None:
        self.name, self.calls, self.offset, self.seconds = name, calls, offset, seconds

    def __call__(self):
        self.calls.append(self.name)
        harness.perf_counter.now += self.seconds
        return (torch.arange(10, dtype=torch.float32) + self.offset,)


def test_wrong_provider_is_reported_and_not_timed():
    calls: list[str] = []
    providers = {
        "llmfast": Provider(Counting("llmfast", calls, offset=1e-3), ours=True),
        "torch": Provider(Counting("torch", calls)),
        "other": Provider(Counting("other", calls)),
    }
    row = harness.measure(contest_of(providers), LIMITS, BRIEFLY)
    wrong = row["providers"]["llmfast"]
    assert wrong["status"] == "wrong" and "median_ms" not in wrong
    assert wrong["error"] == pytest.approx(1e-3, rel=1e-3)
    assert calls.count("llmfast") == 1, "a wrong provider is called once, to be checked"
    assert row["providers"]["other"]["samples"] == 3
    assert row["best"] == {"llmfast": None, "peer": row["best"]["peer"], "ratio": None}
    assert tables.problems([row]) == ["toy forward float32 N=10, llmfast: wrong"]


@pytest.mark.parametrize("result", [torch.full((10,), math.nan), torch.zeros(9)], ids=["nan", "shape"])
def test_nan_and_shape_are_wrong(result):
    providers = {"torch": Provider(Counting("torch", [])), "llmfast": Provider(lambda: (result,), ours=True)}
    entry = harness.measure(contest_of(providers), None, BRIEFLY)["providers"]["llmfast"]
    assert entry["status"] == "wrong" and entry["error"] is None


def test_error_rule_is_relative_to_the_baseline():
    def entry(offset, slack=2.0):
        providers = {
            "torch": Provider(Counting("torch", [], offset=1e-2)),
            "llmfast": Provider(Counting("llmfast", [], offset=offset), slack=slack, ours=True),
        }
        return harness.measure(contest_of(providers), None, Budget(timed=False))["providers"]["llmfast"]["status"]

    assert [entry(0.019), entry(0.021), entry(0.021, slack=3.0)] == ["ok", "wrong", "ok"]


def test_failing_and_missing_providers_are_listed():
    def fail():
        raise RuntimeError("no such thing\nand more")

    providers = {
        "torch": Provider(Counting("torch", [])),
        "llmfast": Provider(Counting("llmfast", []), ours=True),
        "broken": Provider(fail),
        "absent": "not installed",
    }
    found = harness.measure(contest_of(providers), None, BRIEFLY)["providers"]
    assert list(found) == list(providers)
    assert found["broken"]["status"] == "error" and found["broken"]["note"] == "RuntimeError: no such thing"
    assert found["absent"] == {"status": "not run", "note": "not installed", "ours": False}
    assert found["llmfast"]["fell_back"] == "no native kernel was called"


def test_interleaving():
    assert harness.schedule({"a": 2, "b": 2}) == ["a", "b", "b", "a"]
    order = harness.schedule({"a": 30, "b": 3, "c": 30})
    assert [order.count(name) for name in "abc"] == [30, 3, 30]
    where = [i for i, name in enumerate(order) if name == "b"]
    assert where[0] > len(order) / 5 and min(b - a for a, b in pairwise(where)) > len(order) / 5
    assert all(abs(order[:i].count("a") - order[:i].count("c")) <= 1 for i in range(len(order)))
    assert harness.schedule({}) == []


def test_timed_calls_take_turns_after_warming_up():
    calls: list[str] = []
    providers = {
        "llmfast": Provider(Counting("llmfast", calls, seconds=0.02), ours=True),
        "torch": Provider(Counting("torch", calls, seconds=0.03)),
    }
    row = harness.measure(contest_of(providers), LIMITS, BRIEFLY)
    timed = calls[-6:]
    assert timed == ["llmfast", "torch", "torch", "llmfast", "llmfast", "torch"]
    assert all(calls[:-6].count(name) >= 2 for name in providers), "two calls at least before any that counts"
    ours = row["providers"]["llmfast"]
    assert ours["median_ms"] == pytest.approx(20) and ours["iqr_ms"] == pytest.approx(0, abs=1e-6)
    assert row["best"]["ratio"] == pytest.approx(1.5)


def test_slow_provider_is_called_once():
    calls: list[str] = []
    providers = {
        "torch": Provider(Counting("torch", calls, seconds=5.0)),
        "llmfast": Provider(Counting("llmfast", calls), ours=True),
        "late": Provider(Counting("late", calls)),
    }
    budget = Budget(slow=4.0, case=4.0)
    found = harness.measure(contest_of(providers), None, budget)["providers"]
    assert found["torch"]["samples"] == 1 and found["torch"]["note"] == "one call, not warmed up"
    assert calls.count("torch") == 1
    assert found["late"]["status"] == "not run" and "used up" in found["late"]["note"]


def test_ratio_spread_and_share():
    assert harness.summary([0.001, 0.002, 0.003, 0.004, 0.1]) == {"median_ms": 3.0, "iqr_ms": 2.0, "samples": 5}
    providers = {
        "llmfast": {"ours": True, "median_ms": 4.0},
        "llmfast ref": {"ours": True, "median_ms": 40.0},
        "torch": {"ours": False, "median_ms": 12.0},
        "slower": {"ours": False, "median_ms": 13.0},
        "absent": {"ours": False},
    }
    assert harness.compare(providers) == {"llmfast": "llmfast", "peer": "torch", "ratio": 3.0}
    assert harness.compare({"absent": {"ours": False}})["ratio"] is None
    assert LIMITS.least_seconds("float32", 2e9, 100) == (2.0, "compute")
    assert LIMITS.least_seconds("float32", 1.0, 2**20) == (2**20 / 1e9, "memory")
    assert LIMITS.least_seconds("float32", 1.0, 2**25) == (2**25 / 1e8, "memory"), "at the large copy's speed"


def test_function_directions_agree_with_autograd():
    inputs = {"x": torch.randn(3, 4), "weight": torch.randn(5, 4)}
    function = lambda x, weight: x @ weight.t()  # noqa: E731
    forward, backward, both = (Function(function, inputs, d)() for d in ("forward", "backward", "forward+backward"))
    assert not forward[0].requires_grad
    for a, b in zip((*forward, *backward), both, strict=True):
        torch.testing.assert_close(a, b)
    again = Function(function, inputs, "backward")
    again()
    torch.testing.assert_close(again(), backward)


def test_smoke_cases_are_right_in_every_implementation(one_thread):
    found = [
        harness.measure(case, None, Budget(timed=False))
        for case in cases.cases(cases.Options("smoke", all_isas=True), dtypes=(torch.float32, torch.bfloat16))
    ]
    assert {row["case"] for row in found} == set(cases.OPS)
    assert tables.problems(found) == []
    peers = {name: p["status"] for row in found for name, p in row["providers"].items() if not p["ours"]}
    assert set(peers.values()) <= {"ok", "not run"}, peers


def test_a_gpus_rows_are_no_instruction_sets(monkeypatch):
    rows = [
        {"isa": isa, "dtypes": ["float32"], "available": isa != "amx", "why_not": "", "calls": 0}
        for isa in ("amx", "avx2", "ref", "sm90a", "sm80")
    ]
    monkeypatch.setattr(backend, "implementations", lambda op: rows)
    assert cases._lower_isas(["linear"], torch.float32) == ["ref"]
    assert cases._lower_isas(["linear"], torch.bfloat16) == []


def test_unknown_op_is_refused():
    with pytest.raises(ValueError, match="only: got matmul, expected some of linear"):
        cases.cases(cases.Options(), only=["matmul"])


def example_row(**changes) -> dict:
    providers = {
        "llmfast": {"ours": True, "status": "ok", "median_ms": 2.0, "iqr_ms": 0.2, "samples": 5, "share": 0.5},
        "torch": {"ours": False, "status": "ok", "median_ms": 5.0, "iqr_ms": 0.1, "samples": 5},
        "torch.compile": {"ours": False, "status": "not run", "note": "not asked for (--compile)"},
    }
    row = {
        **rows.context("llmfast bench", LIMITS, 2),
        "kind": "op",
        "case": "linear",
        "direction": "forward",
        "dtype": "float32",
        "dims": {"M": 2, "K": 3, "N": 4},
        "limit": "compute",
        "providers": providers,
        "best": harness.compare(providers),
    }
    return {**row, **changes}


def test_rows_round_trip(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    first, second = example_row(), example_row(dtype="bfloat16")
    rows.append(path, first)
    rows.append(path, second)
    assert rows.read([path]) == [first, second]
    assert {"date", "commit", "machine", "threads", "isa", "versions", "command", "limits"} <= set(first)
    path.write_text('{"schema": 1}\n{"sch')
    with pytest.raises(ValueError, match=r"results\.jsonl:2: not JSON"):
        rows.read([path])
    with pytest.raises(ValueError):
        rows.append(path, example_row(value=math.nan))


def test_latest_row_wins():
    old, new = example_row(date="2026-01-01"), example_row(date="2026-02-01")
    other = example_row(date="2025-01-01", threads=1)
    assert rows.latest([new, other, old]) == [new, other]


def test_report_is_idempotent_and_keeps_the_rest(tmp_path, capsys):
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text("# top\n<!-- bench:start -->\nold\n<!-- bench:end -->\nmiddle\n")
    arguments = ["--readme", str(readme), "--results", str(results), "--part", "bench"]
    assert report.main(arguments) == 0 and "No results yet" in readme.read_text()
    rows.append(results / "a.jsonl", example_row())
    assert report.main([*arguments, "--check"]) == 1 and "stale" in capsys.readouterr().err
    assert report.main(arguments) == 0
    text = readme.read_text()
    assert text.startswith("# top\n<!-- bench:start -->\n") and text.endswith("<!-- bench:end -->\nmiddle\n")
    assert "linear, FFN, LM head + cross-entropy: 1 cases, fp32 | ahead in 1 |" in text and "old" not in text
    assert report.main(arguments) == 0 and readme.read_text() == text
    assert report.main([*arguments, "--check"]) == 0


def test_summary_is_a_part_a_machine():
    rows_of_linear = [example_row(dims={"M": m}) for m in (1, 2, 3)]
    for row, peer in zip(rows_of_linear, (1.0, 3.0, 8.0)):  # llmfast: 2
        row["providers"] = {**row["providers"], "torch": {**row["providers"]["torch"], "median_ms": peer}}
        row["best"] = harness.compare(row["providers"])
    model = example_row(kind="model", case="decode", direction="step", dims={"B": 1}, date="2026-01-03")
    model["providers"]["llmfast"]["tokens_per_s"] = 123.0
    elsewhere = example_row(date="2027-01-01", threads=7)
    model["note"] = "beside other work"
    lines = report.summary_section([*rows_of_linear, model, elsewhere, scale_row(128, 1.0)]).splitlines()
    processor = rows.processor(model["machine"])
    assert lines[2].startswith(f"| {processor}, 7 threads, ") and "1 cases, fp32 | ahead in 1 |" in lines[2]
    assert lines[3].startswith(f"| {processor}, {model['threads']} threads, {model['isa']} | decode, fp32, B=1 | ")
    assert "2.00 ± 0.10 ms, 123 tokens/s | 5.00" in lines[3] and "2.50×" in lines[3]
    assert lines[4].startswith("|  | linear, FFN") and "3 cases, fp32 | ahead in 2 |" in lines[4]
    assert "median 1.50×, 0.50 to 4×" in lines[4]
    assert lines[5] == "", "the sweep is not in it"
    assert lines[6].startswith(f"Note, {processor}, ") and lines[6].endswith(": beside other work.")


def test_processors_of_one_name_are_told_apart():
    new, other = example_row(), example_row(isa="another")
    old = example_row(machine={key: value for key, value in new["machine"].items() if key != "model"})
    new["machine"] = {**new["machine"], "model": "family 26, model 2"}
    assert rows.latest([old, new, other]) == [old, new, other]
    assert "(family 26, model 2), " in tables.headline(new) and "family" not in tables.headline(old)


def test_report_has_every_row(tmp_path):
    readme, every = tmp_path / "README.md", tmp_path / "all.md"
    for path in (readme, every):
        path.write_text("<!-- bench:start -->\n<!-- bench:end -->\n")
    rows.append(tmp_path / "a.jsonl", example_row())
    arguments = ["--readme", str(readme), "--tables", str(every), "--results", str(tmp_path), "--part", "bench"]
    rows.append(tmp_path / "a.jsonl", example_row(dims={"M": 5}, note="beside other work"))
    assert report.main(arguments) == 0
    assert "\n\nNote: beside other work.\n" in every.read_text()
    line = "| linear | fp32 | M=2 K=3 N=4 | 2.00 ± 0.10 ms | 5.00 ± 0.050 ms torch | 2.50× | 50% compute |  |"
    assert line in every.read_text() and line not in readme.read_text()


def test_report_wants_its_markers():
    with pytest.raises(ValueError, match="bench:start"):
        report.replace_between("nothing here", "bench", "body")


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="README shows an x86 build's rows")
def test_readme_support_matrix_is_current():
    assert report.main(["--readme", str(README), "--part", "support", "--check"]) == 0


def test_readme_quick_start_is_two_commands():
    first_block = README.read_text(encoding="utf-8").split("```")[1]
    assert first_block.splitlines() == [
        "sh",
        "pip install torch==2.13.0 . && llmfast demo",
        'pip install torch==2.13.0 ".[test]" && pytest',
    ]


def test_readme_example_runs(capsys, one_thread):
    example = README.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    exec(compile(example, "README.md", "exec"), {})
    loss = float(capsys.readouterr().out.split()[0])
    assert loss < 2.5, "50 steps memorise eight lines; ln(256) = 5.5 at the start"


def test_notes_name_what_happened():
    providers = {
        "llmfast": {"ours": True, "status": "ok", "median_ms": 2.0, "iqr_ms": 0.0, "samples": 1, "fell_back": "why"},
        "torch": {"ours": False, "status": "timeout", "note": "no step within 5 s"},
    }
    row = example_row(providers=providers, best=harness.compare(providers))
    cells = dict(zip(tables.COLUMNS, tables.cells(row), strict=True))
    assert cells["llmfast"] == "2.00 ms" and cells["ratio"] == "–"
    assert cells["notes"] == "llmfast fell back: why; torch: no step within 5 s"


def test_command_line_smoke(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    threads = torch.get_num_threads()
    config = BenchConfig("op", smoke=True, quick=True, only="linear,attention", dtype="float32", json=path)
    assert main(config) == 0
    found = rows.read([path])
    assert [row["case"] for row in found] == ["linear"] * 2 + ["attention"] * 3
    assert found[0]["command"].startswith("llmfast bench op --quick --smoke")
    assert all("median_ms" not in p for row in found for p in row["providers"].values())
    assert "attention backward" in capsys.readouterr().out
    assert torch.get_num_threads() == threads


def test_command_line_refuses():
    with pytest.raises(ValueError, match="threads: got 0"):
        BenchConfig(threads=0)
    with pytest.raises(ValueError, match="preset"):
        main(BenchConfig("model", preset="gpt9", smoke=True))


def test_step_providers_without_transformers(monkeypatch):
    monkeypatch.setattr(steps.importlib.util, "find_spec", lambda name: None)
    found = steps.StepCase("gpt2", "bfloat16", 4, 1024).providers(2)
    assert isinstance(found.pop("llmfast"), steps.StepSpec)
    assert len(found) == 3 and set(found.values()) == {"transformers is not installed"}


def test_step_case_is_checked():
    with pytest.raises(ValueError, match="T: got 65, expected 2 to 64"):
        steps.StepCase("gpt-nano", "float32", 1, 65)
    with pytest.raises(ValueError, match="preset: got 'x'"):
        steps.StepCase("x", "float32", 1, 64)


def test_losses_off_are_wrong():
    found = {
        "llmfast": {"ours": True, "status": "ok", "losses": [5.0, 4.9]},
        "transformers float32": {"ours": False, "status": "ok", "losses": [5.0, 4.5, 4.0]},
    }
    steps._check_losses(found, 0.1)
    assert found["llmfast"]["status"] == "wrong" and found["llmfast"]["error"] == pytest.approx(0.4)
    assert found["transformers float32"]["status"] == "ok"


def test_training_step_against_transformers():
    """Two processes, two steps each: the same weights and batch give the same losses."""
    pytest.importorskip("transformers")
    case = steps.StepCase("gpt-nano", "float32", B=2, T=16)
    row = steps.measure_step(case, None, Budget(timed=False), threads=1, timeout=300)
    ours, theirs = row["providers"]["llmfast"], row["providers"]["transformers float32"]
    assert ours["status"] == theirs["status"] == "ok", row["providers"]
    assert len(ours["losses"]) == 2 and ours["losses"][1] < ours["losses"][0]
    assert ours["error"] < 1e-4
    json.dumps(row, allow_nan=False)


def test_what_fits_into_memory(monkeypatch):
    monkeypatch.setattr(steps, "available", lambda: 19)
    assert steps._fits([4, 8], [2, 1])  # 10 for one more, 7 while one takes a step
    monkeypatch.setattr(steps, "available", lambda: 17)
    assert not steps._fits([4, 8], [2, 1])
    monkeypatch.setattr(steps, "available", lambda: None)
    assert steps._fits([4, 8], [2, 1])


def test_providers_that_memory_does_not_hold_at_once_come_later(monkeypatch):
    """One peer fits beside llmfast: two groups, and llmfast's samples of both count."""
    pytest.importorskip("transformers")
    asked = []
    monkeypatch.setattr(steps, "_fits", lambda peaks, idle: asked.append((peaks, idle)) or False)
    case = steps.StepCase("gpt-nano", "float32", B=2, T=16, malloc=True)
    row = steps.measure_step(case, None, Budget(seconds=0.1, rounds=(2, 2)), threads=1, timeout=300)
    found = {name: p for name, p in row["providers"].items() if p["status"] != "not run"}
    assert {name: p.get("samples") for name, p in found.items()} == {
        "llmfast": 4, "transformers float32": 2, "transformers float32, tuned malloc": 2,
    }  # fmt: skip
    ((peaks, idle),) = asked
    assert len(peaks) == len(idle) == 1 and 2**20 < idle[0] <= peaks[0]
    assert all(p["status"] == "ok" and p["error"] < 1e-3 for p in found.values()), found


def test_provider_over_its_time_is_stopped(monkeypatch):
    monkeypatch.setattr(steps.importlib.util, "find_spec", lambda name: None)
    case = steps.StepCase("gpt-nano", "float32", B=1, T=8)
    row = steps.measure_step(case, None, Budget(timed=False), threads=1, timeout=1e-6)  # no process answers in that
    assert row["providers"]["llmfast"]["status"] == "timeout"
    assert row["providers"]["llmfast"]["note"] == "no answer within 1e-06 s"
    assert row["best"]["ratio"] is None


def test_shares_that_mean_nothing_are_blank():
    def cell(bytes: int, share: float, limit: str = "memory") -> str:
        row = example_row(bytes=bytes, limit=limit)
        return tables.share(row, {"share": share})

    assert LIMITS.copy[2**20] > 2 * LIMITS.copy[2**24], "the small copy stays in the caches"
    assert cell(2**20, 0.5) == "– (in cache)"
    assert cell(2**25, 0.5) == "50% memory"
    assert cell(2**25, 1.3) == "– (above 100% memory)"
    assert cell(2**20, 0.5, "compute") == "50% compute"
    assert tables.share(example_row(limits=None), {"share": 0.5}) == "–"


def test_each_run_has_its_own_limits():
    quiet = example_row(date="2026-01-01", command="llmfast bench op")
    busy = example_row(date="2026-01-02", command="llmfast bench model", dtype="bfloat16", kind="model")
    busy["limits"] = {**busy["limits"], "gflops": {"float32": 77.0}}
    text = report.results_section([quiet, busy])
    first, second = text.index("77 GFLOP/s"), text.index("1 GFLOP/s")
    assert first < text.index("| linear | bf16") < second < text.index("| linear | fp32")
    assert text.index("`llmfast bench model`") < second < text.index("`llmfast bench op`")


def scale_row(T: int, seconds: float) -> dict:
    providers = {
        name: {"ours": name == "llmfast", "status": "ok", "median_ms": 1e3 * time, "iqr_ms": 1.0, "samples": 3,
               "tokens_per_s": 1024 / time, "memory_mb": T, "share": 0.5}
        for name, time in (("llmfast", seconds), ("transformers float32", 2 * seconds))
    }  # fmt: skip
    dims = {"sweep": "T", "model": "2x64", "parameters": 1_000_000, "B": 1, "T": T}
    found = example_row(
        kind="scale", case="training step", direction="step", dims=dims, providers=providers, x=T, date="2026-01-01"
    )
    return {**found, "best": harness.compare(providers)}


def test_trends_are_power_laws():
    exact = scale.fit([1, 2, 4, 8], [3, 12, 48, 192])
    assert (exact.factor, exact.exponent, exact.residual) == pytest.approx((3, 2, 1))
    off = scale.fit([1, 2, 4], [1.0, 2.0 * 1.1, 4.0])
    assert off.exponent == pytest.approx(1) and 1.03 < off.residual < 1.1
    assert scale.fit([1, 2], [1, 2]) is None and scale.fit([2, 2, 2], [1, 2, 3]) is None
    found = scale.trends([scale_row(T, 0.001 * T) for T in (128, 256, 512)])
    assert found["T", "llmfast", "tokens_per_s"].exponent == pytest.approx(-1)
    assert found["T", "transformers float32", "memory_mb"].exponent == pytest.approx(1)


def test_scale_in_tables_and_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    found = [scale_row(T, 0.001 * T) for T in (128, 256, 512)]
    line = dict(zip(tables.SCALE_COLUMNS, tables.scale_cells(found[1]), strict=True))
    assert line["sweep"] == "sequence length" and line["llmfast tokens/s"] == "4,000" and line["ratio"] == "2.00×"
    assert line["memory, MB"] == "256 vs 256" and line["MFU"] == "50%"
    text = report.results_section(found)
    assert "| sequence length | 1M parameters 2x64 B=1 T=256 | 4,000 |" in text
    assert "- sequence length: llmfast tokens/s ∝ x^-1.00 (±0%, 3 points), memory ∝ x^1.00" in text
    written = plots.write([*found, example_row()], tmp_path)
    assert [path.name for path in written] == ["scale-T.png", "ratios.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_gpu_rows_in_tables():
    providers = {
        "torch flash": {"status": "ok", "ours": False, "median_ms": 2.0, "iqr_ms": 0.1, "samples": 9},
        "cuDNN": {"status": "ok", "ours": False, "median_ms": 1.0, "iqr_ms": 0.1, "samples": 9},
        "llmfast": {
            "status": "ok",
            "ours": True,
            "median_ms": 0.8,
            "iqr_ms": 0.1,
            "samples": 9,
            "tflops": 600.4,
            "share": 0.75,
        },
    }
    limits = {"copy_bytes_per_s": 3e12, "product_flops_per_s": 8e14}
    row = example_row(case="attention", direction="backward", dims={"B": 2, "T": 4096}, providers=providers)
    row |= {"kind": "gpu", "limits": limits, "cuda": "13.0", "best": harness.compare(providers)}
    row["machine"] = {**row["machine"], "gpu": "Some GPU"}
    text = report.results_section([example_row(), row])
    assert "Some GPU; torch" in text and "bf16 product 800 TFLOP/s, device copy 3.00 TB/s" in text
    line = "| attention, backward | B=2 T=4096 | 0.800 ms | 1.00 ms cuDNN | 1.25× | 600 TFLOP/s | 75% | "
    line += "torch flash 2.00 ms |"
    assert line in text and text.index(line) < text.index("| linear |")


def test_sweeps_cover_every_scale(monkeypatch):
    full = scale.points("full", "float32", threads=6)
    xs = {sweep: [p.x for p in full if p.sweep == sweep] for sweep in scale.SWEEPS}
    assert xs["parameters"][0] < 2.5e6 and xs["parameters"][-1] > 5e9 and xs["parameters"] == sorted(xs["parameters"])
    assert xs["T"] == [2**n for n in range(7, 16)] and xs["threads"] == [1, 2, 4, 6]
    assert {p.sweep for p in scale.points("quick", "float32", 2, only=["B"])} == {"B"}
    with pytest.raises(ValueError, match="only: got depth"):
        scale.points("quick", "float32", 2, only=["depth"])
    monkeypatch.setattr(scale, "available", lambda: 2**20)
    row = scale.measure_point(full[0], None, BRIEFLY, 1.0, print)
    assert row["providers"]["llmfast"]["status"] == "skipped" and "are free" in row["providers"]["llmfast"]["note"]
    assert tables.problems([row]) == [] and "skipped" in tables.scale_cells(row)


@pytest.mark.parametrize("task", ["prefill", "decode"])
@pytest.mark.parametrize("preset", ["gpt-nano", "llama-nano"])
def test_inference_against_transformers(preset, task):
    """The loss of a token after a prompt, from caches, is that of transformers, at every step."""
    pytest.importorskip("transformers")
    case = steps.StepCase(preset, "float32", B=2, T=20, task=task)
    row = steps.measure_step(case, None, Budget(timed=False), threads=1, timeout=300)
    ours, theirs = row["providers"]["llmfast"], row["providers"]["transformers float32"]
    assert ours["status"] == theirs["status"] == "ok", row["providers"]
    assert ours["error"] < 1e-4 and ours["losses"][0] == ours["losses"][1]
    assert row["case"] == task and case.tokens == (2 if task == "decode" else 40)


def test_work_of_inference():
    prefill, decode = (steps.StepCase("gpt2", "bfloat16", B=8, T=1023, task=task) for task in ("prefill", "decode"))
    blocks = 12 * 12 * 768**2 / 12 * 12  # 12 C^2 weights in each of 12 layers
    assert decode.flops / 8 == pytest.approx(2 * (blocks + 50257 * 768), rel=0.2)
    assert prefill.flops / prefill.tokens == pytest.approx(2 * blocks, rel=0.2)
    assert decode.bytes == 2 * (decode.shape.parameters() + 8 * 2 * 12 * 768 * 1023) and prefill.bytes is None
    limits = Limits({"bfloat16": 1e15}, {2**20: 1e9}, read=1e9)
    found = {"llmfast": {"ours": True, "status": "ok", "median_ms": 2e-6 * decode.bytes}}
    row = steps._row(decode, found, limits)
    assert row["limit"] == "read" and found["llmfast"]["share"] == pytest.approx(0.5, rel=1e-3)


def test_peers_with_a_tuned_allocator():
    found = steps.StepCase("gpt-nano", "float32", 1, 8, malloc=True).providers(1)
    if isinstance(found["transformers float32"], str):
        pytest.skip("transformers is not installed")
    assert found["transformers float32, tuned malloc"].malloc and not found["transformers float32"].malloc
