"""llmfast under other people's code: one module for each library it plugs into, imported when first used.

>>> llmfast.integrations.torch.enable_sdpa()
"""

from importlib import import_module
from importlib.util import find_spec

__all__ = ["torch"]


def __getattr__(name: str):
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
