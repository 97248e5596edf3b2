"""`GPT` from and to the files of others: Hugging Face folders and GGUF, tensor by tensor.

The parameters are allocated once, in their final dtype; each tensor of a file is read, copied into its rows and dropped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmfast.models.config import GPTConfig
from llmfast.models.hf_config import config_from_hf, config_to_hf
from llmfast.models.memory import uninitialised
from llmfast.models.tensor_names import GPT2, LLAMA, PHI3, Part, parts

if TYPE_CHECKING:
    from llmfast.data import Tokenizer
    from llmfast.models.gpt import GPT

__all__ = ["load_pretrained", "save_pretrained"]

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Tables that older transformers saved beside the weights; they follow from the configuration.
_TABLES = re.compile(r".*\.(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)")
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


class TensorFiles(Protocol):
    """Tensors by name, read one at a time."""

    path: Path

    def names(self) -> set[str]: ...

    def read(self, name: str) -> Tensor: ...


def load_pretrained(path: str | os.PathLike, dtype: torch.dtype | None, cls: type[GPT]) -> GPT:
    """See `GPT.from_pretrained`; `cls` is the class to make."""
    path = Path(path)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype}, expected torch.float32, torch.bfloat16 or torch.float16")
    if (file := gguf_file(path)) is not None:
        from llmfast.models.gguf import GGUFModel

        source = GGUFModel(file)
        return _model(cls, source.config, dtype or source.dtype, source.parts(), source)
    if not (path / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"path: got {str(path)!r}, expected a folder with {CONFIG_FILE} or a .gguf file")
    try:
        description = json.loads((path / CONFIG_FILE).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path / CONFIG_FILE}: not JSON ({error})") from None
    files = SafetensorsFolder(path)
    if description.get("model_type") == "llmfast":
        config, table = _own(description, files)
    else:
        config, table = _huggingface(path, description, files)
    return _model(cls, config, dtype or _stored_dtype(description, files), table, files)


def gguf_file(path: Path) -> Path | None:
    """`path` itself or the only one in that folder, if it is a GGUF file and the folder has no ``config.json``."""
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"path: got {str(path)!r}, which is not there")
        return path
    if not path.is_dir() or (path / CONFIG_FILE).is_file():
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise ValueError(f"path: {path} holds {len(found)} .gguf files, expected one; name it")
    return found[0] if found else None


class SafetensorsFolder:
    """``model.safetensors``, or the shards that ``model.safetensors.index.json`` lists."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self._open: dict[str, Any] = {}
        index = folder / INDEX_FILE
        if (folder / WEIGHTS_FILE).is_file():
            self._file_of = dict.fromkeys(self._handle(WEIGHTS_FILE).keys(), WEIGHTS_FILE)
        elif index.is_file():
            try:
                self._file_of = dict(json.loads(index.read_bytes())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{index}: not readable ({error!r})") from None
            for name in set(self._file_of.values()):
                if Path(name).name != name:
                    raise ValueError(f"{index}: names {name!r}, expected files of this folder")
        else:
            other = next((file.name for file in folder.glob("pytorch_model*.bin*")), None)
            hint = f"; {other} is in torch's pickle format, save it as safetensors first" if other else ""
            if (folder / "checkpoints").is_dir():
                hint = "; it is a run of llmfast, name one of the folders in its checkpoints"
            raise FileNotFoundError(f"{folder}: holds neither {WEIGHTS_FILE} nor {INDEX_FILE}{hint}")

    def _handle(self, file: str):
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.path / file, framework="pt")
            except FileNotFoundError:
                raise FileNotFoundError(f"{self.path / file}: missing; {INDEX_FILE} lists it") from None
            except Exception as error:  # the library's SafetensorError is a bare Exception
                raise ValueError(f"{self.path / file}: not a whole safetensors file ({error})") from None
        return self._open[file]

    def names(self) -> set[str]:
        return set(self._file_of)

    def read(self, name: str) -> Tensor:
        handle = self._handle(self._file_of[name])
        try:
            return handle.get_tensor(name)
        except Exception as error:
            raise ValueError(f"{self.path / self._file_of[name]}: cannot read {name} ({error})") from None


def _own(description: dict[str, Any], files: SafetensorsFolder) -> tuple[GPTConfig, dict[str, list[Part]]]:
    """A checkpoint of llmfast, which calls its tensors as the model does."""
    fields = {name: value for name, value in description.items() if name not in ("model_type", "dtype")}
    config = GPTConfig(**fields)
    with torch.device("meta"):
        from llmfast.models.gpt import GPT

        shapes = {name: parameter.shape[0] for name, parameter in GPT(config).named_parameters()}
    return config, {name: [Part(name, rows)] for name, rows in shapes.items()}


def _huggingface(
    folder: Path, description: dict[str, Any], files: SafetensorsFolder
) -> tuple[GPTConfig, dict[str, list[Part]]]:
    try:
        config = config_from_hf(description)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from None
    gpt2 = description["model_type"] == "gpt2"
    phi3 = description["model_type"] == "phi3"
    names, base = (GPT2, "transformer.") if gpt2 else (PHI3 if phi3 else LLAMA, "model.")
    present = files.names()
    if not any(name.startswith(base) for name in present):  # saved from the model without its head
        names = {role: name.removeprefix(base) for role, name in names.items()}
    # As transformers decides: a head that is there and differs is not tied, whatever the field says.
    if config.tie_embeddings and names["head"] in present:
        tied = torch.equal(files.read(names["head"]), files.read(names["embedding"]))
        config = config.replace(tie_embeddings=tied)
    return config, parts(config, names, transposed=gpt2)


