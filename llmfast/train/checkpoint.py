"""Checkpoints: folders that appear whole, say what they belong to, and are checked byte for byte before use.

    RUN/checkpoints/
      latest, best                  name of the newest checkpoint, and of the one with the lowest validation loss
      step-000100/
        model.safetensors           weights; the float32 master copies where the model computes in bfloat16
        config.json, tokenizer      what the weights belong to, so that the folder can be used on its own
        optimizer.safetensors       the other state of AdamW: NAME.exp_avg, NAME.exp_avg_sq, NAME.step
        state.json                  step, data position, random states, and what a continuing run must share
        checksums.json              size and BLAKE2b-128 of all of the above

A checkpoint is written into a temporary folder, synced to the disk, and renamed; pointers are replaced atomically. A
process killed at any moment leaves the earlier checkpoints and at most a temporary folder, which the next run removes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llmfast.data import Tokenizer, load_tokenizer
from llmfast.data.files import atomic_file, new_digest, write_json
from llmfast.models import GPT, GPTConfig
from llmfast.models.memory import uninitialised

__all__ = [
    "CheckpointError",
    "check_identity",
    "find_checkpoint",
    "load_model",
    "read_checkpoint",
    "remove_leftovers",
    "restore",
    "save_checkpoint",
]

FORMAT = 1
FOLDER = "checkpoints"
MODEL_FILE, OPTIMIZER_FILE, CONFIG_FILE = "model.safetensors", "optimizer.safetensors", "config.json"
STATE_FILE, CHECKSUMS_FILE = "state.json", "checksums.json"
MASTER = "master"  # state of AdamW that goes into MODEL_FILE
_NAME = re.compile(r"step-(\d{6,})")
_TEMPORARY = ".tmp-"


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or belongs to another run; the message names the file or field."""


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def save_checkpoint(
    run: Path,
    *,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer | None,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write ``RUN/checkpoints/step-NNNNNN`` for ``state["step"]``, point ``latest`` (and ``best``) at it, and remove
    what is older than the last `keep` but not the best.

    `state` is JSON-able; ``state["best"]`` is None or ``{"step", "loss"}``. A checkpoint of the same step is replaced.

    Raises:
        OSError: it cannot be written (a full disk, say); what had been written of it is removed.
    """
    folder = run / FOLDER
    target = folder / checkpoint_name(state["step"])
    temporary = folder / f"{_TEMPORARY}{target.name}"
    _remove(temporary)
    temporary.mkdir(parents=True)
    try:
        _write(temporary, model, optimizer, tokenizer, state)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{target} cannot be written ({error})") from error
    if target.exists():  # of a run that was resumed from an earlier checkpoint
        _remove(target)
    os.rename(temporary, target)
    _sync(folder)
    point(run, "latest", target.name)
    if state["best"] is not None and state["best"]["step"] == state["step"]:
        point(run, "best", target.name)
    _prune(folder, state, keep)
    return target


def _write(
    temporary: Path,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer | None,
    state: dict[str, Any],
) -> None:
    """Write all files of a checkpoint into the folder `temporary` and sync them to the disk."""
    weights, optimizer_tensors = _tensors(model, optimizer)
    save_file(weights, temporary / MODEL_FILE, metadata={"format": "pt"})
    save_file(optimizer_tensors, temporary / OPTIMIZER_FILE)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    description = {"model_type": "llmfast", "dtype": dtype, **dataclasses.asdict(model.config)}
    write_json(temporary / CONFIG_FILE, description)
    write_json(temporary / STATE_FILE, {"format": FORMAT, **state, "rng": _random_states()})
    if tokenizer is not None:
        tokenizer.save(temporary)
    files = sorted(temporary.iterdir())
    write_json(temporary / CHECKSUMS_FILE, {file.name: _digest(file) for file in files})
    for path in (*files, temporary):
        _sync(path)


def point(run: Path, pointer: str, name: str) -> None:
    """Make ``checkpoints/POINTER`` name a checkpoint, atomically."""
    with atomic_file(run / FOLDER / pointer) as file:
        file.write(name.encode() + b"\n")


def _tensors(model: GPT, optimizer: torch.optim.Optimizer) -> tuple[dict, dict]:
    weights, optimizer_tensors = {}, {}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        weights[name] = state.get(MASTER, parameter.detach().float()).contiguous()
        for key, value in state.items():
            if key != MASTER:
                optimizer_tensors[f"{name}.{key}"] = value.contiguous()
    return weights, optimizer_tensors


def _random_states() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": bytes(torch.get_rng_state().numpy()).hex(),
        "python": [version, list(words), gauss],
        "numpy": [kind, keys.tolist(), *rest],
    }


def _digest(file: Path) -> dict[str, Any]:
    digest = new_digest()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return {"bytes": file.stat().st_size, "blake2b": digest.hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """Remove a folder so that a kill in between never leaves half a checkpoint under a checkpoint's name."""
    if folder.exists():
        doomed = folder
        if not folder.name.startswith(_TEMPORARY):
            doomed = folder.with_name(f"{_TEMPORARY}removed-{folder.name}")
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(folder, doomed)
        shutil.rmtree(doomed)


def _prune(folder: Path, state: dict[str, Any], keep: int) -> None:
    """Checkpoints of later steps, left by a run that was resumed from an earlier one, are not counted nor touched."""
    steps = [step for step in _steps(folder) if step <= state["step"]]
    best = state["best"] and state["best"]["step"]
    for step in steps[:-keep]:
        if step != best:
            _remove(folder / checkpoint_name(step))


def _steps(folder: Path) -> list[int]:
    names = (_NAME.fullmatch(path.name) for path in folder.glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


def remove_leftovers(run: Path) -> None:
    """Remove temporary folders and files that a killed run left among the checkpoints."""
    for path in (run / FOLDER).glob(".*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def find_checkpoint(path: str | os.PathLike, argument: str = "resume") -> Path | None:
    """The checkpoint that `path` means: itself, or the latest of a run; None if the run has none.

    `argument` is what messages call `path`.

    Raises:
        FileNotFoundError: `path` is neither. CheckpointError: ``latest`` names a checkpoint that is not there.
    """
    path = Path(path)
    if path.name != FOLDER and (path / FOLDER).is_dir():
        path = path / FOLDER
    if _NAME.fullmatch(path.name) and path.is_dir():
        return path
    if path.name != FOLDER or not path.is_dir():
        raise FileNotFoundError(f"{argument}: got {str(path)!r}, expected the folder of a run or of a checkpoint")
    steps = _steps(path)
    if not (path / "latest").exists():  # killed between its first checkpoint and the pointer to it
        return path / checkpoint_name(steps[-1]) if steps else None
    latest = path / (path / "latest").read_text(errors="replace").strip()
    if not _NAME.fullmatch(latest.name) or not latest.is_dir():
        raise CheckpointError(f"{path / 'latest'}: names {latest.name!r}, which is not there{_others(path, latest)}")
    return latest


def _others(folder: Path, failed: Path) -> str:
    names = [checkpoint_name(step) for step in _steps(folder) if checkpoint_name(step) != failed.name]
    return f". Other checkpoints of this run: {', '.join(str(folder / name) for name in names)}" if names else ""


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """The content of ``state.json``, after comparing every file of the checkpoint with its checksum.

    Raises:
        CheckpointError: a file is missing, truncated, changed or not readable; names it, and other checkpoints to use.
    """
    try:
        _verify(checkpoint)
        state = json.loads((checkpoint / STATE_FILE).read_bytes())
        if state.get("format") != FORMAT:
            found = state.get("format")
            raise CheckpointError(f"{checkpoint / STATE_FILE}: format {found}, this llmfast reads {FORMAT}")
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_others(checkpoint.parent, checkpoint)}") from None
    return state


def _verify(checkpoint: Path) -> None:
    sums = checkpoint / CHECKSUMS_FILE
    if not sums.is_file():
        raise CheckpointError(f"{sums}: missing; the checkpoint is not whole")
    try:
        expected = {name: (entry["bytes"], entry["blake2b"]) for name, entry in json.loads(sums.read_bytes()).items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{sums}: not readable; the file is corrupt") from None
    for name in (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE, CONFIG_FILE):
        if name not in expected:
            raise CheckpointError(f"{sums}: does not list {name}; the file is corrupt")
    for name, (size, digest) in expected.items():
        file = checkpoint / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing; expected {size:,} bytes")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file}: {file.stat().st_size:,} bytes, expected {size:,}; the file is truncated")
        if (found := _digest(file)["blake2b"]) != digest:
            raise CheckpointError(f"{file}: checksum {found}, expected {digest}; the file is corrupt")


def check_identity(checkpoint: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse a checkpoint of another training run.

    Raises:
        CheckpointError: names each field that differs, with what the checkpoint has and what this run has.
    """
    differing = [name for name in {**saved, **current} if saved.get(name) != current.get(name)]
    if not differing:
        return
    lines = [
        f"  {name}: the checkpoint has {saved.get(name)!r}, this run has {current.get(name)!r}" for name in differing
    ]
    if "schedule_steps" in differing:
        lines.append(f"  (to train longer on the same schedule: --schedule-steps {saved.get('schedule_steps')})")
    raise CheckpointError(f"{checkpoint}: belongs to another run; these differ:\n" + "\n".join(lines))


def restore(checkpoint: Path, state: dict[str, Any], model: GPT, optimizer: torch.optim.Optimizer) -> None:
    """Put weights, optimiser state and random states in place, bit for bit, after `read_checkpoint` and
    `check_identity`.

    Raises:
        CheckpointError: a tensor is missing, too many, or of another shape.
    """
    weights = load_file(checkpoint / MODEL_FILE)
    optimizer_tensors = load_file(checkpoint / OPTIMIZER_FILE)
    _load_weights(model, weights, checkpoint / MODEL_FILE)
    for name, parameter in model.named_parameters():
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in optimizer_tensors]
        # cloned: what load_file gives is a view of the file, which may be pruned and is not aligned
        values = {key: optimizer_tensors.pop(f"{name}.{key}").clone() for key in keys}
        values = {key: value if key == "step" else value.to(parameter.device) for key, value in values.items()}
        for key, value in values.items():
            if key != "step" and value.shape != parameter.shape:
                shapes = f"shape {tuple(value.shape)}, expected {tuple(parameter.shape)}"
                raise CheckpointError(f"{checkpoint / OPTIMIZER_FILE}: {name}.{key} has {shapes}")
        if values and parameter.dtype != torch.float32:
            values[MASTER] = weights[name].to(parameter.device, copy=True)
        if values:
            optimizer.state[parameter] = values
    if optimizer_tensors:
        raise CheckpointError(f"{checkpoint / OPTIMIZER_FILE}: unknown tensors {', '.join(sorted(optimizer_tensors))}")
    rng = state["rng"]
    torch.set_rng_state(torch.tensor(list(bytes.fromhex(rng["torch"])), dtype=torch.uint8))
    random.setstate((rng["python"][0], tuple(rng["python"][1]), rng["python"][2]))
    np.random.set_state(tuple(rng["numpy"]))


@torch.no_grad()
def _load_weights(model: GPT, weights: dict[str, torch.Tensor], file: Path) -> None:
    parameters = dict(model.named_parameters())
    if missing := parameters.keys() - weights.keys():
        raise CheckpointError(f"{file}: lacks {', '.join(sorted(missing))}")
    if unknown := weights.keys() - parameters.keys():
        raise CheckpointError(f"{file}: holds unknown tensors {', '.join(sorted(unknown))}")
    for name, parameter in parameters.items():
        if weights[name].shape != parameter.shape:
            got, expected = tuple(weights[name].shape), tuple(parameter.shape)
            raise CheckpointError(f"{file}: {name} has shape {got}, expected {expected}")
        parameter.copy_(weights[name])  # from float32 to bfloat16 this rounds as the optimiser does


def load_model(path: str | os.PathLike, dtype: torch.dtype | None = None) -> tuple[GPT, Tokenizer | None]:
    """The model and tokenizer of a run (its latest checkpoint) or of one checkpoint, every file checked.

    `dtype` of the parameters; default: what the run computed in.

    Raises:
        FileNotFoundError: there is no checkpoint. CheckpointError: it is damaged.

    Example:
        >>> model, tokenizer = load_model("runs/shakespeare")
    """
    checkpoint = find_checkpoint(path, "path")
    if checkpoint is None:
        raise FileNotFoundError(f"{path}: the run has no checkpoint yet")
    read_checkpoint(checkpoint)
    description = json.loads((checkpoint / CONFIG_FILE).read_bytes())
    del description["model_type"]
    saved_dtype = getattr(torch, description.pop("dtype"))
    model = uninitialised(GPT, GPTConfig(**description), dtype or saved_dtype)
    _load_weights(model, load_file(checkpoint / MODEL_FILE), checkpoint / MODEL_FILE)
    has_tokenizer = any((checkpoint / name).is_file() for name in ("tokenizer.json", "llmfast_tokenizer.json"))
    return model, load_tokenizer(checkpoint) if has_tokenizer else None
