"""Rows measured on a GPU (`benchmarks/gpu`) as a table in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from llmfast.bench import tables

__all__ = ["COLUMNS", "cells", "headline", "markdown"]

COLUMNS = ("what", "size", "llmfast", "best of the others", "ratio", "rate", "of limit", "the others")


def rate(provider: dict) -> str:
    """In the unit of the limit that the case is near."""
    if provider.get("tokens_per_s"):
        text = f"{provider['tokens_per_s']:,.0f} tokens/s"
        return text + (f", {provider['tflops']:.0f} TFLOP/s" if provider.get("tflops") else "")
    if provider.get("tflops"):
        return f"{provider['tflops']:.0f} TFLOP/s"
    return f"{provider['gb_per_s']:,.0f} GB/s" if provider.get("gb_per_s") else "–"


def milliseconds(provider: dict) -> str:
    if "median_ms" not in provider:
        return provider.get("status", "not run")
    return f"{tables.significant(provider['median_ms'])} ms"


def cells(row: dict) -> tuple[str, ...]:
    """One row's cells, in the order of `COLUMNS`."""
    providers, best = row["providers"], row["best"]
    ours = providers.get(best["llmfast"] or "llmfast", {})
    what = row["case"] if row["direction"] in ("step", "forward") else f"{row['case']}, {row['direction']}"
    others = [
        f"{name} {milliseconds(entry)}"
        for name, entry in providers.items()
        if not entry.get("ours") and name != best["peer"] and "median_ms" in entry
    ]
    note = " (fell back)" if ours.get("fell_back") else ""
    return (
        what,
        " ".join(
            f"{name}={value}" if name != "parameters" else tables.count(value) for name, value in row["dims"].items()
        ),
        milliseconds(ours) + note,
        f"{milliseconds(providers[best['peer']])} {best['peer']}" if best["peer"] else "–",
        f"{best['ratio']:.2f}×" if best["ratio"] else "–",
        rate(ours),
        f"{100 * ours['share']:.0f}%" if ours.get("share") else "–",
        ", ".join(others) or "–",
    )


def headline(row: dict) -> str:
    """The device, the software and the measured limits of a run, in one line."""
    versions, limits = row["versions"], row["limits"]
    text = f"{row['machine']['gpu']}; torch {versions['torch']}, CUDA {row['cuda']}"
    if versions.get("transformers"):
        text += f", transformers {versions['transformers']}"
    copy, product = limits["copy_bytes_per_s"] / 1e12, limits["product_flops_per_s"] / 1e12
    return text + f". Measured limits: bf16 product {product:.0f} TFLOP/s, device copy {copy:.2f} TB/s"


def markdown(rows: Sequence[dict]) -> str:
    """One table; all rows are of one run, in bfloat16. Under it what its rows' notes say."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells(row)) + " |" for row in rows]
    notes = dict.fromkeys(row["note"] for row in rows if row.get("note"))
    return "\n".join([*lines, *(f"\nNote: {note}." for note in notes)])
