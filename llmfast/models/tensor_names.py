"""Which tensors of a file make up each parameter of a `GPT`: one table for reading and writing."""

from __future__ import annotations

from dataclasses import dataclass

from llmfast.models.config import GPTConfig

__all__ = ["GGUF", "GGUF_PHI3", "GPT2", "LLAMA", "PHI3", "Part", "parts"]


@dataclass(frozen=True)
class Part:
    """Some rows of a parameter, as a file has them.

    Attributes:
        name: the tensor's, in the file.
        rows: how many, in the order of the list that the part stands in.
        transposed: the file holds ``[in, out]`` (GPT-2's Conv1D).
        interleaved: heads whose rotary pairs are neighbours, (0, 1), (2, 3), ..., where llmfast and transformers have
            (0, D/2), (1, D/2 + 1), ...; 0 when the file has them so too.
        start, whole: of a tensor of `whole` rows, the part is `rows` from `start`; 0: the tensor has no more rows.
    """

    name: str
    rows: int
    transposed: bool = False
    interleaved: int = 0
    start: int = 0
    whole: int = 0


GPT2 = {
    "embedding": "transformer.wte.weight",
    "positions": "transformer.wpe.weight",
    "norm": "transformer.ln_f",
    "head": "lm_head.weight",
    "attention_norm": "transformer.h.{}.ln_1",
    "qkv": "transformer.h.{}.attn.c_attn",
    "out": "transformer.h.{}.attn.c_proj",
    "ffn_norm": "transformer.h.{}.ln_2",
    "up": "transformer.h.{}.mlp.c_fc",
    "down": "transformer.h.{}.mlp.c_proj",
}
LLAMA = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm",
    "head": "lm_head.weight",
    "attention_norm": "model.layers.{}.input_layernorm",
    "q": "model.layers.{}.self_attn.q_proj",
    "k": "model.layers.{}.self_attn.k_proj",
    "v": "model.layers.{}.self_attn.v_proj",
    "q_norm": "model.layers.{}.self_attn.q_norm",
    "k_norm": "model.layers.{}.self_attn.k_norm",
    "out": "model.layers.{}.self_attn.o_proj",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "gate": "model.layers.{}.mlp.gate_proj",
    "up": "model.layers.{}.mlp.up_proj",
    "down": "model.layers.{}.mlp.down_proj",
}
PHI3 = {role: name for role, name in LLAMA.items() if role not in ("q", "k", "v", "gate", "up")} | {
    "qkv": "model.layers.{}.self_attn.qkv_proj",
    "gate_up": "model.layers.{}.mlp.gate_up_proj",
}
GGUF = {
    "embedding": "token_embd.weight",
    "positions": "position_embd.weight",
    "norm": "output_norm",
    "head": "output.weight",
    "attention_norm": "blk.{}.attn_norm",
    "qkv": "blk.{}.attn_qkv",
    "q": "blk.{}.attn_q",
    "k": "blk.{}.attn_k",
    "v": "blk.{}.attn_v",
    "q_norm": "blk.{}.attn_q_norm",
    "k_norm": "blk.{}.attn_k_norm",
    "out": "blk.{}.attn_output",
    "ffn_norm": "blk.{}.ffn_norm",
    "gate": "blk.{}.ffn_gate",
    "up": "blk.{}.ffn_up",
    "down": "blk.{}.ffn_down",
}
GGUF_PHI3 = {role: name for role, name in GGUF.items() if role not in ("q", "k", "v", "gate", "up")} | {
    "gate_up": GGUF["up"],
}


def parts(
    config: GPTConfig, names: dict[str, str], *, transposed: bool = False, interleaved: bool = False
) -> dict[str, list[Part]]:
    """For each parameter of ``GPT(config)``, by its name, the parts that a file with `names` has of it, in order.

    `transposed`: of the linear layers. `interleaved`: of queries and keys.
    """
    C, D, F = config.width, config.D, config.F
    query, key = config.heads * D, config.Hkv * D
    table: dict[str, list[Part]] = {"embedding.weight": [Part(names["embedding"], config.vocab_size)]}
    if config.position == "learned":
        table["embedding.position_weight"] = [Part(names["positions"], config.context)]

    def norm(parameter: str, name: str) -> None:
        table[f"{parameter}.weight"] = [Part(f"{name}.weight", C)]
        if config.norm == "layer_norm" and config.bias:
            table[f"{parameter}.bias"] = [Part(f"{name}.bias", C)]

    for i in range(config.layers):
        block = f"blocks.{i}"

        def linear(parameter: str, bias: bool, pieces: list[tuple[str, int, int]], block=block, i=i) -> None:
            names_of = [(names[piece].format(i), rows, heads if interleaved else 0) for piece, rows, heads in pieces]
            table[f"{block}.{parameter}.weight"] = [
                Part(f"{name}.weight", rows, transposed, heads) for name, rows, heads in names_of
            ]
            if bias:
                table[f"{block}.{parameter}.bias"] = [
                    Part(f"{name}.bias", rows, interleaved=heads) for name, rows, heads in names_of
                ]

        separate = [("q", query, config.heads), ("k", key, config.Hkv), ("v", key, 0)]
        norm(f"{block}.attention_norm", names["attention_norm"].format(i))
        fused = "q" not in names or config.position == "learned"  # GPT-2's and Phi-3's files have one for all three
        linear("attention.qkv", config.has_qkv_bias, [("qkv", query + 2 * key, 0)] if fused else separate)
        if config.qk_norm:
            for role in ("q_norm", "k_norm"):
                table[f"{block}.attention.{role}.weight"] = [Part(f"{names[role].format(i)}.weight", D)]
        linear("attention.out", config.has_out_bias, [("out", C, 0)])
        norm(f"{block}.ffn_norm", names["ffn_norm"].format(i))
        if "gate_up" in names:
            both = f"{names['gate_up'].format(i)}.weight"
            table[f"{block}.ffn.gate.weight"] = [Part(both, F, whole=2 * F)]
            table[f"{block}.ffn.up.weight"] = [Part(both, F, start=F, whole=2 * F)]
        else:
            linear("ffn.up", config.bias, [("up", F, 0)])
            if config.gated:
                linear("ffn.gate", False, [("gate", F, 0)])
        linear("ffn.down", config.bias, [("down", C, 0)])
    norm("norm", names["norm"])
    if not config.tie_embeddings:
        table["head.weight"] = [Part(names["head"], config.vocab_size)]
    return table
