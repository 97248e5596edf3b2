"""Random problems for every op, held against float64: shapes, strides, masks, dtypes, options, threads.

The default run has 2,000 problems in all, the same at every run. ``LLMFAST_FUZZ=20000 pytest tests/test_fuzz.py`` runs
that many, new ones each time; the seed is printed, and ``LLMFAST_FUZZ_SEED`` repeats it. `fuzz/rule.py` states the rule
that results are held to, and `test_wrong_kernels_are_caught` shows what it catches.
"""

import os
import random
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import available_isas
from fuzz import optimizers, problems, rule
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import llmfast

DEFAULT = 2000
BUDGET = int(os.environ.get("LLMFAST_FUZZ", DEFAULT))
SEED = int(os.environ.get("LLMFAST_FUZZ_SEED", random.SystemRandom().randrange(2**32)))
# Percent of the budget: what has more options gets more.
OPS = {
    "attention": 17, "decode": 9, "varlen": 8, "twin": 5, "linear": 12, "ffn": 9, "norm": 10,
    "linear_cross_entropy": 8, "rotary": 4, "embedding": 4,
}  # fmt: skip
ADAMW, GRAD_NORM, AT_ONCE, SCALED = 4, 2, 4, 2
THREADS = st.sampled_from([1, 1, 1, 2, 3, 4])  # at times more than the machine has cores
QUIET = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))


def fuzz(percent: int, check: Callable, cases: st.SearchStrategy) -> None:
    """Calls `check` with a case and a number of threads, as often as `percent` of the budget allow this instruction set."""

    @given(cases, THREADS)
    def test(case, threads):
        torch.set_num_threads(threads)
        check(case, threads)

    count = max(1, round(0.01 * percent * BUDGET / len(available_isas())))
    if BUDGET == DEFAULT and "LLMFAST_FUZZ_SEED" not in os.environ:
        test = settings(max_examples=count, derandomize=True, **QUIET)(test)
    else:
        test = seed(SEED)(settings(max_examples=count, **QUIET)(test))
        print(f"LLMFAST_FUZZ={BUDGET} LLMFAST_FUZZ_SEED={SEED} repeats this run", file=sys.__stderr__)
    test()


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("op", OPS)
def test_op(isa, op):
    fuzz(OPS[op], lambda problem, threads: rule.run(problem), problems.strategy(getattr(problems, op)))


def test_adamw(isa):
    fuzz(ADAMW, lambda case, threads: optimizers.run_steps(case), problems.strategy(optimizers.optimization))


def test_grad_norm(isa):
    fuzz(GRAD_NORM, lambda case, threads: optimizers.run_norm(case), problems.strategy(optimizers.gradients))


def test_scaled_by_powers_of_two(isa):
    """Very large and very small values: linear in x and attention in v commute with a power of two, bit for bit."""

    def check(case: tuple[rule.Problem, int], threads: int) -> None:
        problem, power = case
        name = "v" if "v" in problem.inputs else "x"
        if problem.inputs[name].dtype == torch.float16:
            return  # too narrow for it
        inputs = {**problem.inputs, "bias": None} if name == "x" else problem.inputs
        plain, large = inputs, {**inputs, name: inputs[name] * 2.0**power}
        (a,), (b,) = (rule.solve(problem.ours, i, (), 0).values() for i in (plain, large))
        assert torch.equal(a * 2.0**power, b), problem

    def case(make: problems.Maker) -> tuple[rule.Problem, int]:
        power = make.choose((1, 40, 90, -40, -90))
        return make.choose((problems.linear, problems.attention, problems.decode))(make), power

    fuzz(SCALED, check, problems.strategy(case))


def test_huge_scores(isa):
    """Scores of thousands: each output stays between the smallest and the largest value, whatever wins the softmax."""

    def check(problem: rule.Problem, threads: int) -> None:
        tensors = {name: problem.clean.get(name, t) for name, t in problem.inputs.items()}
        if not tensors["k"].numel():
            return
        found = rule.solve(problem.ours, {**tensors, "q": tensors["q"] * 2000}, problem.wanted, 0)
        assert all(t.isfinite().all() for t in found.values()), problem
        bound = tensors["v"].abs().max()
        assert (found["output 0"].abs() <= bound * 1.01).all(), problem

    fuzz(SCALED, check, problems.strategy(lambda make: make.choose((problems.attention, problems.decode))(make)))


def test_calls_at_once(isa):
    """Two or three Python threads, each with its own pool of threads: bit for bit what they get one after another."""

    def check(cases: list[rule.Problem], threads: int) -> None:
        def solve(problem: rule.Problem) -> rule.Results:
            torch.set_num_threads(threads)  # OpenMP's number of threads belongs to the calling thread
            return rule.solve(problem.ours, problem.inputs, problem.wanted, problem.layout)

        alone = [solve(problem) for problem in cases]
        with ThreadPoolExecutor(len(cases)) as pool:
            together = list(pool.map(solve, cases))
        for problem, a, b in zip(cases, alone, together):
            for name, result in a.items():
                assert torch.equal(result, b[name]), f"{problem}: {name} differs when called at once with others"

    case = st.one_of(*(problems.strategy(getattr(problems, op)) for op in OPS))
    fuzz(AT_ONCE, check, st.lists(case, min_size=2, max_size=3))


def scaled(right, q, k, v, *, scale=None, **options):
    return right(q, k, v, scale=1.01 * (q.shape[-1] ** -0.5 if scale is None else scale), **options)


def past_the_diagonal(right, q, k, v, *, causal=False, window=None, **options):
    if causal and window is None:
        return right(q, k, v, window=(-1, 1), **options)
    return right(q, k, v, causal=causal, window=window, **options)


