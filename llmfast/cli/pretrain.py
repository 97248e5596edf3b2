"""``llmfast pretrain``: flags, files and exit codes around `llmfast.train.pretrain`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from llmfast.train import NonFiniteError, PretrainConfig, pretrain
from llmfast.train.config import read_config_file
from llmfast.train.run import CONFIG_FILE, run_folder

__all__ = ["PretrainConfig", "defaults", "main"]


def defaults(arguments: Sequence[str]) -> PretrainConfig:
    """What flags start from: the defaults, over them the run that ``--resume`` continues, over it the ``--config`` file.

    Raises:
        ValueError, FileNotFoundError, ImportError: as `read_config_file`, `run_folder` and `PretrainConfig` do.
    """
    file, resume = _value_of("--config", arguments), _value_of("--resume", arguments)
    values = {} if file is None else read_config_file(file)
    if resume is not None:
        given = _value_of("--out", arguments)
        folder = run_folder(PretrainConfig(out=given or values.get("out", PretrainConfig.out), resume=resume))
        if given and Path(given).absolute() != folder.absolute():
            raise ValueError(f"out: got {given!r}, expected none, as resume continues the run in {str(folder)!r}")
        if resume != "auto" or (folder / CONFIG_FILE).exists():
            values = {**read_config_file(folder / CONFIG_FILE), **values, "out": str(folder)}
    return PretrainConfig(**values)


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    value = None
    for position, argument in enumerate(arguments):
        if argument == flag and position + 1 < len(arguments):
            value = arguments[position + 1]
        elif argument.startswith(flag + "="):
            value = argument.removeprefix(flag + "=")
    return value


def main(config: PretrainConfig) -> int:
    """Run it. Exit codes: 0 done; 1 the loss is not finite (stderr says where); 130, 143 ended by SIGINT, SIGTERM.

    Raises:
        What `llmfast.train.pretrain` raises for wrong input; the command line turns that into one line and exit code 2.
    """
    try:
        result = pretrain(config)
    except NonFiniteError as error:
        print(f"llmfast pretrain: {error}", file=sys.stderr)
        return 1
    return 128 + result.signal if result.signal else 0