def _stored_dtype(description: dict[str, Any], files: SafetensorsFolder) -> torch.dtype:
    """What ``config.json`` names, else the dtype of the first tensor."""
    name = description.get("dtype") or description.get("torch_dtype")
    dtype = getattr(torch, name, None) if name else files.read(min(files.names())).dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype: the files hold {name or dtype}; pass torch.float32, torch.bfloat16 or torch.float16")
    return dtype


@torch.no_grad()
def _model(
    cls: type[GPT], config: GPTConfig, dtype: torch.dtype, table: dict[str, list[Part]], files: TensorFiles
) -> GPT:
    """A model whose every parameter is filled from `files`, which must hold all of `table` and nothing else."""
    present = files.names()
    expected = {part.name for found in table.values() for part in found}
    ignored = {"lm_head.weight", "output.weight"} if config.tie_embeddings else set()
    if missing := expected - present:
        raise ValueError(f"{files.path}: lacks {_some(missing)}")
    unknown = {name for name in present - expected - ignored if not _TABLES.fullmatch(name)}
    unknown = {name for name in unknown if not _zero_gate_bias(name, files)}
    if unknown:
        raise ValueError(f"{files.path}: holds tensors that the model has no place for: {_some(unknown)}")
    model = uninitialised(cls, config, dtype)
    for name, parameter in model.named_parameters():
        start = 0
        for part in table[name]:
            rows = parameter[start : start + part.rows]
            tensor = files.read(part.name)
            expected_rows = (part.whole or part.rows, *rows.shape[1:])
            shape = expected_rows[::-1] if part.transposed else expected_rows
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{files.path}: {part.name} has shape {tuple(tensor.shape)}, expected {shape}")
            if part.whole:
                tensor = tensor[part.start : part.start + part.rows]
            if part.interleaved:
                tensor = _half_split(tensor, part.interleaved)
            rows.copy_(tensor.T if part.transposed else tensor)
            start += part.rows
    return model


def _some(names: set[str]) -> str:
    first = sorted(names)[:5]
    return ", ".join(first) + (f" and {len(names) - len(first)} more" if len(names) > len(first) else "")


def _zero_gate_bias(name: str, files: TensorFiles) -> bool:
    """Llama's ``mlp_bias`` gives the gate a bias too, for which `GPT` has no place; a zero one needs none."""
    return name.endswith("mlp.gate_proj.bias") and not files.read(name).any()


def _half_split(tensor: Tensor, heads: int) -> Tensor:
    """Rows of `heads` heads from neighbouring rotary pairs to pairs half a head apart."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)


def save_pretrained(
    model: GPT,
    folder: str | os.PathLike,
    tokenizer: Tokenizer | None = None,
    *,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Writes ``config.json``, ``generation_config.json``, safetensors and the tokenizer, as transformers reads them.

    GPT-2 models without biases get zeros, as that architecture always has them. The files are written beside the
    folder and moved in when all are there. Arguments and errors: see `GPT.save_pretrained`.
    """
    folder = Path(folder)
    description = config_to_hf(model.config)
    description["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"folder: {folder} is a file, expected a folder or a new name")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f"folder: {folder} is not empty, expected an empty or new one, or overwrite=True")
    tokens = _special_ids(tokenizer)
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_json(temporary / CONFIG_FILE, {**description, **tokens})
        if tokens:
            _write_json(temporary / GENERATION_FILE, tokens)
        _write_shards(model, temporary, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.iterdir():
            if _WEIGHTS.fullmatch(stale.name):
                stale.unlink()
        for file in temporary.iterdir():
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _special_ids(tokenizer: Tokenizer | None) -> dict[str, Any]:
    if tokenizer is None:
        return {}
    stops = list(tokenizer.stop_ids)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops[0] if len(stops) == 1 else stops or None}
    return {name: value for name, value in ids.items() if value is not None}


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_shards(model: GPT, folder: Path, max_shard_bytes: int) -> None:
    """One file, or several of at most `max_shard_bytes` (a larger tensor has one for itself)."""
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: got {max_shard_bytes}, expected a positive number")
    sizes = [(name, tensor.nbytes) for name, tensor in _hf_tensors(model)]
    shards: list[int] = []  # tensors in each
    size = 0
    for _, nbytes in sizes:
        if not shards or size + nbytes > max_shard_bytes:
            shards.append(0)
            size = 0
        shards[-1] += 1
        size += nbytes
    tensors = _hf_tensors(model)
    weight_map = {}
    for number, count in enumerate(shards, 1):
        file = WEIGHTS_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = {name: tensor.contiguous() for name, tensor in (next(tensors) for _ in range(count))}
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(nbytes for _, nbytes in sizes)
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _hf_tensors(model: GPT) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as transformers has them; views where they can be."""
    config = model.config
    gpt2 = config.position == "learned"
    # With every bias that the architecture has; those that this model lacks are zeros.
    full = config.replace(bias=True, qkv_bias=True, out_bias=True) if gpt2 else config
    if not gpt2 and config.has_qkv_bias != config.has_out_bias and (config.has_out_bias or config.bias):
        full = config.replace(qkv_bias=True, out_bias=True)  # Llama's attention_bias is for both
    parameters = dict(model.named_parameters())
    like = model.embedding.weight
    for name, found in parts(full, GPT2 if gpt2 else LLAMA, transposed=gpt2).items():
        start = 0
        for part in found:
            if name in parameters:
                rows = parameters[name].detach()[start : start + part.rows]
            else:
                rows = like.new_zeros(part.rows)
            yield part.name, rows.T if part.transposed else rows
            start += part.rows
    if not gpt2 and config.bias:
        for i in range(config.layers):
            yield f"{LLAMA['gate'].format(i)}.bias", like.new_zeros(config.F)