def first_heads_mask(right, q, k, v, *, mask=None, **options):
    if mask is not None and mask.dim() >= 3:
        mask = mask[..., :1, :, :]
    return right(q, k, v, mask=mask, **options)


def without_the_last_key(right, q, k, v, *, causal=False, mask=None, window=None, **options):
    if not causal and mask is None and window is None and k.shape[2] > 64:
        k, v = k[:, :, :-1], v[:, :, :-1]
    return right(q, k, v, causal=causal, mask=mask, window=window, **options)


def without_the_last_column(right, x, weight, bias=None):
    return right(x[..., :-1], weight[:, :-1], bias) if x.shape[-1] % 8 == 1 else right(x, weight, bias)


def bias_twice_in_backward(right, x, weight, bias=None):
    return right(x, weight, None if bias is None else 2 * bias - bias.detach())


def beyond_the_rows(right, x, weight, bias=None):
    everything = torch.empty(0, dtype=x.dtype).set_(x.detach().untyped_storage())
    return right(x, weight, bias) + 0 * everything.sum()


def into_the_input(right, x, weight, bias=None):
    out = right(x, weight, bias)
    torch.empty(0, dtype=x.dtype).set_(x.detach().untyped_storage()).neg_()  # unseen by autograd
    return out


def sums_in_bfloat16(right, x, weight, bias=None):
    return right(*(None if t is None else t.bfloat16() for t in (x, weight, bias))).to(x.dtype)


def other_gelu(right, *tensors, activation, **options):
    return right(*tensors, activation=activation.replace("gelu_tanh", "gelu"), **options)


def unbiased(right, x, residual, weight, bias, eps, **options):
    normed, summed = right(x, residual, weight, bias, eps, **options)
    return normed * (1 - 1 / x.shape[-1]) ** 0.5, summed


def mean_over_all_rows(right, x, weight, target, **options):
    loss = right(x, weight, target, **options)
    if options["reduction"] == "mean":
        loss = loss * (target != options["ignore_index"]).sum() / target.numel()
    return loss


def next_position(right, q, k, cos, sin, **options):
    return right(q, k, cos, sin.roll(1, -2), **options)


def positions_of_the_first_sequence(right, ids, weight, position_weight, position_ids, **options):
    if position_ids is not None and position_ids.dim() > 1:
        position_ids = position_ids[:1].expand_as(position_ids)
    return right(ids, weight, position_weight, position_ids, **options)


def bounds_of_the_queries(right, q, k, v, bounds_q, bounds_k, **options):
    same = bounds_q[-1] == bounds_k[-1]
    return right(q, k, v, bounds_q, bounds_q if same else bounds_k, **options)


def leaking(right, q, k, v, **options):
    return right(q, k, v, **options) + 0 * v.sum()


DEFECTS = [
    ("attention", "attention", scaled),
    ("attention", "attention", past_the_diagonal),
    ("attention", "attention", first_heads_mask),
    ("attention", "attention", leaking),
    ("decode", "attention", without_the_last_key),
    ("decode", "attention", leaking),
    ("linear", "linear", without_the_last_column),
    ("linear", "linear", bias_twice_in_backward),
    ("linear", "linear", beyond_the_rows),
    ("linear", "linear", into_the_input),
    ("linear", "linear", sums_in_bfloat16),
    ("ffn", "ffn", other_gelu),
    ("norm", "add_layer_norm", unbiased),
    ("linear_cross_entropy", "linear_cross_entropy", mean_over_all_rows),
    ("rotary", "rotary", next_position),
    ("embedding", "embedding", positions_of_the_first_sequence),
]


@pytest.mark.parametrize(("op", "name", "defect"), DEFECTS, ids=lambda part: getattr(part, "__name__", None))
def test_wrong_kernels_are_caught(monkeypatch, op, name, defect):
    """Each defect is subtle: it touches few elements, few shapes, or the last digits. A fifth of the default run's
    problems for the op suffice to find most of them, two fifths to find all."""
    right = getattr(llmfast, name)
    monkeypatch.setattr(llmfast, name, lambda *args, **options: defect(right, *args, **options))
    count = round(0.004 * OPS[op] * DEFAULT)
    search = settings(
        max_examples=count, derandomize=True, phases=[Phase.generate], report_multiple_bugs=False, **QUIET
    )

    @search
    @given(problems.strategy(getattr(problems, op)))
    def fuzz_defective(problem):
        rule.run(problem)

    with pytest.raises(AssertionError):
        fuzz_defective()


def test_rule_allows_luck_and_nothing_more():
    exact = torch.randn(1000, dtype=torch.float64)
    rounded = exact.bfloat16()
    lucky = exact.clone()  # a peer without any error
    rule.compare("rounded once", rounded, lucky.bfloat16(), exact, narrow=torch.bfloat16)
    rule.compare("one element", rounded[:1], lucky[:1].bfloat16(), exact[:1])
    for wrong, message in (
        (rounded + 0.01 * exact.abs().max(), "rms error"),
        (torch.where(torch.arange(1000) == 7, rounded + 0.1, rounded), "flat position 7 of 1000"),
        (torch.where(torch.arange(1000) == 7, torch.nan, rounded), "got NaN or infinity"),
        (rounded[:999], "got shape"),
        (rounded.float(), r"got torch.float32"),
    ):
        with pytest.raises(AssertionError, match=message):
            rule.compare("wrong", wrong if "got torch" in message else wrong.bfloat16(), rounded, exact)
    with pytest.raises(AssertionError, match="other NaN or infinite"):
        rule.compare("hidden", torch.zeros(3), torch.zeros(3), torch.tensor([0.0, 0.0, torch.nan], dtype=torch.float64))
