"""Rows as pictures (PNG); needs matplotlib, the extra ``plot``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmfast.bench import scale, tables

__all__ = ["write"]

PANELS = {
    "tokens_per_s": "tokens/s",
    "share": "share of the measured compute limit (MFU)",
    "memory_mb": "peak memory, MB",
}


def write(rows: Sequence[dict], folder: Path) -> list[Path]:
    """One picture for each sweep among the rows, and one of all ops' and models' ratios; returns their paths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'llmfast[plot]'") from None
    matplotlib.use("Agg")  # files only: no display
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    scaled = [row for row in rows if row["kind"] == "scale"]
    for sweep in scale.SWEEPS:
        part = [row for row in scaled if row["dims"]["sweep"] == sweep]
        if sum(bool(row["best"]["llmfast"]) for row in part) > 1:
            written.append(_sweep(part, sweep, folder / f"scale-{sweep}.png"))
    compared = [row for row in rows if row["kind"] != "scale" and row["best"]["ratio"]]
    if compared:
        written.append(_ratios(compared, folder / "ratios.png"))
    return written


def _sweep(rows: Sequence[dict], sweep: str, path: Path) -> Path:
    """Measured points, and the fitted power laws as thin lines."""
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    trends = scale.trends(rows)
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(15, 4.5), layout="constrained")
    for axis, (what, label) in zip(axes, PANELS.items()):
        for i, provider in enumerate(scale.providers_of(rows)):
            xs, ys = scale.series(rows, sweep, provider, what)
            if not xs:
                continue
            axis.plot(xs, ys, "o-", color=f"C{i}", label=provider)
            trend = trends.get((sweep, provider, what))
            if trend:
                axis.plot(xs, [trend(x) for x in xs], ":", color=f"C{i}", label=f"∝ x^{trend.exponent:.2f}")
        ticks = sorted({row["x"] for row in rows})
        axis.set_xscale("log")
        axis.set_xticks(ticks, [tables.count(x) for x in ticks], minor=False)
        axis.xaxis.set_minor_formatter(NullFormatter())
        if what == "share":
            axis.set_ylim(0, 1)
        else:
            axis.set_yscale("log")
        axis.set_xlabel(scale.SWEEPS[sweep])
        axis.set_ylabel(label)
        axis.grid(True, which="both", alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    figure.suptitle(
        f"Training step ({rows[0]['dtype']}) over {scale.SWEEPS[sweep]}: {tables.headline(rows[0])}", fontsize=9
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _ratios(rows: Sequence[dict], path: Path) -> Path:
    from matplotlib import pyplot

    names = [" ".join(tables.cells(row)[:3]) for row in rows]
    ratios = [row["best"]["ratio"] for row in rows]
    figure, axis = pyplot.subplots(figsize=(11, 1.5 + 0.28 * len(rows)), layout="constrained")
    bars = axis.barh(names, ratios, color=["C0" if ratio >= 1 else "C3" for ratio in ratios])
    axis.bar_label(bars, labels=[f"{ratio:.2f}×" for ratio in ratios], padding=3, fontsize="small")
    axis.axvline(1, color="black", linewidth=0.8)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("speed of llmfast over the best of the others")
    axis.tick_params(axis="y", labelsize="small")
    axis.set_title(tables.headline(rows[0]), fontsize=8, loc="right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
