"""One provider's training step, prefill or decoding of a token, served from a process of its own.

The parent sends ``step`` or ``stop``; a step is answered with its seconds and loss, a stop with what the process used.
A failure is answered with its reason. Nothing runs between requests, so providers can take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Literal

import torch

from llmfast.models import GPTConfig

__all__ = ["HYPERPARAMETERS", "StepSpec", "Task", "serve"]

HYPERPARAMETERS = dict(lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
TOKENS_A_TURN = 8
LONG_TURN = 1.0  # seconds


Task = Literal["training step", "prefill", "decode"]


@dataclass(frozen=True)
class StepSpec:
    """One provider's step.

    Attributes:
        provider: llmfast or transformers.
        config: the model's shape.
        dtype: float32 or bfloat16. Training, llmfast holds parameters in it, with float32 masters in its AdamW;
            transformers holds float32 parameters and computes under autocast, as its users do. Otherwise both hold
            parameters in it.
        compile: whether the model goes through torch.compile.
        B, T: sequences and tokens of each in a batch.
        threads: of torch and llmfast.
        task: see `llmfast.bench.steps.StepCase`.
        malloc: whether freed memory is kept; llmfast's training does so always.
    """

    provider: str
    config: GPTConfig
    dtype: str
    compile: bool
    B: int
    T: int
    threads: int
    task: Task = "training step"
    malloc: bool = False


def serve(connection: Connection, spec: StepSpec) -> None:
    """Answers requests until ``stop``."""
    from llmfast import backend
    from llmfast.bench.harness import Activity
    from llmfast.bench.memory import peak_rss

    try:
        torch.set_num_threads(spec.threads)
        activity = Activity()
        if spec.malloc:
            backend.keep_freed_memory()
        step = STEPS[spec.provider, spec.task](spec)
        connection.send({"ready": True})
        while connection.recv() == "step":
            loss, seconds = _turn(step, spec.task)
            connection.send({"seconds": seconds, "loss": loss, "peak_rss": peak_rss(), "rss": peak_rss("VmRSS")})
        connection.send({"peak_rss": peak_rss(), "fell_back": activity.fell_back()})
    except (EOFError, KeyboardInterrupt):
        pass  # the parent has gone, or is going
    except Exception as error:
        connection.send({"error": f"{type(error).__name__}: {error}".split("\n", 1)[0][:200]})


def _turn(step: Callable[[], float], task: Task) -> tuple[float, float]:
    """A step's loss and seconds. Tokens are decoded some in a row, as generation does: what other providers' turns left
    in the caches then counts for one of them, not for each."""
    start, steps = time.perf_counter(), 0
    while True:
        loss = step()
        steps += 1
        seconds = time.perf_counter() - start
        if task != "decode" or steps == TOKENS_A_TURN or seconds > LONG_TURN:
            return loss, seconds / steps


def _model(spec: StepSpec):
    from llmfast.models import GPT

    torch.manual_seed(0)
    return GPT(spec.config)


def _batch(spec: StepSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens, the same at every step: a falling loss shows that gradients and optimiser are right."""
    ids = torch.randint(spec.config.vocab_size, (spec.B, spec.T), generator=torch.Generator().manual_seed(0))
    targets = torch.cat((ids[:, 1:], torch.full((spec.B, 1), -100)), dim=1)
    return ids, targets


def _llmfast_training(spec: StepSpec) -> Callable[[], float]:
    import llmfast

    llmfast.backend.keep_freed_memory()  # as llmfast.train.pretrain does
    model = _model(spec)
    optimizer = llmfast.AdamW(model.parameters(), **HYPERPARAMETERS)
    optimizer.round_parameters(getattr(torch, spec.dtype))
    ids, targets = _batch(spec)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(ids, targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _transformers_training(spec: StepSpec) -> Callable[[], float]:
    model = transformers_twin(_model(spec)).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **HYPERPARAMETERS)
    ids, _ = _batch(spec)
    forward = torch.compile(model) if spec.compile else model
    narrow = spec.dtype != "float32"

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=getattr(torch, spec.dtype), enabled=narrow):
            loss = forward(input_ids=ids, labels=ids, use_cache=False).loss  # shifts labels itself
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _llmfast_inference(spec: StepSpec) -> Callable[[], float]:
    model = _model(spec).to(getattr(torch, spec.dtype)).eval()
    ids, _ = _batch(spec)
    caches = model.caches(spec.T + 1)

    @torch.inference_mode()
    def prefill() -> float:
        for cache in caches:
            cache.length = 0
        return _surprise(model(ids, caches=caches, last_only=True))

    @torch.inference_mode()
    def decode() -> float:
        for cache in caches:
            cache.length = spec.T
        return _surprise(model(ids[:, :1], caches=caches, last_only=True))

    if spec.task == "prefill":
        return prefill
    prefill()
    return decode


