"""Result rows: one JSON object a line and a case, with all that is needed to judge or repeat the measurement."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

import llmfast
from llmfast import backend
from llmfast.bench.limits import Limits

__all__ = ["append", "context", "latest", "processor", "read"]

SCHEMA = 1
PACKAGES = ("torch", "transformers", "numpy")


def context(command: str, limits: Limits | None, threads: int) -> dict:
    """What every row of a run shares: when, of which commit, where, with what, by which command."""
    info = backend.info()
    versions = {"llmfast": llmfast.__version__, "python": info["python"]}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": {
            "cpu": info["cpu"],
            "model": _processor_model(),
            "cores": _cores(),
            "memory_gb": _memory_gb(),
            "gpu": info["gpu"],
        },
        "threads": threads,
        "isa": info["isa"],
        "versions": versions,
        "command": command,
        "limits": limits.as_row() if limits else None,
    }


def append(path: Path, row: dict) -> None:
    """Adds a line to the file at `path`, which is made if absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def read(paths: Iterable[Path]) -> list[dict]:
    """All rows of the files, in order.

    Raises:
        ValueError: a line is not a row; names file and line.
    """
    rows = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error})") from None
            if not isinstance(row, dict) or row.get("schema") != SCHEMA:
                raise ValueError(f"{path}:{number}: got no row of schema {SCHEMA}")
            rows.append(row)
    return rows


def latest(rows: Iterable[dict]) -> list[dict]:
    """Of rows that measure the same on the same machine, the newest, in the place of the first."""
    newest: dict[str, dict] = {}
    for row in rows:
        what = [row[k] for k in ("machine", "threads", "isa", "kind", "case", "direction", "dtype", "dims")]
        key = json.dumps(what, sort_keys=True)
        if key not in newest or row["date"] >= newest[key]["date"]:
            newest[key] = row
    return list(newest.values())


def processor(machine: dict) -> str:
    """The processor's name, with the family and model that tell virtual machines' processors of one name apart."""
    return f"{machine['cpu']} ({machine['model']})" if machine.get("model") else machine["cpu"]


def _processor_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return None
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    found = [f"{name.split()[-1]} {fields[name]}" for name in ("cpu family", "model") if fields.get(name)]
    return ", ".join(found) or None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_gb() -> int | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (AttributeError, ValueError, OSError):
        return None


def _commit() -> str | None:
    """Of the llmfast checkout that is imported, or else is the working directory; ``+`` at the end: with changes.
    ``LLMFAST_COMMIT`` names it where the sources are a copy without their history."""
    if named := os.environ.get("LLMFAST_COMMIT"):
        return named
    for folder in (Path(llmfast.__file__).resolve().parents[1], Path.cwd()):
        if not (folder / ".git").exists() or not (folder / "csrc").is_dir():
            continue
        try:
            commit = _git(folder, "rev-parse", "HEAD").strip()
            changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
        except (OSError, subprocess.CalledProcessError):
            continue
        return commit + ("+" if changes.strip() else "")
    return None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True).stdout


def torch_threads(threads: int | None) -> int:
    """Sets the number of threads if given; returns what holds."""
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()
