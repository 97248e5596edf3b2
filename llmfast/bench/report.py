"""Regenerates the generated parts of README.md and docs/benchmarks.md: the benchmark tables from result files, the
support matrix from the dispatch tables. README has a summary of each machine, docs/benchmarks.md every row.

    python benchmarks/report.py            # rewrites README.md
    python benchmarks/report.py --check    # exits 1 if that would change it
    python benchmarks/report.py --plots    # also draws the pictures beside the result files, a folder a file
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from llmfast import backend
from llmfast.bench import gpu_tables, rows, summary, tables

__all__ = ["main", "replace_between", "results_section", "summary_section", "support_section"]

DTYPES = ("float32", "bfloat16", "float16")
RUN = ("machine", "isa", "versions", "date", "commit", "command", "limits")  # what all rows of a run share


def replace_between(text: str, marker: str, body: str) -> str:
    """`text` with what stands between ``<!-- marker:start -->`` and ``<!-- marker:end -->`` replaced.

    Raises:
        ValueError: the two markers are not there, once each and in order.
    """
    start, end = f"<!-- {marker}:start -->", f"<!-- {marker}:end -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"text: expected {start} and then {end}, once each")
    before, rest = text.split(start)
    after = rest.split(end)[1]
    return f"{before}{start}\n{body.strip()}\n{end}{after}"


NO_RESULTS = "No results yet: `llmfast bench all --json benchmarks/results/NAME.jsonl` measures this machine."


def summary_section(results: Sequence[dict]) -> str:
    """README's table and what its columns mean."""
    if not results:
        return NO_RESULTS
    return (
        f"{summary.markdown(results)}\n\n"
        "Medians of calls that take turns, after a check against float64 (operations) or float32 losses (models). *Best of "
        "the others*: the fastest way that PyTorch or transformers has on the machine, whatever its dtype for models; on "
        "GPUs cuBLAS, cuDNN, flash and torch.compile among them. *Ratio*: its time over llmfast's; of operations, over all "
        "cases measured. *Of limit*: share of the products or memory traffic that the machine can do at most, measured in "
        "the same run."
    )


def results_section(results: Sequence[dict]) -> str:
    """The benchmark tables: one for each run, under the limits and the software of that run; GPUs first, then newest
    runs first, and in them models before ops, then sweeps. A case that a later run of the same machine measured again
    is left out."""
    if not results:
        return NO_RESULTS
    runs: dict[str, list[dict]] = {}
    for row in rows.latest(results):
        runs.setdefault(json.dumps([row[key] for key in RUN], sort_keys=True), []).append(row)
    parts = []
    for found in sorted(runs.values(), key=_order, reverse=True):
        first = found[0]
        on_gpu = first["kind"] == "gpu"
        headline = (gpu_tables if on_gpu else tables).headline(first)
        parts.append(f"{headline}. {first['date'][:10]}, commit {(first['commit'] or 'unknown')[:10]}:")
        parts.append(f"`{first['command']}`")
        if on_gpu:
            parts.append(gpu_tables.markdown(found))
            continue
        for kinds in (("model", "op"), ("scale",)):
            part = sorted((r for r in found if r["kind"] in kinds), key=lambda r: kinds.index(r["kind"]))
            if part:
                parts.append(tables.markdown(part))
        lines = tables.trend_lines([row for row in found if row["kind"] == "scale"])
        if lines:
            parts.append("\n".join(f"- {line}" for line in lines))
    parts.append(
        "Medians ± half the interquartile range; the calls of a run are interleaved, after a check against float64 "
        "(ops) or float32 losses (models). *Best of the others*: the fastest way PyTorch or transformers has, whatever "
        "its dtype for models. *Of limit*, *MFU*: share of what the machine can do at most, measured in the same run; "
        "blank where memory traffic stays in the caches, for which no limit is known. MB: peak of the process (models) "
        "or of one call (ops). Commands and raw numbers: `benchmarks/results/`."
    )
    return "\n\n".join(parts)


def _order(run: Sequence[dict]) -> tuple[bool, bool, str]:
    kinds = {row["kind"] for row in run}
    models = "model" in kinds or any(p.get("tokens_per_s") for row in run for p in row["providers"].values())
    return "gpu" in kinds, models, run[0]["date"]


def support_section() -> str:
    """Op by target, the cells naming the dtypes, from the dispatch tables of the module that is installed."""
    order = [isa for isa in reversed(backend.ISAS)]
    lines = ["| op | " + " | ".join(order) + " |", "|---|" + "---|" * len(order)]
    for op in backend.ops():
        found = {row["isa"]: row["dtypes"] for row in backend.implementations(op)}
        names = [" ".join(tables.SHORT[d] for d in DTYPES if d in found.get(isa, ())) or "–" for isa in order]
        lines.append(f"| `{op}` | " + " | ".join(names) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python benchmarks/report.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument(
        "--tables", type=Path, help="gets all tables if it exists (default: docs/benchmarks.md beside README)"
    )
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder of .jsonl files")
    parser.add_argument("--part", choices=("all", "bench", "support"), default="all")
    parser.add_argument("--plots", action="store_true", help="also draw each results file's pictures")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the file is stale")
    options = parser.parse_args(arguments)

    results = rows.read(sorted(options.results.glob("*.jsonl")))
    sections = {options.readme: {}}
    if options.part in ("all", "bench"):
        sections[options.readme]["bench"] = summary_section(results)
        every = options.tables or options.readme.parent / "docs" / "benchmarks.md"
        if every.exists():
            sections[every] = {"bench": results_section(results)}
    if options.part in ("all", "support"):
        sections[options.readme]["support"] = support_section()
    stale = False
    for path, bodies in sections.items():
        before = after = path.read_text(encoding="utf-8")
        for marker, body in bodies.items():
            after = replace_between(after, marker, body)
        if after == before:
            continue
        if options.check:
            stale = True
            print(f"{path} is stale: run python benchmarks/report.py", file=sys.stderr)
        else:
            path.write_text(after, encoding="utf-8")
    if options.check:
        return int(stale)
    if options.plots:
        from llmfast.bench import plots

        for path in sorted(options.results.glob("*.jsonl")):
            plots.write(rows.read([path]), path.with_suffix(""))
    return 0
