"""benchmarks/cliffs.py: what it draws, and that a wrong result fails the run."""

import importlib.util
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "cliffs.py"


@pytest.fixture
def cliffs():
    spec = importlib.util.spec_from_file_location("cliffs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cases_are_the_seeds_and_not_too_large(cliffs):
    for op in cliffs.DRAWN:
        first, again, other = (cliffs.drawn(op, 8, seed) for seed in (0, 0, 1))
        shapes = [[(work.direction, work.dims) for work in found] for found in (first, again, other)]
        assert shapes[0] == shapes[1] != shapes[2]
        assert all(work.op == op and work.flops <= cliffs.GREATEST for work in first)


def test_a_wrong_result_fails_the_run(cliffs, monkeypatch, capsys):
    small = cliffs.cases.norm("add_rms_norm", 3, 17, "forward")
    monkeypatch.setattr(cliffs, "drawn", lambda op, count, seed: [small])
    arguments = ["--only", "add_rms_norm", "--cases", "1", "--seconds", "0", "--threads", str(torch.get_num_threads())]
    assert cliffs.main(arguments) == 0
    right = cliffs.cases.ops.add_rms_norm
    monkeypatch.setattr(cliffs.cases.ops, "add_rms_norm", lambda **inputs: tuple(t + 1 for t in right(**inputs)))
    assert cliffs.main(arguments) == 1
    assert "wrong  add_rms_norm forward float32 M=3 C=17" in capsys.readouterr().out
