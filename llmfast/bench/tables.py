"""Rows for people: the same columns in the terminal and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rich.table import Table
from rich.text import Text

from llmfast.bench import scale
from llmfast.bench.rows import processor

__all__ = [
    "COLUMNS",
    "SCALE_COLUMNS",
    "cells",
    "count",
    "headline",
    "markdown",
    "problems",
    "share",
    "significant",
    "terminal",
    "trend_lines",
]

COLUMNS = ("what", "dtype", "size", "llmfast", "best of the others", "ratio", "of limit", "notes")
SCALE_COLUMNS = ("sweep", "size", "llmfast tokens/s", "best of the others", "ratio", "MFU", "memory, MB", "notes")
IN_CACHE = 1.5  # a copy this much faster than the slowest is one within the caches
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
    mine = milliseconds(ours)
    if ours.get("tokens_per_s"):
        mine += f", {ours['tokens_per_s']:,.0f} tokens/s"
    return (
        what,
        SHORT.get(row["dtype"], row["dtype"]),
        size(row["dims"]),
        mine,
        peer,
        ratio,
        share(row, ours),
        notes(row),
    )


def scale_cells(row: dict) -> tuple[str, ...]:
    """A point of a sweep, in the order of `SCALE_COLUMNS`."""
    providers, best, dims = row["providers"], row["best"], row["dims"]
    ours, peer = providers.get("llmfast", {}), providers.get(best["peer"] or "", {})

    def speed(provider: dict) -> str:
        return f"{provider['tokens_per_s']:,.0f}" if provider.get("tokens_per_s") else provider.get("status", "–")

    rest = {name: value for name, value in dims.items() if name not in ("sweep", "parameters")}
    text = f"{size({'parameters': dims['parameters']})} {size(rest)}" + (
        f" threads={row['threads']}" if dims["sweep"] == "threads" else ""
    )
    memory = " vs ".join(f"{p['memory_mb']:,.0f}" for p in (ours, peer) if p.get("memory_mb"))
    return (
        scale.SWEEPS[dims["sweep"]],
        text,
        speed(ours),
        f"{speed(peer)} {best['peer']}" if best["peer"] else "–",
        f"{best['ratio']:.2f}×" if best["ratio"] else "–",
        share(row, ours).removesuffix(" compute"),
        memory or "–",
        notes(row, memory=False),
    )


def trend_lines(rows: Sequence[dict]) -> list[str]:
    """The fitted power laws of all sweeps, in words."""
    lines = []
    found = scale.trends(rows)
    for (sweep, provider, what), trend in found.items():
        if what == "tokens_per_s":
            text = f"{scale.SWEEPS[sweep]}: {provider} tokens/s ∝ x^{trend.exponent:.2f} {_residual(trend)}"
            memory = found.get((sweep, provider, "memory_mb"))
            if memory:
                text += f", memory ∝ x^{memory.exponent:.2f} {_residual(memory)}"
            lines.append(text)
    return lines


def _residual(trend: scale.Trend) -> str:
    return f"(±{100 * (trend.residual - 1):.0f}%, {trend.points} points)"


def share(row: dict, provider: dict) -> str:
    """How much of the limit, or why that is not known."""
    value, limits = provider.get("share"), row.get("limits")
    if not value or not limits:
        return "–"
    if row["limit"] == "memory" and row.get("bytes"):
        copy = {int(size): speed for size, speed in limits["copy_gbs"].items()}
        speed = copy[max((size for size in copy if size <= row["bytes"]), default=min(copy))]
        if speed > IN_CACHE * copy[max(copy)]:
            return "– (in cache)"
    if value > 1:
        return f"– (above 100% {row['limit']})"
    return f"{100 * value:.0f}% {row['limit']}"


def milliseconds(provider: dict) -> str:
    """Median and half the interquartile range, or what happened instead."""
    if "median_ms" not in provider:
        return provider.get("status", "not run")
    median, spread = provider["median_ms"], provider["iqr_ms"] / 2
    if provider["samples"] == 1:
        return f"{significant(median)} ms"
    return f"{significant(median)} ± {significant(spread, 2)} ms"


def size(dims: dict) -> str:
    parts = []
    for name, value in dims.items():
        if value is True:
            parts.append(name)
        elif name in ("model", "activation"):
            parts.append(str(value))
        elif name in ("parameters", "tensors"):
            parts.append(f"{count(value)} {name}")
        else:
            parts.append(f"{name}={value}")
    return " ".join(parts)


def count(value: float) -> str:
    return f"{value / 1e9:.1f}B" if value >= 1e9 else f"{value / 1e6:.0f}M" if value >= 1e6 else f"{value:g}"


def notes(row: dict, memory: bool = True) -> str:
    """What a reader must know before believing the line."""
    found = []
    used = {}
    for name, provider in row["providers"].items():
        if provider["status"] in ("timeout", "skipped"):
            found.append(f"{name}: {provider['note']}")
        elif provider["status"] in ("wrong", "error"):
            found.append(f"{name}: {provider['status']} ({provider.get('note') or 'breaks the error rule'})")
        elif provider["status"] == "ok" and provider.get("note"):
            found.append(f"{name}: {provider['note']}")
        if provider.get("fell_back"):
            found.append(f"{name} fell back: {provider['fell_back']}")
        if provider.get("memory_mb") is not None and name in (row["best"]["llmfast"], row["best"]["peer"]):
            used[name] = provider["memory_mb"]
    if memory and len(used) == 2:
        found.append(" vs ".join(f"{value:,.0f}" for value in used.values()) + " MB")
    return "; ".join(dict.fromkeys(found))


def problems(rows: Sequence[dict]) -> list[str]:
    """Cases in which llmfast is wrong or failed."""
    return [
        f"{row['case']} {row['direction']} {row['dtype']} {size(row['dims'])}, {name}: {provider['status']}"
        + (f" ({provider['note']})" if provider.get("note") else "")
        for row in rows
        for name, provider in row["providers"].items()
        if provider["ours"] and provider["status"] not in ("ok", "skipped")
    ]


def headline(row: dict) -> str:
    """The machine, the software and the measured limits of a run, in one line."""
    machine, versions = row["machine"], row["versions"]
    text = f"{processor(machine)}, {row['threads']} threads, {row['isa']}; torch {versions['torch']}"
    if versions.get("transformers"):
        text += f", transformers {versions['transformers']}"
    limits = row["limits"]
    if limits:
        flops = ", ".join(f"{value:,.0f} GFLOP/s {SHORT.get(name, name)}" for name, value in limits["gflops"].items())
        copy = list(limits["copy_gbs"].values())[-1]
        text += f". Measured limits: {flops}; copy {copy:.0f} GB/s, read {limits['read_gbs']:.0f} GB/s"
    return text


def terminal(rows: Sequence[dict], title: str) -> Table:
    """A table for rows that are all points of sweeps, or none of them."""
    columns, cells_of = _layout(rows)
    table = Table(title=title, title_justify="left", header_style="bold", show_lines=False)
    for column in columns:
        number = column in ("ratio", "of limit", "MFU", "llmfast tokens/s")
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        line = [Text(cell) for cell in cells_of(row)]
        ratio = row["best"]["ratio"]
        if ratio:
            line[columns.index("ratio")].stylize("green" if ratio >= 1 else "red")
        table.add_row(*line)
    return table


def markdown(rows: Sequence[dict]) -> str:
    """The same in Markdown; under it what the rows' notes say."""
    columns, cells_of = _layout(rows)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells_of(row)) + " |" for row in rows]
    notes = dict.fromkeys(row["note"] for row in rows if row.get("note"))
    return "\n".join([*lines, *(f"\nNote: {note}." for note in notes)])


def _layout(rows: Sequence[dict]) -> tuple[tuple[str, ...], Callable[[dict], tuple[str, ...]]]:
    scaled = any(row["kind"] == "scale" for row in rows)
    return (SCALE_COLUMNS, scale_cells) if scaled else (COLUMNS, cells)


def significant(value: float, digits: int = 3) -> str:
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"
