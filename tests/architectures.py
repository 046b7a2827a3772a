"""One small model of each of nine architectures, with noise in training wherever its configuration can ask for some."""

from __future__ import annotations

from transformers import (
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
)  # fmt: skip

ARCHITECTURES = {
    "bloom": BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2, hidden_dropout=0.5, attention_dropout=0.5),
    "falcon": FalconConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, hidden_dropout=0.5, attention_dropout=0.5
    ),
    "gpt2": GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
    "gpt_neo": GPTNeoConfig(
        vocab_size=32, hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["global"], 1]], resid_dropout=0.5, embed_dropout=0.5,
        attention_dropout=0.5,
    ),
    "gpt_neox": GPTNeoXConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, hidden_dropout=0.5,
        attention_dropout=0.5,
    ),
    "llama": LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, attention_dropout=0.5
    ),
    "mixtral": MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        router_jitter_noise=0.5, attention_dropout=0.5,
    ),
    "opt": OPTConfig(
        vocab_size=32, hidden_size=16, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16, dropout=0.5,
        attention_dropout=0.5, layerdrop=0.5,
    ),
    "phi": PhiConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, resid_pdrop=0.5, embd_pdrop=0.5,
        attention_dropout=0.5,
    ),
}  # fmt: skip
