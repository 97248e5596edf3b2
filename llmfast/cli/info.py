"""``llmfast info``: what this machine has, which kernels run on it, and why not the faster ones."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llmfast import backend

DTYPES = ("float32", "bfloat16", "float16")
PACKAGES = ("numpy", "tokenizers", "safetensors", "transformers", "matplotlib")
VARIABLES = ("OMP_", "KMP_", "GOMP_", "MKL_", "ATEN_CPU_CAPABILITY", "CUDA_VISIBLE_DEVICES")


@dataclass
class InfoConfig:
    """Show what this machine has, which kernels run on it, and why not the faster ones."""

    json: bool = False
    """One JSON object instead of tables."""


def main(config: InfoConfig) -> int:
    info = collect()
    if config.json:
        print(json.dumps(info, indent=2))
    else:
        show(info, Console())
    return 0


def collect() -> dict[str, Any]:
    """`backend.info`, with dispatch tables, memory, cores, package versions and environment variables; JSON-able."""
    return {
        **backend.info(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": backend.memory_bytes(),
        "memory_available_bytes": _available_memory(),
        "packages": dict(_package_versions()),
        "environment": {name: value for name, value in sorted(os.environ.items()) if _matters(name)},
        "dispatch": {op: backend.implementations(op) for op in backend.ops()},
    }


def show(info: dict[str, Any], console: Console) -> None:
    machine = Table(show_header=False, box=None, pad_edge=False)
    isa = info["isa"]
    if info["isa_detected"] not in isa:
        isa += f" (the processor has {info['isa_detected']}; capped by LLMFAST_CPU_ISA={info['isa_cap']})"
    gpu = info["gpu"] or "none"
    for name, value in (
        ("llmfast", f"{info['llmfast']}, torch {info['torch']}, Python {info['python']}, {info['platform']}"),
        ("packages", ", ".join(f"{name} {number}" for name, number in info["packages"].items())),
        ("processor", f"{info['cpu']}, {info['cores']} cores"),
        ("features", " ".join(info["cpu_features"]) or "none that llmfast uses"),
        ("instruction set", isa),
        ("threads", f"{info['threads']} of torch, {info['native_threads']} of llmfast"),
        ("memory", f"{_gib(info['memory_bytes'])}, {_gib(info['memory_available_bytes'])} available"),
        ("GPU", gpu),
        ("environment", "  ".join(f"{name}={value}" for name, value in info["environment"].items()) or "nothing set"),
    ):
        machine.add_row(f"[bold]{name}", _plain(value))
    console.print(machine)
    console.print()
    console.print(_dispatch_table("kernels", {op: info["implementations"][op] for op in info["dispatch"]}))
    if info["cuda_devices"]:
        console.print(_dispatch_table("kernels on the GPU", info["cuda_implementations"]))
    for line in _why_not_better(info):
        console.print(line, markup=False, soft_wrap=True)


def _dispatch_table(title: str, chosen: dict[str, dict[str, str | None]]) -> Table:
    """What each op runs on for each dtype."""
    table = Table("op", *DTYPES, title=title, title_justify="left")
    for op, rows in chosen.items():
        table.add_row(op, *(rows[dtype] or "plain torch" for dtype in DTYPES))
    return table


def _why_not_better(info: dict[str, Any]) -> Iterator[str]:
    """A line for each reason that keeps rows of the dispatch tables from being used."""
    held_back: dict[tuple[str, str], list[str]] = {}
    having: dict[str, int] = {}
    for op, rows in info["dispatch"].items():
        for row in rows:
            having[row["isa"]] = having.get(row["isa"], 0) + 1
            if not row["available"]:
                held_back.setdefault((row["isa"], row["why_not"]), []).append(op)
    for (isa, why), ops in held_back.items():
        which = f"the {len(ops)} ops that have {isa} kernels" if len(ops) == having[isa] else ", ".join(ops)
        yield f"not {isa}: {why} ({which})"


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"


def _package_versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def _matters(name: str) -> bool:
    return name.startswith(("LLMFAST_", *VARIABLES))


def _available_memory() -> int | None:
    if platform.system() != "Linux":
        return None
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
    return None if free is None else min(free, backend.memory_bytes() or free)
