"""The suite's op cases under pytest-benchmark: ``pytest benchmarks --benchmark-group-by=param:case``.

Not part of the default test run. ``llmfast bench`` is the same with interleaving, limits and rows; this is for looking
at one case with pytest's selection (``-k "linear and float32"``), its comparison tables and its histograms.
"""

import pytest
import torch

from llmfast.bench import cases
from llmfast.bench.harness import Budget, Provider, measure

CASES = {case.label: case for case in cases.cases(cases.Options(size="quick"), dtypes=(torch.float32, torch.bfloat16))}


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request):
    """The case's name, its providers, and what the check found."""
    chosen = CASES[request.param]
    row = measure(chosen, None, Budget(timed=False))
    return request.param, chosen.build().providers, row["providers"]


@pytest.mark.parametrize("side", ["llmfast", "peers"])
def test_op(benchmark, case, side):
    label, providers, found = case
    names = [n for n, p in providers.items() if isinstance(p, Provider) and p.ours == (side == "llmfast")]
    name = next(n for n in names if found[n]["status"] == "ok")
    benchmark.group = label
    benchmark.extra_info.update(provider=name, error=found[name]["error"])
    benchmark(providers[name].run)
