"""`patch` and `unpatch`: a transformers model on llmfast's kernels, module by module, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from types import MethodType

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.pytorch_utils import Conv1D

from llmfast.integrations.transformers import layers, loss
from llmfast.integrations.transformers.alike import kind_of
from llmfast.integrations.transformers.families import FAMILIES

__all__ = ["Patched", "patch", "unpatch"]

_KINDS = {nn.Linear: "linear", Conv1D: "conv1d", nn.LayerNorm: "layer_norm"}
_ATTRIBUTES = ("forward", "feed_forward_chunk")
_BEFORE = "_llmfast_attention_before"


class Patched:
    """What `patch` did: `replaced` counts modules by kind, `left` says what still runs in torch, and why."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.replaced: Counter[str] = Counter()
        self.left: Counter[str] = Counter()

    def __repr__(self) -> str:
        lines = [f"{self.name} on llmfast"]
        for title, counts in (("replaced", self.replaced), ("left", self.left)):
            lines += [f"  {title:<9} {count:>4} x {what}" for what, count in sorted(counts.items()) if count]
        return "\n".join(lines)


def patch(model: nn.Module, *, skip_padding: bool = False) -> Patched:
    """Runs a transformers model on llmfast's kernels, until `unpatch`.

    Attention is chosen through transformers' own interface (``model.set_attn_implementation("llmfast")``). Linear
    layers, norms (with the residual sum where the block allows it), feed-forward networks, rotary embeddings and the
    LM head with its loss get another ``forward`` on the instance; classes and other models are not touched. Parameters
    stay the model's own: state_dict, saving, optimizers, Trainer, PEFT and accelerate see no difference, adapters and
    hooks added before or after are honoured.

    In training, ``outputs.logits`` is computed when first used: a step that only needs the loss never has logits.
    Under torch.compile it is computed as usual. ``output_attentions`` gives None, as with "sdpa".

    Args:
        model: a `PreTrainedModel`, or any module with one inside (a PEFT model). Of architectures without a row in
            `families.FAMILIES`, linear layers, LayerNorm, attention and the LM-head loss are replaced, and the modules
            whose code is that of a known one under another name (`alike`).
        skip_padding: BERT-like encoders in eval mode compute only the tokens that `attention_mask` lets them see. The
            hidden states of the others, which transformers computes from what they would see, are zeros: for embeddings
            of texts of unequal length, which leave those out.

    Returns:
        What was replaced and what was left. Patching twice changes nothing more.

    Raises:
        TypeError: there is no transformers model in `model`.

    Example:
        >>> print(llmfast.patch(model))
        >>> llmfast.unpatch(model)
    """
    roots = [m for m in model.modules() if isinstance(m, PreTrainedModel)] if isinstance(model, nn.Module) else []
    if not roots:
        raise TypeError(
            f"model: got {type(model).__name__}, expected a transformers model, or a module with one inside"
        )
    report = Patched(type(roots[0]).__name__)
    rows = {}
    for root in roots:
        rows.update(FAMILIES.get(root.config.model_type, {}))
    kinds = {m: rows.get(type(m).__name__) or _KINDS.get(type(m)) or kind_of(m) for m in model.modules()}
    if not skip_padding:
        kinds = {m: None if kind == "bert_encoder" else kind for m, kind in kinds.items()}
    elif "bert_encoder" not in kinds.values():
        report.left["padding: no encoder that can leave it out"] += 1
    in_kernels = {id(p) for m, kind in kinds.items() if kind for p in m.parameters(recurse=False)}
    for module, kind in kinds.items():
        if kind is not None:
            _replace(module, kind, report)
        elif any(id(p) not in in_kernels for p in module.parameters(recurse=False)):
            report.left[f"{type(module).__name__}: no kernel in its place"] += 1
    for root in roots:
        _patch_head(root, report)
    _patch_attention(roots, report)
    return report


def unpatch(model: nn.Module) -> nn.Module:
    """Undoes `patch`: the model is bit for bit what it was. Returns `model`; one that is not patched stays as it is.

    Example:
        >>> llmfast.unpatch(model)
    """
    for module in model.modules():
        for config, implementation in module.__dict__.pop(_BEFORE, ()):
            if config._attn_implementation == "llmfast":
                config._attn_implementation_internal = implementation
        for attribute in _ATTRIBUTES:
            if layers.is_ours(module.__dict__.get(attribute)):
                delattr(module, attribute)
        if module.__dict__.get("_loss_function") is loss.causal_lm_loss:
            del module._loss_function
    return model


def _replace(module: nn.Module, kind: str, report: Patched) -> None:
    function = layers.REPLACEMENTS[kind]
    attribute = function.__name__
    found = module.__dict__.get(attribute)
    if found is not None and not layers.is_ours(found):
        report.left[f"{type(module).__name__}: has a forward of its own"] += 1
        return
    if kind == "layer_norm" and len(module.normalized_shape) != 1:
        report.left["LayerNorm: over more than one dimension"] += 1
        return
    if found is None:
        setattr(module, attribute, MethodType(function, module))
    report.replaced[f"{type(module).__name__} ({kind})"] += 1


def _patch_head(model: PreTrainedModel, report: Patched) -> None:
    """The head and its loss, where the model has the usual next-token loss."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or not layers.is_ours(head.__dict__.get("forward")):
        return
    if model.__dict__.get("_loss_function") is not loss.causal_lm_loss:
        if model.loss_function is not ForCausalLMLoss:
            return
        model.loss_function = loss.causal_lm_loss
        head.forward = MethodType(layers.REPLACEMENTS["lm_head"], head)
    report.replaced[f"{type(head).__name__} (linear)"] -= 1
    report.replaced["LM head and loss (linear_cross_entropy)"] += 1


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """`config` and those inside it, which need not be a model's."""
    yield config
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            yield from _configs(getattr(config, name))


def _patch_attention(roots: list[PreTrainedModel], report: Patched) -> None:
    """Of each model with a configuration of its own: parts of a model may have another attention than the whole."""
    own = list({id(model.config): model for model in reversed(roots)}.values())[::-1]
    before = [[(config, config._attn_implementation) for config in _configs(model.config)] for model in own]
    inside = {id(part) for model in roots for part in model.modules() if part is not model}
    for model in roots:
        if id(model) not in inside:
            model.set_attn_implementation("llmfast")
    for model, pairs in zip(own, before):
        changed = [pair for pair in pairs if pair[1] != "llmfast"]
        setattr(model, _BEFORE, changed + model.__dict__.get(_BEFORE, []))
        if model.config._attn_implementation != "llmfast":
            report.left[f"attention of {type(model).__name__}: it does not use transformers' attention interface"] += 1
            continue
        report.replaced['attention kernel (attn_implementation="llmfast")'] += 1
