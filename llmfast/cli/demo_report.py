"""The demo's report: one HTML file without any other, its loss curve drawn here as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from llmfast.cli.demo_peer import Comparison

__all__ = ["comparison_rows", "loss_curve", "write_report"]

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 760, 340
LEFT, RIGHT, TOP, BOTTOM = 60, 25, 15, 45
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 48rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top;
border-bottom: 1px solid #ddd; } .number { text-align: right;
font-variant-numeric: tabular-nums; }
pre { background: #f5f5f3; padding: .8rem; overflow-x: auto; white-space: pre-wrap; font-size: .85rem; }
svg { width: 100%; height: auto; } .note { color: #555; font-size: .9rem; } b.given { color: #06c; }
"""


def write_report(
    path: Path,
    *,
    title: str,
    summary: str,
    curve: str,
    samples: Sequence[tuple[str, str]],
    comparison: Comparison,
    machine: Sequence[tuple[str, str]],
    commands: Sequence[str],
) -> None:
    """Writes the page. `samples`: (prompt, continuation); `machine`: (name, value); `curve`: SVG."""
    texts = "".join(f"<pre><b class='given'>{escape(prompt)}</b>{escape(text)}</pre>" for prompt, text in samples)
    header, *rows = comparison_rows(comparison)
    table = "".join(f"<tr>{_cells(row, 'td')}</tr>" for row in rows)
    facts = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in machine)
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p>{escape(summary)}</p>
<h2>Loss</h2>
{curve}
<h2>Samples</h2>
<p class="note">The prompt is blue; the model wrote the rest.</p>
{texts}
<h2>Speed of a training step</h2>
<table><tr>{_cells(header, "th")}</tr>{table}</table>
<p class="note">{escape(comparison_note(comparison))}</p>
<h2>Machine</h2>
<table>{facts}</table>
<h2>Go on</h2>
<pre>{escape(chr(10).join(commands))}</pre>
</body></html>
"""
    path.write_text(page, encoding="utf-8")


def _cells(row: Sequence[str], tag: str) -> str:
    first, *rest = (escape(cell) for cell in row)
    return f"<{tag}>{first}</{tag}>" + "".join(f'<{tag} class="number">{cell}</{tag}>' for cell in rest)


def comparison_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """Header and one row a side, as text."""
    rows = [("", "tokens/s", "ms a step", "range", "of peak", "first loss")]
    autocast = "" if comparison.dtype == "float32" else " autocast"
    for name, seconds in comparison.seconds.items():
        ordered = sorted(1e3 * s for s in seconds)
        rows.append(
            (
                f"{name} {comparison.dtype}{autocast if name != 'llmfast' else ''}",
                f"{comparison.tokens_per_s(name):,.0f}",
                f"{ordered[len(ordered) // 2]:.1f}",
                f"{ordered[0]:.1f}–{ordered[-1]:.1f}",
                f"{comparison.peak_share(name):.0%}",
                f"{comparison.losses[name][0]:.4f}",
            )
        )
    return rows


def comparison_note(comparison: Comparison) -> str:
    rounds = len(comparison.seconds["llmfast"])
    note = (
        f"llmfast runs at {comparison.ratio:.2f} times the speed of eager PyTorch. Same weights, batch, threads, AdamW; "
        f"medians of {rounds} steps a side, in turns. The peak is the fastest large matrix product measured just now, "
        f"{comparison.peak_flops / 1e9:,.0f} GFLOP/s."
    )
    if not comparison.losses_agree:
        note += " The losses of the two sides DIFFER by more than rounding, so the speeds compare different results."
    return note


def loss_curve(train: Points, validation: Points, tokens_per_step: int) -> str:
    """An SVG image of the losses over steps. The training loss is drawn as recorded, and smoothed."""
    points = [*train, *validation]
    last = max((step for step, _ in points), default=1)
    low, high = min((y for _, y in points), default=0.0), max((y for _, y in points), default=1.0)
    y_ticks, x_ticks = _ticks(low, high), _ticks(0, max(1, last))
    low, high = min(low, y_ticks[0]), max(high, y_ticks[-1])

    def at(point: tuple[float, float]) -> str:
        x = LEFT + (WIDTH - LEFT - RIGHT) * point[0] / max(1, last)
        y = TOP + (HEIGHT - TOP - BOTTOM) * (high - point[1]) / (high - low or 1.0)
        return f"{x:.1f},{y:.1f}"

    grid = []
    for value in y_ticks:
        y = at((0, value)).split(",")[1]
        grid.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="#e4e4e0"/>')
        grid.append(f'<text x="{LEFT - 8}" y="{y}" dy="4" text-anchor="end">{value:g}</text>')
    for value in (tick for tick in x_ticks if tick <= last):
        x = at((value, low)).split(",")[0]
        grid.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>')
    lines = [
        _line(map(at, train), "#9ec5e8", 1),
        _line(map(at, _smoothed(train)), "#1f6fb5", 2),
        _line(map(at, validation), "#d1661d", 2),
        *(
            f'<circle cx="{x}" cy="{y}" r="3.5" fill="#d1661d"/>'
            for x, y in (at(point).split(",") for point in validation)
        ),
    ]
    middle = (LEFT + WIDTH - RIGHT) / 2
    right = f'x="{WIDTH - RIGHT}" text-anchor="end"'
    labels = [
        f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">steps of {tokens_per_step:,} tokens</text>',
        f'<text {right} y="{TOP + 14}" fill="#1f6fb5">training loss (nats a token)</text>',
        f'<text {right} y="{TOP + 32}" fill="#d1661d">validation loss</text>',
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-size="13" '
        f'font-family="system-ui, sans-serif" fill="#444"><title>Loss over training steps</title>'
        f"{''.join(grid)}{''.join(lines)}{''.join(labels)}</svg>"
    )


def _line(points: Any, colour: str, width: int) -> str:
    return f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def _smoothed(points: Points) -> list[tuple[float, float]]:
    """Mean of each point and its neighbours, a fortieth of the curve to either side."""
    reach = len(points) // 40
    out = []
    for i, (x, _) in enumerate(points):
        some = [y for _, y in points[max(0, i - reach) : i + reach + 1]]
        out.append((x, sum(some) / len(some)))
    return out


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers that cover `low` to `high`, two to eleven of them."""
    span = high - low or 1.0
    step = 10.0 ** math.floor(math.log10(span))
    step *= next(factor for factor in (0.1, 0.2, 0.5, 1.0, 2.0) if span / (step * factor) <= 9)
    first = math.floor(low / step)
    last = max(first + 1, math.ceil(high / step))
    return [round(i * step, 10) for i in range(first, last + 1)]