def _transformers_inference(spec: StepSpec) -> Callable[[], float]:
    from transformers import DynamicCache, StaticCache

    model = transformers_twin(_model(spec)).to(getattr(torch, spec.dtype)).eval()
    ids, _ = _batch(spec)
    forward = torch.compile(model) if spec.compile else model

    @torch.inference_mode()
    def prefill() -> float:
        return _surprise(forward(input_ids=ids, use_cache=True, logits_to_keep=1).logits)

    if spec.task == "prefill":
        return prefill
    # as its documentation has it: compiled code works on a cache of fixed size, the prompt goes in without compilation
    cache = StaticCache(config=model.config, max_cache_len=spec.T + 1) if spec.compile else DynamicCache()
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def decode() -> float:
        logits = forward(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).logits
        if spec.compile:
            for layer in cache.layers:
                layer.cumulative_length.fill_(spec.T)
        else:
            cache.crop(-1)
        return _surprise(logits)

    return decode


def _surprise(logits: torch.Tensor) -> float:
    """The loss of token 0 in the last position: one number that a wrong cache or model changes."""
    return -logits[:, -1].float().log_softmax(-1)[:, 0].mean().item()


STEPS: dict[tuple[str, Task], Callable[[StepSpec], Callable[[], float]]] = {
    ("llmfast", "training step"): _llmfast_training,
    ("llmfast", "prefill"): _llmfast_inference,
    ("llmfast", "decode"): _llmfast_inference,
    ("transformers", "training step"): _transformers_training,
    ("transformers", "prefill"): _transformers_inference,
    ("transformers", "decode"): _transformers_inference,
}


def transformers_twin(model):
    """The same network, with the same weights, as transformers has it; no dropout, everything else as it comes."""
    import transformers

    transformers.logging.set_verbosity_error()
    c = model.config
    if c.position == "learned":
        twin = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=c.vocab_size, n_positions=c.context, n_embd=c.width, n_layer=c.layers, n_head=c.heads,
                n_inner=c.F, layer_norm_epsilon=c.norm_eps, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
                tie_word_embeddings=c.tie_embeddings, bos_token_id=None, eos_token_id=None,
            )
        )  # fmt: skip
    else:
        twin = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=c.vocab_size, max_position_embeddings=c.context, hidden_size=c.width, head_dim=c.D,
                num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.Hkv,
                intermediate_size=c.F, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tie_embeddings,
                rope_parameters={"rope_type": "default", "rope_theta": c.rotary_theta},
                bos_token_id=None, eos_token_id=None,
            )
        )  # fmt: skip
    weights = _gpt2_weights(model) if c.position == "learned" else _llama_weights(model)
    if c.tie_embeddings:
        weights["lm_head.weight"] = model.embedding.weight
    else:
        weights["lm_head.weight"] = model.head.weight
    twin.load_state_dict({name: value.detach() for name, value in weights.items()})
    return twin


def _gpt2_weights(model) -> dict[str, torch.Tensor]:
    weights = {
        "transformer.wte.weight": model.embedding.weight,
        "transformer.wpe.weight": model.embedding.position_weight,
        "transformer.ln_f.weight": model.norm.weight,
        "transformer.ln_f.bias": model.norm.bias,
    }
    for i, block in enumerate(model.blocks):
        layers = {
            "ln_1": block.attention_norm,
            "attn.c_attn": block.attention.qkv,
            "attn.c_proj": block.attention.out,
            "ln_2": block.ffn_norm,
            "mlp.c_fc": block.ffn.up,
            "mlp.c_proj": block.ffn.down,
        }
        for name, layer in layers.items():
            weight = layer.weight if name.startswith("ln") else layer.weight.t()  # Conv1D holds [in, out]
            weights[f"transformer.h.{i}.{name}.weight"] = weight
            weights[f"transformer.h.{i}.{name}.bias"] = layer.bias
    return weights


def _llama_weights(model) -> dict[str, torch.Tensor]:
    c = model.config
    weights = {"model.embed_tokens.weight": model.embedding.weight, "model.norm.weight": model.norm.weight}
    for i, block in enumerate(model.blocks):
        q, k, v = block.attention.qkv.weight.split((c.heads * c.D, c.Hkv * c.D, c.Hkv * c.D))
        layers = {
            "input_layernorm": block.attention_norm.weight,
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": block.attention.out.weight,
            "post_attention_layernorm": block.ffn_norm.weight,
            "mlp.gate_proj": block.ffn.gate.weight,
            "mlp.up_proj": block.ffn.up.weight,
            "mlp.down_proj": block.ffn.down.weight,
        }
        weights.update({f"model.layers.{i}.{name}.weight": value for name, value in layers.items()})
    return weights
