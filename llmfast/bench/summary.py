"""The short table of README: whole models row by row, single operations as the range of their ratios, a part a machine."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from llmfast.bench import gpu_tables, rows, tables

__all__ = ["FAMILIES", "markdown"]

COLUMNS = ("machine", "what", "llmfast", "best of the others", "ratio", "of limit")
FAMILIES = {
    "attention": ("attention", "varlen_attention"),
    "linear, FFN, LM head + cross-entropy": ("linear", "ffn", "linear_cross_entropy"),
    "residual + norm, rotary, AdamW": ("add_layer_norm", "add_rms_norm", "rotary", "adamw"),
}


def markdown(results: Sequence[dict]) -> str:
    """One table of the newest rows of every machine: GPUs first, then processors, the one measured last first.

    A family of operations is one line: how many cases, in how many llmfast is ahead, the median of their ratios (time of
    the fastest other over llmfast's) and their range. Cases without another that is right have no ratio and are left out.
    """
    machines: dict[str, list[dict]] = {}
    for row in rows.latest(results):
        if row["kind"] != "scale":
            machines.setdefault(_machine(row), []).append(row)
    ordered = sorted(
        machines.items(), key=lambda item: max((r["kind"] == "gpu", r["date"]) for r in item[1]), reverse=True
    )
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for machine, found in ordered:
        cells = [_model(row) for row in found if _is_model(row)]
        cells += [line for family in FAMILIES if (line := _family(family, [r for r in found if not _is_model(r)]))]
        for i, line in enumerate(cells):
            lines.append("| " + " | ".join((machine if i == 0 else "", *line)) + " |")
    notes = {
        (machine, note): None
        for machine, found in ordered
        for row in found
        for note in (row.get("note") or "").split("; ")
    }
    return "\n".join([*lines, *(f"\nNote, {machine}: {note}." for machine, note in notes if note)])


def _machine(row: dict) -> str:
    if row["kind"] == "gpu":
        return row["machine"]["gpu"]
    return f"{rows.processor(row['machine'])}, {row['threads']} threads, {row['isa']}"


def _is_model(row: dict) -> bool:
    return any(provider.get("tokens_per_s") for provider in row["providers"].values())


def _model(row: dict) -> tuple[str, ...]:
    if row["kind"] == "gpu":
        what, size, ours, peer, ratio, rate, share, _ = gpu_tables.cells(row)
        return f"{what}, bf16, {size}", f"{ours}, {rate}", peer, ratio, share
    what, dtype, size, ours, peer, ratio, share, _ = tables.cells(row)
    return f"{what}, {dtype}, {size}", ours, peer, ratio, share


def _family(family: str, found: Sequence[dict]) -> tuple[str, ...] | None:
    """None: nothing of it was measured."""
    names = FAMILIES[family]
    cases = [row for row in found if row["case"].lower().split(" ")[0] in names and row["best"]["ratio"]]
    if not cases:
        return None
    ratios = [row["best"]["ratio"] for row in cases]
    dtypes = sorted({tables.SHORT.get(row["dtype"], row["dtype"]) for row in cases}, reverse=True)
    ahead = sum(ratio >= 1 for ratio in ratios)
    return (
        f"{family}: {len(cases)} cases, {' and '.join(dtypes)}",
        f"ahead in {ahead}",
        "",
        f"median {statistics.median(ratios):.2f}×, {min(ratios):.2f} to {max(ratios):.3g}×",
        "",
    )
