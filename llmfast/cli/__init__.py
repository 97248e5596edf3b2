"""The command ``llmfast``: each subcommand is a module here with a config dataclass and ``main(config) -> exit code``.

Only the chosen subcommand's module is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

__all__ = ["main"]

SIGINT_CODE, SIGPIPE_CODE = 130, 141  # 128 + the signal's number, as shells report them


class Command(NamedTuple):
    module: str
    config: str
    summary: str


COMMANDS = {
    "demo": Command("llmfast.cli.demo", "DemoConfig", "train and sample a small model on this machine, in minutes"),
    "pretrain": Command("llmfast.cli.pretrain", "PretrainConfig", "train a model on text, from the start"),
    "generate": Command("llmfast.cli.generate", "GenerateConfig", "continue text with a trained model"),
    "bench": Command("llmfast.cli.bench", "BenchConfig", "compare speed with PyTorch and others"),
    "info": Command("llmfast.cli.info", "InfoConfig", "what this machine has, and which kernels run on it"),
}

# What wrong input and the machine's limits raise, besides llmfast's own exceptions; anything else is a fault of ours and
# keeps its traceback.
FOR_PEOPLE = (ValueError, OSError, ImportError, FloatingPointError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``llmfast ARGUMENTS`` (default: the process's) and returns the exit code.

    2 for bad input, with one line on stderr (``LLMFAST_DEBUG=1`` shows the traceback); 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()  # so that a closed pipe shows here, not at exit
        return code
    except KeyboardInterrupt:
        return SIGINT_CODE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SIGPIPE_CODE
    except Exception as error:
        ours = type(error).__module__.startswith("llmfast.")
        if not (ours or isinstance(error, FOR_PEOPLE)) or os.environ.get("LLMFAST_DEBUG") == "1":
            raise
        print(f"llmfast: error: {str(error) or type(error).__name__}", file=sys.stderr)
        return 2


def _run(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    if name in ("-V", "--version"):
        from llmfast import __version__

        print(f"llmfast {__version__}")
        return 0
    if name not in COMMANDS:
        raise ValueError(f"unknown command {name!r}, expected one of {', '.join(COMMANDS)}")
    import tyro

    command = COMMANDS[name]
    module = import_module(command.module)
    # A module may say what flags start from, given all of them (a config file's values, a resumed run's).
    start = {"default": module.defaults(arguments[1:])} if hasattr(module, "defaults") else {}
    config = tyro.cli(getattr(module, command.config), prog=f"llmfast {name}", args=arguments[1:], **start)
    return module.main(config)


def _usage() -> str:
    lines = [f"  {name:<10}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        (
            "usage: llmfast COMMAND [options]",
            "",
            *lines,
            "",
            "llmfast COMMAND --help lists a command's options; llmfast --version says which llmfast this is.",
        )
    )
