"""``transformers serve``, an OpenAI-compatible server, with every model it loads on llmfast's kernels.

    python -m llmfast.integrations.serve SmolLM2-135M-Instruct --port 8000

Arguments are those of ``transformers serve``, except that ``--attn-implementation`` and ``--continuous-batching`` are not
for it: the server accepts only names it knows for the first, and the second is attention over pages, which llmfast has
no kernel for. Needs ``pip install 'transformers[serving]'``.

Without this module, ``llmfast.integrations.torch.enable_sdpa()`` before the server starts gives it llmfast's attention
alone, through torch's own ``scaled_dot_product_attention``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main", "serve_on_llmfast"]

REFUSED = ("--attn-implementation", "--attn_implementation", "--continuous-batching", "--continuous_batching")


def serve_on_llmfast() -> None:
    """From now on, models that transformers' server loads in this process are patched (`llmfast.patch`).

    Raises:
        ImportError: this transformers has no server, or one that loads models elsewhere.
    """
    from llmfast.integrations import transformers as integration

    try:
        from transformers.cli.serving.model_manager import ModelManager

        load = ModelManager._load_model
    except (ImportError, AttributeError) as error:
        raise ImportError(f"transformers: its server was not found ({error}), expected version 5.20 or later") from None
    if getattr(load, "on_llmfast", False):
        return

    def load_patched(self, *args, **kwargs):
        model = load(self, *args, **kwargs)
        integration.patch(model)
        return model

    load_patched.on_llmfast = True
    ModelManager._load_model = load_patched


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the server until it is interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for argument in arguments:
        if argument.split("=")[0] in REFUSED:
            raise SystemExit(
                f"llmfast: error: {argument}: not for llmfast's server, which chooses the attention itself"
            )
    try:
        serve_on_llmfast()
    except ImportError as error:
        raise SystemExit(f"llmfast: error: {error}; pip install 'transformers[serving]'") from None
    from transformers.cli.transformers import app

    app(["serve", *arguments], prog_name="llmfast.integrations.serve", standalone_mode=True)


if __name__ == "__main__":
    main()
