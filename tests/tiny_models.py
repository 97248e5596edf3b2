"""Sizes of Hugging Face models that tests build with random weights."""

V = 96
TINY = dict(
    vocab_size=V,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
PLAIN = {key: value for key, value in TINY.items() if key != "num_key_value_heads"}
