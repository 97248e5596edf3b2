"""Rows for people: the same columns in the terminal and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

__all__ = ["COLUMNS", "cells", "headline", "markdown", "problems", "terminal"]

COLUMNS = ("what", "dtype", "size", "llmfast", "best of the others", "ratio", "of limit", "notes")
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def cells(row: dict) -> tuple[str, ...]:
    """One row's cells, in the order of `COLUMNS`."""
    providers, best = row["providers"], row["best"]
    ours = providers.get(best["llmfast"] or "llmfast", {})
    what = row["case"] if row["direction"] in ("step", "forward") else f"{row['case']} {row['direction']}"
    peer = "–"
    if best["peer"]:
        peer = f"{milliseconds(providers[best['peer']])} {best['peer']}"
    ratio = f"{best['ratio']:.2f}×" if best["ratio"] else "–"
    share = f"{100 * ours['share']:.0f}% {row['limit']}" if ours.get("share") else "–"
    mine = milliseconds(ours)
    if ours.get("tokens_per_s"):
        mine += f", {ours['tokens_per_s']:,.0f} tokens/s"
    return what, SHORT.get(row["dtype"], row["dtype"]), size(row["dims"]), mine, peer, ratio, share, notes(row)


def milliseconds(provider: dict) -> str:
    """Median and half the interquartile range, or what happened instead."""
    if "median_ms" not in provider:
        return provider.get("status", "not run")
    median, spread = provider["median_ms"], provider["iqr_ms"] / 2
    if provider["samples"] == 1:
        return f"{_significant(median)} ms"
    return f"{_significant(median)} ± {_significant(spread, 2)} ms"


def size(dims: dict) -> str:
    parts = []
    for name, value in dims.items():
        if value is True:
            parts.append(name)
        elif name in ("model", "activation"):
            parts.append(str(value))
        elif name in ("parameters", "tensors"):
            parts.append(f"{value / 1e6:.0f}M {name}" if value >= 1e6 else f"{value} {name}")
        else:
            parts.append(f"{name}={value}")
    return " ".join(parts)


def notes(row: dict) -> str:
    """What a reader must know before believing the line."""
    found = []
    memory = {}
    for name, provider in row["providers"].items():
        if provider["status"] == "timeout":
            found.append(f"{name}: {provider['note']}")
        elif provider["status"] in ("wrong", "error"):
            found.append(f"{name}: {provider['status']} ({provider.get('note') or 'breaks the error rule'})")
        elif provider["status"] == "ok" and provider.get("note"):
            found.append(f"{name}: {provider['note']}")
        if provider.get("fell_back"):
            found.append(f"{name} fell back: {provider['fell_back']}")
        if provider.get("memory_mb") is not None and name in (row["best"]["llmfast"], row["best"]["peer"]):
            memory[name] = provider["memory_mb"]
    if len(memory) == 2:
        found.append(" vs ".join(f"{memory[name]:,.0f}" for name in memory) + " MB")
    return "; ".join(found)


def problems(rows: Sequence[dict]) -> list[str]:
    """Cases in which llmfast is wrong or failed."""
    return [
        f"{row['case']} {row['direction']} {row['dtype']} {size(row['dims'])}, {name}: {provider['status']}"
        + (f" ({provider['note']})" if provider.get("note") else "")
        for row in rows
        for name, provider in row["providers"].items()
        if provider["ours"] and provider["status"] != "ok"
    ]


def headline(row: dict) -> str:
    """The machine, the software and the measured limits of a run, in one line."""
    machine, versions = row["machine"], row["versions"]
    text = f"{machine['cpu']}, {row['threads']} threads, {row['isa']}; torch {versions['torch']}"
    if versions.get("transformers"):
        text += f", transformers {versions['transformers']}"
    limits = row["limits"]
    if limits:
        flops = ", ".join(f"{value:,.0f} GFLOP/s {SHORT.get(name, name)}" for name, value in limits["gflops"].items())
        copy = list(limits["copy_gbs"].values())[-1]
        text += f". Measured limits: {flops}; copy {copy:.0f} GB/s, read {limits['read_gbs']:.0f} GB/s"
    return text


def terminal(rows: Sequence[dict], title: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", show_lines=False)
    for column in COLUMNS:
        number = column in ("ratio", "of limit")
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        line = [Text(cell) for cell in cells(row)]
        ratio = row["best"]["ratio"]
        if ratio:
            line[COLUMNS.index("ratio")].stylize("green" if ratio >= 1 else "red")
        table.add_row(*line)
    return table


def markdown(rows: Sequence[dict]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells(row)) + " |" for row in rows]
    return "\n".join(lines)


def _significant(value: float, digits: int = 3) -> str:
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"
